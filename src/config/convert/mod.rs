//! From what fits the format to what makes sense: one function for each section.
//!
//! A function reports what is wrong and gives what it can, so that one load finds everything.

mod attestors;
mod credentials;
mod destinations;
mod files;
mod interception;
mod listeners;
mod operation;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::config::load::SourceFile;
use crate::config::tree::Place;
use crate::config::watch::Marks;
use crate::config::{Config, Unmatched, raw};
use crate::diagnostics::Diagnostics;

const DEFAULT_STATE_DIRECTORY: &str = "/run/countersign/ca";

/// Makes the typed configuration. `misfits` are the places that did not fit the format.
pub(super) fn convert(
    files: &[SourceFile],
    document: Option<raw::Document>,
    misfits: Vec<Place>,
    watched: &mut Marks,
    diagnostics: &mut Diagnostics,
) -> Option<Config> {
    let names = |section: &str| -> Vec<String> {
        files.iter().flat_map(|file| file.names(section)).collect()
    };
    Converter {
        credential_names: names("credentials"),
        destination_names: names("destinations"),
        attributes: BTreeMap::new(),
        issuers_misfit: false,
        files,
        misfits,
        watched,
        diagnostics,
    }
    .document(document?)
}

struct Converter<'a> {
    files: &'a [SourceFile],
    misfits: Vec<Place>,
    watched: &'a mut Marks,
    diagnostics: &'a mut Diagnostics,
    /// Names written anywhere, in items that do not fit too: those are not reported as unknown.
    credential_names: Vec<String>,
    destination_names: Vec<String>,
    /// What a template or environment rule may name: attributes by group.
    attributes: BTreeMap<String, BTreeSet<String>>,
    issuers_misfit: bool,
}

impl Converter<'_> {
    fn document(mut self, document: raw::Document) -> Option<Config> {
        let main = self.files.first()?;
        let main_path = main.path.clone();
        let main_directory = main.directory.clone();
        let start = Place {
            file: 0,
            start: 0,
            end: 0,
        };
        match &document.version {
            Some(version) if version.value != 1 => self.error(
                "unknown_version",
                version.place,
                format!("`{}` is no version of this format", version.value),
                "write `version: 1`",
            ),
            Some(_) => {}
            None => self.missing_section("version", start),
        }
        for (section, is_missing) in [
            ("listeners", document.listeners.is_none()),
            ("credentials", document.credentials.is_none()),
            ("destinations", document.destinations.is_none()),
        ] {
            if is_missing {
                self.missing_section(section, start);
            }
        }
        let (workers, drain) = self.runtime(document.runtime);
        let attestors = self.attestors(document.attestors);
        let environments = self.environments(document.environments.unwrap_or_default());
        let credentials = self.credentials(document.credentials.unwrap_or_default(), &attestors);
        let destinations =
            self.destinations(document.destinations.unwrap_or_default(), &credentials);
        let mut binds = HashMap::new();
        let listeners = self.listeners(
            document.listeners.unwrap_or_default(),
            &destinations,
            &mut binds,
        );
        let interception = self.interception(document.interception, &listeners, &destinations);
        let policy_directory =
            self.policy_directory(document.policies, &main_directory, &main_path);
        let limits = self.limits(document.limits);
        let audit = self.audit(document.audit);
        let (log, traces) = self.telemetry(document.telemetry);
        let admin = self.admin(document.admin, &mut binds);
        Some(Config {
            path: main_path,
            workers,
            drain,
            listeners,
            attestors,
            environments,
            credentials,
            destinations,
            unmatched: document
                .unmatched
                .map_or(Unmatched::Refuse, |unmatched| unmatched.value),
            interception,
            policy_directory,
            limits,
            audit,
            log,
            traces,
            admin,
            watched_files: self.watched.paths().cloned().collect(),
        })
    }

    fn missing_section(&mut self, section: &str, start: Place) {
        if self.misfits.is_empty() {
            let next = if section == "version" {
                "write `version: 1`".to_owned()
            } else {
                format!("add `{section}`, `{section}: []` for none")
            };
            self.error(
                "missing_key",
                start,
                format!("missing key `{section}`"),
                next,
            );
        }
    }
}
