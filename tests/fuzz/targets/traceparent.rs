//! `traceparent` (W3C Trace Context, section 3.2): what is taken is what would be written.

use countersign::request_id::TraceContext;
use http::{HeaderMap, HeaderValue};

pub fn run(input: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(input) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.append("traceparent", value.clone());
    let context = TraceContext::from_headers(&headers);
    if let Some(context) = context {
        let trace = context.trace_id().to_string();
        let parent = format!("{:016x}", context.parent_id());
        let written = std::str::from_utf8(input).expect("a context is read from text");
        assert_eq!(written.get(2..53), Some(&*format!("-{trace}-{parent}-")));
        assert!(
            !trace.bytes().all(|digit| digit == b'0'),
            "an invalid trace"
        );
        assert!(
            !parent.bytes().all(|digit| digit == b'0'),
            "an invalid parent"
        );
        assert!(!written.starts_with("ff"), "the forbidden version");
        assert!(
            written.len() == 55 || !written.starts_with("00"),
            "version 00 has four fields"
        );
        let flags = u8::from_str_radix(&written[53..55], 16).expect("two digits");
        assert_eq!(context.is_sampled(), flags & 1 == 1);
        let child = context.child(7).to_header_value();
        let sent = TraceContext::parse(child.to_str().expect("it is text"));
        assert_eq!(sent, Some(context.child(7)), "what is sent is read alike");
        assert_eq!(sent.map(|sent| sent.trace_id()), Some(context.trace_id()));
    }
    // Of two there is none to believe.
    headers.append("traceparent", value);
    assert_eq!(TraceContext::from_headers(&headers), None);
}
