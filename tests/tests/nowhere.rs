//! The DEK is nowhere: not in an argument list, an environment, a log, a file or a core image of virtseald, and what would
//! open QEMU's copy of it never reaches a disk.
//!
//! The keys' true values are worked out from a backup of the root key, and then everything is searched for them. What finds
//! nothing must be able to find: see [`needles_are_found_where_they_are_planted`], and the controls in each core image.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use virtseal_testkit::{
    DomainSpec, Host, Needles, Place, RootKey, SealedHost, Strace, built_program, core_image, expect_names,
    kept_envelopes, require_programs, sealed_root, wait_until,
};

const IMAGES: &str = "/var/lib/libvirt/images";
const STATE: &str = "/var/lib/virtseal";
const PASSPHRASE: &str = "the quick brown fox and 41 others";
const OTHER_PASSPHRASE: &str = "jumped over the lazy dogs 1947";
/// Where the namespace keeps what libvirt, virtseal and their children write.
const PRIVATE: [&str; 6] = [
    "/run",
    "/var/log",
    "/var/cache",
    "/var/lib/libvirt",
    STATE,
    "/etc/libvirt",
];
const SHARED: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn dek_is_nowhere() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed_virtseal(
        &["provider", "add", "native", "main", "--passphrase-fd", "0"],
        PASSPHRASE,
    )?;
    let root = rig.back_up()?;
    let children = rig.log_children_of_virtseald()?;
    let vm = rig.seal_vm()?;
    let needles = rig.needles(&root)?;
    children.end()?;

    rig.expect_core_without("after volume create, --from, vm seal and backups", &needles)?;
    rig.start_vm_watched(&vm, &needles)?;
    rig.expect_nowhere("while the VM runs", &needles)?;
    rig.expect_core_without("idle and unlocked, after a start", &needles)?;
    rig.sealed.lock()?;
    rig.expect_core_without("locked", &needles)?;
    rig.sealed_virtseal(
        &["provider", "unlock", "main", "--passphrase-fd", "0"],
        PASSPHRASE,
    )?;
    rig.expect_core_without("unlocked again", &needles)?;
    rig.host().virsh(&["destroy", &vm.name])?.succeeded()?;
    rig.expect_nowhere("after the VM's end", &needles)?;

    rig.restore_on_a_new_host()?;
    rig.expect_core_without("after a restore", &needles)?;
    rig.host().virsh(&["start", "--paused", &vm.name])?.succeeded()?;
    rig.expect_core_without("after a start with adopted envelopes", &needles)?;
    rig.sealed.lock()?;
    rig.expect_core_without("locked after a restore", &needles)?;
    rig.host().virsh(&["destroy", &vm.name])?.succeeded()?;
    rig.expect_nowhere("at the end", &needles)
}

#[test]
fn needles_are_found_where_they_are_planted() -> Result<()> {
    let rig = Rig::start()?;
    let host = rig.host();
    let key: Vec<u8> = (0..32).map(|n| n * 7 + 1).collect();
    let needles = Needles::default().key("planted", &key);
    rig.expect_nowhere("before anything is planted", &needles)?;
    let hex = hex::encode(&key);

    let expect = |found: BTreeSet<Place>, at: &str, needle: &str| {
        let hit = found
            .iter()
            .any(|place| place.at.contains(at) && place.needle == needle);
        ensure!(hit, "{needle} was planted in {at}, and this was found: {found:?}");
        Ok(())
    };
    for directory in ["/var/log/libvirt/qemu", "/run/libvirt", STATE, IMAGES] {
        fs::create_dir_all(host.path(directory))?;
        let file = host.path(directory).join("planted");
        fs::write(&file, [b"in the middle ", &key[..], b" of it"].concat())?;
        expect(
            rig.search_files(&needles)?,
            &format!("{directory}/planted"),
            "planted (bytes)",
        )?;
        fs::remove_file(file)?;
    }
    let _argument = rig
        .host()
        .spawn("argument", &["sh", "-c", "sleep 1000; :", &hex])?;
    expect(rig.search_processes(&needles), "cmdline of", "planted (hex)")?;
    let variable = format!("KEY={}", hex.to_uppercase());
    let environment = host.spawn("environment", &["env", &variable, "sleep", "1000"])?;
    wait_until(PATIENCE, "the variable to be found", || {
        let found = rig.search_processes(&needles);
        Ok(found
            .iter()
            .any(|place| place.at.starts_with("environ"))
            .then_some(()))
    })?;
    let found = needles.in_bytes(&core_image(host, environment.pid())?);
    ensure!(found == ["planted (HEX)"], "in the core image: {found:?}");

    // A process that is gone when anybody looks leaves its argument in strace's log.
    host.run(&["mkfifo", "/run/go"])?.succeeded()?;
    let shell = host.spawn(
        "shell",
        &[
            "sh",
            "-c",
            "read go </run/go; /bin/true $(cat /run/argument); sleep 1000",
        ],
    )?;
    fs::write(host.path("/run/argument"), &hex)?;
    let _log = Strace::attach(host, "shell", shell.pid(), &shell.proc())?;
    fs::write(host.path("/run/go"), "\n")?;
    wait_until(PATIENCE, "the child to be logged", || {
        let found = rig.search_files(&needles)?;
        Ok(found
            .iter()
            .any(|place| place.at.ends_with("shell.execve"))
            .then_some(()))
    })
}

