//! What stands in the way of a seal, case by case: each is told, and what is printed about it leads to a sealed VM that starts.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use virtseal_testkit::{DomainSpec, SealedHost, Way, edited, expect_names};

const IMAGES: &str = "/var/lib/libvirt/images";
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";

struct Stage {
    sealed: SealedHost,
}

impl Stage {
    fn start() -> Result<Self> {
        let sealed = SealedHost::start()?;
        fs::create_dir_all(sealed.host().path(NVRAM))?;
        Ok(Self { sealed })
    }

    /// An empty qcow2 disk, for a VM that is not defined yet.
    fn spec(&self, name: &str) -> Result<DomainSpec> {
        let spec = SealedHost::spec(name);
        self.image(&spec.disk)?;
        Ok(spec)
    }

    fn image(&self, path: &Path) -> Result<()> {
        let path = path.to_str().context("UTF-8")?;
        let create = ["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"];
        self.sealed.host().run(&create)?.succeeded().map(drop)
    }

    fn define(&self, xml: &str) -> Result<()> {
        self.sealed.host().define_xml(xml)
    }

    /// The way out of the refusal that says so.
    fn way(&self, vm: &str, said: &str, begin: &str) -> Result<Way> {
        let told = self
            .sealed
            .virtseal(&["vm", "seal", vm, "--dry-run"])?
            .refused()?;
        let line = told.lines().find(|line| line.contains(said));
        let line = line.with_context(|| format!("{said:?} is not in {told:?}"))?;
        Way::that_begins(begin, line).with_context(|| vm.to_owned())
    }

    fn expect_sealed(&self, vm: &str, printed: &str) -> Result<()> {
        expect_names(printed, &[&format!("{vm} is sealed")])?;
        Way::that_begins("virsh start", printed)?.take(&self.sealed)?;
        self.sealed.expect_no_secrets()?;
        self.sealed.destroy(vm)
    }

    /// Defines it, and takes the way.
    fn leads_out(&self, vm: &str, xml: &str, said: &str, begin: &str, edit: Edit) -> Result<()> {
        self.define(xml)?;
        let way = self.way(vm, said, begin)?.editing(edit);
        self.expect_sealed(vm, &way.take(&self.sealed).with_context(|| vm.to_owned())?)
    }
}

type Edit = Box<dyn Fn(&str) -> Result<String>>;

/// To this XML.
fn to(xml: String) -> Edit {
    Box::new(move |_| Ok(xml.clone()))
}

#[test]
fn an_xml_that_can_not_be_sealed_is_edited_as_it_says() -> Result<()> {
    let stage = Stage::start()?;
    let led = |name: &str, from: &str, odd: &str, said: &str, begin: &str| {
        let good = stage.spec(name)?.xml();
        stage.leads_out(name, &edited(&good, from, odd)?, said, begin, to(good))
    };
    let leads_out = |name: &str, from: &str, odd: &str, said: &str| led(name, from, odd, said, "virsh edit");
    let disk_end = "<boot order='1'/>";
    leads_out(
        "transient01",
        disk_end,
        "<transient/><boot order='1'/>",
        "it is transient",
    )?;
    let (template, none) = (
        "template='/usr/share/OVMF/OVMF_VARS_4M.fd'",
        "template='/usr/share/OVMF/none.fd'",
    );
    leads_out("template01", template, none, "none.fd does not exist")?;
    let tpm = "<tpm model='tpm-tis'><backend type='emulator' version='1.2'/></tpm><memballoon";
    leads_out("tpm01", "<memballoon", tpm, "its TPM is version 1.2")?;
    let second = |path: &str, target: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/><target dev='{target}' \
             bus='virtio'/></disk><controller type='usb'"
        )
    };
    let twice = second(&format!("{IMAGES}/twice01.qcow2"), "vdb");
    leads_out(
        "twice01",
        "<controller type='usb'",
        &twice,
        "is both disk vda and disk vdb",
    )?;
    // That of another VM.
    let other = stage.spec("other01")?;
    stage.define(&other.xml())?;
    let theirs = second(&other.disk.display().to_string(), "vdb");
    leads_out(
        "theirs01",
        "<controller type='usb'",
        &theirs,
        "is a file of VM other01 as well",
    )?;
    // Declared otherwise than it is.
    let (declared, found) = (
        "type='raw'",
        "is declared raw, but its first bytes are those of qcow2",
    );
    led("raw01", "type='qcow2'", declared, found, "if the XML is wrong")
}

