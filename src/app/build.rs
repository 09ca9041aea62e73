//! Makes a [`Snapshot`] of a configuration: policies, attestors, the interception authority, and what
//! sending to each destination takes. What a new configuration says alike is kept from the one in force.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use countersign_attestors::{
    Attestor, AttributeSelection, Catalog, OidcAttestor, SystemdAttestor, UnixAttestor, hexadecimal,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::address::AddressGuard;
use crate::clock::Clock;
use crate::config::{Attestors, CaSource, Config, Interception, OidcIssuer, Unmatched};
use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::fetch::{FetchClient, FetchSettings};
use crate::files::write_durably;
use crate::policy::{PolicyEngine, PolicySnapshot, Revocations};
use crate::routing::Routes;
use crate::snapshot::{Issuers, Roots, Snapshot, prepare, read_roots, verified_tls};
use crate::telemetry::metrics::Metrics;
use crate::tls::interception::InterceptionAuthority;
use crate::tls::trust::bundle;
use crate::upstream::DestinationTls;

/// Attributes of processes that records name a workload by, whatever policies read. The user's name is stated for
/// them anyway, where it can be had.
const RECORDED_ATTRIBUTES: &[&str] = &["uid", "gid", "pid", "executable", "cgroup"];

/// What a snapshot is made from.
pub(super) struct SnapshotBuilder {
    pub(super) config: Arc<Config>,
    pub(super) own_listeners: Arc<[SocketAddr]>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) control: tokio::runtime::Handle,
    pub(super) previous: Option<Arc<Snapshot>>,
    /// Held until it is built, also where nobody waits for that.
    pub(super) _reading: Option<Arc<OwnedSemaphorePermit>>,
}

/// Reading policies, roots and keys blocks. What is waited for no more publishes nothing.
pub(super) async fn build_off_thread(builder: SnapshotBuilder) -> Result<Snapshot, Diagnostics> {
    let path = builder.config.path.clone();
    let given_up = CancellationToken::new();
    let _giving_up = given_up.clone().drop_guard();
    match tokio::task::spawn_blocking(move || builder.build(&given_up)).await {
        Ok(built) => built,
        Err(error) => Err(Diagnostic::error("load_interrupted", path, error.to_string()).into()),
    }
}

impl SnapshotBuilder {
    fn build(mut self, given_up: &CancellationToken) -> Result<Snapshot, Diagnostics> {
        // Before anything reads them: a file that changes meanwhile is another at the next reload.
        let roots = roots_of(&self.config);
        if let Some(previous) = &self.previous {
            let config = Config::clone(&self.config);
            self.config = Arc::new(reuse_unchanged(config, previous, &roots));
        }
        let config = &self.config;
        let declarations = config.attestors.declarations();
        let (engine, warnings) = PolicyEngine::load(config, &declarations)?;
        for warning in &warnings {
            tracing::warn!(code = warning.code, "{}", warnings.line(warning));
        }
        let issuers = self.issuers(&roots)?;
        let catalog = self.catalog_for(&engine, &issuers);
        let interception = self.interception()?;
        let prepared = prepare(config, &self.own_listeners, &self.metrics).map_err(|error| {
            Diagnostic::error("roots_unusable", &config.path, error.to_string())
        })?;
        let unmatched_tls = self.unmatched_tls();
        // Last: clients would trust what is not in force where anything failed after it.
        self.publish(interception.as_ref(), given_up)?;
        Ok(Snapshot {
            configuration_sha256: configuration_sha256(config),
            routes: Arc::new(Routes::new(config)),
            policy: PolicySnapshot::new(Arc::new(engine), Revocations::none()),
            catalog,
            issuers: Arc::new(issuers),
            roots: Arc::new(roots),
            interception,
            prepared: Arc::new(prepared),
            unmatched_tls,
            unmatched_guard: AddressGuard::new(&[], Arc::clone(&self.own_listeners)),
            config: self.config,
        })
    }

    /// Reading the system's roots takes long, so only where they may be needed.
    fn unmatched_tls(&self) -> Option<DestinationTls> {
        if self.config.unmatched != Unmatched::Tunnel {
            return None;
        }
        verified_tls(None)
            .inspect_err(|error| {
                tracing::warn!(%error, "https requests that no destination covers will be refused");
            })
            .ok()
    }

