//! virtseald as a service: started by whatever there is, configured by a file, ended without losing anything.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use virtseal_testkit::rig::STATE;
use virtseal_testkit::{
    DomainState, Host, HostBuilder, Output, Process, Readiness, SealedHost, built_program, expect_names,
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// What is copied or backed up while virtseald is down must be whole, and who cuts the audit log then is found out.
#[test]
fn an_end_leaves_all_changes_in_the_keystore_and_notes_the_audit_log() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    let state = sealed.host().path(STATE);
    let records = fs::read_to_string(state.join("audit.log"))?.lines().count();
    let alone = tempfile::tempdir()?;
    fs::copy(state.join("keystore.db"), alone.path().join("keystore.db"))?;
    let copy = rusqlite::Connection::open(alone.path().join("keystore.db"))?;
    let sealed_vms: usize = copy.query_row("SELECT count(*) FROM vms WHERE name = 'web01'", [], |row| {
        row.get(0)
    })?;
    let noted: usize = copy.query_row("SELECT seq FROM audit_anchor", [], |row| row.get(0))?;
    ensure!(
        sealed_vms == 1 && noted == records,
        "{noted} of {records} records are noted"
    );
    Ok(())
}

#[test]
fn daemons_run_side_by_side() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    sealed.seal_new("web01")?;

    let second = "/run/second/socket";
    let _daemon = start_second(
        host,
        "socket: /run/second/socket\nstate_dir: /var/lib/virtseal/second\n",
    )?;
    let of_second = |arguments: &[&str]| sealed.virtseal(&[&["--socket", second], arguments].concat());
    let none = |told: &str| -> Result<bool> {
        let told: Value = serde_json::from_str(told)?;
        Ok(told["providers"] == json!([]))
    };
    ensure!(none(&of_second(&["provider", "list", "--json"])?.succeeded()?)?);
    let program = built_program("virtseal")?.display().to_string();
    let by_environment = Output::of(
        host.command(program)
            .env("VIRTSEAL_SOCKET", second)
            .args(["provider", "list", "--json"]),
    )?;
    ensure!(none(&by_environment.succeeded()?)?);
    ensure!(
        sealed.json(&["provider", "list"])?["providers"]
            .as_array()
            .is_some_and(|found| found.len() == 1)
    );

    // A hook asks one of them.
    let conf = host.path("/etc/virtseal/hook.conf");
    fs::write(&conf, format!("socket = {second}\n"))?;
    expect_names(
        &sealed.refused_start("web01")?,
        &["web01", "'main'", "not known on this host"],
    )?;
    fs::write(&conf, "")?;
    sealed.start_paused("web01")?;

    // One state directory, one daemon.
    let third = start(host, "third", "socket: /run/third/socket\n")?;
    expect_failure(third, &["/var/lib/virtseal"])?;
    let same_socket = start(host, "fourth", "state_dir: /var/lib/virtseal/fourth\n")?;
    expect_failure(same_socket, &["another virtseald", SealedHost::SOCKET])
}

