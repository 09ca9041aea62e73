//! `countersign policy check|test|explain|schema`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use countersign_attestors::AttributeDeclaration;
use http::Method;

use super::failure::exit_code_of;
use super::output::{EXIT_CONFIGURATION, EXIT_UNAVAILABLE, EXIT_USAGE, OutputFormat};
use crate::client::{AgentAddress, ClientError, call};
use crate::config::{self, Attestors, Config, Unmatched};
use crate::diagnostics::Diagnostics;
use crate::policy::explain::{self, Explanation};
use crate::policy::{
    Action, Decision, OwnedQuestion, PolicyEngine, Question, Resource, cases, described,
    first_permitted, questions, route, schema, unmatched,
};
use crate::routing::{Route, Routes};

/// Checks, tests and explains policies.
#[derive(Debug, Clone, clap::Args)]
pub struct PolicyArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: PolicyCommand,
}

/// What to do with policies.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum PolicyCommand {
    /// Loads the policies as `run` would, and says everything that is wrong with them.
    Check(CheckArguments),
    /// Runs the cases beside the policies (`*.test.yaml`).
    Test(TestArguments),
    /// Says why a request was or would be decided as it was.
    Explain(ExplainArguments),
    /// Prints the schema that policies are checked against, as Cedar text.
    Schema(SchemaArguments),
}

/// The arguments of `policy check`.
#[derive(Debug, Clone, clap::Args)]
pub struct CheckArguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// The arguments of `policy test`.
#[derive(Debug, Clone, clap::Args)]
pub struct TestArguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The files of cases; without any, every `*.test.yaml` in the policy directory.
    #[arg(value_name = "TEST")]
    pub files: Vec<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// The arguments of `policy explain`.
#[derive(Debug, Clone, clap::Args)]
pub struct ExplainArguments {
    /// The request id of a decision that the agent made lately.
    #[arg(value_name = "ID", required_unless_present_any = ["request", "issue"], conflicts_with_all = ["request", "issue", "workload"])]
    pub id: Option<String>,
    /// The agent's workload API, which explains decisions about the caller only.
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["request", "issue"])]
    pub agent: Option<AgentAddress>,
    /// The agent's admin socket [default: /run/countersign/admin.sock, else that of `dev`, else the workload API].
    #[arg(long, value_name = "PATH", conflicts_with_all = ["request", "issue", "agent"])]
    pub admin_socket: Option<PathBuf>,
    /// The configuration file, for a described request.
    #[arg(long, value_name = "FILE", required_unless_present = "id")]
    pub config: Option<PathBuf>,
    /// An attribute of the workload, as in `unix.uid=1000` or `environment=prod`; once for each.
    #[arg(long = "as", value_name = "GROUP.NAME=VALUE")]
    pub workload: Vec<String>,
    /// The request, as in `GET https://orders.example.com/v1/orders`.
    #[arg(long, value_name = "METHOD URL", conflicts_with = "issue")]
    pub request: Option<String>,
    /// A credential of which a token is asked for, instead of a request.
    #[arg(long, value_name = "CREDENTIAL")]
    pub issue: Option<String>,
    /// Prints a policy that would allow exactly this, and its test.
    #[arg(long)]
    pub suggest: bool,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// The arguments of `policy schema`.
