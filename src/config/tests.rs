//! Whole configurations: those that load, and a table of those that must not.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::counts::reached_in;
use crate::diagnostics::Diagnostics;
use crate::jwt::SigningKey;

const WHOLE: &str = include_str!("../../tests/corpora/config/whole.yaml");

/// A directory with every file that the whole example names.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let certificate = rcgen::generate_simple_self_signed(["ca.example.com".to_owned()]).unwrap();
    for name in ["ci-ca.pem", "auth-ca.pem", "api-ca.pem"] {
        fs::write(path.join(name), certificate.cert.pem()).unwrap();
    }
    let (_, key) = SigningKey::generate(SigningAlgorithm::Es256).unwrap();
    let large = "-".repeat(64 * 1024 + 1);
    for (name, content) in [
        ("client.pem", key.as_str()),
        ("secret", "a secret"),
        ("blank", "\n"),
        ("large", large.as_str()),
    ] {
        fs::write(path.join(name), content).unwrap();
        fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    for name in ["policies", "conf.d"] {
        fs::create_dir(path.join(name)).unwrap();
    }
    fs::write(path.join("empty.pem"), "").unwrap();
    fs::write(path.join("conf.d/a.yaml"), "{}").unwrap();
    directory
}

fn load(directory: &Path, text: &str) -> Result<Config, Diagnostics> {
    let path = directory.join("agent.yaml");
    fs::write(&path, text).unwrap();
    Config::load(&path)
}

#[test]
fn the_whole_example_loads() {
    let directory = directory();
    let config = load(directory.path(), WHOLE)
        .unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    assert_eq!(config.workers, Some(4));
    assert_eq!(config.listeners.len(), 4);
    assert_eq!(config.listeners[1].access.mode, Some(0o660));
    let ListenerKind::Gateway { destination } = &config.listeners[2].kind else {
        panic!("the third listener is a gateway");
    };
    assert!(Arc::ptr_eq(destination, &config.destinations[0]));
    assert_eq!(
        config.attestors.oidc_issuers[0].claims["ref"],
        AttributeType::String
    );
    let TokenSource::OauthClientCredentials(source) = &config.credentials[0].source;
    assert_eq!(source.resources[0].as_str(), "https://orders.example.com");
    assert_eq!(
        source.ca_file.as_deref(),
        Some(directory.path().join("auth-ca.pem").as_path())
    );
    assert!(config.destinations[0].paths.is_match("/v1/orders"));
    assert_eq!(
        config.destinations[0].timeouts.idle,
        Duration::from_secs(600)
    );
    assert_eq!(config.limits.connections, 4096);
    for name in [
        "agent.yaml",
        "conf.d",
        "conf.d/a.yaml",
        "client.pem",
        "auth-ca.pem",
        "api-ca.pem",
        "ci-ca.pem",
    ] {
        assert!(
            config.watched_files.contains(&directory.path().join(name)),
            "{name}"
        );
    }
}

#[test]
fn what_is_not_written_has_its_default() {
    let directory = directory();
    let text = r#"
version: 1
listeners: [{name: proxy, type: forward_proxy, bind: "127.0.0.1:7523"}]
credentials:
  - {name: a, type: oauth_client_credentials, issuer: "https://auth.example.com", client_id: a, scopes: [x, y],
     client_authentication: {method: client_secret_basic, secret_file: secret}}
destinations: [{name: a, hosts: [a.example.com], credentials: [{name: a}]}]
"#;
    let config = load(directory.path(), text).unwrap();
    let destination = &config.destinations[0];
    assert_eq!(destination.scheme, Scheme::Https);
    assert_eq!(destination.ports, [443]);
    assert_eq!(destination.paths.patterns, ["/**"]);
    assert_eq!(destination.mode, Mode::Enforce);
    assert_eq!(*destination.credentials[0].scopes, ["x", "y"]);
    assert_eq!(destination.credentials[0].inject.header, "authorization");
    assert_eq!(
        destination.credentials[0].inject.format,
        InjectionFormat::Bearer
    );
    assert_eq!(config.unmatched, Unmatched::Refuse);
    assert_eq!(
        config.interception.unwrap().source,
        CaSource::Generated {
            state_directory: "/run/countersign/ca".into()
        }
    );
    assert_eq!(config.policy_directory, directory.path().join("policies"));
    assert_eq!(config.audit.on_failure, OnAuditFailure::Block);
    assert_eq!(config.audit.sinks, [AuditSink::Stdout]);
    assert_eq!(
        config.admin,
        AdminConfig {
            socket: None,
            metrics_bind: None
        }
    );
    assert_eq!(
        config.log,
        LogConfig {
            format: LogFormat::Text,
            level: "info".to_owned()
        }
    );
}