#[test]
fn mistakes_in_the_configuration_name_file_and_line() -> Result<()> {
    let host = Host::start()?;
    for (text, parts) in [
        (
            "socket: /run/x\nprovder_deadline: 3s\n",
            &["bad.yaml:2", "'provder_deadline'", "'provider_deadline'"][..],
        ),
        (
            "log: info\nhook_deadline: soon\n",
            &["bad.yaml:2", "hook_deadline", "'soon'", "a duration", "Next: "],
        ),
        ("require_sealed: true\n", &["bad.yaml:1", "hook.conf"]),
        ("state_dir: here\n", &["bad.yaml", "'here'", "absolute"]),
        (
            "log: info\nhook_deadline: 3s\n",
            &["bad.yaml:2", "provider_deadline", "hook_deadline (3s)"],
        ),
        (
            "log: 'virtseal=loud'\n",
            &["bad.yaml:1", "log", "virtseal=loud", "warn"],
        ),
    ] {
        let failed = start(&host, "bad", text)?;
        // systemd tries no more: packaging/systemd/virtseald.service.in.
        expect_end(failed, 78, parts).with_context(|| format!("{text:?}"))?;
        let refused = check(&host, "/etc/virtseal/bad.yaml")?;
        ensure!(refused.code() == Some(78), "{refused:?}");
        let parts: Vec<_> = parts.iter().filter(|part| **part != "Next: ").copied().collect();
        expect_names(&refused.stderr, &parts)?;
    }
    fs::write(
        host.path("/etc/virtseal/bad.yaml"),
        "hook_deadline: 3s\nprovider_deadline: 1s\n",
    )?;
    check(&host, "/etc/virtseal/bad.yaml")?.succeeded()?;
    let program = built_program("virtseald")?.display().to_string();
    let missing = host.run(&[&program, "--config", "/nonexistent.yaml"])?;
    ensure!(missing.code() == Some(1), "{missing:?}");
    expect_names(&missing.stderr, &["/nonexistent.yaml"])
}

#[test]
fn sighup_takes_a_new_deadline_over() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    let xml = sealed.host().virsh(&["dumpxml", "web01"])?.succeeded()?;
    sealed.destroy("web01")?;
    let config = sealed.host().path("/etc/virtseal/virtseald.yaml");

    // What is wrong changes nothing.
    fs::write(&config, "hook_deadline: 2s\nhook_deadlin: 2s\n")?;
    reload(&mut sealed, "the old configuration stays")?;
    fs::write(
        &config,
        "hook_deadline: 3s\nprovider_deadline: 1s\nsocket: /run/elsewhere\n",
    )?;
    reload(&mut sealed, "configuration reloaded")?;
    ensure!(
        sealed.daemon()?.output().contains("only with a restart"),
        "{}",
        sealed.daemon()?.output()
    );

    // A libvirt that does not answer makes the deadline show: a little before the hook's own.
    expect_silence_noticed(&mut sealed, &xml)?;
    // The same where it does not even let anybody in, as a new one that is starting VMs; and nobody else waits for it.
    sealed.host_mut().restart_libvirtd()?;
    expect_silence_noticed(&mut sealed, &xml)?;

    // Nobody waits for that start any more, and nothing stays armed of it.
    wait_until(PATIENCE, "the take-back of late secrets", || {
        let armed = sealed.json(&["status"])?["armed"] == 0;
        Ok((armed && sealed.secrets()?.is_empty()).then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(1));
    sealed.expect_no_secrets()?;
    sealed.start_paused("web01")
}

#[test]
fn sigterm_ends_cleanly_and_removes_nothing() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    let state = sealed.host().path("/var/lib/virtseal");
    let before = files(&state)?;
    ensure!(before.len() >= 2, "{before:?}");

    let mut daemon = sealed.take_daemon()?;
    let begin = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    let status = daemon.wait(PATIENCE)?;
    ensure!(status.success(), "ended with {status}: {}", daemon.output());
    ensure!(
        begin.elapsed() < Duration::from_secs(20),
        "took {:?}",
        begin.elapsed()
    );
    ensure!(
        files(&state)?
            .keys()
            .filter(|file| !is_log_of_sqlite(file))
            .eq(before.keys().filter(|file| !is_log_of_sqlite(file))),
        "{before:?} became {:?}",
        files(&state)?
    );
    for (file, mode) in files(&state)? {
        ensure!(
            mode & 0o077 == 0,
            "{} is open to others: {mode:o}",
            file.display()
        );
    }
    ensure!(sealed.host().state("web01")? == DomainState::Paused);

    // The socket of the old one is no obstacle.
    sealed.start_daemon()?;
    sealed.unlock()?;
    sealed.destroy("web01")?;
    sealed.start_paused("web01")
}

