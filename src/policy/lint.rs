//! What a policy most likely does not mean.

use super::source::ParsedPolicy;
use crate::config::Config;
use crate::diagnostics::Diagnostics;

/// Checks one policy.
pub(super) fn check(_config: &Config, _policy: &ParsedPolicy, _diagnostics: &mut Diagnostics) {}
