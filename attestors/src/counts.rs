//! Compares what a test has counted with `expected-counts`.

/// Prints the count and fails unless it is the one that is written down.
pub(crate) fn expect(name: &str, count: usize) {
    println!("{name} {count}");
    let written = include_str!("../expected-counts")
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(written, count)| (written == name).then(|| count.parse::<usize>().ok())?);
    match written {
        Some(written) => assert_eq!(count, written, "{name}: counted, and written down"),
        None => panic!("{name} does not stand in `expected-counts`"),
    }
}
