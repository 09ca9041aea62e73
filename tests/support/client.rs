//! HTTP clients in the test's process whose bytes pass through a puppet, so that the agent sees the
//! puppet as the caller.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::puppet::Puppet;
use super::raw::open_tunnel;

/// One connection to the agent.
pub enum Client {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

impl Client {
    /// HTTP/1.1 in clear, to a proxy or a gateway.
    pub async fn http1(puppet: &Puppet) -> Self {
        Self::http1_over(puppet.connect().await).await
    }

    /// HTTP/2 in clear, to a proxy or a gateway.
    pub async fn http2(puppet: &Puppet) -> Self {
        Self::http2_over(puppet.connect().await).await
    }

    /// Through a tunnel, TLS, with the protocol named.
    pub async fn tls(puppet: &Puppet, host: &str, root: &Path, http2: bool) -> Self {
        let mut io = puppet.connect().await;
        open_tunnel(&mut io, &format!("{host}:443"))
            .await
            .expect(200);
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(root).unwrap())
            .unwrap();
        let mut config = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![if http2 {
            b"h2".to_vec()
        } else {
            b"http/1.1".to_vec()
        }];
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let io = TlsConnector::from(Arc::new(config))
            .connect(name, io)
            .await
            .unwrap();
        match http2 {
            true => Self::http2_over(io).await,
            false => Self::http1_over(io).await,
        }
    }

    async fn http1_over(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection);
        Self::Http1(sender)
    }

    async fn http2_over(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self::Http2(sender)
    }

    /// Sends a request without a body.
    pub async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }

    /// GET of a URI: absolute for a proxy and for HTTP/2, a path elsewhere. Status and body.
    pub async fn get(&mut self, uri: &str, host: &str) -> hyper::Result<(u16, Bytes)> {
        let mut request = Request::get(uri).body(Empty::new()).unwrap();
        if matches!(self, Self::Http1(_)) {
            request
                .headers_mut()
                .insert("host", http::HeaderValue::from_str(host).unwrap());
        }
        let response = self.send(request).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}
