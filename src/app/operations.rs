//! What operators ask of a running agent: the admin socket's actions.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde_json::{Value, json};

use super::App;
use crate::admin::{
    ActionRefused, AdminActions, RevocationRequest, audit_value, credentials_value,
};
use crate::audit::LifecycleEvent;
use crate::config::suggestion;
use crate::credentials::RevokedTokens;
use crate::hardening;
use crate::policy::{Revocation, Revoked, Selector, TokenHolder, explain};
use crate::request_id::RequestId;

/// How long revoking upstream may hold the answer up.
const REVOKE_UPSTREAM: Duration = Duration::from_secs(10);

/// Of a token that is revoked and not known.
const TOKEN_NOT_HELD: &str =
    "no such token is held here: whom it was for is not known, and nobody was asked to revoke it";

/// How often ended revocations are forgotten; until then they are in force no longer than said, for
/// the snapshot without them is made then.
const PRUNE: Duration = Duration::from_millis(500);

/// How often the age of the interception intermediate is looked at.
const RENEW: Duration = Duration::from_secs(3600);

#[async_trait]
impl AdminActions for App {
    fn not_ready(&self) -> Vec<&'static str> {
        self.agent.not_ready()
    }

    fn metrics(&self) -> String {
        self.observe();
        self.agent.metrics.encode()
    }

    async fn status(&self) -> Value {
        let snapshot = self.agent.snapshot.load_full();
        let bound = self.agent.bound_listeners.load_full();
        let mut listeners: Vec<_> = bound.iter().collect();
        listeners.sort_by_key(|(name, _)| *name);
        let listeners: Vec<Value> = listeners
            .into_iter()
            .map(|(name, bind)| json!({"name": name, "bind": bind.to_string()}))
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "configuration": snapshot.config.path,
            "policy_version": &**snapshot.policy.engine().version(),
            "last_reload": self.last_reload(),
            "ready": self.not_ready().is_empty(),
            "not_ready": self.not_ready(),
            "listeners": listeners,
            "attestors": self.agent.attestors.report(&snapshot.config.attestors),
            "open_connections": self.workers.open_connections(),
            "destinations": snapshot.config.destinations.len(),
            "credentials": snapshot.config.credentials.len(),
            "revocations": snapshot.policy.revocations().iter().count(),
            "interception": snapshot.interception.as_ref().map(|authority| json!({"hosts": authority.hosts()})),
            "audit": audit_value(&self.agent.audit),
            "hardening": hardening::report(),
        })
    }

    async fn reload(self: Arc<Self>) -> Result<Value, ActionRefused> {
        match App::reload(&self).await {
            Ok(()) => Ok(json!({
                "policy_version": &**self.agent.snapshot.load().policy.engine().version(),
            })),
            Err(diagnostics) => Err(ActionRefused::reload_failed(
                "the files were not loaded",
                diagnostics.to_json(),
            )),
        }
    }

    async fn credentials(&self) -> Value {
        credentials_value(&self.agent.credentials.list())
    }

    async fn revocations(&self) -> Value {
        let snapshot = self.agent.snapshot.load_full();
        let revocations = snapshot.policy.revocations();
        revocations
            .iter()
            .map(|revocation| self.revocation_value(revocation, revocations.holder(&revocation.id)))
            .collect()
    }

    async fn revoke(&self, request: RevocationRequest) -> Result<Value, ActionRefused> {
        let revoking = self.revoking.lock().await;
        match &request.what {
            Revoked::Workload(selector) => self.check_selector(selector)?,
            Revoked::Credential(name) => self.check_credential(name)?,
            Revoked::TokenSha256(_) => {}
        }
        let for_how_long = request.for_seconds.map(Duration::from_secs);
        let revocation = Revocation {
            id: RequestId::new(self.agent.clock.wall()).to_string(),
            what: request.what,
            // One that ends after the end of time has none.
            until: for_how_long.and_then(|length| self.agent.clock.monotonic().checked_add(length)),
        };
        let holder = match &revocation.what {
            Revoked::TokenSha256(sha256) => self.holder(sha256),
            Revoked::Workload(_) | Revoked::Credential(_) => None,
        };
        self.replace_revocations(|revocations| {
            Some(revocations.with_holder(revocation.clone(), holder.clone()))
        });
        drop(revoking);
        let _ = self.agent.audit.lifecycle(LifecycleEvent::Revoked {
            id: revocation.id.clone(),
            what: words(&revocation.what),
            until: for_how_long.and_then(|length| self.agent.clock.wall().checked_add(length)),
        });
        let tokens = match &revocation.what {
            Revoked::Workload(selector) => RevokedTokens::Workload(selector.clone()),
            Revoked::Credential(name) => RevokedTokens::Credential(name.clone()),
            Revoked::TokenSha256(sha256) => RevokedTokens::TokenSha256(sha256.clone()),
        };
        let upstream = self
            .agent
            .credentials
            .revoke_upstream(&tokens, REVOKE_UPSTREAM)
            .await;
        let mut answer = self.revocation_value(&revocation, holder.as_ref());
        if let Some(members) = answer.as_object_mut() {
            members.insert("tokens".to_owned(), json!(upstream));
            if matches!(revocation.what, Revoked::TokenSha256(_)) && holder.is_none() {
                members.insert("detail".to_owned(), json!(TOKEN_NOT_HELD));
            }
        }
        Ok(answer)
    }

    async fn lift(&self, id: &str) -> Result<Value, ActionRefused> {
        match self.replace_revocations(|revocations| revocations.without(id)) {
            true => {
                let _ = self
                    .agent
                    .audit
                    .lifecycle(LifecycleEvent::RevocationLifted { id: id.to_owned() });
                Ok(json!({"lifted": id}))
            }
            false => Err(ActionRefused::not_found(
                format!(
                    "no revocation `{}` is in force",
                    crate::request::printable(id)
                ),
                "countersign revoke --list",
            )),
        }
    }

    async fn explain(&self, request_id: RequestId) -> Result<Value, ActionRefused> {
        let decisions = &self.agent.recent_decisions;
        if let Some(decision) = decisions.find(request_id) {
            return Ok(json!(explain::recorded(&decision)));
        }
        Err(match decisions.find_undecided(request_id) {
            Some(refusal) => ActionRefused::not_found(
                format!(
                    "no decision was made on request `{request_id}`: it was refused as {}: {}",
                    refusal.code.as_str(),
                    refusal.detail
                ),
                refusal.code.properties().next,
            ),
            None => ActionRefused::not_found(
                format!("no decision on request `{request_id}` is remembered"),
                "the last 1,000 decisions since the agent's start are; of each request the audit has the outcome",
            ),
        })
    }
}

