//! Tokens as the agent holds them: wiped when dropped, shown as their digest only.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use countersign_attestors::hexadecimal;
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::backoff::random_fraction;
use super::single_flight::Perishable;
use crate::config::InjectionFormat;
use crate::policy::Grant;
use crate::providers::MintedToken;

const BEARER: &[u8] = b"Bearer ";

/// How long before its expiry a token is no longer used, or a tenth of its lifetime where that is less: it
/// has still to arrive, at a server whose clock may be ahead.
const MARGIN: Duration = Duration::from_secs(10);

/// A cached token with its deadlines, on the monotonic clock: it is replaced at `refresh_at`, used until
/// `usable_until`, and lives at its authorization server until `lives_until`.
pub(super) struct Token {
    bearer: HeaderValue,
    raw: HeaderValue,
    sha256: Arc<str>,
    scopes: Option<Arc<[String]>>,
    expires_at: SystemTime,
    lifetime: Duration,
    usable_until: Duration,
    refresh_at: Duration,
    lives_until: Duration,
}

impl Token {
    /// `None` where the token cannot stand in a header, which the provider has ruled out.
    pub(super) fn new(minted: &MintedToken, max_lifetime: Option<Duration>) -> Option<Self> {
        let text = minted.access_token.expose_secret().as_bytes();
        // One buffer for both forms; the last header that refers to it wipes it.
        let mut buffer = Zeroizing::new(Vec::with_capacity(BEARER.len() + text.len()));
        buffer.extend_from_slice(BEARER);
        buffer.extend_from_slice(text);
        let bytes = Bytes::from_owner(buffer);
        let header = |bytes| {
            let mut header = HeaderValue::from_maybe_shared::<Bytes>(bytes).ok()?;
            header.set_sensitive(true);
            Some(header)
        };
        let lifetime = max_lifetime.map_or(minted.expires_in, |most| most.min(minted.expires_in));
        let margin = MARGIN.min(minted.expires_in / 10);
        let until_expiry = minted.expires_in.saturating_sub(margin);
        let usable_for = max_lifetime.map_or(until_expiry, |most| most.min(until_expiry));
        Some(Self {
            raw: header(bytes.slice(BEARER.len()..))?,
            bearer: header(bytes)?,
            sha256: sha256_hexadecimal(text).into(),
            scopes: minted.scope.as_deref().map(scopes_of),
            expires_at: minted.sent_at_wall + lifetime,
            lifetime,
            usable_until: minted.sent_at + usable_for,
            lives_until: minted.sent_at + minted.expires_in,
            refresh_at: minted.sent_at + lifetime.mul_f64(0.50 + 0.05 * random_fraction()),
        })
    }

    pub(super) fn is_due(&self, now: Duration) -> bool {
        now >= self.refresh_at
    }

    /// When its authorization server lets it expire, whatever policy allows.
    pub(super) fn lives_until(&self) -> Duration {
        self.lives_until
    }

    pub(super) fn refresh_at(&self) -> Duration {
        self.refresh_at
    }

    pub(super) fn expires_at(&self) -> SystemTime {
        self.expires_at
    }

    pub(super) fn sha256(&self) -> &Arc<str> {
        &self.sha256
    }

    pub(super) fn scopes(&self) -> Option<&Arc<[String]>> {
        self.scopes.as_ref()
    }

    pub(super) fn header(&self, format: InjectionFormat) -> &HeaderValue {
        match format {
            InjectionFormat::Bearer => &self.bearer,
            InjectionFormat::Raw => &self.raw,
        }
    }

    /// The token itself, to be revoked.
    pub(super) fn secret(&self) -> SecretString {
        // INVARIANT: the bytes came from a string.
        SecretString::from(self.raw.to_str().unwrap_or_default())
    }
}

impl Perishable for Token {
    fn is_usable(&self, now: Duration) -> bool {
        now < self.usable_until
    }

