//! From what fits the format to what makes sense: one function for each section.
//!
//! A function reports what is wrong and gives what it can, so that one load finds everything.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use countersign_attestors::AttributeType;
use http::header::AUTHORIZATION;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::load::{ByName, SourceFile, reason, suggestion};
use super::raw::{self, Text};
use super::reader::{Entries, Located, Scalar};
use super::text::{self, Flaw};
use super::tree::Place;
use super::{
    AdminConfig, Attestors, AuditConfig, AuditSink, AuthorizationServer, Bind, CaSource,
    ClientAuthentication, Config, CredentialConfig, CredentialUse, Destination, EnvironmentRule,
    Injection, InjectionFormat, Interception, Limits, Listener, ListenerKind, LogConfig, LogFormat,
    Mode, OauthClientCredentials, OidcIssuer, OnAuditFailure, PathPatterns, Scheme, SocketAccess,
    Template, TemplatePart, Timeouts, TokenSource, Unmatched,
};
use crate::diagnostics::{Diagnostic, Diagnostics};

const DEFAULT_STATE_DIRECTORY: &str = "/run/countersign/ca";

/// Makes the typed configuration. `misfits` are the places that did not fit the format.
pub(super) fn convert(
    files: &[SourceFile],
    document: Option<raw::Document>,
    misfits: Vec<Place>,
    watched: Vec<PathBuf>,
    diagnostics: &mut Diagnostics,
) -> Option<Config> {
    let names = |section: &str| -> Vec<String> {
        files.iter().flat_map(|file| file.names(section)).collect()
    };
    Converter {
        credential_names: names("credentials"),
        destination_names: names("destinations"),
        attributes: BTreeMap::new(),
        issuers_misfit: false,
        files,
        misfits,
        watched: watched.into_iter().collect(),
        diagnostics,
    }
    .document(document?)
}

struct Converter<'a> {
    files: &'a [SourceFile],
    misfits: Vec<Place>,
    watched: BTreeSet<PathBuf>,
    diagnostics: &'a mut Diagnostics,
    /// Names written anywhere, in items that do not fit too: those are not reported as unknown.
    credential_names: Vec<String>,
    destination_names: Vec<String>,
    /// What a template or environment rule may name: attributes by group.
    attributes: BTreeMap<String, BTreeSet<String>>,
    issuers_misfit: bool,
}

/// Reporting.
impl Converter<'_> {
    fn path(&self, place: Place) -> PathBuf {
        self.files
            .get(place.file)
            .map_or_else(PathBuf::new, |file| file.path.clone())
    }

    fn error(
        &mut self,
        code: &'static str,
        place: Place,
        message: impl Into<String>,
        next: impl Into<String>,
    ) {
        let diagnostic = Diagnostic::error(code, self.path(place), message)
            .at(place.span())
            .next(next);
        self.diagnostics.push(diagnostic);
    }

    fn warning(
        &mut self,
        code: &'static str,
        place: Place,
        message: impl Into<String>,
        next: impl Into<String>,
    ) {
        let diagnostic = Diagnostic::warning(code, self.path(place), message)
            .at(place.span())
            .next(next);
        self.diagnostics.push(diagnostic);
    }

    /// A key that is needed because of another; silent where something in `whole` did not fit.
    fn missing(&mut self, key: &str, whole: Place, at: Place, because: &str) {
        if !self.misfits.iter().any(|misfit| whole.encloses(*misfit)) {
            self.error(
                "missing_key",
                at,
                format!("missing key `{key}`: {because}"),
                format!("add `{key}`"),
            );
        }
    }

    fn not_applicable<T>(&mut self, key: &str, written: Option<&Located<T>>, because: &str) {
        if let Some(written) = written {
            self.error(
                "key_not_applicable",
                written.place,
                format!("`{key}` has no meaning here: {because}"),
                format!("remove `{key}`"),
            );
        }
    }

    fn parse<T>(&mut self, written: &Text, parser: fn(&str) -> Result<T, Flaw>) -> Option<T> {
        if text::has_user(&written.value) {
            let path = self.path(written.place);
            self.diagnostics.mask(&path, written.place.span());
            self.error(
                "inline_secret",
                written.place,
                "the URL holds a user or password",
                "remove it: a secret is never written inline",
            );
            return None;
        }
        match parser(&written.value) {
            Ok(value) => Some(value),
            Err(Flaw {
                code,
                message,
                next,
            }) => {
                self.error(code, written.place, message, next);
                None
            }
        }
    }

    fn parse_option<T>(
        &mut self,
        written: Option<&Text>,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> Option<T> {
        written.and_then(|written| self.parse(written, parser))
    }

    /// Parses each; what stands twice is an error.
    fn parse_all<T: PartialEq>(
        &mut self,
        written: Option<&Vec<Text>>,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> Vec<T> {
        let mut values = Vec::new();
        for item in written.into_iter().flatten() {
            if let Some(value) = self.parse(item, parser) {
                if values.contains(&value) {
                    self.error(
                        "duplicate_value",
                        item.place,
                        format!("`{}` stands twice", item.value),
                        "keep one of the two",
                    );
                } else {
                    values.push(value);
                }
            }
        }
        values
    }

    fn parse_entries<T>(
        &mut self,
        written: Option<&Located<Entries<Text>>>,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> BTreeMap<String, T> {
        let mut values = BTreeMap::new();
        for (key, value) in written
            .map(|written| &written.value.0)
            .into_iter()
            .flatten()
        {
            let key = self.parse(key, text::plain);
            let value = self.parse(value, parser);
            if let (Some(key), Some(value)) = (key, value) {
                values.insert(key, value);
            }
        }
        values
    }

    /// A name that is unique among `seen`.
    fn unique_name(
        &mut self,
        what: &str,
        written: &Text,
        parser: fn(&str) -> Result<String, Flaw>,
        seen: &mut HashMap<String, Place>,
    ) -> Option<String> {
        let name = self.parse(written, parser)?;
        if let Some(first) = seen.get(&name).copied() {
            let first = self.describe(first);
            self.error(
                "duplicate_name",
                written.place,
                format!("{what} `{name}` stands twice"),
                format!("the first is at {first}: give one of the two another name"),
            );
            return None;
        }
        seen.insert(name.clone(), written.place);
        Some(name)
    }

    /// Whether a reference leads nowhere. Where no name at all could be read, the reason is reported already.
    fn is_unknown(&self, name: &String, names: &[String]) -> bool {
        !names.contains(name) && (self.misfits.is_empty() || !names.is_empty())
    }

    /// `FILE:LINE:COLUMN`.
    fn describe(&self, place: Place) -> String {
        let at = Diagnostic::error("place", self.path(place), "").at(place.span());
        let line = self.diagnostics.line(&at);
        line.trim_end_matches(": ").to_owned()
    }
}

/// Files that the configuration names.
impl Converter<'_> {
    fn resolve(&self, written: &Text) -> PathBuf {
        self.files.get(written.place.file).map_or_else(
            || PathBuf::from(&written.value),
            |file| file.directory.join(&written.value),
        )
    }

    /// A path that is written by the agent: it need not exist.
    fn output_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let written = written?;
        self.parse(written, text::plain)?;
        Some(self.resolve(written))
    }

    /// A file that is read, and watched for changes.
    fn input_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.output_file(written)?;
        let written = written?;
        self.watched.insert(path.clone());
        let opened = std::fs::File::open(&path).and_then(|file| {
            if file.metadata()?.is_dir() {
                Err(std::io::ErrorKind::IsADirectory.into())
            } else {
                Ok(())
            }
        });
        match opened {
            Ok(()) => Some(path),
            Err(error) => {
                self.error(
                    "unreadable_file",
                    written.place,
                    format!("`{}` cannot be read: {}", path.display(), reason(&error)),
                    "name a file that this user may read; a relative path begins at the directory of this file",
                );
                None
            }
        }
    }

    /// A file that holds a secret: nobody but its owner should read it.
    fn secret_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.input_file(written)?;
        let mode = std::fs::metadata(&path).map_or(0, |metadata| metadata.permissions().mode());
        if let Some(written) = written
            && mode & 0o077 != 0
        {
            self.warning(
                "secret_file_open_to_others",
                written.place,
                format!(
                    "`{}` has mode {:04o}: others than its owner may use it",
                    path.display(),
                    mode & 0o7777
                ),
                format!("run `chmod 0600 {}`", path.display()),
            );
        }
        Some(path)
    }

    /// A PEM file with at least one certificate.
    fn ca_file(&mut self, written: Option<&Text>) -> Option<PathBuf> {
        let path = self.input_file(written)?;
        let certificates = CertificateDer::pem_file_iter(&path)
            .ok()
            .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>().ok())
            .unwrap_or_default();
        if certificates.is_empty()
            && let Some(written) = written
        {
            self.error(
                "invalid_certificate_file",
                written.place,
                format!("`{}` holds no PEM certificate", path.display()),
                "name a file with `-----BEGIN CERTIFICATE-----`",
            );
        }
        Some(path)
    }
}

