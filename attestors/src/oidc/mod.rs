//! The `oidc` attestor.
use crate::evidence::PresentedToken;

/// Why no configured issuer takes this token.
pub(crate) fn why_no_issuer(_token: &PresentedToken) -> String {
    "the presented token is of no configured issuer".to_owned()
}
