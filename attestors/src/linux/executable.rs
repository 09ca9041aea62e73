//! What may be said of an executable: the host's path of it, and the hash of its bytes.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{Context, SHA256};
use nix::fcntl::AT_FDCWD;
use nix::sys::statfs::{self, FsType, fstatfs};
use quick_cache::sync::Cache;

use super::kernel::{self, FileIdentity};

/// Hashes by identity: a file that was written has another change time, unless that is [`A_TICK`] old at most.
static HASHES: LazyLock<Cache<FileIdentity, [u8; 32]>> = LazyLock::new(|| Cache::new(4096));

/// Times of files are those of the kernel's last tick, which some file systems round further.
const A_TICK: Duration = Duration::from_secs(2);

/// Larger files are not hashed: nothing that large is an executable that somebody would permit by hash.
const LARGEST_EXECUTABLE: u64 = 2 * 1024 * 1024 * 1024;

/// The file systems whose bytes live in this kernel or on a local disk. FUSE and network file
/// systems may answer each read differently, and so may what is not listed.
const LOCAL_FILE_SYSTEMS: [i64; 14] = [
    file_system(statfs::EXT4_SUPER_MAGIC), // also ext2 and ext3
    file_system(statfs::XFS_SUPER_MAGIC),
    file_system(statfs::BTRFS_SUPER_MAGIC),
    file_system(statfs::TMPFS_MAGIC),
    file_system(statfs::OVERLAYFS_SUPER_MAGIC),
    0x7371_7368, // squashfs
    0xe0f5_e1e2, // erofs
    0x2fc1_2fc1, // zfs
    0xf2f5_2010, // f2fs
    0x8584_58f6, // ramfs
    0xca45_1a4e, // bcachefs
    0x4d44,      // vfat
    0x9660,      // iso9660
    0x2405_1905, // ubifs
];

#[allow(
    clippy::unnecessary_cast,
    reason = "the width of the number differs between architectures and C libraries"
)]
const fn file_system(kind: FsType) -> i64 {
    kind.0 as i64
}

/// The inode of the mount namespace whose paths the host vouches for: that of the first process, or
/// our own where we may not look at that (an unprivileged agent).
pub(super) fn host_mount_namespace() -> io::Result<u64> {
    let identity = kernel::identify(AT_FDCWD, c"/proc/1/ns/mnt")
        .or_else(|_| kernel::identify(AT_FDCWD, c"/proc/self/ns/mnt"))?;
    Ok(identity.inode)
}

/// The file that the host finds at `path`.
pub(super) fn identify_on_host(path: &Path) -> Option<FileIdentity> {
    if !path.is_absolute() {
        return None;
    }
    let below = |root: &[u8]| CString::new([root, path.as_os_str().as_bytes()].concat()).ok();
    let ours = kernel::identify(AT_FDCWD, c"/proc/self/ns/mnt").ok()?.inode;
    if host_mount_namespace().ok()? == ours {
        return kernel::identify(AT_FDCWD, &below(b"")?).ok();
    }
    kernel::identify(AT_FDCWD, &below(b"/proc/1/root")?).ok()
}

/// Hashes an open executable, once per identity: who asks while it is hashed waits for that. One that was
/// changed just now is hashed for each who asks.
pub(super) fn sha256(file: File) -> io::Result<Option<[u8; 32]>> {
    let kind = fstatfs(&file)?.filesystem_type();
    if !LOCAL_FILE_SYSTEMS.contains(&(file_system(kind) & 0xffff_ffff)) {
        return Ok(None);
    }
    let identity = kernel::identify_open(file.as_fd())?;
    if identity.size > LARGEST_EXECUTABLE {
        return Ok(None);
    }
    let hash = match identity.shows_changes(A_TICK, SystemTime::now()) {
        true => HASHES.get_or_insert_with(&identity, || digest(file, &identity)),
        false => digest(file, &identity),
    };
    match hash {
        Ok(hash) => Ok(Some(hash)),
        Err(None) => Ok(None),
        Err(Some(error)) => Err(error),
    }
}

/// The hash of a file's bytes; an error without a cause where it was written meanwhile: the hash is of
/// no version of it then.
fn digest(mut file: File, identity: &FileIdentity) -> Result<[u8; 32], Option<io::Error>> {
    let mut digest = Context::new(&SHA256);
    let mut buffer = vec![0_u8; 256 * 1024];
    loop {
        let read = file.read(&mut buffer).map_err(Some)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        digest.update(chunk);
    }
    if kernel::identify_open(file.as_fd()).map_err(Some)? != *identity {
        return Err(None);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.finish().as_ref());
    Ok(hash)
}
