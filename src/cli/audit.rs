//! `countersign audit verify` and `audit tail`.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::output::{EXIT_UNAVAILABLE, OutputFormat};
use crate::audit::tail::{follow, last, render};
use crate::audit::verify::{ExpectedHead, VerifyError, verify};

/// Reads audit files.
#[derive(Debug, Clone, clap::Args)]
pub struct AuditArguments {
    #[command(subcommand)]
    verb: AuditVerb,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum AuditVerb {
    /// Verifies that nothing was changed, removed or moved, in the file and in those rotated out of it.
    Verify(VerifyArguments),
    /// Shows the last records.
    Tail(TailArguments),
}

#[derive(Debug, Clone, clap::Args)]
struct VerifyArguments {
    /// The audit file.
    file: PathBuf,
    /// A head that is known from elsewhere, as `status` shows it; 12 digits of the hash suffice. Without
    /// it a cut at the end is not found.
    #[arg(long, value_name = "SEQUENCE:HASH")]
    expect_head: Option<ExpectedHead>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

#[derive(Debug, Clone, clap::Args)]
struct TailArguments {
    /// The audit file.
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// How many records; attestations are not counted.
    #[arg(long, value_name = "N", default_value_t = 10)]
    last: usize,
    /// Goes on with records as they are written.
    #[arg(long)]
    follow: bool,
    /// The form of the answer: `json` is the lines as they are in the file.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// Writes what was asked for to `out`. `verify`: exit code 0 when whole, 1 when not; both verbs: 69 when
/// the file cannot be read.
pub fn run(arguments: &AuditArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    match &arguments.verb {
        AuditVerb::Verify(arguments) => run_verify(arguments, out, errors),
        AuditVerb::Tail(arguments) => run_tail(arguments, out, errors),
    }
}

fn run_verify(
    arguments: &VerifyArguments,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> ExitCode {
    let result = verify(&arguments.file, arguments.expect_head.as_ref());
    let written = match (&result, arguments.output) {
        (Ok(whole), OutputFormat::Text) => {
            let ending = match arguments.expect_head {
                Some(_) => "",
                None => {
                    "; compare the head with `countersign status` to know that nothing was cut off"
                }
            };
            writeln!(
                out,
                "whole: {} records in {} files, from {} on, head {}:{}{ending}",
                whole.records,
                whole.files.len(),
                whole.first_sequence,
                whole.head_sequence,
                whole.head_hash,
            )
        }
        (Ok(whole), OutputFormat::Json) => {
            writeln!(out, "{}", json!({"whole": true, "chain": whole}))
        }
        (Err(VerifyError::Broken(broken)), OutputFormat::Json) => {
            writeln!(out, "{}", json!({"whole": false, "break": broken}))
        }
        (Err(error), _) => writeln!(errors, "{error}"),
    };
    match (result, written) {
        (Ok(_), Ok(())) => ExitCode::SUCCESS,
        (Err(VerifyError::Unreadable { .. }), _) => ExitCode::from(EXIT_UNAVAILABLE),
        _ => ExitCode::FAILURE,
    }
}

fn run_tail(arguments: &TailArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    let mut show = |line: &str| -> ControlFlow<()> {
        let shown = match arguments.output {
            OutputFormat::Json => Some(line.trim_end_matches('\n').to_owned()),
            OutputFormat::Text => render(line),
        };
        // Nobody reads any more: done.
        match shown.map_or(Ok(()), |line| writeln!(out, "{line}")) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    };
    let result = last(&arguments.file, arguments.last).and_then(|lines| {
        for line in lines {
            if show(&line).is_break() {
                return Ok(());
            }
        }
        match arguments.follow {
            true => follow(&arguments.file, show),
            false => Ok(()),
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(errors, "{}", unreadable(&arguments.file, &error));
            ExitCode::from(EXIT_UNAVAILABLE)
        }
    }
}

fn unreadable(file: &Path, error: &std::io::Error) -> String {
    format!(
        "countersign: `{}` cannot be read: {error}\n  next: give the `path` of the audit sink",
        file.display()
    )
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    use clap::Parser;

    use crate::audit::{Audit, LifecycleEvent, OtherAgents};
    use crate::clock::{Clock, SystemClock};
    use crate::config::{AuditConfig, AuditSink, OnAuditFailure};
    use crate::telemetry::metrics::Metrics;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        audit: AuditArguments,
    }

    fn audit(arguments: &[&str]) -> (ExitCode, String, String) {
        let command = Command::parse_from([&["audit"], arguments].concat());
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let code = run(&command.audit, &mut out, &mut errors);
        (
            code,
            String::from_utf8(out).unwrap(),
            String::from_utf8(errors).unwrap(),
        )
    }

    #[test]
    fn verify_and_tail_say_it_by_exit_code_text_and_json() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let metrics = Metrics::new(Arc::clone(&clock));
        let config = AuditConfig {
            on_failure: OnAuditFailure::Block,
            sinks: vec![AuditSink::File {
                path: path.clone(),
                rotate_size: 1 << 20,
                keep: 2,
            }],
        };
        let (handle, writer) =
            Audit::start(&config, OtherAgents::AreMistakes, clock, &metrics).unwrap();
        for number in 0..3 {
            handle
                .lifecycle(LifecycleEvent::RevocationLifted {
                    id: format!("r{number}"),
                })
                .unwrap();
        }
        assert!(writer.stop(Duration::from_secs(20)));
        let (sequence, hash) = handle.head();
        let file = path.to_str().unwrap();

        let (code, out, _) = audit(&["verify", file]);
        assert_eq!(code, ExitCode::SUCCESS);
        assert!(out.starts_with("whole: 3 records in 1 files"), "{out}");
        let head = format!("{sequence}:{}", &hash[..12]);
        let (code, out, _) = audit(&["verify", file, "--expect-head", &head, "--output", "json"]);
        assert_eq!(code, ExitCode::SUCCESS);
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["chain"]["head_hash"], hash);

        let (code, out, _) = audit(&["tail", "--last", "2", "--file", file]);
        assert_eq!(code, ExitCode::SUCCESS);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].ends_with("agent lifted revocation r2"), "{out}");
        let (_, out, _) = audit(&["tail", "--file", file, "--output", "json"]);
        assert_eq!(out, std::fs::read_to_string(&path).unwrap());

        let text = std::fs::read_to_string(&path).unwrap().replace("r1", "r7");
        std::fs::write(&path, text).unwrap();
        let (code, out, errors) = audit(&["verify", file]);
        assert_eq!(code, ExitCode::FAILURE);
        assert_eq!(out, "");
        assert!(
            errors.contains("audit.jsonl:2: the line was altered"),
            "{errors}"
        );
        let (code, out, _) = audit(&["verify", file, "--output", "json"]);
        assert_eq!(code, ExitCode::FAILURE);
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["break"]["line"], 2);

        let absent = directory.path().join("absent");
        for verb in [&["verify"][..], &["tail", "--file"]] {
            let arguments = [verb, &[absent.to_str().unwrap()]].concat();
            assert_eq!(audit(&arguments).0, ExitCode::from(EXIT_UNAVAILABLE));
        }
    }
}