/// Sections.
impl Converter<'_> {
    fn document(mut self, document: raw::Document) -> Option<Config> {
        let main = self.files.first()?;
        let main_path = main.path.clone();
        let main_directory = main.directory.clone();
        let start = Place {
            file: 0,
            start: 0,
            end: 0,
        };
        match &document.version {
            Some(version) if version.value != 1 => self.error(
                "unknown_version",
                version.place,
                format!("`{}` is no version of this format", version.value),
                "write `version: 1`",
            ),
            Some(_) => {}
            None => self.missing_section("version", start),
        }
        for (section, is_missing) in [
            ("listeners", document.listeners.is_none()),
            ("credentials", document.credentials.is_none()),
            ("destinations", document.destinations.is_none()),
        ] {
            if is_missing {
                self.missing_section(section, start);
            }
        }
        let workers = document
            .runtime
            .and_then(|runtime| runtime.value.workers)
            .and_then(|workers| {
                if (1..=64).contains(&workers.value) {
                    usize::try_from(workers.value).ok()
                } else {
                    self.out_of_range(&workers, "write a number from 1 to 64");
                    None
                }
            });
        let attestors = self.attestors(document.attestors);
        let environments = self.environments(document.environments.unwrap_or_default());
        let credentials = self.credentials(document.credentials.unwrap_or_default(), &attestors);
        let destinations =
            self.destinations(document.destinations.unwrap_or_default(), &credentials);
        let mut binds = HashMap::new();
        let listeners = self.listeners(
            document.listeners.unwrap_or_default(),
            &destinations,
            &mut binds,
        );
        let interception = self.interception(document.interception, &listeners, &destinations);
        let policy_directory =
            self.policy_directory(document.policies, &main_directory, &main_path);
        let limits = self.limits(document.limits);
        let audit = self.audit(document.audit);
        let log = self.log(document.telemetry);
        let admin = self.admin(document.admin, &mut binds);
        Some(Config {
            path: main_path,
            workers,
            listeners,
            attestors,
            environments,
            credentials,
            destinations,
            unmatched: document
                .unmatched
                .map_or(Unmatched::Refuse, |unmatched| unmatched.value),
            interception,
            policy_directory,
            limits,
            audit,
            log,
            admin,
            watched_files: self.watched.into_iter().collect(),
        })
    }

    fn missing_section(&mut self, section: &str, start: Place) {
        if self.misfits.is_empty() {
            let next = if section == "version" {
                "write `version: 1`".to_owned()
            } else {
                format!("add `{section}`, `{section}: []` for none")
            };
            self.error(
                "missing_key",
                start,
                format!("missing key `{section}`"),
                next,
            );
        }
    }

    fn out_of_range(&mut self, written: &Located<u32>, next: &str) {
        self.error(
            "out_of_range",
            written.place,
            format!("`{}` is out of range", written.value),
            next,
        );
    }

    fn attestors(&mut self, written: Option<Located<raw::Attestors>>) -> Attestors {
        let Some(Located {
            value: written,
            place,
        }) = written
        else {
            return Attestors::default();
        };
        self.issuers_misfit = self.misfits.iter().any(|misfit| place.encloses(*misfit));
        let mut names = HashMap::new();
        let mut urls: HashMap<String, Place> = HashMap::new();
        let oidc_issuers = written
            .oidc
            .map(|oidc| oidc.value.issuers)
            .unwrap_or_default()
            .into_iter()
            .filter_map(|issuer| {
                let url = issuer.value.issuer.clone();
                let Some(issuer) = self.oidc_issuer(issuer.value, &mut names) else {
                    self.issuers_misfit = true;
                    return None;
                };
                if let Some(first) = urls.insert(url.value.clone(), url.place) {
                    let first = self.describe(first);
                    self.error(
                        "duplicate_issuer",
                        url.place,
                        format!("issuer `{}` stands twice", url.value),
                        format!("the first is at {first}: a token must belong to one name"),
                    );
                }
                Some(issuer)
            })
            .collect();
        let attestors = Attestors {
            unix: written.unix.is_some(),
            systemd: written.systemd.is_some(),
            oidc_issuers,
        };
        for declaration in attestors.declarations() {
            self.attributes
                .entry(declaration.group)
                .or_default()
                .insert(declaration.name);
        }
        attestors
    }

    fn oidc_issuer(
        &mut self,
        written: raw::Issuer,
        names: &mut HashMap<String, Place>,
    ) -> Option<OidcIssuer> {
        let name = self.unique_name("issuer", &written.name, text::issuer_name, names);
        let issuer = self.parse(&written.issuer, text::https_url);
        if written.audiences.value.is_empty() {
            self.error(
                "empty_list",
                written.audiences.place,
                "`audiences` is empty: no token could be accepted",
                "write the audience that tokens are issued for",
            );
        }
        let audiences = self.parse_all(Some(&written.audiences.value), text::plain);
        let mut claims: BTreeMap<String, AttributeType> = BTreeMap::new();
        if let Some(preset) = written.preset {
            let name = match preset.value {
                raw::Preset::Github => "github",
                raw::Preset::Gitlab => "gitlab",
            };
            claims.extend(countersign_attestors::oidc::preset(name).unwrap_or_default());
        }
        for (claim, claim_type) in written
            .claims
            .map(|claims| claims.value.0)
            .unwrap_or_default()
        {
            if ["iss", "sub"].contains(&claim.value.as_str())
                && claim_type != raw::ClaimType::String
            {
                self.error(
                    "invalid_claim_type",
                    claim.place,
                    format!("the claim `{}` is a string", claim.value),
                    "remove it: it is always stated",
                );
            } else if text::is_identifier(&claim.value) {
                claims.insert(claim.value, attribute_type(claim_type));
            } else {
                self.error(
                    "invalid_name",
                    claim.place,
                    format!(
                        "the claim `{}` is no attribute name",
                        claim.value.escape_debug()
                    ),
                    "name claims of letters, digits and `_`",
                );
            }
        }
        let ca_file = self.ca_file(written.ca_file.as_ref());
        let connect_to = self.parse_option(written.connect_to.as_ref(), text::socket_address);
        let allow_addresses = self.parse_all(written.allow_addresses.as_ref(), text::network);
        Some(OidcIssuer {
            name: name?,
            issuer: issuer?,
            audiences,
            claims,
            ca_file,
            connect_to,
            allow_addresses,
        })
    }

    fn environments(&mut self, written: Vec<Located<raw::Environment>>) -> Vec<EnvironmentRule> {
        let mut rules = Vec::new();
        for Located { value: rule, .. } in written {
            let name = self.parse(&rule.name, text::name);
            if rule.when.value.0.is_empty() {
                self.error(
                    "empty_mapping",
                    rule.when.place,
                    "`when` is empty: the rule would hold for everybody",
                    "name at least one attribute",
                );
            }
            let mut when = BTreeMap::new();
            for (attribute, Scalar(value)) in rule.when.value.0 {
                match attribute.value.split_once('.') {
                    Some((group, name)) if text::is_identifier(name) => {
                        self.known_attribute(group, name, attribute.place);
                    }
                    _ => self.error(
                        "invalid_attribute",
                        attribute.place,
                        format!("`{}` names no attribute", attribute.value.escape_debug()),
                        "write `GROUP.ATTRIBUTE`: `systemd.system_unit`",
                    ),
                }
                when.insert(attribute.value, value);
            }
            if let Some(name) = name {
                rules.push(EnvironmentRule { name, when });
            }
        }
        rules
    }

    /// An attribute must be stated by some attestor that runs.
    fn known_attribute(&mut self, group: &str, name: &str, place: Place) {
        if self.issuers_misfit {
            return;
        }
        match self.attributes.get(group) {
            Some(names) if names.contains(name) => {}
            Some(names) => {
                let next = suggestion(name, names.iter().map(String::as_str));
                self.error(
                    "unknown_attribute",
                    place,
                    format!("`{group}` has no attribute `{name}`"),
                    next,
                );
            }
            None => {
                let next = match group {
                    "unix" | "systemd" => format!("add `{group}: {{}}` under `attestors`"),
                    "container" => "add `unix: {}` under `attestors`".to_owned(),
                    _ => suggestion(group, self.attributes.keys().map(String::as_str)),
                };
                self.error(
                    "unknown_attribute_group",
                    place,
                    format!("no configured attestor states attributes of `{group}`"),
                    next,
                );
            }
        }
    }

    fn template_attributes(&mut self, template: &Template, place: Place) {
        for part in &template.parts {
            if let TemplatePart::Attribute { group, name } = part {
                self.known_attribute(group, name, place);
            }
        }
    }

    fn credentials(
        &mut self,
        written: Vec<Located<raw::Credential>>,
        attestors: &Attestors,
    ) -> Vec<Arc<CredentialConfig>> {
        let mut names = HashMap::new();
        written
            .into_iter()
            .filter_map(|credential| {
                let name =
                    self.unique_name("credential", &credential.value.name, text::name, &mut names);
                let groups = self.parse_all(credential.value.groups.as_ref(), text::name);
                let environment =
                    self.parse_option(credential.value.environment.as_ref(), text::name);
                let source = match credential.value.kind.value {
                    raw::CredentialType::OauthClientCredentials => self
                        .oauth_client_credentials(credential, attestors)
                        .map(|oauth| TokenSource::OauthClientCredentials(Box::new(oauth))),
                };
                Some(Arc::new(CredentialConfig {
                    name: name?,
                    groups,
                    environment,
                    source: source?,
                }))
            })
            .collect()
    }

    fn oauth_client_credentials(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::Credential>,
        attestors: &Attestors,
    ) -> Option<OauthClientCredentials> {
        let issuer = self.parse_option(written.issuer.as_ref(), text::https_url);
        let token_endpoint = self.parse_option(written.token_endpoint.as_ref(), text::https_url);
        if written.issuer.is_none() && written.token_endpoint.is_none() {
            self.missing(
                "issuer",
                place,
                written.name.place,
                "the authorization server is found by it, or by `token_endpoint`",
            );
        }
        let server = match (token_endpoint, issuer) {
            (Some(token_endpoint), issuer) => Some(AuthorizationServer::TokenEndpoint {
                token_endpoint: token_endpoint.url().clone(),
                issuer: issuer.map(|issuer| issuer.as_str().to_owned()),
            }),
            (None, Some(issuer)) => Some(AuthorizationServer::Issuer(issuer)),
            (None, None) => None,
        };
        let client_id = self.parse(&written.client_id, text::template);
        if let Some(client_id) = &client_id {
            self.template_attributes(client_id, written.client_id.place);
        }
        let method = written.client_authentication.value.method.value;
        let client_authentication =
            self.client_authentication(written.client_authentication, attestors);
        let scopes = self.parse_all(written.scopes.as_ref(), text::scope);
        let resources = self.parse_all(written.resources.as_ref(), text::resource);
        let audience = self.parse_option(written.audience.as_ref(), text::plain);
        let parameters = self.parameters(written.parameters.as_ref());
        if method != raw::Method::PrivateKeyJwt {
            self.not_applicable(
                "assertion_claims",
                written.assertion_claims.as_ref(),
                "only `private_key_jwt` signs an assertion of ours",
            );
        }
        let assertion_claims = self.assertion_claims(written.assertion_claims.as_ref());
        let ca_file = self.ca_file(written.ca_file.as_ref());
        let timeout = self
            .parse_option(written.timeout.as_ref(), text::duration)
            .unwrap_or(Duration::from_secs(5));
        let connect_to = self.parse_option(written.connect_to.as_ref(), text::socket_address);
        if written.connect_to.is_some() {
            self.not_applicable(
                "outbound_proxy",
                written.outbound_proxy.as_ref(),
                "`connect_to` already says where the server is",
            );
        }
        let outbound_proxy = self.parse_option(written.outbound_proxy.as_ref(), text::proxy_url);
        let allow_addresses = self.parse_all(written.allow_addresses.as_ref(), text::network);
        Some(OauthClientCredentials {
            server: server?,
            client_id: client_id?,
            client_authentication: client_authentication?,
            scopes,
            resources,
            audience,
            parameters,
            send_client_id: written.send_client_id.unwrap_or(false),
            assertion_claims,
            ca_file,
            timeout,
            connect_to,
            outbound_proxy,
            allow_addresses,
        })
    }

    fn parameters(&mut self, written: Option<&Located<Entries<Text>>>) -> BTreeMap<String, String> {
        const OURS: [&str; 9] = [
            "grant_type",
            "client_id",
            "client_secret",
            "client_assertion",
            "client_assertion_type",
            "scope",
            "resource",
            "audience",
            "assertion",
        ];
        for (key, value) in written
            .map(|written| &written.value.0)
            .into_iter()
            .flatten()
        {
            let is_secret = ["secret", "password"]
                .iter()
                .any(|word| key.value.to_ascii_lowercase().contains(word));
            if is_secret {
                let path = self.path(value.place);
                self.diagnostics.mask(&path, value.place.span());
                self.error(
                    "inline_secret",
                    key.place,
                    format!("`{}` is written inline", key.value),
                    "name the file that holds it by `secret_file`",
                );
            } else if OURS.contains(&key.value.as_str()) {
                let next = match key.value.as_str() {
                    "scope" => "write `scopes`",
                    "resource" => "write `resources`",
                    "audience" => "write `audience` beside `parameters`",
                    _ => "remove it",
                };
                self.error(
                    "reserved_name",
                    key.place,
                    format!("the agent sets the parameter `{}` itself", key.value),
                    next,
                );
            }
        }
        self.parse_entries(written, text::plain)
    }

    fn assertion_claims(
        &mut self,
        written: Option<&Located<Entries<Text>>>,
    ) -> BTreeMap<String, Template> {
        const OURS: [&str; 7] = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti"];
        for (key, value) in written
            .map(|written| &written.value.0)
            .into_iter()
            .flatten()
        {
            if OURS.contains(&key.value.as_str()) {
                self.error(
                    "reserved_name",
                    key.place,
                    format!("the agent sets the claim `{}` itself", key.value),
                    "choose another name",
                );
            }
            if let Ok(template) = text::template(&value.value) {
                self.template_attributes(&template, value.place);
            }
        }
        self.parse_entries(written, text::template)
    }

    fn client_authentication(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::ClientAuthentication>,
        attestors: &Attestors,
    ) -> Option<ClientAuthentication> {
        let method = written.method.value;
        let at = written.method.place;
        if method != raw::Method::PrivateKeyJwt {
            const BECAUSE: &str = "it belongs to `private_key_jwt`";
            self.not_applicable("key_file", written.key_file.as_ref(), BECAUSE);
            self.not_applicable("algorithm", written.algorithm.as_ref(), BECAUSE);
            self.not_applicable("key_id", written.key_id.as_ref(), BECAUSE);
            self.not_applicable(
                "assertion_type_header",
                written.assertion_type_header.as_ref(),
                BECAUSE,
            );
        }
        if method != raw::Method::WorkloadAssertion {
            self.not_applicable(
                "issuer",
                written.issuer.as_ref(),
                "it belongs to `workload_assertion`",
            );
        }
        if method != raw::Method::ClientSecretBasic {
            self.not_applicable(
                "secret_file",
                written.secret_file.as_ref(),
                "it belongs to `client_secret_basic`",
            );
        }
        match method {
            raw::Method::PrivateKeyJwt => {
                if written.key_file.is_none() {
                    self.missing("key_file", place, at, "`private_key_jwt` signs with it");
                }
                if written.algorithm.is_none() {
                    self.missing("algorithm", place, at, "`private_key_jwt` signs by it");
                }
                let key_file = self.secret_file(written.key_file.as_ref());
                let key_id = self.parse_option(written.key_id.as_ref(), text::plain);
                let assertion_type_header =
                    self.parse_option(written.assertion_type_header.as_ref(), text::plain);
                Some(ClientAuthentication::PrivateKeyJwt {
                    key_file: key_file?,
                    algorithm: written.algorithm?.value,
                    key_id,
                    assertion_type_header,
                })
            }
            raw::Method::WorkloadAssertion => {
                if attestors.oidc_issuers.is_empty() && !self.issuers_misfit {
                    self.error(
                        "no_issuer",
                        at,
                        "`workload_assertion` sends the token that a workload presents, and no issuer is configured",
                        "add one under `attestors.oidc.issuers`",
                    );
                }
                if let Some(issuer) = &written.issuer
                    && !self.issuers_misfit
                    && !attestors
                        .oidc_issuers
                        .iter()
                        .any(|known| known.name == issuer.value)
                {
                    let next = suggestion(
                        &issuer.value,
                        attestors
                            .oidc_issuers
                            .iter()
                            .map(|known| known.name.as_str()),
                    );
                    self.error(
                        "unknown_issuer",
                        issuer.place,
                        format!("no issuer is named `{}`", issuer.value),
                        next,
                    );
                }
                Some(ClientAuthentication::WorkloadAssertion {
                    issuer: written.issuer.map(|issuer| issuer.value),
                })
            }
            raw::Method::ClientSecretBasic => {
                if written.secret_file.is_none() {
                    self.missing(
                        "secret_file",
                        place,
                        at,
                        "`client_secret_basic` reads the secret there",
                    );
                }
                let secret_file = self.secret_file(written.secret_file.as_ref());
                Some(ClientAuthentication::ClientSecretBasic {
                    secret_file: secret_file?,
                })
            }
        }
    }

    fn destinations(
        &mut self,
        written: Vec<Located<raw::Destination>>,
        credentials: &[Arc<CredentialConfig>],
    ) -> Vec<Arc<Destination>> {
        let by_name: ByName<Arc<CredentialConfig>> = credentials
            .iter()
            .map(|credential| (credential.name.clone(), Arc::clone(credential)))
            .collect();
        let mut names = HashMap::new();
        let mut destinations: Vec<Arc<Destination>> = Vec::new();
        for Located {
            value: destination, ..
        } in written
        {
            let at = destination.name.place;
            let name = self.unique_name("destination", &destination.name, text::name, &mut names);
            if let Some(destination) = self.destination(name, destination, &by_name) {
                self.reachable(&destination, &destinations, at);
                destinations.push(Arc::new(destination));
            }
        }
        destinations
    }

    fn destination(
        &mut self,
        name: Option<String>,
        written: raw::Destination,
        credentials: &ByName<Arc<CredentialConfig>>,
    ) -> Option<Destination> {
        if written.hosts.value.is_empty()
            && !self
                .misfits
                .iter()
                .any(|misfit| written.hosts.place.encloses(*misfit))
        {
            self.error(
                "empty_list",
                written.hosts.place,
                "`hosts` is empty",
                "write at least one host",
            );
        }
        let hosts = self.parse_all(Some(&written.hosts.value), text::host);
        let scheme = written
            .scheme
            .as_ref()
            .map_or(Scheme::Https, |scheme| scheme.value);
        let mut ports = Vec::new();
        for port in written.ports.iter().flatten() {
            if port.value == 0 {
                self.error(
                    "out_of_range",
                    port.place,
                    "`0` is out of range",
                    "write a number from 1 to 65535",
                );
            } else if ports.contains(&port.value) {
                self.error(
                    "duplicate_value",
                    port.place,
                    format!("`{}` stands twice", port.value),
                    "keep one of the two",
                );
            } else {
                ports.push(port.value);
            }
        }
        if ports.is_empty() {
            ports.push(scheme.default_port());
        }
        let paths = self.paths(written.paths.as_ref());
        let environment = self.parse_option(written.environment.as_ref(), text::name);
        let credentials =
            self.credential_uses(written.credentials.unwrap_or_default(), credentials);
        if scheme == Scheme::Http {
            self.not_applicable("ca_file", written.ca_file.as_ref(), "the scheme is `http`");
        }
        let ca_file = self.ca_file(written.ca_file.as_ref());
        let connect_to = self.parse_option(written.connect_to.as_ref(), text::socket_address);
        let allow_addresses = self.parse_all(written.allow_addresses.as_ref(), text::network);
        let mut timeouts = Timeouts {
            connect: Duration::from_secs(5),
            response_headers: Duration::from_secs(60),
            idle: Duration::from_secs(600),
        };
        if let Some(Located { value: written, .. }) = &written.timeouts {
            for (limit, written) in [
                (&mut timeouts.connect, &written.connect),
                (&mut timeouts.response_headers, &written.response_headers),
                (&mut timeouts.idle, &written.idle),
            ] {
                if let Some(duration) = self.parse_option(written.as_ref(), text::duration) {
                    *limit = duration;
                }
            }
        }
        Some(Destination {
            name: name?,
            hosts,
            ports,
            scheme,
            paths: paths?,
            environment,
            credentials,
            ca_file,
            connect_to,
            allow_addresses,
            mode: written.mode.map_or(Mode::Enforce, |mode| mode.value),
            timeouts,
        })
    }

    fn paths(&mut self, written: Option<&Located<Vec<Text>>>) -> Option<PathPatterns> {
        let everything = Located {
            value: vec![Located {
                value: "/**".to_owned(),
                place: Place {
                    file: 0,
                    start: 0,
                    end: 0,
                },
            }],
            place: Place {
                file: 0,
                start: 0,
                end: 0,
            },
        };
        let written = written.unwrap_or(&everything);
        if written.value.is_empty() {
            self.error(
                "empty_list",
                written.place,
                "`paths` is empty: no request could match",
                "remove it for all paths, or write a pattern",
            );
        }
        let globs = self.parse_all(Some(&written.value), text::path_pattern);
        let mut compiled = globset::GlobSetBuilder::new();
        for glob in &globs {
            compiled.add(glob.clone());
        }
        match compiled.build() {
            Ok(compiled) => Some(PathPatterns {
                patterns: globs.iter().map(|glob| glob.glob().to_owned()).collect(),
                compiled,
            }),
            Err(_) => {
                self.error(
                    "invalid_path_pattern",
                    written.place,
                    "the patterns are too large together",
                    "write fewer or shorter patterns",
                );
                None
            }
        }
    }

    fn credential_uses(
        &mut self,
        written: Vec<Located<raw::CredentialUse>>,
        credentials: &ByName<Arc<CredentialConfig>>,
    ) -> Vec<CredentialUse> {
        let mut uses: Vec<CredentialUse> = Vec::new();
        for Located { value: written, .. } in written {
            let scopes = written
                .scopes
                .as_ref()
                .map(|scopes| self.parse_all(Some(scopes), text::scope));
            let inject = self.injection(written.inject);
            let Some(credential) = credentials.get(&written.name.value) else {
                if self.is_unknown(&written.name.value, &self.credential_names) {
                    let next = suggestion(
                        &written.name.value,
                        self.credential_names.iter().map(String::as_str),
                    );
                    self.error(
                        "unknown_credential",
                        written.name.place,
                        format!("no credential is named `{}`", written.name.value),
                        next,
                    );
                }
                continue;
            };
            if uses
                .iter()
                .any(|earlier| earlier.credential.name == credential.name)
            {
                self.error(
                    "duplicate_name",
                    written.name.place,
                    format!(
                        "credential `{}` stands twice in this destination",
                        credential.name
                    ),
                    "keep one of the two",
                );
                continue;
            }
            let TokenSource::OauthClientCredentials(source) = &credential.source;
            for scope in written.scopes.iter().flatten() {
                if !source.scopes.contains(&scope.value) && text::scope(&scope.value).is_ok() {
                    let next = suggestion(&scope.value, source.scopes.iter().map(String::as_str));
                    self.error(
                        "scope_not_permitted",
                        scope.place,
                        format!(
                            "scope `{}` is not one of credential `{}`",
                            scope.value, credential.name
                        ),
                        next,
                    );
                }
            }
            uses.push(CredentialUse {
                scopes: scopes.unwrap_or_else(|| source.scopes.clone()),
                credential: Arc::clone(credential),
                inject,
            });
        }
        uses
    }

    fn injection(&mut self, written: Option<Located<raw::Inject>>) -> Injection {
        let (header, format) = written.map_or((None, None), |Located { value, .. }| {
            (value.header, value.format)
        });
        Injection {
            header: self
                .parse_option(header.as_ref(), text::injection_header)
                .unwrap_or(AUTHORIZATION),
            format: format.map_or(InjectionFormat::Bearer, |format| format.value),
        }
    }

    /// A destination that an earlier one covers wholly is never reached.
    fn reachable(&mut self, destination: &Destination, earlier: &[Arc<Destination>], at: Place) {
        let covers = |earlier: &Destination| {
            let every_path = earlier
                .paths
                .patterns
                .iter()
                .any(|pattern| pattern == "/**")
                || destination
                    .paths
                    .patterns
                    .iter()
                    .all(|pattern| earlier.paths.patterns.contains(pattern));
            every_path
                && earlier.scheme == destination.scheme
                && destination
                    .hosts
                    .iter()
                    .all(|host| earlier.hosts.contains(host))
                && destination
                    .ports
                    .iter()
                    .all(|port| earlier.ports.contains(port))
        };
        if destination.hosts.is_empty() {
            return;
        }
        if let Some(first) = earlier.iter().find(|earlier| covers(earlier)) {
            self.error(
                "unreachable_destination",
                at,
                format!(
                    "destination `{}` is never reached: `{}` before it covers the same scheme, hosts, ports and paths",
                    destination.name, first.name
                ),
                "put the narrower one first, or remove one of the two",
            );
        }
    }

    fn listeners(
        &mut self,
        written: Vec<Located<raw::Listener>>,
        destinations: &[Arc<Destination>],
        binds: &mut HashMap<Bind, Place>,
    ) -> Vec<Listener> {
        let mut names = HashMap::new();
        let mut listeners = Vec::new();
        for Located {
            value: listener,
            place,
        } in written
        {
            let name = self.unique_name("listener", &listener.name, text::name, &mut names);
            let bind = self.parse(&listener.bind, text::bind);
            if let Some(bind) = &bind {
                self.unique_bind(bind, listener.bind.place, binds);
                if let Bind::Tcp(address) = bind
                    && !address.ip().is_loopback()
                {
                    self.warning(
                        "listener_beyond_loopback",
                        listener.bind.place,
                        format!("`{address}` is open to other machines, whose callers leave no kernel evidence"),
                        "bind a loopback address or a Unix socket",
                    );
                }
                if matches!(bind, Bind::Tcp(_)) {
                    self.not_applicable(
                        "access",
                        listener.access.as_ref(),
                        "a TCP address has no permissions",
                    );
                }
            }
            let access = self.access(listener.access);
            let kind = self.listener_kind(
                listener.kind,
                listener.destination.as_ref(),
                place,
                destinations,
            );
            if let (Some(name), Some(bind), Some(kind)) = (name, bind, kind) {
                listeners.push(Listener {
                    name,
                    kind,
                    bind,
                    access,
                });
            }
        }
        listeners
    }

    fn unique_bind(&mut self, bind: &Bind, place: Place, binds: &mut HashMap<Bind, Place>) {
        if matches!(bind, Bind::Tcp(address) if address.port() == 0) {
            return;
        }
        if let Some(first) = binds.insert(bind.clone(), place) {
            let first = self.describe(first);
            self.error(
                "duplicate_bind",
                place,
                "this address is bound twice",
                format!("the first is at {first}: choose another address"),
            );
        }
    }

    fn access(&mut self, written: Option<Located<raw::Access>>) -> SocketAccess {
        let (mode, group) = written.map_or((None, None), |Located { value, .. }| {
            (value.mode, value.group)
        });
        SocketAccess {
            mode: self.parse_option(mode.as_ref(), text::mode),
            group: self.parse_option(group.as_ref(), text::plain),
        }
    }

    fn listener_kind(
        &mut self,
        kind: Located<raw::ListenerType>,
        destination: Option<&Text>,
        whole: Place,
        destinations: &[Arc<Destination>],
    ) -> Option<ListenerKind> {
        if kind.value != raw::ListenerType::Gateway {
            self.not_applicable("destination", destination, "it belongs to a `gateway`");
        }
        match kind.value {
            raw::ListenerType::ForwardProxy => Some(ListenerKind::ForwardProxy),
            raw::ListenerType::WorkloadApi => Some(ListenerKind::WorkloadApi),
            raw::ListenerType::Gateway => {
                let Some(name) = destination else {
                    self.missing("destination", whole, kind.place, "a `gateway` serves one");
                    return None;
                };
                let found = destinations
                    .iter()
                    .find(|destination| destination.name == name.value);
                if found.is_none() && self.is_unknown(&name.value, &self.destination_names) {
                    let next = suggestion(
                        &name.value,
                        self.destination_names.iter().map(String::as_str),
                    );
                    self.error(
                        "unknown_destination",
                        name.place,
                        format!("no destination is named `{}`", name.value),
                        next,
                    );
                }
                found.map(|destination| ListenerKind::Gateway {
                    destination: Arc::clone(destination),
                })
            }
        }
    }

    fn interception(
        &mut self,
        written: Option<Located<raw::Interception>>,
        listeners: &[Listener],
        destinations: &[Arc<Destination>],
    ) -> Option<Interception> {
        let generated = || CaSource::Generated {
            state_directory: PathBuf::from(DEFAULT_STATE_DIRECTORY),
        };
        let Some(Located { value: written, .. }) = written else {
            let has_proxy = listeners
                .iter()
                .any(|listener| listener.kind == ListenerKind::ForwardProxy);
            let has_secret = destinations.iter().any(|destination| {
                destination.scheme == Scheme::Https && !destination.credentials.is_empty()
            });
            return (has_proxy && has_secret).then(|| Interception {
                source: generated(),
                ca_certificate_file: None,
                trust_bundle_file: None,
            });
        };
        let source = match written.ca {
            None => generated(),
            Some(ca) => self.certificate_authority(ca).unwrap_or_else(generated),
        };
        Some(Interception {
            source,
            ca_certificate_file: self.output_file(written.ca_certificate_file.as_ref()),
            trust_bundle_file: self.output_file(written.trust_bundle_file.as_ref()),
        })
    }

    fn certificate_authority(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::CertificateAuthority>,
    ) -> Option<CaSource> {
        let source = written
            .source
            .as_ref()
            .map_or(raw::CaSourceName::Generated, |source| source.value);
        let at = written.source.as_ref().map_or(place, |source| source.place);
        if source != raw::CaSourceName::Generated {
            self.not_applicable(
                "state_directory",
                written.state_directory.as_ref(),
                "it belongs to `generated`",
            );
        }
        if source != raw::CaSourceName::Files {
            self.not_applicable(
                "certificate_file",
                written.certificate_file.as_ref(),
                "it belongs to `files`",
            );
            self.not_applicable(
                "key_file",
                written.key_file.as_ref(),
                "it belongs to `files`",
            );
        }
        match source {
            raw::CaSourceName::Generated => Some(CaSource::Generated {
                state_directory: self
                    .output_file(written.state_directory.as_ref())
                    .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIRECTORY)),
            }),
            raw::CaSourceName::Memory => Some(CaSource::Memory),
            raw::CaSourceName::Files => {
                if written.certificate_file.is_none() {
                    self.missing(
                        "certificate_file",
                        place,
                        at,
                        "`files` reads the intermediate there",
                    );
                }
                if written.key_file.is_none() {
                    self.missing(
                        "key_file",
                        place,
                        at,
                        "`files` reads the intermediate's key there",
                    );
                }
                let certificate_file = self.ca_file(written.certificate_file.as_ref());
                let key_file = self.secret_file(written.key_file.as_ref());
                Some(CaSource::Files {
                    certificate_file: certificate_file?,
                    key_file: key_file?,
                })
            }
        }
    }

    fn policy_directory(
        &mut self,
        written: Option<Located<raw::Policies>>,
        main_directory: &Path,
        main_path: &Path,
    ) -> PathBuf {
        let (path, place) = match written {
            Some(Located { value, .. }) => {
                (self.resolve(&value.directory), Some(value.directory.place))
            }
            None => (main_directory.join("policies"), None),
        };
        if let Err(error) = std::fs::read_dir(&path) {
            let cause = match error.kind() {
                std::io::ErrorKind::NotADirectory => "it is no directory".to_owned(),
                _ => reason(&error),
            };
            let mut diagnostic = Diagnostic::error(
                "unreadable_directory",
                place.map_or_else(|| main_path.to_owned(), |place| self.path(place)),
                format!("the policy directory `{}` cannot be read: {cause}", path.display()),
            )
            .next("create it, or name another by `policies: {directory: ...}`; without a policy all is denied");
            diagnostic.span = place.map(Place::span);
            self.diagnostics.push(diagnostic);
        }
        path
    }

    fn limits(&mut self, written: Option<Located<raw::Limits>>) -> Limits {
        let mut limits = Limits {
            connections: 4096,
            requests_in_flight: 4096,
        };
        let per_identity = written.and_then(|limits| limits.value.per_identity);
        if let Some(Located { value: written, .. }) = per_identity {
            for (limit, written) in [
                (&mut limits.connections, written.connections),
                (&mut limits.requests_in_flight, written.requests_in_flight),
            ] {
                if let Some(number) = self.at_least_one(written) {
                    *limit = number;
                }
            }
        }
        limits
    }

    fn at_least_one(&mut self, written: Option<Located<u32>>) -> Option<usize> {
        let written = written?;
        if written.value == 0 {
            self.out_of_range(&written, "write a number from 1");
            return None;
        }
        usize::try_from(written.value).ok()
    }

    fn audit(&mut self, written: Option<Located<raw::Audit>>) -> AuditConfig {
        let mut audit = AuditConfig {
            on_failure: OnAuditFailure::Block,
            sinks: vec![AuditSink::Stdout],
        };
        let Some(Located { value: written, .. }) = written else {
            return audit;
        };
        if let Some(on_failure) = written.on_failure {
            audit.on_failure = on_failure.value;
        }
        if let Some(sinks) = written.sinks {
            if sinks.value.is_empty()
                && !self
                    .misfits
                    .iter()
                    .any(|misfit| sinks.place.encloses(*misfit))
            {
                self.error(
                    "empty_list",
                    sinks.place,
                    "`sinks` is empty: no request may go unrecorded",
                    "write at least one: `{type: stdout}`",
                );
            }
            audit.sinks = Vec::new();
            for sink in sinks.value {
                let at = sink.value.kind.place;
                if let Some(sink) = self.sink(sink) {
                    if audit.sinks.contains(&sink) {
                        self.error(
                            "duplicate_value",
                            at,
                            "this sink stands twice",
                            "keep one of the two",
                        );
                    }
                    audit.sinks.push(sink);
                }
            }
        }
        audit
    }

    fn sink(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::Sink>,
    ) -> Option<AuditSink> {
        match written.kind.value {
            raw::SinkType::Stdout => {
                const BECAUSE: &str = "it belongs to `file`";
                self.not_applicable("path", written.path.as_ref(), BECAUSE);
                self.not_applicable("rotate_size", written.rotate_size.as_ref(), BECAUSE);
                self.not_applicable("keep", written.keep.as_ref(), BECAUSE);
                Some(AuditSink::Stdout)
            }
            raw::SinkType::File => {
                if written.path.is_none() {
                    self.missing(
                        "path",
                        place,
                        written.kind.place,
                        "a `file` sink writes there",
                    );
                }
                let path = self.output_file(written.path.as_ref());
                let rotate_size = self
                    .parse_option(written.rotate_size.as_ref(), text::size)
                    .unwrap_or(100 << 20);
                let keep = self.at_least_one(written.keep).unwrap_or(10);
                Some(AuditSink::File {
                    path: path?,
                    rotate_size,
                    keep,
                })
            }
        }
    }

    fn log(&mut self, written: Option<Located<raw::Telemetry>>) -> LogConfig {
        let (format, level) = written
            .and_then(|telemetry| telemetry.value.log)
            .map_or((None, None), |Located { value, .. }| {
                (value.format, value.level)
            });
        LogConfig {
            format: format.map_or(LogFormat::Text, |format| format.value),
            level: self
                .parse_option(level.as_ref(), text::log_level)
                .unwrap_or_else(|| "info".to_owned()),
        }
    }

    fn admin(
        &mut self,
        written: Option<Located<raw::Admin>>,
        binds: &mut HashMap<Bind, Place>,
    ) -> AdminConfig {
        let Some(Located { value: written, .. }) = written else {
            return AdminConfig {
                socket: None,
                metrics_bind: None,
            };
        };
        let socket = self.output_file(written.socket.as_ref());
        if let (Some(socket), Some(written)) = (&socket, &written.socket) {
            self.unique_bind(&Bind::Unix(socket.clone()), written.place, binds);
        }
        let metrics_bind = written.metrics_bind.as_ref().and_then(|written| {
            match self.parse(written, text::bind)? {
                Bind::Tcp(address) => {
                    self.unique_bind(&Bind::Tcp(address), written.place, binds);
                    Some(address)
                }
                Bind::Unix(_) => {
                    self.error(
                        "invalid_address",
                        written.place,
                        "metrics are served on TCP here",
                        "write `ADDRESS:PORT`; the admin socket serves them too",
                    );
                    None
                }
            }
        });
        AdminConfig {
            socket,
            metrics_bind,
        }
    }
}

fn attribute_type(claim_type: raw::ClaimType) -> AttributeType {
    match claim_type {
        raw::ClaimType::String => AttributeType::String,
        raw::ClaimType::Long => AttributeType::Long,
        raw::ClaimType::Boolean => AttributeType::Boolean,
        raw::ClaimType::StringSet => AttributeType::StringSet,
    }
}
