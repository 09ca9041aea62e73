//! `runtime`, `policies`, `limits`, `audit`, `telemetry` and `admin`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Converter;
use crate::config::load::reason;
use crate::config::reader::Located;
use crate::config::tree::Place;
use crate::config::{
    AdminConfig, AuditConfig, AuditSink, Bind, Limits, LogConfig, LogFormat, OnAuditFailure,
    TracesConfig, raw, text,
};
use crate::diagnostics::Diagnostic;

/// How long what is under way may live on after SIGTERM, where nothing is written.
const DRAIN: Duration = Duration::from_secs(30);

impl Converter<'_> {
    /// The number of data workers, and the drain window.
    pub(super) fn runtime(
        &mut self,
        written: Option<Located<raw::Runtime>>,
    ) -> (Option<usize>, Duration) {
        let (workers, drain) = written.map_or((None, None), |Located { value, .. }| {
            (value.workers, value.drain)
        });
        let workers = workers.and_then(|workers| {
            if (1..=64).contains(&workers.value) {
                usize::try_from(workers.value).ok()
            } else {
                self.out_of_range(&workers, "write a number from 1 to 64");
                None
            }
        });
        let drain = self.parse_option(drain.as_ref(), text::duration);
        (workers, drain.unwrap_or(DRAIN))
    }

    pub(super) fn policy_directory(
        &mut self,
        written: Option<Located<raw::Policies>>,
        main_directory: &Path,
        main_path: &Path,
    ) -> PathBuf {
        let (path, place) = match written {
            Some(Located { value, .. }) => {
                (self.resolve(&value.directory), Some(value.directory.place))
            }
            None => (main_directory.join("policies"), None),
        };
        self.watched.add(&path);
        if let Err(error) = std::fs::read_dir(&path) {
            let cause = match error.kind() {
                std::io::ErrorKind::NotADirectory => "it is no directory".to_owned(),
                _ => reason(&error),
            };
            let mut diagnostic = Diagnostic::error(
                "unreadable_directory",
                place.map_or_else(|| main_path.to_owned(), |place| self.path(place)),
                format!("the policy directory `{}` cannot be read: {cause}", path.display()),
            )
            .next("create it, or name another by `policies: {directory: ...}`; without a policy all is denied");
            diagnostic.span = place.map(Place::span);
            self.diagnostics.push(diagnostic);
        }
        path
    }

    pub(super) fn limits(&mut self, written: Option<Located<raw::Limits>>) -> Limits {
        let mut limits = Limits::default();
        let per_identity = written.and_then(|limits| limits.value.per_identity);
        if let Some(Located { value: written, .. }) = per_identity {
            for (limit, written) in [
                (&mut limits.connections, written.connections),
                (&mut limits.requests_in_flight, written.requests_in_flight),
                (&mut limits.requests_per_second, written.requests_per_second),
            ] {
                if let Some(number) = self.at_least_one(written) {
                    *limit = number;
                }
            }
            if let Some(size) = self.parse_option(written.head_size.as_ref(), text::head_size) {
                limits.head_size = size;
            }
            if let Some(time) = self.parse_option(written.head_timeout.as_ref(), text::duration) {
                limits.head_timeout = time;
            }
        }
        limits
    }

    pub(super) fn audit(&mut self, written: Option<Located<raw::Audit>>) -> AuditConfig {
        let mut audit = AuditConfig {
            on_failure: OnAuditFailure::Block,
            sinks: vec![AuditSink::Stdout],
        };
        let Some(Located { value: written, .. }) = written else {
            return audit;
        };
        if let Some(on_failure) = written.on_failure {
            audit.on_failure = on_failure.value;
        }
        if let Some(sinks) = written.sinks {
            if self.is_empty_list(&sinks) {
                self.error(
                    "empty_list",
                    sinks.place,
                    "`sinks` is empty: no request may go unrecorded",
                    "write at least one: `{type: stdout}`",
                );
            }
            audit.sinks = Vec::new();
            for sink in sinks.value {
                let at = sink.value.kind.place;
                if let Some(sink) = self.sink(sink) {
                    if audit.sinks.contains(&sink) {
                        self.error(
                            "duplicate_value",
                            at,
                            "this sink stands twice",
                            "keep one of the two",
                        );
                    }
                    audit.sinks.push(sink);
                }
            }
        }
        audit
    }

    pub(super) fn sink(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::Sink>,
    ) -> Option<AuditSink> {
        match written.kind.value {
            raw::SinkType::Stdout => {
                const BECAUSE: &str = "it belongs to `file`";
                self.not_applicable("path", written.path.as_ref(), BECAUSE);
                self.not_applicable("rotate_size", written.rotate_size.as_ref(), BECAUSE);
                self.not_applicable("keep", written.keep.as_ref(), BECAUSE);
                Some(AuditSink::Stdout)
            }
            raw::SinkType::File => {
                if written.path.is_none() {
                    self.missing(
                        "path",
                        place,
                        written.kind.place,
                        "a `file` sink writes there",
                    );
                }
                let path = self.output_file(written.path.as_ref());
                let rotate_size = self
                    .parse_option(written.rotate_size.as_ref(), text::size)
                    .unwrap_or(100 << 20);
                let keep = self.at_least_one(written.keep).unwrap_or(10);
                Some(AuditSink::File {
                    path: path?,
                    rotate_size,
                    keep,
                })
            }
        }
    }

    pub(super) fn telemetry(
        &mut self,
        written: Option<Located<raw::Telemetry>>,
    ) -> (LogConfig, Option<TracesConfig>) {
        let (log, traces) = written.map_or((None, None), |Located { value, .. }| {
            (value.log, value.traces)
        });
        (
            self.log(log),
            traces.and_then(|traces| self.traces(traces.value.otlp.value)),
        )
    }

    fn traces(&mut self, written: raw::Otlp) -> Option<TracesConfig> {
        let url = self.parse(&written.endpoint, text::otlp_endpoint);
        if url.as_ref().is_some_and(|url| url.scheme() == "http") {
            self.not_applicable(
                "ca_file",
                written.ca_file.as_ref(),
                "the endpoint is `http`",
            );
        }
        let ca_file = self.ca_file(written.ca_file.as_ref());
        let sample_ratio = written.sample_ratio.map_or(1.0, |ratio| {
            if !(0.0..=1.0).contains(&ratio.value) {
                self.out_of_range(&ratio, "write a number from 0 to 1");
            }
            ratio.value
        });
        Some(TracesConfig {
            url: url?,
            ca_file,
            sample_ratio,
        })
    }

    fn log(&mut self, written: Option<Located<raw::Log>>) -> LogConfig {
        let (format, level) = written.map_or((None, None), |Located { value, .. }| {
            (value.format, value.level)
        });
        LogConfig {
            format: format.map_or(LogFormat::Text, |format| format.value),
            level: self
                .parse_option(level.as_ref(), text::log_level)
                .unwrap_or_else(|| "info".to_owned()),
        }
    }

    pub(super) fn admin(
        &mut self,
        written: Option<Located<raw::Admin>>,
        binds: &mut HashMap<Bind, Place>,
    ) -> AdminConfig {
        let Some(Located { value: written, .. }) = written else {
            return AdminConfig {
                socket: None,
                metrics_bind: None,
            };
        };
        let socket = self.output_file(written.socket.as_ref());
        if let (Some(socket), Some(written)) = (&socket, &written.socket) {
            self.unique_bind(&Bind::Unix(socket.clone()), written.place, binds);
        }
        let metrics_bind = written.metrics_bind.as_ref().and_then(|written| {
            match self.parse(written, text::bind)? {
                Bind::Tcp(address) => {
                    self.unique_bind(&Bind::Tcp(address), written.place, binds);
                    Some(address)
                }
                Bind::Unix(_) => {
                    self.error(
                        "invalid_address",
                        written.place,
                        "metrics are served on TCP here",
                        "write `ADDRESS:PORT`; the admin socket serves them too",
                    );
                    None
                }
            }
        });
        AdminConfig {
            socket,
            metrics_bind,
        }
    }
}
