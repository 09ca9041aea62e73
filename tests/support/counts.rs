//! The figures that tests reach stand in `tests/agent/expected-counts`, so that a test which does
//! less than it says is a failure.

/// Prints a figure and compares it with the one that is held.
pub fn reached(name: &str, count: usize) {
    println!("count {name} {count}");
    let held = include_str!("../agent/expected-counts");
    let expected = held
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(known, _)| *known == name)
        .unwrap_or_else(|| panic!("tests/agent/expected-counts has no `{name}`"))
        .1
        .trim();
    let holds = match expected.strip_prefix(">=") {
        Some(least) => count >= least.trim().parse().unwrap(),
        None => count == expected.parse::<usize>().unwrap(),
    };
    assert!(holds, "`{name}`: expected {expected}, reached {count}");
}
