//! What the agent says about itself: [`metrics`], [`traces`] and [`logs`].

pub mod logs;
pub mod metrics;
pub mod traces;
