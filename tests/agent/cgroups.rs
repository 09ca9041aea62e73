//! Cgroups that a user names like something of the host's.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::chown;
use tokio::process::Command;

use crate::support::counts::reached;
use crate::support::puppet::{ARGUMENTS, Puppet, program};
use crate::support::raw::exchange;
use crate::support::world::{COMMON, DESTINATIONS, World};
use crate::support::{NOBODY, has_program, is_root};

/// Names below a user's own cgroup, one to a line.
const HOSTILE: &[u8] = include_bytes!("../../attestors/src/linux/hostile-cgroups.txt");

/// Permits each workload that one of the names is meant to be taken for, and the user in no unit.
const PERMITS: &str = r#"
@id("root")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == {uid} };
@id("no-unit")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has unix && principal.unix.uid == 65534 }
unless { principal has systemd.system_unit && principal.systemd.system_unit == "user@65534.service" };
@id("unit")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has systemd.system_unit && ["orders.service", "init.scope", "{unit}"].contains(principal.systemd.system_unit) };
@id("container")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has container };
@id("user-unit")
permit (principal, action == Action::"inject", resource == Credential::"orders-api")
when { principal has systemd.user_unit && principal has systemd.user_unit_uid && principal.systemd.user_unit_uid == 0 };
"#;

/// Directories made below the cgroup-v2 file system; removed with the test.
pub(crate) struct Cgroups {
    pub(crate) mount: PathBuf,
    made: Vec<PathBuf>,
    /// Tests share what is above their own directories.
    _alone: MutexGuard<'static, ()>,
}

impl Cgroups {
    pub(crate) fn find() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = table.lines().find(|line| line.contains(" - cgroup2 "))?;
        let mount = PathBuf::from(mount.split(' ').nth(4)?);
        Some(Self {
            mount,
            made: Vec::new(),
            _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner),
        })
    }

    pub(crate) fn make(&mut self, below: &Path, name: impl AsRef<Path>) -> PathBuf {
        let mut directory = below.to_owned();
        for component in name.as_ref() {
            directory.push(component);
            if !directory.exists() {
                std::fs::create_dir(&directory).unwrap();
                self.made.push(directory.clone());
            }
        }
        directory
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // A directory can go once the last process in it is reaped.
        for directory in self.made.iter().rev() {
            let began = Instant::now();
            while std::fs::remove_dir(directory).is_err()
                && began.elapsed() < Duration::from_secs(2)
            {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Sends a request as `nobody` from a process that was in `cgroup` before it connected; the status, the
/// code, and whether the origin saw it.
async fn ask(world: &World, listener: &str, cgroup: &Path) -> (u16, String, bool) {
    let script = format!(
        "echo $$ > \"$1/cgroup.procs\" && exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups {} {}",
        program().display(),
        ARGUMENTS.join(" "),
    );
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script, "sh"]).arg(cgroup);
    let mut puppet = Puppet::start_by(command, &world.target(listener), None).await;
    let request =
        "GET http://plain.example.test/v1/orders HTTP/1.1\r\nHost: plain.example.test\r\n\r\n";
    let before = world.plain_api.seen().len();
    let answer = exchange(&mut puppet.connect().await, request).await;
    puppet.kill().await;
    let arrived = world.plain_api.seen().len() > before;
    (answer.status, answer.code(), arrived)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_name_of_a_cgroup_gets_a_user_anothers_credential() {
    let test = "no_name_of_a_cgroup_gets_a_user_anothers_credential";
    if !is_root(test) || !has_program(test, "setpriv") {
        return;
    }
    let Some(mut cgroups) = Cgroups::find() else {
        println!("{test}: needs a cgroup-v2 file system");
        return;
    };
    let mut world = World::servers().await;
    let unit = format!("countersign-agent-test-{}.service", std::process::id());
    let common = COMMON.replace("  unix: {}\n", "  unix: {}\n  systemd: {}\n");
    world
        .start_agent(
            &format!("{common}{DESTINATIONS}"),
            &PERMITS.replace("{unit}", &unit),
        )
        .await;
    let mount = cgroups.mount.clone();
    let real = cgroups.make(&mount, format!("system.slice/{unit}"));
    let own = cgroups.make(&mount, "user.slice/user-65534.slice/user@65534.service");
    let mut refused = 0;
    world.good().await;
    for listener in ["proxy", "local"] {
        let served = (200, String::new(), true);
        assert_eq!(ask(&world, listener, &real).await, served, "{listener}");
        for name in HOSTILE.trim_ascii_end().split(|byte| *byte == b'\n') {
            let cgroup = cgroups.make(&own, OsStr::from_bytes(name));
            let name = String::from_utf8_lossy(name);
            chown(&cgroup, Some(NOBODY.into()), Some(NOBODY.into())).unwrap();
            let answer = ask(&world, listener, &cgroup).await;
            let denied = (403, "policy_denied".to_owned(), false);
            assert_eq!(answer, denied, "{name} at {listener}");
            refused += 1;
        }
        assert_eq!(ask(&world, listener, &real).await, served, "{listener}");
    }
    world.good().await;
    reached("hostile_cgroups", refused);
}
