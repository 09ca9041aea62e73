//! The `oidc` attestor: a JWT of one configured issuer. Its page is `docs/oidc.md`.

mod issuer;
mod keys;
mod presets;
#[cfg(test)]
mod tests;
mod token;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde_json::{Map, Value};
use url::Url;

pub use issuer::KeySetStatus;
pub use presets::{PRESETS, preset};

use crate::attestor::{Attestation, Attestor, AttributeDeclaration, Evidence, EvidenceKind};
use crate::attribute::{AttributeType, AttributeValue, Attributes};
use crate::clock::Clock;
use crate::evidence::PresentedToken;
use crate::fetch::Fetch;
use crate::workload::{FailureKind, KERNEL_GROUPS};
use issuer::{Issuer, NoKey};
use token::{InvalidToken, UnverifiedToken, claimed_issuer, shortened, string_set, text_claim};

/// How far an issuer's clock may be ahead of ours, for `nbf` and `iat`. `exp` gets no leeway.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// One issuer on the allow-list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OidcIssuerSettings {
    /// The group of its attributes: `principal.NAME`.
    pub name: String,
    /// The exact `iss`, an https URL.
    pub issuer: String,
    /// The audiences that are ours. A token's every audience must be one of them.
    pub audiences: Vec<String>,
    /// The claims to state, by type; `iss` and `sub` are always stated. See [`preset`].
    pub claims: BTreeMap<String, AttributeType>,
}

impl OidcIssuerSettings {
    /// Every attribute that a token of this issuer may state.
    pub fn declarations(&self) -> Vec<AttributeDeclaration> {
        let declare =
            |name: &str, attribute_type, required, description: String| AttributeDeclaration {
                group: self.name.clone(),
                name: name.to_owned(),
                attribute_type,
                required,
                description,
            };
        let always = ["iss", "sub"].map(|claim| {
            declare(
                claim,
                AttributeType::String,
                true,
                format!("the token's `{claim}`"),
            )
        });
        let configured = self
            .claims
            .iter()
            .filter(|(claim, _)| !matches!(claim.as_str(), "iss" | "sub"))
            .map(|(claim, kind)| {
                declare(claim, *kind, false, format!("the token's claim `{claim}`"))
            });
        always.into_iter().chain(configured).collect()
    }
}

/// Why settings of an issuer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIssuerSettings {
    /// The name cannot name a group of attributes.
    #[error(
        "issuer name `{0}` cannot be used: write lower-case letters, digits and `_`, beginning with a letter, and none of the names of other attestors"
    )]
    Name(String),
    /// The issuer is not an https URL without query, fragment and user.
    #[error("issuer `{0}` is not an https URL without query, fragment and user name")]
    Issuer(String),
    /// There is no audience.
    #[error("issuer `{0}` has no audience: a token for somebody else would be accepted")]
    Audiences(String),
    /// A claim has a type that it cannot have.
    #[error("claim `{claim}` of issuer `{name}` is a string")]
    Claim {
        /// The issuer's name.
        name: String,
        /// The claim.
        claim: String,
    },
}

/// Verifies tokens of one issuer and states their claims under the issuer's configured name.
#[derive(Debug)]
pub struct OidcAttestor {
    settings: OidcIssuerSettings,
    issuer: Arc<Issuer>,
    clock: Arc<dyn Clock>,
}

