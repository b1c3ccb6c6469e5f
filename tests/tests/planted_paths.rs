//! Domain XML is written by people who are not root: it leads root to no file that is not theirs, and a seal that fails leaves every
//! file as it was.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{DomainSpec, SealedHost, edited, expect_names};

const TEMPLATE: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";
const USER: u32 = 12_345;

#[test]
fn root_overwrites_and_removes_nothing_that_xml_names() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    // An empty mark, a TPM with any secret, a store that is the victim's, a template that is the attacker's.
    let spec = SealedHost::spec("evil");
    fs::write(host.path(&spec.disk), "")?;
    fs::write(host.path("/run/attacker"), fs::read(TEMPLATE)?)?;
    let another = sealed.seal_new("another")?;
    for victim in [Path::new("/run/victim"), &another.nvram()] {
        let path = host.path(victim);
        if !path.exists() {
            fs::write(&path, "root's own")?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        }
        let before = fs::read(&path)?;
        for template in ["/run/attacker", TEMPLATE] {
            host.define_xml(&marked(&spec, victim, template)?)?;
            let refused = sealed.virtseal(&["vm", "unseal", "evil"])?;
            ensure!(!refused.status.success(), "{refused:?}");
            ensure!(
                fs::read(&path)? == before,
                "{victim:?} was overwritten: {refused:?}"
            );
            host.undefine("evil")?;
        }
    }

    // Sealing removed what was store and template at once.
    for file in ["/run/victim", "/var/lib/libvirt/qemu/nvram/own.fd"] {
        let spec = plain(&sealed, "twice")?;
        if !host.path(file).exists() {
            fs::copy(TEMPLATE, host.path(file))?;
        }
        let before = fs::read(host.path(file))?;
        host.define_xml(&with_store(&spec, file, file)?)?;
        let refused = sealed.virtseal(&["vm", "seal", "twice"])?;
        ensure!(
            !refused.status.success() && refused.stderr.contains("Next: "),
            "{refused:?}"
        );
        ensure!(fs::read(host.path(file))? == before, "{file} was changed");
        host.undefine("twice")?;
    }

    // Nor does it read for him what he may not: another VM's variables, a file of root's.
    fs::copy(TEMPLATE, host.path("/run/secret.fd"))?;
    fs::copy(TEMPLATE, host.path("/var/lib/libvirt/qemu/nvram/foreign_VARS.fd"))?;
    for secret in ["/run/secret.fd", "/var/lib/libvirt/qemu/nvram/foreign_VARS.fd"] {
        fs::set_permissions(host.path(secret), fs::Permissions::from_mode(0o600))?;
        let spec = plain(&sealed, "curious")?;
        host.define_xml(&with_store(&spec, secret, &format!("{NVRAM}/curious_VARS.fd"))?)?;
        let said = sealed.refused(6, &["vm", "seal", "curious"])?;
        expect_names(&said, &[secret, "image_dirs"])?;
        ensure!(!host.path(spec.nvram()).exists());
        host.undefine("curious")?;
    }
    Ok(())
}

#[test]
fn a_directory_is_permitted_by_the_line_of_the_refusal_and_links_in_it_are_not() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let vms = "/run/vms";
    fs::create_dir(sealed.host().path(vms))?;
    let mut spec = DomainSpec::minimal("web01", Path::new("/run/vms/web01.raw"));
    fs::File::create(sealed.host().path(&spec.disk))?.set_len(1 << 20)?;
    sealed.host().define(&spec)?;
    let before = fs::read(sealed.host().path(&spec.disk))?;
    let said = sealed.refused(6, &["vm", "seal", "web01"])?;
    expect_names(
        &said,
        &[
            "/run/vms/web01.raw",
            "/etc/virtseal/virtseald.yaml",
            "systemctl reload virtseald",
        ],
    )?;
    ensure!(fs::read(sealed.host().path(&spec.disk))? == before);
    let line = said.split('`').nth(1).context("no line to add")?.to_owned();
    ensure!(line == "image_dirs: [/run/vms]", "{line}");
    sealed.configure(&format!("{line}\n"))?;
    sealed.daemon()?.signal(Signal::SIGHUP)?;
    virtseal_testkit::wait_until(std::time::Duration::from_secs(10), "the reload", || {
        Ok(sealed
            .virtseal(&["vm", "seal", "--dry-run", "web01"])?
            .status
            .success()
            .then_some(()))
    })?;
    sealed.run(&["vm", "seal", "web01"])?;
    sealed.expect_start("web01")?;

    // Somebody who may write there makes it a link to a disk of root's, or gives that a second name.
    let home = sealed.host().path("/run/vms/home");
    fs::create_dir(&home)?;
    chown(&home, Some(USER), Some(USER))?;
    let victim = sealed.host().path("/run/vms/victim.raw");
    fs::File::create(&victim)?.set_len(1 << 20)?;
    symlink("/run/vms/victim.raw", home.join("link.raw"))?;
    std::os::unix::fs::lchown(home.join("link.raw"), Some(USER), Some(USER))?;
    fs::hard_link(&victim, home.join("hard.raw"))?;
    for (name, why) in [("link", "leads through the link"), ("hard", "is a hard link")] {
        spec = DomainSpec::minimal(name, &Path::new("/run/vms/home").join(format!("{name}.raw")));
        sealed.host().define(&spec)?;
        let said = sealed.refused(6, &["vm", "seal", name])?;
        expect_names(&said, &[name, why, "Next: "])?;
    }
    ensure!(fs::read(&victim)? == vec![0; 1 << 20], "the victim was replaced");

    // A store that is its template by a second name.
    let spec = plain(&sealed, "stored")?;
    let (template, store) = ("/run/vms/vars.fd", "/run/vms/store.fd");
    fs::copy(TEMPLATE, sealed.host().path(template))?;
    fs::hard_link(sealed.host().path(template), sealed.host().path(store))?;
    sealed.host().define_xml(&with_store(&spec, template, store)?)?;
    let said = sealed.refused(1, &["vm", "seal", "stored"])?;
    expect_names(&said, &[store, "the template for that as well"])?;
    ensure!(fs::read(sealed.host().path(store))? == fs::read(TEMPLATE)?);
    Ok(())
}

