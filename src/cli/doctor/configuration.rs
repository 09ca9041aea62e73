//! The configuration and its policies.

use std::path::Path;
use std::time::SystemTime;

use super::finding::{Finding, FindingCode};
use crate::config::{self, Config};
use crate::diagnostics::{Diagnostics, Severity};
use crate::policy::PolicyEngine;

/// Of the configuration's warnings: a finding of its own.
const OPEN_SECRET: &str = "secret_file_open_to_others";

/// Of the configuration's errors: those of a client's key or secret.
const UNUSABLE_KEY: [&str; 2] = ["invalid_key_file", "invalid_secret_file"];

/// Of the policies' warnings: what [`PolicyEngine::never_matching`] says better.
const SAID_ELSEWHERE: [&str; 2] = ["lint_expired", "lint_method_case"];

/// Reads a configuration and its policies; the configuration, if it loads.
pub(super) fn check(path: &Path) -> (Option<Config>, Vec<Finding>) {
    let checked = config::check(path);
    let mut findings = findings_of(
        &checked.diagnostics,
        FindingCode::ConfigurationInvalid,
        FindingCode::ConfigurationDoubtful,
    );
    if let Some(config) = &checked.config {
        findings.extend(policies(config));
    }
    (checked.config, findings)
}

fn policies(config: &Config) -> Vec<Finding> {
    let (invalid, doubtful) = (FindingCode::PolicyInvalid, FindingCode::PolicyDoubtful);
    let (engine, warnings) = match PolicyEngine::load(config, &config.attestors.declarations()) {
        Ok(loaded) => loaded,
        Err(errors) => return findings_of(&errors, invalid, doubtful),
    };
    let mut findings = findings_of(&warnings, invalid, doubtful);
    let now = SystemTime::now();
    findings.extend(engine.never_matching(config, now).into_iter().map(|never| {
        let code = match never.is_permit {
            true => FindingCode::PolicyNeverMatches,
            false => FindingCode::ForbidNeverMatches,
        };
        Finding::new(
            code,
            format!(
                "policy `{}` at `{}` never applies: {}",
                never.id, never.location, never.reason
            ),
        )
    }));
    findings.extend(
        engine
            .never_permitted(config, now)
            .into_iter()
            .map(|(destination, credential)| {
                Finding::new(
                    FindingCode::CredentialNeverPermitted,
                    format!(
                        "destination `{destination}` takes credential `{credential}`, and no policy permits anybody to use it"
                    ),
                )
            }),
    );
    findings
}

fn findings_of(
    diagnostics: &Diagnostics,
    error: FindingCode,
    warning: FindingCode,
) -> Vec<Finding> {
    diagnostics
        .iter()
        .filter(|diagnostic| !SAID_ELSEWHERE.contains(&diagnostic.code))
        .map(|diagnostic| {
            let code = match (diagnostic.code, diagnostic.severity) {
                (OPEN_SECRET, _) => FindingCode::SecretOpenToOthers,
                (code, _) if UNUSABLE_KEY.contains(&code) => FindingCode::ClientKeyUnusable,
                (_, Severity::Error) => error,
                (_, Severity::Warning) => warning,
            };
            Finding::new(code, diagnostics.line(diagnostic))
        })
        .collect()
}
