//! The clients of the environment in which `doctor` runs: whether they reach the agent's proxy, go
//! through it, and trust what it serves under.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpStream;
use url::Url;

use super::super::ca::root_of;
use super::super::exec::{ADD, PROXY, REPLACE};
use super::agent::Running;
use super::finding::{Finding, FindingCode};
use crate::config::{Config, Scheme};
use crate::tls::trust::{roots_in, system_roots};

const NO_PROXY: [&str; 2] = ["no_proxy", "NO_PROXY"];

/// How long the proxy may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What clients read of their environment.
pub(super) struct Environment {
    /// Variables that name a proxy.
    proxies: Vec<(&'static str, String)>,
    /// Variables that name hosts that are reached without it.
    exceptions: Vec<(&'static str, String)>,
    /// Variables that name certificates.
    certificates: Vec<(&'static str, PathBuf)>,
}

impl Environment {
    /// This process's; `None` where no client is led to a proxy.
    pub(super) fn of_this_process() -> Option<Self> {
        let environment = Self::of(|name| std::env::var_os(name));
        (!environment.proxies.is_empty()).then_some(environment)
    }

    fn of(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let texts = |names: &[&'static str]| {
            names
                .iter()
                .filter_map(|name| {
                    let value = variable(name)?.to_string_lossy().into_owned();
                    (!value.is_empty()).then_some((*name, value))
                })
                .collect()
        };
        Self {
            proxies: texts(&PROXY),
            exceptions: texts(&NO_PROXY),
            certificates: ADD
                .iter()
                .chain(&REPLACE)
                .filter_map(|name| Some((*name, PathBuf::from(variable(name)?))))
                .filter(|(_, path)| !path.as_os_str().is_empty())
                .collect(),
        }
    }

    /// Looks at it against a configuration and the agent that runs.
    pub(super) async fn check(&self, config: Option<&Config>, running: &Running) -> Vec<Finding> {
        let mut findings = self.unreachable().await;
        let hosts = match config {
            Some(config) => hosts_of(config),
            None => running.hosts(),
        };
        for (name, exceptions) in &self.exceptions {
            findings.extend(excluded(name, exceptions, &hosts));
        }
        let root = match (running.root(), config) {
            (Some(root), _) => Some(root.to_owned()),
            // Without a file the root is yet to be made, or lives in an agent that did not say.
            (None, Some(config)) => root_of(config).ok(),
            (None, None) => None,
        };
        let root = root.and_then(|root| CertificateDer::from_pem_slice(root.as_bytes()).ok());
        if let Some(root) = root {
            findings.extend(self.untrusted(&root));
        }
        findings
    }

    /// A proxy that takes no connection. Variables of one value are one.
    async fn unreachable(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = Vec::new();
        let mut seen = BTreeSet::new();
        for (name, value) in &self.proxies {
            if !seen.insert(value) {
                continue;
            }
            if let Err(reason) = connect(value).await {
                findings.push(Finding::new(
                    FindingCode::ProxyUnreachable,
                    // Not the value: it may hold a token.
                    format!("the proxy that `{name}` names cannot be connected to: {reason}"),
                ));
            }
        }
        findings
    }

    /// A set variable must lead to a file with the root; without one, the system must have it.
    fn untrusted(&self, root: &CertificateDer<'_>) -> Vec<Finding> {
        let untrusted = |detail| Finding::new(FindingCode::RootNotTrusted, detail);
        if self.certificates.is_empty() {
            let is_trusted = system_roots().is_ok_and(|roots| roots.contains(root));
            return match is_trusted {
                true => Vec::new(),
                false => vec![untrusted(
                    "the agent's interception root is not among the system's certificates, and no variable names a file with it".to_owned(),
                )],
            };
        }
        self.certificates
            .iter()
            .filter_map(|(name, path)| Some(untrusted(format!("`{name}`: {}", lacks(path, root)?))))
            .collect()
    }
}

/// Why clients that read a file do not trust the root; `None` where they do.
fn lacks(path: &Path, root: &CertificateDer<'_>) -> Option<String> {
    match roots_in(path) {
        Ok(roots) if roots.contains(root) => None,
        Ok(_) => Some(format!(
            "`{}` does not hold the agent's interception root",
            path.display()
        )),
        Err(error) => Some(error.to_string()),
    }
}

async fn connect(proxy: &str) -> Result<(), String> {
    // curl takes a proxy without a scheme for one of HTTP.
    let url = match proxy.contains("://") {
        true => Url::parse(proxy),
        false => Url::parse(&format!("http://{proxy}")),
    };
    let url = url.map_err(|error| error.to_string())?;
    let host = url
        .host_str()
        .ok_or("it has no host")?
        .trim_matches(['[', ']']);
    let port = url.port_or_known_default().ok_or("it has no port")?;
    match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("not within {} s", CONNECT_TIMEOUT.as_secs())),
    }
}

/// Hosts that clients reach through the proxy only.
fn hosts_of(config: &Config) -> Vec<String> {
    config
        .destinations
        .iter()
        .filter(|destination| {
            destination.scheme == Scheme::Http || !destination.credentials.is_empty()
        })
        .flat_map(|destination| destination.hosts.iter().cloned())
        .collect()
}

fn excluded(name: &str, exceptions: &str, hosts: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for entry in exceptions
        .split([',', ' '])
        .filter(|entry| !entry.is_empty())
    {
        if let Some(host) = hosts.iter().find(|host| covers(entry, host)) {
            findings.push(Finding::new(
                FindingCode::NoProxyExcludesDestination,
                format!("`{entry}` in `{name}` covers `{host}`, the host of a destination"),
            ));
        }
    }
    findings
}

/// Whether an entry of `NO_PROXY` covers a host in the reading of some client: the host itself, its
/// domain with or without a dot before it, a range of addresses, or everything. There is no standard.
fn covers(entry: &str, host: &str) -> bool {
    if entry == "*" {
        return true;
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        let range = entry.parse::<ipnet::IpNet>();
        return entry.parse() == Ok(address) || range.is_ok_and(|range| range.contains(&address));
    }
    // A port makes an entry narrower in some clients, and is nothing in others.
    let entry = entry.split(':').next().unwrap_or(entry);
    let domain = entry
        .trim_start_matches('*')
        .trim_matches('.')
        .to_ascii_lowercase();
    !domain.is_empty()
        && host
            .strip_suffix(&domain)
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_cover_what_some_client_takes_them_to_cover() {
        for (entry, host, covered) in [
            ("*", "api.example.com", true),
            ("api.example.com", "api.example.com", true),
            ("API.example.com", "api.example.com", true),
            ("api.example.com:443", "api.example.com", true),
            ("example.com", "api.example.com", true),
            (".example.com", "api.example.com", true),
            ("*.example.com", "api.example.com", true),
            (".com.", "api.example.com", true),
            ("ample.com", "api.example.com", false),
            ("www.api.example.com", "api.example.com", false),
            ("example.org", "api.example.com", false),
            (".", "api.example.com", false),
            ("192.0.2.0/24", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.8", "192.0.2.7", false),
            ("192.0.2.0/24", "api.example.com", false),
            ("2001:db8::/32", "2001:db8::7", true),
        ] {
            assert_eq!(covers(entry, host), covered, "{entry} {host}");
        }
    }
}
