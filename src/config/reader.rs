//! Reads a [`Node`] into serde types and reports *every* problem, not the first alone.
//!
//! serde ends at the first error, so a part that does not fit is reported, hidden, and the whole is
//! read again without it, until what is left fits. A program of a thousand lines with ten slips is
//! read twelve times, which nobody notices.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::LazyLock;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess,
    IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
};

use super::tree::{Key, Node, Place, Value};
use crate::diagnostics::did_you_mean;

/// The most problems reported for one file: beyond it they have a common cause.
const MOST_PROBLEMS: usize = 100;

const LOCATED: &str = "countersign::Located";

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Located<T> {
    /// What.
    pub(super) value: T,
    /// Where.
    pub(super) place: Place,
}

/// A mapping whose keys the user chooses, in order.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entries<T>(pub(super) Vec<(Located<String>, T)>);

/// Text, a whole number, or true or false, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scalar(pub(super) String);

/// What does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    /// Stable code.
    pub(super) code: &'static str,
    /// Where.
    pub(super) place: Place,
    /// The cause.
    pub(super) message: String,
    /// The next step.
    pub(super) next: Option<String>,
    /// What must not be shown: the value of an unknown key may be a secret.
    pub(super) mask: Option<Range<usize>>,
}

/// The keys that each mapping must have, by the Rust name of its type.
pub(super) type RequiredKeys = HashMap<String, Vec<String>>;

/// Reads `node`. What does not fit is left out of the value; `None` when nothing sensible is left.
pub(super) fn read<T: DeserializeOwned>(
    node: &Node,
    required: &LazyLock<RequiredKeys>,
) -> (Option<T>, Vec<Problem>) {
    if let Some(value) = read_what_fits(node) {
        return (Some(value), Vec::new());
    }
    let report = Report::default();
    loop {
        let hidden_before = report.hidden.borrow().len();
        let reader = Reader {
            node,
            report: &report,
            required,
        };
        let value = T::deserialize(reader).ok();
        let hidden_more = report.hidden.borrow().len() > hidden_before;
        let too_many = report.problems.borrow().len() >= MOST_PROBLEMS;
        if value.is_some() || !hidden_more || too_many || report.is_hidden(node) {
            return (value, report.problems.into_inner());
        }
    }
}

/// Reads what has no problem: without the required keys, which take longer to tell than most files to read.
fn read_what_fits<T: DeserializeOwned>(node: &Node) -> Option<T> {
    let report = Report::default();
    let reader = Reader {
        node,
        report: &report,
        required: &RequiredKeys::new(),
    };
    let value = T::deserialize(reader).ok()?;
    report.problems.borrow().is_empty().then_some(value)
}

#[derive(Default)]
struct Report {
    problems: RefCell<Vec<Problem>>,
    hidden: RefCell<HashSet<*const Node>>,
    reported_keys: RefCell<HashSet<*const Key>>,
}

impl Report {
    fn is_hidden(&self, node: &Node) -> bool {
        self.hidden.borrow().contains(&std::ptr::from_ref(node))
    }

    fn hide(&self, node: &Node) {
        self.hidden.borrow_mut().insert(std::ptr::from_ref(node));
    }

    fn add(&self, code: &'static str, place: Place, message: String, next: Option<String>) {
        self.problems.borrow_mut().push(Problem {
            code,
            place,
            message,
            next,
            mask: None,
        });
    }

    fn key(&self, key: &Key, problem: Problem) {
        if self
            .reported_keys
            .borrow_mut()
            .insert(std::ptr::from_ref(key))
        {
            self.problems.borrow_mut().push(problem);
        }
    }
}

/// A part does not fit; the report says why.
#[derive(Debug)]
struct Unfit;

impl fmt::Display for Unfit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("does not fit")
    }
}

impl std::error::Error for Unfit {}

impl de::Error for Unfit {
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self
    }
}

#[derive(Clone, Copy)]
struct Reader<'a> {
    node: &'a Node,
    report: &'a Report,
    required: &'a RequiredKeys,
}

impl<'a> Reader<'a> {
    fn of(self, node: &'a Node) -> Self {
        Self { node, ..self }
    }

    fn unfit(self, code: &'static str, message: String, next: Option<String>) -> Unfit {
        self.report.add(code, self.node.place, message, next);
        self.report.hide(self.node);
        Unfit
    }

