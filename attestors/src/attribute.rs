//! Typed attributes: what an attestor states about a workload.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// The type of an attribute, as the generated policy schema declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttributeType {
    /// UTF-8 text.
    String,
    /// A 64-bit signed integer.
    Long,
    /// True or false.
    Boolean,
    /// A set of strings.
    StringSet,
}

/// A value that an attestor established.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AttributeValue {
    /// True or false.
    Boolean(bool),
    /// A 64-bit signed integer.
    Long(i64),
    /// UTF-8 text.
    String(String),
    /// A set of strings.
    StringSet(BTreeSet<String>),
}

impl AttributeValue {
    /// The type of this value.
    pub fn attribute_type(&self) -> AttributeType {
        match self {
            Self::Boolean(_) => AttributeType::Boolean,
            Self::Long(_) => AttributeType::Long,
            Self::String(_) => AttributeType::String,
            Self::StringSet(_) => AttributeType::StringSet,
        }
    }
}

impl std::fmt::Display for AttributeValue {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Boolean(value) => value.fmt(formatter),
            Self::Long(value) => value.fmt(formatter),
            Self::String(value) => value.fmt(formatter),
            Self::StringSet(values) => {
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        formatter.write_str(",")?;
                    }
                    formatter.write_str(value)?;
                }
                Ok(())
            }
        }
    }
}

/// The attributes of one group (`principal.GROUP` in a policy), by name.
pub type Attributes = BTreeMap<String, AttributeValue>;

/// Which attributes are worth collecting: those that the loaded policies or the audit read. Only
/// what costs something to collect asks for it; the rest is always stated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributeSelection {
    /// `None`: all of them.
    names: Option<BTreeSet<(String, String)>>,
}

impl AttributeSelection {
    /// Every attribute.
    pub fn all() -> Self {
        Self { names: None }
    }

    /// The attributes with these groups and names.
    pub fn of(names: impl IntoIterator<Item = (String, String)>) -> Self {
        Self {
            names: Some(names.into_iter().collect()),
        }
    }

    /// True when `GROUP.NAME` is to be collected.
    pub fn contains(&self, group: &str, name: &str) -> bool {
        self.names.as_ref().is_none_or(|names| {
            names
                .iter()
                .any(|(wanted_group, wanted)| wanted_group == group && wanted == name)
        })
    }
}

/// Bytes as attributes and records show them: in lower-case hexadecimal, two digits each.
pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
