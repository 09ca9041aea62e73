//! The audit: one record per request, per token issued and per event of the agent's own life, one
//! JSON object per line, chained by SHA-256 (`docs/audit.md`).
//!
//! A data worker moves a [`Record`] into a bounded queue and goes on; [`writer`] turns records into
//! lines, chains them and writes them in batches. [`verify`] and [`tail`] read what was written.

pub mod record;

pub use record::{
    AttestedRecord, Decided, Latency, LifecycleEvent, Obtained, Record, RequestRecord,
    TokenIssueRecord,
};
