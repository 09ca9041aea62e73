//! `countersign ca`: the public certificates that clients of the proxy load. Never a key.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::OutputFormat;
use super::run::on_control_runtime;
use super::workload::Agent;
use crate::client::AgentAddress;
use crate::config::{CaSource, Config};
use crate::tls::stores::{bundle_or_ours, pkcs12};
use crate::tls::trust::{pem_of, roots_in};

/// Writes the certificates that clients of the proxy load to standard output.
#[derive(Debug, Clone, clap::Args)]
pub struct CaArguments {
    /// Which certificates, in which form.
    #[arg(long, value_enum, default_value_t = CertificateFormat::Pem, value_name = "FORMAT")]
    pub format: CertificateFormat,
    /// The agent's workload API [default: $COUNTERSIGN_AGENT, else /run/countersign/api.sock, else that of `dev`].
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    pub agent: Option<AgentAddress>,
    /// A configuration whose files are read instead of asking an agent.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The form of the answer.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Which certificates, in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CertificateFormat {
    /// The agent's root, in PEM: for clients that add it to the system's.
    Pem,
    /// The system's roots and the agent's, in PEM: for `SSL_CERT_FILE` and its like, which replace the system's.
    Bundle,
    /// The same as a PKCS#12 trust store for Java, whose password is `changeit`.
    Pkcs12,
}

/// Writes the certificates to `out`. Exit code 69 where there are none yet, or no agent answers.
pub fn run(arguments: &CaArguments, out: &mut dyn Write) -> ExitCode {
    let written = certificates(arguments).and_then(|content| {
        match arguments.output {
            OutputFormat::Text => out.write_all(&content)?,
            OutputFormat::Json => writeln!(out, "{:#}", as_json(arguments.format, &content))?,
        }
        Ok(())
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(arguments.output, out),
    }
}

/// PEM as it is, and what is no text in Base64.
fn as_json(format: CertificateFormat, content: &[u8]) -> Value {
    match format {
        CertificateFormat::Pem | CertificateFormat::Bundle => {
            json!({"pem": String::from_utf8_lossy(content)})
        }
        CertificateFormat::Pkcs12 => json!({"pkcs12": STANDARD.encode(content)}),
    }
}

fn certificates(arguments: &CaArguments) -> Result<Vec<u8>, Failure> {
    let root = match &arguments.config {
        Some(path) => root_of(&Config::load(path)?)?,
        None => on_control_runtime(async {
            let agent = Agent::named(arguments.agent.clone(), None).await?;
            agent.proxy().await?.ca_certificate.ok_or_else(|| {
                Failure::unavailable(
                    "the agent intercepts nothing: it has no certificate authority",
                )
            })
        })??,
    };
    let bundled = || bundle_or_ours(&root).map_err(|error| Failure::unavailable(error.to_string()));
    match arguments.format {
        CertificateFormat::Pem => Ok(root.into_bytes()),
        CertificateFormat::Bundle => Ok(bundled()?.into_bytes()),
        CertificateFormat::Pkcs12 => pkcs12(&bundled()?).map_err(Failure::unavailable),
    }
}

/// The root in the files that a configuration names.
pub(super) fn root_of(config: &Config) -> Result<String, Failure> {
    let interception = config.interception.as_ref().ok_or_else(|| {
        Failure::unavailable(format!(
            "`{}` intercepts nothing: it has no certificate authority",
            config.path.display()
        ))
    })?;
    let file = match (&interception.source, &interception.ca_certificate_file) {
        (
            CaSource::Files {
                certificate_file, ..
            },
            _,
        ) => {
            let chain = roots_in(certificate_file).map_err(unreadable)?;
            return Ok(pem_of(chain.last()));
        }
        (_, Some(written)) => written.clone(),
        (CaSource::Generated { state_directory }, None) => state_directory.join("root.pem"),
        (CaSource::Memory, None) => {
            return Err(Failure::unavailable(
                "the root lives in the running agent only: ask it, without `--config`",
            ));
        }
    };
    let roots = roots_in(&file).map_err(|error| {
        Failure::unavailable(format!("{error}; an agent writes it when it first starts"))
    })?;
    Ok(pem_of(roots.first()))
}

fn unreadable(error: crate::tls::trust::TrustError) -> Failure {
    Failure::unavailable(error.to_string())
}
