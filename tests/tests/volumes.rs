//! A volume is checked as a whole, and gets another size, of a VM that runs or is off.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use serde_json::Value;
use virtseal_testkit::rig::{IMAGES, Rig, words};
use virtseal_testkit::{DomainSpec, SealedHost, Way, edited, expect_names};

const MIB: u64 = 1 << 20;

/// A volume beside the disk of the sealed VM `web01`.
fn add_volume(sealed: &SealedHost, spec: &DomainSpec, name: &str, more: &[&str]) -> Result<String> {
    let path = format!("{IMAGES}/{name}.qcow2");
    let vm = spec.uuid.to_string();
    let create = ["volume", "create", &path, "--vm", &vm];
    sealed.run(&[&create[..], more].concat())?;
    Ok(path)
}

/// Has the VM's XML name it as `vdb`, and seals that.
fn attach(sealed: &SealedHost, path: &str) -> Result<()> {
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/><target dev='vdb' bus='virtio'/></disk>\
         <controller type='usb'"
    );
    let xml = edited(&sealed.dumpxml("web01")?, "<controller type='usb'", &disk)?;
    sealed.host().define_xml(&xml)?;
    sealed.run(&["vm", "seal", "web01"]).map(drop)
}

fn check(sealed: &SealedHost, code: i32, path: &str) -> Result<(Value, String)> {
    let output = sealed.virtseal(&["--json", "volume", "check", path])?;
    ensure!(output.code() == Some(code), "expected {code}: {output:?}");
    let told = serde_json::from_str(&output.stdout).with_context(|| format!("no JSON: {output:?}"))?;
    Ok((told, output.stderr))
}

#[test]
fn a_check_tells_what_is_wrong_with_a_volume() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    let disk = spec.disk.display().to_string();
    let (told, _) = check(&sealed, 0, &disk)?;
    ensure!(
        told["structure"] == "sound"
            && told["copy"] == "same"
            && told["vm"] == "web01"
            && told["size"] == 64 * MIB,
        "{told}"
    );
    let printed = sealed.run(&["volume", "check", &disk])?;
    expect_names(&printed, &["qcow2+luks1", "what the keystore has", "sound"])?;
    // The variable store has no tables, and carries nothing.
    let (told, _) = check(&sealed, 0, &spec.nvram().display().to_string())?;
    ensure!(
        told["structure"] == "not_checked" && told["copy"] == "not_carried",
        "{told}"
    );

    // As far as it can be looked at while its VM runs; no start is kept off by that.
    sealed.start_paused("web01")?;
    let (told, said) = check(&sealed, 9, &disk)?;
    ensure!(told["structure"] == "in_use" && told["copy"] == "same", "{told}");
    expect_names(&said, &["virtseal volume check"])?;
    sealed.destroy("web01")?;
    sealed.lock()?;
    let said = sealed.refused(3, &["volume", "check", &disk])?;
    expect_names(&said, &["virtseal provider unlock main"])?;
    sealed.unlock()?;
    check(&sealed, 0, &disk)?;

    // Tables that say something else than the clusters.
    let path = sealed.host().path(&spec.disk);
    let whole = fs::read(&path)?;
    let file = OpenOptions::new().write(true).open(&path)?;
    let refcounts = u64::from_be_bytes(whole[48..56].try_into()?);
    let block = u64::from_be_bytes(whole[refcounts as usize..][..8].try_into()?);
    file.write_all_at(&[0; 8], block)?;
    let (told, said) = check(&sealed, 1, &disk)?;
    ensure!(
        told["structure"] == "corrupt" && told["errors"].as_u64() > Some(0),
        "{told}"
    );
    expect_names(&said, &["is damaged", "restore it from a backup"])?;
    fs::write(&path, &whole)?;
    check(&sealed, 0, &disk)?;

    // The key of another image.
    let other = add_volume(&sealed, &spec, "other", &["--size", "8M"])?;
    let swapped = fs::read(sealed.host().path(&other))?;
    let begin = swapped
        .windows(6)
        .position(|bytes| bytes == b"LUKS\xba\xbe")
        .context("no LUKS header")?;
    let mut mixed = whole.clone();
    mixed[begin..begin + 2_000_000].copy_from_slice(&swapped[begin..begin + 2_000_000]);
    fs::write(&path, &mixed)?;
    let said = sealed.refused(1, &["volume", "check", &disk])?;
    expect_names(&said, &["no keyslot", "opens with this key"])?;
    fs::write(&path, &whole)?;

    // What this host has forgotten opens all the same, and says so.
    sealed.run(&["volume", "forget", "--force", "--yes-forget", "web01", &other])?;
    let (told, _) = check(&sealed, 1, &other)?;
    ensure!(
        told["copy"] == "unknown" && told["structure"] == "sound",
        "{told}"
    );
    let said = sealed.refused(1, &["volume", "check", &other])?;
    Way::that_begins("virtseal volume adopt", &said)?.take(&sealed)?;
    check(&sealed, 0, &other).map(drop)
}

