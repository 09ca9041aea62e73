//! What the agent says about itself: [`metrics`] and [`logs`].

pub mod logs;
pub mod metrics;
