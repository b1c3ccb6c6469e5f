//! `vm seal` and `vm unseal`: they do what they say, change nothing else, and refuse what would lose data.

use std::fs;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{DomainSpec, SealedHost, codes, edited, expect_names};

#[test]
fn what_cannot_be_sealed_is_refused_and_left_alone() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();

    let bios = plain(&sealed, "bios")?;
    let xml = bios.xml();
    let (begin, end) = (
        xml.find("<loader").context("no loader")?,
        xml.find("</os>").context("no os")?,
    );
    host.define_xml(&format!("{}{}", &xml[..begin], &xml[end..]))?;
    expect_refusal(&sealed, "bios", 1, &["UEFI", "firmware='efi'"])?;

    host.define(&plain(&sealed, "running")?)?;
    host.virsh(&["start", "--paused", "running"])?.succeeded()?;
    expect_refusal(&sealed, "running", 9, &["is running", "virsh shutdown running"])?;

    let with_data = plain(&sealed, "data")?;
    fs::write(host.path(&with_data.disk), vec![7; 1 << 20])?;
    host.define(&with_data)?;
    expect_refusal(
        &sealed,
        "data",
        8,
        &["disk vda", "holds data", "virtseal volume create --from="],
    )?;

    let mut foreign = plain(&sealed, "foreign")?;
    foreign.disk_format = "qcow2";
    let path = foreign.disk.display().to_string();
    host.run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=0123456789",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        &path,
        "1M",
    ])?
    .succeeded()?;
    host.define(&foreign)?;
    expect_refusal(
        &sealed,
        "foreign",
        1,
        &["disk vda", "encrypted, but not by virtseal"],
    )?;

    let mut with_tpm = plain(&sealed, "tpm")?;
    with_tpm.tpm = true;
    host.define(&with_tpm)?;
    host.virsh(&["start", "--paused", "tpm"])?.succeeded()?;
    sealed.destroy("tpm")?;
    expect_refusal(
        &sealed,
        "tpm",
        8,
        &["vTPM", "plaintext state", &with_tpm.uuid.to_string()],
    )?;

    let missing = plain(&sealed, "missing")?;
    host.define(&missing)?;
    fs::remove_file(host.path(&missing.disk))?;
    expect_refusal(
        &sealed,
        "missing",
        7,
        &["disk vda", "does not exist", "virtseal volume create"],
    )?;

    let others = SealedHost::spec("others");
    let path = others.disk.display().to_string();
    let stranger = uuid(&plain(&sealed, "stranger")?);
    sealed
        .virtseal(&["volume", "create", &path, "--size", "1M", "--vm", &stranger])?
        .succeeded()?;
    host.define(&others)?;
    expect_refusal(&sealed, "others", 1, &["disk vda", "made for VM", &stranger])?;

    sealed.lock()?;
    host.define(&plain(&sealed, "locked")?)?;
    expect_refusal(
        &sealed,
        "locked",
        3,
        &["'main'", "is locked", "virtseal provider unlock main"],
    )
}

#[test]
fn dry_run_changes_nothing_and_sealing_twice_changes_nothing_more() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = plain(&sealed, "web01")?;
    let before = edited(
        &edited(
            &spec.xml(),
            "<memory ",
            "<title>t</title>\n  <description>&lt;keep&gt; &amp; all</description>\n  <metadata>\n    \
             <other:thing xmlns:other='urn:other' a='&quot;1&quot;'><other:inner/>text</other:thing>\n  </metadata>\n  <memory ",
        )?,
        "<domain type=",
        "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' type=",
    )?;
    let before = edited(
        &before,
        "</domain>",
        "<qemu:commandline><qemu:env name='X' value='y'/></qemu:commandline></domain>",
    )?;
    sealed.host().define_xml(&before)?;
    let before = sealed.dumpxml("web01")?;
    let disk = fs::read(sealed.host().path(&spec.disk))?;

    let planned = sealed.json(&["vm", "seal", "web01", "--dry-run"])?;
    ensure!(planned["changed"] == false, "{planned}");
    ensure!(
        planned["steps"].as_array().is_some_and(|steps| steps.len() == 4),
        "{planned}"
    );
    ensure!(sealed.dumpxml("web01")? == before);
    ensure!(fs::read(sealed.host().path(&spec.disk))? == disk);
    ensure!(!sealed.host().path(spec.nvram()).exists());
    ensure!(sealed.json(&["provider", "list"])?["providers"][0]["envelopes"] == 0);

    let done = sealed.json(&["vm", "seal", "web01"])?;
    ensure!(done["changed"] == true, "{done}");
    let count = |told: &serde_json::Value| told["steps"].as_array().map(Vec::len);
    ensure!(count(&done) == count(&planned), "{done}");
    let after = sealed.dumpxml("web01")?;
    for kept in [
        "<title>t</title>",
        "<description>&lt;keep&gt; &amp; all</description>",
        "<other:inner/>",
        "<qemu:env name='X' value='y'/>",
    ] {
        ensure!(
            before.contains(kept) && after.contains(kept),
            "{kept} is not in {after}"
        );
    }
    let removed: Vec<_> = before
        .lines()
        .filter(|line| !after.contains(line.trim()))
        .collect();
    ensure!(
        removed
            .iter()
            .all(|line| line.contains("<driver ") || line.contains("<source ") || line.contains("<nvram ")),
        "sealing took away {removed:?}"
    );

    let again = sealed.json(&["vm", "seal", "web01"])?;
    ensure!(
        again["changed"] == false && again["steps"] == serde_json::json!([]),
        "{again}"
    );
    ensure!(sealed.dumpxml("web01")? == after);
    ensure!(sealed.json(&["provider", "list"])?["providers"][0]["envelopes"] == 3);
    sealed.start_paused("web01")
}

