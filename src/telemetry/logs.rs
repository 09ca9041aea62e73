//! Logs: text or JSON lines on standard error, without secrets at any level.
