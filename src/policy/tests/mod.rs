//! Tests of the policy engine, and what they share.

mod cache;
mod compiled;
mod decisions;
mod malformed;
mod properties;
mod tools;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::{
    AttestedWorkload, AttributeDeclaration, AttributeValue, FailedAttestor, FailureKind,
    WorkloadFacts,
};

use super::{
    Action, Decision, Denial, Grant, PolicyEngine, PolicyFile, PolicySnapshot, Question, Resource,
    Revocations, described,
};
use crate::config::{Config, CredentialConfig, Destination};
use crate::diagnostics::Diagnostics;
use crate::request::EgressRequest;

/// The configuration that the tests of this module share.
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
  - {name: build, when: {ci.ref: refs/heads/main}}
credentials:
  - name: orders-api
    type: oauth_client_credentials
    groups: [orders]
    environment: prod
    issuer: https://auth.example.com
    client_id: node-agent
    client_authentication: {method: client_secret_basic, secret_file: secret}
    scopes: [orders.read, orders.write]
  - name: orders-admin
    type: oauth_client_credentials
    groups: [orders, admin]
    issuer: https://auth.example.com
    client_id: node-agent
    client_authentication: {method: client_secret_basic, secret_file: secret}
destinations:
  - name: orders
    hosts: [orders.example.com]
    paths: ["/v1/**"]
    environment: prod
    credentials:
      - {name: orders-api, scopes: [orders.read]}
      - {name: orders-admin}
  - name: public
    hosts: [public.example.com]
unmatched: tunnel
interception:
  ca: {source: memory}
policies: {directory: policies}
audit: {sinks: [{type: stdout}]}
"#;

/// A loaded configuration; its files lie in a directory that lives as long.
pub(super) struct Fixture {
    pub(super) config: Config,
    pub(super) declarations: Vec<AttributeDeclaration>,
    pub(super) directory: tempfile::TempDir,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("policies")).unwrap();
        std::fs::write(directory.path().join("secret"), "secret").unwrap();
        let path = directory.path().join("agent.yaml");
        std::fs::write(&path, CONFIGURATION).unwrap();
        let config = match Config::load(&path) {
            Ok(config) => config,
            Err(diagnostics) => panic!("{}", diagnostics.render(false)),
        };
        Self {
            declarations: config.attestors.declarations(),
            config,
            directory,
        }
    }

    pub(super) fn load(&self, policies: &str) -> Result<(PolicyEngine, Diagnostics), Diagnostics> {
        let files = [PolicyFile {
            path: PathBuf::from("policies/test.cedar"),
            text: policies.to_owned(),
        }];
        PolicyEngine::from_files(&self.config, &self.declarations, &files)
    }

    pub(super) fn engine(&self, policies: &str) -> PolicyEngine {
        match self.load(policies) {
            Ok((engine, _)) => engine,
            Err(diagnostics) => panic!("{}", diagnostics.render(false)),
        }
    }

    pub(super) fn snapshot(&self, policies: &str) -> Arc<PolicySnapshot> {
        PolicySnapshot::new(Arc::new(self.engine(policies)), Revocations::none())
    }

    pub(super) fn credential(&self, name: &str) -> &Arc<CredentialConfig> {
        self.config
            .credentials
            .iter()
            .find(|credential| &*credential.name == name)
            .unwrap()
    }

    pub(super) fn destination(&self, name: &str) -> &Arc<Destination> {
        self.config
            .destinations
            .iter()
            .find(|destination| &*destination.name == name)
            .unwrap()
    }

    /// `inject` of a credential into a request to `orders`.
    pub(super) fn inject<'a>(
        &'a self,
        credential: &str,
        scopes: &[String],
        request: &'a Arc<EgressRequest>,
    ) -> Question<'a> {
        Question {
            action: Action::Inject,
            resource: Resource::Credential {
                credential: self.credential(credential),
                // A question borrows; what a test asks for may stay for ever.
                scopes: Box::leak(Box::new(Arc::from(scopes))),
                audience: None,
            },
            destination: Some(self.destination("orders")),
            request: Some(request),
            wall: noon(),
        }
    }
}