    /// The catalog in force is kept where another would state the same: its connections and key sets stay good.
    fn catalog_for(&self, engine: &PolicyEngine, issuers: &Issuers) -> Arc<Catalog> {
        let catalog = self.catalog(self.attributes_needed(engine), issuers);
        match &self.previous {
            Some(previous)
                if previous.config.attestors == self.config.attestors
                    && have_same_attestors(&previous.issuers, issuers)
                    && previous.catalog.declarations() == catalog.declarations() =>
            {
                Arc::clone(&previous.catalog)
            }
            _ => Arc::new(catalog),
        }
    }

    /// What the attestor of processes has to collect, what workloads are revoked by included: that holds
    /// whatever the new policies read. What other attestors state they state always.
    fn attributes_needed(&self, engine: &PolicyEngine) -> AttributeSelection {
        let recorded = RECORDED_ATTRIBUTES
            .iter()
            .map(|name| ("unix".to_owned(), (*name).to_owned()));
        let read = engine.attributes_read().iter().cloned();
        let revoked = self.previous.iter().flat_map(|previous| {
            let selectors = previous.policy.revocations().selectors();
            selectors.map(|selector| (selector.group.clone(), selector.name.clone()))
        });
        AttributeSelection::of(read.chain(recorded).chain(revoked))
    }

    fn catalog(&self, needed: AttributeSelection, issuers: &Issuers) -> Catalog {
        // Each named: one that is left out here would be configured and never asked.
        let Attestors {
            unix,
            systemd,
            oidc_issuers: _,
        } = &self.config.attestors;
        let mut attestors: Vec<Arc<dyn Attestor>> = Vec::new();
        if *unix {
            attestors.push(Arc::new(UnixAttestor::new(needed)));
        }
        if *systemd {
            attestors.push(Arc::new(SystemdAttestor::new()));
        }
        for (_, attestor) in issuers {
            attestors.push(Arc::clone(attestor) as Arc<dyn Attestor>);
        }
        Catalog::new(attestors, Arc::clone(&self.clock))
    }

    /// An attestor per issuer; one whose configuration and roots are the same is kept, with its keys.
    fn issuers(&self, roots: &Roots) -> Result<Issuers, Diagnostics> {
        self.config
            .attestors
            .oidc_issuers
            .iter()
            .map(|issuer| {
                let kept = self
                    .previous
                    .as_ref()
                    .filter(|previous| trusts_alike(&issuer.ca_file, &previous.roots, roots))
                    .and_then(|previous| previous.issuers.iter().find(|(same, _)| same == issuer));
                match kept {
                    Some((_, attestor)) => Ok((issuer.clone(), Arc::clone(attestor))),
                    None => Ok((issuer.clone(), Arc::new(self.oidc_attestor(issuer)?))),
                }
            })
            .collect()
    }

    fn oidc_attestor(&self, issuer: &OidcIssuer) -> Result<OidcAttestor, Diagnostics> {
        let fetch = FetchClient::new(
            FetchSettings::of_issuer(issuer),
            Arc::clone(&self.own_listeners),
            self.control.clone(),
        );
        OidcAttestor::new(issuer.settings(), Arc::new(fetch), Arc::clone(&self.clock)).map_err(
            |error| {
                let detail = format!("issuer `{}`: {error}", issuer.name);
                Diagnostic::error("issuer_unusable", &self.config.path, detail).into()
            },
        )
    }

    fn interception(&self) -> Result<Option<Arc<InterceptionAuthority>>, Diagnostics> {
        let Some(interception) = &self.config.interception else {
            return Ok(None);
        };
        let hosts = intercepted_hosts(&self.config);
        let now = self.clock.wall();
        let in_force = self.previous.as_ref().and_then(|previous| {
            let unchanged = previous.config.interception == self.config.interception;
            previous.interception.as_ref().filter(|_| unchanged)
        });
        let in_files = matches!(interception.source, CaSource::Files { .. });
        if let Some(authority) = in_force
            && authority.hosts() == hosts
            && !authority.is_due(now)
            && !in_files
        {
            return Ok(Some(Arc::clone(authority)));
        }
        let authority =
            InterceptionAuthority::open(interception, hosts, now, in_force).map_err(|error| {
                self.interception_unusable(error.to_string())
                    .next(error.next())
            })?;
        if in_files && authority.expiry().is_some_and(|end| end <= now) {
            tracing::warn!(
                code = "certificate_expired",
                "a certificate of `interception.ca` has expired: clients refuse what is intercepted; replace `certificate_file` and `key_file`"
            );
        }
        // Files that hold what they held: the leaves that were minted stay.
        if let Some(in_force) = in_force
            && in_files
            && in_force.hosts() == authority.hosts()
            && in_force.has_same_certificates(&authority)
        {
            return Ok(Some(Arc::clone(in_force)));
        }
        Ok(Some(authority))
    }

