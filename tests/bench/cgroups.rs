//! Cgroups that the benchmark makes, each for one process: where a unit or a container would run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Fallible;

/// A cgroup-v2 directory; it is removed when this is dropped, once its processes have ended.
pub struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// Makes one at the root of the hierarchy.
    pub fn new(name: &str) -> Fallible<Self> {
        let directory = mount_point()?.join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir(&directory)?;
        Ok(Self { directory })
    }

    /// Makes one below this one.
    pub fn below(&self, name: &str) -> Fallible<Self> {
        let directory = self.directory.join(name);
        std::fs::create_dir(&directory)?;
        Ok(Self { directory })
    }

    /// Puts a process into it.
    pub fn take_in(&self, process: u32) -> Fallible<()> {
        let processes = self.directory.join("cgroup.procs");
        std::fs::write(processes, process.to_string())?;
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It can go once the last process in it is reaped.
        let began = Instant::now();
        while std::fs::remove_dir(&self.directory).is_err()
            && began.elapsed() < Duration::from_secs(2)
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn mount_point() -> Fallible<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    table
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4))
        .map(|path| Path::new(path).to_owned())
        .ok_or_else(|| "needs a cgroup-v2 file system".into())
}
