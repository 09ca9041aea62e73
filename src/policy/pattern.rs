//! The patterns of `like`, as Cedar matches them.

use serde_json::Value;

/// Pieces of text with anything between them: the right side of `like`
/// (<https://docs.cedarpolicy.com/policies/syntax-operators.html#like-string-matching-with-wildcard>).
/// One piece alone is the right side of `==` as well.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pattern {
    first: String,
    /// After each wildcard one, the last at the end of the text.
    others: Vec<String>,
}

impl Pattern {
    /// What is this text and no other.
    pub(super) fn exactly(text: &str) -> Self {
        Self {
            first: text.to_owned(),
            others: Vec::new(),
        }
    }

    /// Reads `["Wildcard", {"Literal": "text"}]`; `None` where that is not understood.
    pub(super) fn of_json(elements: &Value) -> Option<Self> {
        let mut pattern = Self::exactly("");
        for element in elements.as_array()? {
            match element {
                Value::String(word) if word == "Wildcard" => pattern.others.push(String::new()),
                _ => {
                    let literal = element.get("Literal")?.as_str()?;
                    let piece = pattern.others.last_mut().unwrap_or(&mut pattern.first);
                    piece.push_str(literal);
                }
            }
        }
        Some(pattern)
    }

    /// Whether the whole text matches.
    pub(super) fn matches(&self, text: &str) -> bool {
        text.strip_prefix(&*self.first)
            .is_some_and(|rest| self.goes_on_as(rest))
    }

    /// Whether what follows the first piece matches.
    fn goes_on_as(&self, mut rest: &str) -> bool {
        let Some((last, between)) = self.others.split_last() else {
            return rest.is_empty();
        };
        for piece in between {
            // The earliest place leaves the most for what follows.
            match rest.split_once(&**piece) {
                Some((_, after)) => rest = after,
                None => return false,
            }
        }
        last.is_empty() || rest.ends_with(&**last)
    }
}

/// Several patterns that a text is compared with at once.
#[derive(Debug)]
pub(super) struct Patterns {
    /// What all of them begin with.
    common: Beginning,
    /// In order.
    patterns: Vec<Ordered>,
}

#[derive(Debug)]
struct Ordered {
    /// After what is common.
    beginning: Beginning,
    pattern: Pattern,
    /// The place of the last one before it that its own beginning begins with.
    shorter: Option<usize>,
}

/// What a text may begin with.
#[derive(Debug)]
struct Beginning {
    text: String,
    head: u64,
    /// The bits of the head that are of the text.
    mask: u64,
}

impl Beginning {
    fn new(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            head: head(text.as_bytes()),
            mask: head(&vec![u8::MAX; text.len()]),
        }
    }

    /// What follows in a text with this head; `None` where that begins otherwise.
    fn strip<'a>(&self, text: &'a str, head: u64) -> Option<&'a str> {
        if head & self.mask != self.head {
            return None;
        }
        match self.text.len() <= size_of_val(&head) {
            true => text.get(self.text.len()..),
            false => text.strip_prefix(&*self.text),
        }
    }
}

/// The first bytes of a text as a number, zeros after its end: texts of which these differ are in their order.
fn head(text: &[u8]) -> u64 {
    let first = text.first_chunk().copied().unwrap_or_else(|| {
        let mut first = [0; 8];
        for (to, from) in first.iter_mut().zip(text) {
            *to = *from;
        }
        first
    });
    u64::from_be_bytes(first)
}

/// What two texts begin with.
fn common<'a>(one: &'a str, other: &str) -> &'a str {
    let differs = |((_, one), other): &((usize, char), char)| one != other;
    let end = one.char_indices().zip(other.chars()).find(differs);
    let end = end.map_or(one.len().min(other.len()), |((end, _), _)| end);
    one.get(..end).unwrap_or_default()
}

impl Patterns {
    /// `None` for more than there are bits in what [`matching`](Self::matching) answers.
    pub(super) fn new(mut patterns: Vec<Pattern>) -> Option<Self> {
        if patterns.len() > u64::BITS as usize {
            return None;
        }
        patterns.sort();
        let shorter: Vec<Option<usize>> = patterns
            .iter()
            .enumerate()
            .map(|(place, pattern)| {
                patterns
                    .iter()
                    .take(place)
                    .rposition(|earlier| pattern.first.starts_with(&earlier.first))
            })
            .collect();
        // They are in order: what the first and the last begin with, all do.
        let common = match (patterns.first(), patterns.last()) {
            (Some(first), Some(last)) => common(&first.first, &last.first).to_owned(),
            _ => String::new(),
        };
        let ordered = |(pattern, shorter): (Pattern, _)| Ordered {
            beginning: Beginning::new(pattern.first.get(common.len()..).unwrap_or_default()),
            pattern,
            shorter,
        };
        Some(Self {
            patterns: patterns.into_iter().zip(shorter).map(ordered).collect(),
            common: Beginning::new(&common),
        })
    }

