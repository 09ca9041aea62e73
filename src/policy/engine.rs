//! A loaded set of policies: immutable, sliced by resource and action, and asked questions.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cedar_policy::{
    ActionConstraint, Authorizer, Context, Entities, Entity, EntityUid, Policy, PolicyId,
    PolicySet, Request, ResourceConstraint, RestrictedExpression,
};
use countersign_attestors::{AttributeDeclaration, FailureKind, WorkloadFacts, hexadecimal};
use foldhash::fast::RandomState;
use jiff::tz::TimeZone;
use smallvec::{SmallVec, smallvec};

use super::compiled::{CompiledPolicy, World};
use super::decision::{Decision, Denial, DenialKind, Permission};
use super::pattern::Patterns;
use super::principal::{Principal, PrincipalModel, uid, workload_uid};
use super::question::{Action, Question, Resource, ResourceType, UNMATCHED};
use super::reads::{PathRead, Reads};
use super::source::{self, ParsedPolicy, PolicyFile};
use super::{conditions, load};
use crate::config::{Config, CredentialConfig, Destination, TemplatePart, TokenSource};
use crate::diagnostics::{Diagnostics, position};

/// `environment` of a resource whose configuration does not say.
pub(super) const UNKNOWN_RESOURCE_ENVIRONMENT: &str = "unknown";

/// The name under which a token that is of no configured issuer is recorded as failed.
const NO_ISSUER: &str = "oidc";

/// A loaded set of policies. Immutable; a reload makes another.
#[derive(Debug)]
pub struct PolicyEngine {
    version: Arc<str>,
    pub(super) policies: Vec<Arc<LoadedPolicy>>,
    pub(super) credentials: LoadedResources,
    pub(super) destinations: LoadedResources,
    /// By the address of a resource of the configuration.
    slices: HashMap<(usize, Action), Arc<Slice>, RandomState>,
    /// What is at those addresses: while it is held, nothing else is.
    _configured: (Vec<Arc<CredentialConfig>>, Vec<Arc<Destination>>),
    principals: PrincipalModel,
    issuer_groups: BTreeSet<String>,
    attributes_read: BTreeSet<(String, String)>,
    /// `(group, attribute)` that policies read, in order: policies and their trees hold places in it.
    pub(super) attributes: Vec<(String, String)>,
    time_zone: TimeZone,
    authorizer: Authorizer,
}

/// A policy that passed every check.
#[derive(Debug)]
pub(super) struct LoadedPolicy {
    pub(super) id: Arc<str>,
    /// `FILE:LINE:COLUMN` of its effect.
    pub(super) location: String,
    pub(super) is_permit: bool,
    pub(super) policy: Policy,
    pub(super) json: serde_json::Value,
    pub(super) reads: Reads,
    /// Places in [`PolicyEngine::attributes`].
    attributes: Vec<usize>,
    /// `None` where Cedar has to evaluate it.
    pub(super) compiled: Option<CompiledPolicy>,
    pub(super) max_lifetime: Option<Duration>,
    pub(super) scopes: Option<BTreeSet<String>>,
    pub(super) expires: Option<SystemTime>,
    /// Made when first explained.
    pub(super) conditions: std::sync::OnceLock<Vec<conditions::Conjunct>>,
}

/// By name; looked up for every request.
pub(super) type LoadedResources = HashMap<String, LoadedResource, RandomState>;

#[derive(Debug)]
pub(super) struct LoadedResource {
    pub(super) environment: String,
    /// The names of its `CredentialGroup`s.
    pub(super) groups: Vec<String>,
    entity: Entity,
    pub(super) slices: BTreeMap<Action, Arc<Slice>>,
}

/// The policies that can apply to one resource and action.
#[derive(Debug)]
pub(super) struct Slice {
    /// In the order of their names.
    pub(super) policies: Vec<Arc<LoadedPolicy>>,
    pub(super) reads: Reads,
    /// What the path is compared with, where nothing else is done with it.
    pub(super) path_patterns: Option<Patterns>,
    set: PolicySet,
    /// `@expires` of its policies, in order.
    expiries: Vec<SystemTime>,
}

impl Slice {
    fn new(mut policies: Vec<Arc<LoadedPolicy>>) -> Self {
        policies.sort_by(|one, other| one.id.cmp(&other.id));
        let mut reads = Reads::default();
        for policy in &policies {
            reads.add(&policy.reads);
        }
        let mut expiries: Vec<SystemTime> = policies
            .iter()
            .filter_map(|policy| policy.expires)
            .collect();
        expiries.sort();
        Self {
            set: set_of(policies.iter()),
            path_patterns: match &reads.path {
                PathRead::Matched(patterns) => Patterns::new(patterns.clone()),
                PathRead::Unread | PathRead::Whole => None,
            },
            reads,
            expiries,
            policies,
        }
    }

