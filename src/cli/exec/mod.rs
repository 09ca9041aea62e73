//! `countersign exec`: runs a command whose clients go through the agent, unmodified and holding no
//! secret.

mod environment;
mod relay;
mod runtime;

use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::{Signal as SignalNumber, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::environment::Environment;
pub(super) use self::environment::{ADD, PROXY, REPLACE};
use self::relay::Relay;
use super::failure::Failure;
use super::output::OutputFormat;
use super::own_agent::PrivateDirectory;
use super::presented::Presenter;
use super::run::on_control_runtime;
use super::workload::{Agent, WorkloadArguments};

/// Exit codes of `env`(1): the command cannot be run, and is not found.
const EXIT_CANNOT_RUN: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

/// What is passed on to the command. SIGKILL and SIGSTOP cannot be.
const PASSED_ON: [SignalNumber; 6] = [
    SignalNumber::SIGTERM,
    SignalNumber::SIGINT,
    SignalNumber::SIGHUP,
    SignalNumber::SIGQUIT,
    SignalNumber::SIGUSR1,
    SignalNumber::SIGUSR2,
];

/// What is missing where the agent takes tokens, and there is none.
const NOTHING_TO_PRESENT: &str = "\
countersign: the agent takes tokens of a configured issuer, and there is none to present: what policy permits by a token is refused
  next: in a GitHub Actions job write `permissions: {id-token: write}`; in GitLab CI write `id_tokens`, put the token into a file and name it by `--token-file`";

/// Runs a command whose clients go through the agent.
#[derive(Debug, Clone, clap::Args)]
pub struct ExecArguments {
    #[command(flatten)]
    workload: WorkloadArguments,
    /// The form in which it says, on standard error, why the command is not run.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Runs the command. The exit code is the command's, 128 and the signal's number where a signal ended
/// it; 69 where no agent is reached, 78 where its configuration is wrong.
pub fn run(arguments: &ExecArguments) -> ExitCode {
    let ended =
        runtime::check(&arguments.command).and_then(|()| on_control_runtime(supervise(arguments))?);
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(arguments.output, &mut std::io::stderr()),
    }
}

async fn supervise(arguments: &ExecArguments) -> Result<u8, Failure> {
    // Before anything is started, so that none is missed.
    let mut signals = Signals::new()?;
    let agent = Agent::of(&arguments.workload).await?;
    let ended = with_agent(arguments, &agent, &mut signals).await;
    agent.stop().await;
    ended
}

async fn with_agent(
    arguments: &ExecArguments,
    agent: &Agent,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let proxy = agent.proxy().await?;
    let address = proxy
        .proxy
        .as_deref()
        .and_then(|url| url.strip_prefix("http://"))
        .and_then(|address| address.parse::<SocketAddr>().ok())
        .ok_or_else(|| {
            Failure::unavailable("the agent has no forward proxy on TCP, which clients need")
        })?;
    let presenter = Presenter::new(arguments.workload.token_file.as_deref(), &proxy.issuers)
        .map_err(Failure::unavailable)?;
    // Better no command than one whose every request is refused.
    presenter.header().await.map_err(Failure::unavailable)?;
    let relay = match presenter.presents() {
        true => Some(Relay::start(address, agent.address().clone(), Arc::clone(&presenter)).await?),
        false => None,
    };
    let directory = PrivateDirectory::new()?;
    let environment = Environment {
        proxy: relay.as_ref().map_or(address, Relay::address),
        no_proxy: proxy.no_proxy,
        ca_certificate: proxy.ca_certificate,
        agent: match &relay {
            Some(relay) => relay.address().to_string(),
            None => agent.address().to_string(),
        },
    };
    let variables = environment.variables(&directory)?;
    say(&environment, &presenter, &variables);
    if !presenter.presents() && !proxy.issuers.is_empty() {
        let _ = writeln!(std::io::stderr(), "{NOTHING_TO_PRESENT}");
    }

    let Some((program, rest)) = arguments.command.split_first() else {
        return Err(Failure::usage("there is no command"));
    };
    let mut command = Command::new(program);
    command.args(rest).envs(variables);
    for secret in environment::SECRETS {
        command.env_remove(secret);
    }
    // The command's orphans become ours, and stay recognisable as the command's.
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let code = match error.kind() {
                std::io::ErrorKind::NotFound => EXIT_NOT_FOUND,
                _ => EXIT_CANNOT_RUN,
            };
            let program = program.to_string_lossy();
            return Err(Failure::Message(
                code,
                format!("`{program}` cannot be run: {error}"),
            ));
        }
    };
    let child = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let status = signals.until_ended(child).await;
    Ok(exit_code(status))
}

