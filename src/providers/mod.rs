//! Where tokens come from. To add a source: implement [`Provider`] in a file of its own, and add its
//! line to [`provider`], the visible list.

mod client_authentication;
mod metadata;
mod oauth_client_credentials;
mod shared_parts;
mod token_response;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use countersign_attestors::{AttributeValue, Clock, PresentedToken, WorkloadFacts, hexadecimal};
use secrecy::SecretString;

use crate::config::{CredentialConfig, Template, TemplatePart, TokenSource};
use crate::fetch::{FetchFailure, FetchFailureKind};
use crate::refusal::{Refusal, RefusalCode};

pub use oauth_client_credentials::OauthClientCredentialsProvider;
pub use shared_parts::SharedParts;
pub(crate) use token_response::wipe;
pub use token_response::{TokenResponse, parse_token_response};

/// A source of tokens for one configured credential.
#[async_trait]
pub trait Provider: Send + Sync + std::fmt::Debug {
    /// What a token is minted for beside scopes and audience. Tokens of equal [`Subject`]s are shared.
    fn subject_parts(&self) -> &SubjectParts;

    /// Obtains a token within `deadline`. `again_if_refused` allows one more attempt with a new
    /// assertion where the server refuses the first.
    async fn mint(
        &self,
        request: &TokenRequest,
        again_if_refused: bool,
        deadline: Deadline,
    ) -> Result<MintedToken, MintFailure>;

    /// Looks for what would keep a token from being obtained: keys that cannot be used, a server that
    /// does not answer, clocks that differ. Obtains none. Empty where nothing is found.
    async fn probe(&self, deadline: Deadline) -> Vec<MintFailure>;

    /// Revokes a token where the source serves that; `false` where it does not.
    async fn revoke(
        &self,
        token: &SecretString,
        subject: &Subject,
        deadline: Deadline,
    ) -> Result<bool, MintFailure>;

    /// The id of the key that the last assertions are signed with, once after it took another's place.
    fn take_replaced_key(&self) -> Option<String>;

    /// Lets what failed be tried again: the configuration was read anew.
    fn forget_failures(&self);

    /// The longest that one [`Provider::mint`] may take.
    fn timeout(&self) -> Duration;
}

/// The list of token sources: the provider of a configured credential, which has in `shared` what it shares.
pub fn provider(
    config: &CredentialConfig,
    clock: Arc<dyn Clock>,
    shared: &mut SharedParts,
) -> Arc<dyn Provider> {
    match &config.source {
        TokenSource::OauthClientCredentials(settings) => {
            Arc::new(OauthClientCredentialsProvider::new(settings, clock, shared))
        }
    }
}

/// What is asked of a provider: all that distinguishes one of its tokens from another.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// The scopes; none asks for the server's default.
    pub scopes: Vec<String>,
    /// The `audience` parameter.
    pub audience: Option<String>,
    /// For whom.
    pub subject: Subject,
}

/// What of a workload makes a difference to a provider.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct SubjectParts {
    /// The attributes that templates are made of, as (group, name).
    pub attributes: Vec<(String, String)>,
    /// Whether the workload's own token is presented upstream, and of which issuer it must be.
    pub presented: Option<PresentedFrom>,
}

/// Whose token is presented upstream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PresentedFrom {
    /// Of any configured issuer.
    AnyIssuer,
    /// Of the issuer with this configured name.
    Issuer(String),
}

/// For whom a token is minted: the values of [`SubjectParts`]; empty where all workloads share one.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// The attributes, in the order of [`SubjectParts::attributes`].
    pub attributes: Vec<((String, String), AttributeValue)>,
    /// The workload's own token.
    pub presented: Option<PresentedToken>,
    /// When the workload's own token expires.
    pub presented_until: Option<SystemTime>,
}