    /// How many of its policies have expired at `now`.
    pub(super) fn expired(&self, now: SystemTime) -> usize {
        self.expiries.partition_point(|expires| *expires <= now)
    }

    /// When the last of its policies that have expired at `now` did.
    fn last_expiry(&self, now: SystemTime) -> Option<SystemTime> {
        self.expiries
            .iter()
            .rfind(|expires| **expires <= now)
            .copied()
    }

    /// Those of its policies that have not expired.
    pub(super) fn in_force(&self, now: SystemTime) -> impl Iterator<Item = &Arc<LoadedPolicy>> {
        self.policies
            .iter()
            .filter(move |policy| policy.expires.is_none_or(|expires| now < expires))
    }

    /// The policies that decide, in the order of their names: the satisfied forbids or, where there is none,
    /// the satisfied permits. `None` where Cedar has to say: a policy is not compiled, or fails.
    pub(super) fn decide(
        &self,
        world: &World<'_>,
        now: SystemTime,
    ) -> Option<Vec<&Arc<LoadedPolicy>>> {
        let mut satisfied = Vec::new();
        for policy in self.in_force(now) {
            if policy.compiled.as_ref()?.is_satisfied(world).ok()? {
                satisfied.push(policy);
            }
        }
        if satisfied.iter().any(|policy| !policy.is_permit) {
            satisfied.retain(|policy| !policy.is_permit);
        }
        Some(satisfied)
    }

    /// Those of its policies with these ids.
    fn with_ids<'a>(&self, ids: impl IntoIterator<Item = &'a PolicyId>) -> Vec<&Arc<LoadedPolicy>> {
        let ids: HashSet<&PolicyId> = ids.into_iter().collect();
        self.policies
            .iter()
            .filter(|policy| ids.contains(policy.policy.id()))
            .collect()
    }
}

fn set_of<'a>(policies: impl Iterator<Item = &'a Arc<LoadedPolicy>>) -> PolicySet {
    // INVARIANT (unique ids): `load` refuses a set in which two policies have one id.
    PolicySet::from_policies(policies.map(|policy| policy.policy.clone())).unwrap_or_default()
}

/// Policies that could not be evaluated.
struct Failed<'a> {
    policies: Vec<&'a Arc<LoadedPolicy>>,
    /// Cedar's words.
    detail: String,
}

/// A question in Cedar's form.
pub(super) struct Prepared {
    pub(super) request: Request,
    pub(super) entities: Entities,
}

impl PolicyEngine {
    /// Reads `*.cedar` of the configuration's policy directory. `declarations` are what the configured
    /// attestors may state. Returns warnings beside the engine, or every problem found.
    pub fn load(
        config: &Config,
        declarations: &[AttributeDeclaration],
    ) -> Result<(Self, Diagnostics), Diagnostics> {
        let files = source::read_directory(&config.policy_directory, &config.path)?;
        Self::from_files(config, declarations, &files)
    }

    /// What is wrong with the policies of a directory whatever is configured: syntax, annotations and ids. Nothing
    /// where the directory cannot be read.
    pub fn check_form(directory: &Path) -> Diagnostics {
        let files = source::files_with_suffix(directory, ".cedar").unwrap_or_default();
        let mut diagnostics = Diagnostics::new();
        load::parse(&files, &mut diagnostics);
        diagnostics.sort();
        diagnostics
    }

    /// As [`load`](Self::load), with the policy files already read.
    pub fn from_files(
        config: &Config,
        declarations: &[AttributeDeclaration],
        files: &[PolicyFile],
    ) -> Result<(Self, Diagnostics), Diagnostics> {
        let (parsed, diagnostics) = load::check(config, declarations, files);
        if diagnostics.has_errors() {
            return Err(diagnostics);
        }
        let engine = Self::build(config, declarations, files, parsed);
        Ok((engine, diagnostics))
    }