#[test]
fn the_plan_tells_what_the_act_would_meet_and_a_failing_act_leaves_every_file() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = plain(&sealed, "two")?;
    let second = host.empty_disk("two-b", 1 << 20)?;
    let with_second = |path: &Path, source: &str| {
        edited(
            &spec.xml(),
            "<controller",
            &format!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'>{source}</source>\
                 <target dev='vdb' bus='virtio'/></disk><controller",
                path.display()
            ),
        )
    };
    // Someone has the second disk open: the first one and the store are as they were.
    host.define_xml(&with_second(&second, "")?)?;
    let mut holder = host.spawn(
        "qemu-nbd",
        &[
            "qemu-nbd",
            "-k",
            "/run/nbd.sock",
            "-f",
            "raw",
            "-t",
            second.to_str().context("UTF-8")?,
        ],
    )?;
    virtseal_testkit::wait_until(std::time::Duration::from_secs(10), "qemu-nbd", || {
        Ok(host.path("/run/nbd.sock").exists().then_some(()))
    })?;
    let before = fs::read(host.path(&spec.disk))?;
    let said = sealed.refused(9, &["vm", "seal", "two"])?;
    expect_names(&said, &["two disk vdb", "two-b.raw"])?;
    ensure!(fs::read(host.path(&spec.disk))? == before && !host.path(spec.nvram()).exists());
    ensure!(!sealed.dumpxml("two")?.contains("encryption"));
    holder.signal(Signal::SIGTERM)?;
    holder.wait(std::time::Duration::from_secs(10))?;
    sealed.run(&["vm", "seal", "two"])?;
    sealed.expect_start("two")?;
    host.undefine("two")?;

    // What the plan says, before anything is done.
    let spec = plain(&sealed, "odd")?;
    let with_second = |path: &Path, source: &str| {
        edited(
            &spec.xml(),
            "<controller",
            &format!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'>{source}</source>\
                 <target dev='vdb' bus='virtio'/></disk><controller",
                path.display()
            ),
        )
    };
    let empty = host.empty_disk("no-bytes", 0)?;
    let slices = "<slices><slice type='storage' offset='4096' size='65536'/></slices>";
    let sliced = host.empty_disk("sliced", 1 << 20)?;
    let of_another = host.empty_disk("of-another", 1 << 20)?;
    host.define(&DomainSpec::minimal("neighbour", &of_another))?;
    let store = format!("{NVRAM}/odd_VARS.fd");
    let cases = [
        (with_second(&spec.disk, "")?, "both disk vda and disk vdb"),
        (with_second(&empty, "")?, "has 0 bytes"),
        (with_second(&sliced, slices)?, "has <slices>"),
        (with_second(&of_another, "")?, "is a file of VM neighbour as well"),
        (
            with_store(&spec, "/usr/share/OVMF/none.fd", &store)?,
            "none.fd does not exist",
        ),
        (
            with_store(&spec, TEMPLATE, "/var/lib/libvirt/images/none/x.fd")?,
            "none does not exist",
        ),
        (
            edited(
                &spec.xml(),
                "<memballoon",
                "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='/run/tpm'/></backend></tpm>\
                 <memballoon",
            )?,
            "state in a place of its own",
        ),
    ];
    let before = fs::read(host.path(&spec.disk))?;
    for (xml, said) in cases {
        host.define_xml(&xml)?;
        let defined = host.virsh(&["dumpxml", "--inactive", "odd"])?.succeeded()?;
        if xml.contains("/run/tpm") && !defined.contains("/run/tpm") {
            println!("this libvirt drops a place for the TPM's state: nothing to refuse");
            host.undefine("odd")?;
            continue;
        }
        for arguments in [&["vm", "seal", "--dry-run", "odd"][..], &["vm", "seal", "odd"]] {
            let refused = sealed.virtseal(arguments)?;
            ensure!(!refused.status.success(), "{said}: {refused:?}");
            expect_names(&refused.stderr, &["odd", said, "Next: "])?;
        }
        ensure!(
            fs::read(host.path(&spec.disk))? == before,
            "{said}: the disk was changed"
        );
        host.undefine("odd")?;
    }
    host.define_xml(&edited(&spec.xml(), "<name>odd</name>", "<name>o\\dd</name>")?)?;
    expect_names(
        &sealed.refused(1, &["vm", "seal", "o\\dd"])?,
        &["swtpm_setup", "domrename"],
    )
}

