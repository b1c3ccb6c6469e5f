//! A sealed VM stays off, with the reason in one line, while its keys can't be had; a plain one never notices.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{DomainSpec, DomainState, HostBuilder, SealedHost, expect_names};

/// What a start may take besides the deadline that the hook has, on a busy machine.
const SLACK: Duration = Duration::from_secs(15);

#[test]
fn locked_provider_refuses_start() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.lock()?;
    let message = sealed.refused_start("web01")?;
    expect_names(
        &message,
        &[
            "web01",
            "disk vda",
            "provider 'main'",
            "is locked",
            "virtseal provider unlock main",
        ],
    )?;
    // libvirt shows the hook's environment: that of a service, not of whoever runs the tests.
    ensure!(!message.contains("CARGO"), "{message}");
    ensure!(!message.contains("LD_LIBRARY_PATH"), "{message}");
    let command = message
        .split("Next: ")
        .nth(1)
        .map(|next| next.split(' ').skip(1).collect::<Vec<_>>())
        .unwrap_or_default();
    let file = sealed.passphrase_file()?;
    let file = file.display().to_string();
    // The next command in the message is one that works as it stands.
    sealed
        .virtseal(&[command.as_slice(), &["--passphrase-file", &file]].concat())?
        .succeeded()?;
    sealed.start_paused("web01")?;

    // Locking again is no matter to a VM that runs.
    sealed.lock()?;
    ensure!(sealed.host().state("web01")? == DomainState::Paused);
    Ok(())
}

#[test]
fn daemon_down_refuses_sealed_and_passes_plain() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    define_plain(&sealed, "plain01")?;

    sealed.stop_daemon(Signal::SIGKILL)?;
    expect_names(
        &sealed.refused_start("web01")?,
        &["web01", SealedHost::HOOK_SOCKET, "systemctl start virtseald"],
    )?;
    start_and_stop(&sealed, "plain01")?;

    sealed.start_daemon()?;
    expect_names(&sealed.refused_start("web01")?, &["is locked"])?;
    sealed.unlock()?;
    sealed.start_paused("web01")?;
    Ok(())
}

#[test]
fn hung_daemon_refuses_sealed_in_time_and_passes_plain() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    define_plain(&sealed, "plain01")?;
    hook_conf(&sealed, "deadline = 3s\n")?;

    sealed.daemon()?.signal(Signal::SIGSTOP)?;
    let begin = Instant::now();
    let message = sealed.refused_start("web01")?;
    let waited = begin.elapsed();
    expect_names(
        &message,
        &[
            "web01",
            "did not answer within 3s",
            "Next: systemctl status virtseald",
            "journalctl",
        ],
    )?;
    ensure!(waited >= Duration::from_secs(3), "gave up after {waited:?}");
    ensure!(
        waited < Duration::from_secs(3) + SLACK,
        "refused only after {waited:?}"
    );
    // libvirt does not hang with it.
    sealed.host().virsh(&["list", "--all"])?.succeeded()?;
    start_and_stop(&sealed, "plain01")?;

    // The request is still in the socket. Whoever asked has gone, so it must arm nothing.
    sealed.daemon()?.signal(Signal::SIGCONT)?;
    ensure!(sealed.json(&["status"])?["providers"][0]["state"] == "ready");
    std::thread::sleep(Duration::from_secs(1));
    sealed.expect_no_secrets()?;
    ensure!(sealed.json(&["status"])?["armed"] == 0);
    sealed.start_paused("web01")
}

#[test]
fn policy_decides_whether_plain_vms_start() -> Result<()> {
    let sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    define_plain(&sealed, "plain01")?;
    start_and_stop(&sealed, "plain01")?;

    hook_conf(&sealed, "require_sealed = true\n")?;
    expect_names(
        &sealed.refused_start("plain01")?,
        &["plain01", "require_sealed", "virtseal vm seal plain01"],
    )?;
    // A mistake in the policy must not let anything pass that it may forbid.
    hook_conf(&sealed, "require_saeled = true\n")?;
    expect_names(
        &sealed.refused_start("plain01")?,
        &["plain01", "hook.conf:1", "require_sealed"],
    )?;
    hook_conf(&sealed, "require_sealed = false\n")?;
    start_and_stop(&sealed, "plain01")
}

fn define_plain(sealed: &SealedHost, name: &str) -> Result<()> {
    let disk = sealed.host().empty_disk(name, 1 << 20)?;
    sealed.host().define(&DomainSpec::minimal(name, &disk))
}

fn start_and_stop(sealed: &SealedHost, name: &str) -> Result<()> {
    sealed.start_paused(name)?;
    sealed.destroy(name)
}

fn hook_conf(sealed: &SealedHost, text: &str) -> Result<()> {
    fs::write(sealed.host().path("/etc/virtseal/hook.conf"), text)?;
    Ok(())
}
