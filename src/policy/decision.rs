//! What a decision says: [`Permission`] or [`Denial`]. Neither lets anything happen; only a
//! [`Grant`](super::Grant) does.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::AttestationEnded;
use serde::{Deserialize, Serialize};

use super::question::Question;
use crate::refusal::{Refusal, RefusalCode};

/// The outcome of evaluating policies for a question.
#[derive(Debug, Clone)]
pub enum Decision {
    /// A permit is satisfied and no forbid is.
    Allow(Arc<Permission>),
    /// Everything else.
    Deny(Arc<Denial>),
}

/// What the satisfied permits allow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Permission {
    /// The satisfied permits, by id.
    pub policies: Arc<[Arc<str>]>,
    /// The smallest `@max_lifetime` of them.
    pub max_lifetime: Option<Duration>,
    /// The scopes asked for, as far as one of them allows it by `@scopes`.
    pub scopes: Arc<[String]>,
    /// The audience asked for.
    pub audience: Option<Arc<str>>,
    /// `principal.environment`.
    pub environment: Arc<str>,
    /// `GROUP.NAME=VALUE` of the attributes that the deciding policies read.
    pub attributes_read: Arc<[String]>,
    /// Since when the policies have read the same time, and the same of them have expired; `None` if they read
    /// no time, and none has. A clock that is set back before that makes another decision.
    #[serde(skip)]
    pub valid_from: Option<SystemTime>,
    /// When the last of the satisfied permits expires by `@expires`, or the policies read another time; `None`
    /// if one of them does not, and they read no time.
    #[serde(skip)]
    pub valid_until: Option<SystemTime>,
}

/// Why a question was answered with no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Denial {
    /// Which kind of no.
    #[serde(flatten)]
    pub kind: DenialKind,
    /// The deciding policies: satisfied forbids, or those that failed to evaluate.
    pub policies: Arc<[Arc<str>]>,
    /// The version of the policies that decided.
    pub policy_version: Arc<str>,
    /// The permit that came nearest, where none was satisfied.
    pub nearest: Option<NearestMiss>,
    /// `principal.environment`; `unknown` where the question never reached the policies.
    pub environment: Arc<str>,
    /// `GROUP.NAME=VALUE` of the attributes that the deciding policies read.
    pub attributes_read: Arc<[String]>,
}

/// The kinds of no.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum DenialKind {
    /// No permit is satisfied.
    NoPermit,
    /// A forbid is satisfied.
    Forbidden,
    /// A policy that applies could not be evaluated.
    EvaluationError {
        /// What failed, for operators.
        detail: String,
    },
    /// An attestor that could not run states attributes that the policies mention.
    AttestationUnavailable {
        /// The attestors.
        attestors: Vec<String>,
    },
    /// A permit reads presented evidence that is missing or invalid.
    PresentedEvidenceRequired {
        /// The configured names of the issuers, one of whose tokens would be read.
        issuers: Vec<String>,
        /// Why the token that was presented does not count, where one was.
        invalid: Option<String>,
    },
    /// Nothing is established about the workload, and what it asks for is for attested workloads only.
    NoEvidence,
    /// A revocation is in force.
    Revoked {
        /// Its id.
        id: String,
    },
    /// The attestation no longer holds.
    #[serde(rename = "attestation_ended")]
    AttestationEnded {
        /// Why.
        #[serde(serialize_with = "serialize_display")]
        ended: AttestationEnded,
    },
    /// The policies read the path, and the path reads in two ways.
    AmbiguousPath,
}

fn serialize_display<S: serde::Serializer>(
    value: &impl std::fmt::Display,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl DenialKind {
    /// The stable name: `no_permit`, `forbidden`, ...
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NoPermit => "no_permit",
            Self::Forbidden => "forbidden",
            Self::EvaluationError { .. } => "evaluation_error",
            Self::AttestationUnavailable { .. } => "attestation_unavailable",
            Self::PresentedEvidenceRequired { .. } => "presented_evidence_required",
            Self::NoEvidence => "no_evidence",
            Self::Revoked { .. } => "revoked",
            Self::AttestationEnded { .. } => "attestation_ended",
            Self::AmbiguousPath => "ambiguous_path",
        }
    }
}

