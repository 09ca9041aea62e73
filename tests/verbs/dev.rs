//! The first hour: what `countersign dev` prints works as it is printed, and stays.

use std::net::TcpListener;
use std::time::{Duration, SystemTime};

use countersign::config::SigningAlgorithm;
use countersign::jwt::{SigningKey, numeric_date, unique_id};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpSocket;
use tokio::process::{Child, ChildStdout};

use crate::program::{Finished, User, send};
use crate::support::counts::reached;
use crate::support::{eventually, hold_port};

const API: &str = "https://orders.countersign.test";
const AUTHORIZATION_SERVER: &str = "https://auth.countersign.test";

/// A running `countersign dev`.
pub struct Dev {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// What it printed until it was ready.
    printed: Vec<String>,
}

impl Dev {
    /// Starts it and reads up to the line that `is_last`.
    async fn start(user: &User, arguments: &[&str], is_last: impl Fn(&str) -> bool) -> Self {
        let mut command = user.countersign(&[&["dev"], arguments].concat());
        let mut child = command
            .stderr(std::process::Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut printed = Vec::new();
        loop {
            let line = tokio::time::timeout(Duration::from_secs(60), lines.next_line())
                .await
                .expect("dev is ready in a minute")
                .unwrap()
                .expect("dev goes on");
            let is_last = is_last(&line);
            printed.push(line);
            if is_last {
                break;
            }
        }
        Self {
            child,
            lines,
            printed,
        }
    }

    pub async fn in_text(user: &User) -> Self {
        Self::start(user, &["--port", "0"], |line| line.starts_with("Keep it: ")).await
    }

    /// What stands behind `label` in what was printed.
    pub fn said(&self, label: &str) -> &str {
        self.printed
            .iter()
            .find_map(|line| line.trim_start().strip_prefix(label))
            .unwrap_or_else(|| panic!("`{label}` is not in {:#?}", self.printed))
            .trim()
    }

    /// The address in parentheses behind `label`.
    fn address(&self, label: &str) -> String {
        let (_, rest) = self.said(label).split_once('(').unwrap();
        rest.split([';', ')']).next().unwrap().to_owned()
    }

    /// Ctrl-C.
    pub async fn interrupt(mut self) {
        send(self.child.id().unwrap(), Signal::SIGINT);
        let status = tokio::time::timeout(Duration::from_secs(30), self.child.wait())
            .await
            .expect("dev ends")
            .unwrap();
        assert_eq!(status.code(), Some(0));
    }
}

/// The last two records, once there are two of requests: they are written within 50 ms of the answer.
async fn two_records(user: &User, line: &str) -> Vec<String> {
    eventually(Duration::from_secs(30), || async move {
        let record = user.sh(line).await.expect(0);
        let lines: Vec<String> = record.out.lines().map(str::to_owned).collect();
        (lines.len() == 2 && lines.iter().all(|line| line.contains(" orders/v1/orders")))
            .then_some(lines)
    })
    .await
}

#[tokio::test]
async fn the_three_lines_that_dev_prints_run_in_sh_unchanged() {
    let user = User::new();
    let dev = Dev::in_text(&user).await;
    let (injected, denied, record) = (
        dev.said("1 injected"),
        dev.said("2 denied"),
        dev.said("3 the record"),
    );

    let answer = user.sh(injected).await.expect(0);
    let body = answer.json();
    assert_eq!(body["orders"].as_array().unwrap().len(), 2, "{body}");
    assert_eq!(body["verified"]["scope"], "orders.read");
    assert_eq!(body["caller_sent_authorization"], false);
    assert!(!body["verified"]["jti"].as_str().unwrap().is_empty());

    let answer = user.sh(denied).await.expect(0);
    let (heads, body) = answer.out.rsplit_once("\r\n\r\n").unwrap();
    let last = heads.rsplit("\r\n\r\n").next().unwrap().to_lowercase();
    assert!(last.split(' ').nth(1).unwrap().starts_with("403"), "{last}");
    assert!(last.contains("content-type: application/problem+json"));
    assert!(last.contains("proxy-status: countersign;"), "{last}");
    let problem: Value = serde_json::from_str(body).unwrap();
    assert_eq!(problem["code"], "policy_denied");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("`DELETE /v1/orders/7`"), "{detail}");
    assert!(detail.contains("`orders-api`"), "{detail}");
    let id = problem["request_id"].as_str().unwrap();

