//! What holds of every diagnostic about a text that a person wrote.

use std::path::Path;

use countersign::diagnostics::Diagnostics;

/// Checks each of them, and that they can be shown; `text` is the text of `path`.
pub fn check(diagnostics: &Diagnostics, path: &Path, text: &str) {
    for diagnostic in diagnostics {
        let is_code = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        assert!(diagnostic.code.bytes().all(is_code), "{}", diagnostic.code);
        assert!(!diagnostic.message.is_empty());
        let told = format!(
            "{}{}",
            diagnostic.message,
            diagnostic.next.as_deref().unwrap_or("")
        );
        assert!(!told.contains(char::is_control), "{told:?}");
        if let Some(span) = diagnostic.span.as_ref().filter(|_| diagnostic.path == path) {
            assert!(
                text.get(span.clone()).is_some(),
                "{} points to {span:?} of {} bytes",
                diagnostic.code,
                text.len()
            );
            let position = diagnostics.position(diagnostic).expect("it has a source");
            assert!(position.line <= text.split('\n').count());
        }
        assert!(diagnostics.line(diagnostic).contains(&diagnostic.message));
    }
    let rendered = diagnostics.render(false);
    assert_eq!(rendered.is_empty(), diagnostics.is_empty());
    assert!(diagnostics.render(true).len() >= rendered.len());
    let shown = diagnostics.to_json();
    assert_eq!(shown.as_array().map(Vec::len), Some(diagnostics.len()));
}
