//! The proxies: how each is configured, started and ended. Their configurations are in `peers/`.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

use crate::bare;
use crate::caller::{Form, Route};
use crate::load::{FIRST_UID, IDENTITIES, Load};
use crate::measure::{cpu, resident, tree};
use crate::origin::Origin;
use crate::{Fallible, HOST, LOAD_CORE, PROXY_CORE, pin};

/// As long as a token of the authorization server, so that all proxies write alike.
const STATIC_TOKEN_BYTES: usize = 560;

const READY_WITHIN: Duration = Duration::from_secs(30);

/// The value of the header that the others add; Countersign's has a token that was issued.
pub fn credential() -> String {
    format!("Bearer {}", "a".repeat(STATIC_TOKEN_BYTES))
}

/// A proxy under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    Bare,
    /// The bare proxy with an upstream connection for each of a caller's.
    BareWithoutSharing,
    Countersign,
    Nginx,
    Haproxy,
    EnvoyCredentialInjector,
    EnvoyExtAuthz,
    Squid,
    Mitmproxy,
}

impl Proxy {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare hyper",
            Self::BareWithoutSharing => "bare hyper, no upstream connection shared",
            Self::Countersign => "Countersign",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::EnvoyCredentialInjector => "Envoy with credential_injector",
            Self::EnvoyExtAuthz => "Envoy with ext_authz over gRPC, its authorizer included",
            Self::Squid => "squid",
            Self::Mitmproxy => "mitmproxy",
        }
    }
}

/// A proxy that runs.
pub struct Peer {
    pub proxy: Proxy,
    pub directory: PathBuf,
    /// The proxy, after what it cannot do without.
    children: Vec<Child>,
    address: SocketAddr,
    https_address: SocketAddr,
    /// The certificate that vouches for intercepted connections.
    certificate: PathBuf,
    /// Requests that were answered with 200.
    pub served: u64,
}

/// What proxies are started from.
pub struct Surroundings<'a> {
    pub agent: &'a Path,
    pub directory: &'a Path,
    pub origin: &'a Origin,
}

/// A file of Countersign's beside those in `peers/`, which a work adds.
#[derive(Debug, Clone)]
pub struct AddedFile {
    /// Relative to the configuration's directory.
    pub name: &'static str,
    pub text: String,
}

impl Peer {
    /// Starts a proxy in a new directory, without waiting for it.
    pub fn start(
        proxy: Proxy,
        surroundings: &Surroundings<'_>,
        added: &[AddedFile],
    ) -> Fallible<Self> {
        let starting = Starting {
            directory: new_directory(surroundings.directory)?,
            surroundings,
            address: free()?,
            https_address: free()?,
            authorizer: free()?,
        };
        let children = match proxy {
            Proxy::Bare => vec![starting.bare(false)?],
            Proxy::BareWithoutSharing => vec![starting.bare(true)?],
            Proxy::Countersign => vec![starting.countersign(added)?],
            Proxy::Nginx => vec![starting.nginx()?],
            Proxy::Haproxy => vec![starting.haproxy()?],
            Proxy::EnvoyCredentialInjector => vec![starting.envoy_with_credential_injector()?],
            Proxy::EnvoyExtAuthz => vec![starting.authorizer()?, starting.envoy_with_ext_authz()?],
            Proxy::Squid => vec![starting.squid()?],
            Proxy::Mitmproxy => vec![starting.mitmproxy()?],
        };
        let certificate = match proxy {
            Proxy::Mitmproxy => "mitmproxy-ca-cert.pem",
            _ => "ca.pem",
        };
        Ok(Self {
            proxy,
            certificate: starting.directory.join(certificate),
            directory: starting.directory,
            children,
            address: starting.address,
            https_address: starting.https_address,
            served: 0,
        })
    }

