//! YAML as a tree in which every key and value knows where it stands.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Location, Spanned};

/// Where something stands: the file's number in this load, and the byte range in its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// Index into the load's files.
    pub(super) file: usize,
    /// First byte.
    pub(super) start: usize,
    /// Past the last byte.
    pub(super) end: usize,
}

impl Place {
    /// The byte range.
    pub(super) fn span(self) -> Range<usize> {
        self.start..self.end
    }

    /// Whether the other place lies within this one.
    pub(super) fn encloses(self, other: Self) -> bool {
        self.file == other.file && self.start <= other.start && other.end <= self.end
    }
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    /// Where: for a mapping or sequence, from its first to its last part.
    pub(super) place: Place,
    /// What.
    pub(super) value: Value,
}

/// A YAML value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Nothing written.
    Null,
    /// `true` or `false`.
    Boolean(bool),
    /// A whole number.
    Integer(i64),
    /// Another number.
    Float(f64),
    /// Text.
    Text(String),
    /// A list.
    Sequence(Vec<Node>),
    /// Keys and values, in order, duplicates included.
    Mapping(Vec<(Key, Node)>),
}

/// A key of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Key {
    /// Where.
    pub(super) place: Place,
    /// What.
    pub(super) text: String,
}

/// Why a text is no YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SyntaxError {
    /// Where, if known.
    pub(super) place: Option<Place>,
    /// The cause.
    pub(super) message: String,
}

/// Parses one YAML document. `file` is the number given to every place.
pub(super) fn parse(text: &str, file: usize) -> Result<Node, SyntaxError> {
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        strict_booleans: true,
        with_snippet: false
    };
    match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options) {
        Ok(root) => Ok(node(root, text, file)),
        Err(error) => {
            let place = error.location().map(|location| place(location, text, file));
            let rendered = error.to_string();
            let message = if matches!(error, serde_saphyr::Error::MultipleDocuments { .. }) {
                "the file holds more than one YAML document".to_owned()
            } else {
                cause(&rendered)
            };
            Err(SyntaxError { place, message })
        }
    }
}

/// The cause alone: the place is shown beside it.
fn cause(rendered: &str) -> String {
    let end = rendered.rfind(" at line ").unwrap_or(rendered.len());
    rendered.get(..end).unwrap_or(rendered).to_owned()
}

enum Raw {
    Null,
    Boolean(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    Sequence(Vec<Spanned<Raw>>),
    Mapping(Vec<(Spanned<String>, Spanned<Raw>)>),
}

fn place(location: Location, text: &str, file: usize) -> Place {
    let span = location.span();
    let start = span.byte_offset().map_or_else(
        || {
            let characters = usize::try_from(span.offset()).unwrap_or(usize::MAX);
            text.char_indices()
                .nth(characters)
                .map_or(text.len(), |(index, _)| index)
        },
        |offset| usize::try_from(offset).unwrap_or(usize::MAX),
    );
    let length = usize::try_from(span.byte_len().unwrap_or(0)).unwrap_or(0);
    Place {
        file,
        start,
        end: start.saturating_add(length),
    }
}

fn node(raw: Spanned<Raw>, text: &str, file: usize) -> Node {
    let mut here = place(raw.referenced, text, file);
    let value = match raw.value {
        Raw::Null => Value::Null,
        Raw::Boolean(value) => Value::Boolean(value),
        Raw::Integer(value) => Value::Integer(value),
        Raw::Float(value) => Value::Float(value),
        Raw::Text(value) => Value::Text(value),
        Raw::Sequence(items) => {
            let items: Vec<Node> = items
                .into_iter()
                .map(|item| node(item, text, file))
                .collect();
            if let Some(last) = items.last() {
                here.end = here.end.max(last.place.end);
            }
            Value::Sequence(items)
        }
        Raw::Mapping(entries) => {
            let entries: Vec<(Key, Node)> = entries
                .into_iter()
                .map(|(key, value)| {
                    let key = Key {
                        place: place(key.referenced, text, file),
                        text: key.value,
                    };
                    (key, node(value, text, file))
                })
                .collect();
            for (key, value) in &entries {
                here.end = here.end.max(key.place.end).max(value.place.end);
            }
            Value::Mapping(entries)
        }
    };
    Node { place: here, value }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawVisitor;

        impl<'de> Visitor<'de> for RawVisitor {
            type Value = Raw;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a YAML value")
            }

            fn visit_unit<E>(self) -> Result<Raw, E> {
                Ok(Raw::Null)
            }

            fn visit_none<E>(self) -> Result<Raw, E> {
                Ok(Raw::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
                Ok(Raw::Boolean(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
                Ok(Raw::Integer(value))
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Raw, E> {
                i64::try_from(value)
                    .map(Raw::Integer)
                    .map_err(|_| E::custom("the number is too large"))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
                Ok(Raw::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
                Ok(Raw::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = access.next_element()? {
                    items.push(item);
                }
                Ok(Raw::Sequence(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = access.next_entry()? {
                    entries.push(entry);
                }
                Ok(Raw::Mapping(entries))
            }
        }

        deserializer.deserialize_any(RawVisitor)
    }
}