    fn expected(self, what: &str) -> Unfit {
        let (found, next) = match &self.node.value {
            Value::Null => ("nothing".to_owned(), None),
            Value::Boolean(value) => (format!("`{value}`"), None),
            Value::Integer(value) => (format!("the number `{value}`"), None),
            Value::Float(value) => (format!("the number `{value}`"), None),
            Value::Text(_) => ("text".to_owned(), None),
            Value::Sequence(_) => ("a list".to_owned(), None),
            Value::Mapping(_) => ("a mapping".to_owned(), None),
        };
        let next = next.or(match (&self.node.value, what) {
            (Value::Integer(_), "text") => {
                Some("write it in quotes; a duration or size needs its unit".to_owned())
            }
            (Value::Boolean(_) | Value::Float(_), "text") => Some("write it in quotes".to_owned()),
            (Value::Null, "a mapping") => {
                Some("write `{}` for one without keys, or remove the key".to_owned())
            }
            (_, "a list") => Some("write `[...]`, also for a single value".to_owned()),
            _ => None,
        });
        self.unfit(
            "wrong_type",
            format!("expected {what}, found {found}"),
            next,
        )
    }

    fn integer<T: TryFrom<i64>>(self, least: i64, most: i64) -> Result<T, Unfit> {
        let Value::Integer(value) = self.node.value else {
            return Err(self.expected("a whole number"));
        };
        T::try_from(value).map_err(|_| {
            self.unfit(
                "out_of_range",
                format!("`{value}` is out of range"),
                Some(format!("write a number from {least} to {most}")),
            )
        })
    }
}

macro_rules! integers {
    ($($method:ident $visit:ident $type:ty, $most:expr;)*) => {
        $(fn $method<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
            visitor.$visit(self.integer::<$type>(0, $most)?)
        })*
    };
}

impl<'a> Deserializer<'a> for Reader<'a> {
    type Error = Unfit;

    fn deserialize_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        match &self.node.value {
            Value::Boolean(value) => visitor.visit_bool(*value),
            Value::Integer(value) => visitor.visit_i64(*value),
            Value::Text(value) => visitor.visit_str(value),
            Value::Null | Value::Float(_) | Value::Sequence(_) | Value::Mapping(_) => {
                Err(self.expected("text, a whole number, `true` or `false`"))
            }
        }
    }

    fn deserialize_bool<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        match self.node.value {
            Value::Boolean(value) => visitor.visit_bool(value),
            _ => Err(self.expected("`true` or `false`")),
        }
    }

    integers! {
        deserialize_u8 visit_u8 u8, i64::from(u8::MAX);
        deserialize_u16 visit_u16 u16, i64::from(u16::MAX);
        deserialize_u32 visit_u32 u32, i64::from(u32::MAX);
        deserialize_u64 visit_u64 u64, i64::MAX;
    }

    fn deserialize_i64<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_i64(self.integer(i64::MIN, i64::MAX)?)
    }

    fn deserialize_f64<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        match self.node.value {
            Value::Float(value) => visitor.visit_f64(value),
            Value::Integer(value) => visitor.visit_i64(value),
            _ => Err(self.expected("a number")),
        }
    }

    fn deserialize_str<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        match &self.node.value {
            Value::Text(value) => visitor.visit_str(value),
            _ => Err(self.expected("text")),
        }
    }

    fn deserialize_string<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'a>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_tuple_struct<V: Visitor<'a>>(
        self,
        name: &'static str,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        if name == LOCATED {
            visitor.visit_seq(LocatedAccess {
                place: self.node.place,
                value: LocatedValue::Node(self),
                step: 0,
            })
        } else {
            Err(self.expected("a list"))
        }
    }

    fn deserialize_seq<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        match &self.node.value {
            Value::Sequence(items) => visitor.visit_seq(Items {
                reader: self,
                items: items.iter(),
            }),
            _ => Err(self.expected("a list")),
        }
    }

    fn deserialize_map<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        let Value::Mapping(entries) = &self.node.value else {
            return Err(self.expected("a mapping"));
        };
        let entries = self.once_each(entries);
        visitor.visit_map(Fields {
            reader: self,
            entries: entries.into_iter(),
            value: None,
        })
    }

    fn deserialize_struct<V: Visitor<'a>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        let Value::Mapping(entries) = &self.node.value else {
            return Err(self.expected("a mapping"));
        };
        let mut known = self.once_each(entries);
        known.retain(|(key, value)| {
            let is_known = fields.contains(&key.text.as_str());
            if !is_known {
                self.report.key(key, unknown_key(key, value, fields));
            }
            is_known
        });
        let missing: Vec<&str> = self
            .required
            .get(name)
            .into_iter()
            .flatten()
            .map(String::as_str)
            .filter(|field| !entries.iter().any(|(key, _)| key.text == *field))
            .collect();
        for field in &missing {
            // A slip of the same key is reported already.
            let is_slip = entries.iter().any(|(key, _)| {
                !fields.contains(&key.text.as_str()) && did_you_mean(&key.text, [*field]).is_some()
            });
            if !is_slip {
                let message = format!("missing key `{field}`");
                let next = Some(format!("add `{field}`"));
                self.report
                    .add("missing_key", heading(self.node), message, next);
            }
        }
        if !missing.is_empty() {
            self.report.hide(self.node);
            return Err(Unfit);
        }
        let hidden_before = self.report.hidden.borrow().len();
        let result = visitor.visit_map(Fields {
            reader: self,
            entries: known.into_iter(),
            value: None,
        });
        // Nothing new does not fit: a required part was hidden before, and so the whole is.
        if result.is_err() && self.report.hidden.borrow().len() == hidden_before {
            self.report.hide(self.node);
        }
        result
    }

    fn deserialize_enum<V: Visitor<'a>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        let Value::Text(text) = &self.node.value else {
            return Err(self.expected("text"));
        };
        if variants.contains(&text.as_str()) {
            visitor.visit_enum(Variant(text))
        } else {
            let next = did_you_mean(text, variants.iter().copied())
                .unwrap_or_else(|| format!("one of {}", list(variants)));
            Err(self.unfit(
                "unknown_value",
                format!("unknown value `{text}`"),
                Some(next),
            ))
        }
    }

    serde::forward_to_deserialize_any! { <V: Visitor<'a>>
        i8 i16 i32 i128 u128 f32 char bytes byte_buf unit unit_struct tuple identifier ignored_any
    }
}

