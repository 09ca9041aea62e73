//! Files and directories that the agent makes.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use zeroize::Zeroizing;

/// Makes a directory with mode 0700, where there is none. Those above it that are missing let others pass: what is
/// for them may lie there too.
///
/// # Errors
/// One of them cannot be made.
pub fn make_private_directory(path: &Path) -> io::Result<()> {
    let mut directories = fs::DirBuilder::new();
    directories.recursive(true);
    if let Some(parent) = path.parent() {
        directories.mode(0o755).create(parent)?;
    }
    directories.mode(0o700).create(path)
}

/// Writes a file whole or not at all, and on the disk before it has its name: a temporary name, `fsync`, then
/// `rename`. One of our own that holds the same already, with the same mode, is left alone.
///
/// # Errors
/// The file cannot be written.
pub fn write_durably(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    if holds_already(path, content, mode) {
        return Ok(());
    }
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut file| {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.write_all(content)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn holds_already(path: &Path, content: &[u8], mode: u32) -> bool {
    // A link is replaced, and what another user owns that user can change.
    let is_same_kind = fs::symlink_metadata(path).is_ok_and(|known| {
        known.is_file()
            && known.permissions().mode() & 0o7777 == mode
            && known.uid() == nix::unistd::geteuid().as_raw()
            && usize::try_from(known.len()) == Ok(content.len())
    });
    is_same_kind && fs::read(path).is_ok_and(|known| Zeroizing::new(known).as_slice() == content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_holds_the_same_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("root.pem");
        let written = |content: &str| {
            write_durably(&path, content.as_bytes(), 0o644).unwrap();
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert!(metadata.is_file());
            assert_eq!(metadata.mode() & 0o7777, 0o644);
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            // Held open, so that no other file has its number.
            (fs::File::open(&path).unwrap(), metadata.ino())
        };
        let first = written("one");
        assert_eq!(written("one").1, first.1);
        let changed = written("two");
        assert_ne!(changed.1, first.1);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let narrowed = written("two");
        assert_ne!(narrowed.1, changed.1);
        let elsewhere = directory.path().join("elsewhere.pem");
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_ne!(written("two").1, narrowed.1);
    }

    #[test]
    fn a_private_directory_lets_others_pass_above_it() {
        let directory = tempfile::tempdir().unwrap();
        let above = directory.path().join("run");
        let private = above.join("ca");
        let usual = directory.path().join("usual");
        fs::create_dir(&usual).unwrap();
        for _ in 0..2 {
            make_private_directory(&private).unwrap();
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&above), mode(&usual) & 0o755);
            assert_eq!(mode(&private), 0o700);
        }
    }
}