impl OidcAttestor {
    /// An attestor for one issuer. It asks nothing of the network before the first token.
    pub fn new(
        settings: OidcIssuerSettings,
        fetch: Arc<dyn Fetch>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, InvalidIssuerSettings> {
        let url = check(&settings)?;
        let issuer = Issuer::new(settings.issuer.clone(), url, fetch, Arc::clone(&clock));
        Ok(Self {
            settings,
            issuer: Arc::new(issuer),
            clock,
        })
    }

    /// The settings, so that a reload can keep an attestor whose settings are the same, with its keys.
    pub fn settings(&self) -> &OidcIssuerSettings {
        &self.settings
    }

    /// Age and fetch counts of the key set, for metrics.
    pub fn key_set_status(&self) -> KeySetStatus {
        self.issuer.status()
    }

    /// Fetches the issuer's keys now, and keeps them.
    ///
    /// # Errors
    /// What is wrong with the issuer's documents, or with the way to them.
    pub async fn fetch_keys(&self) -> Result<(), String> {
        self.issuer.load().await.map(drop)
    }

    async fn verify(&self, token: &UnverifiedToken<'_>) -> Result<Verified, NoKey> {
        // What costs nothing comes first, so that a token which is wrong anyway causes no fetch.
        let verified = self.read_claims(&token.claims).map_err(NoKey::Invalid)?;
        self.issuer
            .verify(&token.header, token.signed, &token.signature)
            .await?;
        Ok(verified)
    }

    fn read_claims(&self, claims: &Map<String, Value>) -> Result<Verified, InvalidToken> {
        let now = self.clock.wall();
        let issuer = text_claim(claims, "iss")?;
        let subject = text_claim(claims, "sub")?;
        check_audience(claims, &self.settings.audiences)?;
        let valid_until = numeric_date(claims, "exp")?.ok_or(InvalidToken::ClaimMissing("exp"))?;
        if now >= valid_until {
            return Err(InvalidToken::Expired);
        }
        for claim in ["nbf", "iat"] {
            if numeric_date(claims, claim)?.is_some_and(|time| time > now + CLOCK_SKEW) {
                return Err(InvalidToken::NotYetValid(claim));
            }
        }

        let mut attributes = Attributes::from([
            ("iss".to_owned(), AttributeValue::String(issuer.to_owned())),
            ("sub".to_owned(), AttributeValue::String(subject.to_owned())),
        ]);
        for (name, attribute_type) in &self.settings.claims {
            if let Some(value) = claims.get(name) {
                attributes.insert(name.clone(), attribute(name, value, *attribute_type)?);
            }
        }
        Ok(Verified {
            attributes,
            valid_until,
        })
    }
}

#[async_trait]
impl Attestor for OidcAttestor {
    fn name(&self) -> &str {
        &self.settings.name
    }

    fn evidence_kind(&self) -> EvidenceKind {
        EvidenceKind::Presented
    }

    fn declarations(&self) -> Vec<AttributeDeclaration> {
        self.settings.declarations()
    }

