//! What the XML declares decides what an image is; what a guest can write to its disk decides nothing.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal::inside::{LoaderAndTemplate, chosen_firmware, declared_firmware};
use virtseal_testkit::{DomainSpec, Host, HostBuilder, SealedHost, Way, expect_names};

/// A raw disk of 8 MiB that begins as an image that `options` make, with data at 6 MiB.
fn disguised(sealed: &SealedHost, name: &str, options: &[&str]) -> Result<DomainSpec> {
    let host = sealed.host();
    let header = format!("/var/lib/libvirt/images/{name}.header");
    host.run(
        &[
            &["qemu-img", "create", "-q", "-f", "qcow2"],
            options,
            &[&header, "1M"],
        ]
        .concat(),
    )?
    .succeeded()?;
    let disk = PathBuf::from(format!("/var/lib/libvirt/images/{name}.img"));
    let image = fs::File::create(host.path(&disk))?;
    image.set_len(8 << 20)?;
    image.write_all_at(&fs::read(host.path(&header))?, 0)?;
    image.write_all_at(&[7; 4096], 6 << 20)?;
    fs::remove_file(host.path(&header))?;
    let spec = DomainSpec::minimal(name, &disk);
    host.define(&spec)?;
    Ok(spec)
}

#[test]
fn a_disk_is_what_its_xml_declares_and_no_header_makes_it_empty() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let host = sealed.host();
    let plain = disguised(&sealed, "guest01", &[])?;
    let planted = disguised(&sealed, "guest02", &["-u", "-b", "/etc/shadow", "-F", "raw"])?;
    for spec in [&plain, &planted] {
        let before = fs::read(host.path(&spec.disk))?;
        let (vm, path) = (spec.name.as_str(), spec.disk.display().to_string());
        for dry_run in [&[][..], &["--dry-run"]] {
            let refused = sealed.refused(8, &[&["vm", "seal", vm], dry_run].concat())?;
            expect_names(
                &refused,
                &[&path, "raw", "qcow2", "--from-format=vda=raw", "virsh edit"],
            )?;
            // Nothing to be typed makes root open what the header names.
            ensure!(!refused.contains("qemu-img"), "{refused}");
        }
        let told = sealed.refused(8, &["vm", "seal", vm])?;
        let refused = Way::named("virtseal vm seal --from-format", &told)?.refused(&sealed)?;
        expect_names(&refused, &[&path, "holds data"])?;
        ensure!(fs::read(host.path(&spec.disk))? == before, "{vm} was changed");
    }
    for (confirmed, word) in [
        ("vda=qcow2", "declares it raw"),
        ("vdb=raw", "vdb"),
        ("vda", "TARGET=raw"),
        ("vda=vmdk", "TARGET=raw"),
    ] {
        let refused = sealed.refused(2, &["vm", "seal", "--from-format", confirmed, "guest01"])?;
        expect_names(&refused, &[word])?;
    }

    // As a source: what libvirt has for it is asked, and can be confirmed.
    let source = plain.disk.to_str().context("UTF-8")?;
    let create = [
        "volume",
        "create",
        "/var/lib/libvirt/images/new.qcow2",
        "--vm",
        "guest01",
        "--from",
        source,
    ];
    let refused = sealed.refused(1, &create)?;
    expect_names(
        &refused,
        &[source, "raw", "qcow2", "guest01", "--from-format raw"],
    )?;
    sealed
        .virtseal(&[&create[..], &["--from-format", "raw"]].concat())?
        .succeeded()?;
    let info = sealed.json(&["volume", "info", "/var/lib/libvirt/images/new.qcow2"])?;
    ensure!(info["virtual_size"] == 8 << 20, "{info}");

    // The other way round, and an image that really is what the XML does not say.
    let mut other = DomainSpec::minimal("other01", Path::new("/var/lib/libvirt/images/other.img"));
    fs::write(host.path(&other.disk), vec![0; 1 << 20])?;
    other.disk_format = "qcow2";
    host.define(&other)?;
    let refused = sealed.refused(8, &["vm", "seal", "other01"])?;
    expect_names(&refused, &["declared qcow2", "raw"])?;
    ensure!(
        sealed
            .refused(8, &["vm", "seal", "--from-format", "vda=qcow2", "other01"])?
            .contains("raw")
    );
    other.disk_format = "raw";
    host.define(&other)?;
    let steps = sealed
        .virtseal(&["vm", "seal", "--dry-run", "other01"])?
        .succeeded()?;
    expect_names(&steps, &["replace the empty"])?;

    // Where libvirt does not say what it has for the source, nobody has said that it is what its guest has written.
    let vm = plain.uuid.to_string();
    sealed.host_mut().stop_libvirtd()?;
    let create = [
        "volume",
        "create",
        "/var/lib/libvirt/images/third.qcow2",
        "--vm",
        &vm,
        "--from",
        source,
    ];
    expect_names(
        &sealed.refused(4, &create)?,
        &[source, "say it with --from-format"],
    )?;
    sealed
        .run(&[&create[..], &["--from-format", "raw"]].concat())
        .map(drop)
}

