//! Countersign: a per-node agent that attests local workloads, decides by policy, and injects
//! short-lived tokens into their requests.

pub mod address;
pub mod admin;
pub mod agent;
pub mod app;
pub mod audit;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod credentials;
pub mod dev;
pub mod diagnostics;
pub mod exchange;
pub mod fetch;
pub mod inject;
pub mod jwt;
pub mod listener;
pub mod local;
pub mod policy;
pub mod problem;
pub mod providers;
pub mod proxy;
pub mod refusal;
pub mod request;
pub mod request_id;
pub mod routing;
pub mod snapshot;
pub mod streams;
pub mod telemetry;
pub mod tls;
pub mod upstream;
