//! What is fuzzed: one function for each kind of bytes that come from somebody else. Each states what
//! must hold of every input, beyond that nothing panics.
//!
//! `tests/fuzz/main.rs` feeds them on any toolchain; `tests/fuzz/libfuzzer` is their other user.

mod audit_file;
mod authority;
mod cgroup_file;
mod configuration;
mod diagnostics;
mod jwt;
mod key_set;
mod policy_text;
mod process_status;
mod request_head;
mod request_path;
mod socket_answer;
mod token_response;
mod tokens;
mod traceparent;

/// A function to be fed.
pub struct Target {
    /// Its name, and that of its folder under `seeds`.
    pub name: &'static str,
    /// Panics where something does not hold of the input.
    pub run: fn(&[u8]),
    /// How many mutations a test run feeds it: fewer to those that take longer.
    #[allow(dead_code, reason = "libFuzzer makes its own")]
    pub mutations: usize,
}

const fn target(name: &'static str, run: fn(&[u8]), mutations: usize) -> Target {
    Target {
        name,
        run,
        mutations,
    }
}

/// Every target.
pub const TARGETS: [Target; 13] = [
    target("audit_file", audit_file::run, 3_000),
    target("authority", authority::run, 20_000),
    target("cgroup_file", cgroup_file::run, 10_000),
    target("configuration", configuration::run, 400),
    target("jwt", jwt::run, 2_000),
    target("key_set", key_set::run, 1_000),
    target("policy_text", policy_text::run, 150),
    target("process_status", process_status::run, 10_000),
    target("request_head", request_head::run, 3_000),
    target("request_path", request_path::run, 20_000),
    target("socket_answer", socket_answer::run, 10_000),
    target("token_response", token_response::run, 10_000),
    target("traceparent", traceparent::run, 20_000),
];

/// The target with this name.
pub fn named(name: &str) -> &'static Target {
    TARGETS
        .iter()
        .find(|target| target.name == name)
        .unwrap_or_else(|| panic!("no target `{name}`"))
}
