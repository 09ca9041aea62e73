//! What the verbs that a workload uses have in common: which agent they ask, and what they present.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Method};
use serde_json::Value;

use super::failure::Failure;
use super::own_agent::OwnAgent;
use super::presented::{Issuer, Presenter};
use super::run::on_control_runtime;
use crate::client::{AgentAddress, Answer, ask};

/// Which agent, and which token.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WorkloadArguments {
    /// The agent's workload API [default: $COUNTERSIGN_AGENT, else /run/countersign/api.sock, else that of `dev`].
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    pub agent: Option<AgentAddress>,
    /// An agent of its own, with this configuration, instead of one that runs.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A file with a token to present, read again when it changes. Without one, GitHub Actions'
    /// token service is asked where the environment names it.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// The agent that a verb asks.
pub enum Agent {
    /// One that runs.
    Running(AgentAddress),
    /// One's own.
    Own(Box<OwnAgent>),
}

impl Agent {
    /// Finds it, or starts it.
    pub async fn of(arguments: &WorkloadArguments) -> Result<Self, Failure> {
        Self::named(arguments.agent.clone(), arguments.config.as_deref()).await
    }

    /// Finds the one at an address, or starts one with a configuration.
    pub async fn named(
        address: Option<AgentAddress>,
        config: Option<&Path>,
    ) -> Result<Self, Failure> {
        match config {
            Some(path) => Ok(Self::Own(Box::new(OwnAgent::start(path).await?))),
            None => AgentAddress::workload_api(address)
                .map(Self::Running)
                .map_err(Failure::usage),
        }
    }

    /// Its workload API.
    pub fn address(&self) -> &AgentAddress {
        match self {
            Self::Running(address) => address,
            Self::Own(agent) => agent.address(),
        }
    }

    /// Asks it, presenting a token where there is one.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        presenter: &Arc<Presenter>,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(token) = presenter.header().await.map_err(Failure::unavailable)? {
            headers.insert(AUTHORIZATION, token);
        }
        self.ask_with(method, path, headers, body).await
    }

    async fn ask_with(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap<HeaderValue>,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let answer = ask(self.address(), method, path, headers, body).await?;
        accepted(answer)
    }

    /// What a client of its proxy needs to know.
    pub async fn proxy(&self) -> Result<Proxy, Failure> {
        proxy_of(self.address()).await
    }

    /// Ends one's own.
    pub async fn stop(self) {
        if let Self::Own(agent) = self {
            agent.stop().await;
        }
    }
}

fn accepted(answer: Answer) -> Result<Value, Failure> {
    match answer.status.is_success() {
        true => Ok(answer.json()),
        false => Err(Failure::refused(answer)),
    }
}

/// What a client of an agent's proxy needs to know.
pub async fn proxy_of(agent: &AgentAddress) -> Result<Proxy, Failure> {
    let answer = ask(agent, Method::GET, "/v1/proxy", HeaderMap::new(), None).await?;
    serde_json::from_value(accepted(answer)?)
        .map_err(|error| Failure::unavailable(format!("the agent's answer is odd: {error}")))
}

/// The answer of `/v1/proxy`.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Proxy {
    /// The forward proxy on TCP.
    pub proxy: Option<String>,
    /// The interception root, in PEM.
    pub ca_certificate: Option<String>,
    /// Hosts that are reached without it.
    pub no_proxy: String,
    /// The issuers whose tokens the agent takes.
    pub issuers: Vec<Issuer>,
}

/// Asks one question, and ends the agent where it is one's own.
pub fn ask_once(
    arguments: &WorkloadArguments,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, Failure> {
    on_control_runtime(async {
        let agent = Agent::of(arguments).await?;
        let answered = async {
            let issuers = match Presenter::asks_for_issuers(arguments.token_file.as_deref()) {
                true => agent.proxy().await?.issuers,
                false => Vec::new(),
            };
            let presenter = Presenter::new(arguments.token_file.as_deref(), &issuers)
                .map_err(Failure::unavailable)?;
            agent.ask(method, path, &presenter, body).await
        }
        .await;
        agent.stop().await;
        answered
    })?
}