impl Denial {
    /// A denial that no policy was evaluated for.
    pub(crate) fn before_policies(kind: DenialKind, policy_version: &Arc<str>) -> Self {
        Self {
            kind,
            policies: Arc::default(),
            policy_version: Arc::clone(policy_version),
            nearest: None,
            environment: Arc::from(super::principal::UNKNOWN_ENVIRONMENT),
            attributes_read: Arc::default(),
        }
    }

    /// What the caller is told: never the nearest miss. A gateway and the workload API answer
    /// [`RefusalCode::TokenRequired`] where this says [`RefusalCode::ProxyTokenRequired`].
    pub fn to_refusal(&self, question: &Question<'_>) -> Refusal {
        match &self.kind {
            DenialKind::NoPermit => Refusal::new(
                RefusalCode::PolicyDenied,
                format!("no policy permits this workload to {question}"),
            ),
            DenialKind::Forbidden => Refusal::new(
                RefusalCode::PolicyDenied,
                format!(
                    "policy {} forbids this workload to {question}",
                    quoted(&self.policies)
                ),
            ),
            DenialKind::EvaluationError { detail } => Refusal::new(
                RefusalCode::PolicyDenied,
                format!(
                    "policy {} could not be evaluated for this workload to {question}",
                    quoted(&self.policies)
                ),
            )
            .with_internal(detail.clone()),
            DenialKind::AttestationUnavailable { attestors } => Refusal::new(
                RefusalCode::AttestationUnavailable,
                format!(
                    "attestor {} could not run, and whether this workload may {question} rests on what it states",
                    quoted(attestors)
                ),
            ),
            DenialKind::PresentedEvidenceRequired { issuers, invalid } => Refusal::new(
                RefusalCode::ProxyTokenRequired,
                match invalid {
                    Some(invalid) => format!(
                        "the presented token is not accepted: {invalid}; a token of {} is expected",
                        quoted(issuers)
                    ),
                    None => format!(
                        "no token was presented; a token of {} is expected",
                        quoted(issuers)
                    ),
                },
            ),
            DenialKind::NoEvidence => Refusal::new(
                RefusalCode::PolicyDenied,
                format!(
                    "nothing is known of this workload, and only an attested one may {question}"
                ),
            ),
            DenialKind::Revoked { id } => Refusal::new(
                RefusalCode::Revoked,
                format!("revocation `{id}` is in force"),
            ),
            DenialKind::AttestationEnded { ended } => (*ended).into(),
            DenialKind::AmbiguousPath => Refusal::new(
                RefusalCode::AmbiguousPath,
                "the path reads differently raw and decoded, and a policy reads the path",
            ),
        }
    }
}

fn quoted(names: &[impl AsRef<str>]) -> String {
    let mut text = String::new();
    for name in names {
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push('`');
        text.push_str(name.as_ref());
        text.push('`');
    }
    text
}

/// The permit that came nearest to being satisfied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NearestMiss {
    /// Its id.
    pub policy: Arc<str>,
    /// Where it stands: `policies/orders.cedar:4:1`.
    pub location: String,
    /// Its conditions, in order.
    pub conditions: Vec<Condition>,
}

impl std::fmt::Display for NearestMiss {
    /// `orders-read (policies/orders.cedar:3:1): context.request.safe was false (DELETE)`.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} ({})", self.policy, self.location)?;
        let failed = self.conditions.iter().filter(|condition| !condition.holds);
        for (index, condition) in failed.enumerate() {
            let separator = if index == 0 { ": " } else { "; " };
            write!(formatter, "{separator}{}", condition.text)?;
            if let Some(actual) = &condition.actual {
                write!(formatter, " {actual}")?;
            }
        }
        Ok(())
    }
}

/// One condition of a policy, evaluated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Cedar text.
    pub text: String,
    /// Whether it holds.
    pub holds: bool,
    /// The values that it read: `was false (DELETE)`, `not attested`.
    pub actual: Option<String>,
}
