//! libFuzzer over one target, the one that `COUNTERSIGN_FUZZ_TARGET` names.
#![no_main]

#[path = "../targets/mod.rs"]
mod targets;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use targets::Target;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("COUNTERSIGN_FUZZ_TARGET").expect("COUNTERSIGN_FUZZ_TARGET is set");
    targets::named(&name)
});

fuzz_target!(|input: &[u8]| (TARGET.run)(input));