    fn build(
        config: &Config,
        declarations: &[AttributeDeclaration],
        files: &[PolicyFile],
        parsed: Vec<ParsedPolicy>,
    ) -> Self {
        let principals = PrincipalModel::new(config, declarations);
        let attributes: BTreeSet<(String, String)> = parsed
            .iter()
            .flat_map(|parsed| principals.attributes_of(&parsed.reads))
            .map(owned)
            .collect();
        let attributes = Vec::from_iter(attributes);
        let places = |reads: &Reads| {
            principals
                .attributes_of(reads)
                .into_iter()
                .filter_map(|attribute| attributes.binary_search(&owned(attribute)).ok())
                .collect()
        };
        let policies: Vec<Arc<LoadedPolicy>> = parsed
            .into_iter()
            .map(|parsed| {
                let places = places(&parsed.reads);
                Arc::new(LoadedPolicy::new(parsed, files, places, &attributes))
            })
            .collect();
        let mut engine = Self {
            version: version_of(files),
            credentials: LoadedResources::default(),
            destinations: LoadedResources::default(),
            slices: HashMap::default(),
            _configured: (config.credentials.clone(), config.destinations.clone()),
            issuer_groups: config
                .attestors
                .oidc_issuers
                .iter()
                .map(|issuer| issuer.name.clone())
                .collect(),
            attributes_read: BTreeSet::new(),
            // The node's is looked for among hundreds of files.
            time_zone: match policies.iter().any(|policy| policy.reads.local) {
                true => TimeZone::system(),
                false => TimeZone::UTC,
            },
            authorizer: Authorizer::new(),
            principals,
            attributes,
            policies,
        };
        (engine.credentials, engine.destinations) = engine.slices(config);
        engine.slices = engine.slices_by_address(config);
        engine.attributes_read = engine.all_attributes_read(config);
        engine
    }

    /// Every resource of the configuration with its slices; resources with the same policies share one.
    fn slices(&self, config: &Config) -> (LoadedResources, LoadedResources) {
        let mut shared: HashMap<Vec<usize>, Arc<Slice>> = HashMap::new();
        let mut credentials = LoadedResources::default();
        let mut destinations = LoadedResources::default();
        let mut add = |resource_type: ResourceType,
                       name: &str,
                       environment: Option<&str>,
                       groups: &[String],
                       actions: &[Action]| {
            let ancestors: HashSet<EntityUid> = groups
                .iter()
                .map(|group| uid("CredentialGroup", group))
                .collect();
            let resource_uid = uid(resource_type.as_str(), name);
            let slices = actions
                .iter()
                .map(|action| {
                    let applicable: Vec<usize> = self
                        .policies
                        .iter()
                        .enumerate()
                        .filter(|(_, policy)| {
                            covers_action(&policy.policy.action_constraint(), *action)
                                && covers_resource(
                                    &policy.policy.resource_constraint(),
                                    resource_type,
                                    &resource_uid,
                                    &ancestors,
                                )
                        })
                        .map(|(index, _)| index)
                        .collect();
                    let slice = shared.entry(applicable).or_insert_with_key(|applicable| {
                        Arc::new(Slice::new(
                            applicable
                                .iter()
                                .filter_map(|index| self.policies.get(*index).map(Arc::clone))
                                .collect(),
                        ))
                    });
                    (*action, Arc::clone(slice))
                })
                .collect();
            let environment = environment.unwrap_or(UNKNOWN_RESOURCE_ENVIRONMENT);
            let resource = LoadedResource {
                environment: environment.to_owned(),
                groups: groups.to_vec(),
                entity: resource_entity(resource_uid, name, environment, ancestors),
                slices,
            };
            match resource_type {
                ResourceType::Credential => credentials.insert(name.to_owned(), resource),
                ResourceType::Destination => destinations.insert(name.to_owned(), resource),
            };
        };
        for credential in &config.credentials {
            add(
                ResourceType::Credential,
                &credential.name,
                credential.environment.as_deref(),
                &credential.groups,
                &[Action::Inject, Action::Issue],
            );
        }
        for destination in &config.destinations {
            add(
                ResourceType::Destination,
                &destination.name,
                destination.environment.as_deref(),
                &[],
                &[Action::Connect],
            );
        }
        add(
            ResourceType::Destination,
            UNMATCHED,
            None,
            &[],
            &[Action::Connect],
        );
        (credentials, destinations)
    }

    fn slices_by_address(
        &self,
        config: &Config,
    ) -> HashMap<(usize, Action), Arc<Slice>, RandomState> {
        let credentials = config.credentials.iter().map(|credential| {
            let address = Arc::as_ptr(credential).addr();
            (address, self.credentials.get(&*credential.name))
        });
        let destinations = config.destinations.iter().map(|destination| {
            let address = Arc::as_ptr(destination).addr();
            (address, self.destinations.get(&*destination.name))
        });
        credentials
            .chain(destinations)
            .flat_map(|(address, resource)| {
                let slices = resource.into_iter().flat_map(|resource| &resource.slices);
                slices.map(move |(action, slice)| ((address, *action), Arc::clone(slice)))
            })
            .collect()
    }

