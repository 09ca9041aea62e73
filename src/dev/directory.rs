//! Where `countersign dev` keeps its files: a directory of the user's own, one for each `dev` that runs.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::client::dev_directory;
use crate::config::SigningAlgorithm;
use crate::files::write_durably;
use crate::jwt::SigningKey;
use crate::secret_file;

/// How many `dev`s of one user may run at once.
const AT_ONCE: usize = 64;

/// The directory, held until dropped; its files stay.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    _lock: File,
}

impl Directory {
    /// Opens `$XDG_RUNTIME_DIR/countersign-dev`, else `/tmp/countersign-dev-UID`; where another `dev`
    /// uses it, the same name with `.2`, and so on.
    ///
    /// # Errors
    /// The directory cannot be made, or is a symbolic link, another user's, or open to others.
    pub fn open() -> io::Result<Self> {
        let first = dev_directory();
        for number in 1..=AT_ONCE {
            let path = match number {
                1 => first.clone(),
                _ => PathBuf::from(format!("{}.{number}", first.display())),
            };
            if let Some(lock) = try_open(&path)? {
                return Ok(Self { path, _lock: lock });
            }
        }
        Err(io::Error::other(format!(
            "{AT_ONCE} directories like `{}` are in use",
            first.display()
        )))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file that its owner alone may read.
    pub fn write(&self, name: &str, content: &str) -> io::Result<()> {
        let path = self.file(name);
        write_durably(&path, content.as_bytes(), 0o600)
            .map_err(|error| io::Error::other(format!("`{}`: {error}", path.display())))
    }

    /// Writes a file that the user is invited to edit. What is in its place and differs is kept as
    /// `NAME.before`; the answer is whether something was.
    pub fn write_afresh(&self, name: &str, content: &str) -> io::Result<bool> {
        let path = self.file(name);
        let edited = match fs::read_to_string(&path) {
            Ok(there) => there != content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if edited {
            fs::rename(&path, self.file(&format!("{name}.before")))?;
        }
        self.write(name, content)?;
        Ok(edited)
    }

    /// The agent's key in `client.pem`, made where there is none that can be read.
    pub fn client_key(&self) -> io::Result<SigningKey> {
        let known = secret_file::read(&self.file(super::embedded::KEY_FILE))
            .ok()
            .and_then(|pem| SigningKey::parse(&pem, SigningAlgorithm::Es256).ok());
        if let Some(key) = known {
            return Ok(key);
        }
        let (key, pem) = SigningKey::generate(SigningAlgorithm::Es256).map_err(io::Error::other)?;
        self.write(super::embedded::KEY_FILE, &pem)?;
        Ok(key)
    }
}

/// `None` where another process holds it.
fn try_open(path: &Path) -> io::Result<Option<File>> {
    let refuse = |problem: &str| {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("`{}` {problem}: remove it", path.display()),
        )
    };
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io::Error::new(
                error.kind(),
                format!("`{}` cannot be made: {error}", path.display()),
            ));
        }
        _ => {}
    }
    // In /tmp anybody may have made something of this name, so nothing is followed.
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Err(refuse("is not a directory"));
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return Err(refuse("belongs to another user"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(refuse("is open to other users"));
    }
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_directory_that_others_could_have_touched_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let ours = parent.path().join("ours");
        let lock = try_open(&ours).unwrap();
        assert!(lock.is_some());
        assert_eq!(fs::metadata(&ours).unwrap().mode() & 0o777, 0o700);
        assert!(try_open(&ours).unwrap().is_none(), "it is in use");
        drop(lock);
        // A child that another test is starting has it open, too, until it executes.
        let dropped = Instant::now();
        while try_open(&ours).unwrap().is_none() {
            assert!(dropped.elapsed() < Duration::from_secs(20));
            std::thread::yield_now();
        }

        let link = parent.path().join("link");
        std::os::unix::fs::symlink(&ours, &link).unwrap();
        let error = try_open(&link).unwrap_err().to_string();
        assert!(error.contains("is not a directory"), "{error}");

        fs::set_permissions(&ours, fs::Permissions::from_mode(0o750)).unwrap();
        let error = try_open(&ours).unwrap_err().to_string();
        assert!(error.contains("is open to other users"), "{error}");

        let foreign = Path::new(if nix::unistd::geteuid().is_root() {
            // The kernel's, of no user.
            "/nonexistent-parent/x"
        } else {
            "/proc/1"
        });
        assert!(try_open(foreign).is_err());
    }
}
