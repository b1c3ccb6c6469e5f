//! A volume serves the VM that it was made for, and those that root has shared it with. Domain XML grants nothing.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{DomainSpec, DomainState, SealedHost, codes, edited, expect_names};

/// libvirt lets VMs share a qcow2 image only if none writes to it.
const BOTH_READ: &str = "<readonly/><shareable/>";

/// Two sealed VMs that both name the first one's volume in their XML.
struct Two {
    sealed: SealedHost,
    web: DomainSpec,
    db: DomainSpec,
    shared: String,
    envelope: String,
}

impl Two {
    fn start() -> Result<Self> {
        let sealed = SealedHost::start()?;
        let (web, db) = (SealedHost::spec("web01"), SealedHost::spec("db01"));
        let shared = web.disk.with_file_name("shared.qcow2");
        let envelope = create_volume(&sealed, &shared, &web)?;
        for spec in [&web, &db] {
            create_volume(&sealed, &spec.disk, spec)?;
            let xml = with_disk(spec, &shared, &envelope, BOTH_READ)?;
            sealed.host().define_xml(&xml)?;
            sealed.run(&["vm", "seal", &spec.name])?;
        }
        Ok(Self {
            sealed,
            web,
            db,
            shared: shared.display().to_string(),
            envelope,
        })
    }

    fn share(&self, how: &str, vm: &str) -> Result<serde_json::Value> {
        self.sealed.json(&["volume", "share", &self.shared, how, vm])
    }

    fn db_is_refused(&self) -> Result<()> {
        let refused = self.sealed.refused_start("db01")?;
        expect_names(
            &refused,
            &[
                "db01 stays off",
                "disk vdb",
                &self.envelope,
                &self.web.uuid.to_string(),
            ],
        )
    }
}

#[test]
fn only_root_lets_another_vm_have_a_volume() -> Result<()> {
    let two = Two::start()?;
    let (sealed, host) = (&two.sealed, two.sealed.host());
    // By what the XML says, db01 may not have it.
    two.db_is_refused()?;
    sealed.start_paused("web01")?;
    two.db_is_refused()?;

    let granted = two.share("--with", "db01")?;
    ensure!(granted["changed"] == true, "{granted}");
    ensure!(two.share("--with", "db01")?["changed"] == false);
    sealed.start_paused("db01")?;
    ensure!(sealed.json(&["status"])?["armed"] == 0);
    let shown = sealed.run(&["volume", "info", &two.shared])?;
    expect_names(&shown, &[&two.envelope])?;

    // Taken back while both run: db01 goes on, and does not start again.
    let taken = two.share("--without", "db01")?;
    ensure!(
        codes(&taken["warnings"]) == ["in_use", "shared_by_copies"]
            && taken["warnings"][0]["next"] == "virsh shutdown db01",
        "{taken}"
    );
    ensure!(host.state("db01")? == DomainState::Paused);
    sealed.destroy("db01")?;
    two.db_is_refused()?;
    sealed.destroy("web01")?;
    two.db_is_refused()?;
    sealed.expect_start("web01")?;

    // Both at once, and in the order that they come.
    two.share("--with", &two.db.uuid.to_string())?;
    sealed.wait_for_copies(0)?;
    std::thread::scope(|scope| {
        let starts = [&two.web, &two.db]
            .map(|spec| scope.spawn(|| host.virsh(&["start", "--paused", &spec.name])?.succeeded()));
        starts
            .into_iter()
            .try_for_each(|start| start.join().expect("no start panics").map(drop))
    })?;
    sealed.expect_no_secrets()?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    let shared: Vec<_> = status["vms"][0]["objects"]
        .as_array()
        .context("no objects")?
        .iter()
        .filter(|object| object["shared_with"] != serde_json::json!([]))
        .collect();
    ensure!(
        shared.is_empty(),
        "a read-only disk is no object of its own: {shared:?}"
    );
    Ok(())
}

