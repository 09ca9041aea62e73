//! `countersign wait`: blocks until an agent is ready.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::{HeaderMap, Method};
use serde_json::json;

use super::failure::Failure;
use super::output::OutputFormat;
use super::run::on_control_runtime;
use crate::client::{AgentAddress, ask};

/// How often an agent that is not ready is asked again.
const PAUSE: Duration = Duration::from_millis(50);

/// Blocks until an agent is ready.
#[derive(Debug, Clone, clap::Args)]
pub struct WaitArguments {
    /// The agent's workload API [default: $COUNTERSIGN_AGENT, else /run/countersign/api.sock, else that of `dev`].
    #[arg(long, value_name = "ADDRESS")]
    agent: Option<AgentAddress>,
    /// How long at most: `30s`, `10m`, `1h`.
    #[arg(long, value_name = "DURATION", value_parser = super::revoke::seconds, default_value = "1m")]
    timeout: u64,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// Writes where the agent is to `out`. Exit code 0 once it is ready, 69 where it is not in time.
pub fn run(arguments: &WaitArguments, out: &mut dyn Write) -> ExitCode {
    let began = Instant::now();
    let waited = on_control_runtime(until_ready(arguments))
        .map_err(Failure::from)
        .flatten();
    let address = match waited {
        Ok(address) => address,
        Err(failure) => return failure.report(arguments.output, out),
    };
    let written = match arguments.output {
        OutputFormat::Text => writeln!(out, "ready: {address}"),
        OutputFormat::Json => writeln!(
            out,
            "{}",
            json!({
                "ready": true,
                "agent": address.to_string(),
                "waited_seconds": began.elapsed().as_secs_f64(),
            })
        ),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

async fn until_ready(arguments: &WaitArguments) -> Result<AgentAddress, Failure> {
    let mut last = String::from("it was not asked");
    let waiting = async {
        loop {
            // Looked for anew: the socket of an agent that starts appears meanwhile.
            let address =
                AgentAddress::workload_api(arguments.agent.clone()).map_err(Failure::usage)?;
            match why_not_ready(&address).await {
                None => return Ok(address),
                Some(reason) => last = reason,
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(arguments.timeout), waiting).await {
        Ok(waited) => waited,
        Err(_) => Err(Failure::unavailable(format!(
            "the agent is not ready within {} s: {last}\n  next: see the agent's log, or run `countersign doctor --config FILE`",
            arguments.timeout
        ))),
    }
}

async fn why_not_ready(address: &AgentAddress) -> Option<String> {
    match ask(address, Method::GET, "/readyz", HeaderMap::new(), None).await {
        Ok(answer) if answer.status.is_success() => None,
        Ok(answer) => Some(answer.not_ready()),
        Err(error) => Some(error.to_string()),
    }
}
