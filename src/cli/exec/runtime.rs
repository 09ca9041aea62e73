//! Refuses runtimes that are known to ignore proxy variables: their requests would go direct, without
//! a credential and without a record.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cli::failure::Failure;

/// How much of a script's first line is read.
const FIRST_LINE_BYTES: u64 = 256;

/// Refuses a command that is known to go direct.
///
/// # Errors
/// `runtime_ignores_proxy`, with the version found and what to use instead.
pub(super) fn check(command: &[OsString]) -> Result<(), Failure> {
    let Some(node) = command.first().and_then(|program| node_of(program)) else {
        return Ok(());
    };
    let Some(version) = version_of(&node) else {
        return Ok(());
    };
    match reads_proxy_variables(&version) {
        Some(false) => Err(Failure::unavailable(format!(
            "runtime_ignores_proxy: Node {} (`{}`) ignores proxy variables, so its requests would go direct, without a credential\n  next: use Node 22.21 or later, or 24",
            version.trim(),
            node.display()
        ))),
        Some(true) | None => Ok(()),
    }
}

/// The Node that a command runs: itself, or by the first line of a script.
fn node_of(program: &OsStr) -> Option<PathBuf> {
    let path = find(program)?;
    if is_node(&path) {
        return Some(path);
    }
    let mut first = Vec::new();
    File::open(&path)
        .ok()?
        .take(FIRST_LINE_BYTES)
        .read_to_end(&mut first)
        .ok()?;
    let line = first
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let interpreter = String::from_utf8_lossy(line)
        .split_ascii_whitespace()
        .map(PathBuf::from)
        .find(|word| is_node(word))?;
    find(interpreter.as_os_str())
}

fn is_node(path: &Path) -> bool {
    matches!(
        path.file_name().map(OsStr::as_bytes),
        Some(b"node" | b"nodejs")
    )
}

/// As execvp(3) finds it.
fn find(program: &OsStr) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(program));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| {
            std::fs::metadata(candidate).is_ok_and(|metadata| {
                metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
            })
        })
}

fn version_of(node: &Path) -> Option<String> {
    let output = Command::new(node)
        .arg("--version")
        .env_remove("NODE_OPTIONS")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    String::from_utf8(output.stdout).ok()
}

/// `NODE_USE_ENV_PROXY` came with 24.0, and with 22.21. `None` for what is no version.
fn reads_proxy_variables(version: &str) -> Option<bool> {
    let mut numbers = version.trim().strip_prefix('v')?.split('.');
    let major: u32 = numbers.next()?.parse().ok()?;
    let minor: u32 = numbers.next()?.parse().ok()?;
    Some(major >= 24 || (major == 22 && minor >= 21))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_node_that_go_direct_are_known() {
        for (version, reads) in [
            ("v18.19.0\n", Some(false)),
            ("v20.20.2\n", Some(false)),
            ("v22.20.0", Some(false)),
            ("v22.21.0", Some(true)),
            ("v23.11.1", Some(false)),
            ("v24.0.0", Some(true)),
            ("v25.1.0", Some(true)),
            ("24", None),
            ("", None),
        ] {
            assert_eq!(reads_proxy_variables(version), reads, "{version}");
        }
    }

    #[test]
    fn scripts_say_which_interpreter_runs_them() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str, mode: u32| {
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let node = write("node", "", 0o755);
        let script = write("tool", &format!("#!{}\n", node.display()), 0o755);
        let other = write("other", "#!/bin/sh\nnode x\n", 0o755);
        assert_eq!(node_of(node.as_os_str()), Some(node.clone()));
        assert_eq!(node_of(script.as_os_str()), Some(node));
        assert_eq!(node_of(other.as_os_str()), None);
    }
}
