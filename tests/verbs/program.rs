//! `countersign` as a user runs it: found by `PATH`, in a directory and a runtime directory of one's
//! own, under a shell.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Command;

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_countersign");

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A user: where it stands, and where the runtime directory is.
pub struct User {
    directory: TempDir,
}

/// A program that ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; -1 where a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub errors: String,
}

impl User {
    pub fn new() -> Self {
        Self {
            directory: tempfile::Builder::new()
                .prefix("countersign-user-")
                .tempdir()
                .unwrap(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A command with nothing in its environment but what every login has.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let own = Path::new(PROGRAM).parent().unwrap();
        let path = std::env::var_os("PATH").unwrap();
        let path = std::iter::once(own.to_owned()).chain(std::env::split_paths(&path));
        let mut command = Command::new(program.as_ref());
        command
            .env_clear()
            .env("PATH", std::env::join_paths(path).unwrap())
            .env("HOME", self.directory.path())
            .env("XDG_RUNTIME_DIR", self.directory.path())
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// `countersign ARGUMENTS`, not yet started.
    pub fn countersign(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(PROGRAM);
        command.args(arguments);
        command
    }

    /// `countersign ARGUMENTS`, to its end.
    pub async fn run(&self, arguments: &[&str]) -> Finished {
        finish(self.countersign(arguments)).await
    }

    /// A line of shell, to its end.
    pub async fn sh(&self, line: &str) -> Finished {
        let mut command = self.command("sh");
        command.args(["-c", line]);
        finish(command).await
    }
}

/// Runs a command to its end.
pub async fn finish(mut command: Command) -> Finished {
    let output = tokio::time::timeout(LIMIT, command.output())
        .await
        .expect("the program ends")
        .unwrap();
    Finished::from(output)
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Finished {
    /// Asserts an exit code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("the output is not JSON ({error}): {self:#?}"))
    }
}

/// Sends a signal to a process that this test started.
pub fn send(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}