#[test]
fn plaintext_beside_the_objects_is_refused_unless_the_policy_allows_it() -> Result<()> {
    // A directory that is on no tmpfs anywhere, and that nothing here gets as far as making.
    let host = HostBuilder::default().qemu_conf("memory_backing_dir = \"/usr/share/virtseal-ram\"");
    let mut sealed = SealedHost::start_on(host)?;
    sealed.seal_new("web01")?;
    let plain = sealed.dumpxml("web01")?;
    let with = |last: &str| plain.replacen("</domain>", &format!("{last}</domain>"), 1);
    let memory = with("<memoryBacking><access mode='shared'/></memoryBacking>");
    sealed.host().define_xml(&memory)?;
    let refused = sealed.refused_start("web01")?;
    expect_names(
        &refused,
        &["web01", "/usr/share/virtseal-ram", "memfd", "memory_on_disk"],
    )?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    let warned = status["vms"][0]["warnings"].to_string();
    ensure!(
        warned.contains("next start") && warned.contains("memory_on_disk"),
        "{status}"
    );
    let drive = "<commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'><arg value='-drive'/><arg value='file=/var/lib/libvirt/images/x,if=none'/></commandline>";
    sealed.host().define_xml(&with(drive))?;
    expect_names(
        &sealed.refused_start("web01")?,
        &["web01", "-drive", "mixed_disks"],
    )?;

    let second = sealed.host().empty_disk("second", 1 << 20)?;
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/><target dev='vdb' bus='virtio'/></disk></devices>",
        second.display()
    );
    sealed
        .host()
        .define_xml(&plain.replacen("</devices>", &disk, 1))?;
    expect_names(&sealed.refused_start("web01")?, &["disk vdb", "is not encrypted"])?;

    sealed.configure("policy:\n  memory_on_disk: yes\n  vms:\n    web01: {mixed_disks: yes}\n")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;

    // The plan says the same as a start: refused by itself, allowed and warned of by the policy.
    let third = sealed.host().empty_disk("third", 1 << 20)?;
    let other = DomainSpec::minimal("other", &third);
    let file_memory = other.xml().replacen(
        "<os>",
        "<memoryBacking><source type='file'/></memoryBacking><os>",
        1,
    );
    sealed.host().define_xml(&file_memory)?;
    let planned = sealed.virtseal(&["vm", "seal", "--dry-run", "other"])?;
    ensure!(planned.code() == Some(0), "{planned:?}");
    expect_names(&planned.stderr, &["other", "its memory is a file"])?;
    sealed.configure("")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon()?;
    let refused = sealed.refused(1, &["vm", "seal", "--dry-run", "other"])?;
    expect_names(&refused, &["other", "its memory is a file", "memory_on_disk"])?;
    sealed.host().define_xml(&other.xml().replacen(
        "</devices>",
        "<filesystem><source dir='/srv'/><target dir='t'/></filesystem></devices>",
        1,
    ))?;
    let planned = sealed.virtseal(&["vm", "seal", "--dry-run", "other"])?;
    expect_names(&planned.stderr, &["/srv", "9p"])?;
    Ok(())
}

