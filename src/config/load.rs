//! From a path to a [`Config`]: reads the file and those that it includes, and joins them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use super::raw::{Document, Text};
use super::reader::{self, Located, RequiredKeys};
use super::tree::{self, Node, Place, Value};
use super::watch::Marks;
use super::{Config, convert};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};

/// What came of reading a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// The configuration, if nothing is wrong with it.
    pub config: Option<Config>,
    /// Where its policies are, also where something is wrong with the rest.
    pub policy_directory: Option<PathBuf>,
    /// Errors and warnings, in the order of files and places.
    pub diagnostics: Diagnostics,
    /// Every file and directory that was read or named, those of a wrong configuration too: where a
    /// key is missing, its coming is a reason to read again.
    pub files: Marks,
}

impl Config {
    /// Reads a configuration and all that it includes. Warnings are logged.
    ///
    /// # Errors
    /// Every problem found, warnings included.
    pub fn load(path: &Path) -> Result<Self, Diagnostics> {
        check(path).into_config()
    }
}

impl Checked {
    /// The configuration. Warnings are logged.
    ///
    /// # Errors
    /// Every problem found, warnings included.
    pub fn into_config(self) -> Result<Config, Diagnostics> {
        let Self {
            config,
            diagnostics,
            ..
        } = self;
        match config {
            Some(config) => {
                for diagnostic in &diagnostics {
                    tracing::warn!(code = diagnostic.code, "{}", diagnostics.line(diagnostic));
                }
                Ok(config)
            }
            None => Err(diagnostics),
        }
    }
}

/// The JSON Schema of a configuration file.
pub fn schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(Document);
    schema.insert("required".to_owned(), serde_json::json!(["version"]));
    schema.insert(
        "anyOf".to_owned(),
        serde_json::json!([
            {"required": ["listeners", "credentials", "destinations"]},
            {"required": ["include"]},
        ]),
    );
    // A key that is written has a value, and so the reader takes no `null`.
    let mut schema = schema.to_value();
    remove_null(&mut schema);
    schema
}

