//! What the verbs that ask over the admin socket have in common.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use http::Method;
use serde_json::Value;

use super::failure::exit_code_of;
use super::output::{EXIT_UNAVAILABLE, OutputFormat};
use crate::client::{AgentAddress, call};

/// Which agent is asked, and how it is answered.
#[derive(Debug, Clone, clap::Args)]
pub struct AdminArguments {
    /// The agent's admin socket [default: /run/countersign/admin.sock, else that of `dev`].
    #[arg(long, value_name = "PATH")]
    pub admin_socket: Option<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

impl AdminArguments {
    /// Asks, and writes the answer: for people by `render`, for programs as it came. Exit code 0, 69
    /// where no agent answers, that of its answer where it refuses.
    pub(super) fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        out: &mut dyn Write,
        errors: &mut dyn Write,
        render: impl FnOnce(&Value) -> String,
    ) -> ExitCode {
        let address = AgentAddress::admin(self.admin_socket.clone());
        let answer = match call(&address, method, path, body) {
            Ok(answer) => answer,
            Err(error) => {
                let _ = writeln!(
                    errors,
                    "countersign: {error}\n  next: {}",
                    error.next_for_admin()
                );
                return ExitCode::from(EXIT_UNAVAILABLE);
            }
        };
        if !answer.status.is_success() {
            let _ = match self.output {
                OutputFormat::Text => writeln!(errors, "countersign: {}", answer.problem()),
                OutputFormat::Json => writeln!(out, "{}", answer.json()),
            };
            return ExitCode::from(exit_code_of(&answer));
        }
        let value = answer.json();
        let written = match self.output {
            OutputFormat::Text => out.write_all(render(&value).as_bytes()),
            OutputFormat::Json => writeln!(out, "{value:#}"),
        };
        match written {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    }
}

/// A value as people read it: members by line, lists of objects one to a line.
pub(super) fn readable(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(members) => {
            let width = members.keys().map(String::len).max().unwrap_or(0);
            for (name, value) in members {
                let name = name.replace('_', " ");
                match value {
                    Value::Array(items) if items.iter().any(Value::is_object) => {
                        text.push_str(&format!("{name}\n"));
                        for item in items {
                            text.push_str(&format!("  {}\n", on_one_line(item)));
                        }
                    }
                    _ => text.push_str(&format!("{name:width$}  {}\n", on_one_line(value))),
                }
            }
        }
        _ => text.push_str(&format!("{}\n", on_one_line(value))),
    }
    text
}

pub(super) fn on_one_line(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.replace(char::is_control, "\u{fffd}"),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().map(on_one_line).collect::<Vec<_>>().join(", "),
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| format!("{} {}", name.replace('_', " "), on_one_line(value)))
            .collect::<Vec<_>>()
            .join("  "),
    }
}

/// Rows under headings, in columns.
pub(super) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .chain(
                headings
                    .get(column)
                    .map(|heading| (*heading).to_owned())
                    .as_ref(),
            )
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &[String]| {
        let line: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        format!("{}\n", line.join("  ").trim_end())
    };
    let headings: Vec<String> = headings
        .iter()
        .map(|heading| (*heading).to_owned())
        .collect();
    let mut text = line(&headings);
    for row in rows {
        text.push_str(&line(row));
    }
    text
}
