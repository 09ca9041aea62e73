//! Where lines go: a file that is rotated by size, something like a file, or standard output. Each
//! sink has a chain of its own, so that each can be verified alone.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Deserialize;

use crate::audit::{Hash, Head, line};
use crate::diagnostics::{Diagnostic, system_words};

/// The code of a file to which another process writes.
const IN_USE: &str = "audit_file_in_use";

/// How many files beside it may be in use at once: agents that drain, one after another.
const MOST_BESIDE: usize = 16;

/// The two members that chain a line.
#[derive(Deserialize)]
pub(super) struct ChainMembers {
    pub(super) sequence: u64,
    pub(super) previous: String,
}

/// Members of records, one after another.
#[derive(Debug, Default)]
pub(super) struct Batch {
    members: Vec<u8>,
    ends: Vec<usize>,
}

impl Batch {
    pub(super) fn push(&mut self, members: &[u8]) {
        self.members.extend_from_slice(members);
        self.ends.push(self.members.len());
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn clear(&mut self) {
        self.members.clear();
        self.ends.clear();
    }

    /// At least as many bytes as the lines will have.
    fn bytes(&self) -> usize {
        self.members.len() + self.ends.len() * line::CHAIN_BYTES
    }

    /// As many with one more record.
    pub(super) fn bytes_with(&self, members: &[u8]) -> usize {
        self.bytes() + members.len() + line::CHAIN_BYTES
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.iter().filter_map(move |end| {
            let members = self.members.get(start..*end);
            start = *end;
            members
        })
    }
}

/// Where lines go.
#[derive(Debug)]
pub(super) struct Sink {
    file: File,
    /// The regular file that is rotated; `None` for a pipe, a device or standard output.
    rotation: Option<Rotation>,
    head: Head,
    /// Lines that are chained and not yet written whole.
    pending: Vec<u8>,
    /// How much of them is written.
    written: usize,
    /// Whether the batch under way is in `pending`.
    composed: bool,
}

#[derive(Debug)]
struct Rotation {
    path: PathBuf,
    rotate_size: u64,
    keep: usize,
    size: u64,
    /// After a rotation failed: the size at which it is tried again.
    retry_size: u64,
}

/// A sink that was opened.
pub(super) struct Opened {
    pub(super) sink: Sink,
    /// The file.
    pub(super) path: PathBuf,
    /// How many bytes of a torn tail were cut.
    pub(super) bytes_cut: Option<u64>,
}

impl Sink {
    /// Opens a file as [`Sink::file`] does; while another process writes to it, the first of
    /// `PATH.beside1`, `PATH.beside2` and so on to which none does. Each is a chain of its own, and goes
    /// on where it is taken again.
    pub(super) fn beside(path: &Path, rotate_size: u64, keep: usize) -> Result<Opened, Diagnostic> {
        let mut opened = Self::file(path, rotate_size, keep);
        for number in 1..=MOST_BESIDE {
            match &opened {
                Err(refused) if refused.code == IN_USE => {
                    let mut name = OsString::from(path.as_os_str());
                    name.push(format!(".beside{number}"));
                    opened = Self::file(Path::new(&name), rotate_size, keep);
                }
                _ => break,
            }
        }
        opened
    }

