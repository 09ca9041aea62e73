//! `--output json`: what a verb fails of is an object too.

use serde_json::Value;

use crate::program::{Finished, User};
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
