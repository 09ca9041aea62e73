//! TLS on both sides: the interception authority and its leaves towards workloads, and verified
//! connections towards destinations.

pub mod interception;
pub mod stores;
pub mod trust;

/// ALPN for HTTP/2 (RFC 9113 section 3.1).
pub const ALPN_HTTP2: &[u8] = b"h2";
/// ALPN for HTTP/1.1 (RFC 7301 section 6).
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

/// Makes aws-lc-rs the process's cryptography provider. Called first thing in `main`.
pub fn install_cryptography_provider() {
    // An error means that a provider is installed already, which tests do more than once.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}
