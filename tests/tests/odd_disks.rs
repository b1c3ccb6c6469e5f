//! Disks and VMs that are not as `vm seal` would have them: what is printed about each leads to a sealed VM that starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;
use virtseal_testkit::{DomainSpec, SealedHost, Way, edited, expect_names};

const IMAGES: &str = "/var/lib/libvirt/images";
const POOL: &str = "/var/lib/libvirt/vms";
const NO_USB: &str = "<controller type='usb'";

/// Plain, with an empty qcow2 disk.
fn plain(sealed: &SealedHost, name: &str) -> Result<DomainSpec> {
    let spec = SealedHost::spec(name);
    create(sealed, &spec.disk.display().to_string())?;
    Ok(spec)
}

fn create(sealed: &SealedHost, path: &str) -> Result<()> {
    let create = ["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"];
    sealed.host().run(&create)?.succeeded().map(drop)
}

/// By what was printed, and whole.
fn expect_sealed(sealed: &SealedHost, vm: &str, printed: &str) -> Result<()> {
    expect_names(printed, &[&format!("{vm} is sealed")])?;
    Way::that_begins("virsh start", printed)?.take(sealed)?;
    sealed.expect_no_secrets()?;
    let status = sealed.json(&["vm", "status", vm])?;
    ensure!(
        status["vms"][0]["state"] == "sealed" && status["vms"][0]["power"] == "running",
        "{status}"
    );
    sealed.destroy(vm)
}

fn dry_run(sealed: &SealedHost, vm: &str) -> Result<String> {
    let told = sealed.virtseal(&["vm", "seal", vm, "--dry-run"])?;
    Ok(told.stdout + &told.stderr)
}

/// What a dry run says of one thing.
fn line_with(told: &str, part: &str) -> Result<String> {
    let line = told.lines().find(|line| line.contains(part));
    Ok(line.with_context(|| told.to_owned())?.to_owned())
}

fn refused_seal(sealed: &SealedHost, vm: &str) -> Result<String> {
    sealed.virtseal(&["vm", "seal", vm])?.refused()
}

fn with_device(xml: &str, device: &str) -> Result<String> {
    edited(xml, NO_USB, &format!("{device}{NO_USB}"))
}

/// As a volume of the pool `vms`.
fn as_volume(spec: &DomainSpec) -> Result<String> {
    let (file, volume) = (
        format!("<source file='{}'/>", spec.disk.display()),
        format!("<source pool='vms' volume='{}.qcow2'/>", spec.name),
    );
    let xml = edited(&spec.xml(), "<disk type='file'", "<disk type='volume'")?;
    edited(&xml, &file, &volume)
}

#[test]
fn a_volume_of_a_storage_pool_is_sealed_once_its_pool_tells_the_file() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    fs::create_dir(host.path(POOL))?;
    fs::set_permissions(host.path(POOL), fs::Permissions::from_mode(0o711))?;
    host.virsh(&["pool-define-as", "vms", "dir", "--target", POOL])?
        .succeeded()?;
    let spec = |name: &str| DomainSpec {
        disk: format!("{POOL}/{name}.qcow2").into(),
        ..SealedHost::spec(name)
    };
    let inactive = spec("pooled01");
    create(&sealed, &inactive.disk.display().to_string())?;
    host.define_xml(&as_volume(&inactive)?)?;
    let told = dry_run(&sealed, "pooled01")?;
    // With all the rest.
    expect_names(
        &told,
        &[
            "could not find the volume of the storage pool",
            "would create the encrypted UEFI",
            "a TPM 2.0",
        ],
    )?;
    let printed = Way::that_begins("virsh pool-start", &refused_seal(&sealed, "pooled01")?)?.take(&sealed)?;
    expect_names(
        &printed,
        &[&format!("{POOL}/pooled01.qcow2 for vda in place of volume")],
    )?;
    expect_sealed(&sealed, "pooled01", &printed)?;
    let status = sealed.run(&["vm", "status", "pooled01", "-o", "wide"])?;
    expect_names(&status, &[&inactive.disk.display().to_string()])?;

    // A file that libvirt has not seen yet, and a pool that there is not.
    let unseen = spec("pooled02");
    create(&sealed, &unseen.disk.display().to_string())?;
    host.define_xml(&as_volume(&unseen)?)?;
    let refused = refused_seal(&sealed, "pooled02")?;
    let printed = Way::that_begins("virsh pool-refresh", &refused)?.take(&sealed)?;
    expect_sealed(&sealed, "pooled02", &printed)?;
    let nowhere = plain(&sealed, "pooled03")?;
    host.define_xml(&as_volume(&nowhere)?.replace("pool='vms'", "pool='nosuch'"))?;
    let refused = refused_seal(&sealed, "pooled03")?;
    let way = Way::that_begins("virsh edit", &refused)?;
    let printed = way.editing(move |_| Ok(nowhere.xml())).take(&sealed)?;
    expect_sealed(&sealed, "pooled03", &printed)?;

    // What manages the VM defines it again as it was.
    host.define_xml(&as_volume(&inactive)?)?;
    let refused = sealed.refused_start("pooled01")?;
    let printed = Way::that_begins("virtseal vm seal", &refused)?.take(&sealed)?;
    expect_sealed(&sealed, "pooled01", &printed)
}

