//! `/proc/PID/cgroup`: whatever directories a user makes below its own, it is in no container and no
//! other unit than its own manager's.

use countersign_attestors::readers::{CgroupReading, cgroup};

const GOOD: &[u8] = include_bytes!("../seeds/cgroup_file/unit");
const USERS_OWN: &str = "/user.slice/user-1000.slice/user@1000.service";

pub fn run(input: &[u8]) {
    let reading = cgroup(input);
    assert_eq!(cgroup(input), reading);
    holds(&reading, input);
    if input == GOOD {
        assert_eq!(reading.system_unit.as_deref(), Some("orders.service"));
    }

    // The same paths, below what a user may make directories in.
    let forged: Vec<u8> = input
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.splitn(3, |byte| *byte == b':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            if !path.starts_with(b"/") {
                return None;
            }
            let line = [number, controllers, &[USERS_OWN.as_bytes(), path].concat()].join(&b':');
            Some([line, vec![b'\n']].concat())
        })
        .flatten()
        .collect();
    let forged = cgroup(&forged);
    assert_eq!(
        forged.container,
        Ok(None),
        "a user is in a container of its own making"
    );
    if let Some(unit) = &forged.system_unit {
        assert_eq!(unit, "user@1000.service", "a user has made a system unit");
        assert_eq!(forged.user_id, Some(1000));
    }
}

fn holds(reading: &CgroupReading, input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Ok(Some((id, _))) = &reading.container {
        assert_eq!(id.len(), 64);
        assert!(
            id.bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        );
        assert!(text.contains(id.as_str()), "an id that nobody wrote");
    }
    for unit in [&reading.system_unit, &reading.user_unit]
        .into_iter()
        .flatten()
    {
        assert!(text.contains(unit.as_str()), "a unit that nobody wrote");
        assert!(!unit.contains('/') && unit.contains('.'), "{unit}");
    }
    assert!(reading.user_unit.is_none() || reading.user_id.is_some());
    if let Some(user_id) = reading.user_id {
        assert_eq!(reading.system_unit, Some(format!("user@{user_id}.service")));
    }
    if let Some(path) = &reading.path {
        assert!(path.starts_with('/') && !path.split('/').any(|name| name == ".."));
    }
}
