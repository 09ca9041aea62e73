//! Tokens good and bad, against an issuer that is really asked over a socket.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed expectation is a failed test"
)]

mod attacks;
mod key_sets;
mod presented;
mod support;
