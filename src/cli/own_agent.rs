//! An agent of a verb's own, for machines without one: it listens on loopback and in a private
//! directory, and ends with the verb.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::failure::Failure;
use crate::app::App;
use crate::client::AgentAddress;
use crate::clock::SystemClock;
use crate::config::{
    AdminConfig, AuditSink, Bind, CaSource, Config, Interception, Listener, ListenerKind,
    LogConfig, SocketAccess,
};
use crate::hardening;
use crate::request_id::RequestId;
use crate::telemetry;

/// A directory that only this user may enter, removed when dropped.
#[derive(Debug)]
pub struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    /// Makes one under `$XDG_RUNTIME_DIR`, else under the directory for temporary files.
    pub fn new() -> io::Result<Self> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|directory| directory.is_absolute() && directory.is_dir())
            .unwrap_or_else(std::env::temp_dir);
        let path = parent.join(format!("countersign-{}", RequestId::new(SystemTime::now())));
        // Fails where something of this name exists.
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running agent of one's own.
pub struct OwnAgent {
    app: Arc<App>,
    address: AgentAddress,
    _directory: PrivateDirectory,
}

impl OwnAgent {
    /// Starts an agent with the attestors, credentials, destinations, policies and audit of the
    /// configuration at `path`, and with listeners of its own: a forward proxy on loopback, and the
    /// workload API in a private directory. Its interception root lives as long as it does.
    ///
    /// # Errors
    /// Everything that is wrong with the configuration.
    pub async fn start(path: &Path) -> Result<Self, Failure> {
        // Nothing more: what confines a thread would confine the programs that it runs.
        let _ = hardening::protect_memory();
        let mut config = Config::load(path)?;
        if config.audit.sinks.contains(&AuditSink::Stdout) {
            return Err(Failure::configuration(format!(
                "`{}` writes the audit to standard output, which is the command's here: name a file in `audit.sinks`",
                path.display()
            )));
        }
        telemetry::logs::init(&LogConfig {
            format: config.log.format,
            level: "warn".to_owned(),
        })
        .map_err(|error| Failure::configuration(error.to_string()))?;
        let directory = PrivateDirectory::new()?;
        let socket = directory.file("api.sock");
        let listener = |name: &str, kind, bind| Listener {
            name: name.to_owned(),
            kind,
            bind,
            access: SocketAccess::default(),
        };
        config.listeners = vec![
            listener(
                "proxy",
                ListenerKind::ForwardProxy,
                Bind::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            ),
            listener("api", ListenerKind::WorkloadApi, Bind::Unix(socket.clone())),
        ];
        config.interception = Some(Interception {
            source: CaSource::Memory,
            ca_certificate_file: None,
            trust_bundle_file: None,
        });
        config.admin = AdminConfig {
            socket: None,
            metrics_bind: None,
        };
        let app = App::start(config, Arc::new(SystemClock::new())).await?;
        Ok(Self {
            app,
            address: AgentAddress::Unix(socket),
            _directory: directory,
        })
    }

    /// Its workload API.
    pub fn address(&self) -> &AgentAddress {
        &self.address
    }

    /// Ends it: its audit is written to the end.
    pub async fn stop(self) {
        self.app.shutdown().await;
    }
}
