//! Policy files, read and split into single policies, so that one mistake does not hide another.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use cedar_policy::{Effect, Policy, PolicyId};
use cedar_policy_core::ast::PolicyID;
use cedar_policy_core::parser::parse_policyset_to_ests_and_pset;
use miette::Diagnostic as _;

use super::reads::Reads;
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};

/// The least `@max_lifetime`: a shorter one could never be met by a token.
const LEAST_LIFETIME: Duration = Duration::from_secs(30);

/// How deep brackets may nest in a policy, and how many operators it may have: expressions become trees
/// that are walked recursively, and a reload must not overflow the stack on what anybody wrote.
const MOST_NESTING: usize = 64;
const MOST_OPERATORS: usize = 500;

const ANNOTATIONS: [&str; 6] = [
    "id",
    "description",
    "owner",
    "max_lifetime",
    "scopes",
    "expires",
];

/// A policy file.
#[derive(Debug, Clone)]
pub struct PolicyFile {
    /// Its path, as in diagnostics.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

/// Reads `*.cedar` of a directory, in the order of their names.
pub(super) fn read_directory(
    directory: &Path,
    config: &Path,
) -> Result<Vec<PolicyFile>, Diagnostics> {
    files_with_suffix(directory, ".cedar").map_err(|error| {
        let mut diagnostics = Diagnostics::new();
        diagnostics.push(
            Diagnostic::error(
                "policy_directory_unreadable",
                config,
                format!(
                    "policy directory `{}` cannot be read: {error}",
                    directory.display()
                ),
            )
            .next("set `policies: {directory: ...}` to a directory of `*.cedar` files"),
        );
        diagnostics
    })
}

/// Reads the files of a directory whose names end in `suffix`, in the order of their names.
pub(super) fn files_with_suffix(
    directory: &Path,
    suffix: &str,
) -> std::io::Result<Vec<PolicyFile>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        // Without the `.` that a directory written as `.` brings along.
        let path: PathBuf = entry?.path().components().collect();
        let is_one = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.ends_with(suffix) && !name.starts_with('.'));
        if is_one && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).map_err(|error| {
                std::io::Error::new(error.kind(), format!("`{}`: {error}", path.display()))
            })?;
            Ok(PolicyFile { path, text })
        })
        .collect()
}

/// A policy and what its annotations say.
#[derive(Debug, Clone)]
pub(super) struct ParsedPolicy {
    pub(super) path: PathBuf,
    /// Of the policy in the file, annotations included.
    pub(super) span: Range<usize>,
    /// Where in the file the text begins that Cedar was given, and by which it counts.
    pub(super) parsed_from: usize,
    /// Its text.
    pub(super) text: String,
    pub(super) policy: Policy,
    /// Cedar's JSON form.
    pub(super) json: serde_json::Value,
    pub(super) reads: Reads,
    /// Whether `@id` names it; else its id is a stand-in for diagnostics.
    pub(super) is_named: bool,
    pub(super) max_lifetime: Option<Duration>,
    pub(super) scopes: Option<BTreeSet<String>>,
    pub(super) expires: Option<SystemTime>,
}

impl ParsedPolicy {
    fn new(
        file: &PolicyFile,
        span: Range<usize>,
        parsed_from: usize,
        policy: Policy,
        json: serde_json::Value,
    ) -> Self {
        Self {
            path: file.path.clone(),
            text: file.text.get(span.clone()).unwrap_or_default().to_owned(),
            span,
            parsed_from,
            policy,
            reads: Reads::of_policy(&json),
            json,
            is_named: false,
            max_lifetime: None,
            scopes: None,
            expires: None,
        }
    }

    pub(super) fn id(&self) -> &str {
        self.policy.id().as_ref()
    }

    pub(super) fn is_permit(&self) -> bool {
        self.policy.effect() == Effect::Permit
    }

    /// The place of the first `needle` after the annotations, without the blanks around it; else of the effect.
    pub(super) fn place_of(&self, needle: &str) -> Range<usize> {
        let body = self.body();
        let found = self
            .text
            .get(body.clone())
            .and_then(|text| text.find(needle));
        match found {
            Some(offset) => {
                let blanks = needle.len() - needle.trim_start().len();
                let start = body.start + offset + blanks;
                self.place(start..start + needle.trim().len())
            }
            None => self.effect_place(),
        }
    }

    /// The place of the word `permit` or `forbid`.
    pub(super) fn effect_place(&self) -> Range<usize> {
        let start = self.body().start;
        self.place(start..start + "permit".len())
    }