#[test]
fn master_key_is_on_a_tmpfs_and_goes_with_the_vm() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let base = "/var/lib/libvirt/qemu";
    ensure!(
        !is_tmpfs(&host.path(base))?,
        "{base} is a tmpfs itself: this story can't fail here"
    );
    let vm = sealed_vm(&sealed, "tmpfs01")?;
    host.virsh(&["start", "--paused", &vm.name])?.succeeded()?;
    let directory = runtime_directory(host, &vm)?.context("no runtime directory")?;
    let key = directory.join("master-key.aes");
    ensure!(
        fs::metadata(&key)?.len() == 32,
        "{} is no master key",
        key.display()
    );
    ensure!(is_tmpfs(&key)?, "{} is on a disk", key.display());
    ensure!(mounts_of(host, &vm)? == 1, "not one mount for it");
    // What is below the mount is on the disk.
    let below = host.directory().join("root/var/lib/libvirt/qemu");
    ensure!(below.is_dir(), "{} is not what backs {base}", below.display());
    ensure!(
        find(&below, "master-key.aes")?.is_none(),
        "the master key is below the tmpfs, too"
    );

    host.virsh(&["destroy", &vm.name])?.succeeded()?;
    wait_until(PATIENCE, "the end of the mount", || {
        Ok((mounts_of(host, &vm)? == 0 && runtime_directory(host, &vm)?.is_none()).then_some(()))
    })?;
    ensure!(
        find(&host.path(base), "master-key.aes")?.is_none(),
        "the master key is still there"
    );
    Ok(())
}

#[test]
fn start_without_the_tmpfs_is_refused_unless_the_policy_allows_it() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let vm = sealed_vm(&sealed, "policy01")?;
    fs::create_dir_all(host.path("/etc/virtseal"))?;
    fs::write(host.path("/run/no-directory"), "")?;
    let start_with = |policy: &str| {
        let conf = format!("master_key_tmpfs = {policy}\nruntime_dir = /run/no-directory\n");
        fs::write(host.path("/etc/virtseal/hook.conf"), conf)?;
        host.virsh(&["start", "--paused", &vm.name])
    };
    let refused = start_with("required")?.refused()?;
    ensure!(
        refused.contains("policy01") && refused.contains("/run/no-directory"),
        "{refused}"
    );
    sealed.expect_no_secrets()?;
    let told = |command: &[&str]| sealed.virtseal(command).map(|said| said.stdout + &said.stderr);
    let journal = Journal::listen(host)?;
    for policy in ["preferred", "off"] {
        start_with(policy)?.succeeded()?;
        sealed.expect_no_secrets()?;
        ensure!(mounts_of(host, &vm)? == 0, "a mount with {policy}");
        let heard = journal.of("virtseal-hook")?;
        if policy == "preferred" {
            expect_names(&heard, &["PRIORITY=4", "policy01", "/run/no-directory"])?;
            wait_until(PATIENCE, "the status to tell of it", || {
                let told = told(&["status"])?;
                let words = ["QEMU's master key", "/run/no-directory", "virsh start policy01"];
                Ok(words.iter().all(|word| told.contains(word)).then_some(()))
            })?;
        } else {
            ensure!(heard.is_empty(), "{heard}");
            ensure!(
                !told(&["status"])?.contains("master key"),
                "a warning with {policy}"
            );
        }
        host.virsh(&["destroy", &vm.name])?.succeeded()?;
        wait_until(PATIENCE, "the end of the warning", || {
            Ok((!told(&["vm", "status", &vm.name])?.contains("master key")).then_some(()))
        })?;
    }
    fs::remove_file(host.path("/etc/virtseal/hook.conf"))?;
    host.virsh(&["start", "--paused", &vm.name])?.succeeded()?;
    ensure!(mounts_of(host, &vm)? == 1, "no mount by default");
    ensure!(
        journal.of("virtseal-hook")?.is_empty(),
        "a warning without a reason"
    );
    Ok(())
}

