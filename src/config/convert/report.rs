//! How converters report, and parse what is written.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::PathBuf;

use super::Converter;
use crate::config::raw::Text;
use crate::config::reader::{Entries, Located};
use crate::config::text;
use crate::config::text::Flaw;
use crate::config::tree::Place;
use crate::diagnostics::Diagnostic;

impl Converter<'_> {
    pub(super) fn path(&self, place: Place) -> PathBuf {
        self.files
            .get(place.file)
            .map_or_else(PathBuf::new, |file| file.path.clone())
    }

    pub(super) fn error(
        &mut self,
        code: &'static str,
        place: Place,
        message: impl Into<String>,
        next: impl Into<String>,
    ) {
        let diagnostic = Diagnostic::error(code, self.path(place), message)
            .at(place.span())
            .next(next);
        self.diagnostics.push(diagnostic);
    }

    pub(super) fn warning(
        &mut self,
        code: &'static str,
        place: Place,
        message: impl Into<String>,
        next: impl Into<String>,
    ) {
        let diagnostic = Diagnostic::warning(code, self.path(place), message)
            .at(place.span())
            .next(next);
        self.diagnostics.push(diagnostic);
    }

    /// A key that is needed because of another; silent where something in `whole` did not fit.
    pub(super) fn missing(&mut self, key: &str, whole: Place, at: Place, because: &str) {
        if !self.misfits.iter().any(|misfit| whole.encloses(*misfit)) {
            self.error(
                "missing_key",
                at,
                format!("missing key `{key}`: {because}"),
                format!("add `{key}`"),
            );
        }
    }

    /// Whether a list has nothing in it; where something did not fit, that is reported already.
    pub(super) fn is_empty_list<T>(&self, written: &Located<Vec<T>>) -> bool {
        written.value.is_empty()
            && !self
                .misfits
                .iter()
                .any(|misfit| written.place.encloses(*misfit))
    }

    pub(super) fn not_applicable<T>(
        &mut self,
        key: &str,
        written: Option<&Located<T>>,
        because: &str,
    ) {
        if let Some(written) = written {
            self.error(
                "key_not_applicable",
                written.place,
                format!("`{key}` has no meaning here: {because}"),
                format!("remove `{key}`"),
            );
        }
    }

    pub(super) fn parse<T>(
        &mut self,
        written: &Text,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> Option<T> {
        if text::has_user(&written.value) {
            let path = self.path(written.place);
            self.diagnostics.mask(&path, written.place.span());
            self.error(
                "inline_secret",
                written.place,
                "the URL holds a user or password",
                "remove it: a secret is never written inline",
            );
            return None;
        }
        match parser(&written.value) {
            Ok(value) => Some(value),
            Err(Flaw {
                code,
                message,
                next,
            }) => {
                self.error(code, written.place, message, next);
                None
            }
        }
    }

    pub(super) fn parse_option<T>(
        &mut self,
        written: Option<&Text>,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> Option<T> {
        written.and_then(|written| self.parse(written, parser))
    }

    /// Parses each; what stands twice is an error.
    pub(super) fn parse_all<T: PartialEq>(
        &mut self,
        written: Option<&Vec<Text>>,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> Vec<T> {
        let mut values = Vec::new();
        for item in written.into_iter().flatten() {
            if let Some(value) = self.parse(item, parser) {
                if values.contains(&value) {
                    self.error(
                        "duplicate_value",
                        item.place,
                        format!("`{}` stands twice", item.value),
                        "keep one of the two",
                    );
                } else {
                    values.push(value);
                }
            }
        }
        values
    }

    pub(super) fn parse_entries<T>(
        &mut self,
        written: Option<&Located<Entries<Text>>>,
        parser: fn(&str) -> Result<T, Flaw>,
    ) -> BTreeMap<String, T> {
        let mut values = BTreeMap::new();
        for (key, value) in written
            .map(|written| &written.value.0)
            .into_iter()
            .flatten()
        {
            let key = self.parse(key, text::plain);
            let value = self.parse(value, parser);
            if let (Some(key), Some(value)) = (key, value) {
                values.insert(key, value);
            }
        }
        values
    }

    /// A name that is unique among `seen`.
    pub(super) fn unique_name(
        &mut self,
        what: &str,
        written: &Text,
        parser: fn(&str) -> Result<String, Flaw>,
        seen: &mut HashMap<String, Place>,
    ) -> Option<String> {
        let name = self.parse(written, parser)?;
        if let Some(first) = seen.get(&name).copied() {
            let first = self.describe(first);
            self.error(
                "duplicate_name",
                written.place,
                format!("{what} `{name}` stands twice"),
                format!("the first is at {first}: give one of the two another name"),
            );
            return None;
        }
        seen.insert(name.clone(), written.place);
        Some(name)
    }

    /// Whether a reference leads nowhere. Where no name at all could be read, the reason is reported already.
    pub(super) fn is_unknown(&self, name: &String, names: &[String]) -> bool {
        !names.contains(name) && (self.misfits.is_empty() || !names.is_empty())
    }

    /// `FILE:LINE:COLUMN`.
    pub(super) fn describe(&self, place: Place) -> String {
        let at = Diagnostic::error("place", self.path(place), "").at(place.span());
        let line = self.diagnostics.line(&at);
        line.trim_end_matches(": ").to_owned()
    }

    pub(super) fn out_of_range(&mut self, written: &Located<impl Display>, next: &str) {
        self.error(
            "out_of_range",
            written.place,
            format!("`{}` is out of range", written.value),
            next,
        );
    }

    pub(super) fn at_least_one(&mut self, written: Option<Located<u32>>) -> Option<usize> {
        let written = written?;
        if written.value == 0 {
            self.out_of_range(&written, "write a number from 1");
            return None;
        }
        usize::try_from(written.value).ok()
    }
}
