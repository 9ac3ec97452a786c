//! Talking to a running server.

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Client, Response};
use serde_json::Value;

use crate::Failure;
use crate::args::UrlArgs;

/// A client of one server.
pub struct Server {
    url: String,
    client: Client,
}

impl Server {
    /// A client for this URL.
    pub fn at(server: &UrlArgs) -> Result<Self, Failure> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let key = server.api_key.iter().map(|key| {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(Failure::failed)?;
            value.set_sensitive(true);
            Ok((AUTHORIZATION, value))
        });
        let headers = key.collect::<Result<HeaderMap, Failure>>()?;
        let client = Client::builder().no_proxy().default_headers(headers).build().map_err(Failure::failed)?;
        Ok(Self { url: server.url.trim_end_matches('/').to_owned(), client })
    }

    fn absent(&self, error: reqwest::Error) -> Failure {
        let error = anyhow::Error::from(error)
            .context(format!("no server answers at {}: start one with `sarai serve`, or name it with --url", self.url));
        Failure::no_server(error)
    }

    /// `GET` of JSON.
    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.map_err(|e| self.absent(e))?;
        let body = response.bytes().await.map_err(Failure::failed)?;
        serde_json::from_slice(&body).map_err(|_| {
            Failure::no_server(anyhow::anyhow!("what answers at {} is not sarai: name it with --url", self.url))
        })
    }

    /// `POST` of JSON; an error status becomes the server's message.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Response, Failure> {
        let request = self.client.post(format!("{}{path}", self.url)).body(body.to_string());
        let response = request.send().await.map_err(|e| self.absent(e))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response.bytes().await.map_err(Failure::failed)?;
        let error: Value = serde_json::from_slice(&body).unwrap_or_default();
        let message = error["error"].as_str().map_or_else(|| status.to_string(), str::to_owned);
        Err(Failure::failed(anyhow::anyhow!(message)))
    }
}