#[test]
fn a_qcow2_store_becomes_raw_and_the_xml_says_so() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = plain(&sealed, "fedora")?;
    let (template, store) = (
        "/var/lib/libvirt/images/vars.qcow2",
        format!("{NVRAM}/fedora_VARS.qcow2"),
    );
    host.run(&[
        "qemu-img", "convert", "-f", "raw", "-O", "qcow2", TEMPLATE, template,
    ])?
    .succeeded()?;
    fs::set_permissions(host.path(template), fs::Permissions::from_mode(0o644))?;
    fs::copy(host.path(template), host.path(&store))?;
    let xml = edited(
        &with_store(&spec, template, &store)?,
        "<nvram ",
        "<nvram format='qcow2' templateFormat='qcow2' ",
    )?;
    host.define_xml(&xml)?;
    host.run(&["qemu-img", "snapshot", "-c", "s", &store])?
        .succeeded()?;
    expect_names(
        &sealed.refused(8, &["vm", "seal", "fedora"])?,
        &["internal snapshot"],
    )?;
    host.run(&["qemu-img", "snapshot", "-d", "s", &store])?
        .succeeded()?;
    sealed.run(&["vm", "seal", "fedora"])?;
    let sealed_xml = sealed.dumpxml("fedora")?;
    ensure!(!sealed_xml.contains("format='qcow2' type='file'"), "{sealed_xml}");
    let info = sealed.json(&["volume", "info", &store])?;
    ensure!(info["format"] == "luks1", "{info}");
    sealed.expect_start("fedora")
}

#[test]
fn a_volume_of_a_pool_is_sealed_and_a_planted_pool_opens_nothing() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let vms = make_pool(&sealed, "vms", 0o711)?;
    let vms = vms.as_str();
    let spec = in_pool(&sealed, "pooled", vms)?;
    sealed.run(&["vm", "seal", "pooled"])?;
    sealed.expect_start("pooled")?;

    // It goes on, as the keystore knows it; a new one and a moved one are told what permits them.
    host.virsh(&["pool-destroy", "vms"])?.succeeded()?;
    sealed.expect_start("pooled")?;
    in_pool(&sealed, "another", vms)?;
    expect_names(
        &sealed.refused(6, &["vm", "seal", "another"])?,
        &["another.raw", "image_dirs", vms],
    )?;
    let moved = format!("{vms}/moved.qcow2");
    fs::rename(host.path(&spec.disk), host.path(&moved))?;
    let shown = spec.disk.to_str().context("UTF-8")?;
    host.define_xml(&edited(&sealed.dumpxml("pooled")?, shown, &moved)?)?;
    expect_names(&sealed.refused_start("pooled")?, &[&moved, "image_dirs"])?;
    host.virsh(&["pool-start", "vms"])?.succeeded()?;
    sealed.expect_start("pooled")?;

    // What root keeps to itself, and what is the system's.
    let roots = make_pool(&sealed, "roots", 0o700)?;
    let system = "/run/system";
    fs::create_dir(host.path(system))?;
    add_pool(&sealed, "system", system)?;
    for (name, directory) in [("thief", roots.as_str()), ("robber", system)] {
        let spec = in_pool(&sealed, name, directory)?;
        let before = fs::read(host.path(&spec.disk))?;
        expect_names(
            &sealed.refused(6, &["vm", "seal", name])?,
            &["image_dirs", directory],
        )?;
        ensure!(
            fs::read(host.path(&spec.disk))? == before,
            "{name}: the file was replaced"
        );
    }
    Ok(())
}