    fn all_attributes_read(&self, config: &Config) -> BTreeSet<(String, String)> {
        let mut read = BTreeSet::from_iter(self.attributes.iter().cloned());
        read.extend(self.principals.attributes_of_environments().map(owned));
        for credential in &config.credentials {
            let TokenSource::OauthClientCredentials(settings) = &credential.source;
            let templates =
                std::iter::once(&settings.client_id).chain(settings.assertion_claims.values());
            for part in templates.flat_map(|template| &template.parts) {
                if let TemplatePart::Attribute { group, name } = part {
                    read.insert((group.clone(), name.clone()));
                }
            }
        }
        read
    }

    /// The same policies with another time zone for `context.local` than the node's.
    #[must_use]
    pub fn in_time_zone(self, time_zone: TimeZone) -> Self {
        Self { time_zone, ..self }
    }

    /// The first 16 hexadecimal digits of the SHA-256 of the policy files.
    pub fn version(&self) -> &Arc<str> {
        &self.version
    }

    /// `(group, attribute)` that a policy, an environment rule or a credential's template reads: what attestors must collect.
    pub fn attributes_read(&self) -> &BTreeSet<(String, String)> {
        &self.attributes_read
    }

    /// Every policy's id and place, in the order of the files.
    pub fn policies(&self) -> impl Iterator<Item = (&str, &str)> {
        self.policies
            .iter()
            .map(|policy| (&*policy.id, policy.location.as_str()))
    }

    /// `(group, attribute)` that the policies for this question read.
    pub(super) fn attributes_read_for(
        &self,
        question: &Question<'_>,
    ) -> BTreeSet<(String, String)> {
        self.slice(question)
            .map(|slice| self.principals.attributes_of(&slice.reads))
            .unwrap_or_default()
            .into_iter()
            .map(owned)
            .collect()
    }

    pub(super) fn issuer_groups(&self) -> &BTreeSet<String> {
        &self.issuer_groups
    }

    /// `principal.environment` of a workload.
    pub fn environment(&self, facts: &WorkloadFacts) -> Arc<str> {
        self.principals.environment_of(facts)
    }

    pub(super) fn principals(&self) -> &PrincipalModel {
        &self.principals
    }

    /// Decides. Pure: the same facts and question have the same answer; revocations and liveness are
    /// [`PolicySnapshot::decide`](super::PolicySnapshot::decide)'s.
    pub fn evaluate(&self, facts: &WorkloadFacts, question: &Question<'_>) -> Decision {
        self.evaluate_for(facts, &Principal::new(facts, self), question)
    }

    /// As [`evaluate`](Self::evaluate), of a workload whose environment may be given instead of looked up.
    pub fn evaluate_in(
        &self,
        facts: &WorkloadFacts,
        environment: Option<&str>,
        question: &Question<'_>,
    ) -> Decision {
        let principal = Principal::described(facts, environment, self);
        self.evaluate_for(facts, &principal, question)
    }

    /// Every policy, whatever it applies to: what slices are compared with.
    #[cfg(test)]
    pub(super) fn whole(&self) -> PolicySet {
        set_of(self.policies.iter())
    }

    /// The policies that can apply; `None` for a resource that is not in this configuration.
    pub(super) fn slice(&self, question: &Question<'_>) -> Option<&Slice> {
        match self
            .slices
            .get(&(question.resource.address(), question.action))
        {
            Some(slice) => Some(slice),
            // The configuration was read again.
            None => self.applicable(question).map(|(_, slice)| slice),
        }
    }

    /// The resource and the policies that can apply; `None` for one that is not in this configuration.
    pub(super) fn applicable(&self, question: &Question<'_>) -> Option<(&LoadedResource, &Slice)> {
        let resource = self.resource(question)?;
        let slice = resource.slices.get(&question.action)?;
        Some((resource, slice))
    }

    fn resource(&self, question: &Question<'_>) -> Option<&LoadedResource> {
        match question.resource.identity() {
            (ResourceType::Credential, name) => self.credentials.get(name),
            (ResourceType::Destination, name) => self.destinations.get(name),
        }
    }