/// The loader and the template that libvirt has for a domain: in its definition, or, before libvirt 9.2, once it is started.
fn of_libvirt(host: &Host, name: &str) -> Result<LoaderAndTemplate> {
    let defined = declared_firmware(&host.virsh(&["dumpxml", name])?.succeeded()?)?;
    if defined.0.is_some() && defined.1.is_some() {
        return Ok(defined);
    }
    host.virsh(&["start", "--paused", name])?.succeeded()?;
    let started = declared_firmware(&host.virsh(&["dumpxml", name])?.succeeded()?);
    host.virsh(&["destroy", name])?.succeeded()?;
    started
}

#[test]
fn firmware_is_chosen_as_libvirt_chooses_it() -> Result<()> {
    let host = Host::start()?;
    let feature = |name: &str, enabled: &str| {
        format!("<firmware><feature enabled='{enabled}' name='{name}'/></firmware>")
    };
    let secboot = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.secboot.fd</loader>";
    let cases = [
        ("q35", " firmware='efi'", String::new(), ""),
        ("q35", " firmware='efi'", "<loader secure='yes'/>".into(), ""),
        ("q35", " firmware='efi'", feature("enrolled-keys", "yes"), ""),
        ("q35", " firmware='efi'", feature("enrolled-keys", "no"), ""),
        ("q35", " firmware='efi'", feature("secure-boot", "no"), ""),
        (
            "q35",
            " firmware='efi'",
            String::new(),
            "<pm><suspend-to-mem enabled='yes'/></pm>",
        ),
        ("pc", " firmware='efi'", String::new(), ""),
        ("q35", "", secboot.into(), ""),
        ("pc", " firmware='efi'", "<loader secure='yes'/>".into(), ""),
        (
            "q35",
            " firmware='efi'",
            String::new(),
            "<pm><suspend-to-disk enabled='yes'/></pm>",
        ),
    ];
    let mut chosen = 0;
    for (number, (machine, attribute, inside, more)) in cases.iter().enumerate() {
        let name = format!("vm{number}");
        let spec = DomainSpec::minimal(&name, &host.empty_disk(&name, 1 << 20)?);
        let xml = spec.xml();
        let (begin, end) = (xml.find("<os>").context("os")?, xml.find("</os>").context("/os")?);
        let os = format!("<os{attribute}><type arch='x86_64' machine='{machine}'>hvm</type>{inside}");
        let xml =
            format!("{}{os}{}", &xml[..begin], &xml[end..]).replacen("</os>", &format!("</os>{more}"), 1);
        let defined = host.define_xml(&xml);
        let canonical = match &defined {
            Ok(()) => {
                let shown = host.virsh(&["dumpxml", &name])?.succeeded()?;
                let (_, machine) = shown.split_once("machine='").context("no machine")?;
                machine.split('\'').next().unwrap_or_default().to_owned()
            }
            Err(_) => format!("pc-{}-9.0", if *machine == "pc" { "i440fx" } else { "q35" }),
        };
        let left_open = xml.replacen(
            &format!("machine='{machine}'"),
            &format!("machine='{canonical}'"),
            1,
        );
        let ours = chosen_firmware(&left_open);
        let theirs = defined.and_then(|()| of_libvirt(&host, &name));
        match (ours, theirs) {
            (Ok(ours), Ok(theirs)) => {
                ensure!(theirs == ours, "{os} {more}: libvirt has {theirs:?}");
                chosen += 1;
            }
            (Err(_), Err(_)) => {}
            (ours, theirs) => anyhow::bail!("{os} {more}: {ours:?}, but libvirt: {theirs:?}"),
        }
    }
    ensure!(chosen == 8, "{chosen} were chosen");
    Ok(())
}
