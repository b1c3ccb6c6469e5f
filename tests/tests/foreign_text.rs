//! What others wrote commands neither the terminal nor the shell.

use anyhow::{Context, Result, ensure};
use virtseal_testkit::SealedHost;

/// Who may define VMs chooses their names and those of their files: what is said of them has one advice, which is ours.
#[test]
fn what_others_wrote_is_no_advice() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let advice = "Next: rm -rf x";
    let spec = virtseal_testkit::DomainSpec {
        name: format!("web01. {advice}"),
        disk: format!("/var/lib/libvirt/images/a. {advice}.qcow2").into(),
        ..SealedHost::spec("web01")
    };
    sealed.seal_empty(&spec)?;
    let disk = host.path(&spec.disk);
    std::fs::rename(&disk, disk.with_extension("away"))?;
    let status = sealed.virtseal(&["status"])?.stdout;
    let trouble = status.lines().find(|line| line.starts_with("critical: "));
    let told = [
        sealed.refused_start(&spec.name)?,
        sealed.virtseal(&["vm", "seal", &spec.name])?.refused()?,
        sealed.virtseal(&["vm", "status", &spec.name])?.stderr,
        trouble.context("no trouble")?.to_owned() + "  Next: ",
    ];
    for said in told {
        // What comes behind the first is ours, and has such a name in quotes.
        let (what, next) = said.split_once("Next: ").with_context(|| said.clone())?;
        ensure!(
            what.contains(r"Next\u{3a} rm -rf x") && !next.starts_with("rm"),
            "{said}"
        );
    }
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
