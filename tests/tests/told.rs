//! What virtseal tells to run, run as it is printed: one refusal after the other, until what was asked for is done. Together with the
//! stories of odd disks and of ways out these follow the cases of advice that `plugin/src/cli/documented/followed.rs` lists.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{
    DomainSpec, DomainState, HostBuilder, SealedHost, Way, edit_keystore, edited, expect_names,
};

const IMAGES: &str = "/var/lib/libvirt/images";
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";

/// What a command says that is refused, or of which a dry run says why it would be.
fn refused(sealed: &SealedHost, command: &[&str]) -> Result<String> {
    sealed.virtseal(command)?.refused()
}

/// Plain, with an empty qcow2 disk.
fn define_plain(sealed: &SealedHost, name: &str) -> Result<DomainSpec> {
    let spec = SealedHost::spec(name);
    let disk = spec.disk.display().to_string();
    let create = ["qemu-img", "create", "-q", "-f", "qcow2", &disk, "64M"];
    sealed.host().run(&create)?.succeeded()?;
    sealed.host().define(&spec)?;
    Ok(spec)
}

#[test]
fn a_host_without_a_provider_gets_one_and_a_vm_starts() -> Result<()> {
    let sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    let typed = [SealedHost::PASSPHRASE, SealedHost::PASSPHRASE];
    define_plain(&sealed, "web01")?;
    let told = refused(&sealed, &["vm", "seal", "web01"])?;
    Way::that_begins("virtseal provider add native", &told)?
        .typing(&typed)
        .take(&sealed)?;
    let told = refused(&sealed, &["vm", "seal", "web01"])?;
    Way::that_begins("virtseal provider backup main", &told)?
        .with("FILE", "/run/main.age")
        .typing(&typed)
        .take(&sealed)?;
    let told = sealed.run(&["vm", "seal", "web01"])?;
    Way::that_begins("virsh start", &told)?.take(&sealed)?;
    sealed.destroy("web01")?;

    sealed.run(&["provider", "lock", "main"])?;
    let told = sealed.refused_start("web01")?;
    Way::that_begins("virtseal provider unlock main", &told)?
        .typing(&typed[..1])
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // Names that there are not.
    let told = refused(&sealed, &["provider", "show", "nosuch"])?;
    Way::that_begins("virtseal provider list", &told)?.take(&sealed)?;
    let told = refused(&sealed, &["vm", "seal", "nosuch"])?;
    Way::that_begins("virsh list", &told)?.take(&sealed)?;
    Ok(())
}