#[test]
fn unseal_works_until_the_vm_has_run() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    let planned = sealed.json(&["vm", "unseal", "web01", "--dry-run"])?;
    ensure!(planned["changed"] == false, "{planned}");
    ensure!(
        codes(&planned["warnings"]) == ["plaintext_stays", "vtpm_stays", "keys_stay"],
        "{planned}"
    );
    sealed.virtseal(&["vm", "unseal", "web01"])?.succeeded()?;
    let xml = sealed.dumpxml("web01")?;
    ensure!(!xml.contains("encryption") && !xml.contains("virtseal"), "{xml}");
    let info = sealed.json(&["volume", "info", &spec.disk.display().to_string()])?;
    ensure!(info["luks"].is_null() && info["envelope"].is_null(), "{info}");

    // Plain now: virtseal is not asked about it any more.
    sealed.lock()?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    let again = sealed.json(&["vm", "unseal", "web01"])?;
    ensure!(again["changed"] == false, "{again}");

    sealed.unlock()?;
    sealed.seal_new("web02")?;
    sealed.start_paused("web02")?;
    let running = sealed.virtseal(&["vm", "unseal", "web02"])?;
    ensure!(running.code() == Some(9), "{running:?}");
    sealed.destroy("web02")?;
    let before = sealed.dumpxml("web02")?;
    let refused = sealed.virtseal(&["vm", "unseal", "web02"])?;
    ensure!(refused.code() == Some(8), "{refused:?}");
    expect_names(
        &refused.stderr,
        &["web02", "has run since it was sealed", "Next: "],
    )?;
    ensure!(sealed.dumpxml("web02")? == before);
    sealed.start_paused("web02")
}

#[test]
fn variables_that_were_written_in_plaintext_are_taken_over_and_come_back() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = plain(&sealed, "web01")?;
    host.define(&spec)?;
    let mut variables = fs::read(host.path(&spec.firmware.variables))?;
    variables[4096] ^= 1;
    fs::create_dir_all(host.path("/var/lib/libvirt/qemu/nvram"))?;
    fs::write(host.path(spec.nvram()), &variables)?;
    let told = sealed.run(&["vm", "seal", "web01", "--dry-run"])?;
    expect_names(
        &told,
        &[
            "would encrypt the UEFI variable store",
            "with the variables that it has",
        ],
    )?;
    ensure!(fs::read(host.path(spec.nvram()))? == variables);
    let told = sealed.virtseal(&["vm", "seal", "web01"])?;
    ensure!(told.status.success(), "{told:?}");
    expect_names(&told.stderr, &["web01_VARS.fd was in plaintext until now"])?;
    ensure!(fs::read(host.path(spec.nvram()))?.starts_with(b"LUKS"));
    let told = sealed.virtseal(&["vm", "unseal", "web01", "--dry-run"])?;
    expect_names(
        &told.stderr,
        &["web01_VARS.fd will be in plaintext", "Secure Boot"],
    )?;
    let told = sealed.virtseal(&["vm", "unseal", "web01"])?;
    ensure!(told.status.success(), "{told:?}");
    expect_names(&told.stderr, &["web01_VARS.fd are in plaintext"])?;
    ensure!(fs::read(host.path(spec.nvram()))? == variables);
    sealed.run(&["vm", "seal", "web01"])?;
    sealed.expect_start("web01")
}

#[test]
fn vm_whose_firmware_libvirt_chooses_can_be_sealed() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = plain(&sealed, "web01")?;
    let xml = spec.xml();
    let (begin, end) = (
        xml.find("<loader").context("no loader")?,
        xml.find("</os>").context("no os")?,
    );
    let xml = format!("{}{}", &xml[..begin], &xml[end..]);
    sealed
        .host()
        .define_xml(&edited(&xml, "<os>", "<os firmware='efi'>")?)?;
    // Its guest has written to the variables that libvirt has made for it.
    sealed.expect_start("web01")?;
    let store = sealed.host().path(spec.nvram());
    let mut variables = fs::read(&store)?;
    variables[4096] ^= 1;
    fs::write(&store, variables)?;
    sealed.virtseal(&["vm", "seal", "web01"])?.succeeded()?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    ensure!(status["vms"][0]["state"] == "sealed", "{status}");
    ensure!(
        status["vms"][0]["objects"]
            .as_array()
            .is_some_and(|objects| objects.len() == 3),
        "{status}"
    );
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    sealed.start_paused("web01")
}

/// A VM with an empty raw disk, not defined yet.
fn plain(sealed: &SealedHost, name: &str) -> Result<DomainSpec> {
    Ok(DomainSpec::minimal(
        name,
        &sealed.host().empty_disk(name, 1 << 20)?,
    ))
}

fn uuid(spec: &DomainSpec) -> String {
    spec.uuid.to_string()
}

/// The same refusal with and without `--dry-run`, and nothing is different afterwards.
fn expect_refusal(sealed: &SealedHost, vm: &str, code: i32, parts: &[&str]) -> Result<()> {
    let before = sealed.dumpxml(vm)?;
    for arguments in [&["vm", "seal", vm][..], &["vm", "seal", vm, "--dry-run"]] {
        // A plan needs no key.
        if code == 3 && arguments.len() == 4 {
            continue;
        }
        let refused = sealed.virtseal(arguments)?;
        ensure!(refused.code() == Some(code), "{refused:?}");
        expect_names(&refused.stderr, &[&[vm, "Next: "], parts].concat())?;
        // A plan warns besides.
        let is_plan = arguments.len() == 4;
        let lines = refused.stderr.trim_end().lines().count();
        ensure!(lines == 1 || is_plan, "{}", refused.stderr);
    }
    ensure!(sealed.dumpxml(vm)? == before, "{vm} was changed");
    Ok(())
}