/// 2026-11-18, a Wednesday, 12:00 UTC.
pub(super) fn noon() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_003_200)
}

pub(super) fn request(text: &str) -> Arc<EgressRequest> {
    Arc::new(described::request(text).unwrap())
}

/// Facts by `GROUP.NAME` and value.
pub(super) fn facts(attributes: &[(&str, AttributeValue)]) -> WorkloadFacts {
    let mut groups: BTreeMap<String, BTreeMap<String, AttributeValue>> = BTreeMap::new();
    for (attribute, value) in attributes {
        let (group, name) = attribute.split_once('.').unwrap();
        groups
            .entry(group.to_owned())
            .or_default()
            .insert(name.to_owned(), value.clone());
    }
    WorkloadFacts {
        groups,
        ..WorkloadFacts::default()
    }
}

pub(super) fn text(value: &str) -> AttributeValue {
    AttributeValue::String(value.to_owned())
}

/// A process of the orders service.
pub(super) fn orders() -> WorkloadFacts {
    let mut facts = facts(&[
        ("unix.uid", AttributeValue::Long(990)),
        ("unix.gid", AttributeValue::Long(990)),
        ("unix.pid", AttributeValue::Long(4242)),
        ("unix.executable", text("/usr/bin/orders")),
        ("systemd.system_unit", text("orders.service")),
    ]);
    facts.evidence = vec!["pidfd".to_owned()];
    facts
}

/// A process of somebody's.
pub(super) fn stranger() -> WorkloadFacts {
    facts(&[
        ("unix.uid", AttributeValue::Long(1000)),
        ("unix.gid", AttributeValue::Long(1000)),
        ("unix.pid", AttributeValue::Long(17)),
        ("unix.executable", text("/usr/bin/curl")),
    ])
}

pub(super) fn with_failure(
    mut facts: WorkloadFacts,
    name: &str,
    kind: FailureKind,
) -> WorkloadFacts {
    facts.failed_attestors.push(FailedAttestor {
        name: name.to_owned(),
        kind,
        detail: "as described".to_owned(),
    });
    facts
}

pub(super) fn attested(facts: WorkloadFacts) -> Arc<AttestedWorkload> {
    Arc::new(AttestedWorkload::described(facts))
}

pub(super) const READS_ORDERS: &str = r#"
@id("orders-service-reads-orders") @max_lifetime("10m")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has systemd && principal.systemd.system_unit == "orders.service" && context has request && context.request.safe };
"#;

pub(super) const NONPROD_NEVER_PROD: &str = r#"
@id("nonprod-never-prod")
forbid (principal, action, resource)
when { resource.environment == "prod" } unless { principal.environment == "prod" || context has break_glass };
"#;

/// `allow`, or the kind of no.
pub(super) fn outcome(decision: &Decision) -> &'static str {
    match decision {
        Decision::Allow(_) => "allow",
        Decision::Deny(denial) => denial.kind.as_str(),
    }
}

/// A decision from memory is the one that is made: also the credential and the destination are those asked for.
pub(super) fn assert_same(
    made: &Result<Grant, Arc<Denial>>,
    remembered: &Result<Grant, Arc<Denial>>,
) {
    let (made, remembered) = match (made, remembered) {
        (Ok(made), Ok(remembered)) => (made, remembered),
        (Err(made), Err(remembered)) => return assert_eq!(made, remembered),
        _ => panic!("{made:?} is not {remembered:?}"),
    };
    let address = |grant: &Grant| {
        (
            grant.credential().map(Arc::as_ptr),
            grant.destination().map(Arc::as_ptr),
            Arc::as_ptr(grant.workload()),
        )
    };
    assert_eq!(address(made), address(remembered));
    assert_eq!(made.action(), remembered.action());
    assert_eq!(made.permission(), remembered.permission());
}

/// The satisfied permits, or the policies that denied.
pub(super) fn deciding(decision: &Decision) -> Vec<String> {
    let policies = match decision {
        Decision::Allow(permission) => &permission.policies,
        Decision::Deny(denial) => &denial.policies,
    };
    policies.iter().map(ToString::to_string).collect()
}