    pub(super) fn evaluate_for(
        &self,
        facts: &WorkloadFacts,
        principal: &Principal,
        question: &Question<'_>,
    ) -> Decision {
        let deny = |kind: DenialKind, policies: &[&Arc<LoadedPolicy>]| {
            let attributes_read = self.values_read(facts, policies);
            Decision::Deny(Arc::new(Denial {
                kind,
                policies: ids(policies),
                policy_version: Arc::clone(&self.version),
                nearest: None,
                environment: Arc::clone(&principal.environment),
                attributes_read,
            }))
        };
        let Some((resource, slice)) = self.applicable(question) else {
            return deny(DenialKind::NoPermit, &[]);
        };
        if let Some(kind) = self.lacks_evidence(facts, question) {
            return deny(kind, &[]);
        }
        if slice.reads.path.is_read()
            && question
                .request
                .is_some_and(|request| request.path.is_ambiguous())
        {
            return deny(DenialKind::AmbiguousPath, &[]);
        }
        let unavailable = self.unavailable(facts, &slice.reads);
        if !unavailable.is_empty() {
            let kind = DenialKind::AttestationUnavailable {
                attestors: unavailable,
            };
            return deny(kind, &[]);
        }
        let world = World::new(self, facts, principal, question, resource);
        let decided = match slice.decide(&world, question.wall) {
            Some(deciding) => Ok(deciding),
            None => self.decide_by_cedar(facts, principal, question, slice),
        };
        let deciding = match decided {
            Ok(deciding) => deciding,
            Err(Failed { policies, detail }) => {
                return deny(DenialKind::EvaluationError { detail }, &policies);
            }
        };
        if deciding.first().is_some_and(|policy| policy.is_permit) {
            return match permission(&deciding, question, principal) {
                Some(mut permission) => {
                    permission.attributes_read = self.values_read(facts, &deciding);
                    let same_time = self.same_time(&slice.reads, question.wall);
                    let (from, until) = same_time.map(|time| (time.start, time.end)).unzip();
                    let last_expiry = slice.last_expiry(question.wall);
                    permission.valid_from = from.max(last_expiry);
                    let ends = [permission.valid_until, until];
                    permission.valid_until = ends.into_iter().flatten().min();
                    Decision::Allow(Arc::new(permission))
                }
                None => deny(DenialKind::NoPermit, &[]),
            };
        }
        match self.missing_evidence(facts, slice, &deciding, question.wall) {
            Some(kind) => deny(kind, &deciding),
            None if !deciding.is_empty() => deny(DenialKind::Forbidden, &deciding),
            None => {
                let prepared = match self.prepare(facts, principal, question, &slice.reads) {
                    Ok(prepared) => prepared,
                    Err(detail) => return deny(DenialKind::EvaluationError { detail }, &[]),
                };
                let nearest = conditions::nearest_miss(slice, &prepared, question);
                let read: Vec<&Arc<LoadedPolicy>> = slice
                    .policies
                    .iter()
                    .filter(|policy| {
                        nearest
                            .as_ref()
                            .is_some_and(|miss| miss.policy == policy.id)
                    })
                    .collect();
                Decision::Deny(Arc::new(Denial {
                    kind: DenialKind::NoPermit,
                    policies: Arc::default(),
                    policy_version: Arc::clone(&self.version),
                    attributes_read: self.values_read(facts, &read),
                    nearest,
                    environment: Arc::clone(&principal.environment),
                }))
            }
        }
    }

