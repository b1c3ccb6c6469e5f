//! What scripts rely on: exit codes, JSON, where passphrases come from, and who may do what.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
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

    // A script is told what it is about, and what leads out.
    for (arguments, kind, next) in [
        (
            ["provider", "lock", "nobody"],
            "provider",
            "virtseal provider list",
        ),
        (["vm", "status", "nobody"], "vm", "virsh list --all"),
        (
            ["provider", "show", "nobody"],
            "provider",
            "virtseal provider list",
        ),
    ] {
        let said = sealed.refused(7, &[&["--json"], &arguments[..]].concat())?;
        let error = &serde_json::from_str::<Value>(&said)?["error"];
        let subject = serde_json::json!({ "kind": kind, "name": "nobody", "object": null });
        ensure!(
            error["code"] == 7 && error["next"] == next && error["subject"] == subject,
            "{said}"
        );
    }

    // What leads out destroys nothing, and has the words of that command.
    let disk = SealedHost::spec("web01").disk.display().to_string();
    let share = ["volume", "share", &disk, "--with", "nobody"];
    expect(7, &share, &["'nobody'", "or give the UUID that it will have"])?;
    let over = ["volume", "create", &disk, "--size", "1M", "--vm", "web01"];
    expect(10, &over, &["exists already", "choose another path"])?;
    let nowhere = "/nowhere/x.qcow2 --from /nowhere/y --vm web01";
    let nowhere: Vec<_> = ["volume", "create"]
        .into_iter()
        .chain(nowhere.split(' '))
        .collect();
    expect(7, &nowhere, &["/nowhere does not exist"])?;
    expect(
        2,
        &["--json", "provider", "show"],
        &["{\"error\":{\"code\":2,", "<NAME>"],
    )?;
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
fn who_has_what_was_asked_for_is_told_so_and_not_refused() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let spec = SealedHost::spec("plain01");
    sealed.host().define(&spec)?;
    let changes = |arguments: &[&str]| -> Result<bool> {
        let said = sealed.json(arguments)?;
        said["changed"]
            .as_bool()
            .with_context(|| format!("{arguments:?}: {said}"))
    };
    let file = sealed.passphrase_file()?.display().to_string();
    let unlock = ["provider", "unlock", "main", "--passphrase-file", &file];
    let disk = SealedHost::spec("web01").disk.display().to_string();
    let other = spec.uuid.to_string();
    for (arguments, first) in [
        (&["vm", "seal", "web01"][..], false),
        (&["vm", "unseal", "plain01"], false),
        (&["provider", "default", "main"], false),
        (&unlock, false),
        (&["provider", "unlock", "main"], false),
        (&["provider", "lock", "main"], true),
        (&["provider", "lock", "main"], false),
        (&unlock, true),
        (&["volume", "share", &disk, "--with", &other], true),
        (&["volume", "share", &disk, "--with", &other], false),
        (&["volume", "share", &disk, "--without", &other], true),
        (&["volume", "share", &disk, "--without", &other], false),
        (&["provider", "tpm", "main", "--remove"], false),
    ] {
        ensure!(changes(arguments)? == first, "{arguments:?}");
    }
    sealed.start_paused("web01")?;
    ensure!(!changes(&["vm", "seal", "web01"])?, "it is sealed, and runs");
    ensure!(!changes(&["vm", "seal", "web01", "--dry-run"])?);

    let job = sealed.json(&["vm", "rekey", "web01", "--watch"])?["id"].to_string();
    let resumed = sealed.json(&["jobs", "resume", &job])?;
    ensure!(resumed["state"] == "done", "{resumed}");

    // What is there already, and may be another's, is no goal that was reached.
    for taken in [
        &["provider", "add", "native", "main", "--passphrase-file", &file][..],
        &[
            "provider",
            "backup",
            "main",
            "-o",
            &file,
            "--passphrase-file",
            &file,
        ],
        &["volume", "create", &disk, "--vm", "web01", "--size", "1M"],
    ] {
        sealed.refused(10, taken)?;
    }
    Ok(())
}

