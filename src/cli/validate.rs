//! `countersign validate`: reads a configuration and its policies, and says everything that is wrong
//! with them.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use super::output::{EXIT_CONFIGURATION, OutputFormat};
use crate::config::{self, Checked};
use crate::policy::PolicyEngine;

/// Reads a configuration and its policies, and says everything that is wrong with them.
#[derive(Debug, Clone, clap::Args)]
pub struct ValidateArguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Writes the answer: for people the problems to `errors` and a summary to `out`, for programs one
/// JSON object to `out`. Exit code 78 where something is wrong; warnings alone are 0.
pub fn run(arguments: &ValidateArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    let Checked {
        config,
        policy_directory,
        mut diagnostics,
        ..
    } = config::check(&arguments.config);
    // What policies name can be looked up in a good configuration only.
    if config.is_none()
        && let Some(directory) = policy_directory
    {
        diagnostics.extend(PolicyEngine::check_form(&directory));
    }
    let config = config.filter(|config| {
        let loaded = PolicyEngine::load(config, &config.attestors.declarations());
        let is_loaded = loaded.is_ok();
        diagnostics.extend(loaded.map_or_else(|errors| errors, |(_, warnings)| warnings));
        is_loaded
    });
    let written = match arguments.output {
        OutputFormat::Json => writeln!(
            out,
            "{:#}",
            serde_json::json!({
                "valid": config.is_some(),
                "file": arguments.config,
                "diagnostics": diagnostics.to_json(),
            })
        ),
        OutputFormat::Text => {
            let colour = std::io::stderr().is_terminal();
            write!(errors, "{}", diagnostics.render(colour)).and_then(|()| match &config {
                Some(config) => writeln!(
                    out,
                    "{} is valid: {} listeners, {} credentials, {} destinations",
                    arguments.config.display(),
                    config.listeners.len(),
                    config.credentials.len(),
                    config.destinations.len(),
                ),
                None => Ok(()),
            })
        }
    };
    match (config, written) {
        (Some(_), Ok(())) => ExitCode::SUCCESS,
        (Some(_), Err(_)) => ExitCode::FAILURE,
        (None, _) => ExitCode::from(EXIT_CONFIGURATION),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validate(text: &str, output: OutputFormat) -> (ExitCode, String, String) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("policies")).unwrap();
        let config = directory.path().join("agent.yaml");
        std::fs::write(&config, text).unwrap();
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let code = run(&ValidateArguments { config, output }, &mut out, &mut errors);
        (
            code,
            String::from_utf8(out).unwrap(),
            String::from_utf8(errors).unwrap(),
        )
    }

    #[test]
    fn a_wrong_policy_ends_with_78_and_the_place() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("policies")).unwrap();
        let config = directory.path().join("agent.yaml");
        std::fs::write(&config, GOOD).unwrap();
        let policy = directory.path().join("policies/orders.cedar");
        std::fs::write(
            &policy,
            "@id(\"orders\")\npermit (principal, action, resource == Credential::\"absent\");\n",
        )
        .unwrap();
        let arguments = ValidateArguments {
            config,
            output: OutputFormat::Text,
        };
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        assert_eq!(
            run(&arguments, &mut out, &mut errors),
            ExitCode::from(EXIT_CONFIGURATION)
        );
        let errors = String::from_utf8(errors).unwrap();
        assert!(errors.contains("orders.cedar:2:"), "{errors}");
        assert!(errors.contains("absent"), "{errors}");

        // Under a wrong configuration its form is looked at, and not what it names.
        std::fs::write(&arguments.config, GOOD.replace('}', ", listenerz: []}")).unwrap();
        let with_id = std::fs::read_to_string(&policy).unwrap();
        for (policy_text, says) in [
            (with_id.as_str(), None),
            (
                "permit (principal, action, resource);",
                Some("policy_id_missing"),
            ),
            ("permit (principal", Some("orders.cedar:1:")),
        ] {
            std::fs::write(&policy, policy_text).unwrap();
            let mut errors = Vec::new();
            let code = run(&arguments, &mut out, &mut errors);
            assert_eq!(code, ExitCode::from(EXIT_CONFIGURATION));
            let errors = String::from_utf8(errors).unwrap();
            assert!(errors.contains("unknown key `listenerz`"), "{errors}");
            match says {
                Some(says) => assert!(errors.contains(says), "{errors}"),
                None => assert!(!errors.contains("orders.cedar"), "{errors}"),
            }
        }
    }

    const GOOD: &str = "{version: 1, listeners: [], credentials: [], destinations: []}";

    #[test]
    fn a_good_file_is_valid() {
        let (code, out, errors) = validate(GOOD, OutputFormat::Text);
        assert_eq!(code, ExitCode::SUCCESS, "{errors}");
        assert!(out.contains("is valid"), "{out}");
        let (code, out, _) = validate(GOOD, OutputFormat::Json);
        assert_eq!(code, ExitCode::SUCCESS);
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["valid"], true);
    }

    #[test]
    fn a_wrong_file_ends_with_78_and_the_place() {
        let wrong = "version: 1\nlisteners: []\ncredentials: []\ndestinationz: []\n";
        let (code, out, errors) = validate(wrong, OutputFormat::Text);
        assert_eq!(code, ExitCode::from(EXIT_CONFIGURATION));
        assert_eq!(out, "");
        assert!(errors.contains("agent.yaml:4:1"), "{errors}");
        assert!(errors.contains("did you mean `destinations`?"), "{errors}");
        let (code, out, errors) = validate(wrong, OutputFormat::Json);
        assert_eq!(code, ExitCode::from(EXIT_CONFIGURATION));
        assert_eq!(errors, "");
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["valid"], false);
        assert_eq!(answer["diagnostics"][0]["line"], 4);
        assert_eq!(answer["diagnostics"][0]["code"], "unknown_key");
    }
}
