//! A key in libvirt serves the VM that it was armed for and no other: not a plain VM that names its secret, not the sealed VM
//! itself under an XML of before, and not for longer than the start takes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{DomainSpec, DomainState, SealedHost, Way, edited, expect_names, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
const IMAGES: &str = "/var/lib/libvirt/images";
const HOOK: &str = "/etc/libvirt/hooks/qemu.d/virtseal";
/// Keeps the VM `victim` at `start begin`, when libvirt has its keys and QEMU does not run yet.
const GATE: &str = "#!/bin/sh
[ \"$1 $2\" = 'victim start' ] && [ -e /run/gate ] || exit 0
: >/run/at-the-gate
while [ -e /run/gate ]; do sleep 0.05; done
";
/// libvirt's `started` never gets through.
const DEAF: &str = "#!/bin/sh
[ \"$2\" = started ] && exit 0
exec /run/virtseal-hook \"$@\"
";

#[test]
fn who_names_anothers_secret_is_refused_while_it_is_armed_and_without_a_daemon() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    install(&mut sealed, "zz-gate", GATE)?;
    sealed.seal_new("victim")?;
    sealed.seal_new("mallory")?;
    let secret = secret_of_disk(&sealed, "victim")?;
    let copy = format!("{IMAGES}/thief.qcow2");
    sealed
        .host()
        .run(&["cp", &format!("{IMAGES}/victim.qcow2"), &copy])?
        .succeeded()?;
    let thief = thief_with(&format!("<secret type='passphrase' uuid='{secret}'/>"))?;
    sealed.host().define_xml(&thief)?;

    let mut start = start_to_the_gate(&sealed)?;
    ensure!(
        sealed.secrets()?.len() == 3,
        "nothing to steal: {:?}",
        sealed.secrets()?
    );
    let refused = sealed.host().virsh(&["start", "--paused", "thief"])?.refused()?;
    expect_names(&refused, &["thief stays off", &secret, "virsh edit thief"])?;
    // No more does a VM that has objects of its own sealed.
    expect_names(
        &sealed_thief(&sealed, &secret)?,
        &["mallory stays off", &secret, "virsh edit mallory"],
    )?;
    // What keeps it out is the index: a hook that has none lets it in, and the copy opens.
    hook_conf(&sealed, "index = /nonexistent/hook.index\n")?;
    sealed
        .host()
        .virsh(&["start", "--paused", "thief"])?
        .succeeded()?;
    sealed.destroy("thief")?;
    hook_conf(&sealed, "")?;
    fs::remove_file(sealed.host().path("/run/gate"))?;
    ensure!(start.wait()?.success(), "the victim itself did not start");
    sealed.expect_no_secrets()?;

    sealed.stop_daemon(Signal::SIGKILL)?;
    let backing = "<backingStore type='file'><format type='qcow2'/><source file='/b.qcow2'><encryption format='luks'>\
        <secret type='passphrase' uuid='SECRET'/></encryption></source><backingStore/></backingStore>";
    for named in [
        "<encryption format='luks'><secret type='passphrase' usage='virtseal:SECRET'/></encryption>",
        "<encryption format='luks'><secret type='passphrase' uuid='SECRET'/></encryption>",
        backing,
    ] {
        let named = named.replace("SECRET", &secret);
        sealed.host().define_xml(&thief_named(&named)?)?;
        expect_names(&sealed.refused_start("thief")?, &["thief stays off", &secret])?;
    }
    let in_tpm = edited(
        &thief_named("")?,
        "</devices>",
        &format!(
            "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><encryption secret='{secret}'/></backend></tpm>\
             </devices>"
        ),
    )?;
    sealed.host().define_xml(&in_tpm)?;
    expect_names(&sealed.refused_start("thief")?, &["thief stays off", &secret])?;

    start_with_a_secret_of_others(&sealed)
}

/// A sealed VM with a copy of the victim's image as a disk that it only reads, and finds the key of by usage.
fn sealed_thief(sealed: &SealedHost, secret: &str) -> Result<String> {
    let mallory = edited(
        &sealed.dumpxml("mallory")?,
        "</devices>",
        &format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{IMAGES}/thief.qcow2'>\
             <encryption format='luks'><secret type='passphrase' usage='virtseal:{secret}'/></encryption></source>\
             <target dev='vdz' bus='virtio'/><readonly/></disk></devices>"
        ),
    )?;
    sealed.host().define_xml(&mallory)?;
    sealed.host().virsh(&["start", "--paused", "mallory"])?.refused()
}

