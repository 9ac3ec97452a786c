//! Who may ask: clients with a key, where the configuration has keys, and web pages of the origins that it names.

use std::sync::Arc;

use axum::Router;
use axum::extract;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header, request};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::RouterIntoService;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use sarai_core::Error;
use subtle::ConstantTimeEq;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::error::Failure;
use crate::config::Access;

/// Paths that say nothing of what was asked, and are open to everybody: who looks whether the server is there has no key.
const OPEN: [&str; 6] = ["/", "/health", "/v1/health", "/ready", "/v1/models", "/models"];
/// Whose pages run on this machine, as Ollama has it.
const LOCAL_HOSTS: [&str; 4] = ["localhost", "127.0.0.1", "0.0.0.0", "[::1]"];
const LOCAL_SCHEMES: [&str; 5] = ["app:", "file:", "tauri:", "vscode-webview:", "vscode-file:"];

/// The URLs, for those who may ask.
#[derive(Clone)]
pub struct Door {
    urls: Urls,
    /// Told apart: what a page's browser asks for costs each open stream kilobytes.
    for_pages: Urls,
}

type Urls = TowerToHyperService<RouterIntoService<Incoming>>;

impl Door {
    /// To these URLs.
    pub fn new(router: Router, access: &Access) -> Self {
        let router = with_key(router, access);
        let urls = |router: Router| TowerToHyperService::new(router.into_service());
        Self { urls: urls(router.clone()), for_pages: urls(with_origins(router, access)) }
    }
}

impl Service<Request<Incoming>> for Door {
    type Response = <Urls as Service<Request<Incoming>>>::Response;
    type Error = <Urls as Service<Request<Incoming>>>::Error;
    type Future = <Urls as Service<Request<Incoming>>>::Future;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        match request.headers().contains_key(header::ORIGIN) {
            true => self.for_pages.call(request),
            false => self.urls.call(request),
        }
    }
}

fn with_key(router: Router, access: &Access) -> Router {
    if access.keys.is_empty() {
        return router;
    }
    let keys: Arc<[String]> = access.keys.clone().into();
    router.layer(from_fn(move |request, next| check(Arc::clone(&keys), request, next)))
}

fn with_origins(router: Router, access: &Access) -> Router {
    let origins: Arc<[String]> = access.origins.clone().into();
    let known = Arc::clone(&origins);
    let router = router.layer(from_fn(move |request, next| refuse_foreign(Arc::clone(&known), request, next)));
    let is_allowed =
        move |origin: &HeaderValue, _: &request::Parts| origin.to_str().is_ok_and(|origin| is_of(&origins, origin));
    let told = ["x-sarai-served-by", "x-sarai-fallback-reason", "x-sarai-degraded", "x-should-retry"]
        .map(HeaderName::from_static);
    let cors = CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(is_allowed))
        .allow_methods([Method::GET, Method::POST, Method::HEAD, Method::OPTIONS])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(told);
    router.layer(cors)
}

/// Whether a page of this origin may ask.
fn is_of(origins: &[String], origin: &str) -> bool {
    let host = origin.split_once("://").map_or("", |(_, host)| host);
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let is_local = LOCAL_HOSTS.contains(&name) && (origin.starts_with("http://") || origin.starts_with("https://"));
    is_local
        || LOCAL_SCHEMES.iter().any(|scheme| origin.starts_with(scheme))
        || origins.iter().any(|one| one == "*" || one.trim_end_matches('/') == origin)
}

/// A browser asks for its pages before anybody says whether they may, and keeps from them but the answer.
async fn refuse_foreign(origins: Arc<[String]>, request: extract::Request, next: Next) -> Response {
    match foreign(&origins, request.headers()) {
        None => next.run(request).await,
        Some(origin) => api_of(request.uri().path())(Error::ForeignOrigin { origin }).into_response(),
    }
}

/// Where a page is from that may not ask. Those of the server itself may.
fn foreign(origins: &[String], headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let origin = text(header::ORIGIN).unwrap_or_default();
    let is_own = text(header::HOST).is_some_and(|host| origin.split_once("://").is_some_and(|(_, of)| of == host));
    (!is_own && !is_of(origins, origin)).then(|| origin.chars().take(200).collect())
}

/// In whose words a path's errors are told.
fn api_of(path: &str) -> fn(Error) -> Failure {
    if path.starts_with("/api") { Failure::Ollama } else { Failure::OpenAi }
}

async fn check(keys: Arc<[String]>, request: extract::Request, next: Next) -> Response {
    let path = request.uri().path();
    if OPEN.contains(&path) || has_key(&keys, request.headers()) {
        return next.run(request).await;
    }
    api_of(path)(Error::WrongKey).into_response()
}

/// Whether one of the keys came, as OpenAI's clients send it, or Anthropic's.
fn has_key(keys: &[String], headers: &HeaderMap) -> bool {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = text(header::AUTHORIZATION).and_then(|sent| {
        let (kind, key) = sent.split_once(' ')?;
        kind.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    let sent = bearer.or_else(|| text(HeaderName::from_static("x-api-key")));
    // How long a comparison takes says nothing of the key.
    sent.is_some_and(|sent| keys.iter().any(|key| bool::from(key.as_bytes().ct_eq(sent.as_bytes()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_this_machine_may_ask_and_those_that_are_named() {
        for origin in
            ["http://localhost", "http://localhost:3000", "https://127.0.0.1:8443", "http://[::1]:80", "tauri://x"]
        {
            assert!(is_of(&[], origin), "{origin}");
        }
        for origin in [
            "http://localhost.evil.org",
            "https://chat.example.org",
            "null",
            "http://evil.org:localhost",
            "ftp://localhost",
        ] {
            assert!(!is_of(&[], origin), "{origin}");
        }
        let named = ["https://chat.example.org/".to_owned()];
        assert!(is_of(&named, "https://chat.example.org") && !is_of(&named, "https://chat.example.org.evil.org"));
        assert!(is_of(&["*".to_owned()], "https://anywhere.org"));
    }

    #[test]
    fn a_key_is_sent_in_one_of_two_ways() {
        let keys = ["secret".to_owned(), "other".to_owned()];
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
        };
        assert!(has_key(&keys, &headers("authorization", "Bearer secret")));
        assert!(has_key(&keys, &headers("authorization", "bearer  other")));
        assert!(has_key(&keys, &headers("x-api-key", "other")));
        for (name, value) in [("authorization", "secret"), ("authorization", "Bearer secre"), ("x-api-key", "")] {
            assert!(!has_key(&keys, &headers(name, value)), "{name}: {value}");
        }
        assert!(!has_key(&keys, &HeaderMap::new()));
    }
}
