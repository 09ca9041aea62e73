//! Decisions, by Cedar policy.
//!
//! Read in this order: [`question`](Question) (what is asked), [`PolicyEngine`] (a loaded set of policies,
//! immutable), [`PolicySnapshot`] (policies and revocations in force at one time), [`Grant`] and its
//! [`Lease`] (what a yes is worth, and how long), [`DecisionCache`] (yes and no remembered), and the tools:
//! [`explain`], [`suggest`], [`cases`], [`schema`].

mod cache;
pub mod cases;
mod compile;
mod compiled;
mod conditions;
mod decision;
pub mod described;
mod engine;
pub mod explain;
mod grant;
mod lint;
mod load;
mod never;
mod pattern;
mod principal;
mod question;
mod reads;
mod revocations;
mod ring;
pub mod schema;
mod selection;
mod snapshot;
mod source;
pub mod suggest;
#[cfg(test)]
mod tests;

pub use cache::{CAPACITY, DecisionCache};
pub use decision::{Condition, Decision, Denial, DenialKind, NearestMiss, Permission};
pub use engine::PolicyEngine;
pub use grant::{Grant, Lease, LeaseEnded};
pub use never::{DestinationAndCredential, NeverMatching};
pub use principal::UNKNOWN_ENVIRONMENT;
pub use question::{Action, OwnedQuestion, OwnedResource, Question, Resource, UNMATCHED};
pub use revocations::{Revocation, Revocations, Revoked, Selector, SelectorError, TokenHolder};
pub use ring::{DecisionRing, RING_CAPACITY, RecordedDecision};
pub use selection::{Refused, first_permitted, questions, route, unmatched};
pub use snapshot::PolicySnapshot;
pub use source::PolicyFile;
