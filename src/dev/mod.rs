//! The embedded servers of `countersign dev`, which the tests share: an authorization server, an OIDC
//! issuer, and an API that demands a valid token. They are real servers on real sockets, reached by
//! the same code as any other.

pub mod api;
pub mod authorization_server;
pub mod certificates;
pub mod directory;
pub mod embedded;
pub mod oidc_issuer;
mod server;

pub use api::{Api, ApiOptions};
pub use authorization_server::{
    AuthorizationServer, AuthorizationServerOptions, Client, ClientCredential,
};
pub use certificates::{CertificateAuthority, ServerCertificate};
pub use directory::Directory;
pub use embedded::EmbeddedServers;
pub use oidc_issuer::OidcIssuer;
pub use server::Listening;

#[cfg(test)]
mod tests;