/// `journalctl -u virtseald` shows the words alone: they say of which VM they are, and why.
#[test]
fn lines_in_the_journal_name_the_vm_and_the_reason() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let journal = Journal::listen(sealed.host())?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon_through(&["env", "JOURNAL_STREAM=1:1"])?;
    sealed.refused_start("web01")?;
    sealed.unlock()?;
    sealed.start_paused("web01")?;
    let mut heard = String::new();
    let wanted = [
        "MESSAGE=refused: web01 stays off: ",
        "provider 'main' is locked",
        "F_DOMAIN=web01\n",
        "PRIORITY=4\n",
        "MESSAGE=web01: armed (objects 3)",
    ];
    wait_until(PATIENCE, "the lines of two starts", || {
        heard += &journal.of("virtseald")?;
        Ok(wanted.iter().all(|part| heard.contains(part)).then_some(()))
    })
    .with_context(|| heard.clone())?;
    sealed.destroy("web01")
}

/// In the place of systemd's, of which the private host has none.
struct Journal(UnixDatagram);

impl Journal {
    fn listen(host: &Host) -> Result<Self> {
        let socket = host.path("/run/systemd/journal/socket");
        fs::create_dir_all(socket.parent().context("it is below /run")?)?;
        let journal =
            UnixDatagram::bind(&socket).with_context(|| format!("{} can't be bound", socket.display()))?;
        journal.set_nonblocking(true)?;
        Ok(Self(journal))
    }

