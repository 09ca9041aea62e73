//! The embedded API: it serves nothing without a valid access token, says what it saw, and speaks what
//! APIs speak: JSON, streams, upgrades, gRPC.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, UPGRADE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use super::certificates::ServerCertificate;
use super::server::{Body, Listening, full, json_answer, listen};
use crate::jwt::{Verified, VerifyingKey, check_times, numeric_date, verify};

/// How many requests are remembered for [`Api::seen`].
const REMEMBERED: usize = 20_000;

/// What an API is made of.
#[derive(Debug)]
pub struct ApiOptions {
    /// Where to listen; port 0 is any free one.
    pub address: SocketAddr,
    /// The server's certificate; plain HTTP without one.
    pub certificate: Option<ServerCertificate>,
    /// The issuer of acceptable tokens.
    pub issuer: String,
    /// The audience that a token must name.
    pub audience: String,
    /// The issuer's keys.
    pub keys: Vec<VerifyingKey>,
}

/// A running API. Ends when dropped.
#[derive(Debug)]
pub struct Api {
    shared: Arc<Shared>,
    listening: Listening,
}

#[derive(Debug)]
struct Shared {
    issuer: String,
    audience: String,
    keys: Vec<VerifyingKey>,
    seen: Mutex<VecDeque<Seen>>,
}

/// A request as it reached the API.
#[derive(Debug, Clone)]
pub struct Seen {
    /// When.
    pub at: SystemTime,
    /// The method.
    pub method: Method,
    /// The path and query.
    pub path: String,
    /// The protocol.
    pub version: Version,
    /// `Host`, or `:authority`.
    pub authority: Option<String>,
    /// The headers.
    pub headers: HeaderMap,
    /// The claims of its token, or why that was refused.
    pub token: Result<Value, &'static str>,
}

impl Api {
    /// Binds and serves on the current runtime.
    pub async fn start(options: ApiOptions) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            issuer: options.issuer,
            audience: options.audience,
            keys: options.keys,
            seen: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        let listening = listen(
            options.address,
            options.certificate.as_ref(),
            Arc::new(move |request| {
                let serving = Arc::clone(&serving);
                Box::pin(async move { serving.respond(request) })
            }),
        )
        .await?;
        Ok(Self { shared, listening })
    }

    /// The address bound.
    pub fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    /// The requests that arrived, oldest first.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen().iter().cloned().collect()
    }

    /// Forgets the requests that arrived.
    pub fn forget(&self) {
        self.shared.seen().clear();
    }

    /// Ends the listener and its connections.
    pub fn stop(&self) {
        self.listening.stop();
    }
}

impl Shared {
    fn seen(&self) -> std::sync::MutexGuard<'_, VecDeque<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn respond(&self, request: Request<Incoming>) -> Response<Body> {
        let now = SystemTime::now();
        let token = self.authenticate(request.headers(), now);
        self.record(&request, &token, now);
        let is_grpc = request
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        match token {
            Err(reason) if is_grpc => grpc_refusal(reason),
            Err(reason) => refusal(reason),
            Ok(_) if is_grpc => grpc_echo(request),
            Ok(token) => serve(request, &token),
        }
    }

    /// RFC 6750 section 2.1 and RFC 9068 section 4.
    fn authenticate(&self, headers: &HeaderMap, now: SystemTime) -> Result<Verified, &'static str> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err("there is not exactly one Authorization header");
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token)
            .ok_or("the Authorization header is not Bearer")?;
        let verified = verify(token, &self.keys).map_err(|error| error.0)?;
        if verified.header.get("typ").and_then(Value::as_str) != Some("at+jwt") {
            return Err("the token is not an access token");
        }
        if verified.text("iss") != Some(&self.issuer) {
            return Err("the token is of another issuer");
        }
        let is_meant = match verified.claims.get("aud") {
            Some(Value::String(audience)) => *audience == self.audience,
            Some(Value::Array(audiences)) => audiences
                .iter()
                .any(|audience| audience.as_str() == Some(&self.audience)),
            _ => false,
        };
        if !is_meant {
            return Err("the token is for another audience");
        }
        check_times(&verified, now).map_err(|error| error.0)?;
        Ok(verified)
    }

    fn record(
        &self,
        request: &Request<Incoming>,
        token: &Result<Verified, &'static str>,
        at: SystemTime,
    ) {
        let authority = request
            .headers()
            .get(http::header::HOST)
            .and_then(|host| host.to_str().ok())
            .or_else(|| {
                request
                    .uri()
                    .authority()
                    .map(|authority| authority.as_str())
            });
        let seen = Seen {
            at,
            method: request.method().clone(),
            path: request
                .uri()
                .path_and_query()
                .map_or_else(String::new, |path| path.as_str().to_owned()),
            version: request.version(),
            authority: authority.map(str::to_owned),
            headers: request.headers().clone(),
            token: match token {
                Ok(token) => Ok(Value::Object(token.claims.clone())),
                Err(reason) => Err(reason),
            },
        };
        let mut list = self.seen();
        if list.len() >= REMEMBERED {
            list.pop_front();
        }
        list.push_back(seen);
    }
}

