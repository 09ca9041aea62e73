//! The names of users and groups, as the host's name service says them (nsswitch.conf(5)).
//!
//! A name is asked for with every connection, and may come from a directory on the network: what was said
//! is remembered for ten seconds. The host's own caches (nscd, sssd) remember for minutes.

use std::collections::HashMap;
use std::io;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

const REMEMBERED_FOR: Duration = Duration::from_secs(10);

/// Above this many, all are forgotten.
const MOST: usize = 4096;

static USERS: LazyLock<Names> = LazyLock::new(Names::default);
static GROUPS: LazyLock<Names> = LazyLock::new(Names::default);

/// The name of a user; `None` where the host has none for the id.
///
/// # Errors
/// The name service's.
pub(crate) fn user(uid: u32) -> io::Result<Option<String>> {
    USERS.get(uid, service::user)
}

/// The name of a group; `None` where the host has none for the id.
///
/// # Errors
/// The name service's.
pub(crate) fn group(gid: u32) -> io::Result<Option<String>> {
    GROUPS.get(gid, service::group)
}

#[cfg(unix)]
mod service {
    use std::io;

    use nix::unistd::{Gid, Group, Uid, User};

    pub(super) fn user(uid: u32) -> io::Result<Option<String>> {
        Ok(User::from_uid(Uid::from_raw(uid))?.map(|user| user.name))
    }

    pub(super) fn group(gid: u32) -> io::Result<Option<String>> {
        Ok(Group::from_gid(Gid::from_raw(gid))?.map(|group| group.name))
    }
}

#[cfg(not(unix))]
mod service {
    use std::io;

    pub(super) fn user(_uid: u32) -> io::Result<Option<String>> {
        Ok(None)
    }

    pub(super) fn group(_gid: u32) -> io::Result<Option<String>> {
        Ok(None)
    }
}

/// What was said of each id, and when.
#[derive(Default)]
struct Names(Mutex<HashMap<u32, (Instant, Option<String>)>>);

impl Names {
    fn get(
        &self,
        id: u32,
        ask: impl FnOnce(u32) -> io::Result<Option<String>>,
    ) -> io::Result<Option<String>> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((asked_at, name)) = lock().get(&id)
            && asked_at.elapsed() < REMEMBERED_FOR
        {
            return Ok(name.clone());
        }
        let asked_at = Instant::now();
        let name = ask(id)?;
        let mut known = lock();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(id, (asked_at, name.clone()));
        Ok(name)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_name_is_asked_for_once_and_a_failure_again() {
        let names = Names::default();
        let asked = Cell::new(0);
        let ask = |outcome: io::Result<Option<String>>| {
            names.get(7, |_| {
                asked.set(asked.get() + 1);
                outcome
            })
        };
        ask(Err(io::Error::other("the directory is away"))).unwrap_err();
        for _ in 0..3 {
            let name = ask(Ok(Some("orders".to_owned()))).unwrap();
            assert_eq!(name.as_deref(), Some("orders"));
        }
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn an_old_name_is_asked_for_again_and_there_are_not_more_than_may_be() {
        let names = Names::default();
        let long_ago = Instant::now().checked_sub(REMEMBERED_FOR).unwrap();
        names
            .0
            .lock()
            .unwrap()
            .insert(7, (long_ago, Some("before".to_owned())));
        let name = names.get(7, |_| Ok(None)).unwrap();
        assert_eq!(name, None);
        for id in 0..2 * u32::try_from(MOST).unwrap() {
            names.get(id, |_| Ok(None)).unwrap();
        }
        assert!(names.0.lock().unwrap().len() <= MOST);
    }
}
