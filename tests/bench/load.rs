//! The load: [`IDENTITIES`] callers, each a process with a user and a cgroup of its own, as services have.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use crate::Fallible;
use crate::caller::{Command, Report, Route};
use crate::cgroups::Cgroup;

/// How many callers there are, and so how many identities the agent serves.
pub const IDENTITIES: usize = 50;
/// The user of the first; the others follow.
pub const FIRST_UID: u32 = 60_000;

/// The callers.
pub struct Load {
    callers: Vec<Caller>,
    served: u64,
    /// Dropped after what is in it.
    _cgroup: Cgroup,
}

struct Caller {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Dropped after the process that is in it.
    _cgroup: Cgroup,
}

impl Load {
    /// Starts them. Their program is put into `directory`, where every user may run it.
    pub fn start(directory: &Path) -> Fallible<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root, to make callers with users of their own".into());
        }
        let program = directory.join("caller");
        std::fs::copy(std::env::current_exe()?, &program)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        let cgroup = Cgroup::new("countersign-bench")?;
        let callers = (FIRST_UID..)
            .take(IDENTITIES)
            .map(|uid| Caller::start(&program, uid, cgroup.below(&uid.to_string())?))
            .collect::<Fallible<Vec<_>>>()?;
        Ok(Self {
            callers,
            served: 0,
            _cgroup: cgroup,
        })
    }

    /// How many requests were answered with 200 since this was asked last.
    pub fn take_served(&mut self) -> u64 {
        std::mem::take(&mut self.served)
    }

    /// Opens connections, spread over all callers, with one request on each.
    pub fn open(&mut self, route: &Route, connections: usize) -> Fallible<Report> {
        self.open_by(IDENTITIES, route, connections)
    }

    /// Opens connections of the first `identities` callers only.
    pub fn open_by(
        &mut self,
        identities: usize,
        route: &Route,
        connections: usize,
    ) -> Fallible<Report> {
        self.tell(&spread(connections, identities, |connections| {
            Command::Open {
                route: route.clone(),
                connections,
            }
        }))
    }

    /// Opens connections, spread over all callers, without a request.
    pub fn connect(&mut self, route: &Route, connections: usize) -> Fallible<()> {
        self.tell(&spread(connections, IDENTITIES, |connections| {
            Command::Connect {
                route: route.clone(),
                connections,
            }
        }))?;
        Ok(())
    }

    /// Requests on all open connections, each when the one before it was answered.
    pub fn repeat(&mut self, length: Duration) -> Fallible<Report> {
        self.tell(&vec![Command::Repeat { length }; IDENTITIES])
    }

    /// `rate` requests a second over the open connections, at a fixed schedule.
    pub fn schedule(&mut self, rate: u32, length: Duration) -> Fallible<Report> {
        let apart = Duration::from_secs(1) / rate;
        let interval = apart * u32::try_from(IDENTITIES)?;
        let commands: Vec<Command> = (0..u32::try_from(IDENTITIES)?)
            .map(|caller| Command::Schedule {
                length,
                first: apart * caller,
                interval,
            })
            .collect();
        self.tell(&commands)
    }

    /// One request on each new connection, by all callers at once.
    pub fn reconnect(&mut self, route: &Route, length: Duration) -> Fallible<Report> {
        let command = Command::Reconnect {
            route: route.clone(),
            length,
        };
        self.tell(&vec![command; IDENTITIES])
    }

    /// Closes every connection.
    pub fn close(&mut self) -> Fallible<()> {
        self.tell(&vec![Command::Close; IDENTITIES])?;
        Ok(())
    }

    /// Gives the callers one command each, the first to the first, and adds up what came of them.
    pub fn tell(&mut self, commands: &[Command]) -> Fallible<Report> {
        for (caller, command) in self.callers.iter_mut().zip(commands) {
            let line = serde_json::to_string(command)? + "\n";
            caller.commands.write_all(line.as_bytes())?;
        }
        let mut report = Report::default();
        for (caller, _) in self.callers.iter_mut().zip(commands) {
            report.add(&caller.answer()?);
        }
        self.served += report.served;
        Ok(report)
    }

    /// Has one caller alone do something.
    pub fn tell_one(&mut self, caller: usize, command: &Command) -> Fallible<Report> {
        let caller = self.callers.get_mut(caller).ok_or("no such caller")?;
        let line = serde_json::to_string(command)? + "\n";
        caller.commands.write_all(line.as_bytes())?;
        let report = caller.answer()?;
        self.served += report.served;
        Ok(report)
    }
}

/// A command for each of `identities`, with its share of the connections; none for who would have none.
fn spread(
    connections: usize,
    identities: usize,
    command: impl Fn(usize) -> Command,
) -> Vec<Command> {
    (0..identities)
        .map(|caller| connections / identities + usize::from(caller < connections % identities))
        .filter(|connections| *connections > 0)
        .map(command)
        .collect()
}

impl Caller {
    fn start(program: &Path, uid: u32, cgroup: Cgroup) -> Fallible<Self> {
        let mut child = std::process::Command::new(program)
            .arg("caller")
            .uid(uid)
            .gid(uid)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        cgroup.take_in(child.id())?;
        Ok(Self {
            _cgroup: cgroup,
            commands: child.stdin.take().ok_or("no input")?,
            answers: BufReader::new(child.stdout.take().ok_or("no output")?),
            child,
        })
    }

    fn answer(&mut self) -> Fallible<Report> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err("a caller ended".into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