#[test]
fn a_floppy_is_made_read_only_or_taken_out_and_a_cd_stays() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    for file in ["cd.iso", "floppy.img"] {
        fs::write(host.path(IMAGES).join(file), [0; 4096])?;
    }
    let cd = format!(
        "<disk type='file' device='cdrom'><source file='{IMAGES}/cd.iso'/><target dev='sda' bus='sata'/><readonly/></disk>"
    );
    let floppy = format!(
        "<disk type='file' device='floppy'><source file='{IMAGES}/floppy.img'/><target dev='fda' bus='fdc'/></disk>"
    );
    let read_only = |xml: &str| {
        let (before, floppy) = xml.split_once("device='floppy'").context("no floppy")?;
        Ok(format!(
            "{before}device='floppy'{}",
            floppy.replacen("</disk>", "<readonly/></disk>", 1)
        ))
    };
    for (name, begin) in [("odd01", "virsh edit"), ("odd02", "virsh detach-disk")] {
        let spec = plain(&sealed, name)?;
        host.define_xml(&with_device(&spec.xml(), &format!("{cd}{floppy}"))?)?;
        let told = dry_run(&sealed, name)?;
        expect_names(
            &told,
            &[
                "disk fda: the guest could write to the floppy",
                &format!("sda stays as it is: a CD, {IMAGES}/cd.iso"),
                "would replace the empty",
                "provider 'main'",
            ],
        )?;
        let way = Way::that_begins(begin, &refused_seal(&sealed, name)?)?;
        let printed = way.editing(read_only).take(&sealed)?;
        expect_sealed(&sealed, name, &printed)?;
    }
    let told = dry_run(&sealed, "odd01")?;
    expect_names(&told, &["fda stays as it is: a floppy", "Nothing to do"])?;

    // Put in later, into the one that has none.
    host.define_xml(&with_device(&sealed.dumpxml("odd02")?, &floppy)?)?;
    let refused = sealed.refused_start("odd02")?;
    expect_names(&refused, &["disk fda", "not encrypted"])?;
    let refused = Way::that_begins("virtseal vm seal", &refused)?.refused(&sealed)?;
    let printed = Way::that_begins("virsh detach-disk", &refused)?.take(&sealed)?;
    expect_sealed(&sealed, "odd02", &printed)
}

#[test]
fn a_disk_with_data_and_one_that_others_encrypted_are_copied_into_sealed_ones() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let into = |spec: &DomainSpec, refused: &str, plain: &str| {
        let (old, new) = (
            spec.disk.display().to_string(),
            format!("{IMAGES}/{}-new.qcow2", spec.name),
        );
        let path = new.clone();
        let way = Way::that_begins(
            if plain.is_empty() {
                "virtseal volume create"
            } else {
                "copy it"
            },
            refused,
        )?
        .after("copy it")
        .with("NEW", &new)
        .with("--from=PLAIN", &format!("--from={plain}"))
        .editing(move |xml| edited(xml, &old, &path));
        expect_sealed(&sealed, &spec.name, &way.take(&sealed)?)
    };
    let raw = DomainSpec::minimal("data01", &host.empty_disk("data01", 1 << 20)?);
    fs::write(host.path(&raw.disk), vec![7; 1 << 20])?;
    host.define(&raw)?;
    into(&raw, &refused_seal(&sealed, "data01")?, "")?;

    let foreign = plain(&sealed, "foreign01")?;
    let encrypted = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let path = foreign.disk.display().to_string();
    let secret = "secret,id=s,data=0123456789";
    host.run(&[
        "qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", encrypted, &path, "1M",
    ])?
    .succeeded()?;
    host.define(&foreign)?;
    let refused = refused_seal(&sealed, "foreign01")?;
    let plain = format!("{IMAGES}/plain.raw");
    let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
    host.run(&[
        "qemu-img",
        "convert",
        "--object",
        secret,
        "--image-opts",
        &image,
        "-O",
        "raw",
        &plain,
    ])?
    .succeeded()?;
    into(&foreign, &refused, &plain)
}