#[test]
fn included_lists_append_and_sections_stand_once() {
    let directory = directory();
    let main = "{version: 1, include: [conf.d/*.yaml], listeners: [], credentials: [], runtime: {workers: 1}}";
    let included = directory.path().join("conf.d/b.yaml");
    fs::write(
        directory.path().join("conf.d/a.yaml"),
        "destinations: [{name: a, hosts: [a.example.com], ca_file: a.pem}]",
    )
    .unwrap();
    fs::copy(
        directory.path().join("api-ca.pem"),
        directory.path().join("conf.d/a.pem"),
    )
    .unwrap();
    fs::write(
        &included,
        "destinations: [{name: b, hosts: [b.example.com]}]",
    )
    .unwrap();
    let config = load(directory.path(), main).unwrap();
    let names: Vec<&str> = config
        .destinations
        .iter()
        .map(|destination| &*destination.name)
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(
        config.destinations[0].ca_file,
        Some(directory.path().join("conf.d/a.pem"))
    );

    fs::write(
        &included,
        "include: [c.yaml]\nruntime: {workers: 2}\ndestinations: [{name: a, hosts: [b.example.com]}]\nlisteners: [{name: g, type: gateway, bind: \"127.0.0.1:1\", destination: c}]",
    )
    .unwrap();
    let problems = load(directory.path(), main).unwrap_err();
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| found(directory.path(), &problems, problem))
        .collect();
    assert_eq!(
        lines,
        [
            "nested_include conf.d/b.yaml:1:11: an included file includes others (move `include` to `agent.yaml`)",
            "repeated_section conf.d/b.yaml:2:10: section `runtime` stands in `agent.yaml` already (keep it in one file)",
            "duplicate_name conf.d/b.yaml:3:23: destination `a` stands twice (the first is at conf.d/a.yaml:1:23: give one of the two another name)",
            "unknown_destination conf.d/b.yaml:4:72: no destination is named `c` (did you mean `a`?)",
        ]
    );
}

#[test]
fn a_file_beside_the_first_is_included_and_the_first_is_not_again() {
    let directory = directory();
    fs::write(
        directory.path().join("b.yaml"),
        "{listeners: [], credentials: [], destinations: []}",
    )
    .unwrap();
    let config = load(directory.path(), "{version: 1, include: [\"*.yaml\"]}").unwrap();
    assert!(
        config
            .watched_files
            .contains(&directory.path().join("b.yaml"))
    );
}

#[test]
fn warnings_do_not_stop_a_load() {
    let directory = directory();
    fs::set_permissions(
        directory.path().join("client.pem"),
        fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    let path = directory.path().join("agent.yaml");
    fs::write(&path, WHOLE.replace("127.0.0.1:7523", "0.0.0.0:7523")).unwrap();
    let checked = check(&path);
    let codes: Vec<&str> = checked
        .diagnostics
        .iter()
        .map(|problem| problem.code)
        .collect();
    assert_eq!(
        codes,
        ["listener_beyond_loopback", "secret_file_open_to_others"]
    );
    assert!(checked.config.is_some());
}

#[test]
fn a_secret_written_inline_is_never_shown() {
    let directory = directory();
    for (replace, with) in [
        ("key_file: client.pem", "client_secret: hunter2"),
        ("    timeout: 5s", "    password: hunter2"),
        ("    timeout: 5s", "    password: {of: [hunter2]}"),
        (
            "    timeout: 5s",
            "    parameters: {client_secret: hunter2}",
        ),
        (
            "    timeout: 5s",
            "    outbound_proxy: http://user:hunter2@proxy:3128",
        ),
        (
            "issuer: https://auth.example.com",
            "issuer: https://user:hunter2@auth.example.com",
        ),
        (
            "hosts: [orders.example.com]",
            "hosts: [\"https://user:hunter2@orders.example.com\"]",
        ),
        ("key_file: client.pem", "client_secret: \"hunter2"),
    ] {
        let text = WHOLE.replace(replace, with);
        let problems = load(directory.path(), &text).unwrap_err();
        for shown in [
            problems.render(false),
            problems.render(true),
            problems.to_json().to_string(),
            problems.to_string(),
            format!("{problems:?}"),
        ] {
            assert!(!shown.contains("hunter2"), "{with}: {shown}");
        }
    }
}

#[test]
fn every_example_loads() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/examples");
    let directory = directory();
    // This one is run as it is shipped.
    Config::load(&examples.join("ci.yaml")).unwrap();
    fs::create_dir(directory.path().join("ci-policies")).unwrap();
    let mut count = 0;
    for entry in fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            let text = fs::read_to_string(&path).unwrap();
            if let Err(problems) = load(directory.path(), &text) {
                panic!("{}:\n{}", path.display(), problems.render(false));
            }
            count += 1;
        }
    }
    println!("{count} examples");
    assert!(count >= 3, "examples are missing");
}

/// A case of `tests/corpora/config/malformed.yaml`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    replace: Option<String>,
    with: Option<String>,
    text: Option<String>,
    expect: Vec<String>,
}

/// `CODE FILE:LINE:COLUMN: MESSAGE (NEXT)`, without the directory's own name.
fn found(
    directory: &Path,
    problems: &Diagnostics,
    problem: &crate::diagnostics::Diagnostic,
) -> String {
    format!("{} {}", problem.code, problems.line(problem))
        .replace(&format!("{}/", directory.display()), "")
}