impl<'a> Reader<'a> {
    /// The entries that are not hidden; a key that stands twice is reported.
    fn once_each(self, entries: &'a [(Key, Node)]) -> Vec<(&'a Key, &'a Node)> {
        let mut seen = HashSet::new();
        let mut once = Vec::new();
        for (key, value) in entries {
            if !seen.insert(key.text.as_str()) {
                self.report.key(
                    key,
                    Problem {
                        code: "duplicate_key",
                        place: key.place,
                        message: format!("key `{}` stands twice", key.text),
                        next: Some("keep one of the two".to_owned()),
                        mask: None,
                    },
                );
            } else if !self.report.is_hidden(value) {
                once.push((key, value));
            }
        }
        once
    }
}

/// The place that stands for a whole mapping: its first key, or its bracket.
pub(super) fn heading(node: &Node) -> Place {
    match &node.value {
        Value::Mapping(entries) => entries.first().map_or(node.place, |(key, _)| Place {
            start: node.place.start.min(key.place.start),
            ..key.place
        }),
        _ => node.place,
    }
}

fn unknown_key(key: &Key, value: &Node, fields: &[&str]) -> Problem {
    let lower = key.text.to_ascii_lowercase();
    let is_secret = ["secret", "password", "token", "private_key", "jwk"]
        .iter()
        .any(|word| lower.contains(word));
    let file_key = fields.iter().find(|field| {
        field.ends_with("_file") && (field.contains("secret") || field.contains("key"))
    });
    match (is_secret && !lower.ends_with("_file"), file_key) {
        (true, Some(_)) => Problem {
            code: "inline_secret",
            place: key.place,
            message: format!("`{}` is no key: a secret is never written inline", key.text),
            next: Some("name the file that holds it by `secret_file` or `key_file`".to_owned()),
            mask: Some(value.place.span()),
        },
        _ => Problem {
            code: "unknown_key",
            place: key.place,
            message: format!("unknown key `{}`", key.text),
            next: Some(
                did_you_mean(&key.text, fields.iter().copied())
                    .unwrap_or_else(|| format!("one of {}", list(fields))),
            ),
            mask: Some(value.place.span()),
        },
    }
}

fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

struct Items<'a> {
    reader: Reader<'a>,
    items: std::slice::Iter<'a, Node>,
}

impl<'a> SeqAccess<'a> for Items<'a> {
    type Error = Unfit;

    fn next_element_seed<T: DeserializeSeed<'a>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Unfit> {
        let report = self.reader.report;
        match self.items.by_ref().find(|item| !report.is_hidden(item)) {
            Some(item) => seed.deserialize(self.reader.of(item)).map(Some),
            None => Ok(None),
        }
    }
}

struct Fields<'a> {
    reader: Reader<'a>,
    entries: std::vec::IntoIter<(&'a Key, &'a Node)>,
    value: Option<&'a Node>,
}