    let lines = two_records(&user, record).await;
    assert!(lines[0].contains(" allow "), "{lines:#?}");
    assert!(lines[0].contains("GET orders/v1/orders 200, orders-read"));
    assert!(lines[1].contains(" deny "), "{lines:#?}");
    assert!(lines[1].contains("DELETE orders/v1/orders/7 403 policy_denied"));
    assert!(lines[1].contains(id));
    reached("pasted_lines", 3);

    // The next step that the refusal names is a line to paste as well.
    let next = problem["next"].as_str().unwrap();
    let command = next
        .split('`')
        .find(|part| part.starts_with("countersign "));
    let explained = user.sh(command.unwrap_or(next)).await.expect(0);
    assert!(explained.out.starts_with("denied  policy_denied"));
    assert!(
        explained.out.contains("was false (DELETE)"),
        "{explained:#?}"
    );

    // The other verbs find this agent by themselves.
    let whoami = user.run(&["whoami"]).await.expect(0);
    let uid = nix::unistd::getuid();
    assert!(whoami.out.starts_with(&format!("uid {uid}")), "{whoami:#?}");
    assert!(whoami.out.contains(&format!("unix.uid = {uid}\n")));
    assert!(whoami.out.contains("seen by      "));
    let under_exec = user
        .run(&["exec", "--", "curl", "-sS", &format!("{API}/v1/orders")])
        .await
        .expect(0);
    assert_eq!(under_exec.json()["verified"]["scope"], "orders.read");
    dev.interrupt().await;
    user.run(&["whoami"]).await.expect(69);
}

#[tokio::test]
async fn the_api_of_dev_wants_its_own_issuers_token() {
    let user = User::new();
    let dev = Dev::in_text(&user).await;
    let runtime = user.path("countersign-dev");
    let roots = runtime.join("servers-ca.pem").display().to_string();
    let (api, server) = (dev.address("API "), dev.address("token server "));
    let curl = |url: String, host_at: String, arguments: Vec<String>| {
        let mut command = user.command("curl");
        let line = ["-sS", "--cacert", &roots, "--connect-to", &host_at];
        command.args(line).args(arguments).arg(url);
        async move { crate::program::finish(command).await }
    };
    let ask_api = |token: Option<String>| {
        let mut arguments: Vec<String> = vec!["-w".into(), "\n%{http_code}".into()];
        if let Some(token) = token {
            arguments.extend(["-H".into(), format!("authorization: Bearer {token}")]);
        }
        let answer = curl(
            format!("{API}/v1/orders"),
            format!("orders.countersign.test:443:{api}"),
            arguments,
        );
        async move {
            let Finished { code, out, errors } = answer.await;
            assert_eq!(code, 0, "{errors}");
            let (body, status) = out.rsplit_once('\n').unwrap();
            let body: Value = serde_json::from_str(body).unwrap();
            (status.parse::<u16>().unwrap(), body)
        }
    };

    let token = user
        .run(&["token", "--credential", "orders-api"])
        .await
        .expect(0);
    let good = token.out.trim().to_owned();
    assert_eq!(ask_api(Some(good.clone())).await.0, 200);

    let now = numeric_date(SystemTime::now());
    let claims = json!({
        "iss": AUTHORIZATION_SERVER, "sub": "countersign-dev", "client_id": "countersign-dev",
        "scope": "orders.read", "aud": API, "jti": unique_id(), "iat": now, "exp": now + 60,
    });
    let (another_key, _) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
    let by_another_key = another_key.sign("at+jwt", &claims).unwrap();

    // A token of the same server for another API, obtained with the agent's own key.
    let key = std::fs::read(runtime.join("client.pem")).unwrap();
    let key = SigningKey::parse(&key, SigningAlgorithm::Es256).unwrap();
    let assertion = json!({
        "iss": "countersign-dev", "sub": "countersign-dev", "aud": AUTHORIZATION_SERVER,
        "jti": unique_id(), "iat": now, "exp": now + 60,
    });
    let assertion = key.sign("JWT", &assertion).unwrap();
    let form = [
        "grant_type=client_credentials".to_owned(),
        "client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-bearer".to_owned(),
        format!("client_assertion={assertion}"),
        "resource=https://other.example.test".to_owned(),
    ];
    let form = form
        .into_iter()
        .flat_map(|parameter| ["--data-urlencode".to_owned(), parameter])
        .collect();
    let answer = curl(
        format!("{AUTHORIZATION_SERVER}/token"),
        format!("auth.countersign.test:443:{server}"),
        form,
    )
    .await
    .expect(0);
    let for_another_api = answer.json()["access_token"].as_str().unwrap().to_owned();

    let mut refused = 0;
    for (name, token) in [
        ("no token", None),
        ("another key", Some(by_another_key)),
        ("another aud", Some(for_another_api)),
    ] {
        let (status, body) = ask_api(token).await;
        assert_eq!(status, 401, "{name}: {body}");
        assert_eq!(body["error"], "invalid_token", "{name}");
        refused += 1;
    }
    // A token that it took a minute ago.
    let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(expiry(&good) + 1);
    let left = expires
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    tokio::time::sleep(left).await;
    let (status, body) = ask_api(Some(good)).await;
    assert_eq!((status, &body["error"]), (401, &json!("invalid_token")));
    reached("unauthorized", refused + 1);

    let token = user
        .run(&["token", "--credential", "orders-api"])
        .await
        .expect(0);
    assert_eq!(ask_api(Some(token.out.trim().to_owned())).await.0, 200);
    dev.interrupt().await;
}

