//! Callers that connect and exit, on a node where their numbers are soon others'.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;

use countersign_attestors::hexadecimal;
use jiff::Timestamp;
use serde_json::Value;
use tokio::process::Command;

use crate::support::counts::reached;
use crate::support::origin::Origin;
use crate::support::repetitions::repetitions;
use crate::support::world::{COMMON, DESTINATIONS, World};
use crate::support::{has_program, hold_port, is_root};

/// How many numbers a node has, the 300 that the kernel reserves included.
const PID_MAX: usize = 600;
const NODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agent/endurance/node.c");

/// A caller, as the node tells of it.
struct Caller {
    pid: u32,
    began: Timestamp,
    stays: bool,
}

impl Caller {
    fn parse(line: &str) -> Self {
        let words: Vec<i64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        Self {
            pid: words[1].try_into().unwrap(),
            began: Timestamp::from_microsecond(words[2]).unwrap(),
            stays: words[3] == 1,
        }
    }
}

/// The callers are `nobody`, and the agent tells them apart by their command lines.
const POLICIES: &str = r#"
@id("callers")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == 65534 && principal.unix has command_line_sha256 && principal.unix.command_line_sha256 != "" };
"#;

/// The hash of a caller's command line, which is the node's with the caller's number at its beginning.
fn command_line_sha256(arguments: &[OsString], number: usize) -> String {
    let mut line = Vec::new();
    for argument in arguments {
        line.extend_from_slice(argument.as_bytes());
        line.push(0);
    }
    let number = format!("{number:010}");
    line[..number.len()].copy_from_slice(number.as_bytes());
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &line);
    hexadecimal(digest.as_ref())
}

/// Whether `pid_max` is a matter of one namespace: before Linux 6.14 it is the machine's.
fn numbers_are_the_namespaces(test: &str) -> bool {
    let release = nix::sys::utsname::uname().unwrap();
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let has = version >= (6, 14);
    if !has {
        println!("{test}: needs Linux 6.14, where `pid_max` is a matter of one namespace");
    }
    has
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_taken_for_another_who_had_or_got_the_number() {
    let test = "nobody_is_taken_for_another_who_had_or_got_the_number";
    if !is_root(test) || !has_program(test, "cc") || !numbers_are_the_namespaces(test) {
        return;
    }
    let callers = repetitions(100_000);
    let mut world = World::servers().await;
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let origin = Origin::start(None, |_| vec![answer.to_owned()]).await;
    world.origins.push(("plain".to_owned(), origin.address));
    let (_port, proxy) = hold_port(0).unwrap();
    let common = COMMON
        .replacen("127.0.0.1:0", &proxy.to_string(), 1)
        .replace("path: audit.jsonl", "path: audit.jsonl, rotate_size: 1GiB");
    world.write(
        "countersign.yaml",
        &world.fill(&format!("{common}{DESTINATIONS}")),
    );
    world.write_policies(POLICIES);
    let node = world.path("node");
    let mut compiler = Command::new("cc");
    compiler.arg("-O1").arg("-o").arg(&node).arg(NODE);
    assert!(compiler.status().await.unwrap().success());
    let arguments: Vec<OsString> = vec![
        node.into(),
        PID_MAX.to_string().into(),
        callers.to_string().into(),
        world.path("proxy.sock").into(),
        proxy.port().to_string().into(),
        env!("CARGO_BIN_EXE_countersign").into(),
        "run".into(),
        "--config".into(),
        world.path("countersign.yaml").into(),
    ];
    let ran = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .args(&arguments)
        .current_dir(world.directory.path())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let logged = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{}: {logged}", ran.status);
    let told = String::from_utf8(ran.stdout).unwrap();
    let started: Vec<Caller> = told.lines().map(Caller::parse).collect();
    assert_eq!(started.len(), callers);

    // Who had a number after whom.
    let mut successors: Vec<Option<Timestamp>> = vec![None; callers];
    let mut holders = HashMap::new();
    let mut reused = 0;
    for (number, caller) in started.iter().enumerate() {
        if let Some(former) = holders.insert(caller.pid, number) {
            successors[former] = Some(caller.began);
            reused += 1;
        }
    }

    // Each record names its caller, or nobody.
    let audit = std::fs::File::open(world.path("audit.jsonl")).unwrap();
    let mut sessions = HashMap::new();
    let mut outcomes = BTreeMap::new();
    let (mut recorded, mut attested, mut reused_before) = (0, 0, 0);
    for line in BufReader::new(audit).lines() {
        let record: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let session = record["session"].as_str().unwrap_or_default().to_owned();
        if record["kind"] == "attested" {
            let of_process = record["attributes"]["unix"]["command_line_sha256"].as_str();
            sessions.insert(session, of_process.map(str::to_owned));
            continue;
        }
        let Some(path) = record["path"].as_str() else {
            continue;
        };
        let number: usize = path.rsplit('/').next().unwrap().parse().unwrap();
        recorded += 1;
        if let Some(Some(taken_for)) = sessions.get(&session) {
            let own = command_line_sha256(&arguments, number);
            assert_eq!(*taken_for, own, "{record}");
            attested += 1;
        }
        let outcome = record["outcome"].as_str().unwrap().to_owned();
        *outcomes.entry(outcome).or_insert(0) += 1;
        let time: Timestamp = record["time"].as_str().unwrap().parse().unwrap();
        if successors[number].is_some_and(|reused| reused < time) {
            reused_before += 1;
        }
    }

    let answers = std::fs::read_to_string(world.path("answers")).unwrap();
    let stayed = started.iter().filter(|caller| caller.stays).count();
    assert_eq!(answers.lines().count(), stayed);
    let served = answers
        .lines()
        .filter(|line| line.ends_with(" 200"))
        .count();
    println!(
        "{callers} callers, {reused} reuses of {} numbers, {reused_before} before the former's request was decided: \
         {recorded} requests recorded, {attested} of them attested, none as another: {outcomes:?}; \
         {served} of {stayed} that stayed were served as themselves",
        holders.len()
    );
    // The others were closed unanswered: a node without numbers has no threads to look at them.
    assert!(recorded * 1000 >= callers * 999 && recorded <= callers);
    assert!(attested >= served, "{attested} were attested");
    assert!(
        reused_before * 100 >= callers,
        "{reused_before} reuses were observed"
    );
    assert!(
        served * 10 >= stayed * 9,
        "{served} of {stayed} were served"
    );
    reached("raced", callers);
    reached("reused_before_decided", reused_before);
    reached("served_as_themselves", served);
}