impl<'a> MapAccess<'a> for Fields<'a> {
    type Error = Unfit;

    fn next_key_seed<K: DeserializeSeed<'a>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Unfit> {
        match self.entries.next() {
            Some((key, value)) => {
                self.value = Some(value);
                seed.deserialize(KeyReader(key)).map(Some)
            }
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, Unfit> {
        let value = self.value.take().ok_or(Unfit)?;
        seed.deserialize(self.reader.of(value))
    }
}

struct KeyReader<'a>(&'a Key);

impl<'a> Deserializer<'a> for KeyReader<'a> {
    type Error = Unfit;

    fn deserialize_any<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Unfit> {
        visitor.visit_str(&self.0.text)
    }

    fn deserialize_tuple_struct<V: Visitor<'a>>(
        self,
        _name: &'static str,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, Unfit> {
        visitor.visit_seq(LocatedAccess {
            place: self.0.place,
            value: LocatedValue::Key(&self.0.text),
            step: 0,
        })
    }

    serde::forward_to_deserialize_any! { <V: Visitor<'a>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple map struct enum identifier ignored_any
    }
}

struct Variant<'a>(&'a str);

impl<'a> EnumAccess<'a> for Variant<'a> {
    type Error = Unfit;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'a>>(self, seed: V) -> Result<(V::Value, Self), Unfit> {
        let name: StrDeserializer<'_, Unfit> = self.0.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'a> VariantAccess<'a> for Variant<'a> {
    type Error = Unfit;

    fn unit_variant(self) -> Result<(), Unfit> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'a>>(self, _seed: T) -> Result<T::Value, Unfit> {
        Err(Unfit)
    }

    fn tuple_variant<V: Visitor<'a>>(self, _length: usize, _visitor: V) -> Result<V::Value, Unfit> {
        Err(Unfit)
    }

    fn struct_variant<V: Visitor<'a>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Unfit> {
        Err(Unfit)
    }
}

enum LocatedValue<'a> {
    Node(Reader<'a>),
    Key(&'a str),
}

/// Gives a [`Located`] its parts: file, start, end, value.
struct LocatedAccess<'a> {
    place: Place,
    value: LocatedValue<'a>,
    step: usize,
}

impl<'a> SeqAccess<'a> for LocatedAccess<'a> {
    type Error = Unfit;

    fn next_element_seed<T: DeserializeSeed<'a>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Unfit> {
        self.step += 1;
        let number = |number: usize| de::value::U64Deserializer::<Unfit>::new(number as u64);
        match (self.step, &self.value) {
            (1, _) => seed.deserialize(number(self.place.file)).map(Some),
            (2, _) => seed.deserialize(number(self.place.start)).map(Some),
            (3, _) => seed.deserialize(number(self.place.end)).map(Some),
            (4, LocatedValue::Node(reader)) => seed.deserialize(*reader).map(Some),
            (4, LocatedValue::Key(text)) => {
                let text: StrDeserializer<'_, Unfit> = (*text).into_deserializer();
                seed.deserialize(text).map(Some)
            }
            _ => Ok(None),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Located<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LocatedVisitor<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for LocatedVisitor<T> {
            type Value = Located<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a value and its place")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Located<T>, A::Error> {
                let mut next = || -> Result<usize, A::Error> {
                    access
                        .next_element()?
                        .ok_or_else(|| de::Error::custom("a place has three numbers"))
                };
                let place = Place {
                    file: next()?,
                    start: next()?,
                    end: next()?,
                };
                let value = access
                    .next_element()?
                    .ok_or_else(|| de::Error::custom("a place has a value"))?;
                Ok(Located { value, place })
            }
        }

        deserializer.deserialize_tuple_struct(LOCATED, 4, LocatedVisitor(std::marker::PhantomData))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for EntriesVisitor<T> {
            type Value = Entries<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a mapping")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = access.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;

        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("text, a whole number, or true or false")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar(value.to_owned()))
            }
        }

        deserializer.deserialize_any(ScalarVisitor)
    }
}

impl<T: schemars::JsonSchema> schemars::JsonSchema for Located<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> std::borrow::Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        T::json_schema(generator)
    }
}

impl<T: schemars::JsonSchema> schemars::JsonSchema for Entries<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("Entries_of_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        std::collections::BTreeMap::<String, T>::json_schema(generator)
    }
}

impl schemars::JsonSchema for Scalar {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Scalar".into()
    }

    fn json_schema(_generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": ["string", "integer", "boolean"]})
    }
}
