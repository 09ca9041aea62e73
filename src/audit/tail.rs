//! Reading the audit: the last records, records as they come, and a record as one readable line.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::audit::sink::rotated_files;

/// How often a followed file is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(50);

/// The last lines that hold `count` records, rotated files included. Attestations are not counted:
/// those among the counted records are returned with them.
pub fn last(path: &Path, count: usize) -> io::Result<Vec<String>> {
    let mut newest_first = rotated_files(path);
    newest_first.push(path.to_owned());
    newest_first.reverse();
    let mut lines: VecDeque<String> = VecDeque::new();
    let mut counted = 0;
    for file in newest_first {
        if counted >= count {
            break;
        }
        // A line that ends in nothing is still being written.
        let mut whole: Vec<String> = Vec::new();
        let mut reader = BufReader::new(File::open(&file)?);
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            if line.ends_with('\n') {
                whole.push(std::mem::take(&mut line));
                // Only the last ones matter; a file may be large.
                if whole.len() > 2 * (count + 1) * 64 {
                    drop_uncounted(&mut whole, count);
                }
            }
            line.clear();
        }
        for line in whole.into_iter().rev() {
            if counted >= count {
                break;
            }
            counted += usize::from(!is_attestation(&line));
            lines.push_front(line);
        }
    }
    Ok(lines.into())
}

/// Removes from the front what cannot be among the last `count` records.
fn drop_uncounted(lines: &mut Vec<String>, count: usize) {
    let mut counted = 0;
    let keep = lines
        .iter()
        .rev()
        .take_while(|line| {
            let within = counted < count;
            counted += usize::from(!is_attestation(line));
            within
        })
        .count();
    lines.drain(..lines.len() - keep);
}

fn is_attestation(line: &str) -> bool {
    serde_json::from_str::<Value>(line)
        .is_ok_and(|record| record.get("kind").and_then(Value::as_str) == Some("attested"))
}

/// Gives every line that is appended from now on to `on_line`, through rotations, until it breaks.
/// Waits for the file where there is none.
pub fn follow(path: &Path, mut on_line: impl FnMut(&str) -> ControlFlow<()>) -> io::Result<()> {
    let mut from_the_end = true;
    loop {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                from_the_end = false;
                std::thread::sleep(FOLLOW_INTERVAL);
                continue;
            }
            Err(error) => return Err(error),
        };
        let inode = file.metadata()?.ino();
        let mut reader = BufReader::new(file);
        if from_the_end {
            io::Seek::seek(&mut reader, io::SeekFrom::End(0))?;
        }
        // Whatever file comes next is new from its beginning.
        from_the_end = false;
        let mut line = String::new();
        loop {
            // Asked before reading: what was written before the file was replaced is read still.
            let replaced = std::fs::metadata(path).map_or(true, |there| there.ino() != inode);
            while reader.read_line(&mut line)? > 0 && line.ends_with('\n') {
                if on_line(line.trim_end_matches('\n')).is_break() {
                    return Ok(());
                }
                line.clear();
            }
            if replaced {
                break;
            }
            std::thread::sleep(FOLLOW_INTERVAL);
        }
    }
}

/// One line for people: time, effect, request id, workload, what was asked, what came of it. `None`
/// for an attestation, which the records that rest on it sum up, and for what is not a record.
pub fn render(line: &str) -> Option<String> {
    let record: Value = serde_json::from_str(line).ok()?;
    let text = |name: &str| record.get(name).and_then(Value::as_str);
    let time = local_time(text("time")?);
    let rendered = match text("kind")? {
        "request" => {
            let what = format!(
                "{} {}{}",
                text("method")?,
                text("destination").or_else(|| text("authority"))?,
                text("path")?
            );
            decided(&record, &time, &what)?
        }
        "token_issue" => {
            let what = format!("token for {}", text("credential")?);
            decided(&record, &time, &what)?
        }
        "lifecycle" => format!("{time} agent {}", event(&record)?),
        _ => return None,
    };
    // File names and claims are chosen by others; a terminal obeys control characters.
    Some(rendered.replace(char::is_control, "\u{fffd}"))
}

fn decided(record: &Value, time: &str, what: &str) -> Option<String> {
    let text = |name: &str| record.get(name).and_then(Value::as_str);
    let mut line = format!(
        "{time} {:<5} {} {} {what} {}",
        text("decision")?,
        text("request_id")?,
        text("workload").unwrap_or("unattested"),
        record.get("status")?
    );
    let outcome = text("outcome")?;
    if outcome != "ok" {
        line.push_str(&format!(" {outcome}"));
    }
    let policies: Vec<&str> = record
        .get("policies")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if !policies.is_empty() {
        line.push_str(&format!(", {}", policies.join(" and ")));
    }
    if let Some(nearest) = text("nearest") {
        line.push_str(&format!(", nearest {nearest}"));
    }
    let latency = |name: &str| {
        record
            .get("latency_us")
            .and_then(|latency| latency.get(name))
            .and_then(Value::as_f64)
            .map(|microseconds| format!("{:.1} ms", microseconds / 1000.0))
    };
    if let Some(obtained) = record
        .get("token")
        .and_then(|token| token.get("obtained"))
        .and_then(Value::as_str)
    {
        line.push_str(&match (obtained, latency("token_endpoint")) {
            ("cache", _) => ", token cached".to_owned(),
            (obtained, Some(duration)) => format!(", token {obtained} {duration}"),
            (obtained, None) => format!(", token {obtained}"),
        });
        if let Some(ours) = latency("ours") {
            line.push_str(&format!(", ours {ours}"));
        }
    }
    Some(line)
}

fn event(record: &Value) -> Option<String> {
    let text = |name: &str| record.get(name).and_then(Value::as_str).unwrap_or_default();
    Some(match record.get("event")?.as_str()? {
        "start" => format!(
            "started, version {}, policies {}",
            text("version"),
            text("policy_version")
        ),
        "stop" => "stopped".to_owned(),
        "reload" => format!("reloaded, policies {}", text("policy_version")),
        "reload_failed" => format!(
            "reload failed, the last good configuration is kept: {}",
            text("first")
        ),
        "revoked" => format!("revoked {}, revocation {}", text("what"), text("id")),
        "revocation_lifted" => format!("lifted revocation {}", text("id")),
        "audit_repaired" => format!(
            "cut {} bytes of a torn record from {}",
            record.get("bytes_cut")?,
            text("file")
        ),
        "audit_beside" => format!(
            "records in {} while another writes to {}",
            text("file"),
            text("in_use")
        ),
        "records_dropped" => format!("lost {} audit records", record.get("count")?),
        "file_continued" => format!("continues the audit of {}", text("previous_file")),
        other => other.to_owned(),
    })
}

/// The clock on the wall of who reads it.
fn local_time(time: &str) -> String {
    match time.parse::<jiff::Timestamp>() {
        Ok(timestamp) => timestamp
            .to_zoned(jiff::tz::TimeZone::system())
            .strftime("%H:%M:%S")
            .to_string(),
        Err(_) => time.to_owned(),
    }
}
