//! The smallest authorizer that Envoy can ask over gRPC: it permits everything and gives the header.
//!
//! `envoy.service.auth.v3.Authorization/Check`; its one answer is written by hand, in the encoding of
//! protocol buffers.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use crate::peers::credential;
use crate::{Fallible, one_thread};

/// Envoy asks before it has read how much it may ask: what is refused then would fail requests.
const MOST_QUESTIONS: u32 = 4096;

/// Serves until it is killed.
pub fn serve(address: SocketAddr) -> Fallible<()> {
    let answer = Bytes::from(framed(&permission())?);
    one_thread()?.block_on(async {
        let listener = TcpListener::bind(address).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let answer = answer.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = answer.clone();
                async move { Ok::<_, Infallible>(respond(request, answer).await) }
            });
            tokio::task::spawn(
                http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(MOST_QUESTIONS)
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    })
}

async fn respond(
    request: Request<Incoming>,
    answer: Bytes,
) -> Response<impl hyper::body::Body<Data = Bytes, Error = Infallible>> {
    // Who does not read the question does not free its stream.
    let _ = request.into_body().collect().await;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = Full::new(answer).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

/// A `CheckResponse`: `status` (1) is OK, and `ok_response` (3) sets one header (2).
fn permission() -> Vec<u8> {
    let header = [
        field(1, b"authorization"),
        field(2, credential().as_bytes()),
    ]
    .concat();
    let header_option = field(1, &header);
    [field(1, &[]), field(3, &field(2, &header_option))].concat()
}

/// A field of the wire type "length-delimited".
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut encoded = vec![(number << 3) | 2];
    let mut length = value.len();
    while length > 0x7f {
        encoded.push(length as u8 | 0x80);
        length >>= 7;
    }
    encoded.push(length as u8);
    encoded.extend(value);
    encoded
}

/// A gRPC message: not compressed, its length, itself.
fn framed(message: &[u8]) -> Fallible<Vec<u8>> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len())?.to_be_bytes());
    frame.extend(message);
    Ok(frame)
}