/// Holds the ports that a configuration names as soon as they are free.
async fn hold_ports(configuration: &str) -> Vec<TcpSocket> {
    let mut held = Vec::new();
    for named in configuration.split("\"127.0.0.1:").skip(1) {
        let (port, _) = named.split_once('"').unwrap();
        let port = port.parse().unwrap();
        let free = eventually(Duration::from_secs(30), || async { hold_port(port).ok() });
        held.push(free.await.0);
    }
    held
}

/// `exp` of a JWT, unverified.
fn expiry(token: &str) -> u64 {
    use base64::Engine;
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token.split('.').nth(1).unwrap())
        .unwrap();
    let claims: Value = serde_json::from_slice(&payload).unwrap();
    claims["exp"].as_u64().unwrap()
}

#[tokio::test]
async fn the_configuration_that_dev_leaves_is_taken_by_run_as_it_is() {
    let user = User::new();
    // Whatever else runs on this machine uses the port that is usual; this test wants one that stays free.
    let _usual = TcpListener::bind("127.0.0.1:7525");
    let dev = Dev::in_text(&user).await;
    let injected = dev.said("1 injected").to_owned();
    let keep = dev.said("Keep it:").to_owned();
    user.sh(&injected).await.expect(0);
    let path = user.path("countersign-dev/countersign.yaml");
    let kept = std::fs::read_to_string(&path).unwrap();
    let (_held, ()) = tokio::join!(hold_ports(&kept), dev.interrupt());
    user.run(&["validate", "--config", path.to_str().unwrap()])
        .await
        .expect(0);

    // The embedded servers again, on the ports that the configuration names, with an agent that is in
    // nobody's way.
    let mut elsewhere = kept.clone();
    for name in [
        "proxy.sock",
        "api.sock",
        "admin.sock",
        "audit.jsonl",
        "/ca.pem",
    ] {
        elsewhere = elsewhere.replace(name, &name.replace('.', "-of-servers."));
    }
    let elsewhere: String = elsewhere
        .lines()
        .map(|line| match line.split_once("bind: \"127.0.0.1:") {
            Some((before, after)) => {
                let (_, after) = after.split_once('"').unwrap();
                format!("{before}bind: \"127.0.0.1:0\"{after}\n")
            }
            None => format!("{line}\n"),
        })
        .collect();
    let copy = user.write("elsewhere.yaml", &elsewhere);
    let servers = Dev::start(
        &user,
        &["--config", copy.to_str().unwrap(), "--output", "json"],
        |_| true,
    )
    .await;
    assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);

    // The line as it was printed.
    let mut command = user.command("sh");
    let mut running = command
        .args(["-c", &format!("exec {keep}")])
        .stderr(std::process::Stdio::inherit())
        .spawn()
        .unwrap();
    let answer = eventually(Duration::from_secs(30), || async {
        let answer = user.sh(&injected).await;
        (answer.code == 0).then_some(answer)
    })
    .await;
    assert_eq!(
        answer.json()["verified"]["scope"],
        "orders.read",
        "{answer:#?}"
    );
    send(running.id().unwrap(), Signal::SIGTERM);
    assert_eq!(running.wait().await.unwrap().code(), Some(0));
    servers.interrupt().await;
}