    /// The place of an annotation.
    pub(super) fn annotation_place(&self, name: &str) -> Range<usize> {
        let needle = format!("@{name}");
        match self
            .text
            .get(..self.body().start)
            .and_then(|head| head.find(&needle))
        {
            Some(offset) => self.place(offset..offset + needle.len()),
            None => self.effect_place(),
        }
    }

    fn place(&self, range: Range<usize>) -> Range<usize> {
        self.span.start + range.start..self.span.start + range.end
    }

    fn body(&self) -> Range<usize> {
        let effect = match self.policy.effect() {
            Effect::Permit => "permit",
            Effect::Forbid => "forbid",
        };
        let mut start = 0;
        scan(&self.text, |offset, byte| {
            let here = self.text.get(offset..).unwrap_or_default();
            if byte == b'p' || byte == b'f' {
                let follows_name = offset
                    .checked_sub(1)
                    .and_then(|before| self.text.as_bytes().get(before))
                    .is_some_and(|before| {
                        before.is_ascii_alphanumeric() || matches!(before, b'@' | b'_')
                    });
                if here.starts_with(effect) && !follows_name {
                    start = offset;
                    return true;
                }
            }
            false
        });
        start..self.text.len()
    }
}

/// Calls `stop` with each byte that stands outside of strings and comments, until it says so.
fn scan(text: &str, mut stop: impl FnMut(usize, u8) -> bool) {
    let mut bytes = text.bytes().enumerate().peekable();
    while let Some((offset, byte)) = bytes.next() {
        match byte {
            b'"' => {
                while let Some((_, inside)) = bytes.next() {
                    match inside {
                        b'\\' => {
                            bytes.next();
                        }
                        b'"' => break,
                        _ => {}
                    }
                }
            }
            b'/' if bytes.peek().is_some_and(|(_, next)| *next == b'/') => {
                for (_, inside) in bytes.by_ref() {
                    if matches!(inside, b'\n' | b'\r') {
                        break;
                    }
                }
            }
            _ => {
                if stop(offset, byte) {
                    return;
                }
            }
        }
    }
}

/// The places of single policies: text up to and including each `;` outside of strings and comments,
/// without the blank space and comments before it.
fn statements(text: &str) -> Vec<Range<usize>> {
    let mut statements = Vec::new();
    let mut start: Option<usize> = None;
    let mut end = 0;
    scan(text, |offset, byte| {
        if !byte.is_ascii_whitespace() {
            start.get_or_insert(offset);
            end = offset + 1;
        }
        if byte == b';'
            && let Some(start) = start.take()
        {
            statements.push(start..offset + 1);
        }
        false
    });
    if let Some(start) = start {
        // No `;`, or a string that does not end: the parser says what is missing.
        let rest = text.get(start..).unwrap_or_default().trim_end().len();
        statements.push(start..end.max(start + rest));
    }
    statements
}

/// Why a policy is too large to be parsed.
fn too_large(text: &str) -> Option<String> {
    let (mut nesting, mut deepest, mut operators) = (0_usize, 0, 0);
    let mut word = String::new();
    scan(text, |_, byte| {
        match byte {
            b'(' | b'[' | b'{' => {
                nesting += 1;
                deepest = deepest.max(nesting);
            }
            b')' | b']' | b'}' => nesting = nesting.saturating_sub(1),
            // `&&` and `||` count twice and are not rarer for it.
            b'.' | b'!' | b'&' | b'|' | b'+' | b'-' | b'*' | b'<' | b'>' | b'=' => operators += 1,
            _ => {}
        }
        match byte.is_ascii_alphanumeric() {
            true if word.len() < 8 => word.push(char::from(byte)),
            true => {}
            false => {
                operators +=
                    usize::from(matches!(word.as_str(), "if" | "has" | "like" | "in" | "is"));
                word.clear();
            }
        }
        false
    });
    match (deepest > MOST_NESTING, operators > MOST_OPERATORS) {
        (true, _) => Some(format!(
            "brackets nest {deepest} deep, and {MOST_NESTING} is the most"
        )),
        (_, true) => Some(format!(
            "the policy has {operators} operators, and {MOST_OPERATORS} is the most"
        )),
        (false, false) => None,
    }
}