    /// As [`Slice::decide`], by Cedar.
    fn decide_by_cedar<'a>(
        &self,
        facts: &WorkloadFacts,
        principal: &Principal,
        question: &Question<'_>,
        slice: &'a Slice,
    ) -> Result<Vec<&'a Arc<LoadedPolicy>>, Failed<'a>> {
        let prepared = self
            .prepare(facts, principal, question, &slice.reads)
            .map_err(|detail| Failed {
                policies: Vec::new(),
                detail,
            })?;
        let unexpired;
        let set = match slice.expired(question.wall) {
            0 => &slice.set,
            _ => {
                unexpired = set_of(slice.in_force(question.wall));
                &unexpired
            }
        };
        let response = self
            .authorizer
            .is_authorized(&prepared.request, set, &prepared.entities);

        // Cedar skips a policy that fails; a skipped `forbid` would fail open.
        let mut failed = Vec::new();
        let mut detail = String::new();
        for error in response.diagnostics().errors() {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(error) = error;
            failed.push(error.policy_id());
            if !detail.is_empty() {
                detail.push_str("; ");
            }
            detail.push_str(&source::sentence(&error.to_string()));
        }
        match failed.is_empty() {
            true => Ok(slice.with_ids(response.diagnostics().reason())),
            false => Err(Failed {
                policies: slice.with_ids(failed),
                detail,
            }),
        }
    }

    /// The question in Cedar's form.
    pub(super) fn prepare(
        &self,
        facts: &WorkloadFacts,
        principal: &Principal,
        question: &Question<'_>,
        reads: &Reads,
    ) -> Result<Prepared, String> {
        let resource = self.resource(question).ok_or_else(|| {
            let (_, name) = question.resource.identity();
            format!("`{name}` is not in the configuration")
        })?;
        let destination = question.destination.and_then(|destination| {
            self.destinations
                .get(&*destination.name)
                .filter(|found| found.entity.uid() != resource.entity.uid())
        });
        let workload = principal.entity(facts).clone()?;
        let entities = Entities::from_entities(
            [workload, resource.entity.clone()]
                .into_iter()
                .chain(destination.map(|destination| destination.entity.clone())),
            None,
        )
        .map_err(|error| error.to_string())?;
        let request = Request::new(
            workload_uid(),
            uid("Action", question.action.as_str()),
            resource.entity.uid(),
            self.context(facts, question, reads)?,
            None,
        )
        .map_err(|error| error.to_string())?;
        Ok(Prepared { request, entities })
    }

    fn context(
        &self,
        facts: &WorkloadFacts,
        question: &Question<'_>,
        reads: &Reads,
    ) -> Result<Context, String> {
        let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
        let texts = |texts: &[String]| {
            RestrictedExpression::new_set(
                texts
                    .iter()
                    .map(|text| RestrictedExpression::new_string(text.clone())),
            )
        };
        let (scopes, audience) = question.resource.asked();
        let mut pairs = Vec::new();
        if reads.scopes {
            pairs.push(("scopes".to_owned(), texts(scopes)));
        }
        if reads.audience {
            pairs.push(("audience".to_owned(), text(audience.unwrap_or_default())));
        }
        if reads.evidence {
            pairs.push(("evidence".to_owned(), texts(&facts.evidence)));
        }
        if reads.destination
            && let Some(destination) = question.destination
        {
            pairs.push((
                "destination".to_owned(),
                RestrictedExpression::new_entity_uid(uid("Destination", &destination.name)),
            ));
        }
        if reads.request
            && let Some(request) = question.request
        {
            let record = RestrictedExpression::new_record([
                ("method".to_owned(), text(request.method.as_str())),
                ("path".to_owned(), text(request.path.as_str())),
                (
                    "safe".to_owned(),
                    RestrictedExpression::new_bool(request.is_safe()),
                ),
            ])
            .map_err(|error| error.to_string())?;
            pairs.push(("request".to_owned(), record));
        }
        if reads.time {
            let instant =
                jiff::Timestamp::try_from(question.wall).map_err(|error| error.to_string())?;
            pairs.push((
                "time".to_owned(),
                RestrictedExpression::new_datetime(
                    instant.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                ),
            ));
        }
        if reads.local {
            let (weekday, hour) = self.local_time(question.wall);
            let record = RestrictedExpression::new_record([
                ("weekday".to_owned(), text(weekday_name(weekday))),
                (
                    "hour".to_owned(),
                    RestrictedExpression::new_long(i64::from(hour)),
                ),
            ])
            .map_err(|error| error.to_string())?;
            pairs.push(("local".to_owned(), record));
        }
        Context::from_pairs(pairs).map_err(|error| error.to_string())
    }

    /// When the policies that read the time read the same as at `wall`: in that second where one reads
    /// `context.time`, else in that hour where one reads `context.local`.
    fn same_time(&self, reads: &Reads, wall: SystemTime) -> Option<Range<SystemTime>> {
        let (past, whole) = match (reads.time, reads.local) {
            (true, _) => (0, 1),
            (false, true) => {
                let instant = jiff::Timestamp::try_from(wall).ok()?;
                let local = instant.to_zoned(self.time_zone.clone());
                let past =
                    u64::try_from(i32::from(local.minute()) * 60 + i32::from(local.second()));
                (past.ok()?, 3600)
            }
            (false, false) => return None,
        };
        let seconds = wall.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
        let at = |seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        Some(at(seconds.saturating_sub(past))?..at(seconds + whole - past)?)
    }

    /// Weekday (Monday is 1) and hour on the node's clock.
    pub(super) fn local_time(&self, wall: SystemTime) -> (i8, i8) {
        match jiff::Timestamp::try_from(wall) {
            Ok(instant) => {
                let local = instant.to_zoned(self.time_zone.clone());
                (local.weekday().to_monday_one_offset(), local.hour())
            }
            Err(_) => (0, 0),
        }
    }

    /// Why a workload of which nothing is established may not send what no destination covers, whatever
    /// policies permit: a permit that reads nothing would open the agent to whoever reaches it.
    fn lacks_evidence(&self, facts: &WorkloadFacts, question: &Question<'_>) -> Option<DenialKind> {
        let is_attested = facts.groups.values().any(|group| !group.is_empty());
        if is_attested || !matches!(question.resource, Resource::Unmatched) {
            return None;
        }
        let away: Vec<String> = facts
            .failed_attestors
            .iter()
            .filter(|failed| failed.kind == FailureKind::CouldNotRun)
            .map(|failed| failed.name.clone())
            .collect();
        Some(match (away.is_empty(), self.issuer_groups.is_empty()) {
            (false, _) => DenialKind::AttestationUnavailable { attestors: away },
            (true, false) => DenialKind::PresentedEvidenceRequired {
                issuers: self.issuer_groups.iter().cloned().collect(),
                invalid: why_invalid(facts, &self.issuer_groups),
            },
            (true, true) => DenialKind::NoEvidence,
        })
    }

    /// The attestors that could not run and whose attributes are read.
    fn unavailable(&self, facts: &WorkloadFacts, reads: &Reads) -> Vec<String> {
        let failed = facts
            .failed_attestors
            .iter()
            .filter(|failed| failed.kind == FailureKind::CouldNotRun);
        failed
            .filter(|failed| {
                groups_of_attestor(&failed.name).any(|group| {
                    facts
                        .groups
                        .get(group)
                        .is_none_or(|established| established.is_empty())
                        && self.principals.reads_group(reads, group)
                })
            })
            .map(|failed| failed.name.clone())
            .collect()
    }

    /// The established values of what these policies read.
    fn values_read(&self, facts: &WorkloadFacts, policies: &[&Arc<LoadedPolicy>]) -> Arc<[String]> {
        let mut are_read: SmallVec<[bool; 64]> = smallvec![false; self.attributes.len()];
        for place in policies.iter().flat_map(|policy| &policy.attributes) {
            if let Some(is_read) = are_read.get_mut(*place) {
                *is_read = true;
            }
        }
        self.attributes
            .iter()
            .zip(are_read)
            .filter(|(_, is_read)| *is_read)
            .filter_map(|((group, name), _)| {
                let value = facts.attribute(group, name)?;
                Some(format!("{group}.{name}={value}"))
            })
            .collect()
    }

    /// Whether a token that was not presented could change a no: a permit of the slice reads an issuer's
    /// group that is missing, and every forbid that is satisfied does so as well.
    fn missing_evidence(
        &self,
        facts: &WorkloadFacts,
        slice: &Slice,
        forbids: &[&Arc<LoadedPolicy>],
        wall: SystemTime,
    ) -> Option<DenialKind> {
        let missing = |policy: &LoadedPolicy| {
            self.issuer_groups
                .iter()
                .filter(|group| {
                    !facts.groups.contains_key(*group)
                        && self.principals.reads_group(&policy.reads, group)
                })
                .cloned()
                .collect::<BTreeSet<String>>()
        };
        let mut issuers = BTreeSet::new();
        for forbid in forbids {
            let missing = missing(forbid);
            if missing.is_empty() {
                return None;
            }
            issuers.extend(missing);
        }
        for policy in slice.in_force(wall).filter(|policy| policy.is_permit) {
            issuers.extend(missing(policy));
        }
        if issuers.is_empty() {
            return None;
        }
        Some(DenialKind::PresentedEvidenceRequired {
            invalid: why_invalid(facts, &issuers),
            issuers: issuers.into_iter().collect(),
        })
    }
}

