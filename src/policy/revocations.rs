//! What an operator revoked: held in memory, survives a reload, not a restart.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use countersign_attestors::{AttributeDeclaration, AttributeType, AttributeValue, WorkloadFacts};
use serde::{Deserialize, Serialize};

use super::question::{Question, Resource};

/// An immutable set of revocations; a change makes another set, and with it another
/// [`PolicySnapshot`](super::PolicySnapshot).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revocations {
    entries: Vec<Arc<Entry>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    revocation: Revocation,
    holder: Option<TokenHolder>,
}

/// Whom a revoked token was for: while the revocation is in force they get no other of its credential,
/// for one that was stolen says nothing good of where its successors go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenHolder {
    /// The credential.
    pub credential: String,
    /// What a workload must have to be meant, all of it; every workload where tokens are shared.
    pub workload: Vec<Selector>,
}

/// One revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Its id, by which it is lifted.
    pub id: String,
    /// What is revoked.
    pub what: Revoked,
    /// When it ends, by [`Clock::monotonic`](crate::clock::Clock::monotonic); `None` until lifted.
    pub until: Option<Duration>,
}

/// What a revocation covers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Revoked {
    /// Every workload with this attribute.
    Workload(Selector),
    /// Every use of a credential, by name.
    Credential(String),
    /// One token, by the SHA-256 of its bytes in lower-case hexadecimal; see [`TokenHolder`].
    TokenSha256(String),
}

/// `GROUP.NAME=VALUE`: an attribute that a workload must have. A set matches if it contains the value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector {
    /// The group.
    pub group: String,
    /// The attribute.
    pub name: String,
    /// Its value, as text.
    pub value: String,
}

impl Selector {
    /// Whether a workload can have it, where no other attributes are stated than those declared.
    pub fn can_match(&self, declarations: &[AttributeDeclaration]) -> bool {
        declarations.iter().any(|declared| {
            declared.group == self.group
                && declared.name == self.name
                && match declared.attribute_type {
                    AttributeType::Long => self.value.parse::<i64>().is_ok(),
                    AttributeType::Boolean => self.value.parse::<bool>().is_ok(),
                    AttributeType::String | AttributeType::StringSet => true,
                }
        })
    }

    /// Whether a workload with these facts is meant.
    pub fn matches(&self, facts: &WorkloadFacts) -> bool {
        facts
            .attribute(&self.group, &self.name)
            .is_some_and(|actual| value_is(actual, &self.value))
    }
}

/// Whether an attribute's value is `text`, or a set that contains it.
pub(crate) fn value_is(actual: &AttributeValue, text: &str) -> bool {
    match actual {
        AttributeValue::String(actual) => actual == text,
        AttributeValue::StringSet(actual) => actual.contains(text),
        AttributeValue::Long(actual) => text.parse() == Ok(*actual),
        AttributeValue::Boolean(actual) => text.parse() == Ok(*actual),
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || SelectorError(crate::request::printable(text));
        let (attribute, value) = text.split_once('=').ok_or_else(malformed)?;
        let (group, name) = attribute.split_once('.').ok_or_else(malformed)?;
        if group.is_empty() || name.is_empty() || value.is_empty() {
            return Err(malformed());
        }
        Ok(Self {
            group: group.to_owned(),
            name: name.to_owned(),
            value: value.to_owned(),
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}={}", self.group, self.name, self.value)
    }
}

impl TryFrom<String> for Selector {
    type Error = SelectorError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.to_string()
    }
}

/// A selector that is not `GROUP.NAME=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not `GROUP.NAME=VALUE`, as in `unix.uid=1000`")]
pub struct SelectorError(String);

