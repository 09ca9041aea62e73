//! What is measured.

mod attestation;
mod bodies;
mod cold_token;
mod decision;
mod memory;
mod new_connections;
mod open_loop;
mod reload;
pub mod request_path;
mod size;
mod start;

use crate::Fallible;
use crate::bench::Bench;

/// One work, by its name on the command line.
#[derive(Clone, Copy)]
pub struct Work {
    pub name: &'static str,
    pub run: fn(&mut Bench) -> Fallible<()>,
}

const ALL: &[Work] = &[
    work("http", request_path::http),
    work("https", request_path::https),
    work("intercept", request_path::intercept),
    work("new-connections", new_connections::run),
    work("open-loop", open_loop::run),
    work("bodies", bodies::run),
    work("memory", memory::run),
    work("cold-token", cold_token::run),
    work("reload", reload::run),
    work("start", start::run),
    work("decision", decision::run),
    work("attestation", attestation::run),
    work("size", size::run),
];

const fn work(name: &'static str, run: fn(&mut Bench) -> Fallible<()>) -> Work {
    Work { name, run }
}

/// The works with these names; all, where there are none.
pub fn named(names: &[&str]) -> Fallible<Vec<Work>> {
    if names.is_empty() {
        return Ok(ALL.to_vec());
    }
    names
        .iter()
        .map(|name| {
            ALL.iter()
                .find(|work| work.name == *name)
                .copied()
                .ok_or_else(|| {
                    let known: Vec<&str> = ALL.iter().map(|work| work.name).collect();
                    format!("unknown work `{name}`: the works are {}", known.join(", ")).into()
                })
        })
        .collect()
}