    /// Opens a file, or what stands in its place: a pipe or a device, which is written as it is,
    /// without waiting.
    pub(super) fn file(path: &Path, rotate_size: u64, keep: usize) -> Result<Opened, Diagnostic> {
        let problem = |error: &io::Error| not_opened(path, error);
        if let Ok(metadata) = std::fs::metadata(path)
            && !metadata.is_file()
        {
            let mut options = OpenOptions::new();
            options.write(true).custom_flags(libc::O_NONBLOCK);
            // Reading too, so that a pipe can be opened, and kept, while nobody reads from it.
            options.read(metadata.file_type().is_fifo());
            let file = options.open(path).map_err(|error| problem(&error))?;
            return Ok(Opened {
                sink: Self::unrotated(file),
                path: path.to_owned(),
                bytes_cut: None,
            });
        }
        let (mut file, mut size) = open_locked(path)?;
        // A rotation that was not finished: one file by two names would be read twice.
        let newest = numbered(path, 1);
        if newest.exists() && is_at(&file, &newest) {
            std::fs::remove_file(&newest).map_err(|error| problem(&error))?;
        }
        let whole = end_of_last_line(&mut file, size).map_err(|error| problem(&error))?;
        let bytes_cut = size - whole;
        if bytes_cut > 0 {
            file.set_len(whole).map_err(|error| problem(&error))?;
            size = whole;
        }
        let mut sink = Self {
            file,
            rotation: Some(Rotation {
                path: path.to_owned(),
                rotate_size,
                keep,
                size,
                retry_size: 0,
            }),
            head: Head::default(),
            pending: Vec::new(),
            written: 0,
            composed: false,
        };
        if size > 0 {
            sink.head = head_of(path, &mut sink.file, size)?;
        } else if let Some(newest) = rotated_files(path).pop() {
            let mut rotated = File::open(&newest).map_err(|error| problem(&error))?;
            let size = rotated.metadata().map_err(|error| problem(&error))?.len();
            let whole = end_of_last_line(&mut rotated, size).map_err(|error| problem(&error))?;
            if whole > 0 {
                sink.head = head_of(&newest, &mut rotated, whole)?;
                sink.continue_from(&newest, SystemTime::now());
            }
        }
        Ok(Opened {
            sink,
            path: path.to_owned(),
            bytes_cut: (bytes_cut > 0).then_some(bytes_cut),
        })
    }

    /// Standard output: a chain that begins anew at each start.
    pub(super) fn stdout() -> Result<Self, Diagnostic> {
        let file = io::stdout().as_fd().try_clone_to_owned().map_err(|error| {
            Diagnostic::error(
                "audit_stdout_unusable",
                "stdout",
                format!(
                    "standard output cannot be used for the audit: {}",
                    system_words(&error)
                ),
            )
            .next("do not close standard output, or configure a file")
        })?;
        Ok(Self::unrotated(File::from(file)))
    }

    pub(super) fn unrotated(file: File) -> Self {
        Self {
            file,
            rotation: None,
            head: Head::default(),
            pending: Vec::new(),
            written: 0,
            composed: false,
        }
    }

    /// The last record that is chained.
    pub(super) fn head(&self) -> Head {
        self.head
    }

    /// The size that a batch should not exceed.
    pub(super) fn batch_limit(&self) -> u64 {
        self.rotation
            .as_ref()
            .map_or(u64::MAX, |rotation| rotation.rotate_size / 2)
    }

