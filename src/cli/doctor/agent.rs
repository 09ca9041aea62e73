//! The agent that runs, where there is one.

use std::path::PathBuf;

use http::{HeaderMap, Method};
use serde_json::Value;

use super::super::failure::Failure;
use super::super::workload::{Proxy, proxy_of};
use super::finding::{Finding, FindingCode};
use crate::client::{AgentAddress, Answer, ClientError, ask};
use crate::config::{Bind, Config, ListenerKind};

/// What an admin socket says of its agent; `None` where there is none that this user may ask.
pub(super) async fn status(admin: AgentAddress) -> Option<Value> {
    let answer = get(&admin, "/v1/status").await.ok()?;
    answer.status.is_success().then(|| answer.json())
}

/// The configuration that an agent runs under; `None` where its path begins at the agent's own
/// directory, which is not known here.
pub(super) fn configuration(status: &Value) -> Option<PathBuf> {
    let path = PathBuf::from(status.get("configuration")?.as_str()?);
    path.is_absolute().then_some(path)
}

/// What was asked of the agent's sockets, and what came of it.
pub(super) struct Running {
    /// Whether the configuration, the command line or a default names a socket to ask.
    would_answer: bool,
    /// The workload API's answer to `/readyz`, or why there is none.
    ready: Option<Result<Answer, Unreached>>,
    /// What a client needs to know.
    proxy: Option<Proxy>,
    /// What the admin socket says, where this user may ask.
    status: Option<Value>,
}

/// Why the workload API did not answer.
struct Unreached {
    error: ClientError,
    /// Whether there was nothing to be asked, and nobody said that there would be.
    is_absence: bool,
}

impl Running {
    /// Asks the agent at `named`, else the one of `config`, else the usual one. That it is not there is a
    /// fault where it is named, or `is_expected`.
    ///
    /// # Errors
    /// `$COUNTERSIGN_AGENT` is no address.
    pub(super) async fn find(
        named: Option<AgentAddress>,
        config: Option<&Config>,
        status: Option<Value>,
        is_expected: bool,
    ) -> Result<Self, Failure> {
        let is_expected = is_expected || named.is_some();
        let workload_api = match (named, config) {
            (Some(address), _) => Some(address),
            (None, Some(config)) => workload_api(config),
            (None, None) => Some(AgentAddress::workload_api(None).map_err(Failure::usage)?),
        };
        let admin = config.and_then(|config| config.admin.socket.clone());
        let would_answer = workload_api.is_some() || admin.is_some();
        let status = match (status, admin) {
            (Some(status), _) => Some(status),
            (None, Some(socket)) => self::status(AgentAddress::Unix(socket)).await,
            (None, None) => None,
        };
        let (mut ready, mut proxy) = (None, None);
        if let Some(address) = workload_api {
            let must_answer = is_expected || status.is_some();
            ready = Some(get(&address, "/readyz").await.map_err(|error| Unreached {
                is_absence: !must_answer && !exists(&address),
                error,
            }));
            proxy = proxy_of(&address).await.ok();
        }
        Ok(Self {
            would_answer,
            ready,
            proxy,
            status,
        })
    }

    /// Whether no agent runs, as far as it can be known.
    pub(super) fn is_absent(&self) -> bool {
        let is_unreached = match &self.ready {
            None => true,
            Some(Ok(_)) => false,
            Some(Err(unreached)) => unreached.is_absence,
        };
        is_unreached && self.status.is_none()
    }

    /// Whether an agent that runs would have been noticed.
    pub(super) fn would_answer(&self) -> bool {
        self.would_answer
    }

    /// The interception root that clients should trust.
    pub(super) fn root(&self) -> Option<&str> {
        self.proxy.as_ref()?.ca_certificate.as_deref()
    }

    /// Hosts that the agent intercepts.
    pub(super) fn hosts(&self) -> Vec<String> {
        self.status
            .as_ref()
            .and_then(|status| status.get("interception")?.get("hosts")?.as_array())
            .into_iter()
            .flatten()
            .filter_map(|host| host.as_str().map(str::to_owned))
            .collect()
    }

    /// The capabilities, by name, of the threads that look at callers, where the agent has said.
    pub(super) fn observer_capabilities(&self) -> Option<Vec<String>> {
        let parts = self.status.as_ref()?.get("hardening")?.as_array()?;
        let kept = parts.iter().find_map(|part| part.get("kept"))?;
        serde_json::from_value(kept.get("observers")?.clone()).ok()
    }

    /// What is wrong with it.
    pub(super) fn check(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        match &self.ready {
            None => {}
            Some(Err(Unreached { error, .. })) => findings.push(Finding::new(
                FindingCode::AgentUnreachable,
                error.to_string(),
            )),
            Some(Ok(answer)) => findings.extend(not_ready(answer)),
        }
        let last_reload = self
            .status
            .as_ref()
            .and_then(|status| status.get("last_reload"));
        if let Some(reload) = last_reload
            && reload.get("succeeded") == Some(&Value::Bool(false))
        {
            let text = |name: &str| {
                reload
                    .get(name)
                    .and_then(Value::as_str)
                    .unwrap_or("unknown")
            };
            findings.push(Finding::new(
                FindingCode::ReloadFailed,
                format!(
                    "the reload at {} failed: {}",
                    text("at"),
                    text("problem").trim_end()
                ),
            ));
        }
        findings
    }
}

fn not_ready(answer: &Answer) -> Option<Finding> {
    if answer.status.is_success() {
        return None;
    }
    Some(Finding::new(FindingCode::AgentNotReady, answer.not_ready()))
}

async fn get(address: &AgentAddress, path: &str) -> Result<Answer, ClientError> {
    ask(address, Method::GET, path, HeaderMap::new(), None).await
}

/// Where a configuration has its workload API; `None` where it has none, or at any free port.
fn workload_api(config: &Config) -> Option<AgentAddress> {
    config
        .listeners
        .iter()
        .find_map(|listener| match (&listener.kind, &listener.bind) {
            (ListenerKind::WorkloadApi, Bind::Unix(path)) => Some(AgentAddress::Unix(path.clone())),
            (ListenerKind::WorkloadApi, Bind::Tcp(address)) if address.port() != 0 => {
                Some(AgentAddress::Tcp(address.to_string()))
            }
            _ => None,
        })
}

/// Whether an agent has been there: a socket file goes with its agent, unless that was killed.
fn exists(address: &AgentAddress) -> bool {
    match address {
        AgentAddress::Unix(path) => path.exists(),
        AgentAddress::Tcp(_) => false,
    }
}
