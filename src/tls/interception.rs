//! The certificate authority that intercepted connections are served under.
//!
//! Three tiers, so that running clients keep trusting across restarts and new hosts: a root that
//! clients load, an intermediate name-constrained to the configured hosts (RFC 5280 section
//! 4.2.1.10; its key lives in memory only), and leaves of at most 24 hours.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use countersign_attestors::hexadecimal;
use quick_cache::sync::Cache;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ResolvesServerCert;
use rustls::sign::{CertifiedKey, SigningKey};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::trust::expiry;
use super::{ALPN_HTTP1, ALPN_HTTP2};
use crate::config::{CaSource, Interception};
use crate::files::{make_private_directory, write_durably};
use crate::secret_file;

const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const INTERMEDIATE_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Certificates are dated back, for clients whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(3600);
const LEAF_CACHE: usize = 4096;

/// Why the interception authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file or directory cannot be used.
    #[error("`{path}`: {detail}")]
    File {
        /// The path.
        path: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// A certificate could not be made or read.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A key cannot sign for TLS.
    #[error("key: {0}")]
    Key(#[from] rustls::Error),
    /// A root whose key was dropped cannot cover new hosts.
    #[error("`source: memory` cannot cover the new host `{0}`")]
    RootKeyGone(String),
}

impl AuthorityError {
    /// What to do about it.
    pub fn next(&self) -> &'static str {
        match self {
            Self::RootKeyGone(_) => "restart, or write `interception.ca: {source: generated}`",
            Self::File { .. } | Self::Certificate(_) | Self::Key(_) => {
                "mend it, or name another under `interception.ca`; the agent's user must have the right to it"
            }
        }
    }
}

/// Mints leaves for the configured hosts.
pub struct InterceptionAuthority {
    root_pem: String,
    chain: Vec<CertificateDer<'static>>,
    intermediate: Issuer<'static, KeyPair>,
    hosts: Vec<String>,
    leaf_key: KeyPair,
    leaf_signing_key: Arc<dyn SigningKey>,
    leaves: Cache<(String, Offer), Arc<Leaf>>,
    /// When another intermediate should be made; `None` where no key is left to make one with.
    renew_at: Option<SystemTime>,
}

/// Which protocols a handshake offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Offer {
    /// HTTP/2 and HTTP/1.1.
    Http2AndHttp1,
    /// HTTP/1.1 only, as the destination speaks nothing else.
    Http1,
}

struct Leaf {
    server_config: Arc<ServerConfig>,
    renew_at: SystemTime,
}

impl std::fmt::Debug for InterceptionAuthority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("InterceptionAuthority")
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

impl InterceptionAuthority {
    /// Opens the configured authority and mints an intermediate for `hosts`. `previous` is the
    /// authority in force, whose root a `memory` source keeps.
    pub fn open(
        interception: &Interception,
        hosts: Vec<String>,
        now: SystemTime,
        previous: Option<&Arc<Self>>,
    ) -> Result<Arc<Self>, AuthorityError> {
        match &interception.source {
            CaSource::Memory => match previous {
                Some(previous) => match hosts.iter().find(|host| !previous.hosts.contains(host)) {
                    Some(host) => Err(AuthorityError::RootKeyGone(host.clone())),
                    None => Ok(Arc::clone(previous)),
                },
                None => {
                    let root = generate_root(now)?;
                    let pem = root.pem();
                    Self::under_root(&root, pem, hosts, now, None)
                }
            },
            CaSource::Generated { state_directory } => {
                let (root, pem) = open_generated_root(state_directory, now)?;
                let renew_at = now + INTERMEDIATE_LIFETIME / 2;
                Self::under_root(&root, pem, hosts, now, Some(renew_at))
            }
            CaSource::Files {
                certificate_file,
                key_file,
            } => Self::from_files(certificate_file, key_file, hosts),
        }
    }