#[test]
fn socket_activation_and_readiness_work_as_systemd_does_them() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    let socket = sealed.host().path(SealedHost::SOCKET);
    fs::remove_file(&socket)?;
    // Requests wait in the socket from before the daemon's start: here the CLI's, which asks first.
    let listener = UnixListener::bind(&socket)?;
    let readiness = Readiness::of(&sealed)?;
    let program = built_program("virtseald")?.display().to_string();
    let mut waiting = sealed
        .host()
        .command(built_program("virtseal")?)
        .args(["--timeout", "1m", "status"])
        .stdout(Stdio::null())
        .spawn()?;
    let log = fs::File::create(sealed.host().path("/var/log/activated.out"))?;
    let mut activated = sealed
        .host()
        .command("sh")
        .args([
            "-c",
            "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\"",
            &program,
        ])
        .env("NOTIFY_SOCKET", "/run/notify")
        .stdin(OwnedFd::from(listener))
        .stderr(log)
        .spawn()?;
    readiness.wait(PATIENCE)?;
    ensure!(waiting.wait()?.success(), "the request that came first was lost");
    sealed.unlock()?;
    sealed.start_paused("web01")?;

    // It ends and leaves the socket, which is not its own.
    let children = sealed.host().run(&["pidof", "virtseald"])?.succeeded()?;
    sealed
        .host()
        .run(&["sh", "-c", &format!("kill -TERM {}", children.trim())])?
        .succeeded()?;
    ensure!(activated.wait()?.success());
    ensure!(socket.exists(), "the socket of systemd was removed");
    Ok(())
}

#[test]
fn a_virtseald_that_is_ready_has_tried_its_credentials_and_a_start_waits_for_that() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let credentials = sealed.host().path("/run/credentials");
    fs::create_dir(&credentials)?;
    let credential = credentials.join("virtseal.passphrase.main");
    fs::write(&credential, SealedHost::PASSPHRASE)?;
    // How long that takes is not the point.
    sealed.configure("hook_deadline: 120s\n")?;
    fs::write(sealed.host().path("/etc/virtseal/hook.conf"), "deadline = 120s\n")?;
    let readiness = Readiness::of(&sealed)?;
    let environment = [
        "env",
        "CREDENTIALS_DIRECTORY=/run/credentials",
        Readiness::ENVIRONMENT,
    ];
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&environment)?;
    readiness.wait(PATIENCE)?;
    ensure!(sealed.provider("main")?["state"] == "ready");
    sealed.expect_start("web01")?;

    // It listens before it is ready: who starts a VM then gets it.
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&environment)?;
    sealed.expect_start("web01")?;
    readiness.wait(PATIENCE)?;

    // A wrong one is no reason to wait any longer.
    fs::write(&credential, "wrong")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&environment)?;
    readiness.wait(PATIENCE)?;
    expect_names(&sealed.refused_start("web01")?, &["'main' is locked"])
}

#[test]
fn status_answers_with_libvirt_down() -> Result<()> {
    let mut sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    sealed.host_mut().stop_libvirtd()?;
    // What it shows may be two seconds old.
    wait_until(PATIENCE, "status to say that libvirt is down", || {
        let answer = sealed.virtseal(&["status", "--json"])?;
        let status: serde_json::Value = serde_json::from_str(&answer.stdout)?;
        let why = status["libvirt_problem"].as_str().map(str::to_owned);
        ensure!(why.is_none() || answer.code() == Some(4), "{answer:?}");
        Ok(why.filter(|_| status["libvirt"] == "not_connected"))
    })
    .and_then(|why| expect_names(&why, &["qemu:///system", "connect"]))?;
    // It starts without libvirt as well.
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon()?;
    sealed.refused(4, &["status"])?;
    Ok(())
}

fn start_second(host: &Host, config: &str) -> Result<Process> {
    let mut daemon = start(host, "second", config)?;
    wait_until(PATIENCE, "the second virtseald", || {
        ensure!(daemon.ended()?.is_none(), "it ended: {}", daemon.output());
        Ok(UnixStream::connect(host.path("/run/second/socket"))
            .is_ok()
            .then_some(()))
    })?;
    Ok(daemon)
}