fn remove_null(schema: &mut serde_json::Value) {
    match schema {
        serde_json::Value::Object(object) => {
            if let Some(serde_json::Value::Array(types)) = object.get_mut("type") {
                types.retain(|name| name != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".to_owned(), only);
                }
            }
            if let Some(serde_json::Value::Array(values)) = object.get_mut("enum") {
                values.retain(|value| !value.is_null());
            }
            if let Some(serde_json::Value::Array(mut choices)) = object.remove("anyOf") {
                choices.retain(|choice| choice != &serde_json::json!({"type": "null"}));
                match choices.as_mut_slice() {
                    // What a key's own description says counts more than its type's.
                    [serde_json::Value::Object(only)] => {
                        for (key, value) in std::mem::take(only) {
                            object.entry(key).or_insert(value);
                        }
                    }
                    _ => {
                        object.insert("anyOf".to_owned(), choices.into());
                    }
                }
            }
            object.values_mut().for_each(remove_null);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(remove_null),
        _ => {}
    }
}

/// The keys that each mapping but the root must have, out of the schema.
static REQUIRED: LazyLock<RequiredKeys> = LazyLock::new(|| {
    let schema = schema();
    let definitions = schema.get("$defs").and_then(serde_json::Value::as_object);
    definitions
        .into_iter()
        .flatten()
        .map(|(name, definition)| {
            let keys = definition
                .get("required")
                .and_then(serde_json::Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(serde_json::Value::as_str)
                .map(str::to_owned)
                .collect();
            (name.clone(), keys)
        })
        .collect()
});

/// One file of a configuration.
#[derive(Debug)]
pub(super) struct SourceFile {
    /// Its path, as it is shown.
    pub(super) path: PathBuf,
    /// What relative paths in it are relative to.
    pub(super) directory: PathBuf,
    /// Its tree, unless it is no YAML.
    tree: Option<Node>,
    /// What of it fits.
    document: Option<Document>,
}

impl SourceFile {
    /// The names in a list at the root, those of items that do not fit included.
    pub(super) fn names(&self, section: &str) -> Vec<String> {
        let items = self.tree.as_ref().and_then(|tree| child(tree, section));
        let Some(Value::Sequence(items)) = items.map(|node| &node.value) else {
            return Vec::new();
        };
        items
            .iter()
            .filter_map(|item| match &child(item, "name")?.value {
                Value::Text(name) => Some(name.clone()),
                _ => None,
            })
            .collect()
    }
}

fn child<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    match &node.value {
        Value::Mapping(entries) => entries
            .iter()
            .find(|(candidate, _)| candidate.text == key)
            .map(|(_, value)| value),
        _ => None,
    }
}

/// Reads a configuration and all that it includes, and reports everything that is wrong with it.
pub fn check(path: &Path) -> Checked {
    let mut loader = Loader::default();
    loader.read(path, None);
    loader.include();
    let document = loader.join();
    let Loader {
        files,
        mut diagnostics,
        misfits,
        mut watched,
    } = loader;
    let config = convert::convert(&files, document, misfits, &mut watched, &mut diagnostics);
    diagnostics.sort();
    Checked {
        policy_directory: config
            .as_ref()
            .map(|config| config.policy_directory.clone()),
        config: config.filter(|_| !diagnostics.has_errors()),
        diagnostics,
        files: watched,
    }
}

#[derive(Default)]
struct Loader {
    files: Vec<SourceFile>,
    diagnostics: Diagnostics,
    /// Where something did not fit: what is missing there is not reported again.
    misfits: Vec<Place>,
    watched: Marks,
}

impl Loader {
    /// Reads one file; `named_at` says where another names it.
    fn read(&mut self, path: &Path, named_at: Option<(&Path, Place)>) {
        self.watched.add(path);
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                let message = format!("`{}` cannot be read: {}", path.display(), reason(&error));
                let mut diagnostic = Diagnostic::error(
                    "unreadable_file",
                    named_at.map_or(path, |(file, _)| file),
                    message,
                )
                .next("name a file that this user may read");
                diagnostic.span = named_at.map(|(_, place)| place.span());
                self.diagnostics.push(diagnostic);
                return;
            }
        };
        let file = self.files.len();
        self.diagnostics.add_source(path, text.as_str());
        let mut tree = None;
        let mut document = None;
        match tree::parse(&text, file) {
            Err(error) => {
                let mut diagnostic = Diagnostic::error("syntax", path, error.message)
                    .next("the file must be one YAML document");
                if let Some(place) = error.place {
                    diagnostic = diagnostic.at(place.span());
                    self.misfits.push(place);
                }
                self.diagnostics.push(diagnostic);
                for range in inline_secrets(&text) {
                    self.diagnostics.mask(path, range);
                }
            }
            Ok(root) if root.value == Value::Null => {
                if named_at.is_none() {
                    self.diagnostics.push(
                        Diagnostic::error("empty_file", path, "the file is empty")
                            .at(0..0)
                            .next("begin with `version: 1`"),
                    );
                }
            }
            Ok(root) => {
                let (read, problems) = reader::read::<Document>(&root, &REQUIRED);
                for problem in problems {
                    self.misfits.push(problem.place);
                    let mut diagnostic = Diagnostic::error(problem.code, path, problem.message)
                        .at(problem.place.span());
                    if let Some(next) = problem.next {
                        diagnostic = diagnostic.next(next);
                    }
                    self.diagnostics.push(diagnostic);
                    if let Some(mask) = problem.mask {
                        self.diagnostics.mask(path, mask);
                    }
                }
                document = read;
                tree = Some(root);
            }
        }
        self.files.push(SourceFile {
            path: path.to_owned(),
            directory: path.parent().map_or_else(PathBuf::new, Path::to_owned),
            tree,
            document,
        });
    }

    /// Reads what the first file includes.
    fn include(&mut self) {
        let Some(main) = self.files.first() else {
            return;
        };
        let patterns: Vec<Text> = main
            .document
            .as_ref()
            .and_then(|document| document.include.clone())
            .unwrap_or_default();
        let (main_path, directory) = (main.path.clone(), main.directory.clone());
        let mut included = vec![canonical(&main_path)];
        for pattern in patterns {
            match self.matching(&directory, &pattern.value) {
                Ok(paths) if paths.is_empty() => self.diagnostics.push(
                    Diagnostic::warning(
                        "nothing_included",
                        &main_path,
                        format!("`{}` matches no file", pattern.value),
                    )
                    .at(pattern.place.span()),
                ),
                Ok(paths) => {
                    for path in paths {
                        let identity = canonical(&path);
                        if !included.contains(&identity) {
                            self.read(&path, Some((&main_path, pattern.place)));
                            included.push(identity);
                        }
                    }
                }
                Err(cause) => self.diagnostics.push(
                    Diagnostic::error("invalid_include", &main_path, cause)
                        .at(pattern.place.span())
                        .next("write a path whose last part may have `*`: `conf.d/*.yaml`"),
                ),
            }
        }
        for file in self.files.iter().skip(1) {
            if let Some(include) = file
                .document
                .as_ref()
                .and_then(|document| document.include.as_ref())
                .and_then(|include| include.first())
            {
                self.diagnostics.push(
                    Diagnostic::error(
                        "nested_include",
                        &file.path,
                        "an included file includes others",
                    )
                    .at(include.place.span())
                    .next(format!("move `include` to `{}`", main_path.display())),
                );
            }
        }
    }

    /// The files that a pattern means, by name.
    fn matching(&mut self, directory: &Path, pattern: &str) -> Result<Vec<PathBuf>, String> {
        let whole = directory.join(pattern);
        let (Some(parent), Some(name)) = (
            whole.parent(),
            whole.file_name().and_then(|name| name.to_str()),
        ) else {
            return Err(format!("`{pattern}` names no file"));
        };
        if parent.to_string_lossy().contains('*') {
            return Err(format!("`{pattern}` has `*` in a directory"));
        }
        if !name.contains('*') {
            return Ok(vec![whole]);
        }
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        let glob = globset::Glob::new(name)
            .map_err(|_| format!("`{pattern}` is no pattern"))?
            .compile_matcher();
        self.watched.add(parent);
        let Ok(entries) = std::fs::read_dir(parent) else {
            return Ok(Vec::new());
        };
        let mut paths: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .filter(|entry| {
                let name = entry.file_name();
                glob.is_match(&name) && !name.to_string_lossy().starts_with('.')
            })
            .map(|entry| entry.path())
            .filter(|path| path.is_file())
            .collect();
        paths.sort();
        Ok(paths)
    }

    /// One document out of all: lists are appended, other sections stand once.
    fn join(&mut self) -> Option<Document> {
        let mut documents = self
            .files
            .iter()
            .enumerate()
            .filter_map(|(index, file)| Some((index, file.document.clone()?)));
        let (_, mut whole) = documents.next()?;
        let mut repeated = Vec::new();
        for (_, part) in documents {
            append(&mut whole.listeners, part.listeners);
            append(&mut whole.environments, part.environments);
            append(&mut whole.credentials, part.credentials);
            append(&mut whole.destinations, part.destinations);
            let again = &mut repeated;
            single("runtime", &mut whole.runtime, part.runtime, again);
            single("attestors", &mut whole.attestors, part.attestors, again);
            single("unmatched", &mut whole.unmatched, part.unmatched, again);
            single(
                "interception",
                &mut whole.interception,
                part.interception,
                again,
            );
            single("policies", &mut whole.policies, part.policies, again);
            single("limits", &mut whole.limits, part.limits, again);
            single("audit", &mut whole.audit, part.audit, again);
            single("telemetry", &mut whole.telemetry, part.telemetry, again);
            single("admin", &mut whole.admin, part.admin, again);
            if let Some(version) = part.version
                && version.value != 1
            {
                whole.version = Some(version);
            }
        }
        for (section, first, second) in repeated {
            let first = self
                .files
                .get(first.file)
                .map_or_else(String::new, |file| file.path.display().to_string());
            if let Some(file) = self.files.get(second.file) {
                self.diagnostics.push(
                    Diagnostic::error(
                        "repeated_section",
                        &file.path,
                        format!("section `{section}` stands in `{first}` already"),
                    )
                    .at(second.span())
                    .next("keep it in one file"),
                );
            }
        }
        Some(whole)
    }
}

