//! Logs: text or JSON lines on standard error, without secrets at any level.
//!
//! Our own code logs no secret. Of libraries that read headers and bodies nobody promises that, and
//! some have printed them at `trace`: whatever level is configured, what is not ours is held to `info`.

use std::io;

use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt, FilterFn, ParseError};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry};

use crate::config::{LogConfig, LogFormat};

/// The crates whose events may be more detailed than `info`.
const OURS: [&str; 2] = ["countersign", "countersign_attestors"];

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level is neither a level nor directives.
    #[error("`{level}` is no log level: {error}")]
    Level {
        /// As configured.
        level: String,
        /// What is wrong with it.
        error: ParseError,
    },
    /// This process logs already.
    #[error("logging is already set up")]
    AlreadySetUp,
}

/// Logs to standard error from now on.
pub fn init(config: &LogConfig) -> Result<(), LogError> {
    let subscriber = subscriber(config, io::stderr)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::AlreadySetUp)
}

/// A subscriber that writes lines to `writer`.
pub fn subscriber<W>(
    config: &LogConfig,
    writer: W,
) -> Result<impl Subscriber + Send + Sync + 'static, LogError>
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let levels = EnvFilter::builder()
        .parse(&config.level)
        .map_err(|error| LogError::Level {
            level: config.level.clone(),
            error,
        })?;
    let filter = levels.and(FilterFn::new(is_harmless));
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match config.format {
        LogFormat::Text => layer.with_ansi(false).with_filter(filter).boxed(),
        LogFormat::Json => layer
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_filter(filter)
            .boxed(),
    };
    Ok(Registry::default().with(layer))
}

fn is_harmless(metadata: &Metadata<'_>) -> bool {
    let crate_name = metadata.target().split("::").next().unwrap_or_default();
    OURS.contains(&crate_name) || *metadata.level() <= Level::INFO
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::Full;
    use hyper::service::service_fn;
    use hyper_util::rt::{TokioExecutor, TokioIo};

    const CANARY: &str = "canary-4f1d-token";

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    /// One request with the canary in a header and in the path, over HTTP/2.
    async fn exchange() {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(
                TokioIo::new(server),
                service_fn(async |_| {
                    tracing::trace!("our own detail");
                // What versions of HTTP/2 libraries have printed.
                tracing::trace!(target: "h2::codec::framed_read", authorization = CANARY, "received");
                tracing::debug!(target: "hyper_util::client", "request with {CANARY}");
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok"))))
                }),
            );
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client))
                .await
                .unwrap();
        let exchange = async {
            let request = Request::get(format!("http://a.test/{CANARY}"))
                .header("authorization", format!("Bearer {CANARY}"))
                .body(Full::new(Bytes::new()))
                .unwrap();
            assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        };
        tokio::select! {
            () = exchange => {}
            _ = served => {}
            _ = connection => {}
        }
    }

    fn run_under(subscriber: impl Subscriber + Send + Sync) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        tracing::subscriber::with_default(subscriber, || runtime.block_on(exchange()));
    }

    #[test]
    fn no_library_prints_a_header_at_any_level() {
        for format in [LogFormat::Text, LogFormat::Json] {
            for level in [
                "trace",
                "trace,h2=trace,hyper=trace,h2::codec=trace,hyper_util=trace",
            ] {
                let captured = Captured::default();
                let writer = captured.clone();
                let config = LogConfig {
                    format,
                    level: level.to_owned(),
                };
                run_under(subscriber(&config, move || writer.clone()).unwrap());
                let text = captured.text();
                assert!(text.contains("our own detail"), "{text}");
                assert!(!text.contains(CANARY), "{text}");
            }
        }
    }

    #[test]
    fn without_the_cap_the_canary_is_printed() {
        let captured = Captured::default();
        let writer = captured.clone();
        run_under(
            Registry::default().with(
                tracing_subscriber::fmt::layer()
                    .with_writer(move || writer.clone())
                    .with_filter(tracing_subscriber::filter::LevelFilter::TRACE),
            ),
        );
        assert_eq!(captured.text().matches(CANARY).count(), 2);
    }

    #[test]
    fn a_json_line_is_an_object() {
        let captured = Captured::default();
        let writer = captured.clone();
        let config = LogConfig {
            format: LogFormat::Json,
            level: "info".to_owned(),
        };
        tracing::subscriber::with_default(
            subscriber(&config, move || writer.clone()).unwrap(),
            || {
                tracing::info!(listener = "workloads", "listening");
                tracing::debug!("not at this level");
            },
        );
        let line: serde_json::Value = serde_json::from_str(captured.text().trim_end()).unwrap();
        assert_eq!(line.get("listener").unwrap(), "workloads");
        assert_eq!(line.get("message").unwrap(), "listening");
    }

    #[test]
    fn a_wrong_level_is_named() {
        let config = LogConfig {
            format: LogFormat::Text,
            level: "a=b=c".to_owned(),
        };
        assert!(
            matches!(subscriber(&config, io::sink), Err(LogError::Level { level, .. }) if level == "a=b=c")
        );
    }
}
