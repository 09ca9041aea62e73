//! Verification: whether the lines of an audit file, and of the files that were rotated out of it,
//! follow from one another.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;

use crate::audit::sink::{ChainMembers, rotated_files};
use crate::audit::{Hash, Head};

/// The fewest digits of a hash that name it.
const LEAST_HASH_DIGITS: usize = 12;

/// A head that is known from elsewhere: from `status`, or from the metrics, which give 12 digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedHead {
    sequence: u64,
    /// The hash's first digits, at least 12.
    hash: String,
}

impl FromStr for ExpectedHead {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem =
            || format!("`{text}` is not SEQUENCE:HASH, with at least 12 hexadecimal digits");
        let (sequence, hash) = text.split_once(':').ok_or_else(problem)?;
        let sequence = sequence.parse().map_err(|_| problem())?;
        let is_hash = (LEAST_HASH_DIGITS..=64).contains(&hash.len())
            && hash
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match is_hash {
            true => Ok(Self {
                sequence,
                hash: hash.to_owned(),
            }),
            false => Err(problem()),
        }
    }
}

/// What a whole chain holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Whole {
    /// The files, the oldest first.
    pub files: Vec<PathBuf>,
    /// How many records.
    pub records: u64,
    /// The number of the first; not 1 when older files were removed.
    pub first_sequence: u64,
    /// The number of the last.
    pub head_sequence: u64,
    /// The hash of the last, hexadecimal.
    pub head_hash: String,
}

/// Where a chain breaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Break {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: u64,
    /// What is wrong there.
    pub problem: String,
}

impl fmt::Display for Break {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            problem,
        } = self;
        write!(formatter, "{}:{line}: {problem}", file.display())
    }
}

/// Why a chain was not found whole.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It breaks.
    #[error("{0}")]
    Broken(Break),
    /// A file cannot be read.
    #[error("`{}` cannot be read: {}", path.display(), crate::diagnostics::system_words(error))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Verifies `path` and what was rotated out of it, oldest first. The last line can only be verified
/// against a head that is known from elsewhere; so can a cut at the end.
pub fn verify(path: &Path, expected: Option<&ExpectedHead>) -> Result<Whole, VerifyError> {
    let mut files = rotated_files(path);
    files.push(path.to_owned());
    let mut chain = Chain {
        head: None,
        before: None,
        records: 0,
        first_sequence: 0,
        expected,
        expected_found: false,
        place: (path.to_owned(), 0),
    };
    for file in &files {
        let unreadable = |error| VerifyError::Unreadable {
            path: file.clone(),
            error,
        };
        let mut reader = BufReader::new(File::open(file).map_err(unreadable)?);
        let mut number = 0;
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.read_until(b'\n', &mut line).map_err(unreadable)? == 0 {
                break;
            }
            number += 1;
            chain
                .follow(file, number, &line)
                .map_err(VerifyError::Broken)?;
        }
    }
    chain.end(files).map_err(VerifyError::Broken)
}

/// Why a line does not follow: kept until the line after it tells which of the two was altered.
struct Mismatch {
    before: (PathBuf, u64),
    here: (PathBuf, u64),
}

struct Chain<'a> {
    head: Option<Head>,
    before: Option<Mismatch>,
    records: u64,
    first_sequence: u64,
    expected: Option<&'a ExpectedHead>,
    expected_found: bool,
    /// The last line read.
    place: (PathBuf, u64),
}

impl Chain<'_> {
    fn follow(&mut self, file: &Path, number: u64, line: &[u8]) -> Result<(), Break> {
        let here = (file.to_owned(), number);
        let broken = |problem: String| Break {
            file: file.to_owned(),
            line: number,
            problem,
        };
        if let Some(mismatch) = self.before.take() {
            // Where this line vouches for the one before it, the line before that one was altered.
            let intact = parse(line)
                .is_some_and(|(_, previous)| self.head.is_some_and(|head| head.hash == previous));
            return Err(altered(match intact {
                true => mismatch.before,
                false => mismatch.here,
            }));
        }
        if line.last() != Some(&b'\n') {
            return Err(broken("the line is cut off".to_owned()));
        }
        let Some((sequence, previous)) = parse(line) else {
            return Err(broken("the line is not an audit record".to_owned()));
        };
        match self.head {
            None => {
                let is_first = sequence == 1 && previous == Hash::default();
                if !is_first && !continues_a_file(line) {
                    return Err(broken(format!(
                        "the chain begins with record {sequence}, which does not begin a file: the lines before it are missing"
                    )));
                }
                self.first_sequence = sequence;
            }
            Some(head) => {
                if sequence != head.sequence + 1 {
                    return Err(broken(format!(
                        "record {sequence} follows record {}: records are missing, repeated or out of order",
                        head.sequence
                    )));
                }
                if previous != head.hash {
                    self.before = Some(Mismatch {
                        before: self.place.clone(),
                        here: here.clone(),
                    });
                }
            }
        }
        let head = Head {
            sequence,
            hash: Hash::of(line),
        };
        if let Some(expected) = self.expected
            && expected.sequence == sequence
            && self.before.is_none()
        {
            if !head.hash.to_string().starts_with(&expected.hash) {
                return Err(broken(format!(
                    "record {sequence} is not the one of the expected head: it, or the chain up to it, was altered"
                )));
            }
            self.expected_found = true;
        }
        self.head = Some(head);
        self.place = here;
        self.records += 1;
        Ok(())
    }

    fn end(self, files: Vec<PathBuf>) -> Result<Whole, Break> {
        if let Some(mismatch) = self.before {
            // No line after it vouches for the last one; the expected head may.
            let last_is_altered = self.head.is_some_and(|head| {
                self.expected.is_some_and(|expected| {
                    expected.sequence == head.sequence
                        && !head.hash.to_string().starts_with(&expected.hash)
                })
            });
            return Err(altered(match last_is_altered {
                true => mismatch.here,
                false => mismatch.before,
            }));
        }
        let head = self.head.unwrap_or_default();
        if let Some(expected) = self.expected
            && !self.expected_found
        {
            let (file, line) = self.place;
            let problem = match expected.sequence > head.sequence {
                true => format!(
                    "the chain ends at record {}: records up to the expected head {} are missing",
                    head.sequence, expected.sequence
                ),
                false => format!(
                    "the chain begins at record {}: the expected head {} is in a file that was removed",
                    self.first_sequence, expected.sequence
                ),
            };
            return Err(Break {
                file,
                line,
                problem,
            });
        }
        Ok(Whole {
            files,
            records: self.records,
            first_sequence: self.first_sequence,
            head_sequence: head.sequence,
            head_hash: head.hash.to_string(),
        })
    }
}

fn altered((file, line): (PathBuf, u64)) -> Break {
    Break {
        file,
        line,
        problem: "the line was altered: its hash is not the one that the chain holds".to_owned(),
    }
}

fn parse(line: &[u8]) -> Option<(u64, Hash)> {
    let members: ChainMembers = serde_json::from_slice(line).ok()?;
    Some((members.sequence, Hash::parse(&members.previous)?))
}

/// Whether it is the record that begins a file after another.
fn continues_a_file(line: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Event {
        event: Option<String>,
    }
    serde_json::from_slice::<Event>(line)
        .is_ok_and(|event| event.event.as_deref() == Some("file_continued"))
}