impl Revocations {
    /// None.
    pub fn none() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// All of them, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Revocation> {
        self.entries.iter().map(|entry| &entry.revocation)
    }

    /// What the workloads that they mean are told by.
    pub fn selectors(&self) -> impl Iterator<Item = &Selector> {
        self.entries.iter().flat_map(|entry| {
            let named = match &entry.revocation.what {
                Revoked::Workload(selector) => Some(selector),
                Revoked::Credential(_) | Revoked::TokenSha256(_) => None,
            };
            let holder = entry.holder.iter();
            named
                .into_iter()
                .chain(holder.flat_map(|holder| &holder.workload))
        })
    }

    /// The set with one more.
    #[must_use]
    pub fn with(&self, revocation: Revocation) -> Self {
        self.with_holder(revocation, None)
    }

    /// The set with one more, of a token that was for `holder`.
    #[must_use]
    pub fn with_holder(&self, revocation: Revocation, holder: Option<TokenHolder>) -> Self {
        let mut entries = self.entries.clone();
        entries.push(Arc::new(Entry { revocation, holder }));
        Self { entries }
    }

    /// Whom the token was for that the revocation with this id is about, where that is known.
    pub fn holder(&self, id: &str) -> Option<&TokenHolder> {
        let entry = self
            .entries
            .iter()
            .find(|entry| entry.revocation.id == id)?;
        entry.holder.as_ref()
    }

    /// The set without the one of this id; `None` if there is none.
    pub fn without(&self, id: &str) -> Option<Self> {
        let entries: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| entry.revocation.id != id)
            .cloned()
            .collect();
        (entries.len() < self.entries.len()).then_some(Self { entries })
    }

    /// The set without those that ended before the monotonic time `now`; `None` if nothing ended.
    pub fn prune(&self, now: Duration) -> Option<Self> {
        let entries: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| entry.revocation.until.is_none_or(|until| now < until))
            .cloned()
            .collect();
        (entries.len() < self.entries.len()).then_some(Self { entries })
    }

    /// The revocation that covers this token; asked by whoever is about to use one.
    pub fn token_is_revoked(&self, sha256: &str) -> Option<&Revocation> {
        self.iter().find(
            |entry| matches!(&entry.what, Revoked::TokenSha256(revoked) if revoked.eq_ignore_ascii_case(sha256)),
        )
    }

    /// The revocation that covers this workload or the credential that it asks for.
    pub(super) fn covering(
        &self,
        facts: &WorkloadFacts,
        question: &Question<'_>,
    ) -> Option<&Revocation> {
        let asks_for = |name: &str| {
            matches!(
                question.resource,
                Resource::Credential { credential, .. } if *credential.name == *name
            )
        };
        let covering = self
            .entries
            .iter()
            .find(|entry| match &entry.revocation.what {
                Revoked::Workload(selector) => selector.matches(facts),
                Revoked::Credential(name) => asks_for(name),
                Revoked::TokenSha256(_) => entry.holder.as_ref().is_some_and(|holder| {
                    asks_for(&holder.credential)
                        && holder
                            .workload
                            .iter()
                            .all(|selector| selector.matches(facts))
                }),
            });
        covering.map(|entry| &entry.revocation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_of_workloads_and_of_the_holders_of_tokens() {
        let revoked = |id: &str, what| Revocation {
            id: id.to_owned(),
            what,
            until: None,
        };
        let selector = |text: &str| text.parse::<Selector>().unwrap();
        let holder = TokenHolder {
            credential: "orders-api".to_owned(),
            workload: vec![
                selector("unix.network_namespace=7"),
                selector("unix.uid=1000"),
            ],
        };
        let revocations = Revocations::none()
            .with(revoked("1", Revoked::Workload(selector("unix.groups=4"))))
            .with(revoked("2", Revoked::Credential("orders-api".to_owned())))
            .with_holder(
                revoked("3", Revoked::TokenSha256("ab".to_owned())),
                Some(holder),
            );
        let selectors: Vec<_> = revocations.selectors().map(Selector::to_string).collect();
        assert_eq!(
            selectors,
            ["unix.groups=4", "unix.network_namespace=7", "unix.uid=1000"]
        );
    }
}
