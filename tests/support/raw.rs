//! HTTP/1 byte by byte, for what no client would send.

use std::io::Read;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A response as it came.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    /// The reason phrase.
    pub reason: String,
    pub head: String,
    pub body: String,
}

impl Response {
    /// The values of a header.
    pub fn headers(&self, name: &str) -> Vec<&str> {
        self.head
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
            .collect()
    }

    /// The `code` of a refusal.
    pub fn code(&self) -> String {
        serde_json::from_str::<serde_json::Value>(&self.body)
            .ok()
            .and_then(|body| body["code"].as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// Asserts a status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:#?}");
        self
    }
}

/// Sends `request` and reads one response.
pub async fn exchange<Io>(io: &mut Io, request: &str) -> Response
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    io.write_all(request.as_bytes()).await.unwrap();
    read_response(io).await
}

/// Opens a tunnel.
pub async fn open_tunnel<Io>(io: &mut Io, authority: &str) -> Response
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    io.write_all(head.as_bytes()).await.unwrap();
    parse_head(&read_head(io).await)
}

/// Reads a head, bytes up to the empty line.
pub async fn read_head<Io: AsyncRead + Unpin>(io: &mut Io) -> String {
    let mut head = Vec::new();
    let read = async {
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            match io.read(&mut byte).await {
                Ok(1) => head.push(byte[0]),
                _ => break,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), read)
        .await
        .expect("a head in 30 s");
    String::from_utf8_lossy(&head).into_owned()
}

/// Reads one response: by `content-length`, in chunks, or to the end.
pub async fn read_response<Io: AsyncRead + Unpin>(io: &mut Io) -> Response {
    let head = read_head(io).await;
    let mut response = parse_head(&head);
    let length = response
        .headers("content-length")
        .first()
        .and_then(|length| length.parse::<usize>().ok());
    let is_chunked = response.headers("transfer-encoding").contains(&"chunked");
    let mut body = Vec::new();
    let read = async {
        if response.status < 200 || response.status == 204 || response.status == 304 {
        } else if let Some(length) = length {
            body.resize(length, 0);
            io.read_exact(&mut body).await.unwrap();
        } else if is_chunked {
            loop {
                let size = read_line(io).await;
                let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
                if size == 0 {
                    while !read_line(io).await.trim().is_empty() {}
                    break;
                }
                let start = body.len();
                body.resize(start + size, 0);
                io.read_exact(&mut body[start..]).await.unwrap();
                read_line(io).await;
            }
        } else if !head.is_empty() {
            let _ = io.read_to_end(&mut body).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), read)
        .await
        .expect("a body in 60 s");
    response.body = String::from_utf8_lossy(&body).into_owned();
    response
}

async fn read_line<Io: AsyncRead + Unpin>(io: &mut Io) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        if io.read(&mut byte).await.unwrap_or(0) == 0 {
            break;
        }
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

fn parse_head(head: &str) -> Response {
    let mut words = head.lines().next().unwrap_or_default().splitn(3, ' ');
    words.next();
    Response {
        status: words
            .next()
            .and_then(|status| status.parse().ok())
            .unwrap_or(0),
        reason: words.next().unwrap_or_default().to_owned(),
        head: head.to_owned(),
        body: String::new(),
    }
}

/// Reads one response with `content-length`, without a runtime.
pub fn read_response_blocking(stream: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        bytes.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&bytes).into_owned();
    let length = parse_head(&head)
        .headers("content-length")
        .first()
        .and_then(|length| length.parse::<usize>().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    let _ = stream.read_exact(&mut body);
    format!("{head}{}", String::from_utf8_lossy(&body))
}