    /// Waits until a request is answered with 200.
    pub fn wait_until_ready(&mut self, load: &mut Load, form: Form) -> Fallible<()> {
        let began = Instant::now();
        loop {
            // The certificate is written by the proxy.
            let ready = self.route(form).and_then(|route| load.open(&route, 1));
            load.close()?;
            self.served += load.take_served();
            match ready {
                Ok(report) if report.served == 1 => return Ok(()),
                outcome if began.elapsed() > READY_WITHIN => {
                    let name = self.proxy.name();
                    let log = std::fs::read_to_string(self.log())?;
                    return Err(format!("{name} is not ready: {outcome:?}; its log: {log}").into());
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Where its log is.
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// How requests get to it.
    pub fn route(&self, form: Form) -> Fallible<Route> {
        Ok(Route {
            proxy: match form {
                Form::Absolute | Form::Tunnel => self.address,
                Form::Origin => self.https_address,
            },
            form,
            host: HOST.to_owned(),
            prefix: "/v1/orders".to_owned(),
            roots: match form {
                Form::Tunnel => std::fs::read_to_string(&self.certificate)?,
                Form::Absolute | Form::Origin => String::new(),
            },
        })
    }

    /// The process number of the proxy itself.
    pub fn id(&self) -> u32 {
        self.children.last().map_or(0, Child::id)
    }

    /// CPU time up to now, of all of its processes.
    pub fn cpu(&self) -> Fallible<Duration> {
        cpu(&self.processes()?)
    }

    /// Its memory in RAM, in bytes.
    pub fn resident(&self) -> Fallible<u64> {
        resident(&self.processes()?)
    }

    fn processes(&self) -> Fallible<Vec<u32>> {
        let mut processes = Vec::new();
        for child in &self.children {
            processes.extend(tree(child.id())?);
        }
        Ok(processes)
    }

    /// Asks it to end in good order and waits for that.
    pub fn stop(&mut self) -> Fallible<()> {
        for child in self.children.iter_mut().rev() {
            kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
            child.wait()?;
        }
        Ok(())
    }

    /// Ends it in good order. Countersign's audit must then hold as many requests as it served.
    pub fn end(mut self) -> Fallible<()> {
        self.stop()?;
        if self.proxy != Proxy::Countersign {
            return Ok(());
        }
        let (served, records) = (
            self.served,
            requests_recorded(&self.directory.join("audit.jsonl"))?,
        );
        match records == served {
            true => Ok(()),
            false => Err(format!(
                "not valid: {records} audit records on disk for {served} requests served"
            )
            .into()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        // The records of a work can be gigabytes.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// An address that nobody listens on.
fn free() -> Fallible<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn new_directory(parent: &Path) -> Fallible<PathBuf> {
    let directory = (0..)
        .map(|number| parent.join(format!("peer-{number}")))
        .find(|directory| !directory.exists())
        .ok_or("no name is left")?;
    std::fs::create_dir(&directory)?;
    Ok(directory)
}

/// A proxy that is being started.
struct Starting<'a> {
    directory: PathBuf,
    surroundings: &'a Surroundings<'a>,
    address: SocketAddr,
    https_address: SocketAddr,
    authorizer: SocketAddr,
}

impl Starting<'_> {
    /// Puts values for the placeholders of a configuration.
    fn fill(&self, text: &str) -> String {
        let origin = self.surroundings.origin;
        let addresses = &origin.addresses;
        let values = [
            ("@DIRECTORY@", self.directory.display().to_string()),
            ("@PORT@", self.address.port().to_string()),
            ("@HTTPS_PORT@", self.https_address.port().to_string()),
            ("@AUTHORIZER_PORT@", self.authorizer.port().to_string()),
            ("@ORIGIN@", addresses.http.to_string()),
            ("@ORIGIN_PORT@", addresses.http.port().to_string()),
            ("@HTTPS_ORIGIN@", addresses.https.to_string()),
            ("@HTTPS_ORIGIN_PORT@", addresses.https.port().to_string()),
            (
                "@AUTHORIZATION_SERVER@",
                addresses.authorization_server.to_string(),
            ),
            ("@ORIGIN_CA@", origin.certificate.display().to_string()),
            ("@CLIENT_KEY@", origin.client_key.display().to_string()),
            ("@CREDENTIAL@", credential()),
            ("@FIRST_UID@", FIRST_UID.to_string()),
            ("@IDENTITIES@", IDENTITIES.to_string()),
        ];
        values.iter().fold(text.to_owned(), |text, (name, value)| {
            text.replace(name, value)
        })
    }

    fn write(&self, name: &str, text: &str) -> Fallible<()> {
        let path = self.directory.join(name);
        std::fs::create_dir_all(path.parent().ok_or("no parent")?)?;
        std::fs::write(&path, self.fill(text))?;
        Ok(())
    }

    /// Runs a program on the proxy's core; what it says goes into the log.
    fn run(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Fallible<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join("log"))?;
        let mut command = Command::new(program.as_ref());
        command
            .args(arguments)
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // A process begins on the core of the thread that made it.
        pin(PROXY_CORE)?;
        let child = command.spawn();
        pin(LOAD_CORE)?;
        Ok(child?)
    }

    fn bare(&self, pool_per_connection: bool) -> Fallible<Child> {
        let origin = self.surroundings.origin;
        let settings = bare::Settings {
            address: self.address,
            https_address: self.https_address,
            origin: origin.addresses.http,
            https_origin: origin.addresses.https,
            origin_certificate: origin.certificate.clone(),
            certificate: self.directory.join("ca.pem"),
            authorization: credential(),
            pool_per_connection,
        };
        let settings = serde_json::to_string(&settings)?;
        self.run(std::env::current_exe()?, &["bare", &settings])
    }

    fn countersign(&self, added: &[AddedFile]) -> Fallible<Child> {
        self.write("countersign.yaml", include_str!("peers/countersign.yaml"))?;
        self.write(
            "policies/orders.cedar",
            include_str!("peers/countersign.cedar"),
        )?;
        for file in added {
            self.write(file.name, &file.text)?;
        }
        self.run(
            self.surroundings.agent,
            &["run", "--config", "countersign.yaml"],
        )
    }

    fn nginx(&self) -> Fallible<Child> {
        self.write("nginx.conf", include_str!("peers/nginx.conf"))?;
        let directory = self.directory.display().to_string();
        self.run(
            "nginx",
            &["-p", &directory, "-c", "nginx.conf", "-e", "stderr"],
        )
    }

    fn haproxy(&self) -> Fallible<Child> {
        self.write("haproxy.cfg", include_str!("peers/haproxy.cfg"))?;
        self.run("haproxy", &["-db", "-f", "haproxy.cfg"])
    }

    fn envoy_with_credential_injector(&self) -> Fallible<Child> {
        self.write("envoy-secret.yaml", include_str!("peers/envoy-secret.yaml"))?;
        self.envoy(include_str!("peers/envoy-credential-injector.yaml"))
    }

    fn envoy_with_ext_authz(&self) -> Fallible<Child> {
        self.envoy(include_str!("peers/envoy-ext-authz.yaml"))
    }

    fn envoy(&self, filter: &str) -> Fallible<Child> {
        let text = include_str!("peers/envoy.yaml").replace("@FILTER@", filter.trim_end());
        self.write("envoy.yaml", &text)?;
        let workers = ["--concurrency", "1", "--use-dynamic-base-id"];
        let rest = ["--log-level", "warning", "-c", "envoy.yaml"];
        self.run("envoy", &[workers.as_slice(), &rest].concat())
    }

    fn authorizer(&self) -> Fallible<Child> {
        let address = self.authorizer.to_string();
        self.run(std::env::current_exe()?, &["authorizer", &address])
    }

    /// Its helper needs a data base, in a directory that squid's user may write to.
    fn squid(&self) -> Fallible<Child> {
        let (certificate, key) = interception_authority()?;
        self.write("ca.pem", &certificate)?;
        self.write("interception-ca.pem", &format!("{certificate}{key}"))?;
        self.write("squid.conf", include_str!("peers/squid.conf"))?;
        std::fs::set_permissions(&self.directory, std::fs::Permissions::from_mode(0o777))?;
        let made = Command::new("setpriv")
            .args(["--reuid", "proxy", "--regid", "proxy", "--clear-groups"])
            .args(["/usr/lib/squid/security_file_certgen", "-c", "-s"])
            .arg(self.directory.join("certificates"))
            .args(["-M", "4MB"])
            .stdout(Stdio::null())
            .status()?;
        match made.success() {
            true => self.run("squid", &["-N", "-f", "squid.conf"]),
            false => Err("squid's data base of certificates was not made".into()),
        }
    }

    fn mitmproxy(&self) -> Fallible<Child> {
        self.write("mitmproxy.py", include_str!("peers/mitmproxy.py"))?;
        self.write("config.yaml", include_str!("peers/mitmproxy.yaml"))?;
        let rest = ["--set", "confdir=.", "--scripts", "mitmproxy.py"];
        self.run("mitmdump", &[["--quiet"].as_slice(), &rest].concat())
    }
}

/// The certificate and key of an authority, for proxies that mint certificates themselves (PEM).
fn interception_authority() -> Fallible<(String, String)> {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::default();
    parameters
        .distinguished_name
        .push(DnType::CommonName, "bench interception");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = parameters.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// How many requests the audit tells of.
fn requests_recorded(audit: &Path) -> Fallible<u64> {
    use std::io::BufRead;
    #[derive(Deserialize)]
    struct Record {
        kind: String,
    }
    let mut requests = 0;
    let mut lines = std::io::BufReader::with_capacity(1024 * 1024, File::open(audit)?);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let record: Record = serde_json::from_slice(&line)?;
        requests += u64::from(record.kind == "request");
        line.clear();
    }
    Ok(requests)
}