/// As virt-clone copies the files and the XML.
#[test]
fn a_clone_gets_objects_of_its_own() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let original = sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    let cloned = |name: &str| {
        for file in [&original.disk, &original.nvram()] {
            let file = file.display().to_string();
            host.run(&["cp", &file, &file.replace("web01", name)])?
                .succeeded()?;
        }
        let xml = sealed.dumpxml("web01")?.replace("web01", name);
        host.define_xml(&xml.replace(&original.uuid.to_string(), &Uuid::new_v4().to_string()))
    };
    // As its start says it, and as `vm seal` does.
    for name in ["clone01", "clone02"] {
        cloned(name)?;
        let refused = match name {
            "clone01" => sealed.refused_start(name)?,
            _ => dry_run(&sealed, name)?,
        };
        expect_names(&refused, &["copied from web01", "as virt-clone does"])?;
        let refused = line_with(&refused, "copied from web01")?;
        let file = format!("{IMAGES}/{name}-own.qcow2");
        let disk = file.clone();
        let way = Way::that_begins("virsh edit", &refused)?
            .with("SIZE", "64M")
            .with("FILE", &file)
            .editing(move |xml| own_files(xml, &disk));
        expect_sealed(&sealed, name, &way.take(&sealed)?)?;
    }
    sealed.expect_start("web01")
}

/// Without virtseal's metadata and any encryption, and with other files.
fn own_files(xml: &str, disk: &str) -> Result<String> {
    let mut xml = xml.to_owned();
    for element in ["virtseal:vm", "encryption"] {
        while let Some(at) = xml.find(&format!("<{element}")) {
            let tag = xml[at..].find('>').context("no end of a tag")?;
            let end = format!("</{element}>");
            let length = match xml[..at + tag].ends_with('/') {
                true => tag + 1,
                false => {
                    xml[at..]
                        .find(&end)
                        .with_context(|| format!("no {end} in {xml}"))?
                        + end.len()
                }
            };
            xml.replace_range(at..at + length, "");
        }
    }
    let disks = xml.find("<disk ").context("no disk")?;
    let source = disks + xml[disks..].find("file='").context("no file")? + "file='".len();
    let end = source + xml[source..].find('\'').context("no end")?;
    xml.replace_range(source..end, disk);
    Ok(xml.replace("/qemu/nvram/", "/qemu/nvram/own-"))
}

#[test]
fn a_bios_vm_that_must_be_sealed_boots_by_uefi_then() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    fs::write(host.path("/etc/virtseal/hook.conf"), "require_sealed = true\n")?;
    let spec = plain(&sealed, "bios01")?;
    let xml = spec.xml();
    let (begin, end) = (
        xml.find("<loader").context("no loader")?,
        xml.find("</os>").context("no os")?,
    );
    host.define_xml(&format!("{}{}", &xml[..begin], &xml[end..]))?;
    let to_uefi = |xml: &str| edited(xml, "<os>", "<os firmware='efi'>");
    // vm seal says the same.
    let refused = [sealed.refused_start("bios01")?, refused_seal(&sealed, "bios01")?];
    expect_names(&refused[0], &["boots by BIOS", "require_sealed"])?;
    expect_names(&refused[1], &["does not boot through UEFI"])?;
    let bios = sealed.dumpxml("bios01")?;
    let printed = Way::that_begins("virsh edit", &refused[0])?
        .editing(to_uefi)
        .take(&sealed)?;
    expect_sealed(&sealed, "bios01", &printed)?;

    let other = plain(&sealed, "bios02")?;
    let bios = bios
        .replace(&spec.uuid.to_string(), &other.uuid.to_string())
        .replace("bios01", "bios02");
    host.define_xml(&bios)?;
    let refused = line_with(&dry_run(&sealed, "bios02")?, "does not boot through UEFI")?;
    let printed = Way::that_begins("virsh edit", &refused)?
        .editing(to_uefi)
        .take(&sealed)?;
    expect_sealed(&sealed, "bios02", &printed)
}
