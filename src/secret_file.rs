//! Files that hold a key or a secret, read into memory that is wiped.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use zeroize::Zeroizing;

/// Files above this size are no keys.
const LIMIT_BYTES: usize = 64 * 1024;

/// What a regular file holds. Waits for nobody to write to it.
///
/// # Errors
/// It cannot be read, is no regular file, or is larger than 64 KiB.
pub fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    // Large enough: what a growing buffer leaves behind is not wiped.
    let size = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    let mut content = Zeroizing::new(Vec::with_capacity(size.min(LIMIT_BYTES) + 1));
    file.take(LIMIT_BYTES as u64 + 1)
        .read_to_end(&mut content)?;
    match content.len() > LIMIT_BYTES {
        true => Err(io::Error::other("it is larger than 64 KiB")),
        false => Ok(content),
    }
}

/// The secret in a file's content: all but one line end at its end; `None` where nothing is left.
pub fn secret_in(content: &[u8]) -> Option<&[u8]> {
    let content = content.strip_suffix(b"\n").unwrap_or(content);
    let secret = content.strip_suffix(b"\r").unwrap_or(content);
    (!secret.is_empty()).then_some(secret)
}
