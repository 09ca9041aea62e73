//! Which of a destination's credentials a request gets: the first that policy permits. The proxy and
//! `policy test` ask the same questions here.

use std::sync::Arc;
use std::time::SystemTime;

use super::decision::{Denial, DenialKind};
use super::question::{Action, Question, Resource};
use crate::config::{CredentialUse, Destination};
use crate::request::EgressRequest;
use crate::routing::{Route, Routes};

/// The destination of a request: every reading of its path must be covered.
pub fn route<'a>(routes: &'a Routes, request: &EgressRequest) -> Route<'a> {
    routes.find(
        request.scheme,
        request.target.host(),
        request.target.port(),
        |destination| request.path.is_covered_by(&destination.paths),
    )
}

/// The questions that a request to a destination raises, in order, each with the credential's use: one
/// `inject` for each credential; one `connect` for a destination without.
pub fn questions<'a>(
    destination: &'a Arc<Destination>,
    request: Option<&'a Arc<EgressRequest>>,
    wall: SystemTime,
) -> impl Iterator<Item = (Question<'a>, Option<&'a CredentialUse>)> {
    let injections = destination.credentials.iter().map(move |credential_use| {
        let question = Question {
            action: Action::Inject,
            resource: Resource::Credential {
                credential: &credential_use.credential,
                scopes: &credential_use.scopes,
                audience: None,
            },
            destination: Some(destination),
            request,
            wall,
        };
        (question, Some(credential_use))
    });
    let connection = destination.credentials.is_empty().then(|| {
        let question = Question {
            action: Action::Connect,
            resource: Resource::Destination(destination),
            destination: Some(destination),
            request,
            wall,
        };
        (question, None)
    });
    injections.chain(connection)
}

/// The question that traffic to no configured destination raises.
pub fn unmatched(request: Option<&Arc<EgressRequest>>, wall: SystemTime) -> Question<'_> {
    Question {
        action: Action::Connect,
        resource: Resource::Unmatched,
        destination: None,
        request,
        wall,
    }
}

/// A question that was answered with no.
#[derive(Debug, Clone)]
pub struct Refused<'a> {
    /// The question.
    pub question: Question<'a>,
    /// The answer.
    pub denial: Arc<Denial>,
}

/// Asks until the first yes. Where every answer is no, the one that tells the caller to present a token
/// counts, else the first. A workload that is gone, or evidence that could not be checked, ends the asking:
/// another credential must not be used because an attestor was away.
pub fn first_permitted<'a, G>(
    questions: impl Iterator<Item = (Question<'a>, Option<&'a CredentialUse>)>,
    mut decide: impl FnMut(&Question<'a>) -> Result<G, Arc<Denial>>,
) -> Result<(G, Question<'a>, Option<&'a CredentialUse>), Option<Refused<'a>>> {
    let mut kept: Option<Refused<'a>> = None;
    for (question, credential_use) in questions {
        let denial = match decide(&question) {
            Ok(grant) => return Ok((grant, question, credential_use)),
            Err(denial) => denial,
        };
        let ends = matches!(
            denial.kind,
            DenialKind::AttestationEnded { .. } | DenialKind::AttestationUnavailable { .. }
        );
        let asks_for_token =
            |denial: &Denial| matches!(denial.kind, DenialKind::PresentedEvidenceRequired { .. });
        let replaces = match &kept {
            None => true,
            Some(known) => ends || (asks_for_token(&denial) && !asks_for_token(&known.denial)),
        };
        if replaces {
            kept = Some(Refused { question, denial });
        }
        if ends {
            break;
        }
    }
    Err(kept)
}
