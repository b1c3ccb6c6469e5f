//! `virsh create`, as cluster managers do it: libvirt forgets the domain when it ends, or when its start is refused, and used to
//! delete the vTPM's state with it. A state that was there once is never made anew.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{DomainSpec, HostBuilder, SealedHost, expect_names};

/// Its XML is in a file, and libvirt does not know it.
struct Transient {
    sealed: SealedHost,
    spec: DomainSpec,
    file: PathBuf,
}

impl Transient {
    fn start() -> Result<Self> {
        let sealed = SealedHost::start()?;
        let spec = sealed.seal_new("web01")?;
        let file = PathBuf::from("/run/web01.xml");
        let xml = sealed.dumpxml("web01")?;
        sealed
            .host()
            .virsh(&["undefine", "web01", "--keep-nvram", "--keep-tpm"])?
            .succeeded()?;
        let transient = Self { sealed, spec, file };
        transient.keep(&xml)?;
        Ok(transient)
    }

    fn keep(&self, xml: &str) -> Result<()> {
        fs::write(self.sealed.host().path(&self.file), xml).context("the XML")
    }

    fn create(&self) -> Result<()> {
        let file = self.file.display().to_string();
        self.sealed
            .host()
            .virsh(&["create", "--paused", &file])?
            .succeeded()?;
        self.sealed.expect_no_secrets()
    }

    fn refused_create(&self) -> Result<String> {
        let file = self.file.display().to_string();
        self.sealed
            .host()
            .virsh(&["create", "--paused", &file])?
            .refused()
    }

    fn state(&self) -> PathBuf {
        self.sealed.host().path(self.spec.tpm_state())
    }

    fn vtpm(&self) -> Result<String> {
        let status = self.sealed.json(&["vm", "status", "web01"])?;
        let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
        let vtpm = objects.iter().find(|object| object["object"] == "vtpm");
        Ok(vtpm.context("no vtpm")?["state"].to_string())
    }
}

#[test]
fn a_vtpm_outlives_its_transient_domain_and_is_missed_when_it_is_gone() -> Result<()> {
    let vm = Transient::start()?;
    let sealed = &vm.sealed;
    // A first start that is refused is no first run.
    sealed.lock()?;
    expect_names(&vm.refused_create()?, &["web01 stays off", "is locked"])?;
    sealed.unlock()?;
    ensure!(!vm.state().exists());
    // Refused after `prepare`: QEMU can't have this machine.
    let xml = fs::read_to_string(sealed.host().path(&vm.file))?;
    vm.keep(&xml.replace("<memory unit='KiB'>", "<memory unit='KiB'>9999"))?;
    let failed = vm.refused_create()?;
    ensure!(!failed.contains("Hook script"), "{failed}");
    if vm.state().exists() {
        fs::remove_file(vm.state())?;
    }
    vm.keep(&xml)?;

    vm.create()?;
    expect_names(&vm.vtpm()?, &["sealed"])?;
    let live = sealed.json(&["vm", "status", "web01"])?;
    ensure!(live["vms"][0]["power"] == "running", "{live}");
    sealed.destroy("web01")?;
    ensure!(vm.state().exists(), "libvirt has deleted the state");
    let first = fs::read(vm.state())?;

    // A refused create keeps it too.
    sealed.lock()?;
    expect_names(&vm.refused_create()?, &["is locked"])?;
    ensure!(fs::read(vm.state())? == first);
    sealed.unlock()?;
    vm.create()?;
    sealed.destroy("web01")?;

    // Lost after a run: by the same XML as at first, which does not know of any run.
    let kept = vm.state().with_extension("kept");
    fs::rename(vm.state(), &kept)?;
    expect_names(
        &vm.refused_create()?,
        &["vtpm", "its state is gone", "from a backup"],
    )?;
    fs::rename(&kept, vm.state())?;
    vm.create()
}

#[test]
fn another_host_misses_a_vtpm_that_it_has_never_seen() -> Result<()> {
    let old = SealedHost::start()?;
    let spec = old.seal_new("web01")?;
    let status = old.json(&["vm", "status", "web01"])?.to_string();
    expect_names(&status, &["not_used_yet"])?;
    let unused = old.dumpxml("web01")?;
    old.start_paused("web01")?;
    old.wait_for_copies(0)?;
    old.destroy("web01")?;
    let used = old.dumpxml("web01")?;
    ensure!(used != unused, "the run is not in the XML");

    let new = SealedHost::start_without_provider(HostBuilder::default())?;
    for file in [
        &spec.disk,
        &spec.nvram(),
        &PathBuf::from("/var/lib/virtseal/main.age"),
    ] {
        carry(&old, &new, file)?;
    }
    let passphrase = new.passphrase_file()?.display().to_string();
    new.run(&[
        "provider",
        "restore",
        "main",
        "--input",
        "/var/lib/virtseal/main.age",
        "--backup-passphrase-file",
        &passphrase,
        "--passphrase-file",
        &passphrase,
    ])?;
    new.host().define_xml(&used)?;
    expect_names(
        &new.refused_start("web01")?,
        &["vtpm", "its state is gone", "from a backup"],
    )?;
    // That is no reason to make one either.
    ensure!(!new.host().path(spec.tpm_state()).exists());
    carry(&old, &new, &spec.tpm_state())?;
    new.start_paused("web01")?;

    // By an XML from before its first run nothing tells of that, as docs/adr/0012 has it: the state of the first host goes on.
    let spec = old.seal_new("db01")?;
    let unused = old.dumpxml("db01")?;
    old.expect_start("db01")?;
    for file in [&spec.disk, &spec.nvram()] {
        carry(&old, &new, file)?;
    }
    new.host().define_xml(&unused)?;
    new.expect_start("db01")?;
    carry(&old, &new, &spec.tpm_state())?;
    new.expect_start("db01")?;
    fs::remove_file(new.host().path(spec.tpm_state()))?;
    expect_names(&new.refused_start("db01")?, &["vtpm", "its state is gone"])
}

fn carry(old: &SealedHost, new: &SealedHost, file: &Path) -> Result<()> {
    let to = new.host().path(file);
    fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
    fs::copy(old.host().path(file), to).with_context(|| format!("{}", file.display()))?;
    Ok(())
}
