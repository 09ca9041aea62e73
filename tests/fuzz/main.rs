//! Feeds every fuzz target its seeds and a fixed sequence of mutations of them, on any toolchain. From
//! the same seeds libFuzzer goes on: `tests/fuzz/run TARGET SECONDS`.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../support/counts.rs"]
mod counts;
mod grammars;
mod mutations;
mod targets;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

use mutations::Mutator;
use targets::{TARGETS, Target};

fn seeds_directory() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fuzz", "seeds"]
        .iter()
        .collect()
}

/// The seeds of a target by name, in the order of their names.
fn seeds(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut seeds: Vec<(String, Vec<u8>)> = std::fs::read_dir(seeds_directory().join(target.name))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    seeds.sort();
    seeds
}

/// Runs one input; where that fails, says which it was.
fn run(target: &Target, what: &str, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        eprintln!(
            "{} failed on {what}:\n{}",
            target.name,
            input.escape_ascii()
        );
        resume_unwind(panic);
    }
}

fn feed(name: &str) {
    let target = targets::named(name);
    let seeds = seeds(target);
    for (seed, input) in &seeds {
        run(target, seed, input);
    }
    let all: Vec<&[u8]> = seeds.iter().map(|(_, input)| input.as_slice()).collect();
    let mut mutator = Mutator::new(&all);
    for round in 0..target.mutations {
        let (seed, input) = mutator.next_input();
        let what = format!("mutation {round}, of {}", seeds[seed].0);
        run(target, &what, &input);
    }
    // What went before has left nothing behind that spoils a good input.
    run(target, &seeds[0].0, all[0]);
    counts::reached(&format!("{name}_seeds"), seeds.len());
}

macro_rules! feed {
    ($($target:ident)*) => {
        $(
            #[test]
            fn $target() {
                feed(stringify!($target));
            }
        )*

        #[test]
        fn every_target_has_seeds_and_a_test() {
            let tests: BTreeSet<String> = [$(stringify!($target).to_owned()),*].into();
            let targets: BTreeSet<String> =
                TARGETS.iter().map(|target| target.name.to_owned()).collect();
            let folders: BTreeSet<String> = std::fs::read_dir(seeds_directory())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            assert_eq!(tests, targets);
            assert_eq!(folders, targets);
            counts::reached("targets", targets.len());
        }
    };
}

feed! {
    audit_file
    authority
    cgroup_file
    configuration
    jwt
    key_set
    policy_text
    process_status
    request_head
    request_path
    socket_answer
    token_response
    traceparent
}
