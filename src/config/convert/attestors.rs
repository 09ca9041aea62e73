//! `attestors`, `environments`, and the attributes that may be named elsewhere.

use std::collections::{BTreeMap, HashMap};

use countersign_attestors::AttributeType;

use super::Converter;
use crate::config::load::suggestion;
use crate::config::reader::{Located, Scalar};
use crate::config::tree::Place;
use crate::config::{Attestors, EnvironmentRule, OidcIssuer, Template, TemplatePart, raw, text};

impl Converter<'_> {
    pub(super) fn attestors(&mut self, written: Option<Located<raw::Attestors>>) -> Attestors {
        let Some(Located {
            value: written,
            place,
        }) = written
        else {
            return Attestors::default();
        };
        self.issuers_misfit = self.misfits.iter().any(|misfit| place.encloses(*misfit));
        let mut names = HashMap::new();
        let mut urls: HashMap<String, Place> = HashMap::new();
        let oidc_issuers = written
            .oidc
            .map(|oidc| oidc.value.issuers)
            .unwrap_or_default()
            .into_iter()
            .filter_map(|issuer| {
                let url = issuer.value.issuer.clone();
                let Some(issuer) = self.oidc_issuer(issuer.value, &mut names) else {
                    self.issuers_misfit = true;
                    return None;
                };
                if let Some(first) = urls.insert(url.value.clone(), url.place) {
                    let first = self.describe(first);
                    self.error(
                        "duplicate_issuer",
                        url.place,
                        format!("issuer `{}` stands twice", url.value),
                        format!("the first is at {first}: a token must belong to one name"),
                    );
                }
                Some(issuer)
            })
            .collect();
        let attestors = Attestors {
            unix: written.unix.is_some(),
            systemd: written.systemd.is_some(),
            oidc_issuers,
        };
        for declaration in attestors.declarations() {
            self.attributes
                .entry(declaration.group)
                .or_default()
                .insert(declaration.name);
        }
        attestors
    }

    pub(super) fn oidc_issuer(
        &mut self,
        written: raw::Issuer,
        names: &mut HashMap<String, Place>,
    ) -> Option<OidcIssuer> {
        let name = self.unique_name("issuer", &written.name, text::issuer_name, names);
        let issuer = self.parse(&written.issuer, text::https_url);
        if written.audiences.value.is_empty() {
            self.error(
                "empty_list",
                written.audiences.place,
                "`audiences` is empty: no token could be accepted",
                "write the audience that tokens are issued for",
            );
        }
        let audiences = self.parse_all(Some(&written.audiences.value), text::plain);
        let mut claims: BTreeMap<String, AttributeType> = BTreeMap::new();
        if let Some(preset) = written.preset {
            let name = match preset.value {
                raw::Preset::Github => "github",
                raw::Preset::Gitlab => "gitlab",
            };
            claims.extend(countersign_attestors::oidc::preset(name).unwrap_or_default());
        }
        for (claim, claim_type) in written
            .claims
            .map(|claims| claims.value.0)
            .unwrap_or_default()
        {
            if ["iss", "sub"].contains(&claim.value.as_str())
                && claim_type != raw::ClaimType::String
            {
                self.error(
                    "invalid_claim_type",
                    claim.place,
                    format!("the claim `{}` is a string", claim.value),
                    "remove it: it is always stated",
                );
            } else if text::is_identifier(&claim.value) {
                claims.insert(claim.value, attribute_type(claim_type));
            } else {
                self.error(
                    "invalid_name",
                    claim.place,
                    format!(
                        "the claim `{}` is no attribute name",
                        claim.value.escape_debug()
                    ),
                    "name claims of letters, digits and `_`",
                );
            }
        }
        let ca_file = self.ca_file(written.ca_file.as_ref());
        let connect_to = self.parse_option(written.connect_to.as_ref(), text::socket_address);
        let allow_addresses = self.parse_all(written.allow_addresses.as_ref(), text::network);
        Some(OidcIssuer {
            name: name?,
            issuer: issuer?,
            audiences,
            claims,
            ca_file,
            connect_to,
            allow_addresses,
        })
    }

    pub(super) fn environments(
        &mut self,
        written: Vec<Located<raw::Environment>>,
    ) -> Vec<EnvironmentRule> {
        let mut rules = Vec::new();
        for Located { value: rule, .. } in written {
            let name = self.parse(&rule.name, text::name);
            if rule.when.value.0.is_empty() {
                self.error(
                    "empty_mapping",
                    rule.when.place,
                    "`when` is empty: the rule would hold for everybody",
                    "name at least one attribute",
                );
            }
            let mut when = BTreeMap::new();
            for (attribute, Scalar(value)) in rule.when.value.0 {
                match attribute.value.split_once('.') {
                    Some((group, name)) if text::is_identifier(name) => {
                        self.known_attribute(group, name, attribute.place);
                    }
                    _ => self.error(
                        "invalid_attribute",
                        attribute.place,
                        format!("`{}` names no attribute", attribute.value.escape_debug()),
                        "write `GROUP.ATTRIBUTE`: `systemd.system_unit`",
                    ),
                }
                when.insert(attribute.value, value);
            }
            if let Some(name) = name {
                rules.push(EnvironmentRule { name, when });
            }
        }
        rules
    }

    /// An attribute must be stated by some attestor that runs.
    pub(super) fn known_attribute(&mut self, group: &str, name: &str, place: Place) {
        if self.issuers_misfit {
            return;
        }
        match self.attributes.get(group) {
            Some(names) if names.contains(name) => {}
            Some(names) => {
                let next = suggestion(name, names.iter().map(String::as_str));
                self.error(
                    "unknown_attribute",
                    place,
                    format!("`{group}` has no attribute `{name}`"),
                    next,
                );
            }
            None => {
                let next = match group {
                    "unix" | "systemd" => format!("add `{group}: {{}}` under `attestors`"),
                    "container" => "add `unix: {}` under `attestors`".to_owned(),
                    _ => suggestion(group, self.attributes.keys().map(String::as_str)),
                };
                self.error(
                    "unknown_attribute_group",
                    place,
                    format!("no configured attestor states attributes of `{group}`"),
                    next,
                );
            }
        }
    }

    pub(super) fn template_attributes(&mut self, template: &Template, place: Place) {
        for part in &template.parts {
            if let TemplatePart::Attribute { group, name } = part {
                self.known_attribute(group, name, place);
            }
        }
    }
}

fn attribute_type(claim_type: raw::ClaimType) -> AttributeType {
    match claim_type {
        raw::ClaimType::String => AttributeType::String,
        raw::ClaimType::Long => AttributeType::Long,
        raw::ClaimType::Boolean => AttributeType::Boolean,
        raw::ClaimType::StringSet => AttributeType::StringSet,
    }
}
