//! `countersign keys`: the keys with which the agent signs its assertions.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::output::{EXIT_CONFIGURATION, EXIT_UNAVAILABLE, OutputFormat};
use crate::config::SigningAlgorithm;
use crate::jwt::SigningKey;

/// Keys with which the agent signs its assertions (`private_key_jwt`).
#[derive(Debug, Clone, clap::Args)]
pub struct KeysArguments {
    #[command(subcommand)]
    verb: KeysVerb,
    /// The form of a failure; keys are JSON in either.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    pub output: OutputFormat,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum KeysVerb {
    /// Makes a private key: writes it to a file, and its public half as a JWK set to standard output.
    Generate(GenerateArguments),
    /// Prints the public halves of private keys as one JWK set, to be registered at the authorization server.
    Jwks(JwksArguments),
}

/// Makes a private key.
#[derive(Debug, Clone, clap::Args)]
pub struct GenerateArguments {
    /// The file to write (PKCS#8 PEM, mode 0600). A file that exists is never replaced.
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    /// The signature algorithm.
    #[arg(long, value_enum, default_value_t = AlgorithmName::Es256, value_name = "ALGORITHM")]
    pub algorithm: AlgorithmName,
}

/// Prints public keys.
#[derive(Debug, Clone, clap::Args)]
pub struct JwksArguments {
    /// Private keys (PEM or JWK).
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// The signature algorithm; by the key's type where not given (RSA: RS256).
    #[arg(long, value_enum, value_name = "ALGORITHM")]
    pub algorithm: Option<AlgorithmName>,
}

/// A signature algorithm, by its name in JWTs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "verbatim")]
pub enum AlgorithmName {
    /// ECDSA with P-256 and SHA-256.
    #[value(name = "ES256")]
    Es256,
    /// Ed25519.
    #[value(name = "EdDSA")]
    EdDsa,
    /// RSASSA-PSS with SHA-256.
    #[value(name = "PS256")]
    Ps256,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    #[value(name = "RS256")]
    Rs256,
}

impl From<AlgorithmName> for SigningAlgorithm {
    fn from(name: AlgorithmName) -> Self {
        match name {
            AlgorithmName::Es256 => Self::Es256,
            AlgorithmName::EdDsa => Self::EdDsa,
            AlgorithmName::Ps256 => Self::Ps256,
            AlgorithmName::Rs256 => Self::Rs256,
        }
    }
}

/// Writes a JWK set to `out`. Exit code 69 where a file cannot be written, 78 where one is no key.
pub fn run(arguments: &KeysArguments, out: &mut dyn Write, errors: &mut dyn Write) -> ExitCode {
    let keys = match &arguments.verb {
        KeysVerb::Generate(arguments) => generate(arguments).map(|key| vec![key]),
        KeysVerb::Jwks(arguments) => arguments
            .files
            .iter()
            .map(|file| read(file, arguments.algorithm))
            .collect(),
    };
    let written = keys.and_then(|keys| {
        let keys: Vec<_> = keys
            .iter()
            .map(SigningKey::public_jwk)
            .collect::<Result<_, _>>()
            .map_err(|error| (EXIT_CONFIGURATION, error.to_string()))?;
        writeln!(out, "{:#}", json!({"keys": keys}))
            .map_err(|error| (EXIT_UNAVAILABLE, error.to_string()))
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, reason)) => {
            let _ = match arguments.output {
                OutputFormat::Text => writeln!(errors, "error: {reason}"),
                OutputFormat::Json => writeln!(out, "{}", json!({"detail": reason})),
            };
            ExitCode::from(code)
        }
    }
}

type Failure = (u8, String);

fn generate(arguments: &GenerateArguments) -> Result<SigningKey, Failure> {
    let (key, pem) = SigningKey::generate(arguments.algorithm.into())
        .map_err(|error| (EXIT_UNAVAILABLE, error.to_string()))?;
    write_private(&arguments.file, pem.as_bytes()).map_err(|error| {
        let next = match error.kind() {
            io::ErrorKind::AlreadyExists => "; choose another name, or remove it first",
            _ => "",
        };
        (
            EXIT_UNAVAILABLE,
            format!(
                "`{}` cannot be written: {error}{next}",
                arguments.file.display()
            ),
        )
    })?;
    Ok(key)
}

fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn read(path: &Path, algorithm: Option<AlgorithmName>) -> Result<SigningKey, Failure> {
    let unusable = |reason: String| {
        (
            EXIT_CONFIGURATION,
            format!("`{}` cannot be used: {reason}", path.display()),
        )
    };
    let content =
        zeroize::Zeroizing::new(std::fs::read(path).map_err(|error| unusable(error.to_string()))?);
    let candidates = match algorithm {
        Some(algorithm) => vec![algorithm.into()],
        None => vec![
            SigningAlgorithm::Es256,
            SigningAlgorithm::EdDsa,
            SigningAlgorithm::Rs256,
            SigningAlgorithm::Ps256,
        ],
    };
    let mut reason = String::new();
    for candidate in candidates {
        match SigningKey::parse(&content, candidate) {
            Ok(key) => return Ok(key),
            Err(error) => reason = error.to_string(),
        }
    }
    Err(unusable(match algorithm {
        Some(_) => reason,
        None => "it is no P-256, Ed25519 or RSA private key in PEM or JWK".to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use clap::Parser;
    use serde_json::Value;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        keys: KeysArguments,
    }

    fn keys(arguments: &[&str]) -> (ExitCode, String, String) {
        let command =
            Command::try_parse_from(std::iter::once("keys").chain(arguments.iter().copied()))
                .unwrap();
        let (mut out, mut errors) = (Vec::new(), Vec::new());
        let code = run(&command.keys, &mut out, &mut errors);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(errors))
    }

    #[test]
    fn what_generate_prints_is_what_jwks_prints() {
        let directory = tempfile::tempdir().unwrap();
        for algorithm in ["ES256", "EdDSA", "PS256", "RS256"] {
            let file = directory.path().join(algorithm);
            let file = file.to_str().unwrap();
            let (code, generated, _) =
                keys(&["generate", "--file", file, "--algorithm", algorithm]);
            assert_eq!(code, ExitCode::SUCCESS);
            let mode = std::fs::metadata(file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let (code, printed, _) = keys(&["jwks", file, "--algorithm", algorithm]);
            assert_eq!(code, ExitCode::SUCCESS);
            assert_eq!(generated, printed);
            let set: Value = serde_json::from_str(&printed).unwrap();
            assert_eq!(set["keys"][0]["alg"], algorithm);
            for private in ["d", "p", "q", "dp", "dq", "qi"] {
                assert!(set["keys"][0].get(private).is_none());
            }
            // By its type alone.
            let (code, printed, _) = keys(&["jwks", file]);
            assert_eq!(code, ExitCode::SUCCESS);
            let set: Value = serde_json::from_str(&printed).unwrap();
            let expected = if algorithm == "PS256" {
                "RS256"
            } else {
                algorithm
            };
            assert_eq!(set["keys"][0]["alg"], expected);
        }
        let file = |name| directory.path().join(name).to_str().unwrap().to_owned();
        let (_, printed, _) = keys(&["jwks", &file("ES256"), &file("EdDSA")]);
        let set: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(set["keys"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn nothing_is_replaced_and_what_is_no_key_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kept");
        std::fs::write(&file, "kept").unwrap();
        let name = file.to_str().unwrap();
        let (code, out, errors) = keys(&["generate", "--file", name]);
        assert_eq!(code, ExitCode::from(EXIT_UNAVAILABLE));
        assert!(
            out.is_empty() && errors.contains("remove it first"),
            "{errors}"
        );
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
        let (code, out, errors) = keys(&["jwks", name]);
        assert_eq!(code, ExitCode::from(EXIT_CONFIGURATION));
        assert!(out.is_empty() && errors.contains(name), "{errors}");
        let (code, _, _) = keys(&["jwks", "/nonexistent/key"]);
        assert_eq!(code, ExitCode::from(EXIT_CONFIGURATION));
    }
}