#[test]
fn what_is_refused_of_a_vm_is_done_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    // A plain one is libvirt's to start with the host.
    define_plain(&sealed, "web01")?;
    let told = refused(&sealed, &["vm", "autostart", "web01"])?;
    Way::that_begins("virsh autostart", &told)?.take(&sealed)?;
    let printed = sealed.run(&["vm", "seal", "web01"])?;
    expect_names(&printed, &["web01 is sealed"])?;
    let told = sealed.run(&["status"])?;
    Way::that_begins("virtseal vm autostart", &told)?.take(&sealed)?;
    let told = sealed.run(&["status"])?;
    ensure!(!told.contains("autostart"), "{told}");

    // Its variables are lost: made anew, at the start's word and at that of `vm seal`.
    sealed.expect_start("web01")?;
    let store = format!("{NVRAM}/web01_VARS.fd");
    fs::remove_file(host.path(&store))?;
    let told = sealed.refused_start("web01")?;
    let told = Way::that_begins("virtseal vm nvram reset", &told)?.refused(&sealed)?;
    Way::that_begins("virtseal vm nvram reset --yes-reset", &told)?.take(&sealed)?;
    sealed.expect_start("web01")?;
    fs::remove_file(host.path(&store))?;
    let told = refused(&sealed, &["vm", "seal", "web01"])?;
    Way::that_begins("virtseal vm seal --replace", &told)?.take(&sealed)?;
    sealed.expect_start("web01")?;

    // Two obstacles, and a store with snapshots.
    let odd = define_plain(&sealed, "odd01")?;
    let (vars, store) = (odd.firmware.variables.display().to_string(), odd.nvram());
    let path = store.display().to_string();
    host.run(&["qemu-img", "convert", "-O", "qcow2", &vars, &path])?
        .succeeded()?;
    host.run(&["qemu-img", "snapshot", "-c", "one", &path])?
        .succeeded()?;
    let tpm = "<tpm model='tpm-tis'><backend type='emulator' version='1.2'/></tpm><memballoon";
    let xml = odd.xml();
    host.define_xml(&edited(&xml, "<memballoon", tpm)?)?;
    let told = refused(&sealed, &["vm", "seal", "odd01"])?;
    let all = Way::that_begins("virtseal vm seal --dry-run", &told)?.refused(&sealed)?;
    Way::that_begins("virsh snapshot-list", &all)?.take(&sealed)?;
    let told = Way::that_begins("put a copy without them", &all)?.refused(&sealed)?;
    let printed = Way::that_begins("virsh edit", &told)?
        .editing(move |_| Ok(xml.clone()))
        .take(&sealed)?;
    expect_names(&printed, &["odd01 is sealed"])?;
    sealed.expect_start("odd01")?;

    // It runs, and its keys are to go.
    host.virsh(&["start", "odd01"])?.succeeded()?;
    let told = refused(&sealed, &["vm", "shred", "--yes-shred=odd01", "odd01"])?;
    Way::that_begins("virsh shutdown", &told)?.take(&sealed)?;
    // Its firmware may not hear that.
    if host.state("odd01")? != DomainState::ShutOff {
        sealed.destroy("odd01")?;
    }
    let told = refused(&sealed, &["vm", "shred", "--yes-shred=other", "odd01"])?;
    let printed = Way::that_begins("virtseal vm shred --yes-shred=odd01", &told)?.take(&sealed)?;
    expect_names(&printed, &["survive"])?;
    Ok(())
}

#[test]
fn a_vm_that_went_to_another_host_is_forgotten_and_comes_back_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    let dump = "/run/web01.xml";
    fs::write(host.path(dump), sealed.dumpxml("web01")?)?;

    let told = refused(&sealed, &["vm", "forget", "web01"])?;
    Way::that_begins("virsh undefine", &told)?.take(&sealed)?;
    let told = refused(&sealed, &["vm", "forget", "web01"])?;
    Way::that_begins("virsh define", &told)?
        .with("FILE", dump)
        .take(&sealed)?;
    sealed.expect_start("web01")?;
    host.undefine("web01")?;

    let away = format!(
        "mkdir /run/away && mv {IMAGES}/web01.qcow2 {NVRAM}/web01_VARS.fd /var/lib/libvirt/swtpm/{} /run/away",
        spec.uuid
    );
    host.run(&["sh", "-c", &away])?.succeeded()?;
    Way::that_begins("move that", &told)?
        .after("move that")
        .through("virtseal vm forget")?
        .take(&sealed)?;
    let back = format!(
        "cd /run/away && mv web01.qcow2 {IMAGES} && mv web01_VARS.fd {NVRAM} && mv {} /var/lib/libvirt/swtpm",
        spec.uuid
    );
    host.run(&["sh", "-c", &back])?.succeeded()?;
    // Its XML without what travels with it: only a dumpxml that has that leads on.
    let xml = fs::read_to_string(host.path(dump))?;
    host.define_xml(&without_envelopes(&xml)?)?;
    let told = sealed.refused_start("web01")?;
    Way::that_begins("virsh define", &told)?
        .with("FILE", dump)
        .take(&sealed)?;
    sealed.expect_start("web01")
}

/// Marked as sealed, and no more.
fn without_envelopes(xml: &str) -> Result<String> {
    let mut xml = xml.to_owned();
    while let Some(at) = xml.find("<virtseal:envelope") {
        let end = "</virtseal:envelope>";
        let length = xml[at..].find(end).context("no end of an envelope")? + end.len();
        xml.replace_range(at..at + length, "");
    }
    Ok(xml)
}

