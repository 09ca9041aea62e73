//! `destinations`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::header::AUTHORIZATION;

use super::Converter;
use crate::config::load::{ByName, suggestion};
use crate::config::raw::Text;
use crate::config::reader::Located;
use crate::config::tree::Place;
use crate::config::{
    CredentialConfig, CredentialUse, Destination, Injection, InjectionFormat, Mode, PathPatterns,
    Scheme, Timeouts, TokenSource, raw, text,
};

impl Converter<'_> {
    pub(super) fn destinations(
        &mut self,
        written: Vec<Located<raw::Destination>>,
        credentials: &[Arc<CredentialConfig>],
    ) -> Vec<Arc<Destination>> {
        let by_name: ByName<Arc<CredentialConfig>> = credentials
            .iter()
            .map(|credential| (credential.name.to_string(), Arc::clone(credential)))
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

    pub(super) fn destination(
        &mut self,
        name: Option<String>,
        written: raw::Destination,
        credentials: &ByName<Arc<CredentialConfig>>,
    ) -> Option<Destination> {
        if self.is_empty_list(&written.hosts) {
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
            name: name?.into(),
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

    pub(super) fn paths(&mut self, written: Option<&Located<Vec<Text>>>) -> Option<PathPatterns> {
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
        match PathPatterns::new(&globs) {
            Ok(patterns) => Some(patterns),
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

    pub(super) fn credential_uses(
        &mut self,
        written: Vec<Located<raw::CredentialUse>>,
        credentials: &ByName<Arc<CredentialConfig>>,
    ) -> Vec<CredentialUse> {
        let mut uses: Vec<CredentialUse> = Vec::new();
        for Located { value: written, .. } in written {
            let scopes = written
                .scopes
                .as_ref()
                .map(|scopes| self.parse_all(Some(&scopes.value), text::scope));
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
            if let Some(scopes) = &written.scopes
                && !source.scopes.is_empty()
                && self.is_empty_list(scopes)
            {
                self.error(
                    "empty_list",
                    scopes.place,
                    format!(
                        "`scopes` is empty: the authorization server would choose, and not among those of credential `{}`",
                        credential.name
                    ),
                    "remove it for all of the credential's scopes, or write at least one",
                );
            }
            for scope in written.scopes.iter().flat_map(|scopes| &scopes.value) {
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
                scopes: scopes.map_or_else(|| Arc::clone(&source.scopes), Arc::from),
                credential: Arc::clone(credential),
                inject,
            });
        }
        uses
    }

    pub(super) fn injection(&mut self, written: Option<Located<raw::Inject>>) -> Injection {
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
    pub(super) fn reachable(
        &mut self,
        destination: &Destination,
        earlier: &[Arc<Destination>],
        at: Place,
    ) {
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
}
