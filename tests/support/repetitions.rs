//! How often tests repeat what has to hold every time.

/// Whether the full counts are asked for, by `COUNTERSIGN_ENDURANCE=1`, as `tests/endurance/run` does.
pub fn are_full() -> bool {
    std::env::var("COUNTERSIGN_ENDURANCE").as_deref() == Ok("1")
}

/// `full` where the full counts are asked for, else a tenth of it.
pub fn repetitions(full: usize) -> usize {
    match are_full() {
        true => full,
        false => full / 10,
    }
}
