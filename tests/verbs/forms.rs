//! `--output json`: what a verb fails of is an object too.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use serde_json::Value;

use crate::program::{Finished, User, finish};
use crate::support::counts::reached;

/// Nobody is there.
const NOWHERE: &str = "/nonexistent/api.sock";

#[tokio::test]
async fn failures_are_objects_where_json_is_asked_for() {
    let user = User::new();
    user.write("wrong.yaml", "version: 2\n");
    let rows: [(&[&str], i32, bool); 7] = [
        (
            &["token", "--credential", "a", "--agent", NOWHERE],
            69,
            false,
        ),
        (&["whoami", "--agent", NOWHERE], 69, false),
        (&["ca", "--agent", NOWHERE], 69, false),
        (&["keys", "jwks", "none.pem"], 78, false),
        (&["policy", "schema", "--config", "wrong.yaml"], 78, false),
        (&["run", "--config", "wrong.yaml"], 78, true),
        (&["exec", "--agent", NOWHERE], 69, true),
    ];
    for (line, code, on_standard_error) in rows {
        let mut all = vec![line[0]];
        all.extend(&line[1..]);
        all.extend(["--output", "json"]);
        if line[0] == "exec" {
            all.extend(["--", "true"]);
        }
        let finished = user.run(&all).await.expect(code);
        let Finished { out, errors, .. } = &finished;
        let (said, silent) = match on_standard_error {
            true => (errors, out),
            false => (out, errors),
        };
        let object: Value = serde_json::from_str(said)
            .unwrap_or_else(|error| panic!("{line:?}: {error}: {finished:#?}"));
        assert!(
            object["detail"].is_string() || object["diagnostics"].is_array(),
            "{line:?}: {object}"
        );
        assert_eq!(silent, "", "{line:?}");
    }
    // What is JSON anyway takes the flag, and text is a member.
    let schema = user.run(&["schema", "--output", "json"]).await.expect(0);
    assert!(schema.json()["properties"].is_object());
    let schema = user
        .run(&["policy", "schema", "--output", "json"])
        .await
        .expect(0);
    assert!(
        schema.json()["schema"]
            .as_str()
            .unwrap()
            .contains("Workload")
    );
    reached("failures_as_objects", rows.len());
}

#[tokio::test]
async fn an_agent_that_cannot_start_says_what_to_change_and_whether_to_try_again() {
    let user = User::new();
    std::fs::create_dir(user.path("policies")).unwrap();
    user.write("file", "no socket, and no directory");
    let listens = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listens.local_addr().unwrap();
    let _other = UnixListener::bind(user.path("other.sock")).unwrap();
    let listener = |bind: &str, access: &str| {
        format!("listeners: [{{name: workloads, type: workload_api, bind: \"{bind}\"{access}}}]")
    };
    let here = user.path("").display().to_string();
    let rows = [
        (
            listener(&taken.to_string(), ""),
            69,
            "listener_not_bound",
            "another `bind`",
        ),
        (
            listener("192.0.2.1:7523", ""),
            69,
            "listener_not_bound",
            "an address of this machine",
        ),
        (
            listener(
                &format!("unix:{here}api.sock"),
                ", access: {group: no-such-group}",
            ),
            78,
            "listener_not_bound",
            "`access.group`",
        ),
        (
            listener(&format!("unix:{here}file"), ""),
            78,
            "listener_not_bound",
            "`bind`",
        ),
        (
            listener(&format!("unix:{here}other.sock"), ""),
            69,
            "listener_not_bound",
            "`bind`",
        ),
        (
            "listeners: []\nadmin: {socket: other.sock}".to_owned(),
            69,
            "admin_socket_unusable",
            "end the agent",
        ),
        (
            format!("listeners: []\nadmin: {{metrics_bind: \"{taken}\"}}"),
            69,
            "metrics_bind_unusable",
            "`admin.metrics_bind`",
        ),
        (
            "listeners: []\ninterception: {ca: {state_directory: file}}".to_owned(),
            78,
            "interception_unusable",
            "`interception.ca`",
        ),
        (
            "listeners: []\ninterception: {ca: {source: memory}, ca_certificate_file: file/ca.pem}"
                .to_owned(),
            78,
            "interception_unusable",
            "`interception.ca_certificate_file`",
        ),
    ];
    for (sections, exit_code, code, next) in rows {
        let text = format!("version: 1\ncredentials: []\ndestinations: []\n{sections}\n");
        user.write("agent.yaml", &text);
        let line = ["run", "--config", "agent.yaml", "--output", "json"];
        let finished = user.run(&line).await.expect(exit_code);
        let said = finished.errors.lines().last().unwrap();
        let problem = &serde_json::from_str::<Value>(said).unwrap()["diagnostics"][0];
        assert_eq!(problem["code"], code, "{finished:#?}");
        let said = problem["next"].as_str().unwrap();
        assert!(said.contains(next), "{code}: {said}");
        assert!(
            code != "listener_not_bound" || said.contains("`name: workloads`"),
            "{said}"
        );
    }
}

/// What an operator pastes, but for the build and the service manager, with the system's directories elsewhere.
#[tokio::test]
async fn what_the_installation_describes_is_valid() {
    let user = User::new();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/install.md")).unwrap();
    let (_, steps) = page.split_once("```sh\n").unwrap();
    let (steps, _) = steps.split_once("```").unwrap();
    let steps = steps.replace("$(deploy/build)", env!("CARGO_BIN_EXE_countersign"));
    assert!(!steps.contains("deploy/build"));
    for directory in ["/usr/bin", "/etc/systemd/system"] {
        std::fs::create_dir_all(user.path(&directory[1..])).unwrap();
    }
    let steps = [" /usr/", " /etc/", ">/etc/"]
        .iter()
        .fold(steps, |steps, start| {
            let (before, directory) = start.split_at(1);
            let elsewhere = format!("{before}{}{directory}", user.path("").display());
            steps.replace(start, &elsewhere.replace("//", "/"))
        });
    let mut command = user.command("sh");
    command.current_dir(root).args(["-ec", &steps]);
    let finished = finish(command).await.expect(0);
    assert!(
        finished.out.contains("agent.yaml is valid"),
        "{finished:#?}"
    );
    assert_eq!(finished.errors, "");
    for installed in [
        "usr/bin/countersign",
        "etc/systemd/system/countersign.socket",
    ] {
        assert!(user.path(installed).exists(), "{installed}");
    }
}
