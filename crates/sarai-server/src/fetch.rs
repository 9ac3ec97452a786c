//! Pictures that a request only names: fetched for workers where the configuration allows it, and never from a private address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use sarai_core::media::to_base64;
use sarai_core::{Error, GenerateRequest, Media, MediaSource, Message, Prompt};
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout_at};

use crate::config::MediaConfig;

/// How often a server may say that it is elsewhere.
const REDIRECTS: usize = 3;

/// What is left for the pictures of one request.
struct Room {
    bytes: usize,
    until: Instant,
}

/// Fetches pictures.
#[derive(Clone)]
pub struct Fetcher {
    config: Arc<MediaConfig>,
    /// For servers on the internet, if they may be asked.
    client: Option<Client>,
    may_ask: fn(IpAddr) -> bool,
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Fetcher {
    /// Fetches as the configuration allows.
    ///
    /// # Errors
    /// The HTTP client cannot be made.
    pub fn new(config: MediaConfig) -> reqwest::Result<Self> {
        Self::asking(config, is_public)
    }

    fn asking(config: MediaConfig, may_ask: fn(IpAddr) -> bool) -> reqwest::Result<Self> {
        let redirects = Policy::custom(move |attempt| {
            if attempt.previous().len() > REDIRECTS {
                return attempt.error("it is redirected too often");
            }
            match check_url(attempt.url(), may_ask) {
                Ok(()) => attempt.follow(),
                Err(why) => attempt.error(why),
            }
        });
        // How long it may take is up to the room that a request has.
        let builder = Client::builder().no_proxy().redirect(redirects).dns_resolver(Arc::new(Resolver { may_ask }));
        let client = config.http.then(|| builder.build()).transpose()?;
        Ok(Self { config: Arc::new(config), client, may_ask })
    }

    /// Puts what a request names in the place of its names.
    ///
    /// # Errors
    /// It is not allowed, not there, too large or too slow; the text says which, and what to do.
    pub async fn bring(&self, request: &mut GenerateRequest) -> Result<(), Error> {
        let Prompt::Chat(messages) = &mut request.prompt else { return Ok(()) };
        let mut room = Room { bytes: self.config.max_bytes, until: Instant::now() + self.config.limit };
        for media in messages.iter_mut().flat_map(|Message { media, .. }| media) {
            let Media { source, param, .. } = media;
            let MediaSource::Url(url) = source else { continue };
            let fetched = self.fetch(url, &mut room).await.map_err(|why| {
                let url: String = url.chars().take(200).collect();
                Error::invalid(param, format!("`{url}` of `{param}` {why}"))
            })?;
            *source = MediaSource::Base64(to_base64(&fetched));
        }
        Ok(())
    }

    async fn fetch(&self, url: &str, room: &mut Room) -> Result<Vec<u8>, String> {
        let written = url;
        let url = Url::parse(url).map_err(|error| format!("is no URL ({error}): use a data URL in base64"))?;
        let fetched = match url.scheme() {
            "file" => timeout_at(room.until, self.read(written, &url, room.bytes)).await,
            _ => timeout_at(room.until, self.download(&url, room.bytes)).await,
        };
        let late = |_| format!("is not there within {} s (media.seconds)", self.config.limit.as_secs());
        let fetched = fetched.map_err(late)??;
        room.bytes -= fetched.len();
        Ok(fetched)
    }

    async fn read(&self, written: &str, url: &Url, most: usize) -> Result<Vec<u8>, String> {
        const REFUSED: &str =
            "is in no folder that may be read: name the folder in `media.folders`, or send a data URL in base64";
        let paths = match (url.to_file_path(), written.split_once("://")) {
            (Ok(path), _) => vec![path],
            // As llama.cpp's server has it: below a folder that may be read.
            (Err(()), Some((_, below))) => self.config.folders.iter().map(|folder| folder.join(below)).collect(),
            (Err(()), None) => Vec::new(),
        };
        let mut allowed = None;
        for path in paths {
            // Links are followed first: what counts is where the file is.
            let path = tokio::fs::canonicalize(path).await.ok();
            let path = path.filter(|path| self.config.folders.iter().any(|folder| is_below(path, folder)));
            allowed = allowed.or(path);
        }
        let path = allowed.ok_or(REFUSED)?;
        // Before it is opened: a pipe would be waited for.
        if !tokio::fs::metadata(&path).await.is_ok_and(|meta| meta.is_file()) {
            return Err("is no file: name one".to_owned());
        }
        let file = tokio::fs::File::open(&path).await.map_err(|error| format!("cannot be read ({error})"))?;
        let mut bytes = Vec::new();
        let read = file.take(most as u64 + 1).read_to_end(&mut bytes).await;
        read.map_err(|error| format!("cannot be read ({error})"))?;
        if bytes.len() > most { Err(self.too_large()) } else { Ok(bytes) }
    }

    async fn download(&self, url: &Url, most: usize) -> Result<Vec<u8>, String> {
        let refused = || "is not fetched here: send a data URL in base64, or set `media.http: true`".to_owned();
        let client = self.client.as_ref().ok_or_else(refused)?;
        check_url(url, self.may_ask)?;
        let failed = |error: reqwest::Error| format!("cannot be fetched ({})", causes(&error));
        let mut answer = client.get(url.clone()).send().await.map_err(failed)?;
        if !answer.status().is_success() {
            return Err(format!("cannot be fetched (its server says {})", answer.status()));
        }
        let mut bytes = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(failed)? {
            if bytes.len() + piece.len() > most {
                return Err(self.too_large());
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    fn too_large(&self) -> String {
        let most = self.config.max_bytes >> 20;
        format!("is larger than {most} MiB, with those before it (media.max_mb): send smaller ones")
    }
}

/// The error and what it came of: reqwest's own text names neither.
fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text
}

fn is_below(path: &Path, folder: &Path) -> bool {
    folder.canonicalize().is_ok_and(|folder| path.starts_with(folder))
}

/// Refuses addresses that stand in the URL; those of names are looked at when they are known.
fn check_url(url: &Url, may_ask: fn(IpAddr) -> bool) -> Result<(), String> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("leads to `{}:`, which is not fetched: use http or https", url.scheme()));
    }
    let host = url.host_str().unwrap_or_default();
    match host.trim_start_matches('[').trim_end_matches(']').parse() {
        Ok(address) if !may_ask(address) => Err(private(address)),
        _ => Ok(()),
    }
}