/// What looks like the value of a secret, in a text that is no YAML: from the key to the line's end.
fn inline_secrets(text: &str) -> Vec<std::ops::Range<usize>> {
    text.match_indices(':')
        .filter(|(colon, _)| {
            let before = text.get(..*colon).unwrap_or_default();
            let key = before
                .rsplit(|character: char| {
                    !(character.is_ascii_alphanumeric() || "_-".contains(character))
                })
                .find(|part| !part.is_empty())
                .unwrap_or_default()
                .to_ascii_lowercase();
            (key.contains("secret") || key.contains("password")) && !key.ends_with("_file")
        })
        .map(|(colon, _)| {
            let rest = text.get(colon + 1..).unwrap_or_default();
            let length = rest.find('\n').unwrap_or(rest.len());
            colon + 1..colon + 1 + length
        })
        .collect()
}

/// The path that all names of a file have in common.
fn canonical(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

fn append<T>(whole: &mut Option<Vec<T>>, part: Option<Vec<T>>) {
    if let Some(part) = part {
        whole.get_or_insert_default().extend(part);
    }
}

fn single<T>(
    section: &'static str,
    whole: &mut Option<Located<T>>,
    part: Option<Located<T>>,
    repeated: &mut Vec<(&'static str, Place, Place)>,
) {
    match (&whole, part) {
        (Some(first), Some(second)) => repeated.push((section, first.place, second.place)),
        (None, Some(only)) => *whole = Some(only),
        (_, None) => {}
    }
}

/// An I/O error without its number: the same text everywhere.
pub(super) fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "it does not exist".to_owned(),
        std::io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        std::io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        std::io::ErrorKind::InvalidData => "it is not UTF-8 text".to_owned(),
        _ => error.to_string(),
    }
}

/// `did you mean ...?`, or all names that there are.
pub(crate) fn suggestion<'a>(
    written: &str,
    names: impl IntoIterator<Item = &'a str> + Clone,
) -> String {
    did_you_mean(written, names.clone()).unwrap_or_else(|| {
        let mut all: Vec<&str> = names.into_iter().collect();
        all.sort_unstable();
        all.dedup();
        let all: Vec<String> = all.into_iter().map(|name| format!("`{name}`")).collect();
        if all.is_empty() {
            "there are none".to_owned()
        } else {
            format!("there are {}", all.join(", "))
        }
    })
}

/// Values by name.
pub(super) type ByName<T> = HashMap<String, T>;