    /// Writes a batch. After an error the same batch is to be given again: what is written stays
    /// written, and the rest follows.
    pub(super) fn write(&mut self, batch: &Batch, now: SystemTime) -> io::Result<()> {
        if !self.composed {
            self.rotate_if_due(batch.bytes(), now);
            for members in batch.iter() {
                self.chain(members);
            }
            self.composed = true;
        }
        while let Some(rest) = self.pending.get(self.written..)
            && !rest.is_empty()
        {
            match self.file.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.written += count;
                    if let Some(rotation) = &mut self.rotation {
                        rotation.size += count as u64;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.pending.clear();
        self.written = 0;
        self.composed = false;
        Ok(())
    }

    fn chain(&mut self, members: &[u8]) {
        let start = line::append_chained(&self.head, members, &mut self.pending);
        if let Some(line) = self.pending.get(start..) {
            self.head = Head {
                sequence: self.head.sequence + 1,
                hash: Hash::of(line),
            };
        }
    }

    /// Puts in front of a file's records the one that says which file it continues.
    fn continue_from(&mut self, previous: &Path, now: SystemTime) {
        let mut members = Vec::new();
        line::append_file_continued(now, previous, &mut members);
        self.chain(&members);
    }

    fn rotate_if_due(&mut self, bytes: usize, now: SystemTime) {
        let Some(rotation) = &mut self.rotation else {
            return;
        };
        let due = rotation.size > 0 && rotation.size + bytes as u64 > rotation.rotate_size;
        if !due || rotation.size < rotation.retry_size {
            return;
        }
        match rotation.rotate() {
            Ok((file, previous)) => {
                self.file = file;
                self.continue_from(&previous, now);
            }
            // Records in a file that is too large are better than none.
            Err(error) => {
                tracing::error!(path = %rotation.path.display(), error = %system_words(&error), "the audit file cannot be rotated");
                rotation.retry_size = rotation.size + rotation.rotate_size / 10;
            }
        }
    }

    /// Begins a new file where somebody moved or removed the one that is open.
    pub(super) fn reopen_if_gone(&mut self, now: SystemTime) {
        let Some(rotation) = &mut self.rotation else {
            return;
        };
        if is_at(&self.file, &rotation.path) || !self.pending.is_empty() {
            return;
        }
        let reopened = open_regular(&rotation.path)
            .and_then(|(file, size)| match size {
                0 => Ok(file),
                _ => Err(io::Error::other("another file stands in its place")),
            })
            .map_err(|error| system_words(&error))
            .and_then(|file| match lock(&file, &rotation.path) {
                Ok(()) => Ok(file),
                Err(diagnostic) => Err(diagnostic.message),
            });
        match reopened {
            Ok(file) => {
                let previous = rotation.path.clone();
                tracing::warn!(path = %previous.display(), "the audit file was moved or removed; a new one is begun");
                rotation.size = 0;
                rotation.retry_size = 0;
                self.file = file;
                self.continue_from(&previous, now);
            }
            Err(error) => {
                tracing::error!(path = %rotation.path.display(), error, "the audit file was moved or removed, and no new one can be begun");
            }
        }
    }
}

impl Rotation {
    /// Moves `PATH` to `PATH.1`, that to `PATH.2` and so on, and begins `PATH` anew. Returns the new
    /// file, and where the one before it is now. There is a locked file at `PATH` at every moment: an
    /// agent that starts meanwhile could else go on with the same chain.
    fn rotate(&mut self) -> io::Result<(File, PathBuf)> {
        let newest = numbered(&self.path, 1);
        let mut name = OsString::from(self.path.as_os_str());
        name.push(".new");
        let begun = PathBuf::from(name);
        let (file, _) = open_regular(&begun)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::Error(error) => error,
            TryLockError::WouldBlock => ErrorKind::WouldBlock.into(),
        })?;
        let numbers = rotated_numbers(&self.path);
        // What is beyond `keep`, from the oldest; one place is for the file that is moved now.
        let surplus = (numbers.len() + 1).saturating_sub(self.keep.max(1));
        for (index, number) in numbers.into_iter().enumerate() {
            match index < surplus {
                true => std::fs::remove_file(numbered(&self.path, number))?,
                false => std::fs::rename(
                    numbered(&self.path, number),
                    numbered(&self.path, number + 1),
                )?,
            }
        }
        std::fs::hard_link(&self.path, &newest)?;
        std::fs::rename(&begun, &self.path).inspect_err(|_| {
            let _ = std::fs::remove_file(&newest);
        })?;
        if self.keep == 0 {
            std::fs::remove_file(&newest)?;
        }
        self.size = 0;
        self.retry_size = 0;
        Ok((file, newest))
    }
}

/// Opens a regular file for appending, and tells its size.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

fn not_opened(path: &Path, error: &io::Error) -> Diagnostic {
    Diagnostic::error(
        "audit_file_unusable",
        path,
        format!("the audit file cannot be opened: {}", system_words(error)),
    )
    .next("create its directory, and let the agent's user write in it")
}

/// Opens a regular file, and locks it. Until it is locked its writer may rotate it away and let it go:
/// then this is no longer the file at `path`, and its chain goes on elsewhere.
fn open_locked(path: &Path) -> Result<(File, u64), Diagnostic> {
    let problem = |error: &io::Error| not_opened(path, error);
    loop {
        let (file, _) = open_regular(path).map_err(|error| problem(&error))?;
        lock(&file, path)?;
        if is_at(&file, path) {
            let size = file.metadata().map_err(|error| problem(&error))?.len();
            return Ok((file, size));
        }
    }
}

/// Whether an open file is what `path` leads to; also where that cannot be told.
fn is_at(file: &File, path: &Path) -> bool {
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(there), Ok(ours)) => there.dev() == ours.dev() && there.ino() == ours.ino(),
        (Err(error), _) if error.kind() == ErrorKind::NotFound => false,
        _ => true,
    }
}