    /// Publishes the certificates of an authority that is not in force yet.
    fn publish(
        &self,
        authority: Option<&Arc<InterceptionAuthority>>,
        given_up: &CancellationToken,
    ) -> Result<(), Diagnostics> {
        let in_force = self.previous.as_ref();
        let in_force = in_force.and_then(|previous| previous.interception.as_ref());
        let (Some(interception), Some(authority)) = (&self.config.interception, authority) else {
            return Ok(());
        };
        if in_force.is_some_and(|in_force| Arc::ptr_eq(in_force, authority)) {
            return Ok(());
        }
        if given_up.is_cancelled() {
            let detail = "what is read beside it took too long".to_owned();
            return Err(self.interception_unusable(detail).into());
        }
        publish(interception, authority).map_err(|detail| {
            self.interception_unusable(detail)
                .next("let the agent's user write there, or name another file by `interception.ca_certificate_file` and `interception.trust_bundle_file`")
                .into()
        })
    }

    fn interception_unusable(&self, detail: String) -> Diagnostic {
        Diagnostic::error("interception_unusable", &self.config.path, detail)
    }
}

/// Writes the public certificates that clients load, where they are not there yet.
fn publish(interception: &Interception, authority: &InterceptionAuthority) -> Result<(), String> {
    let write = |path: &Path, content: &str| {
        write_durably(path, content.as_bytes(), 0o644)
            .map_err(|error| format!("`{}`: {error}", path.display()))
    };
    let root = authority.root_certificate_pem();
    if let Some(path) = &interception.ca_certificate_file {
        write(path, root)?;
    }
    if let Some(path) = &interception.trust_bundle_file {
        let bundle = bundle(root).map_err(|error| error.to_string())?;
        write(path, &bundle)?;
    }
    Ok(())
}

/// The hosts of destinations that carry a credential, in order, each once.
fn intercepted_hosts(config: &Config) -> Vec<String> {
    config
        .destinations
        .iter()
        .filter(|destination| !destination.credentials.is_empty())
        .flat_map(|destination| destination.hosts.iter().cloned())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

/// Keeps the sections in force where a new configuration says the same, so that connections and
/// tokens made under them stay good.
fn reuse_unchanged(mut config: Config, previous: &Snapshot, roots: &Roots) -> Config {
    for destination in &mut config.destinations {
        if let Some(same) = previous
            .config
            .destinations
            .iter()
            .find(|known| *known == destination)
            && trusts_alike(&destination.ca_file, &previous.roots, roots)
        {
            *destination = Arc::clone(same);
        }
    }
    for credential in &mut config.credentials {
        if let Some(same) = previous
            .config
            .credentials
            .iter()
            .find(|known| *known == credential)
        {
            *credential = Arc::clone(same);
        }
    }
    config
}

/// The SHA-256 of each file of roots that a destination, an issuer or a credential names.
fn roots_of(config: &Config) -> Roots {
    let of_destinations = config
        .destinations
        .iter()
        .filter_map(|destination| destination.ca_file.as_ref());
    let of_issuers = config
        .attestors
        .oidc_issuers
        .iter()
        .filter_map(|issuer| issuer.ca_file.as_ref());
    let of_credentials = config
        .credentials
        .iter()
        .filter_map(|credential| credential.ca_file());
    read_roots(of_destinations.chain(of_issuers).chain(of_credentials))
}

/// Names what is in force in records, without its content.
fn configuration_sha256(config: &Config) -> String {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for path in &config.watched_files {
        // Keys are watched as well; a digest of a digest says nothing of them.
        if let Ok(content) = std::fs::read(path).map(Zeroizing::new) {
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &content);
            context.update(digest.as_ref());
        }
    }
    hexadecimal(context.finish().as_ref())
}

/// Whether a file of roots holds what it held.
fn trusts_alike(ca_file: &Option<PathBuf>, before: &Roots, now: &Roots) -> bool {
    ca_file
        .as_ref()
        .is_none_or(|path| before.get(path) == now.get(path))
}

fn have_same_attestors(one: &Issuers, other: &Issuers) -> bool {
    one.len() == other.len()
        && one
            .iter()
            .zip(other)
            .all(|((_, one), (_, other))| Arc::ptr_eq(one, other))
}
