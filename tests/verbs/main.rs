//! The verbs that users type, by the program itself: what is printed, what a command under `exec` gets,
//! and how each ends.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../support/mod.rs"]
mod support;

mod admin;
mod ca;
mod dev;
mod doctor;
mod exec;
mod forms;
mod job;
mod jobs;
mod program;
mod shells;
mod signals;
mod unmatched;
mod waiting;
mod workload_api;