/// Parses every policy of a file and reads its annotations.
pub(super) fn parse(file: &PolicyFile, diagnostics: &mut Diagnostics) -> Vec<ParsedPolicy> {
    let spans = statements(&file.text);
    let mut policies = match parse_at_once(file, &spans) {
        Some(policies) => policies,
        None => {
            let before = diagnostics.iter().count();
            let policies = parse_one_by_one(file, spans, diagnostics);
            // A policy that only one of the two ways of reading finds must not be left out.
            if diagnostics.iter().count() == before {
                diagnostics.push(
                    Diagnostic::error(
                        "policy_syntax",
                        &file.path,
                        "the file holds other policies as a whole than it does piece by piece",
                    )
                    .next("end each policy with `;`, and write nothing else but comments"),
                );
            }
            policies
        }
    };
    for policy in &mut policies {
        read_annotations(policy, diagnostics);
    }
    policies
}

/// Parses a file as a whole, which takes a quarter of the time; `None` where anything is wrong with it.
fn parse_at_once(file: &PolicyFile, spans: &[Range<usize>]) -> Option<Vec<ParsedPolicy>> {
    let mut texts = spans
        .iter()
        .map(|span| file.text.get(span.clone()).unwrap_or_default());
    if texts.any(|text| too_large(text).is_some()) {
        return None;
    }
    let (mut forms, set) = parse_policyset_to_ests_and_pset(&file.text).ok()?;
    if forms.len() != spans.len() {
        return None;
    }
    spans
        .iter()
        .enumerate()
        .map(|(index, span)| {
            // Cedar's parser numbers them.
            let id = PolicyID::from_string(format!("policy{index}"));
            let policy = set.get(&id).filter(|policy| policy.is_static())?;
            let place = policy.loc()?;
            if place.start() < span.start || span.end < place.end() {
                return None;
            }
            let policy = Policy::from(policy.clone()).new_id(stand_in(file, index));
            let json = serde_json::to_value(forms.remove(&id)?).ok()?;
            Some(ParsedPolicy::new(file, span.clone(), 0, policy, json))
        })
        .collect()
}

/// Parses each policy for itself, so that one mistake does not hide another.
fn parse_one_by_one(
    file: &PolicyFile,
    spans: Vec<Range<usize>>,
    diagnostics: &mut Diagnostics,
) -> Vec<ParsedPolicy> {
    let mut policies = Vec::new();
    for span in spans {
        let text = file.text.get(span.clone()).unwrap_or_default();
        if let Some(message) = too_large(text) {
            diagnostics.push(
                Diagnostic::error("policy_too_large", &file.path, message)
                    .at(span)
                    .next(
                        "split it into several policies, or ask for a set: `[...].contains(...)`",
                    ),
            );
            continue;
        }
        let policy = match Policy::parse(Some(stand_in(file, policies.len())), text) {
            Ok(policy) => policy,
            Err(errors) => {
                for error in errors.iter() {
                    let place = first_label(error, span.start).unwrap_or_else(|| span.clone());
                    let mut diagnostic = Diagnostic::error(
                        "policy_syntax",
                        &file.path,
                        sentence(&error.to_string()),
                    )
                    .at(place);
                    diagnostic = diagnostic.next(match error.help() {
                        Some(help) => sentence(&help.to_string()),
                        None => "`docs/policies.md` shows the form of a policy".to_owned(),
                    });
                    diagnostics.push(diagnostic);
                }
                continue;
            }
        };
        match policy.to_json() {
            Ok(json) => {
                let start = span.start;
                policies.push(ParsedPolicy::new(file, span, start, policy, json));
            }
            Err(error) => diagnostics.push(
                Diagnostic::error("policy_syntax", &file.path, sentence(&error.to_string()))
                    .at(span),
            ),
        }
    }
    policies
}

/// What diagnostics call a policy until `@id` names it.
fn stand_in(file: &PolicyFile, index: usize) -> PolicyId {
    PolicyId::new(format!(
        "unnamed policy {} of {}",
        index + 1,
        file.path.display()
    ))
}

/// The first labelled place of one of Cedar's errors.
pub(super) fn first_label(error: &dyn miette::Diagnostic, start: usize) -> Option<Range<usize>> {
    let label = error.labels()?.next()?;
    let from = start + label.offset();
    Some(from..from + label.len())
}

/// Cedar's message in this product's form: lower case, no final period.
pub(super) fn sentence(message: &str) -> String {
    let message = message.trim().trim_end_matches('.');
    let mut characters = message.chars();
    match characters.next() {
        Some(first)
            if characters
                .clone()
                .next()
                .is_some_and(|second| second.is_lowercase() || second == ' ') =>
        {
            first.to_lowercase().chain(characters).collect()
        }
        _ => message.to_owned(),
    }
}

