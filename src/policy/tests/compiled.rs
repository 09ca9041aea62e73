//! What is compiled says what Cedar says: of each policy, and of whole decisions.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cedar_policy::{Authorizer, PolicySet};
use countersign_attestors::AttributeType;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::json;

use super::*;
use crate::policy::Denial;
use crate::policy::compiled::{CompiledPolicy, Fails, World};
use crate::policy::engine::{Prepared, Slice};
use crate::policy::principal::Principal;
use crate::policy::reads::Reads;
use crate::policy::source;

/// Something of a type, and the guards of which any lets the validator take it: none needs no guard.
type Term = (&'static str, &'static [&'static str]);

const UNIX: &[&str] = &[
    "principal has unix",
    "principal has unix.executable",
    "principal has unix.groups",
];
const REQUEST: &[&str] = &["context has request"];
const DESTINATION: &[&str] = &["context has destination"];

const LONGS: [Term; 3] = [
    ("context.local.hour", &[]),
    ("principal.unix.uid", UNIX),
    ("principal.unix.gid", UNIX),
];

const TEXTS: [Term; 14] = [
    ("principal.environment", &[]),
    ("resource.name", &[]),
    ("resource.environment", &[]),
    ("context.audience", &[]),
    ("context.local.weekday", &[]),
    ("context.request.method", REQUEST),
    ("context.request.path", REQUEST),
    ("context.destination.name", DESTINATION),
    ("context.destination.environment", DESTINATION),
    (
        "principal[\"unix\"].executable",
        &["principal has unix.executable"],
    ),
    (
        "principal.ci.sub",
        &["principal has ci", "principal has ci.trusted"],
    ),
    ("principal.getTag(\"app\")", &["principal.hasTag(\"app\")"]),
    ("context.node.name", &["context has node"]),
    (
        "(if context.local.hour > 11 then resource.name else context.audience)",
        &[],
    ),
];

const SETS: [Term; 5] = [
    ("context.scopes", &[]),
    ("context.evidence", &[]),
    ("principal.unix.groups", &["principal has unix.groups"]),
    ("[\"orders.read\", \"wheel\", \"pidfd\"]", &[]),
    ("[\"orders\"]", &[]),
];

const BOOLEANS: [Term; 24] = [
    ("context.request.safe", REQUEST),
    ("principal.ci.trusted", &["principal has ci.trusted"]),
    (
        "principal.ci has trusted",
        &["principal has ci", "principal has ci.trusted"],
    ),
    ("principal.unix has user", UNIX),
    ("principal has unix", &[]),
    ("principal has unix.user", &[]),
    ("principal has systemd.system_unit", &[]),
    ("principal has environment", &[]),
    ("principal.hasTag(\"app\")", &[]),
    ("principal.hasTag(context.audience)", &[]),
    ("resource has name", &[]),
    ("context has local", &[]),
    ("context has request.path", &[]),
    ("context has break_glass", &[]),
    ("context has destination", &[]),
    ("context has scopes", &[]),
    ("resource == Credential::\"orders-api\"", &[]),
    ("resource is Credential", &[]),
    ("resource is Credential in CredentialGroup::\"admin\"", &[]),
    ("resource in CredentialGroup::\"orders\"", &[]),
    ("principal in Repository::\"ci.example.com/77\"", &[]),
    ("action == Action::\"issue\"", &[]),
    (
        "context.destination == Destination::\"orders\"",
        DESTINATION,
    ),
    ("[7, 990].contains(context.local.hour)", &[]),
];

/// What is left to Cedar.
const NOT_COMPILED: [&str; 4] = [
    "context.time < datetime(\"2026-11-18T12:00:01Z\")",
    "ip(\"10.0.0.1\").isLoopback()",
    "Credential::\"orders-api\".environment == \"prod\"",
    "{hour: context.local.hour}.hour > 11",
];

const GUARDS: [&str; 9] = [
    "principal has unix",
    "principal has unix.executable",
    "principal has unix.groups",
    "principal has ci",
    "principal has ci.trusted",
    "principal.hasTag(\"app\")",
    "context has request",
    "context has destination",
    "context has node",
];

const LITERAL_LONGS: [&str; 7] = [
    "990",
    "12",
    "0",
    "-1",
    "1000",
    "9223372036854775807",
    "-9223372036854775808",
];

const LITERAL_TEXTS: [&str; 12] = [
    "orders",
    "prod",
    "GET",
    "/v1/orders",
    "orders-api",
    "",
    "wednesday",
    "/usr/bin/orders",
    "job",
    "orders.read",
    "wheel",
    "/v1/größe/*\u{1F512}",
];

const PATTERNS: [&str; 6] = ["*", "/v1/*", "*orders*", "/v1/*/7", "orders-\\*", ""];

/// Bytes that choose what is generated; the first of everything once they are used up.
struct Choices(std::vec::IntoIter<u8>);

impl Choices {
    fn below(&mut self, count: usize) -> usize {
        usize::from(self.0.next().unwrap_or(0)) % count
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// A term that the guards permit.
    fn term(&mut self, terms: &[Term], guards: &[&str]) -> String {
        let permitted: Vec<&str> = terms
            .iter()
            .filter(|(_, needed)| {
                needed.is_empty() || needed.iter().any(|guard| guards.contains(guard))
            })
            .map(|(term, _)| *term)
            .collect();
        self.of(&permitted).to_owned()
    }

    fn text(&mut self) -> String {
        crate::policy::schema::quoted(self.of(&LITERAL_TEXTS))
    }

    fn long(&mut self, guards: &[&str], depth: usize) -> String {
        match self.below(if depth == 0 { 2 } else { 6 }) {
            0 => self.term(&LONGS, guards),
            1 => self.of(&LITERAL_LONGS).to_owned(),
            2 => format!("(-{})", self.long(guards, depth - 1)),
            number => {
                let operator = ["+", "-", "*"][number - 3];
                let left = self.long(guards, depth - 1);
                format!("({left} {operator} {})", self.long(guards, depth - 1))
            }
        }
    }

    fn boolean(&mut self, guards: &[&str], depth: usize) -> String {
        if depth == 0 {
            return self.comparison(guards);
        }
        match self.below(8) {
            0 => {
                let left = self.boolean(guards, depth - 1);
                format!("({left} && {})", self.boolean(guards, depth - 1))
            }
            1 => {
                let left = self.boolean(guards, depth - 1);
                format!("({left} || {})", self.boolean(guards, depth - 1))
            }
            2 => format!("!({})", self.boolean(guards, depth - 1)),
            3 => {
                let [condition, consequent, alternative] =
                    [(); 3].map(|()| self.boolean(guards, depth - 1));
                format!("(if {condition} then {consequent} else {alternative})")
            }
            4 => {
                let guard = self.of(&GUARDS);
                let more = [guards, &[guard]].concat();
                format!("({guard} && {})", self.boolean(&more, depth - 1))
            }
            5 => {
                let guard = self.of(&GUARDS);
                let more = [guards, &[guard]].concat();
                let consequent = self.boolean(&more, depth - 1);
                let alternative = self.boolean(guards, depth - 1);
                format!("(if {guard} then {consequent} else {alternative})")
            }
            _ => self.comparison(guards),
        }
    }

    fn comparison(&mut self, guards: &[&str]) -> String {
        match self.below(40) {
            0..8 => {
                let operator = self.of(&["==", "!=", "<", "<=", ">", ">="]);
                let left = self.long(guards, 2);
                format!("{left} {operator} {}", self.long(guards, 1))
            }
            8..14 => {
                let operator = self.of(&["==", "!="]);
                format!("{} {operator} {}", self.term(&TEXTS, guards), self.text())
            }
            14..19 => {
                let text = self.term(&TEXTS, guards);
                format!("{text} like \"{}\"", self.of(&PATTERNS))
            }
            19..22 => format!("{}.contains({})", self.term(&SETS, guards), self.text()),
            22..26 => {
                let method = self.of(&["containsAll", "containsAny"]);
                let set = self.term(&SETS, guards);
                format!("{set}.{method}({})", self.term(&SETS, guards))
            }
            26..28 => {
                let set = self.term(&SETS, guards);
                format!("{set} == {}", self.term(&SETS, guards))
            }
            28 => format!("{}.isEmpty()", self.term(&SETS, guards)),
            29 => self.of(&NOT_COMPILED).to_owned(),
            _ => self.term(&BOOLEANS, guards),
        }
    }

    fn policy(&mut self, id: &str) -> String {
        let effect = self.of(&["permit", "forbid"]);
        let principal = self.of(&[
            "principal",
            "principal",
            "principal is Workload",
            "principal in Repository::\"ci.example.com/77\"",
        ]);
        let (action, resource) = self.of(&[
            ("action", "resource"),
            ("action", "resource"),
            ("action == Action::\"inject\"", "resource"),
            ("action == Action::\"connect\"", "resource"),
            ("action", "resource in CredentialGroup::\"orders\""),
        ]);
        let mut text = format!("@id(\"{id}\") {effect} ({principal}, {action}, {resource})");
        for keyword in ["when", "unless"] {
            for _ in 0..self.below(3) {
                let guard = self.of(&GUARDS);
                let body = match keyword {
                    "when" => format!("{guard} && {}", self.boolean(&[guard], 2)),
                    _ => self.boolean(&[], 3),
                };
                text.push_str(&format!(" {keyword} {{ {body} }}"));
            }
        }
        text + ";\n"
    }

    /// Any group may be missing or empty, and a value may be of another type than is declared.
    fn facts(&mut self) -> WorkloadFacts {
        let text_of = |choices: &mut Self| text(choices.of(&LITERAL_TEXTS));
        let mut facts = WorkloadFacts::default();
        for (group, names) in [
            ("unix", &["uid", "gid", "executable", "groups", "user"][..]),
            ("systemd", &["system_unit"]),
            ("ci", &["sub", "trusted", "repository_id"]),
            ("labels", &["app"]),
        ] {
            let there = self.below(8);
            if there == 7 {
                continue;
            }
            let attributes = facts.groups.entry(group.to_owned()).or_default();
            if there == 6 {
                continue;
            }
            for name in names {
                if self.below(8) == 7 {
                    continue;
                }
                let value = match *name {
                    "uid" | "gid" if self.below(16) < 15 => {
                        AttributeValue::Long(self.of(&[990, 1000, 0, i64::MAX, i64::MIN]))
                    }
                    "executable" | "sub" if self.below(16) == 15 => AttributeValue::Long(990),
                    "groups" => AttributeValue::StringSet(
                        (0..self.below(3))
                            .map(|_| self.of(&LITERAL_TEXTS).to_owned())
                            .collect(),
                    ),
                    "trusted" => match self.below(32) {
                        30 => text("job"),
                        31 => AttributeValue::Long(1),
                        number => AttributeValue::Boolean(number % 2 == 0),
                    },
                    "repository_id" => text(self.of(&["77", "78"])),
                    _ => text_of(self),
                };
                attributes.insert((*name).to_owned(), value);
            }
        }
        facts.evidence = (0..self.below(3))
            .map(|_| self.of(&["pidfd", "wheel", "orders.read"]).to_owned())
            .collect();
        facts
    }
}

/// What a question is made of.
struct Asked {
    request: Arc<EgressRequest>,
    scopes: Arc<[String]>,
    audience: Arc<str>,
}

impl Asked {
    fn new(choices: &mut Choices) -> Self {
        Self {
            request: request(choices.of(&[
                "GET https://orders.example.com/v1/orders",
                "POST https://orders.example.com/v1/orders/7",
                "DELETE https://orders.example.com/orders-*",
            ])),
            scopes: (0..choices.below(3))
                .map(|_| choices.of(&LITERAL_TEXTS).to_owned())
                .collect(),
            audience: Arc::from(choices.of(&["app", "orders", ""])),
        }
    }

    fn question<'a>(&'a self, fixture: &'a Fixture, choices: &mut Choices) -> Question<'a> {
        let (action, resource) = match choices.below(6) {
            0 => (Action::Connect, Resource::Unmatched),
            1 => {
                let destination = fixture.destination(choices.of(&["orders", "public"]));
                (Action::Connect, Resource::Destination(destination))
            }
            number => (
                [Action::Issue, Action::Inject][number % 2],
                Resource::Credential {
                    credential: fixture.credential(choices.of(&["orders-api", "orders-admin"])),
                    scopes: &self.scopes,
                    audience: (choices.below(2) == 0).then_some(&self.audience),
                },
            ),
        };
        let destination = choices.of(&[Some("orders"), None, Some("public")]);
        Question {
            action,
            resource,
            destination: destination.map(|name| fixture.destination(name)),
            request: (choices.below(4) < 3).then_some(&self.request),
            wall: noon() + Duration::from_secs(3_600 * choices.below(24) as u64),
        }
    }
}

/// With a boolean attribute beside what the attestors of the configuration state.
fn fixture() -> Fixture {
    let mut fixture = Fixture::new();
    fixture.declarations.push(AttributeDeclaration {
        group: "ci".to_owned(),
        name: "trusted".to_owned(),
        attribute_type: AttributeType::Boolean,
        required: false,
        description: String::new(),
    });
    fixture
}

/// Policies that load, of those that the choices make.
fn policies(fixture: &Fixture, choices: &mut Choices) -> String {
    (0..3)
        .map(|number| choices.policy(&format!("p{number}")))
        .filter(|policy| fixture.load(policy).is_ok())
        .collect()
}

/// Whether Cedar says that one policy is satisfied.
fn cedar_says(policy: &cedar_policy::Policy, prepared: &Prepared) -> Result<bool, Fails> {
    let set = PolicySet::from_policies([policy.clone()]).unwrap();
    let response = Authorizer::new().is_authorized(&prepared.request, &set, &prepared.entities);
    match response.diagnostics().errors().count() {
        0 => Ok(response.diagnostics().reason().count() == 1),
        _ => Err(Fails),
    }
}

fn run(cases: u32, test: impl Fn(&mut Choices)) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&vec(any::<u8>(), 0..2_000), |bytes| {
        test(&mut Choices(bytes.into_iter()));
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// Asks a question of the choices under an engine, and gives it with the policies that can apply, and what
/// evaluates them: compiled, and by Cedar.
fn ask(
    fixture: &Fixture,
    engine: &PolicyEngine,
    choices: &mut Choices,
    also_read: &Reads,
    check: impl FnOnce(&Slice, &World<'_>, &Prepared, &str),
) {
    let facts = choices.facts();
    let asked = Asked::new(choices);
    let question = asked.question(fixture, choices);
    let Some((resource, slice)) = engine.applicable(&question) else {
        return;
    };
    let mut reads = slice.reads.clone();
    reads.add(also_read);
    let principal = Principal::new(&facts, engine);
    let prepared = engine
        .prepare(&facts, &principal, &question, &reads)
        .unwrap();
    let world = World::new(engine, &facts, &principal, &question, resource);
    check(
        slice,
        &world,
        &prepared,
        &format!("{facts:?}\n{question:?}"),
    );
}

#[test]
fn a_compiled_policy_says_what_cedar_says() {
    let fixture = fixture();
    let seen: RefCell<BTreeMap<String, usize>> = RefCell::default();
    let count = |what: &str| *seen.borrow_mut().entry(what.to_owned()).or_default() += 1;
    run(192, |choices| {
        let engine = fixture.engine(&policies(&fixture, choices));
        for _ in 0..24 {
            ask(
                &fixture,
                &engine,
                choices,
                &Reads::default(),
                |slice, world, prepared, asked| {
                    for policy in &slice.policies {
                        let Some(compiled) = &policy.compiled else {
                            count("left to Cedar");
                            continue;
                        };
                        let said = compiled.is_satisfied(world);
                        count(&format!("{said:?}"));
                        let by_cedar = cedar_says(&policy.policy, prepared);
                        assert_eq!(said, by_cedar, "{}\n{asked}", policy.policy);
                    }
                },
            );
        }
    });
    let seen = seen.into_inner();
    let times = |what: &str| seen.get(what).copied().unwrap_or(0);
    for outcome in ["Ok(true)", "Ok(false)", "Err(Fails)"] {
        assert!(times(outcome) >= 100, "{outcome}: {seen:?}");
    }
    let left = times("left to Cedar");
    assert!(left >= 50 && left * 3 < seen.values().sum(), "{seen:?}");
}

#[test]
fn what_would_not_load_fails_as_it_does_for_cedar() {
    /// Reads every attribute, so that what reads some of them has a tree.
    const EVERYTHING: &str = "@id(\"all\") permit (principal, action, resource) \
        when { principal has unix || principal has systemd || principal has ci };";

    let fixture = fixture();
    let engine = fixture.engine(EVERYTHING);
    let seen: RefCell<BTreeMap<String, usize>> = RefCell::default();
    let evaluated = RefCell::new(String::new());
    run(1_024, |choices| {
        // As if everything were known to be there.
        let condition = choices.boolean(&GUARDS, 3);
        let policy: cedar_policy::Policy =
            format!("permit (principal, action, resource) when {{ {condition} }};")
                .parse()
                .unwrap();
        let json = policy.to_json().unwrap();
        let Some(compiled) = CompiledPolicy::of(&json, &engine.attributes) else {
            return;
        };
        evaluated.borrow_mut().push_str(&condition);
        let reads = Reads::of_policy(&json);
        for _ in 0..12 {
            ask(
                &fixture,
                &engine,
                choices,
                &reads,
                |_, world, prepared, asked| {
                    let said = compiled.is_satisfied(world);
                    assert_eq!(said, cedar_says(&policy, prepared), "{policy}\n{asked}");
                    *seen.borrow_mut().entry(format!("{said:?}")).or_default() += 1;
                },
            );
        }
    });
    let seen = seen.into_inner();
    for outcome in ["Ok(true)", "Ok(false)", "Err(Fails)"] {
        assert!(
            seen.get(outcome).is_some_and(|times| *times >= 1_000),
            "{outcome}: {seen:?}"
        );
    }
    for (term, _) in [&LONGS[..], &TEXTS, &SETS, &BOOLEANS].concat() {
        assert!(evaluated.borrow().contains(term), "{term} is in no policy");
    }
}

#[test]
fn a_decision_is_the_one_that_cedar_makes() {
    /// Never satisfied, and not compiled: with it every slice is Cedar's.
    const NEVER: &str =
        "@id(\"z\") forbid (principal, action, resource) when { ip(\"10.0.0.1\").isLoopback() };";

    let fixture = fixture();
    let seen: RefCell<BTreeMap<(bool, &str), usize>> = RefCell::default();
    run(96, |choices| {
        let text = policies(&fixture, choices);
        let engine = fixture.engine(&text);
        let by_cedar = fixture.engine(&format!("{text}{NEVER}"));
        for _ in 0..24 {
            let facts = choices.facts();
            let asked = Asked::new(choices);
            let question = asked.question(&fixture, choices);
            let Some((resource, slice)) = engine.applicable(&question) else {
                continue;
            };
            let principal = Principal::new(&facts, &engine);
            let world = World::new(&engine, &facts, &principal, &question, resource);
            let is_compiled = slice.decide(&world, question.wall).is_some();
            let decision = engine.evaluate(&facts, &question);
            match (&decision, by_cedar.evaluate(&facts, &question)) {
                (Decision::Allow(made), Decision::Allow(cedar)) => {
                    assert_eq!(made, &cedar, "{text}\n{facts:?}\n{question:?}");
                }
                (Decision::Deny(made), Decision::Deny(cedar)) => {
                    let cedar = Denial {
                        policy_version: Arc::clone(&made.policy_version),
                        ..(*cedar).clone()
                    };
                    assert_eq!(**made, cedar, "{text}\n{facts:?}\n{question:?}");
                }
                (made, cedar) => {
                    panic!("{made:?} is not {cedar:?}\n{text}\n{facts:?}\n{question:?}")
                }
            }
            *seen
                .borrow_mut()
                .entry((is_compiled, outcome(&decision)))
                .or_default() += 1;
        }
    });
    let seen = seen.into_inner();
    for what in [
        (true, "allow"),
        (true, "forbidden"),
        (true, "no_permit"),
        (false, "evaluation_error"),
    ] {
        assert!(
            seen.get(&what).is_some_and(|times| *times >= 20),
            "{what:?}: {seen:?}"
        );
    }
}

#[test]
fn what_lacks_an_operand_is_left_to_cedar() {
    let operand = json!({"Value": true});
    for operator in ["&&", "||"] {
        for (operands, is_whole) in [
            (json!({"left": operand, "right": operand}), true),
            (json!({"left": operand}), false),
            (json!({"right": operand}), false),
            (json!({}), false),
            (json!({"left": operand, "right": {operator: {}}}), false),
        ] {
            let policy = json!({
                "effect": "permit",
                "principal": {"op": "All"},
                "conditions": [{"kind": "when", "body": {operator: operands}}],
            });
            let compiled = CompiledPolicy::of(&policy, &[]);
            assert_eq!(compiled.is_some(), is_whole, "{policy}");
        }
    }
}

#[test]
fn what_is_asked_for_its_type_or_for_what_it_has_is_read() {
    let reads = |condition: &str| {
        let policy = format!("permit (principal, action, resource) when {{ {condition} }};");
        let policy: cedar_policy::Policy = policy.parse().unwrap();
        Reads::of_policy(&policy.to_json().unwrap())
    };
    assert_eq!(reads("principal is Workload"), Reads::default());
    assert!(reads("context.destination is Destination").destination);
    let chosen = reads("(if context.request.safe then principal else resource) is Workload");
    assert!(chosen.safe && chosen.parents, "{chosen:?}");
    let chosen = reads("(if context.request.safe then principal.ci else principal.cd) has sub");
    assert!(chosen.safe, "{chosen:?}");
    assert!(
        ["cd", "ci"]
            .iter()
            .all(|group| chosen.whole_groups.contains(*group)),
        "{chosen:?}"
    );
}

#[test]
fn of_what_is_taken_as_a_whole_everything_is_read() {
    let fixture = fixture();
    let attributes = |condition: &str| {
        let text =
            format!("@id(\"a\") forbid (principal, action, resource) when {{ {condition} }};");
        BTreeSet::from_iter(fixture.engine(&text).attributes)
    };
    let declared = fixture
        .declarations
        .iter()
        .map(|declared| (declared.group.clone(), declared.name.clone()));
    let declared: BTreeSet<_> = declared.collect();
    let either = "(if context has request then principal else principal)";
    let condition = format!("{either} has ci && {either}.ci.sub == \"x\"");
    assert_eq!(attributes(&condition), declared);
    // One attribute that is named as well is not the only one.
    let condition =
        "principal has unix && principal.unix == principal.unix && principal.unix.uid == 1";
    let of_unix: BTreeSet<_> = declared
        .into_iter()
        .filter(|(group, _)| group == "unix")
        .collect();
    assert!(of_unix.len() > 1);
    assert_eq!(attributes(condition), of_unix);
}

#[test]
fn policies_that_people_write_are_compiled() {
    /// Those that read `context.time`.
    const LEFT_TO_CEDAR: [&str; 1] = ["office-hours"];

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut left = Vec::new();
    let mut compiled = 0;
    let mut directories = vec![
        root.join("policies"),
        root.join("tests/bench/peers"),
        root.join("tests/fuzz/seeds/policy_text"),
    ];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            if path
                .extension()
                .is_none_or(|extension| extension != "cedar")
            {
                continue;
            }
            let file = PolicyFile {
                // The benchmark writes numbers in place of its words.
                text: std::fs::read_to_string(&path)
                    .unwrap()
                    .replace("@FIRST_UID@", "1000")
                    .replace("@IDENTITIES@", "50"),
                path,
            };
            for policy in source::parse(&file, &mut Diagnostics::new()) {
                let reads = Reads::of_policy(&policy.json);
                let groups = reads.groups.into_iter().chain(reads.whole_groups);
                let groups = groups.map(|group| (group, String::new()));
                let attributes: BTreeSet<_> = reads.attributes.into_iter().chain(groups).collect();
                match CompiledPolicy::of(&policy.json, &Vec::from_iter(attributes)) {
                    Some(_) => compiled += 1,
                    None => left.push(policy.id().to_owned()),
                }
            }
        }
    }
    assert_eq!(left, LEFT_TO_CEDAR);
    assert!(compiled >= 20, "{compiled}");
}