impl LoadedPolicy {
    fn new(
        parsed: ParsedPolicy,
        files: &[PolicyFile],
        attributes: Vec<usize>,
        attributes_of_all: &[(String, String)],
    ) -> Self {
        let text = files
            .iter()
            .find(|file| file.path == parsed.path)
            .map_or("", |file| file.text.as_str());
        let place = position(text, parsed.effect_place().start);
        Self {
            id: Arc::from(parsed.id()),
            location: format!("{}:{}:{}", parsed.path.display(), place.line, place.column),
            is_permit: parsed.is_permit(),
            reads: parsed.reads,
            attributes,
            compiled: CompiledPolicy::of(&parsed.json, attributes_of_all),
            policy: parsed.policy,
            json: parsed.json,
            max_lifetime: parsed.max_lifetime,
            scopes: parsed.scopes,
            expires: parsed.expires,
            conditions: std::sync::OnceLock::new(),
        }
    }
}

fn ids(policies: &[&Arc<LoadedPolicy>]) -> Arc<[Arc<str>]> {
    policies
        .iter()
        .map(|policy| Arc::clone(&policy.id))
        .collect()
}

fn owned((group, name): (&str, &str)) -> (String, String) {
    (group.to_owned(), name.to_owned())
}

/// Why the token that was presented does not count, where it would be one of these issuers'.
fn why_invalid(facts: &WorkloadFacts, issuers: &BTreeSet<String>) -> Option<String> {
    facts
        .failed_attestors
        .iter()
        .find(|failed| {
            failed.kind == FailureKind::InvalidEvidence
                && (issuers.contains(&failed.name) || failed.name == NO_ISSUER)
        })
        .map(|failed| failed.detail.clone())
}