    fn under_root(
        root: &Issuer<'_, KeyPair>,
        root_pem: String,
        hosts: Vec<String>,
        now: SystemTime,
        renew_at: Option<SystemTime>,
    ) -> Result<Arc<Self>, AuthorityError> {
        let lifetime = match renew_at {
            Some(_) => INTERMEDIATE_LIFETIME,
            None => ROOT_LIFETIME,
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut parameters =
            authority_parameters("Countersign interception intermediate", now, lifetime);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.use_authority_key_identifier_extension = true;
        parameters.name_constraints = Some(NameConstraints {
            permitted_subtrees: permitted_subtrees(&hosts),
            excluded_subtrees: excluded_forms(&hosts),
        });
        let certificate = parameters.signed_by(&key, root)?;
        let chain = vec![certificate.der().clone()];
        Self::assemble(
            root_pem,
            chain,
            Issuer::new(parameters, key),
            hosts,
            renew_at,
        )
    }

    fn from_files(
        certificate_file: &Path,
        key_file: &Path,
        hosts: Vec<String>,
    ) -> Result<Arc<Self>, AuthorityError> {
        let pem = read_text(certificate_file)?;
        let certificates: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(|error| file_error(certificate_file, error))?;
        let Some((intermediate, above)) = certificates.split_first() else {
            return Err(file_error(certificate_file, "holds no certificate"));
        };
        let root = above.last().unwrap_or(intermediate);
        let root_pem = super::trust::pem_of([root]);
        let key = read_key(key_file)?;
        let issuer = Issuer::from_ca_cert_der(intermediate, key)?;
        // The root itself is not sent (RFC 8446 section 4.4.2).
        let below_root = certificates.len().saturating_sub(1).max(1);
        let chain = certificates.iter().take(below_root).cloned().collect();
        Self::assemble(root_pem, chain, issuer, hosts, None)
    }

    fn assemble(
        root_pem: String,
        chain: Vec<CertificateDer<'static>>,
        intermediate: Issuer<'static, KeyPair>,
        hosts: Vec<String>,
        renew_at: Option<SystemTime>,
    ) -> Result<Arc<Self>, AuthorityError> {
        let leaf_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let der = PrivateKeyDer::try_from(leaf_key.serialize_der())
            .map(Zeroizing::new)
            .map_err(|detail| rustls::Error::General(detail.to_owned()))?;
        Ok(Arc::new(Self {
            root_pem,
            chain,
            intermediate,
            hosts,
            leaf_signing_key: any_ecdsa_type(&der)?,
            leaf_key,
            leaves: Cache::new(LEAF_CACHE),
            renew_at,
        }))
    }

    /// The root certificate in PEM: public, what clients load.
    pub fn root_certificate_pem(&self) -> &str {
        &self.root_pem
    }

    /// The hosts that leaves may be minted for, in order.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// The SHA-256, in hexadecimal, of the root and of the certificate that leaves are signed under.
    pub fn certificate_sha256(&self) -> (String, String) {
        let of = |der: &[u8]| {
            hexadecimal(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der).as_ref())
        };
        let root = CertificateDer::from_pem_slice(self.root_pem.as_bytes());
        (
            root.map(|root| of(&root)).unwrap_or_default(),
            self.chain
                .first()
                .map(|first| of(first))
                .unwrap_or_default(),
        )
    }

    /// Whether both sign under the same certificates.
    pub fn has_same_certificates(&self, other: &Self) -> bool {
        self.chain == other.chain && self.root_pem == other.root_pem
    }

    /// When the first certificate of those that are sent ends.
    pub fn expiry(&self) -> Option<SystemTime> {
        self.chain.iter().filter_map(expiry).min()
    }

    /// Whether the intermediate has lived half its life and a new authority should be opened.
    pub fn is_due(&self, now: SystemTime) -> bool {
        self.renew_at.is_some_and(|renew_at| now >= renew_at)
    }

    /// The TLS configuration for an intercepted connection to `host`; `None` for a host that is
    /// not configured.
    pub fn server_config(
        &self,
        host: &str,
        offer: Offer,
        now: SystemTime,
    ) -> Result<Option<Arc<ServerConfig>>, AuthorityError> {
        if !self.hosts.iter().any(|known| known == host) {
            return Ok(None);
        }
        let key = (host.to_owned(), offer);
        if let Some(leaf) = self.leaves.get(&key)
            && now < leaf.renew_at
        {
            return Ok(Some(Arc::clone(&leaf.server_config)));
        }
        let leaf = Arc::new(Leaf {
            server_config: self.mint(host, offer, now)?,
            renew_at: now + LEAF_LIFETIME / 2,
        });
        self.leaves.insert(key, Arc::clone(&leaf));
        Ok(Some(Arc::clone(&leaf.server_config)))
    }

