//! `countersign doctor`: looks for what commonly breaks, and says what to do about it.
//!
//! A group of checks is a file here; each takes what is known and answers with what it found.
//! Nothing is changed, and no token is asked for.

mod agent;
mod client;
mod configuration;
mod files;
mod finding;
mod kernel;
mod keys;
mod servers;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use self::agent::Running;
use self::finding::Finding;
use super::failure::Failure;
use super::output::OutputFormat;
use super::run::on_control_runtime;
use crate::client::AgentAddress;
use crate::diagnostics::Severity;

/// Looks for what commonly breaks, and says what to do about it.
///
/// Run it as the agent's user for the agent's files, and in a workload's environment for its
/// clients: `countersign exec -- countersign doctor`.
#[derive(Debug, Clone, clap::Args)]
pub struct DoctorArguments {
    /// The configuration to look at [default: that of the agent that runs].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The agent's workload API [default: what the configuration says; without one $COUNTERSIGN_AGENT, else /run/countersign/api.sock, else that of `dev`].
    #[arg(long, value_name = "ADDRESS")]
    agent: Option<AgentAddress>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// Writes what was found to `out`. Exit code 0 where nothing is wrong, 1 where something is; warnings
/// alone are 0.
pub fn run(arguments: &DoctorArguments, out: &mut dyn Write) -> ExitCode {
    let examined = on_control_runtime(examine(arguments))
        .map_err(Failure::from)
        .flatten();
    let report = match examined {
        Ok(report) => report,
        Err(failure) => return failure.report(arguments.output, out),
    };
    let written = match arguments.output {
        OutputFormat::Text => report.write(out),
        OutputFormat::Json => writeln!(out, "{:#}", report.to_json()),
    };
    match (written, report.is_healthy()) {
        (Ok(()), true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Looks at everything: what the agent that runs says, its files, and this environment.
async fn examine(arguments: &DoctorArguments) -> Result<Report, Failure> {
    let mut report = Report::default();
    let status = match &arguments.config {
        Some(_) => None,
        None => agent::status(AgentAddress::admin(None)).await,
    };
    let path = arguments
        .config
        .clone()
        .or_else(|| agent::configuration(status.as_ref()?));
    let config = match &path {
        Some(path) => {
            let (config, findings) = configuration::check(path);
            report.checked("configuration and policies", findings);
            config
        }
        None => {
            let reason = "no `--config`, and no admin socket that names the whole path of a file";
            report.left_out("configuration and policies", reason);
            None
        }
    };
    // Without a file there would be nothing else to look at.
    let is_expected = arguments.config.is_none();
    let running = Running::find(
        arguments.agent.clone(),
        config.as_ref(),
        status,
        is_expected,
    )
    .await?;
    match &config {
        Some(config) => {
            report.checked("keys and certificates", keys::check(config));
            report.checked("files and addresses", files::check(config, &running));
            report.checked("kernel", kernel::check(config, &running));
            report.checked("authorization servers", servers::check(config).await);
        }
        None => report.left_out("what the configuration names", "it is not known"),
    }
    match running.is_absent() {
        true => report.left_out("the running agent", "none runs at the configured sockets"),
        false => report.checked("the running agent", running.check()),
    }
    match client::Environment::of_this_process() {
        Some(environment) => {
            let findings = environment.check(config.as_ref(), &running).await;
            report.checked("this environment's clients", findings);
        }
        None => report.left_out(
            "this environment's clients",
            "no proxy variable is set; `countersign exec -- countersign doctor` looks at those under `exec`",
        ),
    }
    Ok(report)
}

/// What came of it.
#[derive(Default)]
struct Report {
    findings: Vec<Finding>,
    /// What was looked at.
    checked: Vec<&'static str>,
    /// What was not, and why.
    left_out: Vec<(&'static str, &'static str)>,
}

impl Report {
    fn checked(&mut self, what: &'static str, findings: Vec<Finding>) {
        self.checked.push(what);
        self.findings.extend(findings);
    }

    fn left_out(&mut self, what: &'static str, reason: &'static str) {
        self.left_out.push((what, reason));
    }

    fn is_healthy(&self) -> bool {
        self.count(Severity::Error) == 0
    }

    fn count(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.code.properties().severity == severity)
            .count()
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        for finding in &self.findings {
            let properties = finding.code.properties();
            let severity = match properties.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            writeln!(
                out,
                "{severity}: {}\n  {}\n  next: {}\n",
                properties.code, finding.detail, properties.next
            )?;
        }
        writeln!(out, "checked      {}", self.checked.join(", "))?;
        for (what, reason) in &self.left_out {
            writeln!(out, "not checked  {what}: {reason}")?;
        }
        match (self.count(Severity::Error), self.count(Severity::Warning)) {
            (0, 0) => writeln!(out, "nothing is wrong"),
            (errors, warnings) => writeln!(out, "errors: {errors}, warnings: {warnings}"),
        }
    }

    fn to_json(&self) -> Value {
        let left_out: Vec<Value> = self
            .left_out
            .iter()
            .map(|(what, reason)| json!({"what": what, "reason": reason}))
            .collect();
        json!({
            "healthy": self.is_healthy(),
            "findings": self.findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
            "checked": self.checked,
            "not_checked": left_out,
        })
    }
}