#[test]
fn wrong_configurations_are_refused_with_every_problem_in_its_place() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpora/config/malformed.yaml");
    let corpus = fs::read_to_string(&path).unwrap();
    let cases: Vec<Case> = serde_saphyr::from_str(&corpus).unwrap();
    let directory = directory();
    load(directory.path(), WHOLE).unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let text = match (&case.text, &case.replace, &case.with) {
            (Some(text), None, None) => text.clone(),
            (None, Some(replace), Some(with)) => {
                assert_eq!(
                    WHOLE.matches(replace.as_str()).count(),
                    1,
                    "{}: `{replace}` must stand once",
                    case.name
                );
                WHOLE.replacen(replace.as_str(), with, 1)
            }
            _ => panic!("{}: write `text`, or `replace` and `with`", case.name),
        };
        let found: Vec<String> = match load(directory.path(), &text) {
            Ok(_) => Vec::new(),
            Err(problems) => problems
                .iter()
                .map(|problem| found(directory.path(), &problems, problem))
                .collect(),
        };
        if found.is_empty() || found != case.expect {
            wrong.push(format!(
                "{}\n  expect: {}",
                case.name,
                serde_json::to_string(&found).unwrap()
            ));
        }
    }
    load(directory.path(), WHOLE).unwrap();
    assert!(wrong.is_empty(), "found instead:\n{}", wrong.join("\n"));
    let expected = cases.iter().flat_map(|case| &case.expect);
    let codes: BTreeSet<_> = expected.filter_map(|line| line.split(' ').next()).collect();
    reached_in("corpora", "wrong_configurations", cases.len());
    reached_in("corpora", "wrong_configurations_codes", codes.len());
}

/// Loads a text and checks what holds for every text: an answer, and each problem in a place of the file.
fn survives(directory: &Path, text: &str) {
    if let Err(problems) = load(directory, text) {
        assert!(problems.has_errors());
        let lines = text.split('\n').count();
        for problem in &problems {
            if let Some(position) = problems.position(problem) {
                assert!(
                    (1..=lines).contains(&position.line),
                    "{}",
                    problems.line(problem)
                );
            }
        }
        assert!(!problems.render(false).is_empty());
    }
}

#[test]
fn any_line_may_be_missing_or_stand_twice() {
    let directory = directory();
    let lines: Vec<&str> = WHOLE.lines().collect();
    for index in 0..lines.len() {
        let mut fewer = lines.clone();
        fewer.remove(index);
        survives(directory.path(), &fewer.join("\n"));
        let mut more = lines.clone();
        more.insert(index, lines[index]);
        survives(directory.path(), &more.join("\n"));
    }
    load(directory.path(), WHOLE).unwrap();
}

#[test]
fn texts_made_to_exhaust_are_refused() {
    let directory = directory();
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let earlier = format!("*a{}", level - 1);
        bomb.push_str(&format!(
            "a{level}: &a{level} [{}]\n",
            [earlier.as_str(); 10].join(", ")
        ));
    }
    for text in [
        bomb,
        format!("version: {}", "[".repeat(100_000)),
        format!("version: {}{}", "[".repeat(5_000), "]".repeat(5_000)),
        "a: ".repeat(10_000),
        "{".repeat(100_000),
    ] {
        let problems = load(directory.path(), &text).unwrap_err();
        assert!(problems.has_errors());
    }
    load(directory.path(), WHOLE).unwrap();
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damaged_text_is_survived(edits in proptest::collection::vec((0..WHOLE.len(), 0..8usize, "[a-z:\\[\\]{}\"'&*!|> \n\t#,0-9é-]{0,3}"), 1..6)) {
        let directory = directory();
        let mut text = WHOLE.to_owned();
        for (start, length, insert) in edits {
            let start = (0..=start.min(text.len())).rev().find(|index| text.is_char_boundary(*index)).unwrap_or(0);
            let end = (0..=(start + length).min(text.len())).rev().find(|index| text.is_char_boundary(*index)).unwrap_or(0);
            text.replace_range(start..end.max(start), &insert);
        }
        survives(directory.path(), &text);
    }
    #[test]
    fn a_pattern_of_a_literal_and_asterisks_matches_what_its_glob_does(
        literal in "(/[a-z.!]{0,2}){0,3}/",
        path in "(/[a-z.!\n]{0,2}){0,4}/?",
        below in "[a-z/]{0,4}",
    ) {
        let glob = text::path_pattern(&format!("{literal}**"));
        proptest::prop_assume!(glob.is_ok());
        let globs = [glob.unwrap()];
        let patterns = PathPatterns::new(&globs).unwrap();
        for path in [path, format!("{literal}{below}")] {
            let matcher = globs[0].compile_matcher();
            proptest::prop_assert_eq!(patterns.is_match(&path), matcher.is_match(&path), "{:?}", path);
        }
    }
}
