//! What scripts rely on: exit codes, where passphrases come from, and who may do what.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{HostBuilder, SealedHost, built_program, expect_names, wait_until};

const UNLOCK_DEADLINE: Duration = Duration::from_secs(60);
const READER_GROUP: &str = "54321";

#[test]
fn exit_codes_tell_what_happened() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let expect = |code: i32, arguments: &[&str], parts: &[&str]| -> Result<()> {
        let answer = sealed.virtseal(arguments)?;
        ensure!(answer.code() == Some(code), "expected {code}: {answer:?}");
        ensure!(answer.stdout.is_empty(), "{answer:?}");
        expect_names(&answer.stderr, parts)
    };
    expect(2, &["seal"], &["Usage"])?;
    expect(
        2,
        &[
            "provider",
            "add",
            "native",
            "no/name",
            "--passphrase-file",
            "/dev/null",
        ],
        &["passphrase"],
    )?;
    expect(
        4,
        &["--socket", "/nonexistent", "status"],
        &["/nonexistent", "Next: systemctl start virtseald"],
    )?;
    expect(
        7,
        &["vm", "status", "nobody"],
        &["'nobody'", "Next: virsh list --all"],
    )?;
    expect(7, &["vm", "seal", "nobody"], &["'nobody'"])?;
    expect(
        7,
        &["provider", "show", "nobody"],
        &["'nobody'", "Next: virtseal provider list"],
    )?;
    expect(
        7,
        &["provider", "lock", "nobody"],
        &["nobody", "Next: virtseal provider list"],
    )?;
    expect(7, &["volume", "info", "/nonexistent"], &["/nonexistent"])?;
    expect(
        7,
        &[
            "volume",
            "create",
            "/run/x.qcow2",
            "--size",
            "1M",
            "--vm",
            "nobody",
        ],
        &["'nobody'"],
    )?;

    // What leads out destroys nothing, and has the words of that command.
    let disk = SealedHost::spec("web01").disk.display().to_string();
    let share = ["volume", "share", &disk, "--with", "nobody"];
    expect(7, &share, &["'nobody'", "or give the UUID that it will have"])?;
    let lost = [
        "volume",
        "create",
        "/nowhere/x.qcow2",
        "--size",
        "1M",
        "--vm",
        "web01",
    ];
    expect(7, &lost, &["/nowhere/x.qcow2", "Next: ls -ld /nowhere"])?;
    expect(
        2,
        &["volume", "create", "/run/x", "--size", "20", "--vm", "web01"],
        &["20G"],
    )?;
    expect(
        7,
        &["vm", "rekey", "nobody"],
        &["'nobody'", "Next: virsh list --all"],
    )?;
    expect(2, &["unlock", "main"], &["'provider unlock'"])?;
    let xml = "/etc/libvirt/qemu/web01.xml";
    expect(
        2,
        &["state", "restore", "-i", xml],
        &["no backup", "virtseal provider restore"],
    )?;
    sealed
        .host()
        .run(&["truncate", "--size", "65537", "/run/long"])?
        .succeeded()?;
    let long = ["provider", "restore", "other", "-i", "/run/long"];
    expect(2, &long, &["too long", "virtseal state restore"])?;
    let refused = sealed.refused_json(8, &["vm", "shred", "web01"])?;
    ensure!(refused["error"]["object"]["name"] == "web01", "{refused}");
    let over = ["volume", "create", &disk, "--size", "1M", "--vm", "web01"];
    expect(10, &over, &["exists already", "choose another path"])?;
    let nowhere = "/nowhere/x.qcow2 --from /nowhere/y --vm web01";
    let nowhere: Vec<_> = ["volume", "create"]
        .into_iter()
        .chain(nowhere.split(' '))
        .collect();
    expect(7, &nowhere, &["/nowhere does not exist"])?;
    expect(2, &["provider", "show"], &["<NAME>"])?;
    expect(
        8,
        &["provider", "delete", "main", "--force"],
        &["'main' stays", "3 objects of 1 VMs (web01) need it"],
    )?;
    let file = sealed.passphrase_file()?.display().to_string();
    let again = [
        "provider",
        "restore",
        "other",
        "-i",
        "/var/lib/virtseal/main.age",
        "--passphrase-file",
        &file,
        "--backup-passphrase-file",
        &file,
    ];
    expect(
        10,
        &again,
        &[
            "on this host already, called \"main\"",
            "Next: virtseal provider show main",
        ],
    )?;

    sealed.start_paused("web01")?;
    expect(9, &["vm", "unseal", "web01"], &["web01 is running"])?;
    sealed.destroy("web01")?;
    expect(8, &["vm", "unseal", "web01"], &["web01 stays sealed"])?;

    sealed.lock()?;
    expect(2, &["provider", "unlock", "main"], &["--passphrase-file"])?;
    let vm = SealedHost::spec("x").uuid.to_string();
    expect(
        3,
        &["volume", "create", "/run/x.qcow2", "--size", "1M", "--vm", &vm],
        &["is locked", "Next: virtseal provider unlock main"],
    )?;
    ensure!(!sealed.host().path("/run/x.qcow2").exists());
    Ok(())
}