fn serve(request: Request<Incoming>, token: &Verified) -> Response<Body> {
    let path = request.uri().path().to_owned();
    if request.headers().contains_key(UPGRADE) {
        return echo_upgrade(request);
    }
    match (request.method(), path.as_str()) {
        (_, "/v1/stream") => events(request.uri().query().unwrap_or_default()),
        (_, "/v1/echo") => Response::new(streamed(echo_frames(request.into_body()))),
        (_, "/v1/orders") => orders(token),
        (method, path) if path.starts_with("/v1/orders/") => match *method {
            Method::DELETE => json_answer(
                StatusCode::OK,
                &json!({"deleted": true, "verified": verified(token)}),
            )
            .map(full),
            _ => orders(token),
        },
        _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not_found"})).map(full),
    }
}

fn orders(token: &Verified) -> Response<Body> {
    let answer = json!({
        "orders": [
            {"id": 7, "item": "countersink screws", "quantity": 200},
            {"id": 8, "item": "wing nuts", "quantity": 40},
        ],
        "verified": verified(token),
        // A second header would have been refused.
        "caller_sent_authorization": false,
    });
    json_answer(StatusCode::OK, &answer).map(full)
}

fn verified(token: &Verified) -> Value {
    let expires = token.seconds("exp").unwrap_or_default();
    json!({
        "sub": token.text("sub"),
        "scope": token.text("scope"),
        "jti": token.text("jti"),
        "expires_in": expires.saturating_sub(numeric_date(SystemTime::now())),
    })
}

fn refusal(reason: &'static str) -> Response<Body> {
    let mut answer = json_answer(
        StatusCode::UNAUTHORIZED,
        &json!({"error": "invalid_token", "error_description": reason}),
    );
    let challenge = format!("Bearer error=\"invalid_token\", error_description=\"{reason}\"");
    if let Ok(challenge) = HeaderValue::from_str(&challenge) {
        answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    answer.map(full)
}

/// Server-sent events: `?events=N&interval_ms=M`, without `events` until the client goes.
fn events(query: &str) -> Response<Body> {
    let parameter = |name: &str| -> Option<u64> {
        url::form_urlencoded::parse(query.as_bytes())
            .find(|(known, _)| known == name)
            .and_then(|(_, value)| value.parse().ok())
    };
    let last = parameter("events").unwrap_or(u64::MAX);
    let interval = Duration::from_millis(parameter("interval_ms").unwrap_or(100));
    let stream = stream::unfold(0_u64, move |sent| async move {
        if sent >= last {
            return None;
        }
        if sent > 0 {
            tokio::time::sleep(interval).await;
        }
        let event = Bytes::from(format!("data: {sent}\n\n"));
        Some((
            Ok::<_, Infallible>(Frame::data(event)),
            sent.saturating_add(1),
        ))
    });
    let mut answer = Response::new(streamed(stream));
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    answer
}

/// After 101, whatever the client sends comes back.
fn echo_upgrade(request: Request<Incoming>) -> Response<Body> {
    let protocol = request.headers().get(UPGRADE).cloned();
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
            // The echo ends when the client does.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
        }
    });
    let mut answer = Response::new(full(Bytes::new()));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    answer
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        answer.headers_mut().insert(UPGRADE, protocol);
    }
    answer
}

/// Echoes the request's messages, then trailers.
fn grpc_echo(request: Request<Incoming>) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers.insert("grpc-message", HeaderValue::from_static("echoed"));
    let body = echo_frames(request.into_body());
    let end = stream::once(async move { Ok(Frame::trailers(trailers)) });
    let stream = futures_util::StreamExt::chain(body, end);
    let mut answer = Response::new(streamed(stream));
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    answer
}

/// The data frames of a body, until it ends or breaks.
fn echo_frames(body: Incoming) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
    stream::unfold(body, |mut body| async move {
        loop {
            let frame = body.frame().await?.ok()?;
            if let Ok(data) = frame.into_data() {
                return Some((Ok(Frame::data(data)), body));
            }
        }
    })
}

fn streamed(frames: impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static) -> Body {
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

/// A trailers-only answer: 16 is `UNAUTHENTICATED`.
fn grpc_refusal(reason: &'static str) -> Response<Body> {
    let mut answer = Response::new(full(Bytes::new()));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from_static("16"));
    headers.insert("grpc-message", HeaderValue::from_static(reason));
    answer
}