fn read_annotations(parsed: &mut ParsedPolicy, diagnostics: &mut Diagnostics) {
    let mut annotations: Vec<(String, String)> = parsed
        .policy
        .annotations()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    annotations.sort();
    let error = |parsed: &ParsedPolicy, name: &str, message: String, next: &str| {
        Diagnostic::error("policy_annotation", &parsed.path, message)
            .at(parsed.annotation_place(name))
            .next(next)
    };
    for (name, value) in annotations {
        let only_permits =
            matches!(name.as_str(), "max_lifetime" | "scopes") && !parsed.is_permit();
        if only_permits {
            diagnostics.push(error(
                parsed,
                &name,
                format!("`@{name}` on a `forbid`"),
                "write it on the permits that it is to limit",
            ));
            continue;
        }
        if value.trim().is_empty() {
            diagnostics.push(error(
                parsed,
                &name,
                format!("`@{name}` is empty"),
                "write its value, or remove it",
            ));
            continue;
        }
        match name.as_str() {
            "id" if is_policy_id(&value) => {
                parsed.policy = parsed.policy.new_id(PolicyId::new(&value));
                parsed.is_named = true;
            }
            "id" => diagnostics.push(error(
                parsed,
                &name,
                format!("`{value}` is not a policy id"),
                "use letters, digits, `-`, `_` and `.`, at most 128 of them",
            )),
            "description" | "owner" => {}
            "max_lifetime" => match duration(&value) {
                Some(lifetime) if lifetime >= LEAST_LIFETIME => {
                    parsed.max_lifetime = Some(lifetime);
                }
                Some(_) => diagnostics.push(error(
                    parsed,
                    &name,
                    format!("`@max_lifetime` of `{value}` is too short"),
                    "write at least `30s`",
                )),
                None => diagnostics.push(error(
                    parsed,
                    &name,
                    format!("`{value}` is not a duration"),
                    "write a number and a unit, as in `10m`",
                )),
            },
            "scopes" => {
                let scopes: BTreeSet<String> =
                    value.split_ascii_whitespace().map(str::to_owned).collect();
                match scopes.iter().find(|scope| !is_scope(scope)) {
                    Some(scope) => diagnostics.push(error(
                        parsed,
                        &name,
                        format!("`{scope}` is not a scope"),
                        "separate scopes by blanks; RFC 6749 section 3.3 says which characters they have",
                    )),
                    None => parsed.scopes = Some(scopes),
                }
            }
            "expires" => match value.parse::<jiff::Timestamp>() {
                Ok(instant) => parsed.expires = Some(SystemTime::from(instant)),
                Err(_) => diagnostics.push(error(
                    parsed,
                    &name,
                    format!("`{value}` is not a time"),
                    "write RFC 3339 with an offset, as in `2026-12-31T00:00:00Z`",
                )),
            },
            unknown => diagnostics.push(error(
                parsed,
                unknown,
                format!("unknown annotation `@{unknown}`"),
                &did_you_mean(unknown, ANNOTATIONS).unwrap_or_else(|| {
                    "known are `@id`, `@description`, `@owner`, `@max_lifetime`, `@scopes` and `@expires`".to_owned()
                }),
            )),
        }
    }
    if !parsed.is_named && parsed.policy.annotation("id").is_none() {
        diagnostics.push(
            Diagnostic::error(
                "policy_id_missing",
                &parsed.path,
                "a policy without `@id`",
            )
            .at(parsed.effect_place())
            .next("name it, as in `@id(\"orders-service-reads-orders\")`: records and tests say by it who decided"),
        );
    }
}

fn is_policy_id(text: &str) -> bool {
    text.len() <= 128
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// RFC 6749 section 3.3: `scope-token`.
fn is_scope(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, 0x21 | 0x23..=0x5b | 0x5d..=0x7e))
}

/// `10m`, `1h30m`, `45s`: whole numbers, each with a unit of s, m, h or d.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut seconds: u64 = 0;
    let mut rest = text.trim();
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at_checked(digits)?;
        let mut characters = after.chars();
        let unit = match characters.next()? {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            _ => return None,
        };
        seconds = seconds.checked_add(number.parse::<u64>().ok()?.checked_mul(unit)?)?;
        rest = characters.as_str();
    }
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// A duration as policies write it.
pub(super) fn duration_text(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        whole if whole % 3_600 == 0 => format!("{}h", whole / 3_600),
        whole if whole % 60 == 0 => format!("{}m", whole / 60),
        other => format!("{other}s"),
    }
}