#[test]
fn a_volume_gets_another_size_and_loses_nothing_without_a_word() -> Result<()> {
    let sealed = SealedHost::start()?;
    let (spec, host) = (sealed.seal_new("web01")?, sealed.host());
    let data = add_volume(&sealed, &spec, "data", &["--size", "8M"])?;
    attach(&sealed, &data)?;
    let size = || -> Result<u64> {
        let info = sealed.json(&["volume", "info", &data])?;
        info["virtual_size"].as_u64().context("no size")
    };
    let resize = |size: &str| sealed.json(&["volume", "resize", &data, size]);
    // Off.
    let grown = resize("20MB")?;
    expect_names(&grown.to_string(), &["from 8 MiB to", "grow its partitions"])?;
    ensure!(size()? == 20_000_256, "in whole sectors: {}", size()?);
    ensure!(resize("20000000")?["changed"] == false);
    resize("32M")?;
    check(&sealed, 0, &data)?;
    sealed.expect_start("web01")?;

    // Running: QEMU has it, and the guest sees it.
    sealed.start_paused("web01")?;
    resize("0.0625G")?;
    let seen = host.virsh(&["domblkinfo", "web01", "vdb"])?.succeeded()?;
    expect_names(&seen, &[&(64 * MIB).to_string()])?;
    ensure!(size()? == 64 * MIB);
    let said = sealed.refused(
        9,
        &[
            "volume",
            "resize",
            "--shrink",
            "--yes-shrink",
            "web01",
            &data,
            "16M",
        ],
    )?;
    expect_names(
        &said,
        &[
            "web01 runs",
            "virsh shutdown web01, then virtseal volume resize --shrink",
        ],
    )?;
    sealed.destroy("web01")?;

    // Smaller: only by the typed name of its VM.
    let shrink =
        |name: &str| ["volume", "resize", "--shrink", "--yes-shrink", name, &data, "16M"].map(str::to_owned);
    let said = sealed.refused(8, &["volume", "resize", &data, "16M"])?;
    expect_names(
        &said,
        &[
            "64 MiB: all beyond 16 MiB would be lost",
            "virtseal volume resize --shrink",
        ],
    )?;
    let other = shrink("db01");
    sealed.refused(8, &other.each_ref().map(String::as_str))?;
    ensure!(size()? == 64 * MIB);
    // Nor where nobody can tell what an image is based on, because root does not look at it.
    let elsewhere = "/run/elsewhere";
    fs::create_dir(host.path(elsewhere))?;
    let odd = format!("{elsewhere}/odd.qcow2");
    host.run(&["qemu-img", "create", "-q", "-f", "qcow2", &odd, "1M"])?
        .succeeded()?;
    let mut spec_of_odd = DomainSpec::minimal("odd01", Path::new(&odd));
    spec_of_odd.disk_format = "qcow2";
    host.define(&spec_of_odd)?;
    let unseen = sealed.refused(6, &shrink("web01").each_ref().map(String::as_str))?;
    expect_names(
        &unseen,
        &[
            "something may be based on it: odd01: disk vda",
            "image_dirs",
            "then virtseal volume resize --shrink",
        ],
    )?;
    resize("72M")?;
    host.undefine("odd01")?;
    let typed = sealed.virtseal_at_a_terminal(&["volume", "resize", "--shrink", &data, "16M"], &["web01"])?;
    expect_names(&typed.stdout, &["Type the name of its VM"])?;
    typed.succeeded()?;
    ensure!(size()? == 16 * MIB);
    check(&sealed, 0, &data)?;
    sealed.expect_start("web01")?;

    // Somebody else has it open as QEMU does.
    let held = OpenOptions::new().read(true).open(host.path(&data))?;
    fcntl(&held, FcntlArg::F_OFD_SETLK(&writes_alone()))?;
    let said = sealed.refused(9, &["volume", "resize", &data, "24M"])?;
    expect_names(&said, &["is open in another process"])?;
    drop(held);

    // Where it is the base of another, or has one.
    let backing = ["--backing", &data, "--backing-format", "qcow2"];
    let top = add_volume(&sealed, &spec, "top", &backing)?;
    let said = sealed.virtseal(&["volume", "resize", &top, "24M"])?.refused()?;
    expect_names(&said, &["a backing file", "while that runs"])?;
    host.virsh(&["detach-disk", "--config", "web01", "vdb"])?
        .succeeded()?;
    attach(&sealed, &top)?;
    let said = sealed.refused(9, &["volume", "resize", &data, "24M"])?;
    expect_names(&said, &["disk vdb of web01 is based on it"])?;
    ensure!(size()? == 16 * MIB);
    let nvram = spec.nvram().display().to_string();
    sealed.refused(2, &["volume", "resize", &nvram, "24M"])?;
    sealed
        .refused(7, &["volume", "resize", "/nonexistent", "24M"])
        .map(drop)
}