#[test]
fn a_disk_that_is_missing_or_empty_is_made_as_it_says() -> Result<()> {
    let stage = Stage::start()?;
    let (sealed, host) = (&stage.sealed, stage.sealed.host());

    let missing = SealedHost::spec("missing01");
    stage.define(&missing.xml())?;
    let way = stage.way("missing01", "does not exist", "virtseal volume create")?;
    stage.expect_sealed("missing01", &way.with("SIZE", "8M").take(sealed)?)?;
    let empty = DomainSpec::minimal("empty01", &host.empty_disk("empty01", 0)?);
    stage.define(&empty.xml())?;
    let way = stage.way("empty01", "has 0 bytes", "truncate")?;
    stage.expect_sealed("empty01", &way.with("--size=SIZE", "--size=8M").take(sealed)?)
}

#[test]
fn a_vm_that_has_run_in_plaintext_is_sealed_as_it_says() -> Result<()> {
    let stage = Stage::start()?;
    let (sealed, host) = (&stage.sealed, stage.sealed.host());
    let ran = DomainSpec {
        tpm: true,
        ..DomainSpec::minimal("ran01", &host.empty_disk("ran01", 1 << 20)?)
    };
    host.define(&ran)?;
    sealed.expect_start("ran01")?;
    fs::write(host.path(&ran.disk), vec![7; 1 << 20])?;
    let mut variables = fs::read(host.path(ran.nvram()))?;
    variables[4096] ^= 1;
    fs::write(host.path(ran.nvram()), variables)?;

    // "clear them, the first one first": its disk is copied, its TPM begins anew, with the loss that is said; its variables stay.
    let (old, new) = (
        ran.disk.display().to_string(),
        format!("{IMAGES}/ran01-new.qcow2"),
    );
    let path = new.clone();
    let way = stage.way("ran01", "holds data", "virtseal volume create")?;
    let way = way.with("NEW", &new).editing(move |xml| edited(xml, &old, &path));
    let refused = way.refused(sealed)?;
    expect_names(
        &refused,
        &["plaintext state", "BitLocker asks for its recovery key"],
    )?;
    let printed = Way::that_begins("only if", &refused)?.take(sealed)?;
    expect_names(
        &printed,
        &[
            "encrypted the UEFI variable store",
            "encrypted the state of the TPM",
        ],
    )?;
    stage.expect_sealed("ran01", &printed)
}

#[test]
fn a_vm_is_stopped_or_renamed_first_as_it_says() -> Result<()> {
    let stage = Stage::start()?;
    let (sealed, host) = (&stage.sealed, stage.sealed.host());
    let saved = stage.spec("saved01")?;
    stage.define(&saved.xml())?;
    sealed.start_paused("saved01")?;
    host.virsh(&["managedsave", "saved01"])?.succeeded()?;
    let way = stage.way(
        "saved01",
        "which loses what was in its memory",
        "virsh managedsave-remove",
    )?;
    stage.expect_sealed("saved01", &way.take(sealed)?)?;

    let odd = stage.spec("odd01")?;
    let xml = edited(&odd.xml(), "<name>odd01</name>", "<name>odd\\01</name>")?;
    stage.define(&xml)?;
    let way = stage.way("odd\\01", "has a character", "virsh domrename")?;
    stage.expect_sealed("even01", &way.with("NEW", "even01").take(sealed)?)
}
