//! Countersign: a per-node agent that attests local workloads, decides by policy, and injects
//! short-lived tokens into their requests.
//!
//! # A tour, in the order of a request
//!
//! 1. [`listener`] accepts a connection and asks the kernel who is at the other end
//!    (`countersign_attestors`); a data worker serves it.
//! 2. [`proxy`] is the path: [`connection`] knows the caller within its [`limits`], [`request`] reads the head one way, the attestors make a workload of the
//!    evidence, [`routing`] finds the destination.
//! 3. [`policy`] decides. Only a yes makes a [`policy::Grant`].
//! 4. [`credentials`] turns the grant into a token, from its cache or by one of [`providers`], which
//!    reach authorization servers through [`fetch`].
//! 5. [`inject`] checks the grant's lease again and makes an [`inject::UpstreamRequest`], the only thing
//!    that [`upstream`] sends; [`lookups`] resolves names, [`address`] guards where to.
//! 6. [`streams`] carries the bodies and cuts them when the lease ends; [`exchange`] writes the one
//!    [`audit`] record; [`refusal`] and [`problem`] say no.
//!
//! Around it: [`cli`] reads arguments, [`config`] reads files, [`app`] builds, binds and reloads an
//! [`agent`] under immutable [`snapshot`]s, [`tls`] holds the interception authority, [`admin`] and
//! [`client`] are two ends of the admin socket, [`telemetry`] counts, traces and logs, [`attestor_states`] knows which attestor could not run, [`hardening`] takes from the
//! agent what it does not need, [`descriptors`] counts what is open, [`service_manager`] hands sockets from one agent to the next, [`dev`] is the embedded authorization server and API.

pub mod address;
pub mod admin;
pub mod agent;
pub mod app;
pub mod attestor_states;
pub mod audit;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod connection;
pub mod credentials;
pub mod descriptors;
pub mod dev;
pub mod diagnostics;
pub mod exchange;
pub mod fetch;
pub mod files;
pub mod hardening;
pub mod inject;
pub mod jwt;
pub mod limits;
pub mod listener;
pub mod local;
pub mod lookups;
pub mod policy;
pub mod problem;
pub mod providers;
pub mod proxy;
pub mod refusal;
pub mod request;
pub mod request_id;
pub mod routing;
pub mod secret_file;
pub mod service_manager;
pub mod short_writes;
pub mod snapshot;
pub mod socket_file;
pub mod streams;
pub mod telemetry;
pub mod tls;
pub mod upstream;

// The servers under `tests/support` name this crate as tests outside of it do.
#[cfg(test)]
extern crate self as countersign;

#[cfg(test)]
#[path = "../tests/support/counts.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    reason = "shared with tests that keep their figures beside them"
)]
mod counts;
