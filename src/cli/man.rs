//! `countersign man`: the manual page, made of what `--help` says.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

/// What stands in the manual and not in `--help`.
const EXIT_STATUS: &str = r#".SH "EXIT STATUS"
.TP
0
done
.TP
1
a check failed
.TP
64
the command line is wrong
.TP
69
something that is needed is away: the agent, the authorization server, or an address to listen on
.TP
77
policy or attestation refused
.TP
78
the configuration is wrong
.PP
\fBexec\fR passes on its command's own.
"#;

/// Writes the manual page, in roff, to standard output: `countersign man | man -l -`.
#[derive(Debug, Clone, clap::Args)]
pub struct ManArguments {}

/// Writes the page to `out`.
pub fn run(_arguments: &ManArguments, out: &mut dyn Write) -> ExitCode {
    match page().and_then(|page| out.write_all(&page)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn page() -> io::Result<Vec<u8>> {
    let mut command = super::Command::command();
    command.build();
    let manual = Man::new(command.clone());
    let mut page = Vec::new();
    manual.render_title(&mut page)?;
    manual.render_name_section(&mut page)?;
    manual.render_synopsis_section(&mut page)?;
    manual.render_description_section(&mut page)?;
    for verb in command.get_subcommands() {
        verb_sections(verb, &mut page)?;
    }
    page.extend_from_slice(EXIT_STATUS.as_bytes());
    Ok(page)
}

/// A verb and those beneath it, each a section: one page says all.
fn verb_sections(verb: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    if verb.get_name() == "help" || verb.is_hide_set() {
        return Ok(());
    }
    let words = verb
        .get_bin_name()
        .unwrap_or(verb.get_name())
        .to_ascii_uppercase();
    writeln!(page, ".SH \"{words}\"")?;
    // The sections of a page of its own are parts of this one's section.
    let mut sections = Vec::new();
    let manual = Man::new(verb.clone());
    manual.render_synopsis_section(&mut sections)?;
    manual.render_description_section(&mut sections)?;
    if verb.get_arguments().any(|argument| !argument.is_hide_set()) {
        manual.render_options_section(&mut sections)?;
    }
    let sections = String::from_utf8_lossy(&sections).replace("\n.SH ", "\n.SS ");
    let sections = match sections.strip_prefix(".SH ") {
        Some(rest) => format!(".SS {rest}"),
        None => sections,
    };
    page.extend_from_slice(sections.as_bytes());
    verb.get_subcommands()
        .try_for_each(|verb| verb_sections(verb, page))
}
