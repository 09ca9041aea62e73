//! T21: a policy that permits more than was meant: by default, by a slip in what was written, or by evidence
//! that proves little.

use std::path::Path;
use std::process::Output;

use tokio::process::Command;

use crate::support::counts::reached;
use crate::support::world::World;

async fn countersign(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_countersign"))
        .args(arguments)
        .current_dir(directory)
        .output()
        .await
        .unwrap()
}

/// Where the brace that opens at `open` closes.
fn closing(text: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, character) in text[open..].char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return open + at;
        }
    }
    panic!("a brace is open: {text}")
}

/// Every slip in a policy file: an effect turned round, a principal or a condition left out, whole or in part.
fn slips(text: &str) -> Vec<String> {
    let mut slips = Vec::new();
    let replaced =
        |at: usize, length: usize, by: &str| format!("{}{by}{}", &text[..at], &text[at + length..]);
    for (effect, other) in [("permit (", "forbid ("), ("forbid (", "permit (")] {
        for (at, _) in text.match_indices(effect) {
            slips.push(replaced(at, effect.len(), other));
        }
    }
    for (at, _) in text.match_indices("principal in ") {
        let length = text[at..].find(',').unwrap();
        slips.push(replaced(at, length, "principal"));
    }
    for (keyword, nothing) in [("when {", "true"), ("unless {", "false")] {
        for (at, _) in text.match_indices(keyword) {
            let open = at + keyword.len() - 1;
            let body = &text[open + 1..closing(text, open)];
            slips.push(replaced(open + 1, body.len(), nothing));
            if nothing == "true" {
                // That something is there at all goes with what is said of it: without, nothing loads.
                let all: Vec<&str> = body.split("&&").collect();
                for (index, part) in all.iter().enumerate() {
                    if !part.contains(" has ") && all.len() > 1 {
                        let mut rest = all.clone();
                        rest.remove(index);
                        slips.push(replaced(open + 1, body.len(), &rest.join("&&")));
                    }
                }
            }
            if let Some((one, other)) = body.split_once("||") {
                slips.push(replaced(open + 1, body.len(), one));
                slips.push(replaced(open + 1, body.len(), other));
            }
        }
    }
    slips
}

/// A permit that rests on evidence which anybody on the node can have.
const OVER_BROAD: &str = r#"
@id("any-curl")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix.executable && principal.unix.executable == "/usr/bin/curl" };
"#;

#[tokio::test(flavor = "multi_thread")]
async fn t21_what_nobody_permitted_is_refused_and_slips_fail_the_tests_of_policies() {
    let world = World::start().await;
    world.good().await;
    // The caller and the destination are permitted; the method is not.
    let seen = world.api.seen().len();
    let url = "https://orders.example.test/v1/orders";
    for method in ["DELETE", "PUT", "PATCH"] {
        let answer = world.curl(&["-X", method, url]).await.expect(403);
        assert_eq!(answer.code(), "policy_denied", "{method}");
    }
    // Without a policy nothing is.
    let policies = std::fs::read_to_string(world.path("policies/all.cedar")).unwrap();
    world.write_policies("");
    world.app().reload().await.unwrap();
    let answer = world.curl(&[url]).await.expect(403);
    assert_eq!(answer.code(), "policy_denied");
    // What is too broad is not loaded.
    world.write_policies(OVER_BROAD);
    let refused = countersign(
        world.directory.path(),
        &["policy", "check", "--config", "countersign.yaml"],
    )
    .await;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    world.app().reload().await.unwrap_err();
    let answer = world.curl(&[url]).await.expect(403);
    assert_eq!(answer.code(), "policy_denied");
    assert_eq!(world.api.seen().len(), seen);
    world.write_policies(&policies);
    world.app().reload().await.unwrap();
    world.good().await;

    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/examples");
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(
        shipped.join("secret.example"),
        copy.path().join("secret.example"),
    )
    .unwrap();
    let (mut found, mut missed) = (0, Vec::new());
    for example in std::fs::read_dir(&shipped).unwrap() {
        let example = example.unwrap();
        if !example.path().is_dir() {
            continue;
        }
        let directory = copy.path().join(example.file_name());
        std::fs::create_dir(&directory).unwrap();
        for file in std::fs::read_dir(example.path()).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), directory.join(file.file_name())).unwrap();
        }
        let test = ["policy", "test", "--config", "agent.yaml"];
        let passes = countersign(&directory, &test).await;
        assert!(passes.status.success(), "{passes:?}");
        for file in std::fs::read_dir(&directory).unwrap() {
            let path = file.unwrap().path();
            if path
                .extension()
                .is_none_or(|extension| extension != "cedar")
            {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for slip in slips(&text) {
                std::fs::write(&path, &slip).unwrap();
                match countersign(&directory, &test).await.status.code() {
                    Some(1) => found += 1,
                    code => missed.push(format!("{code:?} {}:\n{slip}", path.display())),
                }
            }
            std::fs::write(&path, &text).unwrap();
        }
        let passes = countersign(&directory, &test).await;
        assert!(passes.status.success(), "{passes:?}");
    }
    assert!(missed.is_empty(), "not found:\n{}", missed.join("\n"));
    world.good().await;
    reached("slips_in_policies", found);
}