#[test]
fn every_command_answers_in_json() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = SealedHost::spec("web01");
    let disk = spec.disk.display().to_string();
    let vm = spec.uuid.to_string();
    let created = sealed.json(&["volume", "create", &disk, "--size", "64M", "--vm", &vm])?;
    ensure!(
        created["path"] == *disk && created["size"] == 64 << 20,
        "{created}"
    );
    let info = sealed.json(&["volume", "info", &disk])?;
    ensure!(
        info["envelope"]["id"] == created["envelope"] && info["envelope"]["vm"] == *vm,
        "{info}"
    );

    sealed.host().define(&spec)?;
    let outcome = sealed.json(&["vm", "seal", "web01"])?;
    ensure!(
        outcome["changed"] == true && outcome["steps"].is_array(),
        "{outcome}"
    );
    let vms = sealed.json(&["vm", "status"])?;
    ensure!(
        vms[0]["name"] == "web01" && vms[0]["state"] == "sealed" && vms[0]["power"] == "off",
        "{vms}"
    );
    let status = sealed.json(&["status"])?;
    ensure!(
        status["libvirt"] == "connected" && status["armed"] == 0,
        "{status}"
    );
    ensure!(status["vms"] == vms, "{status}");
    let providers = sealed.json(&["provider", "list"])?;
    ensure!(providers == status["providers"] && providers == sealed.json(&["provider", "show", "main"])?);
    ensure!(
        providers[0]["state"] == "ready" && providers[0]["is_default"] == true,
        "{providers}"
    );
    ensure!(providers[0]["envelopes"] == 3, "{providers}");
    for done in [
        &["provider", "default", "main"][..],
        &["provider", "lock", "main"],
    ] {
        ensure!(sealed.json(done)?["done"].is_string());
    }
    let verified = sealed.json(&["audit", "verify"])?;
    ensure!(verified["records"].as_i64() >= Some(4), "{verified}");
    let log = sealed.virtseal(&["audit", "show", "--json"])?.succeeded()?;
    let records: Vec<serde_json::Value> = log
        .lines()
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    for record in &records {
        ensure!(record["actor"] == 0, "all of it was asked for by root: {record}");
    }
    let operations: Vec<_> = records.iter().map(|record| &record["op"]).collect();
    let table = sealed.virtseal(&["audit", "show"])?.succeeded()?;
    ensure!(
        table.contains("UID") && table.contains("provider-backup"),
        "{table}"
    );
    for operation in [
        "provider-add",
        "provider-backup",
        "volume-create",
        "seal",
        "provider-lock",
    ] {
        ensure!(
            operations.iter().any(|found| *found == operation),
            "{operation} is not in {log}"
        );
    }
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
        ensure!(answer.code() == Some(6), "{answer:?}");
        expect_names(&answer.stderr, &["Next: "])?;
    }
    ensure!(!sealed.host().path("/tmp/virtseal-e2e-stolen").exists());
    ensure!(sealed.json(&["provider", "show", "main"])?[0]["state"] == "ready");

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
        ensure!(sealed.json(&["provider", "show", "main"])?[0]["state"] == "locked");
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
            sealed.json(&["provider", "show", "main"])?[0]["state"] == "ready",
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
    ensure!(sealed.json(&["provider", "show", "main"])?[0]["state"] == "locked");

    // The daemon unlocks itself with a credential of its unit.
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&["env", "CREDENTIALS_DIRECTORY=/run/credentials"])?;
    wait_until(UNLOCK_DEADLINE, "the unlocking by a credential", || {
        Ok((sealed.json(&["provider", "show", "main"])?[0]["state"] == "ready").then_some(()))
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
    ensure!(sealed.json(&["provider", "list"])?[0]["state"] == "not_backed_up");
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
    let state = sealed.json(&["provider", "list"])?;
    ensure!(
        state.as_array().context("no list")?.len() == 1 && state[0]["state"] == "ready",
        "{state}"
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

/// Who may define VMs chooses their names, and writes what their metadata says of providers.
#[test]
fn what_others_wrote_commands_neither_the_terminal_nor_the_shell() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    for name in [
        "-x $(cd run; touch owned) `cd run; touch owned`",
        "--all",
        "my; cd run; touch owned #",
    ] {
        let mut spec = SealedHost::spec("plain");
        spec.name = name.to_owned();
        spec.uuid = uuid::Uuid::new_v4();
        host.run(&[
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "/var/lib/libvirt/images/plain.qcow2",
            "8M",
        ])?
        .succeeded()?;
        host.define(&spec)?;
        host.virsh(&["start", "--paused", "--", name])?.succeeded()?;
        let said = sealed.virtseal(&["vm", "seal", "--", name])?.refused()?;
        let (_, advised) = said.split_once("Next: ").with_context(|| said.clone())?;
        ensure!(advised.starts_with("virsh shutdown "), "{advised}");
        // As an administrator pastes it.
        let (first, _) = advised.split_once(", then ").context("no second step")?;
        let pasted = first.replace("virsh shutdown", "virsh destroy");
        host.run(&["bash", "-c", &pasted])?.succeeded()?;
        ensure!(
            host.virsh(&["list", "--name"])?.succeeded()?.is_empty(),
            "another VM was meant"
        );
        ensure!(!host.path("/run/owned").exists(), "{advised}");
        host.virsh(&["undefine", "--nvram", "--tpm", "--", name])?
            .succeeded()?;
    }

    let secret = uuid::Uuid::new_v4();
    let spec = SealedHost::spec("web01");
    let hint = r"\u001b]0;owned\u0007\u001b[2J\u202e";
    let envelope = format!(
        r#"{{"version":1,"id":"{secret}","vm":"{}","kind":"disk","generation":1,"stanzas":[{{"provider":"{}","provider_name":"{hint}","kek":"{hint}","mechanism":"{hint}","body":"AAAA"}}]}}"#,
        spec.uuid,
        uuid::Uuid::new_v4(),
    );
    sealed.seal_new("web01")?;
    let xml = sealed.dumpxml("web01")?;
    let (before, rest) = xml.split_once("<virtseal:envelope").context("no envelope")?;
    let (_, after) = rest.split_once("</virtseal:envelope>").context("no end of it")?;
    let planted = format!("{before}<virtseal:envelope id='{secret}'>{envelope}</virtseal:envelope>{after}");
    let known = rest
        .split_once("id=")
        .and_then(|(_, rest)| rest.get(1..37))
        .context("no id")?;
    host.define_xml(&planted.replace(known, &secret.to_string()))?;
    for command in [
        &["vm", "status"][..],
        &["vm", "status", "web01"],
        &["status"],
        &["--json", "vm", "status"],
    ] {
        let answer = sealed.virtseal(command)?;
        let printed = format!("{}{}", answer.stdout, answer.stderr);
        ensure!(!printed.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{printed:?}");
        // The status of a host names no provider of a VM that something else keeps off.
        ensure!(
            command == ["status"] || printed.contains("owned"),
            "the hint is not there at all: {printed}"
        );
    }
    let refused = sealed.refused_start("web01")?;
    ensure!(!refused.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{refused:?}");
    Ok(())
}