/// Says what was set, and where it leads.
fn say(environment: &Environment, presenter: &Presenter, variables: &[(&'static str, OsString)]) {
    let presented = match presenter.origin() {
        Some(origin) => format!(", presenting the token of {origin}"),
        None => String::new(),
    };
    let names: Vec<&str> = variables.iter().map(|(name, _)| *name).collect();
    let _ = writeln!(
        std::io::stderr(),
        "countersign: clients go through http://{}{presented}; set {}",
        environment.proxy,
        names.join(" ")
    );
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128_i32.saturating_add(signal),
        (None, None) => 1,
    };
    u8::try_from(code & 0xff).unwrap_or(1)
}

struct Signals {
    child: Signal,
    passed_on: Vec<(SignalNumber, Signal)>,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let ignored = ignored_signals();
        let passed_on = PASSED_ON
            .into_iter()
            // What nohup(1) and a shell's `&` have the command ignore it goes on to ignore.
            .filter(|number| ignored & (1 << (*number as u32 - 1)) == 0)
            .map(|number| Ok((number, signal(SignalKind::from_raw(number as i32))?)))
            .collect::<std::io::Result<_>>()?;
        Ok(Self {
            child: signal(SignalKind::child())?,
            passed_on,
        })
    }

    /// Passes signals on until the command ended.
    async fn until_ended(&mut self, command: Pid) -> ExitStatus {
        loop {
            if let Some(status) = reap(command) {
                return status;
            }
            let arrived = std::future::poll_fn(|context| {
                if self.child.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(None);
                }
                for (number, signal) in &mut self.passed_on {
                    if signal.poll_recv(context).is_ready() {
                        return std::task::Poll::Ready(Some(*number));
                    }
                }
                std::task::Poll::Pending
            })
            .await;
            if let Some(number) = arrived
                && !(is_typed(number) && is_in_foreground())
            {
                // A command that is gone needs no signal.
                let _ = kill(command, number);
            }
        }
    }
}

/// The signals that this process was started to ignore, one bit each. proc_pid_status(5): `SigIgn`.
fn ignored_signals() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let mask = status
                .lines()
                .find_map(|line| line.strip_prefix("SigIgn:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        })
        .unwrap_or_default()
}

/// Takes the exit status of every child that ended; that of the command is the answer.
fn reap(command: Pid) -> Option<ExitStatus> {
    let mut ended = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == command => {
                ended = Some(ExitStatus::from_raw(code << 8));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => {
                ended = Some(ExitStatus::from_raw(signal as i32));
            }
            Ok(WaitStatus::StillAlive) => return ended,
            Ok(_) | Err(Errno::EINTR) => {}
            // ECHILD: nobody is left.
            Err(_) => {
                return ended.or_else(|| is_gone(command).then(|| ExitStatus::from_raw(1 << 8)));
            }
        }
    }
}

fn is_gone(command: Pid) -> bool {
    kill(command, None).is_err()
}

/// What a terminal sends to everybody in the foreground.
fn is_typed(signal: SignalNumber) -> bool {
    matches!(signal, SignalNumber::SIGINT | SignalNumber::SIGQUIT)
}

/// Whether this process's group, which is the command's, is the one that the terminal signals: the
/// command has the signal already then. proc_pid_stat(5): fields 5 and 8.
fn is_in_foreground() -> bool {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return false;
    };
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    match (fields.get(2), fields.get(5)) {
        (Some(group), Some(foreground)) => group == foreground,
        _ => false,
    }
}