    fn mint(
        &self,
        host: &str,
        offer: Offer,
        now: SystemTime,
    ) -> Result<Arc<ServerConfig>, AuthorityError> {
        let mut parameters = CertificateParams::default();
        parameters.not_before = OffsetDateTime::from(now - BACKDATE);
        parameters.not_after = OffsetDateTime::from(now + LEAF_LIFETIME - BACKDATE);
        // The host stands in the subject alternative name only (RFC 9525 section 4.1): a common
        // name is at most 64 characters.
        parameters.distinguished_name = DistinguishedName::new();
        parameters
            .distinguished_name
            .push(DnType::OrganizationName, "Countersign interception");
        parameters.subject_alt_names = vec![match host.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(host.try_into()?),
        }];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        parameters.use_authority_key_identifier_extension = true;
        let certificate = parameters.signed_by(&self.leaf_key, &self.intermediate)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.chain.iter().cloned());
        let certified_key = Arc::new(CertifiedKey::new(chain, Arc::clone(&self.leaf_signing_key)));
        let mut server_config = ServerConfig::builder()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(OneKey(certified_key)));
        server_config.alpn_protocols = match offer {
            Offer::Http2AndHttp1 => vec![ALPN_HTTP2.to_vec(), ALPN_HTTP1.to_vec()],
            Offer::Http1 => vec![ALPN_HTTP1.to_vec()],
        };
        Ok(Arc::new(server_config))
    }
}

#[derive(Debug)]
struct OneKey(Arc<CertifiedKey>);

impl ResolvesServerCert for OneKey {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

fn authority_parameters(name: &str, now: SystemTime, lifetime: Duration) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.not_before = OffsetDateTime::from(now - BACKDATE);
    parameters.not_after = OffsetDateTime::from(now + lifetime);
    parameters.distinguished_name = DistinguishedName::new();
    parameters
        .distinguished_name
        .push(DnType::OrganizationName, "Countersign");
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters
}

fn generate_root(now: SystemTime) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let mut parameters = authority_parameters("Countersign interception root", now, ROOT_LIFETIME);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    CertifiedIssuer::self_signed(parameters, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

fn permitted_subtrees(hosts: &[String]) -> Vec<GeneralSubtree> {
    hosts
        .iter()
        .map(|host| match host.parse::<IpAddr>() {
            Ok(address) => {
                let prefix = if address.is_ipv4() { 32 } else { 128 };
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, prefix))
            }
            Err(_) => GeneralSubtree::DnsName(host.clone()),
        })
        .collect()
}

/// A form of name without any permitted subtree is unconstrained (RFC 5280 section 4.2.1.10), so
/// names and addresses are each excluded whole where no host is one.
fn excluded_forms(hosts: &[String]) -> Vec<GeneralSubtree> {
    let addresses: Vec<Option<IpAddr>> = hosts.iter().map(|host| host.parse().ok()).collect();
    let mut excluded = Vec::new();
    if !addresses.iter().any(Option::is_none) {
        excluded.push(GeneralSubtree::DnsName(String::new()));
    }
    if !addresses.iter().any(Option::is_some) {
        excluded.push(GeneralSubtree::IpAddress(CidrSubnet::from_v4_prefix(
            [0; 4], 0,
        )));
        excluded.push(GeneralSubtree::IpAddress(CidrSubnet::from_v6_prefix(
            [0; 16], 0,
        )));
    }
    excluded
}

/// Reads the root kept in `directory`, or makes one there.
fn open_generated_root(
    directory: &Path,
    now: SystemTime,
) -> Result<(Issuer<'static, KeyPair>, String), AuthorityError> {
    let certificate_path = directory.join("root.pem");
    let key_path = directory.join("root.key");
    prepare_directory(directory)?;
    if !key_path.exists() {
        let root = generate_root(now)?;
        write_durably(&certificate_path, root.pem().as_bytes(), 0o644)
            .map_err(|error| file_error(&certificate_path, error))?;
        let key = Zeroizing::new(root.key().serialize_pem());
        write_durably(&key_path, key.as_bytes(), 0o600)
            .map_err(|error| file_error(&key_path, error))?;
        tracing::info!(directory = %directory.display(), "made an interception root");
    }
    let mode = fs::metadata(&key_path)
        .map_err(|error| file_error(&key_path, error))?
        .permissions()
        .mode();
    refuse_wider_than_owner(&key_path, mode, "0600")?;
    let pem = read_text(&certificate_path)?;
    let key = read_key(&key_path)?;
    Ok((Issuer::from_ca_cert_pem(&pem, key)?, pem))
}