#[tokio::test]
async fn dev_prints_one_line_of_json_once_it_is_ready() {
    let user = User::new();
    // The usual port is taken: a free one is as good.
    let taken = TcpListener::bind("127.0.0.1:7523");
    let mut dev = Dev::start(&user, &["--output", "json"], |_| true).await;
    let ready: Value = serde_json::from_str(&dev.printed[0]).unwrap();
    let members: Vec<&str> = ready
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected = vec![
        "proxy",
        "gateway",
        "ca_certificate",
        "api",
        "token_endpoint",
        "admin_socket",
        "audit",
        "policies",
        "config",
    ];
    assert_eq!(
        members.iter().collect::<std::collections::BTreeSet<_>>(),
        expected.iter().collect::<std::collections::BTreeSet<_>>()
    );
    for name in [
        "ca_certificate",
        "admin_socket",
        "audit",
        "policies",
        "config",
    ] {
        let path = ready[name].as_str().unwrap();
        assert!(std::path::Path::new(path).exists(), "{name}: {path}");
    }
    expected.retain(|name| ready[*name].is_string());
    reached("members", expected.len());
    let proxy = ready["proxy"].as_str().unwrap();
    assert!(proxy.starts_with("http://127.0.0.1:"), "{proxy}");
    assert!(!proxy.ends_with(":7523"), "{proxy}");
    drop(taken);

    let root = ready["ca_certificate"].as_str().unwrap();
    let api = ready["api"].as_str().unwrap();
    let through_proxy = format!("curl -sS -x {proxy} --cacert {root} {api}/v1/orders");
    let answer = user.sh(&through_proxy).await.expect(0);
    assert_eq!(answer.json()["verified"]["scope"], "orders.read");
    let gateway = ready["gateway"].as_str().unwrap();
    let through_gateway = format!("curl -sS {gateway}/v1/orders");
    let answer = user.sh(&through_gateway).await.expect(0);
    assert_eq!(answer.json()["verified"]["scope"], "orders.read");

    send(dev.child.id().unwrap(), Signal::SIGTERM);
    assert_eq!(dev.child.wait().await.unwrap().code(), Some(0));
    // It was the only line.
    assert_eq!(dev.lines.next_line().await.unwrap(), None);
}

#[tokio::test]
async fn a_policy_that_was_edited_is_kept_and_dev_says_where() {
    let user = User::new();
    let policy = user.path("countersign-dev/policies/orders.cedar");
    let dev = Dev::in_text(&user).await;
    dev.interrupt().await;
    let says = "your policies/orders.cedar of last time is kept beside it, as policies/orders.cedar.before";
    for (edited, in_json) in [("// In text.\n", false), ("// In JSON.\n", true)] {
        std::fs::write(&policy, edited).unwrap();
        let (dev, said) = match in_json {
            false => {
                let dev = Dev::in_text(&user).await;
                let said = dev.printed.concat();
                (dev, said)
            }
            true => {
                let line = "exec countersign dev --port 0 --output json 2>errors";
                let mut child = user.command("sh").args(["-c", line]).spawn().unwrap();
                let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
                let printed = vec![lines.next_line().await.unwrap().unwrap()];
                let dev = Dev {
                    child,
                    lines,
                    printed,
                };
                (dev, std::fs::read_to_string(user.path("errors")).unwrap())
            }
        };
        assert!(said.contains(says), "{said}");
        let kept = std::fs::read_to_string(policy.with_extension("cedar.before")).unwrap();
        assert_eq!(kept, edited);
        dev.interrupt().await;
    }
}
