//! `countersign run`: the agent, until SIGTERM or SIGINT.

use std::io;
use std::panic;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::failure::Failure;
use super::output::{EXIT_UNAVAILABLE, OutputFormat};
use crate::app::{App, StartOptions};
use crate::clock::SystemClock;
use crate::config::watch::Watcher;
use crate::config::{self, Config};
use crate::descriptors;
use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::hardening::{self, Needs};
use crate::service_manager::ServiceManager;
use crate::telemetry;

/// Runs the agent until a signal.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The form in which it says why it does not start, on standard error.
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// Runs the agent. Exit code 78 when it cannot start with this configuration, 69 when it cannot for now, 0 after a
/// signal.
pub fn run(arguments: &RunArguments) -> ExitCode {
    // Before a key is read; where it cannot be done, `confine` says so.
    let _ = hardening::protect_memory();
    // Before anything else has a descriptor.
    let service_manager = match ServiceManager::from_environment() {
        Ok(service_manager) => service_manager,
        Err(diagnostics) => return refuse(arguments.output, diagnostics),
    };
    let checked = config::check(&arguments.config);
    let watcher = Watcher::new(&arguments.config, &checked);
    // Before its warnings are logged.
    if let Some(config) = &checked.config
        && let Err(error) = telemetry::logs::init(&config.log)
    {
        let failure = Failure::configuration(error.to_string());
        return failure.report(arguments.output, &mut std::io::stderr());
    }
    let config = match checked.into_config() {
        Ok(config) => config,
        Err(diagnostics) => return refuse(arguments.output, diagnostics),
    };
    if let Err(error) = descriptors::allow_many() {
        tracing::warn!(%error, "the agent has as few descriptors as it was started with");
    }
    let no_thread = |code, what, error| {
        let problem = Diagnostic::no_thread(code, &arguments.config, what, &error);
        refuse(arguments.output, problem.into())
    };
    // Before there is another thread.
    if let Err(error) = hardening::confine(&Needs::of(&config)) {
        return no_thread(
            "observers_not_started",
            "the thread that looks at callers",
            error,
        );
    }
    if let Some(hidden) = hardening::hidden_callers(&config, &hardening::observer_capabilities()) {
        tracing::warn!("{hidden}; run it as root, or with them");
    }
    on_control_runtime(serve(config, watcher, service_manager, arguments.output))
        .unwrap_or_else(|error| no_thread("runtime_not_started", "the runtime", error))
}

/// Policies and configurations become trees that are walked recursively; the largest that load need a part
/// of this, also where the code is not optimised.
const STACK_BYTES: usize = 8 << 20;

/// How long threads that are still at work when everything has ended are waited for: one that reads a file that
/// hangs never comes back.
const LEFT_BEHIND: Duration = Duration::from_secs(1);

/// Runs `work` to its end on the runtime of everything that is not the data path. A second thread on one processor
/// would only be woken in vain with each task that the first is given. What reads files or roots for the running
/// agent does so on other threads; a decision of the workload API may wait here for an observer's word on its caller.
///
/// # Errors
/// That of a runtime that cannot be started.
pub fn on_control_runtime<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let runtime = start_control_runtime()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_timeout(LEFT_BEHIND);
    Ok(outcome)
}

/// Starts the runtime, and the first thread of those that may block: as long as there is one, what blocks is queued
/// where no more threads can be made. Where these cannot be made tokio panics, and then may wait for ever for those
/// that it made: so the panic is what is waited for, in another thread.
fn start_control_runtime() -> io::Result<Runtime> {
    let (started, outcome) = mpsc::channel();
    let panicked = started.clone();
    let start = move || {
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(processors.min(2))
            .thread_name("control")
            .thread_stack_size(STACK_BYTES)
            .enable_all()
            .build();
        if let Ok(runtime) = &runtime {
            drop(runtime.spawn_blocking(|| ()));
        }
        let _ = started.send(runtime);
    };
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let reason = panic.payload_as_str().unwrap_or("it panicked");
        let _ = panicked.send(Err(io::Error::other(reason.to_owned())));
    }));
    let runtime = std::thread::Builder::new()
        .spawn(start)
        .and_then(|_| outcome.recv().map_err(io::Error::other)?);
    panic::set_hook(hook);
    runtime
}

/// Prints why an agent does not start, in a form.
pub fn refuse(output: OutputFormat, diagnostics: Diagnostics) -> ExitCode {
    Failure::from(diagnostics).report(output, &mut std::io::stderr())
}

/// The signals that an agent obeys; taken over from when this is made.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over. Needs a tokio runtime.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

impl Signals {
    /// Waits for SIGTERM or SIGINT.
    pub async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Reloads on SIGHUP and on changed files, until SIGTERM or SIGINT, which end a reload too; then drains, until a
/// second one.
pub async fn serve_until_signal(app: &Arc<App>, mut watcher: Watcher, mut signals: Signals) {
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hangup.recv() => {}
            () = watcher.changed() => {}
        }
        tokio::select! {
            () = signals.end() => break,
            // A failure is logged, counted and audited; the last good configuration stays in force.
            _ = app.reload() => {}
        }
    }
    tokio::select! {
        () = app.drain() => {}
        () = signals.end() => tracing::warn!("a second signal ends the drain"),
    }
    app.stop().await;
}

async fn serve(
    config: Config,
    watcher: Watcher,
    service_manager: ServiceManager,
    output: OutputFormat,
) -> ExitCode {
    let Ok(signals) = Signals::new() else {
        return ExitCode::from(EXIT_UNAVAILABLE);
    };
    let options = StartOptions {
        service_manager,
        ..StartOptions::default()
    };
    let app = match App::start_with(config, Arc::new(SystemClock::new()), options).await {
        Ok(app) => app,
        Err(diagnostics) => return refuse(output, diagnostics),
    };
    for (name, address) in &app.bound().listeners {
        tracing::info!(listener = name, %address, "listening");
    }
    serve_until_signal(&app, watcher, signals).await;
    ExitCode::SUCCESS
}