#[test]
fn what_is_refused_of_a_volume_is_done_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    let disk = spec.disk.display().to_string();

    // Saved: another size comes after its next start.
    host.virsh(&["start", "web01"])?.succeeded()?;
    host.virsh(&["managedsave", "web01"])?.succeeded()?;
    let told = refused(&sealed, &["volume", "resize", &disk, "128M"])?;
    Way::that_begins("virsh start", &told)?
        .through("virtseal volume resize")?
        .take(&sealed)?;
    // Somebody has it open.
    let told = sealed.refused(9, &["volume", "check", &disk])?;
    sealed.destroy("web01")?;
    Way::that_begins("virtseal volume check", &told)?.take(&sealed)?;
    let told = refused(&sealed, &["volume", "resize", &disk, "64M"])?;
    Way::that_begins("make its file systems", &told)?
        .after("make its file systems")
        .through("virtseal volume resize --shrink")?
        .typing(&["web01"])
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // Another VM is to have it too.
    let other = sealed.seal_new("db01")?;
    let own = other.disk.display().to_string();
    let xml = sealed.dumpxml("db01")?;
    let theirs = secret_of(&sealed.dumpxml("web01")?)?;
    let taken = xml.replace(&own, &disk).replace(&secret_of(&xml)?, &theirs);
    host.define_xml(&taken)?;
    let told = sealed.refused_start("db01")?;
    Way::that_begins("virtseal volume share", &told)?.take(&sealed)?;
    sealed.expect_start("db01")?;
    host.define_xml(&xml)?;

    // A wrong path, then one that was deleted without a word, and one that only was elsewhere.
    let none = format!("{IMAGES}/none.qcow2");
    let told = refused(&sealed, &["volume", "forget", &none])?;
    let listed = Way::that_begins("virtseal provider orphans", &told)?.take(&sealed)?;
    ensure!(!listed.contains(&none), "{listed}");
    let told = refused(&sealed, &["volume", "forget", &own])?;
    Way::that_begins("virtseal volume forget --force", &told)?
        .typing(&["db01"])
        .take(&sealed)?;
    let told = refused(&sealed, &["volume", "share", &own, "--with", "web01"])?;
    Way::that_begins("virtseal volume adopt", &told)?.take(&sealed)?;
    sealed.expect_start("db01")?;
    let overlay = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "/run/base.raw",
        "-F",
        "raw",
    ];
    let top = format!("{IMAGES}/top.qcow2");
    host.run(&[&overlay[..], &[&top, "8M"]].concat())?.succeeded()?;
    let new = format!("{IMAGES}/new.qcow2");
    let told = refused(
        &sealed,
        &["volume", "create", &new, "--vm", "web01", "--from", &top],
    )?;
    Way::that_begins("virtseal volume info", &told)?.take(&sealed)?;
    Ok(())
}

/// The UUID of the secret of its first disk.
fn secret_of(xml: &str) -> Result<String> {
    let disk = xml.find("<disk ").context("no disk")?;
    let secret = disk + xml[disk..].find("<secret ").context("no secret")?;
    let uuid = secret + xml[secret..].find("uuid='").context("no UUID")? + "uuid='".len();
    Ok(xml[uuid..uuid + 36].to_owned())
}

#[test]
fn a_job_that_waits_is_ended_or_helped_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.add_provider("spare")?;
    let told = refused(&sealed, &["jobs", "watch"])?;
    Way::that_begins("virtseal jobs", &told)?.take(&sealed)?;
    sealed.run(&["provider", "lock", "spare"])?;
    sealed.run(&["provider", "move", "main", "spare"])?;
    let id = sealed.last_job()?["id"].to_string();
    let told = refused(&sealed, &["provider", "recipients", "add", "spare"])?;
    Way::that_begins("virtseal jobs abort", &told)?.take(&sealed)?;
    let told = refused(&sealed, &["jobs", "watch", &id])?;
    let printed = Way::that_begins("virtseal jobs resume", &told)?.take(&sealed)?;
    sealed.unlock_provider("spare")?;
    Way::named("virtseal jobs watch", &printed)?.take(&sealed)?;

    // What is in the way of a deletion goes first.
    let told = refused(&sealed, &["provider", "delete", "spare"])?;
    let moved = Way::that_begins("virtseal provider move", &told)?.take(&sealed)?;
    Way::named("virtseal jobs watch", &moved)?.take(&sealed)?;
    sealed.wait_for_copies(0)?;
    sealed.expect_start("web01")
}

