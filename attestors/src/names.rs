//! The names of users and groups, as the host's name service says them (nsswitch.conf(5)).
//!
//! A name is asked for with every connection, and may come from a directory on the network: what was said
//! is remembered for ten seconds, and that it said nothing for one, so that who asks together waits together.
//! The host's own caches (nscd, sssd) remember for minutes.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

const REMEMBERED_FOR: Duration = Duration::from_secs(10);
const FAILURE_REMEMBERED_FOR: Duration = Duration::from_secs(1);

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

/// What was said of each id, and until when that is remembered.
#[derive(Default)]
struct Names(Mutex<HashMap<u32, (Instant, Said)>>);

/// A name, or why it could not be said.
type Said = Result<Option<String>, Arc<io::Error>>;

impl Names {
    fn get(
        &self,
        id: u32,
        ask: impl FnOnce(u32) -> io::Result<Option<String>>,
    ) -> io::Result<Option<String>> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let again = |said: &Said| {
            said.clone()
                .map_err(|error| io::Error::new(error.kind(), error))
        };
        if let Some((until, said)) = lock().get(&id)
            && Instant::now() < *until
        {
            return again(said);
        }
        let asked_at = Instant::now();
        let said = ask(id).map_err(Arc::new);
        let until = match said {
            Ok(_) => asked_at + REMEMBERED_FOR,
            Err(_) => Instant::now() + FAILURE_REMEMBERED_FOR,
        };
        let mut known = lock();
        if known.len() >= MOST {
            known.clear();
        }
        let outcome = again(&said);
        known.insert(id, (until, said));
        outcome
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_name_is_asked_for_once_and_after_a_failure_again() {
        let names = Names::default();
        let asked = Cell::new(0);
        let ask = |outcome: io::Result<Option<String>>| {
            names.get(7, |_| {
                asked.set(asked.get() + 1);
                outcome
            })
        };
        let began = Instant::now();
        ask(Err(io::Error::other("the directory is away"))).unwrap_err();
        // At once without being asked.
        while let Err(error) = ask(Ok(Some("orders".to_owned()))) {
            assert_eq!(error.to_string(), "the directory is away");
            assert_eq!(asked.get(), 1);
            assert!(began.elapsed() < Duration::from_secs(20));
        }
        assert!(began.elapsed() > FAILURE_REMEMBERED_FOR / 2);
        for _ in 0..3 {
            let name = ask(Ok(None)).unwrap();
            assert_eq!(name.as_deref(), Some("orders"));
        }
        assert_eq!(asked.get(), 2);
    }

    #[test]
    fn an_old_name_is_asked_for_again_and_there_are_not_more_than_may_be() {
        let names = Names::default();
        let before = Ok(Some("before".to_owned()));
        names.0.lock().unwrap().insert(7, (Instant::now(), before));
        let name = names.get(7, |_| Ok(None)).unwrap();
        assert_eq!(name, None);
        for id in 0..2 * u32::try_from(MOST).unwrap() {
            names.get(id, |_| Ok(None)).unwrap();
        }
        assert!(names.0.lock().unwrap().len() <= MOST);
    }
}
