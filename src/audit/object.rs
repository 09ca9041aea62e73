//! Writes a JSON object (RFC 8259) member by member. A record is written for every request, and its
//! names are ours: only values need to be looked at for what JSON escapes.

/// A member's name, as it stands in front of its value: one piece, for a record has some thirty.
macro_rules! name {
    ($name:literal) => {
        concat!(",\"", $name, "\":")
    };
}
pub(super) use name;

/// An object under way at the end of a text.
pub(super) struct Object<'a> {
    text: &'a mut Vec<u8>,
    is_empty: bool,
}

impl<'a> Object<'a> {
    /// Begins behind an opening brace, which the caller writes or leaves out.
    pub(super) fn begun(text: &'a mut Vec<u8>) -> Self {
        Self {
            text,
            is_empty: true,
        }
    }

    /// Writes the closing brace.
    pub(super) fn end(self) {
        self.text.push(b'}');
    }

    /// A member whose value is text. Each `name` is made by [`name!`].
    pub(super) fn text(&mut self, name: &'static str, value: &str) {
        self.name(name);
        push_text(self.text, value);
    }

    /// A member whose value is text in which JSON escapes nothing: a word of ours, an id, a method.
    pub(super) fn plain(&mut self, name: &'static str, value: &str) {
        self.name(name);
        push_plain(self.text, value);
    }

    /// As [`Object::text`]; nothing where there is no value.
    pub(super) fn text_if_any(&mut self, name: &'static str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    /// As [`Object::plain`], of a value that is written by `push`.
    pub(super) fn pushed(&mut self, name: &'static str, push: impl FnOnce(&mut Vec<u8>)) {
        self.name(name);
        self.text.push(b'"');
        push(self.text);
        self.text.push(b'"');
    }

    /// A member whose value is a number.
    pub(super) fn number(&mut self, name: &'static str, value: u64) {
        self.name(name);
        let mut digits = itoa::Buffer::new();
        self.text.extend_from_slice(digits.format(value).as_bytes());
    }

    /// A member whose value is an array of texts; nothing where it is empty.
    pub(super) fn texts_if_any(
        &mut self,
        name: &'static str,
        values: impl IntoIterator<Item = impl AsRef<str>>,
    ) {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return;
        }
        self.name(name);
        self.text.push(b'[');
        while let Some(value) = values.next() {
            push_text(self.text, value.as_ref());
            if values.peek().is_some() {
                self.text.push(b',');
            }
        }
        self.text.push(b']');
    }

    /// A member whose value is an object.
    pub(super) fn object(&mut self, name: &'static str, write: impl FnOnce(&mut Object<'_>)) {
        self.name(name);
        self.text.push(b'{');
        let mut object = Object::begun(self.text);
        write(&mut object);
        object.end();
    }

    fn name(&mut self, name: &'static str) {
        let is_first = std::mem::take(&mut self.is_empty);
        let name = name.strip_prefix(',').filter(|_| is_first).unwrap_or(name);
        self.text.extend_from_slice(name.as_bytes());
    }
}

fn push_text(text: &mut Vec<u8>, value: &str) {
    // Without an early end, so that the compiler looks at many bytes at once.
    let is_escaped = value.bytes().fold(false, |found, byte| {
        found | (byte < 0x20) | (byte == b'"') | (byte == b'\\')
    });
    if is_escaped {
        // Text is always written, and writing to a vector does not fail.
        let _ = serde_json::to_writer(text, value);
        return;
    }
    push_plain(text, value);
}

fn push_plain(text: &mut Vec<u8>, value: &str) {
    text.reserve(value.len() + 2);
    text.push(b'"');
    text.extend_from_slice(value.as_bytes());
    text.push(b'"');
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            value: String,
            values in prop::collection::vec(any::<String>(), 0..4),
            number: u64,
        ) {
            let mut text = b"{".to_vec();
            let mut object = Object::begun(&mut text);
            object.text(name!("text"), &value);
            object.text_if_any(name!("absent"), None);
            object.plain(name!("plain"), &number.to_string());
            object.pushed(name!("pushed"), |text| text.extend_from_slice(b"pushed"));
            object.number(name!("number"), number);
            object.texts_if_any(name!("texts"), &values);
            object.object(name!("object"), |object| object.text(name!("inner"), &value));
            object.end();
            let mut expected = serde_json::json!({
                "text": value, "plain": number.to_string(), "pushed": "pushed", "number": number,
                "object": {"inner": value},
            });
            if !values.is_empty() {
                expected["texts"] = values.into();
            }
            let read: serde_json::Value = serde_json::from_slice(&text).unwrap();
            prop_assert_eq!(read, expected);
        }
    }
}