/// Nova's and CloudStack's VMs: the secret is in libvirt for good, and none of virtseal's business.
fn start_with_a_secret_of_others(sealed: &SealedHost) -> Result<()> {
    let host = sealed.host();
    let uuid = "c0ffee00-0002-4fd5-9aa1-0d1f44a3e9b7";
    let disk = format!("{IMAGES}/cloud.qcow2");
    fs::write(
        host.path("/run/secret.xml"),
        format!(
            "<secret ephemeral='no' private='yes'><uuid>{uuid}</uuid><usage type='volume'><volume>{disk}</volume></usage></secret>"
        ),
    )?;
    fs::write(host.path("/run/key"), "passphrase")?;
    host.virsh(&["secret-define", "/run/secret.xml"])?.succeeded()?;
    host.virsh(&["secret-set-value", uuid, "--file", "/run/key", "--plain"])?
        .succeeded()?;
    host.run(&[
        "qemu-img",
        "create",
        "-q",
        "--object",
        "secret,id=s,file=/run/key",
        "-f",
        "qcow2",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        &disk,
        "8M",
    ])?
    .succeeded()?;
    let cloud = encrypted_disk("cloud", &format!("<secret type='passphrase' uuid='{uuid}'/>"))?;
    host.define_xml(&cloud)?;
    host.virsh(&["start", "--paused", "cloud"])?.succeeded()?;
    sealed.destroy("cloud")
}

#[test]
fn the_old_xml_of_a_sealed_vm_is_refused_until_vm_seal_takes_it_back() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let disk = sealed.host().empty_disk("web01", 64 << 20)?;
    sealed.host().define(&DomainSpec::minimal("web01", &disk))?;
    let old = sealed.dumpxml("web01")?;
    // A seal that fails before it did anything leaves the VM as it was.
    sealed.lock()?;
    sealed.refused(3, &["vm", "seal", "web01"])?;
    sealed.expect_start("web01")?;
    sealed.unlock()?;
    sealed.run(&["vm", "seal", "web01"])?;

    sealed.host().define_xml(&old)?;
    let names = ["web01", "it is sealed", "virtseal vm seal web01"];
    expect_names(&sealed.refused_start("web01")?, &names)?;
    // By the hook alone, and virtseald was there to note it.
    let audit = sealed.run(&["audit", "show"])?;
    expect_names(&audit, &["prepare", "refused", "web01", "it is sealed"])?;
    sealed.stop_daemon(Signal::SIGKILL)?;
    expect_names(&sealed.refused_start("web01")?, &names)?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    sealed.run(&["vm", "seal", "web01"])?;
    sealed.expect_start("web01")
}

#[test]
fn an_unsealed_vm_starts_and_an_empty_mark_is_no_seal() -> Result<()> {
    let sealed = SealedHost::start()?;
    let disk = sealed.host().empty_disk("web02", 64 << 20)?;
    let spec = DomainSpec {
        tpm: false,
        ..DomainSpec::minimal("web02", &disk)
    };
    sealed.host().define(&spec)?;
    sealed.run(&["vm", "seal", "web02"])?;
    sealed.run(&["vm", "unseal", "web02"])?;
    sealed.expect_start("web02")?;
    let tpm = spec.tpm_state();
    let tpm = tpm.parent().context("a directory")?.to_str().context("UTF-8")?;
    sealed.host().run(&["rm", "-r", tpm])?.succeeded()?;

    // The images of a sealed VM came back from a plain backup, its XML too.
    sealed.run(&["vm", "seal", "web02"])?;
    sealed.host().undefine("web02")?;
    sealed
        .host()
        .run(&["rm", disk.to_str().context("UTF-8")?])?
        .succeeded()?;
    sealed.host().empty_disk("web02", 64 << 20)?;
    let nvram = spec.nvram();
    sealed
        .host()
        .run(&["rm", "-f", nvram.to_str().context("UTF-8")?])?
        .succeeded()?;
    sealed.host().define(&spec)?;
    expect_names(&sealed.refused_start("web02")?, &["it is sealed"])?;
    sealed.run(&["vm", "unseal", "web02"])?;
    sealed.expect_start("web02")?;

    hook_conf(&sealed, "require_sealed = true\n")?;
    sealed.host().define_xml(
        "<domain type='qemu'><name>marked</name><metadata><v:vm xmlns:v='urn:virtseal:vm:1'/></metadata>\
         <memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>\
         <filesystem type='mount'><source dir='/srv'/><target dir='all'/></filesystem></devices></domain>",
    )?;
    expect_names(
        &sealed.refused_start("marked")?,
        &[
            "marked stays off",
            "nothing of it is",
            "require_sealed",
            "virtseal vm seal marked",
        ],
    )
}