#[test]
fn group_reads_and_root_changes() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    add_group(&sealed)?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    // Where a user can run it.
    let program = sealed.host().path("/run/virtseal-cli");
    fs::copy(built_program("virtseal")?, &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let as_user = |groups: &str, arguments: &[&str]| {
        sealed.host().run(
            &[
                &[
                    "setpriv",
                    "--reuid",
                    "12345",
                    "--regid",
                    "12345",
                    "--groups",
                    groups,
                    "/run/virtseal-cli",
                ],
                arguments,
            ]
            .concat(),
        )
    };
    for allowed in [
        &["status"][..],
        &["vm", "status", "web01"],
        &["provider", "list"],
        &["provider", "show", "main"],
        &["audit", "show"],
        &["audit", "verify"],
    ] {
        as_user(READER_GROUP, allowed)?.succeeded()?;
    }
    let new_id = SealedHost::spec("x").uuid.to_string();
    for forbidden in [
        &["vm", "seal", "web01"][..],
        &["vm", "seal", "web01", "--dry-run"],
        &["vm", "unseal", "web01"],
        &["provider", "lock", "main"],
        &["provider", "default", "main"],
        &["provider", "unlock", "main", "--passphrase-file", "/dev/null"],
        &[
            "provider",
            "add",
            "native",
            "mine",
            "--passphrase-file",
            "/dev/null",
        ],
        &[
            "provider",
            "backup",
            "main",
            "-o",
            "/tmp/virtseal-e2e-stolen",
            "--no-passphrase",
        ],
        &[
            "volume",
            "create",
            "/run/x.qcow2",
            "--size",
            "1M",
            "--vm",
            &new_id,
        ],
    ] {
        let answer = as_user(READER_GROUP, forbidden)?;
        ensure!(answer.code() == Some(6) && answer.stdout.is_empty(), "{answer:?}");
        expect_names(&answer.stderr, &["Next: "])?;
        let answer = as_user(READER_GROUP, &[forbidden, &["--json"]].concat())?;
        let told: serde_json::Value = serde_json::from_str(&answer.stdout)?;
        ensure!(
            answer.code() == Some(6) && told["error"]["code"] == 6,
            "{answer:?}"
        );
    }
    ensure!(!sealed.host().path("/tmp/virtseal-e2e-stolen").exists());
    ensure!(sealed.json(&["provider", "show", "main"])?["provider"]["state"] == "ready");

    // Whoever is in no group does not even get to the socket.
    let stranger = as_user("12345", &["status"])?;
    ensure!(stranger.code() == Some(6), "{stranger:?}");
    expect_names(&stranger.stderr, &[SealedHost::SOCKET, "ermission denied"])
}

