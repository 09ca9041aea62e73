//! What is wrong with a file that a person wrote: configuration, policies and their tests.
//!
//! A [`Diagnostic`] has a stable code, a place, a cause and a next step; [`Diagnostics`] holds all of
//! them for one load, with the text that they point into, and renders them for a terminal or as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use serde::Serialize;

/// Whether a problem stops the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The load fails.
    Error,
    /// The load succeeds; the problem is printed.
    Warning,
}

/// One problem in one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it stops the load.
    pub severity: Severity,
    /// Stable, for programs: `unknown_key`.
    pub code: &'static str,
    /// The file that it is in.
    pub path: PathBuf,
    /// Byte range in the file's text; `None` when it concerns the file as a whole.
    pub span: Option<Range<usize>>,
    /// Cause: lower case, no final period, input in backticks.
    pub message: String,
    /// What to do about it, in the same form.
    pub next: Option<String>,
    /// Whether it may pass by itself, so that trying again later is worth it.
    pub is_transient: bool,
}

impl Diagnostic {
    /// A problem that stops the load, in `path` as a whole until [`at`](Self::at) says where.
    pub fn error(code: &'static str, path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            code,
            path: path.into(),
            span: None,
            message: printable(message.into()),
            next: None,
            is_transient: false,
        }
    }

    /// A problem that is printed and does not stop the load.
    pub fn warning(
        code: &'static str,
        path: impl Into<PathBuf>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(code, path, message)
        }
    }

    /// A thread that an agent cannot be without cannot be started. It may pass by itself.
    pub(crate) fn no_thread(
        code: &'static str,
        path: impl Into<PathBuf>,
        what: &str,
        error: &std::io::Error,
    ) -> Self {
        Self::error(code, path, format!("{what} cannot be started: {}", system_words(error)))
            .next("end what uses up the threads that the kernel allows it, or raise `TasksMax=` of its unit, `pids.max` of its cgroup or `ulimit -u` of its user")
            .is_transient(true)
    }

    /// Points at a byte range of the file's text.
    #[must_use]
    pub fn at(mut self, span: Range<usize>) -> Self {
        self.span = Some(span);
        self
    }

    /// Says what to do about it.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(printable(next.into()));
        self
    }

    /// Says whether it may pass by itself.
    #[must_use]
    pub fn is_transient(mut self, is_transient: bool) -> Self {
        self.is_transient = is_transient;
        self
    }
}

/// Control characters escaped: what a file holds must not drive a terminal or break a log line.
fn printable(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    text.chars()
        .map(|character| {
            if character.is_control() {
                character.escape_default().to_string()
            } else {
                character.to_string()
            }
        })
        .collect()
}

/// A line and a column, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
}

/// The position of a byte offset in a text; the end of the text for an offset beyond it.
pub fn position(text: &str, offset: usize) -> Position {
    let bytes = text.as_bytes();
    let before = bytes.get(..offset).unwrap_or(bytes);
    let line = before.rsplit(|byte| *byte == b'\n').next();
    // A character counts by its first byte.
    let is_first = |byte: &&u8| !matches!(byte, 0x80..0xc0);
    Position {
        line: 1 + before.iter().filter(|byte| **byte == b'\n').count(),
        column: 1 + line.into_iter().flatten().filter(is_first).count(),
    }
}

/// Everything that one load found, and the texts that it points into.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics {
    items: Vec<Diagnostic>,
    sources: BTreeMap<PathBuf, String>,
}

impl Diagnostics {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps a file's text, so that diagnostics in it have lines, columns and excerpts.
    pub fn add_source(&mut self, path: impl Into<PathBuf>, text: impl Into<String>) {
        self.sources.insert(path.into(), text.into());
    }

    /// Replaces a range of a kept text by asterisks, byte for byte, so that excerpts never show it.
    pub fn mask(&mut self, path: &Path, range: Range<usize>) {
        if let Some(text) = self.sources.get_mut(path)
            && let Some(hidden) = text.get(range.clone())
        {
            let stars: String = hidden
                .bytes()
                .map(|byte| if byte == b'\n' { '\n' } else { '*' })
                .collect();
            text.replace_range(range, &stars);
        }
    }

