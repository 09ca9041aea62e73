//! Which destination a request is for. The proxy and `policy test` ask the same question here.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::config::{Config, Destination, Scheme, Unmatched};

/// A host's ports, each with its destinations in the order of the configuration.
type Ports = Vec<(u16, Vec<Arc<Destination>>)>;

/// Destinations by host and port.
#[derive(Debug)]
pub struct Routes {
    by_host: HashMap<String, Ports, RandomState>,
    unmatched: Unmatched,
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub enum Route<'a> {
    /// To a destination that covers scheme, host, port and path.
    Destination(&'a Arc<Destination>),
    /// The host and port belong to a destination, but not this scheme or path.
    NotCovered(&'a Arc<Destination>),
    /// To no destination.
    Unmatched(Unmatched),
}

impl Routes {
    /// Indexes a configuration's destinations.
    pub fn new(config: &Config) -> Self {
        let mut by_host: HashMap<String, Ports, RandomState> = HashMap::default();
        for destination in &config.destinations {
            for host in &destination.hosts {
                let ports = by_host.entry(host.clone()).or_default();
                for port in &destination.ports {
                    match ports.iter_mut().find(|(known, _)| known == port) {
                        Some((_, destinations)) => destinations.push(Arc::clone(destination)),
                        None => ports.push((*port, vec![Arc::clone(destination)])),
                    }
                }
            }
        }
        Self {
            by_host,
            unmatched: config.unmatched,
        }
    }

    /// Every destination at a host (lower case, no trailing dot, IPv6 without brackets) and port.
    pub fn at(&self, host: &str, port: u16) -> &[Arc<Destination>] {
        self.by_host
            .get(host)
            .and_then(|ports| ports.iter().find(|(known, _)| *known == port))
            .map_or(&[], |(_, destinations)| destinations.as_slice())
    }

    /// The first destination that covers the request; `path_matches` says whether a destination's
    /// patterns cover every reading of the path.
    pub fn find(
        &self,
        scheme: Scheme,
        host: &str,
        port: u16,
        path_matches: impl Fn(&Destination) -> bool,
    ) -> Route<'_> {
        let candidates = self.at(host, port);
        match candidates
            .iter()
            .find(|destination| destination.scheme == scheme && path_matches(destination))
        {
            Some(destination) => Route::Destination(destination),
            None => match candidates.first() {
                Some(destination) => Route::NotCovered(destination),
                None => Route::Unmatched(self.unmatched),
            },
        }
    }
}
