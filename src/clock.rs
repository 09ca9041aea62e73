//! Time is passed in: [`Clock`] and the machine's own [`SystemClock`].

pub use countersign_attestors::{Clock, SystemClock};
