//! `countersign dev`: the agent with an embedded authorization server and API, until a signal.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use countersign_attestors::{ConnectionAttestation, PeerEvidence, WorkloadFacts, observers};
use serde_json::{Value, json};

use super::output::{EXIT_UNAVAILABLE, OutputFormat};
use super::run::{Signals, on_control_runtime, refuse, serve_until_signal};
use crate::app::{App, StartOptions};
use crate::audit::tail;
use crate::clock::SystemClock;
use crate::config::watch::Watcher;
use crate::config::{AuditSink, Bind, Config, LogConfig, LogFormat};
use crate::dev::Directory;
use crate::dev::embedded::{
    API_HOST, API_URL, CONFIG_FILE, EmbeddedServers, ISSUER, Listeners, Ports, TOKEN_LIFETIME,
    write_configuration,
};
use crate::hardening::{self, Needs};
use crate::telemetry;

/// The proxy's port where none is asked for.
const PROXY_PORT: u16 = 7523;
/// The gateway's.
const GATEWAY_PORT: u16 = 7525;
/// How often a start is tried when another process takes a port that was free.
const ATTEMPTS: usize = 3;

/// Runs the agent with an embedded authorization server and API, to try it and to test against it.
#[derive(Debug, Clone, clap::Args)]
pub struct DevArguments {
    /// A configuration of your own instead of the generated one; the embedded servers run beside it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The proxy's port; 0 is any free one [default: 7523, a free one if it is taken].
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Text with a live log, or one JSON line once it is ready.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Why `dev` does not start.
enum NotStarted {
    Problems(crate::diagnostics::Diagnostics),
    Unavailable(String),
}

impl From<std::io::Error> for NotStarted {
    fn from(error: std::io::Error) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// Runs until a signal. Exit code 0 after one, 78 for a wrong configuration, 69 where a port or the
/// directory cannot be had.
pub fn run(arguments: &DevArguments) -> ExitCode {
    let began = Instant::now();
    let ended = prepare(arguments)
        .and_then(|directory| on_control_runtime(serve(arguments, directory, began))?);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(NotStarted::Problems(diagnostics)) => refuse(OutputFormat::Text, diagnostics),
        Err(NotStarted::Unavailable(problem)) => {
            let _ = writeln!(std::io::stderr(), "countersign: {problem}");
            ExitCode::from(EXIT_UNAVAILABLE)
        }
    }
}

/// Opens the directory, and confines the agent to it and to what a configuration of the user's names.
fn prepare(arguments: &DevArguments) -> Result<Directory, NotStarted> {
    // Before a key is read; where it cannot be done, `confine` says so.
    let _ = hardening::protect_memory();
    let directory = Directory::open()?;
    let needs = match &arguments.config {
        None => Some(Needs::default()),
        // What it names may not be there before the embedded servers have written it; then it is not
        // known what the agent needs.
        Some(path) => crate::config::check(path).config.as_ref().map(Needs::of),
    };
    if let Some(needs) = needs {
        hardening::confine(&needs.and_directory(directory.path()))?;
    }
    Ok(directory)
}

/// A running `dev`.
struct Running {
    directory: Directory,
    servers: EmbeddedServers,
    app: Arc<App>,
    watcher: Watcher,
    set_aside: Vec<&'static str>,
}

async fn serve(
    arguments: &DevArguments,
    directory: Directory,
    began: Instant,
) -> Result<(), NotStarted> {
    let signals = Signals::new()?;
    let running = match &arguments.config {
        Some(path) => start_configured(directory, path, arguments.port).await?,
        None => start_generated(directory, arguments.port).await?,
    };
    let announced = match arguments.output {
        OutputFormat::Json => {
            for name in &running.set_aside {
                let _ = writeln!(std::io::stderr(), "countersign: {}", set_aside(name));
            }
            writeln!(std::io::stdout(), "{}", summary(&running))
        }
        OutputFormat::Text => {
            let text = welcome(&running, began).await;
            // Held until the welcome is written: records come after it.
            let mut out = std::io::stdout().lock();
            show_records(&running.app);
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        }
    };
    announced?;
    serve_until_signal(&running.app, running.watcher, signals).await;
    Ok(())
}

async fn start_generated(directory: Directory, port: Option<u16>) -> Result<Running, NotStarted> {
    log(&LogConfig {
        format: LogFormat::Text,
        level: "warn".to_owned(),
    })?;
    let servers = EmbeddedServers::start(&directory, Ports::default()).await?;
    let path = directory.file(CONFIG_FILE);
    let mut attempt = 1;
    loop {
        let proxy = match port {
            None => bind(PROXY_PORT).or_else(|_| bind(0)),
            Some(port) => bind(port),
        }
        .map_err(|error| {
            NotStarted::Unavailable(format!(
                "port {} cannot be bound: {error}",
                port.unwrap_or(PROXY_PORT)
            ))
        })?;
        let gateway = bind(GATEWAY_PORT).or_else(|_| bind(0))?;
        let listeners = Listeners {
            proxy: proxy.local_addr()?,
            gateway: gateway.local_addr()?,
        };
        // Ports that are free now: the configuration that stays names them.
        drop((proxy, gateway));
        let set_aside = write_configuration(&directory, listeners, &servers)?;
        match start(&path, None).await {
            Ok((app, watcher)) => {
                return Ok(Running {
                    directory,
                    servers,
                    app,
                    watcher,
                    set_aside,
                });
            }
            Err(NotStarted::Problems(problems))
                if attempt < ATTEMPTS && problems.is_transient() =>
            {
                attempt += 1;
            }
            Err(problems) => return Err(problems),
        }
    }
}

/// With a configuration of the user's the servers listen where it looks for them.
async fn start_configured(
    directory: Directory,
    path: &Path,
    port: Option<u16>,
) -> Result<Running, NotStarted> {
    let checked = crate::config::check(path);
    let ports = checked
        .config
        .as_ref()
        .map_or_else(Ports::default, Ports::named_in);
    // Before the configuration counts: it may name the key and the roots that are written here.
    let servers = EmbeddedServers::start(&directory, ports).await?;
    let config = Config::load(path).map_err(NotStarted::Problems)?;
    log(&config.log)?;
    let (app, watcher) = start(path, port).await?;
    Ok(Running {
        directory,
        servers,
        app,
        watcher,
        set_aside: Vec::new(),
    })
}

async fn start(path: &Path, proxy_port: Option<u16>) -> Result<(Arc<App>, Watcher), NotStarted> {
    let checked = crate::config::check(path);
    let watcher = Watcher::new(path, &checked);
    let config = checked.into_config().map_err(NotStarted::Problems)?;
    let options = StartOptions {
        tells_nearest: true,
        proxy_port,
        ..StartOptions::default()
    };
    let app = App::start_with(config, Arc::new(SystemClock::new()), options)
        .await
        .map_err(NotStarted::Problems)?;
    Ok((app, watcher))
}

fn log(config: &LogConfig) -> Result<(), NotStarted> {
    telemetry::logs::init(config).map_err(|error| NotStarted::Unavailable(error.to_string()))
}

fn bind(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
}

/// Where things are, by name.
fn summary(running: &Running) -> Value {
    let snapshot = running.app.agent().snapshot.load();
    let config = &snapshot.config;
    let certificate = config
        .interception
        .as_ref()
        .and_then(|interception| interception.ca_certificate_file.as_deref());
    json!({
        "proxy": proxy_urls(&running.app).first(),
        "gateway": gateway_url(&running.app),
        "ca_certificate": certificate,
        "api": API_URL,
        "token_endpoint": running.servers.authorization_server.state().token_endpoint(),
        "admin_socket": config.admin.socket,
        "audit": audit_file(config),
        "policies": config.policy_directory,
        "config": config.path,
    })
}

/// The forward proxies, those on TCP first.
fn proxy_urls(app: &App) -> Vec<String> {
    let snapshot = app.agent().snapshot.load();
    let mut urls = Vec::new();
    for listener in &snapshot.config.listeners {
        if listener.kind == crate::config::ListenerKind::ForwardProxy
            && let Some(bind) = app.bound().listeners.get(&listener.name)
        {
            match bind {
                Bind::Tcp(_) => urls.insert(0, url_of(bind)),
                Bind::Unix(_) => urls.push(url_of(bind)),
            }
        }
    }
    urls
}

fn gateway_url(app: &App) -> Option<String> {
    let snapshot = app.agent().snapshot.load();
    let gateway =
        snapshot.config.listeners.iter().find(|listener| {
            matches!(listener.kind, crate::config::ListenerKind::Gateway { .. })
        })?;
    app.bound().listeners.get(&gateway.name).map(url_of)
}

fn url_of(bind: &Bind) -> String {
    match bind {
        Bind::Tcp(address) => format!("http://{address}"),
        Bind::Unix(_) => bind.to_string(),
    }
}

fn audit_file(config: &Config) -> Option<PathBuf> {
    config.audit.sinks.iter().find_map(|sink| match sink {
        AuditSink::File { path, .. } => Some(path.clone()),
        AuditSink::Stdout => None,
    })
}

/// What a person reads first: where everything is, and three lines to paste.
async fn welcome(running: &Running, began: Instant) -> String {
    let snapshot = running.app.agent().snapshot.load_full();
    let config = &snapshot.config;
    let proxies = proxy_urls(&running.app);
    let is_generated = config.path == running.directory.file(CONFIG_FILE);
    let you = own_facts(&running.app)
        .await
        .map_or_else(|| "unknown".to_owned(), |facts| describe(&facts));
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("countersign"));
    let program = quoted(&program);
    let mut text = format!(
        "countersign {} dev, ready in {} ms. Everything is on loopback and ends with Ctrl-C.\n",
        env!("CARGO_PKG_VERSION"),
        began.elapsed().as_millis()
    );
    let mut line = |name: &str, value: String| {
        text.push_str(&format!("  {name:<13} {value}\n"));
    };
    line("you", you);
    if let Some(hidden) = hardening::hidden_callers(config, &hardening::observer_capabilities()) {
        line("others", hidden);
    }
    line("proxy", proxies.join("     "));
    if let Some(gateway) = gateway_url(&running.app) {
        line("gateway", format!("{gateway}     (a base URL of the API)"));
    }
    line(
        "API",
        format!(
            "{API_URL}   ({}; 401 without a token)",
            running.servers.api.address()
        ),
    );
    line(
        "token server",
        format!(
            "{ISSUER}     ({}; private_key_jwt, tokens live {} s)",
            running.servers.authorization_server.address(),
            TOKEN_LIFETIME.as_secs()
        ),
    );
    line(
        "policy",
        match is_generated {
            true => format!(
                "{}   (edit it: live within 1 s)",
                running
                    .directory
                    .file(crate::dev::embedded::POLICY_FILE)
                    .display()
            ),
            false => format!(
                "{}   (edit it: live within 1 s)",
                config.policy_directory.display()
            ),
        },
    );
    for name in &running.set_aside {
        line("", set_aside(name));
    }
    if let Some(proxy) = proxies.iter().find(|proxy| proxy.starts_with("http://"))
        && let Some(certificate) = config
            .interception
            .as_ref()
            .and_then(|interception| interception.ca_certificate_file.as_deref())
        && config
            .destinations
            .iter()
            .any(|destination| destination.hosts.iter().any(|host| host == API_HOST))
    {
        let certificate = quoted(certificate);
        text.push_str(&format!(
            "Paste in another terminal:
  1 injected    curl -sS -x {proxy} --cacert {certificate} {API_URL}/v1/orders
  2 denied      curl -sS -i -x {proxy} --cacert {certificate} -X DELETE {API_URL}/v1/orders/7
"
        ));
        if let Some(audit) = audit_file(config) {
            text.push_str(&format!(
                "  3 the record  {program} audit tail --last 2 --file {}\n",
                quoted(&audit)
            ));
        }
    }
    if is_generated {
        text.push_str(&format!(
            "The servers end with dev, and the next dev writes policy and configuration anew: name servers of your own in a copy.\nKeep it: countersign run --config {}\n",
            quoted(&config.path)
        ));
    }
    text
}