#[test]
fn keys_go_when_nobody_says_that_the_vm_has_started() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.configure("hook_deadline: 2s\n")?;
    sealed.daemon()?.signal(Signal::SIGHUP)?;
    install(&mut sealed, "zz-gate", GATE)?;
    let hook = sealed.host().path(HOOK);
    fs::copy(&hook, sealed.host().path("/run/virtseal-hook"))?;
    fs::write(&hook, DEAF)?;
    sealed.seal_new("victim")?;

    // A start that is slow keeps them, for as long as it takes.
    let mut start = start_to_the_gate(&sealed)?;
    std::thread::sleep(Duration::from_secs(5));
    ensure!(sealed.secrets()?.len() == 3, "{:?}", sealed.secrets()?);
    fs::remove_file(sealed.host().path("/run/gate"))?;
    ensure!(start.wait()?.success(), "the slow start failed");
    ensure!(sealed.host().state("victim")? == DomainState::Paused);
    wait_until(PATIENCE, "the keys of a VM that runs to go", || {
        Ok((sealed.secrets()?.is_empty() && sealed.json(&["status"])?["armed"] == 0).then_some(()))
    })?;
    ensure!(sealed.host().state("victim")? == DomainState::Paused);
    sealed.destroy("victim")
}

/// libvirt writes a quote of an XML in six bytes, and tells no XML of more than 4 MiB: so what somebody defines it may never tell again.
#[test]
fn a_vm_of_which_libvirt_does_not_tell_all_hides_no_other() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    sealed.seal_new("web01")?;
    for name in ["evil", "web02"] {
        let disk = host.empty_disk(name, 8 << 20)?;
        host.define(&DomainSpec::minimal(name, &disk))?;
    }
    let refused = |command: &[&str], words: &[&str]| -> Result<String> {
        let said = sealed.virtseal(command)?.refused()?;
        expect_names(&said, words)?;
        Ok(said)
    };

    let small = host.virsh(&["dumpxml", "--inactive", "evil"])?.succeeded()?;
    let large = told_never(&small)?;
    host.define_xml(&large)?;
    host.virsh(&["dumpxml", "evil"])?.refused()?;
    ensure!(states(&sealed)? == [("web01".to_owned(), "sealed".to_owned())]);
    sealed.expect_start("web01")?;
    let said = refused(
        &["vm", "seal", "web02"],
        &["the XML of VM evil", "virsh define", "virsh undefine"],
    )?;
    Way::named("virsh undefine", &said)?.take(&sealed)?;

    host.define_xml(&small)?;
    let snapshot = format!(
        "<domainsnapshot><name>s 1</name><state>shutoff</state><creationTime>1</creationTime><memory snapshot='no'/><disks>\
         <disk name='vda' snapshot='external'><driver type='qcow2'/><source file='{IMAGES}/evil.s1'/></disk></disks>{large}\
         </domainsnapshot>"
    );
    fs::write(host.path("/run/snapshot.xml"), snapshot)?;
    host.virsh(&["snapshot-create", "--redefine", "evil", "/run/snapshot.xml"])?
        .succeeded()?;
    let said = refused(&["vm", "seal", "web02"], &["the snapshot s 1 of VM evil"])?;
    Way::named("virsh snapshot-delete", &said)?.take(&sealed)?;
    sealed.run(&["vm", "seal", "web02"])?;

    // Of a sealed one it is said.
    let known = sealed.dumpxml("web01")?;
    host.define_xml(&told_never(&known)?)?;
    let said = refused(&["vm", "status", "web01"], &["the XML", "web01"])?;
    ensure!(said.contains("virsh define FILE"), "{said}");
    wait_until(PATIENCE, "the status to have it as unreadable", || {
        let is_so = states(&sealed)?.contains(&("web01".to_owned(), "unreadable".to_owned()));
        Ok(is_so.then_some(()))
    })?;
    host.define_xml(&known)?;

    // Nor can anybody see then what is done to it while it runs.
    sealed.start_paused("web01")?;
    let text = format!("<a>{}</a>", ">".repeat(120_000));
    for number in 0..10 {
        let (uri, key) = (format!("urn:evil:{number}"), format!("evil{number}"));
        host.virsh(&[
            "metadata", "web01", "--live", "--uri", &uri, "--key", &key, "--set", &text,
        ])?
        .succeeded()?;
    }
    host.virsh(&["dumpxml", "web01"])?.refused()?;
    wait_until(PATIENCE, "the status to say so", || {
        let status = sealed.json(&["status"])?.to_string();
        Ok(status.contains("current XML can't be read").then_some(()))
    })?;
    sealed.destroy("web01")
}

