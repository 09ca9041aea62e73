//! The claims of well-known issuers, typed.

use std::collections::BTreeMap;

use crate::attribute::AttributeType;

/// The names that [`preset`] knows.
pub const PRESETS: [&str; 2] = ["github", "gitlab"];

/// The claims of a well-known kind of issuer, as `claims` would write them. Policies should read the
/// numeric ids: names of owners, repositories and projects can be given up and taken by others.
pub fn preset(name: &str) -> Option<BTreeMap<String, AttributeType>> {
    let claims: &[(&str, AttributeType)] = match name {
        "github" => &GITHUB,
        "gitlab" => &GITLAB,
        _ => return None,
    };
    Some(
        claims
            .iter()
            .map(|(name, kind)| ((*name).to_owned(), *kind))
            .collect(),
    )
}

/// GitHub Actions. GitHub writes every claim as a string, numbers and truth values too.
const GITHUB: [(&str, AttributeType); 26] = [
    ("actor", AttributeType::String),
    ("actor_id", AttributeType::String),
    ("base_ref", AttributeType::String),
    ("enterprise", AttributeType::String),
    ("enterprise_id", AttributeType::String),
    ("environment", AttributeType::String),
    ("event_name", AttributeType::String),
    ("head_ref", AttributeType::String),
    ("job_workflow_ref", AttributeType::String),
    ("job_workflow_sha", AttributeType::String),
    ("ref", AttributeType::String),
    ("ref_protected", AttributeType::String),
    ("ref_type", AttributeType::String),
    ("repository", AttributeType::String),
    ("repository_id", AttributeType::String),
    ("repository_owner", AttributeType::String),
    ("repository_owner_id", AttributeType::String),
    ("repository_visibility", AttributeType::String),
    ("run_attempt", AttributeType::String),
    ("run_id", AttributeType::String),
    ("run_number", AttributeType::String),
    ("runner_environment", AttributeType::String),
    ("sha", AttributeType::String),
    ("workflow", AttributeType::String),
    ("workflow_ref", AttributeType::String),
    ("workflow_sha", AttributeType::String),
];

/// GitLab CI/CD. All are strings but the runner's number.
const GITLAB: [(&str, AttributeType); 22] = [
    ("ci_config_ref_uri", AttributeType::String),
    ("ci_config_sha", AttributeType::String),
    ("deployment_tier", AttributeType::String),
    ("environment", AttributeType::String),
    ("environment_protected", AttributeType::String),
    ("job_id", AttributeType::String),
    ("namespace_id", AttributeType::String),
    ("namespace_path", AttributeType::String),
    ("pipeline_id", AttributeType::String),
    ("pipeline_source", AttributeType::String),
    ("project_id", AttributeType::String),
    ("project_path", AttributeType::String),
    ("project_visibility", AttributeType::String),
    ("ref", AttributeType::String),
    ("ref_path", AttributeType::String),
    ("ref_protected", AttributeType::String),
    ("ref_type", AttributeType::String),
    ("runner_environment", AttributeType::String),
    ("runner_id", AttributeType::Long),
    ("sha", AttributeType::String),
    ("user_id", AttributeType::String),
    ("user_login", AttributeType::String),
];
