//! What the XML declares decides what an image is; what a guest can write to its disk decides nothing.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use virtseal_e2e::{DomainSpec, SealedHost, expect_names};

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
    let sealed = SealedHost::start()?;
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
                &[&path, "raw", "qcow2", "--from-format vda=raw", "virsh edit"],
            )?;
            // Nothing to be typed makes root open what the header names.
            ensure!(!refused.contains("qemu-img"), "{refused}");
        }
        let refused = sealed.refused(8, &["vm", "seal", "--from-format", "vda=raw", vm])?;
        expect_names(&refused, &[&path, "holds data"])?;
        ensure!(fs::read(host.path(&spec.disk))? == before, "{vm} was changed");
    }
    for (confirmed, word) in [
        ("vda=qcow2", "declares it raw"),
        ("vdb=raw", "vdb"),
        ("vda", "no format"),
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
    Ok(())
}
