//! What requests are served under at one time. Immutable: a reload or a revocation makes another,
//! and a request reads it without a lock.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use countersign_attestors::{Catalog, OidcAttestor};
use foldhash::fast::RandomState;

use crate::address::AddressGuard;
use crate::config::{Config, Destination, OidcIssuer, Scheme};
use crate::policy::{PolicySnapshot, Revocations};
use crate::routing::Routes;
use crate::telemetry::metrics::{DestinationMetrics, Metrics};
use crate::tls::interception::InterceptionAuthority;
use crate::tls::trust::{TrustError, client_config};
use crate::tls::{ALPN_HTTP1, ALPN_HTTP2};
use crate::upstream::DestinationTls;

/// Configuration, policies and everything made from them.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The configuration.
    pub config: Arc<Config>,
    /// Names the configuration in records, without its content.
    pub configuration_sha256: String,
    /// Destinations by host and port.
    pub routes: Arc<Routes>,
    /// Policies and revocations.
    pub policy: Arc<PolicySnapshot>,
    /// The attestors.
    pub catalog: Arc<Catalog>,
    /// The OIDC issuers' attestors, kept over reloads.
    pub issuers: Arc<Issuers>,
    /// What the files of trusted roots held when this was made.
    pub roots: Arc<Roots>,
    /// The interception authority, where one is configured.
    pub interception: Option<Arc<InterceptionAuthority>>,
    /// What sending to each destination takes, by name.
    pub prepared: Arc<AllPrepared>,
    /// Verified TLS for traffic to no configured destination: the system's roots. `None` where such
    /// traffic is refused, or the system has no roots.
    pub unmatched_tls: Option<DestinationTls>,
    /// The guard of traffic to no configured destination.
    pub unmatched_guard: AddressGuard,
}

impl Snapshot {
    /// The same under other revocations; open streams are decided again.
    pub fn with_revocations(&self, revocations: Arc<Revocations>) -> Arc<Self> {
        let policy = PolicySnapshot::new(Arc::clone(self.policy.engine()), revocations);
        Arc::new(Self {
            policy,
            ..self.clone()
        })
    }
}

/// Each configured issuer with its attestor.
pub type Issuers = Vec<(OidcIssuer, Arc<OidcAttestor>)>;

/// The SHA-256 of files of trusted roots, by which their replacement is noticed.
pub type Roots = HashMap<PathBuf, Vec<u8>>;

/// The SHA-256 of each file that can be read; one that cannot be is refused where it is used.
pub fn read_roots<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> Roots {
    let files: BTreeSet<&PathBuf> = files.into_iter().collect();
    files
        .into_iter()
        .filter_map(|path| {
            let content = std::fs::read(path).ok()?;
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &content);
            Some((path.clone(), digest.as_ref().to_vec()))
        })
        .collect()
}

/// What sending to each destination takes, by the destination's name.
pub type AllPrepared = HashMap<Arc<str>, Prepared, RandomState>;

/// What sending to a destination takes.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Verified TLS; `None` for `scheme: http`.
    pub tls: Option<DestinationTls>,
    /// Which addresses may be connected to.
    pub guard: AddressGuard,
    /// Resolved metric handles.
    pub metrics: DestinationMetrics,
}

/// Prepares every destination of a configuration.
pub fn prepare(
    config: &Config,
    own_listeners: &Arc<[SocketAddr]>,
    metrics: &Metrics,
) -> Result<AllPrepared, TrustError> {
    let mut by_roots: HashMap<Option<PathBuf>, DestinationTls> = HashMap::new();
    let mut prepared = AllPrepared::default();
    for destination in &config.destinations {
        let tls = match destination.scheme {
            Scheme::Http => None,
            Scheme::Https => Some(match by_roots.get(&destination.ca_file) {
                Some(tls) => tls.clone(),
                None => {
                    let tls = verified_tls(destination.ca_file.as_deref())?;
                    by_roots.insert(destination.ca_file.clone(), tls.clone());
                    tls
                }
            }),
        };
        prepared.insert(
            Arc::clone(&destination.name),
            Prepared {
                tls,
                guard: guard_of(destination, own_listeners),
                metrics: metrics.destination(&destination.name),
            },
        );
    }
    Ok(prepared)
}

/// TLS that trusts the roots in `ca_file`, or the system's.
pub fn verified_tls(ca_file: Option<&Path>) -> Result<DestinationTls, TrustError> {
    Ok(DestinationTls {
        any: client_config(ca_file, &[ALPN_HTTP2, ALPN_HTTP1])?,
        http1: client_config(ca_file, &[ALPN_HTTP1])?,
    })
}

/// A `connect_to` is written by the operator and exempt from address classes, but never from the
/// rule that the agent's own listeners are out of reach.
fn guard_of(destination: &Destination, own_listeners: &Arc<[SocketAddr]>) -> AddressGuard {
    let everything = ["0.0.0.0/0", "::/0"]
        .iter()
        .filter_map(|range| range.parse().ok())
        .collect::<Vec<_>>();
    let allow = match destination.connect_to {
        Some(_) => &everything,
        None => &destination.allow_addresses,
    };
    AddressGuard::new(allow, Arc::clone(own_listeners))
}