    /// What this program has written since.
    fn of(&self, program: &str) -> Result<String> {
        let mut written = String::new();
        let identifier = format!("SYSLOG_IDENTIFIER={program}\n");
        let mut entry = [0; 65536];
        loop {
            match self.0.recv(&mut entry) {
                Ok(length) => {
                    let entry = String::from_utf8_lossy(&entry[..length]);
                    if entry.contains(&identifier) {
                        written += &entry;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(written),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A host that is searched.
struct Rig {
    sealed: SealedHost,
    since: SystemTime,
}

impl Rig {
    fn start() -> Result<Self> {
        require_programs(&[("gdb", "gdb"), ("strace", "strace")])?;
        Ok(Self {
            since: SystemTime::now(),
            sealed: SealedHost::start_without_provider(Host::builder())?,
        })
    }

    fn host(&self) -> &Host {
        self.sealed.host()
    }

    /// Runs the command line with `secret` in a pipe on its standard input.
    fn sealed_virtseal(&self, arguments: &[&str], secret: &str) -> Result<()> {
        let mut command = self.host().command(built_program("virtseal")?);
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        child
            .stdin
            .take()
            .context("no standard input")?
            .write_all(secret.as_bytes())?;
        ensure!(child.wait()?.success(), "{arguments:?} failed");
        Ok(())
    }

    /// Both kinds of backup. The one without a passphrase is read and removed.
    fn back_up(&self) -> Result<RootKey> {
        let (sealed, bare) = ("/var/lib/virtseal/main.age", "/run/main.json");
        let with = [
            "provider",
            "backup",
            "main",
            "--output",
            sealed,
            "--passphrase-fd",
            "0",
        ];
        self.sealed_virtseal(&with, OTHER_PASSPHRASE)?;
        self.sealed
            .virtseal(&["provider", "backup", "main", "--output", bare, "--no-passphrase"])?
            .succeeded()?;
        let root = RootKey::from_backup(&fs::read(self.host().path(bare))?)?;
        fs::remove_file(self.host().path(bare))?;
        Ok(root)
    }

    /// A VM with disk, NVRAM and vTPM, whose disk was filled from an image, and an empty volume more.
    fn seal_vm(&self) -> Result<DomainSpec> {
        let source = format!("{IMAGES}/source.raw");
        fs::write(self.host().path(&source), vec![0x5a; 1 << 20])?;
        let vm = spec("nowhere01");
        self.sealed.seal_from(&vm, Path::new(&source))?;
        let empty = format!("{IMAGES}/empty.qcow2");
        self.sealed
            .virtseal(&[
                "volume",
                "create",
                &empty,
                "--size",
                "8M",
                "--vm",
                &vm.uuid.to_string(),
            ])?
            .succeeded()?;
        Ok(vm)
    }

    /// Every key there is: passphrases, root key, KEK, DEKs.
    fn needles(&self, root: &RootKey) -> Result<Needles> {
        let mut needles = Needles::default()
            .key("passphrase", PASSPHRASE.as_bytes())
            .key("backup's passphrase", OTHER_PASSPHRASE.as_bytes())
            .key("root key", &root.key);
        let envelopes = kept_envelopes(&self.host().path(STATE))?;
        let mut kinds: Vec<_> = envelopes.iter().map(|envelope| envelope.kind.as_str()).collect();
        kinds.sort_unstable();
        ensure!(kinds == ["disk", "disk", "nvram", "vtpm"], "{kinds:?}");
        for envelope in &envelopes {
            // The key is the true one: it opens the object.
            root.open_object(self.host(), envelope)?;
            needles = needles
                .key(&format!("DEK of the {}", envelope.kind), &root.dek(envelope)?)
                .key(&format!("KEK of the {}", envelope.kind), &root.kek_of(envelope)?);
        }
        Ok(needles)
    }

    /// Starts the VM while every process is looked at all the time, and strace logs the arguments and the environment of
    /// each that libvirtd starts.
    fn start_vm_watched(&mut self, vm: &DomainSpec, needles: &Needles) -> Result<()> {
        let log = self.log_children_of_libvirtd()?;
        let done = AtomicBool::new(false);
        let (looks, found) = thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let (mut looks, mut found) = (0, BTreeSet::new());
                while !done.load(Ordering::SeqCst) {
                    found.extend(self.search_processes(needles));
                    looks += 1;
                    thread::sleep(Duration::from_micros(500));
                }
                (looks, found)
            });
            let started = self.host().virsh(&["start", "--paused", &vm.name]);
            done.store(true, Ordering::SeqCst);
            let watched = watch.join();
            started?.succeeded()?;
            watched.map_err(|_| anyhow::anyhow!("the watch panicked"))
        })?;
        println!("{looks} looks at all processes during the start");
        ensure!(looks > 5 && found.is_empty(), "{looks} looks, and {found:?}");
        log.end()?;
        let log = fs::read_to_string(self.host().path("/run/libvirtd.execve"))?;
        for program in ["qemu-system-x86_64", "swtpm", "hooks/qemu.d/virtseal"] {
            ensure!(log.contains(program), "{program} is not in strace's log");
        }
        ensure!(log.contains("LC_ALL=C"), "no environment in strace's log");
        Ok(())
    }

    fn log_children_of_libvirtd(&mut self) -> Result<Strace> {
        let (pid, proc) = {
            let libvirtd = self.sealed.host_mut().libvirtd()?;
            (libvirtd.pid(), libvirtd.proc())
        };
        Strace::attach(self.host(), "libvirtd", pid, &proc)
    }

    fn log_children_of_virtseald(&mut self) -> Result<Strace> {
        let (pid, proc) = self.daemon()?;
        Strace::attach(self.host(), "virtseald", pid, &proc)
    }

    /// virtseald's pid in the namespace, and its directory under `/proc`.
    fn daemon(&mut self) -> Result<(u32, PathBuf)> {
        let daemon = self.sealed.daemon()?;
        Ok((daemon.pid(), daemon.proc()))
    }

    fn expect_nowhere(&self, when: &str, needles: &Needles) -> Result<()> {
        let mut found = self.search_files(needles)?;
        found.extend(self.search_processes(needles));
        ensure!(found.is_empty(), "{when}: {found:#?}");
        Ok(())
    }

    fn search_processes(&self, needles: &Needles) -> BTreeSet<Place> {
        needles.in_processes(&self.host().path("/proc"))
    }

    /// As the namespace sees them, as they are on the disk below its mounts, and what is new in the shared temporary
    /// directories.
    fn search_files(&self, needles: &Needles) -> Result<BTreeSet<Place>> {
        let (mut found, mut files) = (BTreeSet::new(), 0);
        let backing = self.host().directory();
        let mut search = |directory: &Path, skip: &dyn Fn(&Path) -> bool| {
            let (places, read) = needles.in_tree(directory, skip)?;
            found.extend(places);
            files += read;
            anyhow::Ok(())
        };
        search(backing, &|_| false)?;
        for directory in PRIVATE {
            search(&self.host().path(directory), &|_| false)?;
        }
        for directory in SHARED {
            let old = |path: &Path| {
                let other_host = path.to_string_lossy().contains("virtseal-e2e-");
                let changed = fs::metadata(path).and_then(|found| found.modified());
                other_host || (path.is_file() && changed.is_ok_and(|changed| changed < self.since))
            };
            search(Path::new(directory), &old)?;
        }
        ensure!(files > 30, "only {files} files were read");
        Ok(found)
    }

    /// No key is in virtseald's memory, as far as root can read it; and what must be there is.
    fn expect_core_without(&mut self, when: &str, needles: &Needles) -> Result<()> {
        let (pid, proc) = self.daemon()?;
        let maps = fs::read_to_string(proc.join("maps"))?;
        let secret_maps = maps.lines().filter(|line| line.contains("/secretmem")).count();
        let core = core_image(self.host(), pid)?;
        // It holds the sealed root key all the time: a core image without it proves nothing.
        let sealed = sealed_root(&self.host().path(STATE), "main")?;
        let control = Needles::default().text("sealed root key", &sealed[40..140]);
        ensure!(
            !control.in_bytes(&core).is_empty(),
            "{when}: no core image of virtseald"
        );
        let found = needles.in_bytes(&core);
        println!(
            "{when}: {} KiB of core image, {secret_maps} memfd_secret mappings, found {found:?}",
            core.len() >> 10
        );
        ensure!(found.is_empty(), "in virtseald's core image, {when}: {found:?}");
        Ok(())
    }

    /// Another keystore on the same host: the provider comes from its backup, the envelopes from the domain's XML.
    fn restore_on_a_new_host(&mut self) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGTERM)?;
        let state = self.host().path(STATE);
        fs::rename(&state, state.with_file_name("libvirt").join("old-state"))?;
        self.sealed.start_daemon()?;
        let backup = "/var/lib/libvirt/old-state/main.age";
        // Two secrets: the shell gives the second one its descriptor, and never sees it.
        let script = r#"exec "$0" provider restore main --input "$1" --backup-passphrase-fd 0 --passphrase-fd 3 3<"$2""#;
        let pipe = self.host().path("/run/second-passphrase");
        self.host()
            .run(&["mkfifo", "/run/second-passphrase"])?
            .succeeded()?;
        let mut child = self
            .host()
            .command("sh")
            .args(["-c", script])
            .arg(built_program("virtseal")?)
            .args([backup, "/run/second-passphrase"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        child
            .stdin
            .take()
            .context("no standard input")?
            .write_all(OTHER_PASSPHRASE.as_bytes())?;
        fs::write(&pipe, PASSPHRASE)?;
        ensure!(child.wait()?.success(), "the provider is not restored");
        fs::remove_file(pipe).map_err(Into::into)
    }
}

fn spec(name: &str) -> DomainSpec {
    DomainSpec {
        disk_format: "qcow2",
        tpm: true,
        ..DomainSpec::minimal(name, Path::new(&format!("{IMAGES}/{name}.qcow2")))
    }
}

fn sealed_vm(sealed: &SealedHost, name: &str) -> Result<DomainSpec> {
    let vm = spec(name);
    sealed.seal_empty(&vm)?;
    Ok(vm)
}

/// libvirt's directory for the running VM.
fn runtime_directory(host: &Host, vm: &DomainSpec) -> Result<Option<PathBuf>> {
    let suffix = format!("-{}", vm.name);
    let entries = fs::read_dir(host.path("/var/lib/libvirt/qemu"))?.filter_map(Result::ok);
    let mut directories = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("domain-") && name.ends_with(&suffix)
    });
    Ok(directories.next().map(|entry| entry.path()))
}

/// How many mounts of virtseal's there are for the VM.
fn mounts_of(host: &Host, vm: &DomainSpec) -> Result<usize> {
    let mounts = fs::read_to_string(host.path("/proc/1/mountinfo"))?;
    let source = format!(" - tmpfs virtseal:{} ", vm.uuid);
    Ok(mounts.lines().filter(|line| line.contains(&source)).count())
}

fn is_tmpfs(path: &Path) -> Result<bool> {
    let found = statfs(path).with_context(|| path.display().to_string())?;
    Ok(found.filesystem_type() == TMPFS_MAGIC)
}

/// A file called `name` below `directory`.
fn find(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|found| found == name) {
            return Ok(Some(path));
        }
        if path.is_dir()
            && !path.is_symlink()
            && let Some(found) = find(&path, name)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
