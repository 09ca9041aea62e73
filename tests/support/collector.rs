//! An OpenTelemetry collector: takes spans by OTLP over HTTP in protobuf, and keeps them.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use countersign::dev::ServerCertificate;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What it does with spans.
#[derive(Debug, Clone, Copy)]
pub enum Manner {
    /// Takes them.
    Takes,
    /// Takes all but one of each request.
    RejectsOne,
    /// Answers with this status.
    Answers(u16),
    /// Never answers.
    Hangs,
}

/// A request that reached it.
pub struct Received {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// A running collector.
pub struct Collector {
    pub address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Collector {
    /// On loopback, over TLS where there is a certificate.
    pub async fn start(certificate: Option<ServerCertificate>, manner: Manner) -> Self {
        let acceptor = certificate.map(|certificate| {
            let config = rustls::ServerConfig::builder()
                .with_no_client_auth()
                .with_single_cert(certificate.chain, certificate.key)
                .unwrap();
            TlsAcceptor::from(Arc::new(config))
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let received = Arc::<Mutex<Vec<Received>>>::default();
        let kept = Arc::clone(&received);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (kept, acceptor) = (Arc::clone(&kept), acceptor.clone());
                tokio::spawn(async move {
                    let service =
                        service_fn(move |request| answer(request, Arc::clone(&kept), manner));
                    let server = http1::Builder::new();
                    let _ = match acceptor {
                        None => server.serve_connection(TokioIo::new(stream), service).await,
                        Some(acceptor) => {
                            let stream = acceptor.accept(stream).await.unwrap();
                            server.serve_connection(TokioIo::new(stream), service).await
                        }
                    };
                });
            }
        });
        Self {
            address,
            received,
            task,
        }
    }

    /// How many requests reached it.
    pub fn requests(&self) -> usize {
        self.received.lock().unwrap().len()
    }

    /// Looks at the requests that reached it.
    pub fn look<T>(&self, look: impl FnMut(&Received) -> T) -> Vec<T> {
        self.received.lock().unwrap().iter().map(look).collect()
    }

    /// The spans that reached it, in the order in which they ended.
    pub fn spans(&self) -> Vec<Span> {
        self.look(decoded)
            .into_iter()
            .flat_map(|request| request.resource_spans)
            .flat_map(|of_resource| of_resource.scope_spans)
            .flat_map(|of_scope| of_scope.spans)
            .collect()
    }

    /// The attributes of what the spans are of.
    pub fn resources(&self) -> Vec<Vec<KeyValue>> {
        self.look(decoded)
            .into_iter()
            .flat_map(|request| request.resource_spans)
            .map(|of_resource| of_resource.resource.unwrap().attributes)
            .collect()
    }
}

fn decoded(received: &Received) -> ExportTraceServiceRequest {
    ExportTraceServiceRequest::decode(received.body.clone()).unwrap()
}

async fn answer(
    request: Request<Incoming>,
    kept: Arc<Mutex<Vec<Received>>>,
    manner: Manner,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    kept.lock().unwrap().push(Received {
        path: head.uri.path().to_owned(),
        headers: head.headers,
        body,
    });
    let rejected_spans = match manner {
        Manner::RejectsOne => 1,
        Manner::Hangs => std::future::pending().await,
        Manner::Takes | Manner::Answers(_) => 0,
    };
    let partial_success = (rejected_spans > 0).then(|| ExportTracePartialSuccess {
        rejected_spans,
        error_message: "one is enough".to_owned(),
    });
    let mut response = Response::new(Full::from(
        ExportTraceServiceResponse { partial_success }.encode_to_vec(),
    ));
    if let Manner::Answers(status) = manner {
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
    }
    Ok(response)
}

/// An attribute as text; nothing where it is not there.
pub fn attribute(attributes: &[KeyValue], name: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.clone() {
        Some(AnyValue {
            value: Some(Value::StringValue(text)),
        }) => Some(text),
        Some(AnyValue {
            value: Some(Value::IntValue(number)),
        }) => Some(number.to_string()),
        other => panic!("`{name}` is {other:?}"),
    }
}
