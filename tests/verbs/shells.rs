//! What the program says of itself to a shell and to `man`.

use std::collections::BTreeSet;

use crate::program::User;
use crate::support::counts::reached;
use crate::support::has_program;

/// The verbs that `--help` lists.
async fn verbs(user: &User) -> BTreeSet<String> {
    let help = user.run(&["--help"]).await.expect(0).out;
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    commands
        .lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn every_shell_is_told_every_verb() {
    let user = User::new();
    let verbs = verbs(&user).await;
    assert!(verbs.contains("wait") && verbs.contains("completions"));
    let shells = ["bash", "zsh", "fish", "elvish", "powershell"];
    for shell in shells {
        let script = user.run(&["completions", shell]).await.expect(0).out;
        for verb in &verbs {
            assert!(script.contains(verb.as_str()), "{shell}: {verb}");
        }
    }
    reached("shells", shells.len());
    user.run(&["completions", "cmd"]).await.expect(64);

    // A shell that completes by it offers what begins as was typed.
    if has_program("every_shell_is_told_every_verb", "bash") {
        let line = "eval \"$(countersign completions bash)\"; \
            COMP_WORDS=(countersign who) COMP_CWORD=1; \
            _countersign countersign who countersign; printf '%s\\n' \"${COMPREPLY[@]}\"";
        let mut bash = user.command("bash");
        bash.args(["-c", line]);
        let offered = crate::program::finish(bash).await.expect(0);
        assert_eq!(offered.out.trim(), "whoami", "{offered:#?}");
    }
}

#[tokio::test]
async fn the_manual_describes_every_verb_and_exit_code() {
    let user = User::new();
    let page = user.run(&["man"]).await.expect(0).out;
    assert!(page.contains(".TH countersign"), "{page}");
    for verb in verbs(&user).await {
        let section = format!(".SH \"COUNTERSIGN {}\"", verb.to_ascii_uppercase());
        assert!(page.contains(&section), "{section}");
    }
    assert!(page.contains(".SH \"COUNTERSIGN CREDENTIALS LIST\""));
    for code in ["0", "1", "64", "69", "77", "78"] {
        assert!(page.contains(&format!("\n.TP\n{code}\n")), "{code}");
    }
    // Formatted without a complaint.
    if has_program("the_manual_describes_every_verb_and_exit_code", "groff") {
        let formatted = user
            .sh("countersign man | groff -man -Tascii -P-cbou -ww -Wbreak")
            .await
            .expect(0);
        assert_eq!(formatted.errors, "");
        assert!(formatted.out.contains("EXIT STATUS"));
    }
}