/// Where what was edited is now.
fn set_aside(name: &str) -> String {
    format!("your {name} of last time is kept beside it, as {name}.before")
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain =
        |character: char| character.is_ascii_alphanumeric() || "/._-+:@%".contains(character);
    match text.chars().all(plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// This process, as the agent sees a caller on loopback.
async fn own_facts(app: &App) -> Option<WorkloadFacts> {
    let evidence = observers::look_and_wait(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        let local = listener.local_addr().ok()?;
        let client = std::net::TcpStream::connect(local).ok()?;
        let (server, _) = listener.accept().ok()?;
        let evidence = PeerEvidence::of_loopback_tcp(&server).await.ok();
        drop(client);
        evidence
    })
    .await
    .ok()??;
    let catalog = Arc::clone(&app.agent().snapshot.load().catalog);
    let attestation = ConnectionAttestation::new(catalog, evidence).await;
    let workload = attestation.attest(None).await.ok()?;
    Some(WorkloadFacts::clone(workload.facts()))
}

/// `uid 1000 (ana), user unit shell.service          seen by: sock_diag, pidfd`.
fn describe(facts: &WorkloadFacts) -> String {
    let text = |group: &str, name: &str| facts.attribute(group, name).map(ToString::to_string);
    let mut words = Vec::new();
    if let Some(uid) = text("unix", "uid") {
        words.push(match text("unix", "user") {
            Some(user) => format!("uid {uid} ({user})"),
            None => format!("uid {uid}"),
        });
    }
    words.extend(text("systemd", "user_unit").map(|unit| format!("user unit {unit}")));
    words.extend(text("systemd", "system_unit").map(|unit| format!("unit {unit}")));
    words.extend(text("container", "id").map(|id| {
        let id: String = id.chars().take(12).collect();
        format!("container {id}")
    }));
    format!(
        "{:<48} seen by: {}",
        words.join(", "),
        facts.evidence.join(", ")
    )
}

/// Prints each record as one line from now on.
fn show_records(app: &App) {
    let Some(path) = audit_file(&app.agent().snapshot.load().config) else {
        return;
    };
    // Ends with the process; it holds nothing.
    std::thread::spawn(move || {
        let followed = tail::follow(&path, |line| {
            match tail::render(line).map(|line| writeln!(std::io::stdout(), "{line}")) {
                Some(Err(_)) => ControlFlow::Break(()),
                Some(Ok(())) | None => ControlFlow::Continue(()),
            }
        });
        if let Err(error) = followed {
            tracing::warn!(%error, "the audit file cannot be shown");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_pasted_as_they_are() {
        for (path, expected) in [
            (
                "/run/user/1000/countersign-dev/ca.pem",
                "/run/user/1000/countersign-dev/ca.pem",
            ),
            ("/home/an a/x", "'/home/an a/x'"),
            ("/it's", r"'/it'\''s'"),
        ] {
            assert_eq!(quoted(Path::new(path)), expected);
        }
    }
}