impl SubjectParts {
    /// The parts of `facts` and `presented`, or the refusal of a workload that lacks one.
    pub fn of(
        &self,
        facts: &WorkloadFacts,
        presented: Option<&PresentedToken>,
        presented_until: Option<SystemTime>,
    ) -> Result<Subject, Refusal> {
        let mut subject = Subject::default();
        for (group, name) in &self.attributes {
            let value = facts.attribute(group, name).ok_or_else(|| {
                Refusal::new(
                    RefusalCode::AttributeMissing,
                    format!("attribute `{group}.{name}` is not attested for this workload"),
                )
            })?;
            subject
                .attributes
                .push(((group.clone(), name.clone()), value.clone()));
        }
        if self.presented.is_some() {
            let token = self
                .presented_in(facts, presented)
                .ok_or_else(|| Refusal::new(RefusalCode::AttributeMissing, self.missing_token()))?;
            subject.presented = Some(token.clone());
            subject.presented_until = presented_until;
        }
        Ok(subject)
    }

    /// Whether `subject` is what [`Self::of`] would return; allocates nothing.
    pub fn matches(
        &self,
        subject: &Subject,
        facts: &WorkloadFacts,
        presented: Option<&PresentedToken>,
    ) -> bool {
        let attributes_match = self.attributes.len() == subject.attributes.len()
            && subject
                .attributes
                .iter()
                .all(|((group, name), value)| facts.attribute(group, name) == Some(value));
        let presented_matches = match (&self.presented, &subject.presented) {
            (None, None) => true,
            (Some(_), Some(known)) => self
                .presented_in(facts, presented)
                .is_some_and(|token| token.sha256() == known.sha256()),
            _ => false,
        };
        attributes_match && presented_matches
    }

    /// The token that this workload presented, if it is of the issuer wanted.
    pub fn presented_in<'a>(
        &self,
        facts: &WorkloadFacts,
        presented: Option<&'a PresentedToken>,
    ) -> Option<&'a PresentedToken> {
        match self.presented.as_ref()? {
            PresentedFrom::AnyIssuer => presented,
            // An issuer's group of attributes stands in the facts only once its token was verified.
            PresentedFrom::Issuer(name) => presented.filter(|_| facts.groups.contains_key(name)),
        }
    }

    fn missing_token(&self) -> String {
        match &self.presented {
            Some(PresentedFrom::Issuer(name)) => {
                format!("the workload presented no token of issuer `{name}`")
            }
            _ => "the workload presented no token".to_owned(),
        }
    }
}

impl Subject {
    /// The value of an attribute.
    pub fn attribute(&self, group: &str, name: &str) -> Option<&AttributeValue> {
        self.attributes
            .iter()
            .find(|((known_group, known_name), _)| known_group == group && known_name == name)
            .map(|(_, value)| value)
    }

    /// Fills a template.
    pub fn render(&self, template: &Template) -> Result<String, MintFailure> {
        let mut text = String::new();
        for part in &template.parts {
            match part {
                TemplatePart::Literal(literal) => text.push_str(literal),
                TemplatePart::Attribute { group, name } => {
                    let value = self.attribute(group, name).ok_or_else(|| {
                        MintFailure::new(
                            RefusalCode::AttributeMissing,
                            format!("attribute `{group}.{name}` is not attested for this workload"),
                            Recovery::Permanent,
                        )
                    })?;
                    text.push_str(&value.to_string());
                }
            }
        }
        Ok(text)
    }

    /// A name for records: the attributes and the presented token's digest, or `shared`.
    pub fn describe(&self) -> String {
        let mut parts: Vec<String> = self
            .attributes
            .iter()
            .map(|((group, name), value)| format!("{group}.{name}={value}"))
            .collect();
        if let Some(presented) = &self.presented {
            parts.push(format!("presented:{}", hexadecimal(presented.sha256())));
        }
        match parts.is_empty() {
            true => "shared".to_owned(),
            false => parts.join(" "),
        }
    }
}

