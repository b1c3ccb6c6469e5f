//! What somebody at a terminal sees: questions, colours, help, and how a command that takes long is left.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{SealedHost, built_program, expect_names, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_slip_at_the_prompt_is_asked_again_and_the_third_is_the_last() -> Result<()> {
    let sealed = SealedHost::start()?;
    let unlock = |typed: &[&str]| sealed.virtseal_at_a_terminal(&["provider", "unlock", "main"], typed);
    let refusal = "does not accept this passphrase";
    sealed.lock()?;
    let output = unlock(&["wrong", "almost", SealedHost::PASSPHRASE])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(output.stdout.matches(refusal).count() == 2, "{output:?}");
    sealed.lock()?;
    let output = unlock(&["wrong", "almost", "nearly", SealedHost::PASSPHRASE])?;
    ensure!(output.code() == Some(3), "{output:?}");
    ensure!(output.stdout.matches(refusal).count() == 3, "{output:?}");
    ensure!(sealed.provider("main")?["state"] == "locked");
    Ok(())
}

#[test]
fn states_have_colours_where_a_terminal_shows_them_and_help_fits_it() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let ready = "\u{1b}[32mready\u{1b}[0m";
    let shown = |line: &str| sealed.at_a_terminal(line, &[]).map(|output| output.stdout);
    for command in ["provider list", "provider show main", "status"] {
        let coloured = shown(&format!("TERM=xterm virtseal {command}"))?;
        ensure!(coloured.contains(ready), "{command}: {coloured:?}");
        for plain in [
            format!("TERM=dumb virtseal {command}"),
            format!("TERM=xterm NO_COLOR=1 virtseal {command}"),
            format!("TERM=xterm virtseal {command} | cat"),
        ] {
            let text = shown(&plain)?;
            ensure!(
                text.contains("ready") && !text.contains('\u{1b}'),
                "{plain}: {text:?}"
            );
        }
    }
    let help = shown("stty rows 24 cols 60; virtseal volume create --help")?;
    let (options, examples) = help.split_once("Examples:").context("no examples")?;
    let wide: Vec<_> = options
        .lines()
        .filter(|line| line.trim_end().chars().count() > 60)
        .collect();
    ensure!(wide.is_empty(), "{wide:?}");
    expect_names(
        examples,
        &["virtseal volume create /var/lib/libvirt/images/web01.qcow2"],
    )?;

    // Whoever waits is shown so.
    sealed.daemon()?.signal(Signal::SIGSTOP)?;
    let waited = sealed.at_a_terminal("TERM=xterm virtseal --timeout 2s status", &[])?;
    expect_names(&waited.stdout, &["waiting for virtseald", "nothing came for 2s"])?;
    sealed.daemon()?.signal(Signal::SIGCONT)
}

#[test]
fn a_name_that_is_mistyped_is_guessed() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    for (command, meant) in [
        (["provider", "show", "mian"], "perhaps 'main' is meant"),
        (["provider", "lock", "mai"], "perhaps 'main' is meant"),
        (["vm", "status", "web1"], "perhaps 'web01' is meant"),
        (["vm", "seal", "wbe01"], "perhaps 'web01' is meant"),
    ] {
        expect_names(&sealed.refused(7, &command)?, &[meant])?;
    }
    let unlike = sealed.refused(7, &["vm", "status", "database"])?;
    ensure!(!unlike.contains("perhaps"), "{unlike}");
    expect_names(&sealed.refused(2, &["provider", "unlok", "main"])?, &["unlock"])
}

#[test]
fn who_stops_to_follow_a_job_is_told_that_it_goes_on() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let file = sealed.passphrase_file()?.display().to_string();
    // It waits for a backup.
    sealed.run(&["provider", "rotate", "main", "--passphrase-file", &file])?;
    let job = sealed.last_job()?["id"].to_string();
    let program = built_program("virtseal")?.display().to_string();
    let mut follower = sealed.host().spawn("follower", &[&program, "jobs", "watch"])?;
    wait_until(PATIENCE, "the follower to see the job", || {
        Ok(follower.output().contains("waits: ").then_some(()))
    })?;
    follower.signal(Signal::SIGINT)?;
    ensure!(!follower.wait(PATIENCE)?.success());
    let said = follower.output();
    expect_names(
        &said,
        &[&format!("job {job} goes on. Next: virtseal jobs watch {job}")],
    )?;
    ensure!(sealed.last_job()?["state"] == "running");
    Ok(())
}

#[test]
fn nobody_is_asked_for_what_is_refused_anyway_and_a_slip_costs_nothing() -> Result<()> {
    let sealed = SealedHost::start()?;
    let there = "/run/there";
    fs::write(sealed.host().path(there), "mine")?;
    for command in [
        &["provider", "backup", "main", "-o", there][..],
        &["state", "backup", "-o", there],
        &["provider", "restore", "main", "-i", there],
    ] {
        let output = sealed.virtseal_at_a_terminal(command, &[])?;
        ensure!(output.status.code() == Some(10), "{output:?}");
        ensure!(!output.stdout.contains("assphrase of"), "{output:?}");
    }
    ensure!(fs::read_to_string(sealed.host().path(there))? == "mine");

    let backup = "/run/backup.age";
    let typed = ["one", "another", "short", "short"];
    let output = sealed.virtseal_at_a_terminal(&["provider", "backup", "main", "-o", backup], &typed)?;
    ensure!(output.status.success(), "{output:?}");
    expect_names(&output.stdout, &["the two differ", "fewer than 10 characters"])?;
    ensure!(sealed.host().path(backup).exists());
    // As is one from a file, where it is new.
    fs::write(sealed.host().path("/run/short"), "short\n")?;
    let add = ["provider", "add", "native", "other", "--passphrase-file"];
    let other = sealed.virtseal_reading("longer than ten", &[&add[..], &["-"]].concat())?;
    ensure!(
        other.status.success() && !other.stderr.contains("fewer than"),
        "{other:?}"
    );
    let again = [
        "provider",
        "backup",
        "other",
        "-o",
        "/run/other.age",
        "--passphrase-file",
        "/run/short",
    ];
    let other = sealed.virtseal(&again)?;
    ensure!(other.status.success(), "{other:?}");
    expect_names(&other.stderr, &["fewer than 10 characters"])?;
    // What is refused by virtseald leaves no empty file that looks like a backup.
    let none = "/run/none.age";
    let output = sealed.virtseal_at_a_terminal(&["provider", "backup", "nobody", "-o", none], &[])?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(!output.stdout.contains("assphrase of"), "{output:?}");
    ensure!(!sealed.host().path(none).exists());
    Ok(())
}
