//! CI jobs under `countersign exec` and with `countersign token`: no key on the machine, for longer
//! than the job's token lives, in the workload's own name.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::job::{API, Job, REQUEST_TOKEN, SUBJECT, Token, mint};
use crate::program::{Finished, finish, send};
use crate::support::counts::reached;
use crate::support::puppet::reachable;
use crate::support::world::{assert_issued, audit_lines};
use crate::support::{eventually, has_program, unprivileged};

/// How long the job's tokens live, and those that it gets for them.
const LIFETIME: Duration = Duration::from_secs(8);
/// How long the job runs: more than two lives of a token.
const RUNS_FOR: Duration = Duration::from_secs(20);

/// What a job does in Python, with nothing but the standard library.
const PYTHON: &str = r#"
import json, sys, time, urllib.request
until = time.monotonic() + float(sys.argv[1])
jtis, served = set(), 0
while time.monotonic() < until:
    with urllib.request.urlopen(sys.argv[2]) as answer:
        verified = json.load(answer)["verified"]
    assert verified["sub"] == sys.argv[3], verified
    jtis.add(verified["jti"])
    served += 1
    time.sleep(0.25)
print(json.dumps({"served": served, "tokens": len(jtis)}))
"#;

/// The same for a shell with curl.
const SHELL: &str = r#"
served=0
end=$(($(date +%s) + $1))
while [ "$(date +%s)" -lt "$end" ]; do
    answer=$(curl -sS --fail "$2") || exit 1
    case "$answer" in *"\"sub\":\"$3\""*) served=$((served + 1));; *) echo "$answer" >&2; exit 1;; esac
    sleep 0.25
done
echo "{\"served\": $served}"
"#;