fn told_never(xml: &str) -> Result<String> {
    let description = format!("<description>{}</description></domain>", "\"".repeat(900_000));
    edited(xml, "</domain>", &description)
}

fn states(sealed: &SealedHost) -> Result<Vec<(String, String)>> {
    let status = sealed.json(&["vm", "status"])?;
    let vms = status["vms"].as_array().context("no VMs")?;
    let text = |vm: &serde_json::Value, field: &str| vm[field].as_str().unwrap_or_default().to_owned();
    Ok(vms
        .iter()
        .map(|vm| (text(vm, "name"), text(vm, "state")))
        .collect())
}

fn secret_of_disk(sealed: &SealedHost, vm: &str) -> Result<String> {
    let status = sealed.json(&["vm", "status", vm])?;
    let objects = status["vms"][0]["objects"].as_array();
    let disk = objects
        .and_then(|objects| objects.iter().find(|object| object["object"] == "disk vda"))
        .with_context(|| status.to_string())?;
    Ok(disk["envelope"].as_str().context("no envelope")?.to_owned())
}

/// A plain VM on `IMAGES/NAME.qcow2` that opens it with `secret`.
fn encrypted_disk(name: &str, secret: &str) -> Result<String> {
    with_source(name, &format!("<encryption format='luks'>{secret}</encryption>"))
}

fn thief_with(secret: &str) -> Result<String> {
    encrypted_disk("thief", secret)
}

/// The same with anything in or behind the disk's source.
fn thief_named(named: &str) -> Result<String> {
    with_source("thief", named)
}

fn with_source(name: &str, named: &str) -> Result<String> {
    let uuid = if name == "thief" { 0x7_41ef } else { 0xc10d };
    let spec = DomainSpec {
        uuid: uuid::Uuid::from_u128(0x1000_0000_0000_4000_8000_0000_0000_0000 + uuid),
        tpm: false,
        ..SealedHost::spec(name)
    };
    let source = format!("<source file='{IMAGES}/{name}.qcow2'/>");
    let open = source.replace("/>", ">");
    let new = if named.starts_with("<backingStore") {
        format!("{source}{named}")
    } else {
        format!("{open}{named}</source>")
    };
    edited(&spec.xml(), &source, &new)
}

fn start_to_the_gate(sealed: &SealedHost) -> Result<std::process::Child> {
    fs::write(sealed.host().path("/run/gate"), "")?;
    let start = sealed
        .host()
        .command("virsh")
        .args([
            "--quiet",
            "--connect",
            "qemu:///system",
            "start",
            "--paused",
            "victim",
        ])
        .spawn()?;
    wait_until(PATIENCE, "the gate", || {
        Ok(sealed.host().path("/run/at-the-gate").exists().then_some(()))
    })?;
    Ok(start)
}

fn install(sealed: &mut SealedHost, name: &str, script: &str) -> Result<()> {
    let path = sealed.host().path("/etc/libvirt/hooks/qemu.d").join(name);
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    sealed.host_mut().restart_libvirtd()
}

fn hook_conf(sealed: &SealedHost, text: &str) -> Result<()> {
    fs::write(sealed.host().path("/etc/virtseal/hook.conf"), text)?;
    Ok(())
}