#[test]
fn a_job_of_another_version_is_ended_as_it_says() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.add_provider("spare")?;
    sealed.run(&["provider", "lock", "spare"])?;
    sealed.run(&["provider", "move", "main", "spare"])?;
    let begun = sealed.last_job()?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(&sealed, |keystore| {
        let changed = keystore.execute(
            "UPDATE jobs SET task = '{\"later\": 1}' WHERE state = 'running'",
            [],
        )?;
        ensure!(changed == 1, "{changed} jobs");
        Ok(())
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    let told = refused(&sealed, &["provider", "delete", "spare"])?;
    Way::that_begins("virtseal jobs abort", &told)?.take(&sealed)?;
    let ended = sealed.last_job()?;
    ensure!(
        ended["id"] == begun["id"] && ended["state"] == "aborted",
        "{ended}"
    );
    sealed.run(&["provider", "delete", "spare"])?;
    sealed.expect_start("web01")
}

#[test]
fn a_provider_with_an_older_root_key_gets_its_own_back_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    fs::write(sealed.host().path("/run/wrong"), "another passphrase")?;
    let wrong = ["provider", "rotate", "main", "--passphrase-file", "/run/wrong"];
    let typed = [SealedHost::PASSPHRASE; 3];
    let told = refused(&sealed, &wrong)?;
    Way::that_begins("virtseal provider rotate", &told)?
        .typing(&typed[..1])
        .take(&sealed)?;
    let newest = "/run/newest.age";
    let file = sealed.passphrase_file()?.display().to_string();
    sealed.run(&[
        "provider",
        "backup",
        "main",
        "-o",
        newest,
        "--passphrase-file",
        &file,
    ])?;
    sealed.wait_for_copies(0)?;
    sealed.expect_start("web01")?;

    // Somebody brings back what was backed up first.
    sealed.run(&["provider", "delete", "main", "--force", "--yes-delete", "main"])?;
    let oldest = [
        "provider",
        "restore",
        "main",
        "--input",
        "/var/lib/virtseal/main.age",
    ];
    let passphrases = ["--backup-passphrase-file", &file, "--passphrase-file", &file];
    sealed.run(&[&oldest[..], &passphrases].concat())?;
    let told = refused(
        &sealed,
        &["provider", "rotate", "main", "--passphrase-file", &file],
    )?;
    Way::named("virtseal state backup", &told)?
        .with("FILE", "/run/state.age")
        .after("virtseal provider")
        .typing(&typed[..2])
        .take(&sealed)?;
    Way::named("virtseal provider delete main --force", &told)?
        .after("virtseal provider restore")
        .typing(&["main"])
        .take(&sealed)?;
    Way::named("virtseal provider restore main", &told)?
        .with("FILE", newest)
        .typing(&typed)
        .take(&sealed)?;
    sealed.expect_start("web01")
}

#[test]
fn of_two_vms_that_had_one_name_each_is_meant_by_its_uuid_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    let first = sealed.seal_new("twin")?;
    sealed.host().undefine("twin")?;
    fs::remove_file(sealed.host().path(first.nvram()))?;
    let second = DomainSpec {
        disk: format!("{IMAGES}/other.qcow2").into(),
        ..SealedHost::spec("twin")
    };
    sealed.seal_empty(&second)?;
    sealed.host().undefine("twin")?;
    let told = refused(&sealed, &["vm", "status", "twin"])?;
    Way::that_begins("virtseal vm status UUID", &told)?
        .with("UUID", &second.uuid.to_string())
        .take(&sealed)?;
    let told = refused(&sealed, &["vm", "shred", "twin"])?;
    Way::that_begins("virtseal vm shred UUID", &told)?
        .with("UUID", &first.uuid.to_string())
        .typing(&["twin"])
        .take(&sealed)?;
    // Now the name is the other's alone.
    let left = sealed.json(&["vm", "status", "twin"])?["vms"][0]["uuid"].take();
    ensure!(left == second.uuid.to_string(), "{left}");
    Ok(())
}