    /// From the moment it was asked for to its expiry, or to the end of what policy allows.
    fn lifetime(&self) -> Duration {
        self.lifetime
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Token")
            .field("sha256", &self.sha256)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// How a [`Credential`] came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obtained {
    /// From the cache.
    CacheHit,
    /// By a token request that this caller started.
    Minted {
        /// How long the authorization server was waited for.
        upstream: Duration,
    },
    /// By a token request that another caller had started.
    Joined,
}

impl Obtained {
    /// How long the authorization server was waited for by a token request that this caller started.
    pub fn led(&self) -> Option<Duration> {
        match self {
            Self::Minted { upstream } => Some(*upstream),
            Self::CacheHit | Self::Joined => None,
        }
    }
}

/// A token and the right to put it on requests to its grant's destination. Redacts itself.
pub struct Credential {
    token: Arc<Token>,
    format: InjectionFormat,
    grant: Grant,
    obtained: Obtained,
}

impl Credential {
    pub(super) fn new(token: Arc<Token>, grant: Grant, obtained: Obtained) -> Self {
        let format = grant
            .credential()
            .zip(grant.destination())
            .and_then(|(credential, destination)| {
                destination
                    .credentials
                    .iter()
                    .find(|used| used.credential.name == credential.name)
            })
            .map_or(InjectionFormat::Bearer, |used| used.inject.format);
        Self {
            token,
            format,
            grant,
            obtained,
        }
    }

    /// The header's value, marked sensitive: `Bearer TOKEN`, or the token alone.
    pub fn header_value(&self) -> &HeaderValue {
        self.token.header(self.format)
    }

    /// The decision that permits its use.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// The token's SHA-256 in hexadecimal: its name in records.
    pub fn token_sha256(&self) -> &str {
        self.token.sha256()
    }

    /// The token's SHA-256 in hexadecimal, shared.
    pub fn token_sha256_shared(&self) -> Arc<str> {
        Arc::clone(self.token.sha256())
    }

    /// When it expires, or when policy ends its use.
    pub fn expires_at(&self) -> SystemTime {
        self.token.expires_at()
    }

    /// The scopes that the authorization server says it granted; `None` where it says nothing, for then
    /// they are those asked for (RFC 6749 section 5.1).
    pub fn scopes_granted(&self) -> Option<&Arc<[String]>> {
        self.token.scopes()
    }

    /// Until when (monotonic) it may be sent.
    pub fn usable_until(&self) -> Duration {
        self.token.usable_until
    }

    /// How it came about.
    pub fn obtained(&self) -> Obtained {
        self.obtained
    }

    pub(super) fn token(&self) -> &Arc<Token> {
        &self.token
    }
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Credential")
            .field("token", &self.token)
            .field("obtained", &self.obtained)
            .finish_non_exhaustive()
    }
}

/// A token to be handed to the workload that asked for it.
#[derive(Debug)]
pub struct IssuedToken {
    /// The token.
    pub access_token: SecretString,
    /// When it expires.
    pub expires_at: SystemTime,
    /// The scope granted, where the authorization server said.
    pub scope: Option<String>,
    /// The token's SHA-256 in hexadecimal.
    pub token_sha256: Arc<str>,
    /// How long the authorization server was waited for.
    pub upstream: Duration,
    /// The decision that permits it.
    pub grant: Grant,
}

impl IssuedToken {
    /// As [`Credential::scopes_granted`].
    pub fn scopes_granted(&self) -> Option<Arc<[String]>> {
        self.scope.as_deref().map(scopes_of)
    }
}

/// The scopes of a `scope` (RFC 6749 section 3.3).
fn scopes_of(scope: &str) -> Arc<[String]> {
    scope.split_ascii_whitespace().map(str::to_owned).collect()
}

pub(super) fn sha256_hexadecimal(bytes: &[u8]) -> String {
    hexadecimal(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref())
}
