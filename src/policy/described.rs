//! Workloads and requests described by a person, for `policy test` and `policy explain`.

use std::collections::BTreeSet;

use countersign_attestors::{
    AttributeDeclaration, AttributeType, AttributeValue, FailedAttestor, FailureKind, WorkloadFacts,
};
use http::{Method, Uri};

use super::engine::groups_of_attestor;
use super::principal::LABELS;
use crate::config::Scheme;
use crate::diagnostics::did_you_mean;
use crate::request::{EgressRequest, RequestPath, Target};

/// `METHOD URL`, as in `GET https://orders.example.com/v1/orders`. The error says what is wrong.
pub fn request(text: &str) -> Result<EgressRequest, String> {
    let (method, url) = text.trim().split_once(' ').ok_or_else(|| {
        format!(
            "`{text}` is not a method and a URL, as in `GET https://orders.example.com/v1/orders`"
        )
    })?;
    let method: Method = method
        .parse()
        .map_err(|_| format!("`{method}` is not a method"))?;
    let uri: Uri = url
        .trim()
        .parse()
        .map_err(|_| format!("`{url}` is not a URL"))?;
    let scheme = match uri.scheme_str() {
        Some("https") => Scheme::Https,
        Some("http") => Scheme::Http,
        _ => return Err(format!("`{url}` is not an http or https URL")),
    };
    let authority = uri
        .authority()
        .ok_or_else(|| format!("`{url}` has no host"))?;
    let target = Target::parse(authority.as_str(), Some(scheme.default_port()))
        .map_err(|refusal| refusal.detail)?;
    Ok(EgressRequest {
        method,
        scheme,
        target,
        path: RequestPath::parse(uri.path()),
    })
}

/// The attributes that may be described, and their types.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vocabulary<'a>(pub(super) &'a [AttributeDeclaration]);

impl Vocabulary<'_> {
    /// The type of `GROUP.NAME`, or what is wrong with it.
    fn attribute_type(&self, group: &str, name: &str) -> Result<AttributeType, String> {
        if group == LABELS {
            return Ok(AttributeType::String);
        }
        self.0
            .iter()
            .find(|declared| declared.group == group && declared.name == name)
            .map(|declared| declared.attribute_type)
            .ok_or_else(|| {
                let known: BTreeSet<String> = self
                    .0
                    .iter()
                    .map(|declared| format!("{}.{}", declared.group, declared.name))
                    .collect();
                let written = format!("{group}.{name}");
                let mut message =
                    format!("`{written}` is an attribute that no configured attestor states");
                if let Some(suggestion) = did_you_mean(&written, known.iter().map(String::as_str)) {
                    message.push_str(&format!(" ({suggestion})"));
                }
                message
            })
    }

    /// Sets an attribute to a value of its type.
    pub(super) fn set(
        &self,
        facts: &mut WorkloadFacts,
        group: &str,
        name: &str,
        value: AttributeValue,
    ) -> Result<(), String> {
        let expected = self.attribute_type(group, name)?;
        if value.attribute_type() != expected {
            return Err(format!(
                "`{value}` is not {}, as `{group}.{name}` is",
                type_name(expected)
            ));
        }
        facts
            .groups
            .entry(group.to_owned())
            .or_default()
            .insert(name.to_owned(), value);
        Ok(())
    }

    /// Sets an attribute to a value written as text: a set's members are separated by commas.
    pub(super) fn set_text(
        &self,
        facts: &mut WorkloadFacts,
        group: &str,
        name: &str,
        text: &str,
    ) -> Result<(), String> {
        let expected = self.attribute_type(group, name)?;
        let wrong = || {
            format!(
                "`{text}` is not {}, as `{group}.{name}` is",
                type_name(expected)
            )
        };
        let value = match expected {
            AttributeType::String => AttributeValue::String(text.to_owned()),
            AttributeType::Long => AttributeValue::Long(text.parse().map_err(|_| wrong())?),
            AttributeType::Boolean => AttributeValue::Boolean(text.parse().map_err(|_| wrong())?),
            AttributeType::StringSet => {
                AttributeValue::StringSet(text.split(',').map(str::to_owned).collect())
            }
        };
        self.set(facts, group, name, value)
    }
}

fn type_name(attribute_type: AttributeType) -> &'static str {
    match attribute_type {
        AttributeType::String => "a string (quote it)",
        AttributeType::Long => "a whole number",
        AttributeType::Boolean => "true or false",
        AttributeType::StringSet => "a list of strings",
    }
}

/// A workload by `GROUP.NAME=VALUE`, each typed as `declarations` say; `environment=NAME` fixes the environment.
/// Returns the facts and the environment, if given; the error says what is wrong.
pub fn workload(
    pairs: &[String],
    declarations: &[AttributeDeclaration],
) -> Result<(WorkloadFacts, Option<String>), String> {
    let vocabulary = Vocabulary(declarations);
    let mut facts = WorkloadFacts::default();
    let mut environment = None;
    for pair in pairs {
        let (attribute, value) = pair
            .split_once('=')
            .ok_or_else(|| format!("`{pair}` is not `GROUP.NAME=VALUE`"))?;
        match attribute.split_once('.') {
            Some((group, name)) => vocabulary.set_text(&mut facts, group, name, value)?,
            None if attribute == "environment" => environment = Some(value.to_owned()),
            None => return Err(format!("`{attribute}` is not `GROUP.NAME`")),
        }
    }
    Ok((facts, environment))
}

/// Describes an attestor that could not run: what it states is gone.
pub(super) fn fail_attestor(facts: &mut WorkloadFacts, name: &str) {
    for group in groups_of_attestor(name) {
        facts.groups.remove(group);
    }
    facts.failed_attestors.push(FailedAttestor {
        name: name.to_owned(),
        kind: FailureKind::CouldNotRun,
        detail: "described as failed".to_owned(),
    });
}