#[test]
fn passphrases_come_from_files_descriptors_and_credentials() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let file = sealed.passphrase_file()?.display().to_string();
    let cli = built_program("virtseal")?.display().to_string();
    let locked = |sealed: &SealedHost| -> Result<()> {
        sealed.lock()?;
        ensure!(sealed.json(&["provider", "show", "main"])?["provider"]["state"] == "locked");
        Ok(())
    };
    let credentials = sealed.host().path("/run/credentials");
    fs::create_dir(&credentials)?;
    fs::write(
        credentials.join("virtseal.passphrase.main"),
        SealedHost::PASSPHRASE,
    )?;

    // With a newline, as editors leave one.
    fs::write(
        sealed.host().path("/run/typed"),
        format!("{}\n", SealedHost::PASSPHRASE),
    )?;
    for script in [
        format!("{cli} provider unlock main --passphrase-file {file}"),
        format!("{cli} provider unlock main --passphrase-file /run/typed"),
        format!("{cli} provider unlock main --passphrase-file - <{file}"),
        format!("cat {file} | {cli} provider unlock main --passphrase-file -"),
        format!("{cli} provider unlock main --passphrase-fd 7 7<{file}"),
        format!(
            "CREDENTIALS_DIRECTORY=/run/credentials {cli} provider unlock main --passphrase-credential \
             virtseal.passphrase.main"
        ),
    ] {
        locked(&sealed)?;
        sealed
            .host()
            .run(&["bash", "-o", "pipefail", "-c", &script])?
            .succeeded()?;
        ensure!(
            sealed.json(&["provider", "show", "main"])?["provider"]["state"] == "ready",
            "{script}"
        );
    }

    locked(&sealed)?;
    let wrong = sealed.host().run(&[
        "bash",
        "-c",
        &format!("echo wrong | {cli} provider unlock main --passphrase-file -"),
    ])?;
    ensure!(wrong.code() == Some(3), "{wrong:?}");
    expect_names(&wrong.stderr, &["'main'", "does not accept this passphrase"])?;
    let nothing = sealed.virtseal(&["provider", "unlock", "main", "--passphrase-file", "/dev/null"])?;
    ensure!(nothing.code() == Some(2), "{nothing:?}");
    let no_credential = sealed.virtseal(&["provider", "unlock", "main", "--passphrase-credential", "x"])?;
    ensure!(no_credential.code() == Some(2), "{no_credential:?}");
    ensure!(sealed.json(&["provider", "show", "main"])?["provider"]["state"] == "locked");

    // The daemon unlocks itself with a credential of its unit.
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&["env", "CREDENTIALS_DIRECTORY=/run/credentials"])?;
    wait_until(UNLOCK_DEADLINE, "the unlocking by a credential", || {
        Ok((sealed.json(&["provider", "show", "main"])?["provider"]["state"] == "ready").then_some(()))
    })?;

    // A wrong one is no reason not to run.
    fs::write(credentials.join("virtseal.passphrase.main"), "wrong")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&["env", "CREDENTIALS_DIRECTORY=/run/credentials"])?;
    wait_until(UNLOCK_DEADLINE, "the failed unlocking in the log", || {
        Ok(sealed
            .daemon()?
            .output()
            .contains("its credential does not unlock it")
            .then_some(()))
    })?;
    sealed.unlock()
}

#[test]
fn provider_wraps_nothing_before_its_backup_and_restores_only_where_it_is_missing() -> Result<()> {
    let sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    let file = sealed.passphrase_file()?.display().to_string();
    let vm = SealedHost::spec("x").uuid.to_string();
    let create = ["volume", "create", "/run/x.qcow2", "--size", "1M", "--vm", &vm];
    let none = sealed.virtseal(&create)?;
    ensure!(none.code() != Some(0), "{none:?}");
    expect_names(&none.stderr, &["no key provider", "virtseal provider add native"])?;

    sealed
        .virtseal(&["provider", "add", "native", "main", "--passphrase-file", &file])?
        .succeeded()?;
    ensure!(sealed.json(&["provider", "list"])?["providers"][0]["state"] == "not_backed_up");
    let early = sealed.virtseal(&create)?;
    ensure!(early.code() == Some(8), "{early:?}");
    expect_names(
        &early.stderr,
        &[
            "'main'",
            "has not been backed up",
            "virtseal provider backup main",
        ],
    )?;
    ensure!(!sealed.host().path("/run/x.qcow2").exists());

    let clear = sealed.virtseal(&[
        "provider",
        "backup",
        "main",
        "-o",
        "/run/clear",
        "--no-passphrase",
    ])?;
    expect_names(&clear.stderr, &["warning", "/run/clear", "in the clear"])?;
    clear.succeeded()?;
    let over = [
        "provider",
        "backup",
        "main",
        "-o",
        "/run/clear",
        "--passphrase-file",
        &file,
    ];
    let over = sealed.virtseal(&over)?;
    ensure!(over.code() == Some(10), "{over:?}");
    expect_names(&over.stderr, &["/run/clear", "never overwritten"])?;
    sealed.virtseal(&create)?.succeeded()?;

    let restore = [
        "provider",
        "restore",
        "main",
        "-i",
        "/run/clear",
        "--no-backup-passphrase",
        "--passphrase-file",
        &file,
    ];
    let again = sealed.virtseal(&restore)?;
    ensure!(again.code() != Some(0), "{again:?}");
    expect_names(&again.stderr, &["'main' already"])?;
    let listed = sealed.json(&["provider", "list"])?;
    ensure!(
        listed["providers"].as_array().context("no list")?.len() == 1
            && listed["providers"][0]["state"] == "ready",
        "{listed}"
    );
    Ok(())
}

/// The host's /etc/group is the machine's own, behind a link; this one is private.
fn add_group(sealed: &SealedHost) -> Result<()> {
    let groups = sealed.host().run(&["cat", "/etc/group"])?.succeeded()?;
    let own = sealed.host().path("/etc").join("group");
    fs::remove_file(&own)?;
    fs::write(&own, format!("{groups}\nvirtseal:x:{READER_GROUP}:\n"))?;
    fs::set_permissions(&own, fs::Permissions::from_mode(0o644))?;
    Ok(())
}