    async fn attest(&self, evidence: Evidence<'_>) -> Attestation {
        let Evidence::Presented(presented) = evidence else {
            return Attestation::NotApplicable;
        };
        // The issuer is compared byte for byte before anything else, the network above all: a token
        // cannot steer where keys are fetched.
        let text = presented.expose();
        let token = match UnverifiedToken::parse(text) {
            Ok(token) if token.issuer() == Ok(self.issuer.identifier()) => token,
            // A token of this issuer that is refused must be known as one, so that it is forwarded to nobody.
            Err(invalid) if claimed_issuer(text).as_deref() == Some(self.issuer.identifier()) => {
                return Attestation::Failed {
                    kind: FailureKind::InvalidEvidence,
                    detail: invalid.to_string(),
                };
            }
            _ => return Attestation::NotApplicable,
        };
        match self.verify(&token).await {
            Ok(verified) => Attestation::Attested {
                groups: BTreeMap::from([(self.settings.name.clone(), verified.attributes)]),
                valid_until: Some(verified.valid_until),
            },
            Err(NoKey::Invalid(invalid)) => Attestation::Failed {
                kind: FailureKind::InvalidEvidence,
                detail: invalid.to_string(),
            },
            Err(NoKey::Unavailable(detail)) => Attestation::Failed {
                kind: FailureKind::CouldNotRun,
                detail,
            },
        }
    }
}

/// What a token states, once its signature is checked.
struct Verified {
    attributes: Attributes,
    valid_until: SystemTime,
}

/// Why no configured issuer takes this token.
pub(crate) fn why_no_issuer(presented: &PresentedToken) -> String {
    let token = UnverifiedToken::parse(presented.expose());
    match token.as_ref().map(UnverifiedToken::issuer) {
        Ok(Ok(issuer)) => format!(
            "the presented token's issuer `{}` is not configured",
            shortened(issuer)
        ),
        Ok(Err(invalid)) => invalid.to_string(),
        Err(invalid) => invalid.to_string(),
    }
}

fn check(settings: &OidcIssuerSettings) -> Result<Url, InvalidIssuerSettings> {
    let name = &settings.name;
    let is_name = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    let is_taken = KERNEL_GROUPS.contains(&name.as_str())
        || ["environment", "kubernetes", "oidc", "spiffe"].contains(&name.as_str());
    if !is_name || is_taken {
        return Err(InvalidIssuerSettings::Name(name.clone()));
    }
    let not_an_issuer = || InvalidIssuerSettings::Issuer(settings.issuer.clone());
    let url = Url::parse(&settings.issuer).map_err(|_| not_an_issuer())?;
    let proper = url.scheme() == "https"
        && url.has_host()
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    if !proper {
        return Err(not_an_issuer());
    }
    if settings.audiences.is_empty() {
        return Err(InvalidIssuerSettings::Audiences(name.clone()));
    }
    for claim in ["iss", "sub"] {
        if settings
            .claims
            .get(claim)
            .is_some_and(|kind| *kind != AttributeType::String)
        {
            return Err(InvalidIssuerSettings::Claim {
                name: name.clone(),
                claim: claim.to_owned(),
            });
        }
    }
    Ok(url)
}

/// `aud` is a string or an array of strings (RFC 7519 section 4.1.3). A token that is also for
/// somebody else is refused: that other could present it here.
fn check_audience(claims: &Map<String, Value>, ours: &[String]) -> Result<(), InvalidToken> {
    let audiences = match claims.get("aud") {
        None => return Err(InvalidToken::NoAudience),
        Some(Value::String(audience)) => [audience.clone()].into(),
        Some(other) => string_set(other).ok_or_else(|| InvalidToken::ClaimType {
            claim: "aud".to_owned(),
            expected: "a string or an array of strings",
        })?,
    };
    if audiences.is_empty() {
        return Err(InvalidToken::NoAudience);
    }
    match audiences.iter().find(|audience| !ours.contains(audience)) {
        Some(foreign) => Err(InvalidToken::Audience(shortened(foreign))),
        None => Ok(()),
    }
}

/// A NumericDate (RFC 7519 section 2). Fractions are allowed there and refused here: no issuer needs
/// them, and readers differ in what they make of them.
fn numeric_date(
    claims: &Map<String, Value>,
    name: &'static str,
) -> Result<Option<SystemTime>, InvalidToken> {
    let Some(value) = claims.get(name) else {
        return Ok(None);
    };
    value
        .as_u64()
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .map(Some)
        .ok_or_else(|| InvalidToken::ClaimType {
            claim: name.to_owned(),
            expected: "a whole number of seconds since 1970",
        })
}

fn attribute(
    name: &str,
    value: &Value,
    attribute_type: AttributeType,
) -> Result<AttributeValue, InvalidToken> {
    let (converted, expected) = match attribute_type {
        AttributeType::String => {
            let text = value.as_str().map(str::to_owned);
            (text.map(AttributeValue::String), "a string")
        }
        AttributeType::Long => (value.as_i64().map(AttributeValue::Long), "a whole number"),
        AttributeType::Boolean => (
            value.as_bool().map(AttributeValue::Boolean),
            "true or false",
        ),
        AttributeType::StringSet => (
            string_set(value).map(AttributeValue::StringSet),
            "an array of strings",
        ),
    };
    converted.ok_or_else(|| InvalidToken::ClaimType {
        claim: shortened(name),
        expected,
    })
}
