//! What is measured.

mod request_path;

use crate::Fallible;
use crate::bench::Bench;

/// One work, by its name on the command line.
#[derive(Clone, Copy)]
pub struct Work {
    pub name: &'static str,
    pub run: fn(&mut Bench) -> Fallible<()>,
}

const ALL: &[Work] = &[
    Work {
        name: "http",
        run: request_path::http,
    },
    Work {
        name: "https",
        run: request_path::https,
    },
    Work {
        name: "intercept",
        run: request_path::intercept,
    },
];

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
