//! Authorization servers, and the issuers whose tokens workloads present: reached as the agent reaches
//! them, and asked for nothing but their documents.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use countersign_attestors::{Clock, OidcAttestor, SystemClock};

use super::finding::{Finding, FindingCode};
use crate::config::{Bind, Config, OidcIssuer};
use crate::fetch::{FetchClient, FetchSettings};
use crate::providers::{Deadline, MintFailure, SharedParts, provider};
use crate::refusal::RefusalCode;

/// Asks every server that a configuration names.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    let servers = Servers {
        own_listeners: own_listeners(config),
        clock: Arc::new(SystemClock::new()),
    };
    let mut findings = Vec::new();
    let runtime = tokio::runtime::Handle::current();
    let mut shared = SharedParts::new(Arc::clone(&servers.own_listeners), runtime);
    for credential in &config.credentials {
        let provider = provider(credential, Arc::clone(&servers.clock), &mut shared);
        let failures = provider.probe(Deadline::after(provider.timeout())).await;
        findings.extend(
            failures
                .iter()
                .map(|failure| judge(&credential.name, failure)),
        );
    }
    // Credentials of one server have its troubles in common.
    let mut said = BTreeSet::new();
    findings
        .retain(|finding| said.insert((finding.code.properties().code, finding.detail.clone())));
    for issuer in &config.attestors.oidc_issuers {
        findings.extend(servers.token_issuer(issuer).await);
    }
    findings
}

struct Servers {
    own_listeners: Arc<[SocketAddr]>,
    clock: Arc<dyn Clock>,
}

impl Servers {
    async fn token_issuer(&self, issuer: &OidcIssuer) -> Option<Finding> {
        let fetch = Arc::new(FetchClient::new(
            FetchSettings::of_issuer(issuer),
            Arc::clone(&self.own_listeners),
            tokio::runtime::Handle::current(),
        ));
        let outcome = match OidcAttestor::new(issuer.settings(), fetch, Arc::clone(&self.clock)) {
            Ok(attestor) => attestor.fetch_keys().await,
            Err(error) => Err(error.to_string()),
        };
        outcome.err().map(|detail| {
            Finding::new(
                FindingCode::TokenIssuerUnusable,
                format!("issuer `{}`: {detail}", issuer.name),
            )
        })
    }
}

fn judge(credential: &str, failure: &MintFailure) -> Finding {
    let code = match failure.code {
        RefusalCode::ClientKeyUnavailable | RefusalCode::InvalidClient => {
            FindingCode::ClientKeyUnusable
        }
        RefusalCode::TokenServerTls => FindingCode::IssuerCertificateInvalid,
        RefusalCode::MetadataInvalid | RefusalCode::TokenServerRedirected => {
            FindingCode::IssuerMetadataInvalid
        }
        RefusalCode::ClockSkew => FindingCode::ClockSkew,
        _ => FindingCode::IssuerUnreachable,
    };
    let internal = match &failure.internal {
        Some(internal) => format!(" ({internal})"),
        None => String::new(),
    };
    Finding::new(
        code,
        format!("credential `{credential}`: {}{internal}", failure.detail),
    )
}

fn own_listeners(config: &Config) -> Arc<[SocketAddr]> {
    config
        .listeners
        .iter()
        .filter_map(|listener| match listener.bind {
            Bind::Tcp(address) => Some(address),
            Bind::Unix(_) => None,
        })
        .chain(config.admin.metrics_bind)
        .collect()
}
