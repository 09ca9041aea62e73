//! `credentials`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::Converter;
use crate::config::load::suggestion;
use crate::config::raw::Text;
use crate::config::reader::{Entries, Located};
use crate::config::{
    Attestors, AuthorizationServer, ClientAuthentication, CredentialConfig, ExactUrl,
    OauthClientCredentials, Template, TokenSource, raw, text,
};

impl Converter<'_> {
    pub(super) fn credentials(
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
                    name: name?.into(),
                    groups,
                    environment,
                    source: source?,
                }))
            })
            .collect()
    }

    pub(super) fn oauth_client_credentials(
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
        let server = match (token_endpoint, &issuer) {
            (Some(token_endpoint), _) => Some(AuthorizationServer::TokenEndpoint(
                token_endpoint.url().clone(),
            )),
            (None, Some(issuer)) => Some(AuthorizationServer::Issuer(issuer.clone())),
            (None, None) => None,
        };
        let client_id = self.parse(&written.client_id, text::template);
        if let Some(client_id) = &client_id {
            self.template_attributes(client_id, written.client_id.place);
        }
        let method = written.client_authentication.value.method.value;
        if method == raw::Method::PrivateKeyJwt
            && written.issuer.is_none()
            && written.token_endpoint.is_some()
            && written.client_authentication.value.audience.is_none()
        {
            self.missing(
                "issuer",
                place,
                written.client_authentication.value.method.place,
                "it is the audience of the assertion that `private_key_jwt` signs; a server that demands another has it under `client_authentication.audience`",
            );
        }
        let issuer = issuer.as_ref().map(ExactUrl::as_str);
        let client_authentication =
            self.client_authentication(written.client_authentication, issuer, attestors);
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
            scopes: scopes.into(),
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

    pub(super) fn parameters(
        &mut self,
        written: Option<&Located<Entries<Text>>>,
    ) -> BTreeMap<String, String> {
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

    pub(super) fn assertion_claims(
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

    pub(super) fn client_authentication(
        &mut self,
        Located {
            value: written,
            place,
        }: Located<raw::ClientAuthentication>,
        server_issuer: Option<&str>,
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
            self.not_applicable("audience", written.audience.as_ref(), BECAUSE);
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
                let algorithm = written.algorithm.map(|algorithm| algorithm.value);
                let key_file = self.key_file(written.key_file.as_ref(), algorithm);
                let key_id = self.parse_option(written.key_id.as_ref(), text::plain);
                let assertion_type_header =
                    self.parse_option(written.assertion_type_header.as_ref(), text::plain);
                let audience = match &written.audience {
                    Some(audience) => self.parse(audience, text::plain),
                    None => server_issuer.map(str::to_owned),
                };
                Some(ClientAuthentication::PrivateKeyJwt {
                    key_file: key_file?,
                    algorithm: algorithm?,
                    key_id,
                    assertion_type_header,
                    audience: audience?,
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
                let secret_file = self.client_secret_file(written.secret_file.as_ref());
                Some(ClientAuthentication::ClientSecretBasic {
                    secret_file: secret_file?,
                })
            }
        }
    }
}
