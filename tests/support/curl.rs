//! curl, as the users of the agent run it.

use std::process::Stdio;

use tokio::process::Command;

/// What curl got.
#[derive(Debug)]
pub struct Answer {
    /// The last response's status; 0 without one.
    pub status: u16,
    /// CONNECT's status; 0 without one.
    pub connect_status: u16,
    /// `1.1` or `2`.
    pub version: String,
    /// Every head that was received, CONNECT's included.
    pub heads: String,
    /// The body.
    pub body: String,
    /// curl's exit code.
    pub exit: i32,
    /// What curl complained of.
    pub errors: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("the body is not JSON ({error}): {self:?}"))
    }

    /// The `code` of a refusal.
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    /// A header of the last head.
    pub fn header(&self, name: &str) -> Option<String> {
        let last = self.heads.trim_end().rsplit("\r\n\r\n").next()?;
        last.lines().find_map(|line| {
            let (known, value) = line.split_once(':')?;
            known
                .eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    }

    /// Asserts a status and returns the answer.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:#?}");
        self
    }
}

/// Runs curl with `arguments`.
pub async fn curl(arguments: &[&str]) -> Answer {
    curl_as(None, arguments).await
}

/// Runs curl as another user.
pub async fn curl_as(uid: Option<u32>, arguments: &[&str]) -> Answer {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let heads = directory.path().join("heads");
    let body = directory.path().join("body");
    let mut command = Command::new("curl");
    command
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "60",
            "--noproxy",
            "",
        ])
        .arg("--dump-header")
        .arg(&heads)
        .arg("--output")
        .arg(&body)
        .args([
            "--write-out",
            "%{http_code} %{http_connect} %{http_version}",
        ])
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .stdin(Stdio::null());
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().await.expect("curl runs");
    let written = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = written.split_whitespace();
    let mut number = || {
        words
            .next()
            .and_then(|word| word.parse().ok())
            .unwrap_or_default()
    };
    Answer {
        status: number(),
        connect_status: number(),
        version: words.next().unwrap_or_default().to_owned(),
        heads: read(&heads),
        body: read(&body),
        exit: output.status.code().unwrap_or(-1),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn read(path: &std::path::Path) -> String {
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}