#[test]
fn nothing_is_told_of_files_that_are_not_of_vms() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("curious")?;
    let xml = sealed.dumpxml("curious")?;
    let own = spec.disk.to_str().context("UTF-8")?;
    let secrets = host.path("/run/secrets");
    fs::create_dir(&secrets)?;
    fs::set_permissions(&secrets, fs::Permissions::from_mode(0o700))?;
    fs::copy(host.path(own), secrets.join("image"))?;
    fs::write(secrets.join("text"), "root's own")?;
    nix::unistd::mkfifo(&secrets.join("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
    symlink("/run/secrets/image", secrets.join("link"))?;
    let mut said = Vec::new();
    for name in ["none", "image", "text", "fifo", "link"] {
        let path = format!("/run/secrets/{name}");
        host.define_xml(&edited(&xml, own, &path)?)?;
        let refused = sealed.refused_start("curious")?;
        let shown = sealed.run(&["vm", "status", "curious", "--json"])?;
        let seal = sealed.refused(6, &["vm", "seal", "curious"])?;
        let without = |text: String| text.replace(&path, "PATH");
        said.push([refused, shown, seal].map(without));
    }
    for (other, first) in said[1..].iter().flatten().zip(said[0].iter().cycle()) {
        ensure!(other == first, "{other}\n{first}");
    }
    expect_names(&said[0][0], &["curious stays off", "image_dirs"])?;

    // Nor by a link in the place of a directory that the keystore has a disk in.
    let (volume, home) = ("/run/home/image", host.path("/run/home"));
    fs::create_dir(&home)?;
    let vm = uuid::Uuid::new_v4().to_string();
    sealed.run(&["volume", "create", volume, "--size", "1M", "--vm", &vm])?;
    let is_present = || -> Result<bool> {
        let orphans = sealed.json(&["provider", "orphans"])?;
        let found = orphans["envelopes"].as_array().context("no envelopes")?;
        let found = found.iter().find(|orphan| orphan["path"] == volume);
        found
            .and_then(|orphan| orphan["present"].as_bool())
            .context("no such orphan")
    };
    ensure!(is_present()?);
    fs::rename(&home, host.path("/run/away"))?;
    symlink("/run/secrets", &home)?;
    std::os::unix::fs::lchown(&home, Some(USER), Some(USER))?;
    ensure!(
        !is_present()?,
        "{volume} leads to /run/secrets, and it is told what is there"
    );
    Ok(())
}

/// A storage pool with a directory of its own.
fn make_pool(sealed: &SealedHost, name: &str, mode: u32) -> Result<String> {
    let directory = format!("/var/lib/libvirt/{name}");
    fs::create_dir(sealed.host().path(&directory))?;
    fs::set_permissions(sealed.host().path(&directory), fs::Permissions::from_mode(mode))?;
    add_pool(sealed, name, &directory)?;
    Ok(directory)
}

fn add_pool(sealed: &SealedHost, name: &str, directory: &str) -> Result<()> {
    let host = sealed.host();
    host.virsh(&["pool-define-as", name, "dir", "--target", directory])?
        .succeeded()?;
    host.virsh(&["pool-start", name])?.succeeded().map(drop)
}

/// A VM with an empty disk in the directory of a pool.
fn in_pool(sealed: &SealedHost, name: &str, directory: &str) -> Result<DomainSpec> {
    let spec = DomainSpec::minimal(name, &Path::new(directory).join(format!("{name}.raw")));
    fs::File::create(sealed.host().path(&spec.disk))?.set_len(1 << 20)?;
    sealed.host().define(&spec)?;
    Ok(spec)
}

fn plain(sealed: &SealedHost, name: &str) -> Result<DomainSpec> {
    Ok(DomainSpec::minimal(
        name,
        &sealed.host().empty_disk(name, 1 << 20)?,
    ))
}

fn with_store(spec: &DomainSpec, template: &str, store: &str) -> Result<String> {
    let own = spec.nvram();
    edited(
        &spec.xml(),
        &format!("<nvram template='{TEMPLATE}'>{}</nvram>", own.display()),
        &format!("<nvram template='{template}'>{store}</nvram>"),
    )
}

/// XML that says of itself that it is sealed, with secrets that nobody has.
fn marked(spec: &DomainSpec, store: &Path, template: &str) -> Result<String> {
    let secret = uuid::Uuid::new_v4();
    let xml = edited(
        &spec.xml(),
        &format!("<nvram template='{TEMPLATE}'>{}</nvram>", spec.nvram().display()),
        &format!(
            "<nvram template='{template}' type='file'><source file='{}'><encryption format='luks' engine='qemu'>\
             <secret type='passphrase' uuid='{secret}'/></encryption></source></nvram>",
            store.display()
        ),
    )?;
    let xml = edited(
        &xml,
        "<memory ",
        "<metadata><virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'/></metadata><memory ",
    )?;
    edited(
        &xml,
        "<memballoon",
        &format!(
            "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><encryption secret='{secret}'/></backend></tpm><memballoon"
        ),
    )
}