fn private(address: IpAddr) -> String {
    format!("leads to {address}, a private address, which is never asked: send a data URL in base64")
}

/// Looks names up, and refuses those with a private address: what is connected to is what was looked at.
struct Resolver {
    may_ask: fn(IpAddr) -> bool,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let may_ask = self.may_ask;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            match found.iter().find(|address| !may_ask(address.ip())) {
                Some(address) => Err(private(address.ip()).into()),
                None => Ok(Box::new(found.into_iter()) as Addrs),
            }
        })
    }
}

/// Whether an address is one of the internet's, as the registries of special addresses of IANA have it.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [first, second, third, _] = address.octets();
    let is_special = address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_broadcast()
        || address.is_documentation()
        || address.is_multicast()
        || first == 0
        || first >= 240
        // Between a provider and its customers; protocols; benchmarks.
        || (first == 100 && (64..128).contains(&second))
        || (first, second, third) == (192, 0, 0)
        || (first, second, third) == (192, 88, 99)
        || (first == 198 && (18..20).contains(&second));
    !is_special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    // Addresses that stand for one of the older kind.
    let older = match segments {
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            Some((u32::from(high) << 16) | u32::from(low))
        }
        _ => None,
    };
    match older {
        Some(older) => is_public_v4(older.into()),
        // Only these are given out; of them, some are for protocols and documentation.
        None => {
            segments[0] & 0xe000 == 0x2000
                && !(segments[0] == 0x2001 && segments[1] < 0x200)
                && !(segments[0] == 0x2001 && segments[1] == 0xdb8)
                && segments[0] != 0x3fff
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use serde_json::json;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    fn config(http: bool, folders: &[&Path]) -> MediaConfig {
        let folders = folders.iter().map(PathBuf::from).collect();
        MediaConfig { http, folders, max_bytes: 1 << 20, limit: Duration::from_secs(2) }
    }

    fn asking(config: MediaConfig, may_ask: fn(IpAddr) -> bool) -> Fetcher {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Fetcher::asking(config, may_ask).unwrap()
    }

    async fn fetched(fetcher: &Fetcher, url: &str) -> Result<Vec<u8>, String> {
        let content = json!([{ "type": "image_url", "image_url": { "url": url } }]);
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": content }] });
        let mut request = sarai_api::openai::parse_chat(body.to_string().as_bytes()).unwrap().request;
        fetcher.bring(&mut request).await.map_err(|error| error.to_string())?;
        match &request.media().next().unwrap().source {
            MediaSource::Base64(text) => Ok(sarai_core::media::from_base64(text).unwrap()),
            MediaSource::Url(_) => panic!("it was not fetched"),
        }
    }

    /// Answers every connection with this.
    async fn server(answer: Vec<u8>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let _ = socket.read(&mut [0; 4096]).await;
                let _ = socket.write_all(&answer).await;
            }
        });
        port
    }

    fn ok(length: usize) -> Vec<u8> {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
        [head.into_bytes(), vec![7; length]].concat()
    }

    #[test]
    fn special_addresses_are_not_public() {
        for address in [
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "192.0.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "2001:db8::1",
            "2001::1",
            "::127.0.0.1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in ["1.1.1.1", "93.184.216.34", "100.128.0.1", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[tokio::test]
    async fn nothing_is_fetched_unless_it_is_allowed() {
        let port = server(ok(10)).await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.png");
        std::fs::write(&file, b"picture").unwrap();
        let nothing = asking(config(false, &[]), is_public);
        for (url, says) in [
            (format!("http://127.0.0.1:{port}/"), "media.http"),
            (format!("file://{}", file.display()), "media.folders"),
        ] {
            let refused = fetched(&nothing, &url).await.unwrap_err();
            assert!(refused.contains(says) && refused.contains("`messages[0].content[0]`"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_private_address_is_never_asked_whatever_it_is_called() {
        let port = server(ok(10)).await;
        let fetcher = asking(config(true, &[]), is_public);
        for host in ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1"] {
            let refused = fetched(&fetcher, &format!("http://{host}:{port}/")).await.unwrap_err();
            assert!(refused.contains("a private address"), "{host}: {refused}");
        }
        // Redirected: the first address may be asked, the second not.
        fn only_loopback(address: IpAddr) -> bool {
            address == IpAddr::from([127, 0, 0, 1])
        }
        let head =
            "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.2:9/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let port = server(head.as_bytes().to_vec()).await;
        let fetcher = asking(config(true, &[]), only_loopback);
        let refused = fetched(&fetcher, &format!("http://127.0.0.1:{port}/")).await.unwrap_err();
        assert!(refused.contains("127.0.0.2, a private address"), "{refused}");
    }

    #[tokio::test]
    async fn what_is_fetched_is_limited_in_size_and_time() {
        let fetcher = asking(config(true, &[]), |_| true);
        let most = fetcher.config.max_bytes;
        let url = |port: u16| format!("http://127.0.0.1:{port}/a.png");
        assert_eq!(fetched(&fetcher, &url(server(ok(most)).await)).await.unwrap(), vec![7; most]);
        let refused = fetched(&fetcher, &url(server(ok(most + 1)).await)).await.unwrap_err();
        assert!(refused.contains("larger than 1 MiB"), "{refused}");
        let missing = server(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec()).await;
        assert!(fetched(&fetcher, &url(missing)).await.unwrap_err().contains("404"));
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refused = fetched(&fetcher, &url(silent.local_addr().unwrap().port())).await.unwrap_err();
        assert!(refused.contains("within 2 s") || refused.contains("timed out"), "{refused}");
    }

    #[tokio::test]
    async fn files_are_read_below_the_folders_that_are_named_and_links_do_not_lead_out() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(folder.path().join("a b.png"), b"picture").unwrap();
        std::fs::write(other.path().join("secret"), b"secret").unwrap();
        std::os::unix::fs::symlink(other.path().join("secret"), folder.path().join("link.png")).unwrap();
        std::fs::write(folder.path().join("large.png"), vec![0; (1 << 20) + 1]).unwrap();
        let fetcher = asking(config(false, &[folder.path()]), is_public);
        let url = |name: &str| format!("file://{}/{name}", folder.path().display());
        assert_eq!(fetched(&fetcher, &url("a%20b.png")).await.unwrap(), b"picture");
        let secret = format!("../{}/secret", other.path().file_name().unwrap().to_string_lossy());
        for (name, says) in [
            ("link.png", "media.folders"),
            (secret.as_str(), "media.folders"),
            ("missing.png", "media.folders"),
            ("large.png", "larger than 1 MiB"),
            ("", "is no file"),
        ] {
            let refused = fetched(&fetcher, &url(name)).await.unwrap_err();
            assert!(refused.contains(says), "{name}: {refused}");
        }
    }
}
