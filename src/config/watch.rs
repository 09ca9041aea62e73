//! Notices changes of the files behind a configuration.
//!
//! By asking for their metadata: that also works where notification does not (network file systems,
//! and a ConfigMap, whose files are symbolic links through a directory that is swapped).

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};

use super::{Checked, check};

/// How often metadata is asked for.
const TICK: Duration = Duration::from_millis(250);

/// How long what changed is read for what it names.
const MOST_READING: Duration = Duration::from_secs(10);

/// What a file is and when it changed; `ctime` also tells a change that kept size and `mtime`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The files and directories behind a configuration, as each was before it was read; without a mark where
/// there was none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks(BTreeMap<PathBuf, Vec<Mark>>);

/// Watches the files of a configuration: itself, what it includes (new files that a pattern matches
/// too), keys, certificates, and the policy directory.
#[derive(Debug)]
pub struct Watcher {
    path: PathBuf,
    seen: Marks,
    unsettled: Option<Marks>,
    interval: Option<Interval>,
    /// Asks for metadata. What does not answer is asked once.
    asking: Option<JoinHandle<Marks>>,
    /// Reads what changed for what it names. Nothing else is read while that hangs.
    reading: Option<JoinHandle<Marks>>,
}

impl Watcher {
    /// Watches the files of the configuration at `path`, from before they were read.
    pub fn new(path: &Path, read: &Checked) -> Self {
        Self {
            path: path.to_owned(),
            seen: read.files.clone(),
            unsettled: None,
            interval: None,
            asking: None,
            reading: None,
        }
    }

    /// Waits until something changed and then stayed the same for a tick of 250 ms. May be dropped and
    /// called again without losing a change. A configuration that is loaded afterwards is watched from
    /// before its load. Needs a tokio runtime with time.
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
            self.take_in_what_was_read_late().await;
            let seen = &self.seen;
            let asking = self.asking.get_or_insert_with(|| {
                let seen = seen.clone();
                spawn_blocking(move || seen.now())
            });
            let now = asking.await;
            self.asking = None;
            let Ok(now) = now else { continue };
            if now == self.seen {
                self.unsettled = None;
            } else if self.unsettled.as_ref() == Some(&now) {
                self.seen = self.read(now).await;
                self.unsettled = None;
                return;
            } else {
                self.unsettled = Some(now);
            }
        }
    }

    /// The marks of what the files that have these marks name; these alone, where a read of them hangs: the load
    /// that follows says so.
    async fn read(&mut self, now: Marks) -> Marks {
        if self.reading.is_some() {
            return now;
        }
        let (path, before) = (self.path.clone(), now.clone());
        let reading = self
            .reading
            .insert(spawn_blocking(move || renewed(&path, before)));
        match timeout(MOST_READING, reading).await {
            Ok(read) => {
                self.reading = None;
                read.unwrap_or(now)
            }
            Err(_) => now,
        }
    }

    /// Watches, too, what was named by files whose read had been given up.
    async fn take_in_what_was_read_late(&mut self) {
        if let Some(reading) = self.reading.take_if(|reading| reading.is_finished())
            && let Ok(read) = reading.await
        {
            for (path, mark) in read.0 {
                self.seen.0.entry(path).or_insert(mark);
            }
        }
    }
}

/// The marks of the files that the configuration names by now. What had a mark keeps it, so that a
/// change that happens meanwhile is noticed.
fn renewed(path: &Path, before: Marks) -> Marks {
    let mut marks = check(path).files;
    for (path, mark) in before.0 {
        marks.0.entry(path).and_modify(|now| *now = mark);
    }
    marks
}

impl Marks {
    /// Marks what is read next, where it was not read before.
    pub(super) fn add(&mut self, path: &Path) {
        if !self.0.contains_key(path) {
            self.0.insert(path.to_owned(), mark(path));
        }
    }

