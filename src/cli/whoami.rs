//! `countersign whoami`: how the agent sees the caller, and by which evidence.

use std::io::Write;
use std::process::ExitCode;

use http::Method;
use serde_json::Value;

use super::admin::on_one_line;
use super::output::OutputFormat;
use super::workload::{WorkloadArguments, ask_once};

/// Shows how the agent sees the caller, and by which evidence.
#[derive(Debug, Clone, clap::Args)]
pub struct WhoamiArguments {
    #[command(flatten)]
    workload: WorkloadArguments,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Writes the answer to `out`. Exit code 69 where no agent answers, 77 where it refuses.
pub fn run(arguments: &WhoamiArguments, out: &mut dyn Write) -> ExitCode {
    let answer = match ask_once(&arguments.workload, Method::GET, "/v1/whoami", None) {
        Ok(answer) => answer,
        Err(failure) => return failure.report(arguments.output, out),
    };
    let written = match arguments.output {
        OutputFormat::Json => writeln!(out, "{answer:#}"),
        OutputFormat::Text => out.write_all(readable(&answer).as_bytes()),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn readable(answer: &Value) -> String {
    let member = |name: &str| answer.get(name).map_or_else(String::new, on_one_line);
    let mut text = format!(
        "{}\n  environment  {}\n  seen by      {}\n",
        member("workload"),
        member("environment"),
        member("evidence")
    );
    if answer
        .get("valid_until")
        .is_some_and(|time| !time.is_null())
    {
        text.push_str(&format!("  until        {}\n", member("valid_until")));
    }
    let groups = answer.get("attributes").and_then(Value::as_object);
    for (group, attributes) in groups.into_iter().flatten() {
        for (name, value) in attributes.as_object().into_iter().flatten() {
            text.push_str(&format!("  {group}.{name} = {}\n", on_one_line(value)));
        }
    }
    for failed in answer
        .get("failed_attestors")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        text.push_str(&format!("  failed       {}\n", on_one_line(failed)));
    }
    text
}
