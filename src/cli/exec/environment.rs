//! The variables by which common clients find the proxy and trust its certificates.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::SocketAddr;

use crate::cli::own_agent::PrivateDirectory;
use crate::cli::presented::{REQUEST_TOKEN_VARIABLE, REQUEST_URL_VARIABLE};
use crate::client::AGENT_VARIABLE;
use crate::tls::stores::{TRUST_STORE_PASSWORD, bundle_or_ours, pkcs12};

/// What the command does not get: whoever holds these makes tokens of its identity.
pub(super) const SECRETS: [&str; 2] = [REQUEST_URL_VARIABLE, REQUEST_TOKEN_VARIABLE];

/// Clients that add these certificates to the ones that they trust.
pub(in crate::cli) const ADD: [&str; 2] = ["NODE_EXTRA_CA_CERTS", "DENO_CERT"];

/// Clients that trust these certificates instead.
pub(in crate::cli) const REPLACE: [&str; 9] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "AWS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
    // Of a `cafile` in an .npmrc, beside which npm does not look at what Node adds.
    "npm_config_cafile",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
];

/// Both spellings: curl reads `http_proxy` in lower case only, others in upper case only.
pub(in crate::cli) const PROXY: [&str; 4] =
    ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"];

/// Where a command's clients are led.
#[derive(Debug)]
pub(super) struct Environment {
    /// The proxy, or the relay to it.
    pub(super) proxy: SocketAddr,
    /// Hosts that are reached without it.
    pub(super) no_proxy: String,
    /// The interception root.
    pub(super) ca_certificate: Option<String>,
    /// The workload API, or the relay to it.
    pub(super) agent: String,
}

impl Environment {
    /// The variables; the certificates that they name are written to `directory`.
    pub(super) fn variables(
        &self,
        directory: &PrivateDirectory,
    ) -> io::Result<Vec<(&'static str, OsString)>> {
        let url = format!("http://{}", self.proxy);
        let mut variables: Vec<(&'static str, OsString)> = Vec::new();
        for name in PROXY {
            variables.push((name, url.clone().into()));
        }
        for name in ["no_proxy", "NO_PROXY"] {
            variables.push((name, self.no_proxy.clone().into()));
        }
        variables.push(("NODE_USE_ENV_PROXY", "1".into()));
        let mut java = vec![
            format!("-Dhttp.proxyHost={}", self.proxy.ip()),
            format!("-Dhttp.proxyPort={}", self.proxy.port()),
            format!("-Dhttps.proxyHost={}", self.proxy.ip()),
            format!("-Dhttps.proxyPort={}", self.proxy.port()),
            format!("-Dhttp.nonProxyHosts={}", self.no_proxy.replace(',', "|")),
        ];
        if let Some(root) = &self.ca_certificate {
            let bundle = bundle_or_ours(root).map_err(io::Error::other)?;
            let (ours, both, store) = (
                directory.file("ca.pem"),
                directory.file("bundle.pem"),
                directory.file("trust.p12"),
            );
            fs::write(&ours, root)?;
            fs::write(&both, &bundle)?;
            fs::write(&store, pkcs12(&bundle).map_err(io::Error::other)?)?;
            for name in ADD {
                variables.push((name, ours.clone().into()));
            }
            for name in REPLACE {
                variables.push((name, both.clone().into()));
            }
            java.extend([
                format!("-Djavax.net.ssl.trustStore={}", store.display()),
                "-Djavax.net.ssl.trustStoreType=PKCS12".to_owned(),
                format!("-Djavax.net.ssl.trustStorePassword={TRUST_STORE_PASSWORD}"),
            ]);
        }
        variables.push(("JAVA_TOOL_OPTIONS", java_options(&java)));
        variables.push((AGENT_VARIABLE, self.agent.clone().into()));
        Ok(variables)
    }
}

/// Ours behind those that are set: of two the later one counts.
fn java_options(ours: &[String]) -> OsString {
    let mut options = std::env::var_os("JAVA_TOOL_OPTIONS").unwrap_or_default();
    if !options.is_empty() {
        options.push(" ");
    }
    options.push(ours.join(" "));
    options
}