#[derive(Debug, Clone, clap::Args)]
pub struct SchemaArguments {
    /// The configuration file, whose attestors and issuers are in the schema; without one, the attestors that need no settings.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Runs the verb.
pub fn run(arguments: &PolicyArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    let done = match &arguments.command {
        PolicyCommand::Check(arguments) => check(arguments, out, errors),
        PolicyCommand::Test(arguments) => test(arguments, out, errors),
        PolicyCommand::Explain(arguments) => explain_decision(arguments, out, errors),
        PolicyCommand::Schema(arguments) => print_schema(arguments, out, errors),
    };
    // An answer that could not be written is no answer.
    done.unwrap_or(ExitCode::FAILURE)
}

/// A configuration and what its attestors may state; else the exit code, the problems already printed.
fn configuration(
    path: &Path,
    output: OutputFormat,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<Result<(Config, Vec<AttributeDeclaration>), ExitCode>> {
    let checked = config::check(path);
    match checked.config {
        Some(config) => {
            let declarations = config.attestors.declarations();
            Ok(Ok((config, declarations)))
        }
        None => {
            print_problems(&checked.diagnostics, output, out, errors)?;
            Ok(Err(ExitCode::from(EXIT_CONFIGURATION)))
        }
    }
}

fn print_problems(
    diagnostics: &Diagnostics,
    output: OutputFormat,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<()> {
    match output {
        OutputFormat::Json => writeln!(
            out,
            "{:#}",
            serde_json::json!({"valid": !diagnostics.has_errors(), "diagnostics": diagnostics.to_json()})
        ),
        OutputFormat::Text => write!(
            errors,
            "{}",
            diagnostics.render(std::io::stderr().is_terminal())
        ),
    }
}

fn check(
    arguments: &CheckArguments,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<ExitCode> {
    let (config, declarations) =
        match configuration(&arguments.config, arguments.output, out, errors)? {
            Ok(found) => found,
            Err(code) => return Ok(code),
        };
    match PolicyEngine::load(&config, &declarations) {
        Ok((engine, warnings)) => {
            match arguments.output {
                OutputFormat::Json => writeln!(
                    out,
                    "{:#}",
                    serde_json::json!({
                        "valid": true,
                        "version": &**engine.version(),
                        "policies": engine.policies().map(|(id, location)| serde_json::json!({"id": id, "location": location})).collect::<Vec<_>>(),
                        "diagnostics": warnings.to_json(),
                    })
                )?,
                OutputFormat::Text => {
                    print_problems(&warnings, OutputFormat::Text, out, errors)?;
                    writeln!(
                        out,
                        "{} policies are valid, version {}, {} warnings",
                        engine.policies().count(),
                        engine.version(),
                        warnings.len()
                    )?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(diagnostics) => {
            print_problems(&diagnostics, arguments.output, out, errors)?;
            Ok(ExitCode::FAILURE)
        }
    }
}

fn test(
    arguments: &TestArguments,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<ExitCode> {
    let (config, declarations) =
        match configuration(&arguments.config, arguments.output, out, errors)? {
            Ok(found) => found,
            Err(code) => return Ok(code),
        };
    let report = PolicyEngine::load(&config, &declarations)
        .and_then(|(engine, _)| cases::run(&config, &declarations, engine, &arguments.files));
    let report = match report {
        Ok(report) => report,
        Err(diagnostics) => {
            print_problems(&diagnostics, arguments.output, out, errors)?;
            return Ok(ExitCode::FAILURE);
        }
    };
    match arguments.output {
        OutputFormat::Json => writeln!(out, "{:#}", serde_json::json!(report))?,
        OutputFormat::Text => write!(out, "{}", report.to_text())?,
    }
    Ok(match report.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn print_schema(
    arguments: &SchemaArguments,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<ExitCode> {
    let declarations = match &arguments.config {
        Some(path) => match configuration(path, arguments.output, out, errors)? {
            Ok((_, declarations)) => declarations,
            Err(code) => return Ok(code),
        },
        None => Attestors {
            unix: true,
            systemd: true,
            oidc_issuers: Vec::new(),
        }
        .declarations(),
    };
    let text = schema::text(&declarations);
    match arguments.output {
        OutputFormat::Text => write!(out, "{text}")?,
        OutputFormat::Json => writeln!(out, "{:#}", serde_json::json!({"schema": text}))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn explain_decision(
    arguments: &ExplainArguments,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> std::io::Result<ExitCode> {
    let explanation = match &arguments.id {
        Some(id) => match ask_agent(arguments, id) {
            Ok(explanation) => explanation,
            Err((code, message)) => {
                writeln!(errors, "countersign: {message}")?;
                return Ok(code);
            }
        },
        None => {
            let Some(path) = &arguments.config else {
                writeln!(errors, "`--config` is required for a described request")?;
                return Ok(ExitCode::from(EXIT_USAGE));
            };
            let (config, declarations) = match configuration(path, arguments.output, out, errors)? {
                Ok(found) => found,
                Err(code) => return Ok(code),
            };
            let engine = match PolicyEngine::load(&config, &declarations) {
                Ok((engine, _)) => engine,
                Err(diagnostics) => {
                    print_problems(&diagnostics, arguments.output, out, errors)?;
                    return Ok(ExitCode::from(EXIT_CONFIGURATION));
                }
            };
            match explain_described(arguments, &config, &declarations, &engine) {
                Ok(explanation) => explanation,
                Err(message) => {
                    writeln!(errors, "{message}")?;
                    return Ok(ExitCode::from(EXIT_USAGE));
                }
            }
        }
    };
    match (arguments.output, arguments.suggest) {
        (OutputFormat::Json, _) => writeln!(out, "{:#}", serde_json::json!(explanation))?,
        (OutputFormat::Text, false) => write!(out, "{}", explanation.to_text())?,
        (OutputFormat::Text, true) => match &explanation.suggestion {
            Some(suggestion) => write!(out, "{}", suggestion.to_text())?,
            None => {
                write!(out, "{}", explanation.to_text())?;
                let why = match (explanation.allowed, explanation.reason.as_deref()) {
                    (true, _) => "it is allowed already",
                    (false, Some("no_permit")) => "its path is too long to be kept whole",
                    (false, _) => "it was not denied for want of a permit",
                };
                writeln!(errors, "there is no policy to suggest: {why}")?;
                return Ok(ExitCode::FAILURE);
            }
        },
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a running agent: the admin socket if it is named or open to us, else the workload API.
fn ask_agent(arguments: &ExplainArguments, id: &str) -> Result<Explanation, (ExitCode, String)> {
    let path = format!("/v1/explain/{id}");
    let ask = |address: AgentAddress| call(&address, Method::GET, &path, None);
    let workload_api = || {
        AgentAddress::workload_api(arguments.agent.clone())
            .map_err(|message| (ExitCode::from(EXIT_USAGE), message))
    };
    let answer = match (&arguments.agent, &arguments.admin_socket) {
        (Some(_), _) => ask(workload_api()?),
        (None, Some(_)) => ask(AgentAddress::admin(arguments.admin_socket.clone())),
        (None, None) => match ask(AgentAddress::admin(None)) {
            Err(ClientError::Unreachable { .. }) => ask(workload_api()?),
            answer => answer,
        },
    };
    let answer = answer.map_err(|error| {
        let next = match (&arguments.agent, &arguments.admin_socket) {
            (None, Some(_)) => error.next_for_admin(),
            _ => error.next_for_workload_api(),
        };
        let message = format!("{error}\n  next: {next}");
        (ExitCode::from(EXIT_UNAVAILABLE), message)
    })?;
    if !answer.status.is_success() {
        return Err((ExitCode::from(exit_code_of(&answer)), answer.problem()));
    }
    serde_json::from_value(answer.json()).map_err(|_| {
        let message = "the agent's answer is no explanation: is it of this version?".to_owned();
        (ExitCode::from(EXIT_UNAVAILABLE), message)
    })
}

/// Routes and decides a described request as the agent would.
fn explain_described(
    arguments: &ExplainArguments,
    config: &Config,
    declarations: &[AttributeDeclaration],
    engine: &PolicyEngine,
) -> Result<Explanation, String> {
    let (facts, environment) = described::workload(&arguments.workload, declarations)?;
    let wall = SystemTime::now();
    let explain = |question: &Question<'_>| {
        explain::explanation_in(engine, &facts, environment.as_deref(), question)
    };
    let Some(text) = &arguments.request else {
        let name = arguments.issue.as_deref().unwrap_or_default();
        let credential = config
            .credentials
            .iter()
            .find(|credential| &*credential.name == name)
            .ok_or_else(|| format!("credential `{name}` is not in the configuration"))?;
        let config::TokenSource::OauthClientCredentials(settings) = &credential.source;
        return Ok(explain(&Question {
            action: Action::Issue,
            resource: Resource::Credential {
                credential,
                scopes: &settings.scopes,
                audience: None,
            },
            destination: None,
            request: None,
            wall,
        }));
    };
    let request = Arc::new(described::request(text)?);
    let routes = Routes::new(config);
    let question: OwnedQuestion = match route(&routes, &request) {
        Route::Destination(destination) => {
            let asking = questions(destination, Some(&request), wall);
            let decided = first_permitted(asking, |question| {
                match engine.evaluate_in(&facts, environment.as_deref(), question) {
                    Decision::Allow(permission) => Ok(permission),
                    Decision::Deny(denial) => Err(denial),
                }
            });
            match decided {
                Ok((_, question, _)) => question.to_owned(),
                Err(Some(refused)) => refused.question.to_owned(),
                Err(None) => return Err(not_covered(text)),
            }
        }
        Route::Unmatched(Unmatched::Tunnel) => unmatched(Some(&request), wall).to_owned(),
        Route::NotCovered(destination) => {
            return Err(format!(
                "destination `{}` does not cover the scheme or path of `{text}`",
                Arc::clone(destination).name
            ));
        }
        Route::Unmatched(Unmatched::Refuse) => return Err(not_covered(text)),
    };
    Ok(explain(&question.as_question()))
}

fn not_covered(request: &str) -> String {
    format!("no destination of the configuration covers `{request}`")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        policy: PolicyArguments,
    }

    /// The exit code, standard output and standard error of `policy ARGUMENTS`.
    fn policy(arguments: &[&str]) -> (ExitCode, String, String) {
        let command = Command::try_parse_from([&["policy"], arguments].concat()).unwrap();
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let code = run(&command.policy, &mut out, &mut errors);
        (
            code,
            String::from_utf8(out).unwrap(),
            String::from_utf8(errors).unwrap(),
        )
    }

    /// A copy of the example of a service, in a directory of its own.
    fn example() -> (tempfile::TempDir, String) {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/examples");
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("system-service");
        std::fs::create_dir(&copy).unwrap();
        std::fs::write(directory.path().join("secret.example"), "secret").unwrap();
        for entry in std::fs::read_dir(examples.join("system-service")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        let config = copy.join("agent.yaml").display().to_string();
        (directory, config)
    }

    #[test]
    fn check_is_0_for_good_policies_1_for_wrong_ones_and_78_for_a_wrong_configuration() {
        let (directory, config) = example();
        let (code, out, errors) = policy(&["check", "--config", &config]);
        assert_eq!(code, ExitCode::SUCCESS, "{errors}");
        assert!(out.starts_with("3 policies are valid, version "), "{out}");

        let wrong = directory.path().join("system-service/wrong.cedar");
        std::fs::write(&wrong, "\n permit (principal, action, resource);").unwrap();
        let (code, out, errors) = policy(&["check", "--config", &config]);
        assert_eq!(code, ExitCode::FAILURE);
        assert_eq!(out, "");
        assert!(errors.contains("wrong.cedar:2:2"), "{errors}");
        let (code, out, _) = policy(&["check", "--config", &config, "--output", "json"]);
        assert_eq!(code, ExitCode::FAILURE);
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["valid"], false);
        assert_eq!(answer["diagnostics"][0]["code"], "policy_id_missing");
        assert_eq!(answer["diagnostics"][0]["line"], 2);

        std::fs::write(&config, "version: 2").unwrap();
        let (code, ..) = policy(&["check", "--config", &config]);
        assert_eq!(code, ExitCode::from(EXIT_CONFIGURATION));
    }

    #[test]
    fn test_is_1_where_a_case_fails() {
        let (directory, config) = example();
        let (code, out, errors) = policy(&["test", "--config", &config]);
        assert_eq!(code, ExitCode::SUCCESS, "{out}{errors}");
        assert!(out.contains("13 passed, 0 failed"), "{out}");
        let cases = directory.path().join("more.test.yaml");
        let case = "workloads: {a: {unix: {uid: 1}}}\ntests:\n  - {as: a, request: GET https://orders.example.com/v1/orders, expect: allow}\n";
        std::fs::write(&cases, case).unwrap();
        let cases = cases.display().to_string();
        let (code, out, _) = policy(&["test", "--config", &config, &cases]);
        assert_eq!(code, ExitCode::FAILURE);
        assert!(out.contains("FAILED"), "{out}");
        assert!(out.contains("expected allow"), "{out}");
        let (code, out, _) = policy(&["test", "--config", &config, &cases, "--output", "json"]);
        assert_eq!(code, ExitCode::FAILURE);
        let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["failed"], 1);
        assert_eq!(answer["cases"][0]["passed"], false);
        assert_eq!(answer["cases"][0]["line"], 3);
    }

    #[test]
    fn what_tests_nothing_does_not_pass() {
        let (directory, config) = example();
        for name in ["default", "orders"] {
            let file = format!("system-service/{name}.test.yaml");
            std::fs::remove_file(directory.path().join(file)).unwrap();
        }
        let empty = directory.path().join("empty.test.yaml");
        std::fs::write(&empty, "workloads: {}\ntests: []\n").unwrap();
        let empty = empty.display().to_string();
        for (more, place) in [(&[][..], "system-service"), (&[&*empty], "empty.test.yaml")] {
            let line = [&["test", "--config", &config], more].concat();
            let (code, out, errors) = policy(&line);
            assert_eq!(code, ExitCode::FAILURE, "{out}");
            assert_eq!(out, "");
            assert!(errors.contains("no_policy_test"), "{errors}");
            assert!(errors.contains(place), "{errors}");
        }
    }

    #[test]
    fn a_described_request_is_explained_and_its_suggestion_loads() {
        let (directory, config) = example();
        let described = [
            "explain",
            "--config",
            &config,
            "--as",
            "systemd.system_unit=orders.service",
            "--request",
            "DELETE https://orders.example.com/v1/orders/8",
        ];
        let (code, out, errors) = policy(&described);
        assert_eq!(code, ExitCode::SUCCESS, "{errors}");
        assert!(out.starts_with("denied  policy_denied"), "{out}");
        assert!(out.contains("was false (DELETE)"), "{out}");
        let (code, suggestion, _) = policy(&[&described[..], &["--suggest"]].concat());
        assert_eq!(code, ExitCode::SUCCESS);
        let (cedar, yaml) = suggestion.split_once("\n# ").unwrap();
        let policies = directory.path().join("system-service");
        std::fs::write(policies.join("suggested.cedar"), cedar).unwrap();
        std::fs::write(policies.join("suggested.test.yaml"), format!("# {yaml}")).unwrap();
        let (code, out, errors) = policy(&described);
        assert_eq!(code, ExitCode::SUCCESS, "{errors}");
        assert!(out.starts_with("allowed  policy version"), "{out}");
        let (code, _, errors) = policy(&[&described[..], &["--suggest"]].concat());
        assert_eq!(code, ExitCode::FAILURE);
        assert!(errors.contains("it is allowed already"), "{errors}");
        let (code, out, errors) = policy(&["test", "--config", &config]);
        assert_eq!(code, ExitCode::SUCCESS, "{out}{errors}");
        assert!(out.contains("14 passed, 0 failed"), "{out}");
    }

    #[test]
    fn a_description_that_says_nothing_is_a_usage_error() {
        let (_directory, config) = example();
        for (arguments, words) in [
            (
                [
                    "--as",
                    "unix.uidd=1",
                    "--request",
                    "GET https://orders.example.com/v1/a",
                ],
                "did you mean `unix.uid`?",
            ),
            (
                [
                    "--as",
                    "unix.uid=one",
                    "--request",
                    "GET https://orders.example.com/v1/a",
                ],
                "is not a whole number",
            ),
            (
                [
                    "--as",
                    "uid",
                    "--request",
                    "GET https://orders.example.com/v1/a",
                ],
                "is not `GROUP.NAME=VALUE`",
            ),
            (
                ["--as", "unix.uid=1", "--request", "orders.example.com"],
                "is not a method and a URL",
            ),
            (
                [
                    "--as",
                    "unix.uid=1",
                    "--request",
                    "GET https://elsewhere.example.com/",
                ],
                "no destination of the configuration covers",
            ),
            (
                [
                    "--as",
                    "unix.uid=1",
                    "--request",
                    "GET https://orders.example.com/v2",
                ],
                "does not cover the scheme or path",
            ),
            (
                ["--as", "unix.uid=1", "--issue", "order-api"],
                "is not in the configuration",
            ),
        ] {
            let (code, out, errors) =
                policy(&[&["explain", "--config", &config][..], &arguments].concat());
            assert_eq!(code, ExitCode::from(EXIT_USAGE), "{arguments:?}");
            assert_eq!(out, "");
            assert!(errors.contains(words), "{arguments:?}: {errors}");
        }
    }

    #[test]
    fn where_no_agent_answers_an_id_is_69() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("absent.sock").display().to_string();
        let id = "01890a5d-ac96-774b-bcce-b302099a8057";
        let (code, _, errors) = policy(&["explain", id, "--admin-socket", &socket]);
        assert_eq!(code, ExitCode::from(EXIT_UNAVAILABLE));
        assert!(errors.contains("no agent is reached"), "{errors}");
    }

    #[test]
    fn schema_prints_the_issuers_of_the_configuration() {
        let (_directory, config) = example();
        let (code, out, errors) = policy(&["schema", "--config", &config]);
        assert_eq!(code, ExitCode::SUCCESS, "{errors}");
        assert!(out.contains("systemd?: {"), "{out}");
        let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/examples/ci-job/agent.yaml");
        let (_, out, _) = policy(&["schema", "--config", &ci.display().to_string()]);
        assert!(
            out.contains("ci?: {") && !out.contains("systemd?: {"),
            "{out}"
        );
    }
}