/// What is true of every job that went on for longer than its token.
#[track_caller]
fn assert_served(job: &Job, finished: &Finished, first_token: Option<&str>) -> usize {
    let answer: Value = finished.json();
    let served = usize::try_from(answer["served"].as_u64().unwrap()).unwrap();
    let seen = job.world.api.seen();
    assert_eq!(seen.len(), served, "{finished:#?}");
    for seen in &seen {
        assert_issued(&job.world, seen);
        assert!(!seen.headers.contains_key("proxy-authorization"));
    }
    let assertions = job.assertions();
    assert!(assertions.len() >= 3, "{} assertions", assertions.len());
    if let Some(first) = first_token {
        // Byte for byte the token that the CI system issued.
        assert_eq!(assertions[0], first);
    }
    job.assert_the_log_names_the_workload();
    job.assert_no_key_is_on_the_machine();
    let requests: Vec<Value> = audit_lines(&job.user.path("audit.jsonl"))
        .into_iter()
        .filter(|line| line["kind"] == "request")
        .collect();
    assert_eq!(requests.len(), served);
    let text = std::fs::read_to_string(job.user.path("audit.jsonl")).unwrap();
    assert!(assertions.iter().all(|token| !text.contains(token)));
    served
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_job_outlives_the_token_in_its_file() {
    if !has_program("a_python_job_outlives_the_token_in_its_file", "python3") {
        return;
    }
    let job = Job::new().await;
    job.world
        .authorization_server
        .state()
        .set_token_lifetime(LIFETIME);
    let first = job.token(LIFETIME);
    job.write_token(&first);
    job.user.write("job.py", PYTHON);
    let seconds = RUNS_FOR.as_secs().to_string();
    let command = job.exec(
        Token::InFile,
        &["python3", "job.py", &seconds, API, SUBJECT],
    );
    let mut running = std::pin::pin!(finish(command));
    // The CI system writes a new token well before the old one ends.
    let finished = loop {
        tokio::select! {
            finished = &mut running => break finished,
            () = tokio::time::sleep(LIFETIME / 4) => job.write_token(&job.token(LIFETIME)),
        }
    };
    let finished = finished.expect(0);
    assert!(finished.errors.contains("presenting the token of `token`"));
    let served = assert_served(&job, &finished, Some(&first));
    reached("python_served", served);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_job_outlives_the_token_of_its_token_service() {
    let job = Job::new().await;
    job.world
        .authorization_server
        .state()
        .set_token_lifetime(LIFETIME);
    let service = job.token_service(LIFETIME).await;
    job.user.write("job.sh", SHELL);
    let seconds = RUNS_FOR.as_secs().to_string();
    let script = ["sh", "job.sh", &seconds, API, SUBJECT];
    let finished = finish(job.exec(Token::Of(&service), &script))
        .await
        .expect(0);
    assert!(finished.errors.contains("the CI's token service"));
    let served = assert_served(&job, &finished, None);
    reached("shell_served", served);
    // One token for each third of a life or so, not one for each request.
    let asked = service.heads().len();
    assert!((3..=10).contains(&asked), "{asked} tokens were asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_asks_for_tokens_for_longer_than_its_own_lives() {
    let job = Job::new().await;
    let service = job.token_service(LIFETIME).await;
    let began = Instant::now();
    let mut tokens = Vec::new();
    while tokens.is_empty() || began.elapsed() < LIFETIME * 2 {
        let token = finish(job.ask(Token::Of(&service), &[]))
            .await
            .expect(0)
            .out;
        let token = token.trim().to_owned();
        let answer = ask_directly(&job, &token).await;
        assert_eq!(answer.json()["verified"]["sub"], SUBJECT, "{answer:#?}");
        assert!(!tokens.contains(&token));
        tokens.push(token);
        tokio::time::sleep(LIFETIME / 3).await;
    }
    job.assert_the_log_names_the_workload();
    job.assert_no_key_is_on_the_machine();
    let text = std::fs::read_to_string(job.user.path("audit.jsonl")).unwrap();
    assert!(tokens.iter().all(|token| !text.contains(token)));
    let records = audit_lines(&job.user.path("audit.jsonl"));
    let issues = records.iter().filter(|line| line["kind"] == "token_issue");
    assert_eq!(issues.count(), tokens.len());
    reached("script_tokens", tokens.len());

    // Fewer scopes at most, never more; and the form that programs read.
    let answer = finish(job.ask(
        Token::Of(&service),
        &["--scope", "orders.read", "--output", "json"],
    ))
    .await
    .expect(0)
    .json();
    assert_eq!(answer["scope"], "orders.read");
    assert_eq!(answer["token_type"], "Bearer");
    let more = finish(job.ask(Token::Of(&service), &["--scope", "orders.write"]))
        .await
        .expect(64);
    assert!(more.errors.contains("scope `orders.write`"), "{more:#?}");
    assert_eq!(more.out, "");
}

/// The API, without the agent.
async fn ask_directly(job: &Job, token: &str) -> Finished {
    let mut command = job.user.command("curl");
    command
        .args(["-sS", "--fail", "--cacert", "servers.pem", "--connect-to"])
        .arg(format!(
            "orders.example.test:443:{}",
            job.world.api.address()
        ))
        .args(["-H", &format!("authorization: Bearer {token}"), API]);
    finish(command).await.expect(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_repositorys_job_and_one_without_a_token_get_nothing() {
    let job = Job::new().await;
    let service = job.token_service(LIFETIME).await;
    let long = Duration::from_secs(300);
    let curl = ["curl", "-sS", API];
    let good = || async {
        job.write_token(&job.token(long));
        let answer = finish(job.exec(Token::InFile, &curl)).await.expect(0);
        assert_eq!(answer.json()["verified"]["sub"], SUBJECT, "{answer:#?}");
        assert!(!answer.errors.contains("none to present"), "{answer:#?}");
    };
    good().await;
    let key = job.world.issuer.signing_key();
    let mut refused = 0;

    job.write_token(&mint(&key, "mallory/orders", long));
    let answer = finish(job.exec(Token::InFile, &curl)).await.expect(0);
    assert_eq!(answer.json()["code"], "policy_denied", "{answer:#?}");
    refused += 1;

    let answer = finish(job.ask(Token::InFile, &[])).await.expect(77);
    assert!(answer.errors.contains("orders-api"), "{answer:#?}");
    refused += 1;

    // Nothing is presented.
    let answer = finish(job.exec(Token::Missing, &curl)).await.expect(0);
    assert_eq!(answer.json()["code"], "proxy_token_required");
    for said in [
        "none to present",
        "`permissions: {id-token: write}`",
        "`id_tokens`",
    ] {
        assert!(answer.errors.contains(said), "{answer:#?}");
    }
    refused += 1;
    finish(job.ask(Token::Missing, &[])).await.expect(77);
    refused += 1;

    // There is no token where one is promised: the command is not run.
    std::fs::remove_file(job.user.path("token")).unwrap();
    let answer = finish(job.exec(Token::InFile, &curl)).await.expect(69);
    assert!(answer.errors.contains("the token file `token`"));
    refused += 1;
    let mut command = job.ask(Token::Of(&service), &[]);
    command.env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "another");
    let answer = finish(command).await.expect(69);
    assert!(
        answer.errors.contains("token service answers 401"),
        "{answer:#?}"
    );
    assert!(!answer.errors.contains("another"), "{answer:#?}");
    refused += 1;

    good().await;
    assert_eq!(job.world.api.seen().len(), 2);
    reached("jobs_refused", refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_own_verbs_answer_about_the_job() {
    let job = Job::new().await;
    let service = job.token_service(Duration::from_secs(300)).await;
    let script = format!(
        "countersign whoami --output json >who.json
         countersign token --credential orders-api --output json >token.json
         curl -sS -X DELETE {API}/7 >denied.json
         countersign policy explain \"$(sed 's/.*\"request_id\":\"\\([^\"]*\\)\".*/\\1/' denied.json)\" >explained.txt
         countersign exec -- curl -sS {API} >nested.json
         countersign ca >ours.pem"
    );
    finish(job.exec(Token::Of(&service), &["sh", "-ec", &script]))
        .await
        .expect(0);
    let read = |name: &str| std::fs::read_to_string(job.user.path(name)).unwrap();
    let json = |name: &str| serde_json::from_str::<Value>(&read(name)).unwrap();
    let who = json("who.json");
    assert_eq!(
        who["attributes"]["ci"]["repository"], "acme/orders",
        "{who}"
    );
    assert!(who["identity"].as_str().unwrap().contains(SUBJECT), "{who}");
    assert!(json("token.json")["access_token"].is_string());
    assert_eq!(json("denied.json")["code"], "policy_denied");
    let explained = read("explained.txt");
    assert!(
        explained.starts_with("denied  policy_denied"),
        "{explained}"
    );
    assert!(explained.contains("was false (DELETE)"), "{explained}");
    assert_eq!(json("nested.json")["verified"]["sub"], SUBJECT);
    assert!(read("ours.pem").starts_with("-----BEGIN CERTIFICATE-----"));
    job.assert_the_log_names_the_workload();
    assert_eq!(job.world.api.seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_holds_no_token() {
    let job = Job::new().await;
    let service = job.token_service(Duration::from_secs(300)).await;
    // All that the command and its parent were started with, and all that was written for it.
    let script = "tr '\\0' '\\n' </proc/self/environ
        cat /proc/self/cmdline /proc/$PPID/cmdline
        cat \"$(dirname \"$SSL_CERT_FILE\")\"/*
        curl -sS https://orders.example.test/v1/orders";
    let finished = finish(job.exec(Token::Of(&service), &["sh", "-c", script]))
        .await
        .expect(0);
    let assertions = job.assertions();
    assert_eq!(assertions.len(), 1);
    let held = format!("{}{}", finished.out, finished.errors);
    assert!(held.contains("https_proxy=http://127.0.0.1:"), "{held}");
    assert!(held.contains("\"verified\""));
    // Neither the token, nor what another can be had for, nor a key.
    let signature = assertions[0].rsplit('.').next().unwrap();
    for secret in [signature, REQUEST_TOKEN, "ACTIONS_ID_TOKEN", "PRIVATE KEY"] {
        assert!(!held.contains(secret), "{secret}");
    }
    // What was set is said.
    for name in [
        "https_proxy",
        "SSL_CERT_FILE",
        "NODE_EXTRA_CA_CERTS",
        "JAVA_TOOL_OPTIONS",
    ] {
        assert!(finished.errors.contains(name), "{finished:#?}");
    }
    // What was written for the command is gone with it.
    let left = std::fs::read_dir(job.user.path("."))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("countersign-"))
        .count();
    assert_eq!(left, 0);
}

/// What a command may do, and what it gets of the process that runs it.
const FREEDOM: &str = r#"
grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status
ulimit -c
if [ "$1" ]; then cat "/proc/$PPID/$1"; fi
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_command_is_not_confined_and_its_agent_shows_it_nothing() {
    let job = Job::new().await;
    let service = job.token_service(LIFETIME).await;
    let uid = unprivileged();
    let program = reachable(env!("CARGO_BIN_EXE_countersign").into(), "exec");
    let as_user = |mut command: Command| {
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        command
    };
    if let Some(uid) = uid {
        for path in [job.user.path("."), job.user.path("policies")] {
            nix::unistd::chown(&path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).unwrap();
        }
    }
    let free = as_user({
        let mut command = job.user.command("sh");
        command.args(["-c", FREEDOM]);
        command
    });
    let free = finish(free).await.expect(0).out;
    let run = |looks_at: &'static str| {
        let built = job.exec(Token::Of(&service), &["sh", "-c", FREEDOM, "sh", looks_at]);
        let mut shown = job.user.command(&program);
        shown.args(built.as_std().get_args());
        for (name, value) in built.as_std().get_envs() {
            shown.env(name, value.unwrap_or_default());
        }
        finish(as_user(shown))
    };
    assert_eq!(run("").await.expect(0).out, free);
    // Its own token stands there: a command that could read it would have it.
    let refused = run("environ").await.expect(1);
    assert_eq!(refused.out, free);
    assert!(refused.errors.contains("Permission denied"), "{refused:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_the_command_gets_the_token_of_its_relay() {
    let job = Job::new().await;
    let service = job.token_service(Duration::from_secs(300)).await;
    let script = "cp \"$SSL_CERT_FILE\" roots.pem; echo \"$https_proxy\"; exec sleep 60";
    let mut command = job.exec(Token::Of(&service), &["sh", "-c", script]);
    let mut child = command
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let relay = lines.next_line().await.unwrap().unwrap();
    // We are not the command's: what connects for us is told nothing.
    let mut curl = job.user.command("curl");
    curl.args(["-sS", "-x", &relay, "--cacert", "roots.pem", API]);
    let stranger = finish(curl).await;
    assert_ne!(stranger.code, 0, "{stranger:#?}");
    assert_eq!(stranger.out, "");
    let mut curl = job.user.command("curl");
    curl.args(["-sS", &format!("{relay}/v1/whoami")]);
    let stranger = finish(curl).await;
    assert_ne!(stranger.code, 0, "{stranger:#?}");
    assert!(job.world.api.seen().is_empty());
    send(child.id().unwrap(), Signal::SIGTERM);
    let status = eventually(Duration::from_secs(20), || {
        let status = child.try_wait().unwrap();
        async move { status }
    })
    .await;
    assert_eq!(status.code(), Some(128 + 15));
}
