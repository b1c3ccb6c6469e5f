//! Nothing hangs: where virtseald is out of reach, however that came, each command ends in time, and says what to look at.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use virtseal_testkit::{HostBuilder, Output, SealedHost, expect_names};

/// What a command waits for a sign of life, and what a busy machine may take beside.
const SILENCE: Duration = Duration::from_secs(5);
const SLACK: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(60);
/// What needs no daemon.
const ALONE: [&str; 2] = ["volume info", "state restore"];

/// Each command once, with what it can't do without. P stands for the path of a passphrase.
const COMMANDS: &str = "\
status
provider add native new --passphrase-file P
provider add kmip new --endpoint kms.example.org
provider add pkcs11 new --module /m.so --token-label t --pin-file P
provider add transit new --address https://bao.example.org:8200
provider list
provider set main description=x
provider show main
provider cache main none
provider default main
provider unlock main --passphrase-file P
provider tpm main --remove
provider lock main
provider identity main --cert P
provider csr main
provider trust main
provider backup main --output /run/main.age --passphrase-file P
provider restore main --input P --no-backup-passphrase --passphrase-file P
provider rotate main --passphrase-file P
provider rekey
provider move main other
provider recipients add main
provider recipients remove main
provider delete main
provider orphans
volume create /run/x.qcow2 --size 1M --vm web01
volume share /run/x.qcow2 --with web01
volume forget /run/x.qcow2
volume adopt /run/x.qcow2
volume check /run/x.qcow2
volume resize /run/x.qcow2 2M
vm seal web01
vm unseal web01
vm rekey web01
vm shred web01 --yes-shred web01
vm forget web01
vm adopt web01
vm snapshot commit web01
vm snapshot delete web01 --yes-delete web01
vm nvram reset web01 --yes-reset web01
vm autostart web01
vm status
jobs
jobs list
jobs watch
jobs abort
jobs resume 1
state backup --output /run/state.age --passphrase-file P
audit show
audit verify";

#[test]
fn every_command_ends_in_time_where_virtseald_says_nothing() -> Result<()> {
    let mut sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    expect_all_commands()?;
    sealed.daemon()?.signal(Signal::SIGSTOP)?;
    let parts = [
        SealedHost::SOCKET,
        "nothing came for 5s",
        "journalctl -u virtseald",
    ];
    each_command(&sealed, SILENCE, &parts)?;

    // The time can be chosen; scripts are told in their way.
    let begin = Instant::now();
    let told = sealed.refused_json(4, &["--timeout", "1s", "status"])?;
    ensure!(begin.elapsed() < SILENCE, "{:?}", begin.elapsed());
    let error = &told["error"];
    expect_names(
        error["next"].as_str().unwrap_or_default(),
        &["systemctl status virtseald"],
    )?;

    sealed.daemon()?.signal(Signal::SIGCONT)?;
    sealed.run(&["status"]).map(drop)
}

#[test]
fn every_command_ends_at_once_where_there_is_no_virtseald() -> Result<()> {
    let mut sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    let socket = sealed.host().path(SealedHost::SOCKET);
    let hook = sealed.host().path(SealedHost::HOOK_SOCKET);
    // Dead: its sockets are there, and nobody behind them.
    sealed.stop_daemon(Signal::SIGKILL)?;
    let next = "Next: systemctl start virtseald";
    let look = "journalctl -u virtseald";
    each_command(
        &sealed,
        Duration::ZERO,
        &[SealedHost::SOCKET, "refused", next, look],
    )?;
    for socket in [&socket, &hook] {
        fs::remove_file(socket)?;
    }
    each_command(
        &sealed,
        Duration::ZERO,
        &[SealedHost::SOCKET, "No such file", next, look],
    )?;

    // As systemd holds them for a daemon that does not come.
    let _listening = [UnixListener::bind(&socket)?, UnixListener::bind(&hook)?];
    each_command(
        &sealed,
        SILENCE,
        &[SealedHost::SOCKET, "nothing came for 5s", look],
    )
}