    /// Adds a problem.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.items.push(diagnostic);
    }

    /// Adds all problems and texts of another load.
    pub fn extend(&mut self, other: Self) {
        self.items.extend(other.items);
        self.sources.extend(other.sources);
    }

    /// Puts them in the order of file and place.
    pub fn sort(&mut self) {
        self.items.sort_by(|one, other| {
            let key = |item: &Diagnostic| {
                (
                    item.path.clone(),
                    item.span.as_ref().map_or(0, |span| span.start),
                )
            };
            key(one).cmp(&key(other))
        });
    }

    /// All of them, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.items.iter()
    }

    /// How many, warnings included.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether one of them stops the load.
    pub fn has_errors(&self) -> bool {
        self.items
            .iter()
            .any(|item| item.severity == Severity::Error)
    }

    /// Whether the load is stopped, and whatever stops it may pass by itself.
    pub fn is_transient(&self) -> bool {
        self.has_errors()
            && self
                .items
                .iter()
                .all(|item| item.severity == Severity::Warning || item.is_transient)
    }

    /// Where a diagnostic is; `None` when it concerns a whole file or the text was not kept.
    pub fn position(&self, diagnostic: &Diagnostic) -> Option<Position> {
        let text = self.sources.get(&diagnostic.path)?;
        diagnostic
            .span
            .as_ref()
            .map(|span| position(text, span.start))
    }

    /// One line for a log: `FILE:LINE:COLUMN: MESSAGE (NEXT)`.
    pub fn line(&self, diagnostic: &Diagnostic) -> String {
        let mut line = diagnostic.path.display().to_string();
        if let Some(Position { line: row, column }) = self.position(diagnostic) {
            line.push_str(&format!(":{row}:{column}"));
        }
        line.push_str(": ");
        line.push_str(&diagnostic.message);
        if let Some(next) = &diagnostic.next {
            line.push_str(&format!(" ({next})"));
        }
        line
    }

    /// For people: each problem with an excerpt of the file, in colour if asked.
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        let mut rendered = String::new();
        for item in &self.items {
            let level = match item.severity {
                Severity::Error => Level::ERROR,
                Severity::Warning => Level::WARNING,
            };
            let path = item.path.display().to_string();
            let title = level.primary_title(item.message.as_str()).id(item.code);
            let mut group = Group::with_title(title);
            group = match (self.sources.get(&item.path), &item.span) {
                (Some(text), Some(span)) => {
                    let end = span.end.min(text.len());
                    let start = span.start.min(end);
                    group.element(
                        Snippet::source(text.as_str())
                            .path(path)
                            .annotation(AnnotationKind::Primary.span(start..end)),
                    )
                }
                _ => group.element(Origin::path(path)),
            };
            if let Some(next) = &item.next {
                group = group.element(Level::HELP.message(next.as_str()));
            }
            rendered.push_str(&renderer.render(&[group]));
            rendered.push_str("\n\n");
        }
        rendered
    }

    /// For programs: an array of objects with `severity`, `code`, `file`, `line`, `column`, `message`, `next`.
    pub fn to_json(&self) -> serde_json::Value {
        self.items
            .iter()
            .map(|item| {
                let position = self.position(item);
                serde_json::json!({
                    "severity": item.severity,
                    "code": item.code,
                    "file": item.path,
                    "line": position.map(|position| position.line),
                    "column": position.map(|position| position.column),
                    "message": item.message,
                    "next": item.next,
                })
            })
            .collect()
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, item) in self.items.iter().enumerate() {
            if index > 0 {
                formatter.write_str("; ")?;
            }
            formatter.write_str(&self.line(item))?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

impl From<Diagnostic> for Diagnostics {
    fn from(diagnostic: Diagnostic) -> Self {
        let mut diagnostics = Self::new();
        diagnostics.push(diagnostic);
        diagnostics
    }
}

/// `did you mean X?` for the candidate nearest to what was written, if one is near enough to be a slip.
pub fn did_you_mean<'a>(
    written: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<String> {
    let allowed = (written.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(written, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| format!("did you mean `{candidate}`?"))
}

/// Whether what kept an address from being bound may pass by itself: another process has it, or this machine does
/// not have it yet.
pub(crate) fn is_transient(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{AddrInUse, AddrNotAvailable};
    matches!(error.kind(), AddrInUse | AddrNotAvailable)
}

/// An I/O error in the operating system's words, without its number, in the style of our messages.
pub(crate) fn system_words(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_said_in_the_systems_words() {
        for (number, words) in [
            (libc::ECONNREFUSED, "connection refused"),
            (libc::EMFILE, "too many open files"),
        ] {
            let error = std::io::Error::from_raw_os_error(number);
            assert_eq!(system_words(&error), words);
        }
    }

    fn sample() -> Diagnostics {
        let mut diagnostics = Diagnostics::new();
        diagnostics.add_source(
            "agent.yaml",
            "version: 1\nlisteners: []\nclient_secret: hunter2\n",
        );
        diagnostics.push(
            Diagnostic::error("unknown_key", "agent.yaml", "unknown key `client_secret`")
                .at(25..38)
                .next("name a file by `secret_file`"),
        );
        diagnostics.push(Diagnostic::warning(
            "key_file_readable",
            "key.pem",
            "others may read `key.pem`",
        ));
        diagnostics
    }

    #[test]
    fn a_position_counts_lines_and_characters() {
        assert_eq!(position("ä: 1\nbö: 2", 0), Position { line: 1, column: 1 });
        assert_eq!(position("ä: 1\nbö: 2", 9), Position { line: 2, column: 3 });
        assert_eq!(position("one", 99), Position { line: 1, column: 4 });
    }

    #[test]
    fn a_terminal_sees_place_cause_and_next_step() {
        let rendered = sample().render(false);
        assert!(
            rendered.contains("error[unknown_key]: unknown key `client_secret`"),
            "{rendered}"
        );
        assert!(rendered.contains("agent.yaml:3:1"), "{rendered}");
        assert!(
            rendered.contains("name a file by `secret_file`"),
            "{rendered}"
        );
        assert!(
            rendered.contains("warning[key_file_readable]"),
            "{rendered}"
        );
    }

    #[test]
    fn a_program_sees_the_same() {
        let json = sample().to_json();
        assert_eq!(json[0]["line"], 3);
        assert_eq!(json[0]["column"], 1);
        assert_eq!(json[0]["severity"], "error");
        assert_eq!(json[1]["line"], serde_json::Value::Null);
        assert_eq!(
            sample().to_string(),
            "agent.yaml:3:1: unknown key `client_secret` (name a file by `secret_file`); key.pem: others may read `key.pem`"
        );
    }

    #[test]
    fn a_masked_range_is_never_shown() {
        let mut diagnostics = sample();
        diagnostics.mask(Path::new("agent.yaml"), 40..47);
        assert!(!diagnostics.render(false).contains("hunter2"));
    }

    #[test]
    fn control_characters_are_escaped() {
        let diagnostic =
            Diagnostic::error("unknown_key", "file", "unknown key `\u{1b}[2J\n`").next("one\ntwo");
        assert_eq!(diagnostic.message, "unknown key `\\u{1b}[2J\\n`");
        assert_eq!(diagnostic.next.as_deref(), Some("one\\ntwo"));
    }

    #[test]
    fn errors_stop_and_warnings_do_not() {
        let mut diagnostics = Diagnostics::new();
        diagnostics.push(Diagnostic::warning("one", "file", "message"));
        assert!(!diagnostics.has_errors());
        assert!(sample().has_errors());
    }

    #[test]
    fn a_set_is_transient_where_all_its_errors_are() {
        let mut diagnostics = Diagnostics::new();
        assert!(!diagnostics.is_transient());
        diagnostics.push(Diagnostic::warning("one", "file", "message"));
        assert!(!diagnostics.is_transient());
        diagnostics.push(Diagnostic::error("two", "file", "message").is_transient(true));
        assert!(diagnostics.is_transient());
        diagnostics.push(Diagnostic::error("three", "file", "message"));
        assert!(!diagnostics.is_transient());
    }

    #[test]
    fn a_slip_is_corrected_and_another_word_is_not() {
        assert_eq!(
            did_you_mean("destination", ["destinations", "listeners"]).as_deref(),
            Some("did you mean `destinations`?")
        );
        assert_eq!(did_you_mean("colour", ["destinations", "listeners"]), None);
    }
}