impl App {
    /// Brings up to date what is only looked at: it costs requests nothing.
    fn observe(&self) {
        let active = self.agent.limits.active();
        self.agent.metrics.active_identities(active);
        let snapshot = self.agent.snapshot.load_full();
        let ages = snapshot.issuers.iter().filter_map(|(issuer, attestor)| {
            Some((issuer.name.as_str(), attestor.key_set_status().age?))
        });
        self.agent.metrics.jwks_ages(ages);
    }

    /// Whom a token was for, by what can be told of a workload still: a reload may have ended that something of
    /// its process is collected.
    fn holder(&self, sha256: &str) -> Option<TokenHolder> {
        let mut holder = self.agent.credentials.holder(sha256)?;
        let declarations = self.agent.snapshot.load().catalog.declarations();
        holder
            .workload
            .retain(|selector| selector.group != "unix" || selector.can_match(&declarations));
        Some(holder)
    }

    /// Refuses what no workload can have: an operator would take somebody for revoked who is not.
    fn check_selector(&self, selector: &Selector) -> Result<(), ActionRefused> {
        let snapshot = self.agent.snapshot.load_full();
        if selector.can_match(&snapshot.catalog.declarations()) {
            return Ok(());
        }
        let detail = format!(
            "no workload can have `{}`: no attestor states that attribute, no policy reads it, or it has no such value",
            crate::request::printable(&selector.to_string())
        );
        let next = "name an attribute that a policy reads, or uid, unit, container or issuer and subject; `countersign policy schema` lists them";
        Err(ActionRefused {
            code: "attribute_not_attested",
            ..ActionRefused::bad_request(detail, next)
        })
    }

    /// Refuses the name of a credential that there is not: an operator would take for revoked what is not. One that
    /// a reload took away is there while tokens of it live.
    fn check_credential(&self, name: &str) -> Result<(), ActionRefused> {
        let snapshot = self.agent.snapshot.load_full();
        let credentials = &snapshot.config.credentials;
        let names = credentials.iter().map(|credential| &*credential.name);
        if names.clone().any(|known| known == name) || self.agent.credentials.has_tokens_of(name) {
            return Ok(());
        }
        Err(ActionRefused {
            code: "credential_not_configured",
            ..ActionRefused::bad_request(
                format!(
                    "credential `{}` is not configured, and no token of it is held",
                    crate::request::printable(name)
                ),
                suggestion(name, names),
            )
        })
    }

    fn revocation_value(&self, revocation: &Revocation, holder: Option<&TokenHolder>) -> Value {
        let until = revocation.until.and_then(|until| {
            let left = until.saturating_sub(self.agent.clock.monotonic());
            timestamp(self.agent.clock.wall().checked_add(left)?)
        });
        let mut value = serde_json::to_value(&revocation.what).unwrap_or_default();
        if let Some(members) = value.as_object_mut() {
            members.insert("id".to_owned(), json!(revocation.id));
            members.insert("until".to_owned(), json!(until));
            if let Some(holder) = holder {
                members.insert("holder".to_owned(), json!(holder));
            }
        }
        value
    }

    /// Loads again when the interception intermediate has lived half its life, which makes another.
    pub(super) async fn renew_interception(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(RENEW);
        loop {
            ticks.tick().await;
            let snapshot = self.agent.snapshot.load_full();
            let now = self.agent.clock.wall();
            if snapshot
                .interception
                .as_ref()
                .is_some_and(|authority| authority.is_due(now))
            {
                // A failure is logged, counted and audited, and tried again.
                let _ = App::reload(&self).await;
            }
        }
    }

    /// Forgets revocations that ended, so that the next decision is made without them.
    pub(super) async fn prune_revocations(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(PRUNE);
        loop {
            ticks.tick().await;
            let now = self.agent.clock.monotonic();
            self.replace_revocations(|revocations| revocations.prune(now));
        }
    }
}

fn timestamp(time: SystemTime) -> Option<String> {
    jiff::Timestamp::try_from(time)
        .ok()
        .map(|time| format!("{time:.0}"))
}

fn words(what: &Revoked) -> String {
    match what {
        Revoked::Workload(selector) => format!("workload {selector}"),
        Revoked::Credential(name) => format!("credential {name}"),
        Revoked::TokenSha256(sha256) => format!("token {sha256}"),
    }
}