fn prepare_directory(directory: &Path) -> Result<(), AuthorityError> {
    make_private_directory(directory).map_err(|error| file_error(directory, error))?;
    let mode = fs::metadata(directory)
        .map_err(|error| file_error(directory, error))?
        .permissions()
        .mode();
    refuse_wider_than_owner(directory, mode, "0700")?;
    let on_tmpfs = nix::sys::statfs::statfs(directory)
        .is_ok_and(|status| status.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
    if !on_tmpfs {
        tracing::warn!(
            directory = %directory.display(),
            "the interception root's key is on a disk; a tmpfs such as /run keeps it out of backups"
        );
    }
    Ok(())
}

fn refuse_wider_than_owner(path: &Path, mode: u32, wanted: &str) -> Result<(), AuthorityError> {
    match mode & 0o077 {
        0 => Ok(()),
        _ => Err(file_error(
            path,
            format!(
                "has mode {:04o}, which lets others in: set it to {wanted}",
                mode & 0o7777
            ),
        )),
    }
}

/// Whether a file's content is a private key (PEM) that leaves can be signed with.
pub fn holds_key(content: &[u8]) -> bool {
    key_in(content).map(Zeroizing::new).is_ok()
}

fn key_in(content: &[u8]) -> Result<KeyPair, rcgen::Error> {
    let der = PrivateKeyDer::from_pem_slice(content)
        .map(Zeroizing::new)
        .map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
    KeyPair::try_from(&*der)
}

fn read_key(path: &Path) -> Result<KeyPair, AuthorityError> {
    let content = secret_file::read(path).map_err(|error| file_error(path, error))?;
    Ok(key_in(&content)?)
}

fn read_text(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|error| file_error(path, error))
}

fn file_error(path: &Path, detail: impl ToString) -> AuthorityError {
    AuthorityError::File {
        path: path.to_owned(),
        detail: detail.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};

    use super::*;

    /// Whether a client that trusts the authority's root takes a leaf for `name` that its intermediate
    /// signed, whatever the agent itself would sign.
    fn is_taken(authority: &InterceptionAuthority, name: &str) -> Result<(), rustls::Error> {
        let server = authority
            .mint(name, Offer::Http1, SystemTime::now())
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(authority.root_pem.as_bytes()).unwrap())
            .unwrap();
        let client = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = rustls::ServerConnection::new(server).unwrap();
        while client.is_handshaking() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut bytes.as_slice()).unwrap();
            server.process_new_packets().unwrap();
            let mut bytes = Vec::new();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut bytes.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn a_stolen_intermediate_is_good_for_the_configured_hosts_only() {
        super::super::install_cryptography_provider();
        let address = "192.0.2.7";
        let six = "2001:db8::7";
        let rows: &[(&[&str], &[&str], &[&str])] = &[
            (
                &["api.example.com"],
                &["api.example.com", "sub.api.example.com"],
                &["example.com", "other.example", address, six],
            ),
            (
                &[address],
                &[address],
                &["192.0.2.8", six, "example.com", "localhost"],
            ),
            (
                &[address, six],
                &[address, six],
                &["2001:db8::8", "example.com"],
            ),
            (
                &[address, "api.example.com"],
                &[address, "api.example.com"],
                &["192.0.2.8", "example.com"],
            ),
        ];
        for (hosts, taken, refused) in rows {
            let interception = Interception {
                source: CaSource::Memory,
                ca_certificate_file: None,
                trust_bundle_file: None,
            };
            let hosts = hosts.iter().map(ToString::to_string).collect::<Vec<_>>();
            let authority =
                InterceptionAuthority::open(&interception, hosts.clone(), SystemTime::now(), None)
                    .unwrap();
            for name in *taken {
                is_taken(&authority, name)
                    .unwrap_or_else(|error| panic!("{hosts:?}: {name}: {error}"));
            }
            for name in *refused {
                let error = is_taken(&authority, name).expect_err(name);
                let said = format!("{error:?}");
                assert!(
                    said.contains("NameConstraintViolation"),
                    "{hosts:?}: {name}: {said}"
                );
            }
        }
    }
}
