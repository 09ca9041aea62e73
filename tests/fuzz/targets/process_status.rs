//! `/proc/PID/status`: the ids are the kernel's lines, and the name, which is the process's own, changes
//! nothing.

use countersign_attestors::readers::process_status;

const GOOD: &[u8] = include_bytes!("../seeds/process_status/service");

pub fn run(input: &[u8]) {
    let read = process_status(input);
    assert_eq!(process_status(input), read);
    if input == GOOD {
        assert_eq!(read, Some((990, 990, vec![27, 100])));
    }
    let text = String::from_utf8_lossy(input);
    if let Some((uid, gid, groups)) = &read {
        let effective = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(key));
            line.and_then(|line| line[key.len()..].split_whitespace().nth(1))
        };
        let said = |number: &u32, word: Option<&str>| {
            word.and_then(|word| word.parse::<u32>().ok()) == Some(*number)
        };
        assert!(said(uid, effective("Uid:")), "uid {uid}");
        assert!(said(gid, effective("Gid:")), "gid {gid}");
        let line = text.lines().find(|line| line.starts_with("Groups:"));
        let words = line.map_or(0, |line| line["Groups:".len()..].split_whitespace().count());
        assert_eq!(groups.len(), words, "a group was passed over");
    }

    // The kernel writes the name's line feeds as `\n`, in two characters.
    let Some(rest) = input.strip_prefix(b"Name:").and_then(|rest| {
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        rest.get(end..)
    }) else {
        return;
    };
    for name in [
        "orders",
        "Uid:\t0\t0\t0\t0",
        "\\nUid:\\t0\\t0\\t0\\t0",
        "\u{2028}Gid:\t0",
    ] {
        let renamed = [b"Name:\t", name.as_bytes(), rest].concat();
        assert_eq!(process_status(&renamed), read, "the name `{name}` counts");
    }
}
