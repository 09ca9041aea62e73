//! The whole agent, from a caller's socket to the origin: what arrives, what is refused, and what the
//! origin saw of either.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../support/mod.rs"]
mod support;

mod alternatives;
mod audit_block;
mod callers;
mod causes;
mod cgroups;
mod changes;
mod clients;
mod endurance;
mod entrances;
mod faults;
mod hardening;
mod headers;
mod hosts;
mod http2_attacks;
mod identities;
mod limits;
mod observed;
mod patience;
mod raw_http;
mod records;
mod refusals;
mod rejected_tokens;
mod reloads;
mod report_only;
mod restarts;
mod revocations;
mod spans;
mod streams;
mod threads;
mod threats;
mod token_answers;
mod traces;
mod tunnels;
mod upstreams;

/// Not a test: what the harness starts this binary again for.
#[test]
#[ignore = "the harness starts it in processes of their own"]
fn puppet_main() {
    support::puppet::puppet_main();
}
