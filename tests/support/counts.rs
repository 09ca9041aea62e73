//! The figures that tests reach stand in `expected-counts` beside them, so that a test which does less
//! than it says is a failure.

/// Prints a figure and compares it with the one that is held beside the test.
pub fn reached(name: &str, count: usize) {
    reached_in(env!("CARGO_CRATE_NAME"), name, count);
}

/// As [`reached`], held in a folder of `tests`.
pub fn reached_in(folder: &str, name: &str, count: usize) {
    println!("count {name} {count}");
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let path = format!("{tests}/{folder}/expected-counts");
    let held = std::fs::read_to_string(&path).unwrap();
    let expected = held
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(known, _)| *known == name)
        .unwrap_or_else(|| panic!("{path} has no `{name}`"))
        .1
        .trim();
    let holds = match expected.strip_prefix(">=") {
        Some(least) => count >= least.trim().parse().unwrap(),
        None => count == expected.parse::<usize>().unwrap(),
    };
    assert!(holds, "`{name}`: expected {expected}, reached {count}");
}