#[test]
fn no_way_of_naming_a_volume_grants_it() -> Result<()> {
    let two = Two::start()?;
    let (sealed, host) = (&two.sealed, two.sealed.host());
    let db = sealed.dumpxml("db01")?;
    let encryption = format!(
        "<encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>",
        two.envelope
    );
    // As the disk below one of its own, and writable.
    let overlay = two.db.disk.with_file_name("overlay.qcow2");
    create_volume(sealed, &overlay, &two.db)?;
    let (own, shared) = (overlay.display(), &two.shared);
    let layered = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{own}'/><backingStore type='file'>\
         <format type='qcow2'/><source file='{shared}'>{encryption}</source><backingStore/></backingStore>\
         <target dev='vdc' bus='virtio'/></disk></devices>"
    );
    let begin = db
        .find("<target dev='vdb'")
        .or_else(|| db.find("<target dev=\"vdb\""))
        .context("no vdb")?;
    let from = db[..begin].rfind("<disk ").context("no disk")?;
    let end = begin + db[begin..].find("</disk>").context("no end")? + "</disk>".len();
    let without = format!("{}{}", &db[..from], &db[end..]);
    host.define_xml(&edited(&without, "</devices>", &layered)?)?;
    sealed.run(&["vm", "seal", "db01"])?;
    let refused = sealed.refused_start("db01")?;
    expect_names(&refused, &["disk vdc (backing layer 1)", &two.envelope])?;
    for access in ["", "<readonly/>", BOTH_READ] {
        let disk = disk(Path::new(&two.shared), &two.envelope, access);
        host.define_xml(&edited(&without, "</devices>", &format!("{disk}</devices>"))?)?;
        two.db_is_refused()?;
    }

    // Nor as a copy that its owner calls his own.
    let copy = two.db.disk.with_file_name("copy.qcow2");
    std::fs::copy(host.path(&two.shared), host.path(&copy))?;
    expect_names(
        &sealed.refused(
            6,
            &["volume", "share", &copy.display().to_string(), "--with", "db01"],
        )?,
        &["copy.qcow2", &two.shared, &two.web.uuid.to_string()],
    )?;
    // Also where what is in the volume's own place can't be read.
    let original = host.path(&two.shared);
    let content = std::fs::read(&original)?;
    std::fs::write(&original, b"QFI\xfb and no more")?;
    let copy = copy.display().to_string();
    expect_names(
        &sealed.refused(1, &["volume", "share", &copy, "--with", "db01"])?,
        &[&two.shared, "is damaged"],
    )?;
    sealed.run(&["volume", "share", &copy, "--without", "db01"])?;
    std::fs::write(&original, content)?;

    // What is no volume, or its own, is a clear answer.
    let own = two.web.disk.display().to_string();
    expect_names(
        &sealed.refused(2, &["volume", "share", &own, "--with", "web01"])?,
        &["web01's own"],
    )?;
    expect_names(
        &sealed.refused(7, &["volume", "share", "/nonexistent", "--with", "db01"])?,
        &["/nonexistent", "Next: "],
    )?;
    expect_names(
        &sealed.refused(7, &["volume", "share", &own, "--with", "nobody"])?,
        &["nobody"],
    )?;
    sealed.refused(2, &["volume", "share", &own]).map(drop)
}

fn disk(path: &Path, envelope: &str, access: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'><encryption format='luks'>\
         <secret type='passphrase' uuid='{envelope}'/></encryption></source><target dev='vdb' bus='virtio'/>{access}</disk>",
        path.display()
    )
}

fn with_disk(spec: &DomainSpec, path: &Path, envelope: &str, access: &str) -> Result<String> {
    let disk = format!("{}<controller type='usb'", disk(path, envelope, access));
    edited(&spec.xml(), "<controller type='usb'", &disk)
}

fn create_volume(sealed: &SealedHost, disk: &Path, vm: &DomainSpec) -> Result<String> {
    let (disk, vm) = (disk.display().to_string(), vm.uuid.to_string());
    let made = sealed.json(&["volume", "create", &disk, "--size", "64M", "--vm", &vm])?;
    Ok(made["envelope"].as_str().context("no envelope")?.to_owned())
}