/// Two writers would tear the chain apart.
fn lock(file: &File, path: &Path) -> Result<(), Diagnostic> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => {
            Diagnostic::error(IN_USE, path, "another process writes to the audit file")
                .next("give each agent an audit file of its own")
        }
        TryLockError::Error(error) => Diagnostic::error(
            "audit_file_unusable",
            path,
            format!("the audit file cannot be locked: {}", system_words(&error)),
        )
        .next("put it on a file system that has locks"),
    })
}

/// The offset after the last line end; 0 where there is none.
fn end_of_last_line(file: &mut File, size: u64) -> io::Result<u64> {
    let mut end = size;
    let mut chunk = vec![0; 64 * 1024];
    while end > 0 {
        let length = usize::try_from(end).unwrap_or(usize::MAX).min(chunk.len());
        let Some(part) = chunk.get_mut(..length) else {
            break;
        };
        file.seek(SeekFrom::Start(end - length as u64))?;
        file.read_exact(part)?;
        if let Some(index) = part.iter().rposition(|byte| *byte == b'\n') {
            return Ok(end - length as u64 + index as u64 + 1);
        }
        end -= length as u64;
    }
    Ok(0)
}

/// The chain's head: the last line, which ends at `end`.
fn head_of(path: &Path, file: &mut File, end: u64) -> Result<Head, Diagnostic> {
    let unusable = |reason: String| {
        Diagnostic::error("audit_file_unusable", path, reason)
            .next("move the file away; a new chain begins without it")
    };
    let mut read = || -> io::Result<Vec<u8>> {
        let start = end_of_last_line(file, end - 1)?;
        let mut line = vec![0; usize::try_from(end - start).unwrap_or(usize::MAX)];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut line)?;
        Ok(line)
    };
    let line = read().map_err(|error| {
        unusable(format!(
            "the audit file cannot be read: {}",
            system_words(&error)
        ))
    })?;
    match serde_json::from_slice::<ChainMembers>(&line) {
        Ok(members) => Ok(Head {
            sequence: members.sequence,
            hash: Hash::of(&line),
        }),
        Err(_) => Err(unusable("its last line is not an audit record".to_owned())),
    }
}

/// `PATH.NUMBER`.
fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

/// The rotated files of `path` that exist, the oldest (with the highest number) first.
pub(super) fn rotated_files(path: &Path) -> Vec<PathBuf> {
    rotated_numbers(path)
        .into_iter()
        .map(|number| numbered(path, number))
        .collect()
}

fn rotated_numbers(path: &Path) -> Vec<usize> {
    let (Some(directory), Some(name)) = (
        path.parent(),
        path.file_name().and_then(|name| name.to_str()),
    ) else {
        return Vec::new();
    };
    let directory = match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    };
    let mut numbers: Vec<usize> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.file_name();
            let number = entry.to_str()?.strip_prefix(name)?.strip_prefix('.')?;
            (!number.starts_with('0'))
                .then(|| number.parse().ok())
                .flatten()
        })
        .collect();
    numbers.sort_unstable_by(|one, other| other.cmp(one));
    numbers
}
