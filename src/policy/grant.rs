//! The right to obtain one credential for one destination, and how long it holds.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{AttestationEnded, AttestedWorkload};

use super::decision::{Decision, Permission};
use super::question::{Action, Question, Resource};
use super::snapshot::PolicySnapshot;
use crate::config::{CredentialConfig, Destination};

/// A positive decision. Within this module only [`PolicySnapshot::decide`] and
/// [`DecisionCache`](super::DecisionCache) make one, and outside of it nobody can; each answers one
/// question, cannot be copied, and is consumed where a token is obtained by it:
///
/// ```
/// fn read(grant: &countersign::policy::Grant) -> &[std::sync::Arc<str>] {
///     grant.deciding_policies()
/// }
/// ```
/// ```compile_fail,E0451
/// // Fields are private: no grant without a decision.
/// let grant = countersign::policy::Grant { lease: todo!() };
/// ```
/// ```compile_fail,E0599
/// fn twice(grant: countersign::policy::Grant) -> (countersign::policy::Grant, countersign::policy::Grant) {
///     (grant.clone(), grant)
/// }
/// ```
#[derive(Debug)]
pub struct Grant {
    lease: Lease,
}

/// What was permitted, to whom it may concern: a positive decision without its workload.
#[derive(Debug)]
pub(super) struct Permitted {
    permission: Arc<Permission>,
    action: Action,
    credential: Option<Arc<CredentialConfig>>,
    destination: Option<Arc<Destination>>,
    snapshot: Arc<PolicySnapshot>,
}

impl Permitted {
    pub(super) fn new(
        permission: Arc<Permission>,
        question: &Question<'_>,
        snapshot: &Arc<PolicySnapshot>,
    ) -> Arc<Self> {
        Arc::new(Self {
            permission,
            action: question.action,
            credential: match question.resource {
                Resource::Credential { credential, .. } => Some(Arc::clone(credential)),
                Resource::Destination(_) | Resource::Unmatched => None,
            },
            destination: match question.resource {
                Resource::Destination(destination) => Some(Arc::clone(destination)),
                Resource::Credential { .. } | Resource::Unmatched => {
                    question.destination.map(Arc::clone)
                }
            },
            snapshot: Arc::clone(snapshot),
        })
    }

    /// Whether its policies permit it still, and read the same time, at the wall-clock time `now`, which may have
    /// been set back since.
    pub(super) fn holds_at(&self, now: SystemTime) -> bool {
        let permission = &self.permission;
        permission.valid_from.is_none_or(|from| from <= now)
            && permission.valid_until.is_none_or(|until| now < until)
    }
}

impl Grant {
    pub(super) fn new(permitted: Arc<Permitted>, workload: &Arc<AttestedWorkload>) -> Self {
        Self {
            lease: Lease {
                permitted,
                workload: Arc::clone(workload),
            },
        }
    }

    /// What was permitted.
    pub fn action(&self) -> Action {
        self.lease.permitted.action
    }

    /// The satisfied permits, by id.
    pub fn deciding_policies(&self) -> &Arc<[Arc<str>]> {
        &self.permission().policies
    }

    /// The version of the policies that decided.
    pub fn policy_version(&self) -> &Arc<str> {
        self.lease.permitted.snapshot.engine().version()
    }

    /// The credential; `None` for `connect`.
    pub fn credential(&self) -> Option<&Arc<CredentialConfig>> {
        self.lease.permitted.credential.as_ref()
    }

    /// The destination; `None` for `issue` and for traffic to no configured destination.
    pub fn destination(&self) -> Option<&Arc<Destination>> {
        self.lease.permitted.destination.as_ref()
    }

    /// The scopes asked for, after `@scopes`.
    pub fn scopes(&self) -> &Arc<[String]> {
        &self.permission().scopes
    }

    /// The audience asked for.
    pub fn audience(&self) -> Option<&Arc<str>> {
        self.permission().audience.as_ref()
    }

    /// How long a token may be used after it was minted, by `@max_lifetime`.
    pub fn max_lifetime(&self) -> Option<Duration> {
        self.permission().max_lifetime
    }

    /// Whether `other` grants the same of the same credential: scopes, audience and lifetime.
    pub fn grants_as(&self, other: &Self) -> bool {
        let of = |grant: &Self| grant.credential().map(Arc::as_ptr);
        of(self) == of(other)
            && self.scopes() == other.scopes()
            && self.audience() == other.audience()
            && self.max_lifetime() == other.max_lifetime()
    }

    /// How long this grant holds.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// The workload that it was given to.
    pub fn workload(&self) -> &Arc<AttestedWorkload> {
        &self.lease.workload
    }

    /// `GROUP.NAME=VALUE` of the attributes that the deciding policies read, for the audit.
    pub fn attributes_read(&self) -> &Arc<[String]> {
        &self.permission().attributes_read
    }

    /// `principal.environment`.
    pub fn environment(&self) -> &str {
        &self.permission().environment
    }

    pub(super) fn decision(&self) -> Decision {
        Decision::Allow(Arc::clone(&self.lease.permitted.permission))
    }

    pub(super) fn permission(&self) -> &Permission {
        &self.lease.permitted.permission
    }
}

/// How long a decision holds: while the snapshot is the same and the workload's attestation stands.
#[derive(Debug, Clone)]
pub struct Lease {
    permitted: Arc<Permitted>,
    workload: Arc<AttestedWorkload>,
}

impl Lease {
    /// Checks the lease against the snapshot in force and the wall-clock time `now`.
    pub fn check(&self, current: &Arc<PolicySnapshot>, now: SystemTime) -> Result<(), LeaseEnded> {
        if self.is_superseded(current) {
            return Err(LeaseEnded::SnapshotReplaced);
        }
        if !self.permitted.holds_at(now) {
            return Err(LeaseEnded::PolicyExpired);
        }
        self.workload
            .check_liveness(now)
            .map_err(LeaseEnded::Attestation)
    }

    /// Whether the permits that allowed this expire, or read another time, before those of `other`.
    pub fn ends_before(&self, other: &Self) -> bool {
        let end = |lease: &Self| lease.permitted.permission.valid_until;
        end(self).is_some_and(|own| end(other).is_none_or(|other| own < other))
    }

    /// Whether policies were reloaded, or something was revoked, since the decision.
    pub fn is_superseded(&self, current: &Arc<PolicySnapshot>) -> bool {
        !Arc::ptr_eq(&self.permitted.snapshot, current)
    }

    /// The workload that it was given to.
    pub fn workload(&self) -> &Arc<AttestedWorkload> {
        &self.workload
    }
}

/// Why a lease no longer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LeaseEnded {
    /// Policies were reloaded, or something was revoked: decide again.
    #[error("the policies were replaced since the decision")]
    SnapshotReplaced,
    /// The permits that allowed it expired, or it is another time than they read: decide again.
    #[error("the policies that allowed this have expired, or read the time")]
    PolicyExpired,
    /// The workload is no longer what was attested.
    #[error(transparent)]
    Attestation(AttestationEnded),
}