#[test]
fn a_disk_grows_where_a_vm_runs_with_its_key() -> Result<()> {
    let sealed = SealedHost::start()?;
    let (spec, host) = (sealed.seal_new("web01")?, sealed.host());
    let disk = spec.disk.display().to_string();
    // A VM that takes its image for a raw disk would get a longer file, and the image would have the size that it had.
    host.define(&DomainSpec::minimal("thief01", &spec.disk))?;
    host.virsh(&["start", "--paused", "thief01"])?.succeeded()?;
    let before = host.path(&spec.disk).metadata()?.len();
    let said = sealed.refused(9, &["volume", "resize", &disk, "128M"])?;
    expect_names(
        &said,
        &[
            "thief01 runs with it as disk vda, and not by its key",
            "virsh shutdown thief01, then virtseal volume resize",
        ],
    )?;
    ensure!(host.path(&spec.disk).metadata()?.len() == before);
    sealed.destroy("thief01")?;
    host.undefine("thief01")?;

    // Saved and restored while it is paused: QEMU 10 opens no disk for writing before it runs, QEMU 7.2 does.
    sealed.start_paused("web01")?;
    host.virsh(&["managedsave", "web01", "--paused"])?.succeeded()?;
    host.virsh(&["start", "web01"])?.succeeded()?;
    let resize = ["volume", "resize", &disk, "128M"];
    let before_it_runs = sealed.virtseal(&resize)?;
    if !before_it_runs.status.success() {
        ensure!(before_it_runs.status.code() == Some(1));
        let said = before_it_runs.refused()?;
        expect_names(&said, &["is not resized", "virtseal volume resize"])?;
        Way::that_begins("virsh resume", &said)?.take(&sealed)?;
        sealed.run(&resize)?;
    }
    let info = sealed.json(&["volume", "info", &disk])?;
    ensure!(info["virtual_size"] == 128 * MIB, "{info}");
    sealed.destroy("web01")
}

/// What a QEMU that lets nobody else in has locked.
fn writes_alone() -> nix::libc::flock {
    nix::libc::flock {
        l_type: nix::libc::F_RDLCK as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 100,
        l_len: 4,
        l_pid: 0,
    }
}

/// Whenever virtseald dies, the image is whole, opens, and has one of both sizes; the command is repeated.
#[test]
fn a_resize_can_be_killed() -> Result<()> {
    let mut rig = Rig::start()?;
    let spec = rig.sealed.seal_new("web01")?;
    let size_of = |nth: usize| (64 + 16 * nth as u64) * MIB;
    let disk = spec.disk.display().to_string();
    let command = |size: u64| words(&["volume", "resize", &disk, &size.to_string()]);
    rig.at_each_change(
        |_, nth| command(size_of(nth)),
        |rig, nth, arguments| {
            rig.sealed.unlock()?;
            let info = rig.sealed.json(&["volume", "info", &disk])?;
            let size = info["virtual_size"].as_u64().context("no size")?;
            ensure!([size_of(nth - 1), size_of(nth)].contains(&size), "{size}");
            check(&rig.sealed, 0, &disk)?;
            rig.sealed.run(arguments)?;
            check(&rig.sealed, 0, &disk)?;
            rig.expect_openable(&spec.uuid)
        },
    )?;
    rig.expect_no_temporaries()?;
    ensure!(Path::new(&disk).is_absolute());
    rig.sealed.expect_start("web01")
}
