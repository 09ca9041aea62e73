//! What credentials of one server, or with one key, have in common.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::client_authentication::{KeyFile, SecretFile};
use super::metadata::IssuerMetadata;
use crate::config::{ExactUrl, SigningAlgorithm};
use crate::fetch::{FetchClient, FetchSettings};

/// Connections, metadata, files and keys, each made once for all providers that are made with this.
pub struct SharedParts {
    own_listeners: Arc<[SocketAddr]>,
    runtime: tokio::runtime::Handle,
    clients: HashMap<FetchSettings, FetchClient>,
    metadata: HashMap<(ExactUrl, FetchSettings), Arc<IssuerMetadata>>,
    files: HashMap<PathBuf, Arc<SecretFile>>,
    keys: HashMap<(PathBuf, SigningAlgorithm, Option<String>), Arc<KeyFile>>,
}

impl SharedParts {
    /// For connections that live on `runtime`, to any server but `own_listeners`.
    pub fn new(own_listeners: Arc<[SocketAddr]>, runtime: tokio::runtime::Handle) -> Self {
        Self {
            own_listeners,
            runtime,
            clients: HashMap::new(),
            metadata: HashMap::new(),
            files: HashMap::new(),
            keys: HashMap::new(),
        }
    }

    /// The client for servers that are reached so.
    pub(super) fn client(&mut self, settings: &FetchSettings) -> FetchClient {
        let make = || {
            FetchClient::new(
                settings.clone(),
                Arc::clone(&self.own_listeners),
                self.runtime.clone(),
            )
        };
        self.clients
            .entry(settings.clone())
            .or_insert_with(make)
            .clone()
    }

    /// The metadata of an issuer that is reached so.
    pub(super) fn metadata(
        &mut self,
        issuer: &ExactUrl,
        settings: FetchSettings,
    ) -> Arc<IssuerMetadata> {
        let client = self.client(&settings);
        let make = || Arc::new(IssuerMetadata::new(issuer.clone(), client));
        let metadata = self.metadata.entry((issuer.clone(), settings));
        Arc::clone(metadata.or_insert_with(make))
    }

    /// The file of a key or a secret.
    pub(super) fn file(&mut self, path: &Path) -> Arc<SecretFile> {
        let make = || Arc::new(SecretFile::new(path));
        Arc::clone(self.files.entry(path.to_owned()).or_insert_with(make))
    }

    /// The key in a file, for one algorithm, under a `kid` where the configuration names one.
    pub(super) fn key(
        &mut self,
        path: &Path,
        algorithm: SigningAlgorithm,
        key_id: Option<&str>,
    ) -> Arc<KeyFile> {
        let key_id = key_id.map(str::to_owned);
        let file = self.file(path);
        let make = || Arc::new(KeyFile::new(file, algorithm, key_id.clone()));
        let key = self
            .keys
            .entry((path.to_owned(), algorithm, key_id.clone()));
        Arc::clone(key.or_insert_with(make))
    }
}