#[test]
fn a_virtseald_that_ends_or_stops_in_the_middle_of_a_call_is_noticed() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    for (signal, parts) in [
        (
            Signal::SIGKILL,
            ["ended the connection", "every command can be repeated"],
        ),
        (
            Signal::SIGSTOP,
            ["nothing came for 5s", "journalctl -u virtseald"],
        ),
    ] {
        // Whoever seals waits for libvirt, which does not answer.
        sealed.host_mut().libvirtd()?.signal(Signal::SIGSTOP)?;
        let pid = sealed.daemon()?.outside_pid()?;
        let said = thread::scope(|scope| {
            let sealed = &sealed;
            let calling = scope.spawn(move || sealed.refused(4, &["vm", "unseal", "web01"]));
            // Longer than it would wait without a sign of life.
            thread::sleep(SILENCE + Duration::from_secs(3));
            let ended = calling.is_finished();
            kill(pid, signal)?;
            let said = calling
                .join()
                .map_err(|_| anyhow::anyhow!("the call panicked"))??;
            ensure!(!ended, "it did not wait: {said}");
            Ok(said)
        })?;
        expect_names(&said, &parts)?;
        sealed.host_mut().libvirtd()?.signal(Signal::SIGCONT)?;
        if signal == Signal::SIGKILL {
            sealed.take_daemon()?.wait(PATIENCE)?;
            sealed.start_daemon()?;
            sealed.unlock()?;
        }
    }
    Ok(())
}

#[test]
fn refusals_of_the_hook_name_what_works_without_virtseald() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let vm = sealed.seal_new("web01")?;
    let start = "Next: systemctl start virtseald";
    sealed.stop_daemon(Signal::SIGTERM)?;
    expect_names(
        &sealed.refused_start("web01")?,
        &["web01", "does not listen", start],
    )?;
    // An older XML: what takes the VM back needs virtseald.
    sealed
        .host()
        .virsh(&["undefine", "--keep-nvram", "--keep-tpm", "web01"])?
        .succeeded()?;
    sealed.host().define(&vm)?;
    expect_names(
        &sealed.refused_start("web01")?,
        &["it is sealed", start, "then virtseal vm seal web01"],
    )?;
    sealed.start_daemon()?;
    let refused = sealed.refused_start("web01")?;
    expect_names(&refused, &["it is sealed", "Next: virtseal vm seal web01"])
}

/// Runs all of [`COMMANDS`] at once; each must end with exit code 4, say these parts, and not take much longer than `time`.
fn each_command(sealed: &SealedHost, time: Duration, parts: &[&str]) -> Result<()> {
    let passphrase = sealed.passphrase_file()?.display().to_string();
    thread::scope(|scope| {
        let ended: Vec<_> = COMMANDS
            .lines()
            .map(|line| {
                let words: Vec<_> = line
                    .split(' ')
                    .map(|word| if word == "P" { &*passphrase } else { word })
                    .map(str::to_owned)
                    .collect();
                scope.spawn(move || -> Result<(Output, Duration)> {
                    let begin = Instant::now();
                    let words: Vec<_> = words.iter().map(String::as_str).collect();
                    Ok((sealed.virtseal(&words)?, begin.elapsed()))
                })
            })
            .collect();
        for (line, ended) in COMMANDS.lines().zip(ended) {
            let (output, took) = ended.join().map_err(|_| anyhow::anyhow!("{line} panicked"))??;
            ensure!(output.code() == Some(4), "{line}: {output:?}");
            ensure!(took >= time && took < time + SLACK, "{line} took {took:?}");
            // The socket of the hook is tried before the other one.
            let said = output.stderr.replace(SealedHost::HOOK_SOCKET, SealedHost::SOCKET);
            expect_names(&said, parts).with_context(|| line.to_owned())?;
        }
        Ok(())
    })
}

/// That [`COMMANDS`] has them all.
fn expect_all_commands() -> Result<()> {
    let mut all = BTreeSet::new();
    let mut open = vec![(Vec::new(), virtseal::commands())];
    while let Some((path, command)) = open.pop() {
        if !command.is_subcommand_required_set() {
            all.insert(path.join(" "));
        }
        for sub in command.get_subcommands() {
            open.push(([&path[..], &[sub.get_name().to_owned()]].concat(), sub.clone()));
        }
    }
    let tried = |command: &str| {
        COMMANDS
            .lines()
            .any(|line| line == command || line.starts_with(&format!("{command} ")))
    };
    let missing: Vec<_> = all
        .iter()
        .filter(|command| !ALONE.contains(&command.as_str()) && !tried(command))
        .collect();
    ensure!(all.len() > 35, "{all:?}");
    ensure!(missing.is_empty(), "not tried: {missing:?}");
    Ok(())
}
