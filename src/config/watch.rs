//! Notices changes of the files behind a configuration.
//!
//! By asking for their metadata: that also works where notification does not (network file systems,
//! and a ConfigMap, whose files are symbolic links through a directory that is swapped).

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

use super::Config;

/// How often metadata is asked for.
const TICK: Duration = Duration::from_millis(250);

/// What a file is and when it changed; `ctime` also tells a change that kept size and `mtime`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

type Marks = BTreeMap<PathBuf, Option<Mark>>;

/// Watches the files of a configuration: itself, what it includes (new files that a pattern matches
/// too), keys, certificates, and the policy directory.
#[derive(Debug)]
pub struct Watcher {
    paths: BTreeSet<PathBuf>,
    seen: Marks,
    unsettled: Option<Marks>,
    interval: Option<Interval>,
}

impl Watcher {
    /// Watches one configuration file as it is now. Made before the file is loaded, so that no change
    /// falls between.
    pub fn new(path: &Path) -> Self {
        let paths = BTreeSet::from([path.to_owned()]);
        Self {
            seen: marks(&paths),
            paths,
            unsettled: None,
            interval: None,
        }
    }

    /// Watches the files of a loaded configuration from now on. What is already watched is compared
    /// with what it was *before* the load, so that a change during the load is noticed.
    pub fn follow(&mut self, config: &Config) {
        self.paths = config.watched_files.iter().cloned().collect();
        self.paths.insert(config.path.clone());
        self.paths.insert(config.policy_directory.clone());
        let mut seen = marks(&self.paths);
        for (path, mark) in &mut seen {
            if let Some(before) = self.seen.get(path) {
                *mark = *before;
            }
        }
        self.seen = seen;
        self.unsettled = None;
    }

    /// Waits until something changed and then stayed the same for a tick of 250 ms. May be dropped and
    /// called again without losing a change. Needs a tokio runtime with time.
    pub async fn changed(&mut self) {
        loop {
            self.interval
                .get_or_insert_with(|| {
                    let mut interval = interval(TICK);
                    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    interval
                })
                .tick()
                .await;
            let paths = self.paths.clone();
            let Ok(now) = tokio::task::spawn_blocking(move || marks(&paths)).await else {
                continue;
            };
            if now == self.seen {
                self.unsettled = None;
            } else if self.unsettled.as_ref() == Some(&now) {
                self.seen = now;
                self.unsettled = None;
                return;
            } else {
                self.unsettled = Some(now);
            }
        }
    }
}

/// The marks of files, and of the entries of directories.
fn marks(paths: &BTreeSet<PathBuf>) -> Marks {
    let mut marks = Marks::new();
    for path in paths {
        marks.insert(path.clone(), mark(path));
        if let Ok(entries) = std::fs::read_dir(path) {
            for entry in entries.filter_map(Result::ok) {
                let path = entry.path();
                let mark = mark(&path);
                marks.insert(path, mark);
            }
        }
    }
    marks
}

/// Follows symbolic links: a swapped link leads to another inode.
fn mark(path: &Path) -> Option<Mark> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(Mark {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const CONFIG: &str =
        "{version: 1, include: [conf.d/*.yaml], listeners: [], credentials: [], destinations: []}";

    /// A ConfigMap volume as the kubelet lays it: files link through `..data` to a dated directory.
    fn config_map(root: &Path, name: &str, config: &str) {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join("agent.yaml"), config).unwrap();
        fs::write(root.join(name).join("default.cedar"), "").unwrap();
        symlink(name, root.join("..data_new")).unwrap();
        fs::rename(root.join("..data_new"), root.join("..data")).unwrap();
    }

    fn laid() -> (tempfile::TempDir, Watcher) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        config_map(root, "..2026_01", CONFIG);
        symlink("..data/agent.yaml", root.join("agent.yaml")).unwrap();
        fs::create_dir(root.join("policies")).unwrap();
        fs::create_dir(root.join("conf.d")).unwrap();
        symlink(
            "../..data/default.cedar",
            root.join("policies/default.cedar"),
        )
        .unwrap();
        let path = root.join("agent.yaml");
        let mut watcher = Watcher::new(&path);
        watcher.follow(&Config::load(&path).unwrap());
        (directory, watcher)
    }

    async fn is_noticed(watcher: &mut Watcher) -> bool {
        tokio::time::timeout(Duration::from_secs(30), watcher.changed())
            .await
            .is_ok()
    }

    async fn is_quiet(watcher: &mut Watcher) -> bool {
        tokio::time::timeout(TICK * 5, watcher.changed())
            .await
            .is_err()
    }

    #[tokio::test]
    async fn each_kind_of_change_is_noticed_once() {
        let (directory, mut watcher) = laid();
        let root = directory.path();
        assert!(is_quiet(&mut watcher).await);

        config_map(root, "..2026_02", CONFIG);
        assert!(is_noticed(&mut watcher).await, "a ConfigMap swap");
        assert!(is_quiet(&mut watcher).await);

        fs::write(root.join("policies/new.cedar"), "").unwrap();
        assert!(is_noticed(&mut watcher).await, "a new policy");
        fs::write(root.join("policies/new.cedar"), "// changed").unwrap();
        assert!(is_noticed(&mut watcher).await, "a changed policy");
        fs::remove_file(root.join("policies/new.cedar")).unwrap();
        assert!(is_noticed(&mut watcher).await, "a removed policy");

        fs::write(root.join("conf.d/orders.yaml"), "{}").unwrap();
        assert!(is_noticed(&mut watcher).await, "a new included file");
        assert!(is_quiet(&mut watcher).await);
    }

    #[tokio::test]
    async fn a_change_during_a_load_is_noticed_after_it() {
        let (directory, mut watcher) = laid();
        let path = directory.path().join("agent.yaml");
        let loaded = Config::load(&path).unwrap();
        config_map(directory.path(), "..2026_02", CONFIG);
        watcher.follow(&loaded);
        assert!(is_noticed(&mut watcher).await);
        assert!(is_quiet(&mut watcher).await);
    }

    #[tokio::test]
    async fn a_dropped_wait_loses_nothing() {
        let (directory, mut watcher) = laid();
        config_map(directory.path(), "..2026_02", CONFIG);
        let mut noticed = false;
        for _ in 0..400 {
            let wait = tokio::time::timeout(TICK / 3, watcher.changed());
            if wait.await.is_ok() {
                noticed = true;
                break;
            }
        }
        assert!(noticed);
    }
}