#[test]
fn what_is_lost_of_the_host_is_seen_and_comes_back_as_it_says() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let passphrase = sealed.passphrase_file()?;
    let passphrase = passphrase.to_str().context("UTF-8")?.to_owned();
    let backup = [
        "state",
        "backup",
        "-o",
        "/run/state.age",
        "--passphrase-file",
        &passphrase,
    ];
    sealed.run(&backup)?;
    // A record that is nowhere else.
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(&sealed, |keystore| {
        keystore.execute_batch("PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF")?;
        Ok(keystore.execute("UPDATE providers SET name = x'00'", [])?)
    })?;
    sealed.start_daemon()?;
    let told = sealed.run(&["status"])?;
    let told = Way::named("virtseal state restore -i FILE", &told)?
        .with("FILE", &format!("/run/state.age --passphrase-file {passphrase}"))
        .refused(&sealed)?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    Way::that_begins("virtseal state restore --yes-replace", &told)?
        .typing(&[SealedHost::PASSPHRASE])
        .take(&sealed)?;
    // Its log is cut by somebody.
    let log = sealed.host().path("/var/lib/virtseal/audit.log");
    let whole = fs::read_to_string(&log)?;
    let cut: Vec<_> = whole.lines().collect();
    fs::write(&log, cut[..cut.len() - 1].join("\n") + "\n")?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    let told = sealed.run(&["status"])?;
    expect_names(&told, &["critical: the audit log"])?;
    Way::that_begins("virtseal audit verify", &told)?.refused(&sealed)?;
    sealed.expect_start("web01")
}

#[test]
fn a_provider_is_given_up_and_comes_back_as_it_says() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.add_provider("spare")?;
    // Nobody else opens it.
    let told = refused(&sealed, &["provider", "recipients", "remove", "main"])?;
    let printed = Way::that_begins("virtseal provider recipients add", &told)?
        .with("OTHER", "spare")
        .take(&sealed)?;
    Way::named("virtseal jobs watch", &printed)?.take(&sealed)?;
    let delete = ["provider", "delete", "main"];
    Way::that_begins("virtseal provider default", &refused(&sealed, &delete)?)?
        .with("OTHER", "spare")
        .take(&sealed)?;
    let printed = Way::that_begins("virtseal provider recipients remove", &refused(&sealed, &delete)?)?
        .take(&sealed)?;
    Way::named("virtseal jobs watch", &printed)?.take(&sealed)?;
    sealed.wait_for_copies(0)?;
    let deleted = sealed.virtseal(&delete)?;
    sealed.expect_start("web01")?;
    // Another host may have needed it.
    Way::named("virtseal provider restore main", &deleted.stderr)?
        .typing(&[SealedHost::PASSPHRASE; 3])
        .take(&sealed)?;
    sealed.run(&delete)?;

    // The last one, and what it was for stays off until it is back.
    let told = refused(
        &sealed,
        &["provider", "delete", "spare", "--force", "--yes-delete", "spaer"],
    )?;
    Way::that_begins("virtseal provider delete spare", &told)?.refused(&sealed)?;
    sealed.run(&["provider", "delete", "spare", "--force", "--yes-delete", "spare"])?;
    let told = sealed.refused_start("web01")?;
    Way::that_begins("virtseal provider restore spare", &told)?
        .with("FILE", "/var/lib/virtseal/spare.age")
        .typing(&[SealedHost::PASSPHRASE; 3])
        .take(&sealed)?;
    sealed.expect_start("web01")
}
