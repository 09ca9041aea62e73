//! The command line: one file for each verb.

pub mod output;
pub mod schema;
pub mod validate;