    /// One bit for each pattern: whether it matches the whole text.
    pub(super) fn matching(&self, text: &str) -> u64 {
        let Some(rest) = self.common.strip(text, head(text.as_bytes())) else {
            return 0;
        };
        // Whatever begins as `text` does is the last pattern that is not after it in order, or what that one
        // begins with.
        let head = head(rest.as_bytes());
        let mut next = self
            .patterns
            .partition_point(|known| match known.beginning.head == head {
                true => *known.beginning.text <= *rest,
                false => known.beginning.head < head,
            })
            .checked_sub(1);
        let mut matching = 0;
        while let Some(place) = next {
            let Some(known) = self.patterns.get(place) else {
                break;
            };
            let rest = known.beginning.strip(rest, head);
            let matches = rest.is_some_and(|rest| known.pattern.goes_on_as(rest));
            matching |= u64::from(matches) << place;
            next = known.shorter;
        }
        matching
    }
}

#[cfg(test)]
mod tests {
    use cedar_policy::{Context, EvalResult, Expression, Request, eval_expression};
    use proptest::prelude::*;

    use super::*;
    use crate::policy::reads::{Usage, paths};

    fn cedar_says(text: &str, pattern: &str) -> bool {
        let expression: Expression = format!("{text:?} like {pattern:?}").parse().unwrap();
        let uid = |kind: &str| format!("{kind}::\"one\"").parse().unwrap();
        let request = Request::new(uid("P"), uid("A"), uid("R"), Context::empty(), None).unwrap();
        let result = eval_expression(&request, &cedar_policy::Entities::empty(), &expression);
        result.unwrap() == EvalResult::Bool(true)
    }

    /// As a policy's JSON form has it.
    fn parsed(pattern: &str) -> Pattern {
        let policy: cedar_policy::Policy = format!(
            "permit (principal, action, resource) when {{ context.request.path like {pattern:?} }};"
        )
        .parse()
        .unwrap();
        let json = policy.to_json().unwrap();
        let body = json.pointer("/conditions/0/body").unwrap();
        match paths(body).remove(0).usage {
            Usage::Matched(pattern) => pattern,
            other => panic!("{other:?} is not a pattern"),
        }
    }

    proptest! {
        #[test]
        fn a_pattern_matches_what_cedar_says(text in "[a/é]{0,8}", pattern in "[a/é*]{0,6}") {
            prop_assert_eq!(parsed(&pattern).matches(&text), cedar_says(&text, &pattern));
        }
    }

    proptest! {
        #[test]
        fn several_match_as_each_alone(
            // Longer and shorter than what is compared at once, alike in the beginning or not.
            text in "(/aé)?(/a{5,9})?[a/b\0]{0,6}",
            common in "(/[aáé])?",
            patterns in proptest::collection::btree_set("(/a{5,9})?[a/b\0*]{0,5}", 0..24),
        ) {
            let mut patterns: Vec<Pattern> = patterns
                .iter()
                .map(|pattern| parsed(&format!("{common}{pattern}")))
                .collect();
            patterns.sort();
            let together = Patterns::new(patterns.clone()).unwrap().matching(&text);
            for (place, pattern) in patterns.iter().enumerate() {
                prop_assert_eq!(together >> place & 1 == 1, pattern.matches(&text), "{:?}", pattern);
            }
        }
    }

    #[test]
    fn no_more_than_bits_are_matched_together() {
        let patterns =
            |count: u32| (0..count).map(|number| Pattern::exactly(&format!("{number:02}")));
        let most = Patterns::new(patterns(64).collect()).unwrap();
        assert_eq!(most.matching("63"), 1 << 63);
        assert!(Patterns::new(patterns(65).collect()).is_none());
    }

    #[test]
    fn a_star_that_is_escaped_is_a_star() {
        let policy =
            r#"permit (principal, action, resource) when { context.request.path like "/a\**" };"#;
        let json = policy
            .parse::<cedar_policy::Policy>()
            .unwrap()
            .to_json()
            .unwrap();
        let found = paths(json.pointer("/conditions/0/body").unwrap());
        let Some(Usage::Matched(pattern)) = found.first().map(|path| &path.usage) else {
            panic!("{found:?} is not a pattern");
        };
        assert!(pattern.matches("/a*") && pattern.matches("/a*b"));
        assert!(!pattern.matches("/ab"));
    }
}