    /// In order.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.0.keys()
    }

    fn now(self) -> Self {
        Self(
            self.0
                .into_keys()
                .map(|path| {
                    let mark = mark(&path);
                    (path, mark)
                })
                .collect(),
        )
    }
}

/// What a path leads to: a file's identity and times, and for a directory those of its entries.
fn mark(path: &Path) -> Vec<Mark> {
    let mut marks: Vec<Mark> = Mark::of(path).into_iter().collect();
    if let Ok(entries) = std::fs::read_dir(path) {
        let mut entries: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .collect();
        entries.sort();
        marks.extend(entries.iter().filter_map(|entry| Mark::of(entry)));
    }
    marks
}

impl Mark {
    /// Follows symbolic links: a swapped link leads to another inode.
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[cfg(test)]
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
        let watcher = Watcher::new(&path, &check(&path));
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
    async fn what_does_not_answer_is_noticed_and_so_is_what_replaces_it() {
        let (directory, mut watcher) = laid();
        let path = directory.path().join("agent.yaml");
        let whole = directory.path().join("whole.yaml");
        fs::write(&whole, CONFIG).unwrap();
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(is_noticed(&mut watcher).await, "a pipe");
        let began = std::time::Instant::now();
        fs::write(directory.path().join("policies/new.cedar"), "").unwrap();
        assert!(is_noticed(&mut watcher).await, "a policy beside it");
        assert!(began.elapsed() < MOST_READING, "the pipe was read again");
        // Who reads it reads nothing now, and ends.
        drop(fs::File::options().write(true).open(&path).unwrap());
        fs::rename(&whole, &path).unwrap();
        assert!(is_noticed(&mut watcher).await, "a file again");
        assert!(is_quiet(&mut watcher).await);
    }

    #[tokio::test]
    async fn what_a_late_answer_names_is_watched() {
        let (directory, mut watcher) = laid();
        let root = directory.path();
        fs::create_dir(root.join("others")).unwrap();
        let named = root.join("named.yaml");
        let policies = "version: 1, policies: {directory: others}";
        fs::write(&named, CONFIG.replace("version: 1", policies)).unwrap();
        let files = check(&named).files;
        watcher.reading = Some(spawn_blocking(move || files));
        assert!(is_quiet(&mut watcher).await);
        fs::write(root.join("others/new.cedar"), "").unwrap();
        assert!(is_noticed(&mut watcher).await, "a policy that it names");
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
    async fn what_a_wrong_configuration_names_is_watched() {
        let (directory, mut watcher) = laid();
        let root = directory.path();
        let names_a_key = CONFIG.replace(
            "credentials: []",
            "credentials: [{name: a, type: oauth_client_credentials, issuer: \"https://a.example.com\", client_id: a, \
             client_authentication: {method: client_secret_basic, secret_file: secret}}]",
        );
        config_map(root, "..2026_02", &names_a_key);
        assert!(is_noticed(&mut watcher).await, "the new configuration");
        assert!(check(&root.join("agent.yaml")).config.is_none());
        fs::write(root.join("secret"), "a secret").unwrap();
        assert!(
            is_noticed(&mut watcher).await,
            "the secret that was missing"
        );
        assert!(check(&root.join("agent.yaml")).config.is_some());
        assert!(is_quiet(&mut watcher).await);
    }

    #[tokio::test]
    async fn what_changes_after_it_was_read_is_noticed() {
        let (directory, _) = laid();
        let root = directory.path();
        fs::write(root.join("conf.d/orders.yaml"), "{}").unwrap();
        let path = root.join("agent.yaml");
        let read = check(&path);
        fs::write(root.join("policies/new.cedar"), "").unwrap();
        let mut watcher = Watcher::new(&path, &read);
        assert!(is_noticed(&mut watcher).await, "a new policy");
        let read = check(&path);
        fs::write(root.join("conf.d/orders.yaml"), "{version: 1}").unwrap();
        let mut watcher = Watcher::new(&path, &read);
        assert!(is_noticed(&mut watcher).await, "a changed part");
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