/// Starts another daemon with the configuration `/etc/virtseal/NAME.yaml`.
fn start(host: &Host, name: &str, config: &str) -> Result<Process> {
    let path = format!("/etc/virtseal/{name}.yaml");
    fs::write(host.path(&path), config)?;
    let program = built_program("virtseald")?.display().to_string();
    let _ = fs::remove_file(host.path(format!("/var/log/{name}.out")));
    host.spawn(name, &[&program, "--config", &path])
}

/// Has virtseald check a configuration.
fn check(host: &Host, path: &str) -> Result<Output> {
    let program = built_program("virtseald")?.display().to_string();
    host.run(&[&program, "--check", path])
}

fn expect_failure(daemon: Process, parts: &[&str]) -> Result<()> {
    expect_end(daemon, 1, parts)
}

fn expect_end(mut daemon: Process, code: i32, parts: &[&str]) -> Result<()> {
    let status = daemon.wait(PATIENCE)?;
    ensure!(
        status.code() == Some(code),
        "ended with {status}: {}",
        daemon.output()
    );
    expect_names(&daemon.output(), parts)
}

fn reload(sealed: &mut SealedHost, logged: &str) -> Result<()> {
    let daemon = sealed.daemon()?;
    daemon.signal(Signal::SIGHUP)?;
    wait_until(PATIENCE, logged, || {
        Ok(daemon.output().contains(logged).then_some(()))
    })
}

/// libvirtd is stopped: a start is refused in time, and `provider lock` is not kept waiting.
fn expect_silence_noticed(sealed: &mut SealedHost, xml: &str) -> Result<()> {
    sealed.host_mut().libvirtd()?.signal(Signal::SIGSTOP)?;
    let begin = Instant::now();
    let reply = prepare(sealed, xml)?;
    let waited = begin.elapsed();
    sealed.run(&["provider", "lock", "main"])?;
    let locked = begin.elapsed() - waited;
    sealed.host_mut().libvirtd()?.signal(Signal::SIGCONT)?;
    // 0.3 of the deadline is libvirt's share of it: with the old one it would be 3 s.
    expect_names(
        &reply,
        &[
            "web01 stays off",
            "did not answer within 0.9 s",
            "Next: virtseal vm autostart web01, if libvirt autostarts it, then virsh start web01",
        ],
    )?;
    ensure!(waited >= Duration::from_millis(900), "{waited:?}");
    ensure!(
        waited < Duration::from_secs(8),
        "the old deadline of 10 s still counts: {waited:?}"
    );
    ensure!(locked < Duration::from_secs(5), "the lock took {locked:?}");
    sealed.unlock()
}

/// Runs the hook as libvirt does at `prepare begin`, and returns its refusal.
fn prepare(sealed: &SealedHost, xml: &str) -> Result<String> {
    let file = sealed.host().path("/run/prepare.xml");
    fs::write(&file, xml)?;
    let hook = sealed
        .host()
        .command("/etc/libvirt/hooks/qemu.d/virtseal")
        .args(["web01", "prepare", "begin", "-"])
        .stdin(fs::File::open(&file)?)
        .output()?;
    ensure!(
        hook.status.code() == Some(1) && hook.stdout.is_empty(),
        "{hook:?}"
    );
    Ok(String::from_utf8(hook.stderr)?)
}

/// Every file below `directory`, with its mode.
fn files(directory: &Path) -> Result<BTreeMap<PathBuf, u32>> {
    use std::os::unix::fs::PermissionsExt;
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.insert(entry.path(), entry.metadata()?.permissions().mode());
        }
    }
    Ok(found)
}

/// SQLite itself makes and removes them.
fn is_log_of_sqlite(file: &Path) -> bool {
    let name = file.to_string_lossy();
    name.ends_with("-wal") || name.ends_with("-shm") || name.ends_with("-journal")
}
