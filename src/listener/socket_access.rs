//! Who may connect to a Unix socket: the group and the mode of its file.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, chown};

use crate::config::SocketAccess;

/// The permission bits of a socket whose configuration says none.
const DEFAULT_MODE: u32 = 0o600;

/// A change of who may connect, not made yet.
pub struct AccessChange {
    path: PathBuf,
    before: GroupAndMode,
    after: GroupAndMode,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct GroupAndMode {
    /// `None` leaves the group as it is.
    group: Option<Gid>,
    mode: u32,
}

/// Gives a socket's file its group and mode.
///
/// # Errors
/// There is no such group, or the file cannot be given to it.
pub(super) fn restrict(path: &Path, access: &SocketAccess) -> io::Result<()> {
    GroupAndMode::of(access)?.give_to(path)
}

impl AccessChange {
    /// What gives the file at `path` what `access` says, where it has what `former` said, if that is known;
    /// `None` where it has that already.
    ///
    /// # Errors
    /// There is no such group, or no such file.
    pub(super) fn new(
        path: &Path,
        former: Option<&SocketAccess>,
        access: &SocketAccess,
    ) -> io::Result<Option<Self>> {
        let before = GroupAndMode::found_at(path)?;
        let mut after = GroupAndMode::of(access)?;
        // A group that was configured is taken back.
        if former.is_none_or(|former| former.group.is_some()) {
            after.group = Some(match after.group {
                Some(group) => group,
                None => group_of_new_files(path)?,
            });
        }
        let is_there =
            before.mode == after.mode && (after.group.is_none() || before.group == after.group);
        Ok((!is_there).then(|| Self {
            path: path.to_owned(),
            before,
            after,
        }))
    }

    /// Makes it.
    ///
    /// # Errors
    /// The file cannot be given to the group, or is not the agent's. Nobody may connect then who could not before.
    pub fn make(&self) -> io::Result<()> {
        self.after.give_to(&self.path)
    }

    /// Takes it back, also where it was made in part or not at all.
    pub fn undo(&self) {
        let found = GroupAndMode::found_at(&self.path);
        if let Err(error) = found.and_then(|found| match found == self.before {
            true => Ok(()),
            false => self.before.give_to(&self.path),
        }) {
            tracing::error!(%error, path = %self.path.display(), "access to the socket could not be taken back to what it was");
        }
    }
}

/// What a file that is made beside the one at `path` gets (inode(7)).
fn group_of_new_files(path: &Path) -> io::Result<Gid> {
    let directory = std::fs::metadata(path.parent().unwrap_or(Path::new("/")))?;
    Ok(match directory.mode() & libc::S_ISGID {
        0 => Gid::effective(),
        _ => Gid::from_raw(directory.gid()),
    })
}

impl GroupAndMode {
    fn found_at(path: &Path) -> io::Result<Self> {
        let found = std::fs::metadata(path)?;
        Ok(Self {
            group: Some(Gid::from_raw(found.gid())),
            mode: found.mode() & 0o7777,
        })
    }

    fn of(access: &SocketAccess) -> io::Result<Self> {
        let group = match &access.group {
            Some(name) => {
                let found = Group::from_name(name).map_err(io::Error::from)?;
                let missing =
                    || io::Error::new(io::ErrorKind::NotFound, format!("no group `{name}`"));
                Some(found.ok_or_else(missing)?.gid)
            }
            None => None,
        };
        Ok(Self {
            group,
            mode: access.mode.unwrap_or(DEFAULT_MODE),
        })
    }

    /// Neither on the way nor where it fails may anybody connect whom both the former mode and this keep out.
    fn give_to(self, path: &Path) -> io::Result<()> {
        let set_mode = |mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
        if self.group.is_some() {
            set_mode(std::fs::metadata(path)?.mode() & self.mode)?;
            chown(path, None, self.group).map_err(io::Error::from)?;
        }
        set_mode(self.mode)
    }
}
