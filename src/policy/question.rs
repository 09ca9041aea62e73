//! What a decision is asked: an action on a resource, and everything read beside the workload.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::config::{CredentialConfig, Destination};
use crate::request::EgressRequest;

/// What the workload wants to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Put a credential on a request.
    Inject,
    /// Hand a token out to the workload.
    Issue,
    /// Send traffic that carries no credential of ours.
    Connect,
}

impl Action {
    /// Every action.
    pub const ALL: [Self; 3] = [Self::Inject, Self::Issue, Self::Connect];

    /// The name in policies: `Action::"inject"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inject => "inject",
            Self::Issue => "issue",
            Self::Connect => "connect",
        }
    }
}

/// What the action is on.
#[derive(Debug, Clone, Copy)]
pub enum Resource<'a> {
    /// A credential, and what is asked of it.
    Credential {
        /// The credential.
        credential: &'a Arc<CredentialConfig>,
        /// Scopes asked for; none lets the authorization server choose.
        scopes: &'a Arc<[String]>,
        /// The audience asked for.
        audience: Option<&'a Arc<str>>,
    },
    /// A configured destination.
    Destination(&'a Arc<Destination>),
    /// Traffic that matches no destination: `Destination::"unmatched"`.
    Unmatched,
}

/// The name of the resource that stands for traffic to no configured destination.
pub const UNMATCHED: &str = "unmatched";

impl<'a> Resource<'a> {
    /// The scopes and the audience that are asked for.
    pub(crate) fn asked(&self) -> (&'a [String], Option<&'a str>) {
        match *self {
            Self::Credential {
                scopes, audience, ..
            } => (scopes, audience.map(|audience| &**audience)),
            Self::Destination(_) | Self::Unmatched => (&[], None),
        }
    }

    /// Whether scopes and audience are the same.
    pub(super) fn asks_as_much_as(&self, other: &Resource<'_>) -> bool {
        let (scopes, audience) = self.asked();
        let (other_scopes, other_audience) = other.asked();
        // Those of a configuration are the same list.
        (std::ptr::eq(scopes, other_scopes) || scopes == other_scopes) && audience == other_audience
    }

    /// Where it is, which nothing else is while it is held; 0 for what is of no configuration.
    pub(super) fn address(&self) -> usize {
        match self {
            Self::Credential { credential, .. } => Arc::as_ptr(credential).addr(),
            Self::Destination(destination) => Arc::as_ptr(destination).addr(),
            Self::Unmatched => 0,
        }
    }

    /// A copy that outlives the question.
    pub(crate) fn to_owned(self) -> OwnedResource {
        match self {
            Self::Credential {
                credential,
                scopes,
                audience,
            } => OwnedResource::Credential {
                credential: Arc::clone(credential),
                scopes: Arc::clone(scopes),
                audience: audience.map(Arc::clone),
            },
            Self::Destination(destination) => OwnedResource::Destination(Arc::clone(destination)),
            Self::Unmatched => OwnedResource::Unmatched,
        }
    }

    /// `(entity type, name)`.
    pub(crate) fn identity(&self) -> (ResourceType, &'a str) {
        match self {
            Self::Credential { credential, .. } => (ResourceType::Credential, &credential.name),
            Self::Destination(destination) => (ResourceType::Destination, &destination.name),
            Self::Unmatched => (ResourceType::Destination, UNMATCHED),
        }
    }
}

/// The entity type of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ResourceType {
    /// `Credential`.
    Credential,
    /// `Destination`.
    Destination,
}

impl ResourceType {
    /// The name in policies.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Credential => "Credential",
            Self::Destination => "Destination",
        }
    }
}

/// Everything that a decision reads beside the workload.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The action.
    pub action: Action,
    /// What it is on.
    pub resource: Resource<'a>,
    /// Where the traffic goes: `context.destination`; `None` for traffic to no configured destination and for `issue`.
    pub destination: Option<&'a Arc<Destination>>,
    /// The request: `context.request`; `None` for `issue` and for a tunnel whose requests are not seen.
    pub request: Option<&'a Arc<EgressRequest>>,
    /// Now: `context.time`, `context.local`.
    pub wall: SystemTime,
}

impl Question<'_> {
    /// A copy that outlives the request, and shares it.
    pub fn to_owned(&self) -> OwnedQuestion {
        OwnedQuestion {
            action: self.action,
            resource: self.resource.to_owned(),
            destination: self.destination.map(Arc::clone),
            request: self.request.map(Arc::clone),
            wall: self.wall,
        }
    }
}

impl fmt::Display for Question<'_> {
    /// "use credential `x` for `GET /path`", as in "no policy permits this workload to ...".
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.action, self.resource) {
            (Action::Issue, Resource::Credential { credential, .. }) => {
                write!(
                    formatter,
                    "be issued a token of credential `{}`",
                    credential.name
                )?;
            }
            (_, Resource::Credential { credential, .. }) => {
                write!(formatter, "use credential `{}`", credential.name)?;
            }
            (_, Resource::Destination(destination)) => {
                write!(formatter, "connect to destination `{}`", destination.name)?;
            }
            (_, Resource::Unmatched) => {
                formatter.write_str("connect to a host that no destination covers")?;
            }
        }
        if let Some(request) = self.request {
            write!(
                formatter,
                " for `{} {}`",
                request.method,
                crate::request::printable(request.path.as_str())
            )?;
        }
        Ok(())
    }
}

/// A [`Question`] that owns what it reads; kept for `policy explain`.
#[derive(Debug, Clone)]
pub struct OwnedQuestion {
    /// As in [`Question`].
    pub action: Action,
    /// As in [`Question`].
    pub resource: OwnedResource,
    /// As in [`Question`].
    pub destination: Option<Arc<Destination>>,
    /// As in [`Question`].
    pub request: Option<Arc<EgressRequest>>,
    /// As in [`Question`].
    pub wall: SystemTime,
}

/// A [`Resource`] that owns what it names.
#[derive(Debug, Clone)]
pub enum OwnedResource {
    /// A credential, and what is asked of it.
    Credential {
        /// The credential.
        credential: Arc<CredentialConfig>,
        /// Scopes asked for.
        scopes: Arc<[String]>,
        /// The audience asked for.
        audience: Option<Arc<str>>,
    },
    /// A configured destination.
    Destination(Arc<Destination>),
    /// Traffic that matches no destination.
    Unmatched,
}

impl OwnedResource {
    /// What it is a copy of.
    pub(crate) fn as_resource(&self) -> Resource<'_> {
        match self {
            Self::Credential {
                credential,
                scopes,
                audience,
            } => Resource::Credential {
                credential,
                scopes,
                audience: audience.as_ref(),
            },
            Self::Destination(destination) => Resource::Destination(destination),
            Self::Unmatched => Resource::Unmatched,
        }
    }
}

impl OwnedQuestion {
    /// The question, to be asked again.
    pub fn as_question(&self) -> Question<'_> {
        Question {
            action: self.action,
            resource: self.resource.as_resource(),
            destination: self.destination.as_ref(),
            request: self.request.as_ref(),
            wall: self.wall,
        }
    }
}
