//! A policy file: it loads or says why not; what loads permits only by its permits, and a `forbid` of
//! everything forbids everything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use countersign::config::{Config, CredentialConfig, Destination};
use countersign::policy::{
    Action, Decision, PolicyEngine, PolicyFile, Question, Resource, described,
};
use countersign::request::EgressRequest;
use countersign_attestors::{
    AttributeDeclaration, AttributeValue, FailedAttestor, FailureKind, WorkloadFacts,
};

use super::diagnostics;

/// Longer files are more of the same.
const LONGEST: usize = 16 * 1024;
const PATH: &str = "policies/fuzzed.cedar";
/// One that permits the service something, and nobody else anything.
const GOOD: &[u8] = include_bytes!("../seeds/policy_text/orders.cedar");
const FORBID_EVERYTHING: &str = "@id(\"forbids-everything\") forbid (principal, action, resource);";

const CONFIGURATION: &str = r#"
version: 1
listeners:
  - {name: workloads, type: forward_proxy, bind: "127.0.0.1:0"}
attestors:
  unix: {}
  systemd: {}
  oidc:
    issuers:
      - {name: ci, issuer: "https://ci.example.com", audiences: [countersign], claims: {repository_id: string, ref: string}}
environments:
  - {name: prod, when: {systemd.system_unit: orders.service}}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    groups: [orders]
    environment: prod
    issuer: https://auth.example.com
    client_id: node-agent
    client_authentication: {method: client_secret_basic, secret_file: secret}
    scopes: [orders.read, orders.write]
destinations:
  - {name: orders, hosts: [orders.example.com], paths: ["/v1/**"], environment: prod, credentials: [{name: orders-api}]}
  - {name: public, hosts: [public.example.com]}
unmatched: tunnel
interception: {ca: {source: memory}}
policies: {directory: policies}
audit: {sinks: [{type: stdout}]}
"#;

struct Fixture {
    config: Config,
    declarations: Vec<AttributeDeclaration>,
    credential: Arc<CredentialConfig>,
    destination: Arc<Destination>,
    requests: Vec<Arc<EgressRequest>>,
    workloads: Vec<WorkloadFacts>,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.yaml");
    std::fs::create_dir(directory.path().join("policies")).expect("a directory");
    std::fs::write(directory.path().join("secret"), "secret").expect("a secret");
    std::fs::write(&path, CONFIGURATION).expect("a configuration");
    let config = Config::load(&path).expect("a good configuration");
    Fixture {
        declarations: config.attestors.declarations(),
        credential: Arc::clone(&config.credentials[0]),
        destination: Arc::clone(&config.destinations[0]),
        requests: [
            "GET https://orders.example.com/v1/orders",
            "DELETE https://orders.example.com/v1/%2e%2e/admin",
        ]
        .map(|text| Arc::new(described::request(text).expect("a request")))
        .into(),
        workloads: workloads(),
        config,
    }
});

/// The service, a user, nobody, and the service while systemd could not be asked.
fn workloads() -> Vec<WorkloadFacts> {
    let long = |value| AttributeValue::Long(value);
    let text = |value: &str| AttributeValue::String(value.to_owned());
    let facts = |attributes: &[(&str, &str, AttributeValue)]| {
        let mut facts = WorkloadFacts::default();
        for (group, name, value) in attributes {
            let group: &mut BTreeMap<_, _> = facts.groups.entry((*group).to_owned()).or_default();
            group.insert((*name).to_owned(), value.clone());
        }
        facts
    };
    let orders = facts(&[
        ("unix", "uid", long(990)),
        ("unix", "gid", long(990)),
        ("unix", "pid", long(4242)),
        ("unix", "executable", text("/usr/bin/orders")),
        ("systemd", "system_unit", text("orders.service")),
    ]);
    let mut unasked = orders.clone();
    unasked.groups.remove("systemd");
    unasked.failed_attestors.push(FailedAttestor {
        name: "systemd".to_owned(),
        kind: FailureKind::CouldNotRun,
        detail: "it was away".to_owned(),
    });
    let user = facts(&[
        ("unix", "uid", long(1000)),
        ("unix", "gid", long(1000)),
        ("unix", "pid", long(17)),
    ]);
    vec![orders, user, WorkloadFacts::default(), unasked]
}

/// 2026-11-18, 12:00 UTC.
fn noon() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_003_200)
}

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if text.len() > LONGEST {
        return;
    }
    let (engine, warnings) = match load(&[text]) {
        Ok(loaded) => loaded,
        Err(problems) => {
            assert!(problems.has_errors());
            assert_ne!(input, GOOD, "{problems}");
            diagnostics::check(&problems, Path::new(PATH), text);
            return;
        }
    };
    assert!(!warnings.has_errors());
    diagnostics::check(&warnings, Path::new(PATH), text);
    let mut ids: Vec<&str> = engine.policies().map(|(id, _)| id).collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id stands twice");

    let decisions = decide(&engine);
    for decision in &decisions {
        if let Decision::Allow(permission) = decision {
            assert!(text.contains("permit"), "nothing permits");
            assert!(!permission.policies.is_empty());
            let are_known = permission.policies.iter().all(|id| ids.contains(&&**id));
            assert!(are_known, "{:?}", permission.policies);
        }
    }
    if input == GOOD {
        assert_eq!(outcomes(&decisions).filter(|allowed| *allowed).count(), 1);
    }
    let (again, _) = load(&[text]).expect("it loaded before");
    assert_eq!(again.version(), engine.version());
    assert!(outcomes(&decide(&again)).eq(outcomes(&decisions)));
    if let Ok((forbidding, _)) = load(&[text, FORBID_EVERYTHING]) {
        assert!(outcomes(&decide(&forbidding)).all(|allowed| !allowed));
    }
}

fn load(
    texts: &[&str],
) -> Result<
    (PolicyEngine, countersign::diagnostics::Diagnostics),
    countersign::diagnostics::Diagnostics,
> {
    let paths = [PATH, "policies/second.cedar"];
    let files: Vec<PolicyFile> = paths
        .iter()
        .zip(texts)
        .map(|(path, text)| PolicyFile {
            path: PathBuf::from(path),
            text: (*text).to_owned(),
        })
        .collect();
    PolicyEngine::from_files(&FIXTURE.config, &FIXTURE.declarations, &files)
}

/// Every workload's question about every resource and request.
fn decide(engine: &PolicyEngine) -> Vec<Decision> {
    let Fixture {
        credential,
        destination,
        ..
    } = &*FIXTURE;
    let injected = Resource::Credential {
        credential,
        scopes: asked_scopes(),
        audience: None,
    };
    let mut decisions = Vec::new();
    for workload in &FIXTURE.workloads {
        for request in &FIXTURE.requests {
            for (action, resource, to) in [
                (Action::Inject, injected, Some(destination)),
                (Action::Issue, injected, None),
                (Action::Connect, Resource::Unmatched, None),
            ] {
                let question = Question {
                    action,
                    resource,
                    destination: to,
                    request: (action != Action::Issue).then_some(request),
                    wall: noon(),
                };
                decisions.push(engine.evaluate(workload, &question));
            }
        }
    }
    decisions
}

fn asked_scopes() -> &'static Arc<[String]> {
    static SCOPES: LazyLock<Arc<[String]>> = LazyLock::new(|| ["orders.read".to_owned()].into());
    &SCOPES
}

fn outcomes(decisions: &[Decision]) -> impl Iterator<Item = bool> {
    decisions
        .iter()
        .map(|decision| matches!(decision, Decision::Allow(_)))
}
