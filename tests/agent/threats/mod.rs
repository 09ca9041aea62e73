//! One test for each row of `docs/threat-model.md`, `tNN_...`, that fails once the row's mitigation is taken
//! out: `tests/mutants/TNN.patch` does, and `tests/prove` shows it. T10 to T13 and T23 are in `raw_http`,
//! `headers`, `hardening` and `token_answers`.

mod forged;
mod t01;
mod t02;
mod t06;
mod t07;
mod t08;
mod t09;
mod t14;
mod t15;
mod t19;
mod t20;
mod t21;
mod t22;