/// A template's attributes, as (group, name).
pub(crate) fn attributes_of(template: &Template) -> impl Iterator<Item = (String, String)> + '_ {
    template.parts.iter().filter_map(|part| match part {
        TemplatePart::Literal(_) => None,
        TemplatePart::Attribute { group, name } => Some((group.clone(), name.clone())),
    })
}

/// A token as a provider obtained it.
#[derive(Debug)]
pub struct MintedToken {
    /// The token; its bytes are checked to be token68.
    pub access_token: SecretString,
    /// Its lifetime from [`Self::sent_at`].
    pub expires_in: Duration,
    /// The scope granted, where the server said.
    pub scope: Option<String>,
    /// Monotonic time just before the request that was answered with it was sent.
    pub sent_at: Duration,
    /// Wall-clock time at [`Self::sent_at`].
    pub sent_at_wall: SystemTime,
}

/// Why no token was obtained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MintFailure {
    /// What the caller is told.
    pub code: RefusalCode,
    /// What happened, for the caller.
    pub detail: String,
    /// What only the log says.
    pub internal: Option<String>,
    /// When another attempt may be made.
    pub recovery: Recovery,
}

/// The most that a server's `Retry-After` is obeyed.
pub(crate) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// When another attempt may be made after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// After a while that grows with each failure, and not before the server's `Retry-After`.
    Backoff {
        /// What the server asked for, uncapped.
        retry_after: Option<Duration>,
    },
    /// After 30 s: the server refused this client or grant, and asking at once would not help.
    Hold,
    /// Once the configuration has changed.
    Permanent,
}

impl MintFailure {
    pub(crate) fn new(code: RefusalCode, detail: impl Into<String>, recovery: Recovery) -> Self {
        Self {
            code,
            detail: detail.into(),
            internal: None,
            recovery,
        }
    }

    pub(crate) fn with_internal(mut self, internal: impl Into<String>) -> Self {
        self.internal = Some(internal.into());
        self
    }

    /// What a failed fetch means: `what` names the thing asked (`the token endpoint`).
    pub(crate) fn of_fetch(what: &str, failure: &FetchFailure) -> Self {
        let (code, detail) = match failure.kind {
            FetchFailureKind::Dns => (
                RefusalCode::TokenServerUnreachable,
                format!("the name of {what} does not resolve"),
            ),
            FetchFailureKind::Refused => (
                RefusalCode::TokenServerUnreachable,
                format!("{what} refuses connections"),
            ),
            FetchFailureKind::Reset | FetchFailureKind::KeptConnectionBroke => (
                RefusalCode::TokenServerUnreachable,
                format!("{what} broke the connection before it answered"),
            ),
            FetchFailureKind::Tls => (
                RefusalCode::TokenServerTls,
                format!("the certificate of {what} does not verify"),
            ),
            FetchFailureKind::CertificateAuthority => (
                RefusalCode::TokenServerTls,
                "the credential's `ca_file` cannot be used".to_owned(),
            ),
            FetchFailureKind::Timeout => (
                RefusalCode::TokenServerTimeout,
                format!("{what} did not answer in time"),
            ),
            FetchFailureKind::Truncated => (
                RefusalCode::TokenResponseInvalid,
                format!("the answer of {what} was cut short"),
            ),
            FetchFailureKind::TooLarge => (
                RefusalCode::TokenResponseInvalid,
                format!("the answer of {what} is larger than 64 KiB"),
            ),
            FetchFailureKind::Protocol => (
                RefusalCode::TokenResponseInvalid,
                format!("the answer of {what} is not HTTP"),
            ),
            FetchFailureKind::NotAllowed => (
                RefusalCode::TokenServerNotAllowed,
                format!("{what} may not be connected to"),
            ),
        };
        Self::new(code, detail, Recovery::Backoff { retry_after: None })
            .with_internal(failure.detail.clone())
    }
}

/// The moment by which something must be done.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// The moment `duration` from now.
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// What is left.
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}