/// What the satisfied permits allow together; `None` if `@scopes` leaves nothing of what was asked.
fn permission(
    permits: &[&Arc<LoadedPolicy>],
    question: &Question<'_>,
    principal: &Principal,
) -> Option<Permission> {
    let (asked, audience) = match question.resource {
        Resource::Credential {
            scopes, audience, ..
        } => (Arc::clone(scopes), audience.cloned()),
        Resource::Destination(_) | Resource::Unmatched => (Arc::default(), None),
    };
    let expires = |permit: &&Arc<LoadedPolicy>| permit.expires;
    let later = |one: Option<SystemTime>, other: Option<SystemTime>| Some(one?.max(other?));
    Some(Permission {
        policies: ids(permits),
        max_lifetime: permits
            .iter()
            .filter_map(|permit| permit.max_lifetime)
            .min(),
        scopes: capped(asked, permits)?,
        audience,
        environment: Arc::clone(&principal.environment),
        attributes_read: Arc::default(),
        valid_from: None,
        valid_until: permits.iter().map(expires).reduce(later).flatten(),
    })
}

/// The scopes asked for, as far as the satisfied permits allow them together; `None` if nothing is left.
fn capped(asked: Arc<[String]>, permits: &[&Arc<LoadedPolicy>]) -> Option<Arc<[String]>> {
    if permits.iter().any(|permit| permit.scopes.is_none()) {
        return Some(asked);
    }
    let allowed: BTreeSet<&String> = permits
        .iter()
        .filter_map(|permit| permit.scopes.as_ref())
        .flatten()
        .collect();
    if asked.is_empty() {
        // A server's default may be more than the cap: the cap is asked for by name.
        return Some(allowed.into_iter().cloned().collect());
    }
    let left: Arc<[String]> = asked
        .iter()
        .filter(|scope| allowed.contains(scope))
        .cloned()
        .collect();
    (!left.is_empty()).then_some(left)
}

/// The groups that an attestor states. The attestor of processes states the container's as well.
pub(super) fn groups_of_attestor(name: &str) -> impl Iterator<Item = &str> {
    let also = (name == "unix").then_some("container");
    std::iter::once(name).chain(also)
}

pub(super) fn covers_action(constraint: &ActionConstraint, action: Action) -> bool {
    match constraint {
        ActionConstraint::Any => true,
        ActionConstraint::Eq(only) => *only == uid("Action", action.as_str()),
        ActionConstraint::In(several) => several.contains(&uid("Action", action.as_str())),
    }
}

fn covers_resource(
    constraint: &ResourceConstraint,
    resource_type: ResourceType,
    resource: &EntityUid,
    ancestors: &HashSet<EntityUid>,
) -> bool {
    let is_in = |group: &EntityUid| group == resource || ancestors.contains(group);
    let is_of = |type_name: &cedar_policy::EntityTypeName| {
        type_name.namespace().is_empty() && type_name.basename() == resource_type.as_str()
    };
    match constraint {
        ResourceConstraint::Any => true,
        ResourceConstraint::Eq(only) => only == resource,
        ResourceConstraint::In(group) => is_in(group),
        ResourceConstraint::Is(type_name) => is_of(type_name),
        ResourceConstraint::IsIn(type_name, group) => is_of(type_name) && is_in(group),
    }
}

fn resource_entity(
    uid: EntityUid,
    name: &str,
    environment: &str,
    parents: HashSet<EntityUid>,
) -> Entity {
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let attributes = HashMap::from([
        ("name".to_owned(), text(name)),
        ("environment".to_owned(), text(environment)),
    ]);
    match Entity::new(uid, attributes, parents) {
        Ok(entity) => entity,
        Err(_) => unreachable!("strings are valid attributes"),
    }
}

/// As policies have it; Monday is 1.
pub(super) fn weekday_name(monday_is_one: i8) -> &'static str {
    match monday_is_one {
        1 => "monday",
        2 => "tuesday",
        3 => "wednesday",
        4 => "thursday",
        5 => "friday",
        6 => "saturday",
        _ => "sunday",
    }
}

fn version_of(files: &[PolicyFile]) -> Arc<str> {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for file in files {
        let name = file.path.file_name().unwrap_or_default();
        for part in [name.as_encoded_bytes(), file.text.as_bytes()] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
    }
    let mut version = hexadecimal(context.finish().as_ref());
    version.truncate(16);
    Arc::from(version)
}
