//! The story that the demo tells of `web01`, and of a plain twin that shows what sealing changes.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use uuid::Uuid;
use virtseal_testkit::{
    Accelerator, BOOT_DEADLINE, DomainSpec, DomainState, Guest, Host, Output, SealedHost, guest_image,
};

use crate::screen::{Said, Screen, size};
use crate::search::Searched;

const VM: &str = "web01";
const TWIN: &str = "plain-twin";
const DISK: &str = "/var/lib/libvirt/images/web01.qcow2";
const DISK_SIZE: u64 = 1 << 30;
const BACKUP: &str = "/run/main.age";
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Builds the guest and finds out what runs it; says so in a word or two.
///
/// # Errors
/// When the guest can't be built.
pub(crate) fn prepare_machine() -> Result<String> {
    guest_image()?;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    Ok(match Accelerator::of_this_machine() {
        Accelerator::Kvm => format!("KVM, {cpus} CPUs"),
        Accelerator::Tcg => format!("TCG (no KVM), {cpus} CPUs"),
    })
}

/// Everything from the provider to the second boot.
///
/// # Errors
/// The first step that shows something else than it should.
pub(crate) fn tell(screen: &mut Screen, sealed: &SealedHost) -> Result<()> {
    let story = Story::new(sealed);
    screen.step("provider", || story.provider())?;
    screen.step("backup", || story.backup())?;
    screen.step("volume", || story.volume())?;
    screen.step("seal", || story.seal())?;
    thread::scope(|scope| {
        let twin = scope.spawn(|| story.run_twin());
        let told = story.write_and_search(screen);
        if told.is_err() {
            // So that nobody waits for its boot.
            let _ = sealed.host().virsh(&["destroy", TWIN]);
        }
        told?;
        screen.step("control", || {
            twin.join().unwrap_or_else(|_| Err(anyhow!("it panicked")))?;
            story.search_twin()
        })
    })?;
    screen.step("lock", || story.lock())?;
    screen.step("unlock", || story.unlock())
}

/// What a guest wrote where.
struct Markers {
    disk: String,
    tpm: String,
    variable: String,
}

impl Markers {
    fn random() -> Self {
        let marker = |place: &str| format!("marker-{place}-{}", Uuid::new_v4().simple());
        Self {
            disk: marker("disk"),
            tpm: marker("tpm"),
            variable: marker("efi"),
        }
    }

    fn all(&self) -> [&str; 3] {
        [&self.disk, &self.tpm, &self.variable]
    }

    fn write(&self, guest: &mut Guest) -> Result<()> {
        guest.write_disk(&self.disk)?;
        guest.write_tpm(&self.tpm)?;
        guest.write_variable(&self.variable)
    }
}

struct Story<'a> {
    sealed: &'a SealedHost,
    host: &'a Host,
    vm: DomainSpec,
    twin: DomainSpec,
    passphrase: String,
    markers: Markers,
    twin_markers: Markers,
}

impl<'a> Story<'a> {
    fn new(sealed: &'a SealedHost) -> Self {
        let mut vm = DomainSpec::bootable(VM, Path::new(DISK));
        vm.disk_format = "qcow2";
        Self {
            sealed,
            host: sealed.host(),
            vm,
            twin: DomainSpec::bootable(TWIN, Path::new("/var/lib/libvirt/images/plain-twin.raw")),
            passphrase: format!("demo passphrase {}", Uuid::new_v4().simple()),
            markers: Markers::random(),
            twin_markers: Markers::random(),
        }
    }

    // --- a provider, a volume, a sealed VM ---

    fn provider(&self) -> Result<(Said, ())> {
        self.with_passphrase(&["provider", "add", "native", "main", "--passphrase-file", "-"])?;
        ensure!(self.provider_state()? == "not_backed_up");
        let refused = self.create_volume()?;
        let command = format!("virtseal volume create {DISK} --from guest.raw --size 1G --vm {VM}");
        let message = refused.refused()?;
        ensure!(
            message.contains("provider backup main"),
            "refused, but not for want of a backup: {message}"
        );
        ensure!(!self.host.path(DISK).exists(), "{DISK} was made all the same");
        let line = "native provider 'main' added; it wraps no key before its own is backed up:";
        Ok((Said::line(line).quote(&command, &message), ()))
    }

    fn backup(&self) -> Result<(Said, ())> {
        self.with_passphrase(&[
            "provider",
            "backup",
            "main",
            "--output",
            BACKUP,
            "--passphrase-file",
            "-",
        ])?;
        ensure!(self.provider_state()? == "ready");
        let bytes = std::fs::metadata(self.host.path(BACKUP))?.len();
        let line = format!(
            "{} under a passphrase; stock `age -d` opens it as well",
            size(bytes)
        );
        Ok((Said::line(line), ()))
    }

    fn volume(&self) -> Result<(Said, ())> {
        self.create_volume()?.succeeded()?;
        let info = self.json(&["volume", "info", DISK])?;
        ensure!(info["virtual_size"] == DISK_SIZE, "the image's size: {info}");
        ensure!(info["luks"].is_object(), "the image is not encrypted: {info}");
        let image = std::fs::metadata(guest_image()?)?.len();
        let line = format!(
            "qcow2 + LUKS of 1 GiB, filled from a {} raw cloud image",
            size(image)
        );
        Ok((Said::line(line), ()))
    }

    fn seal(&self) -> Result<(Said, ())> {
        self.host.define(&self.vm)?;
        self.sealed.virtseal(&["vm", "seal", VM])?.succeeded()?;
        let status = self.json(&["vm", "status", VM])?;
        let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
        let sealed: Vec<_> = objects
            .iter()
            // swtpm makes the state of a vTPM at its first start.
            .filter(|object| object["state"] == "sealed" || object["state"] == "not_used_yet")
            .filter_map(|object| object["object"].as_str())
            .collect();
        ensure!(sealed.len() == 3 && objects.len() == 3, "{status}");
        let line = format!("{VM}: {}, each under a key of its own", sealed.join(", "));
        Ok((Said::line(line), ()))
    }

    // --- first life ---

    fn write_and_search(&self, screen: &mut Screen) -> Result<()> {
        let mut guest = screen.step("boot", || self.boot())?;
        screen.step("write", || {
            self.markers.write(&mut guest)?;
            let line = "the guest put a marker on its disk, in its TPM and in its UEFI variables";
            Ok((Said::line(line), ()))
        })?;
        screen.step("stop", || {
            stop(self.host, VM, &mut guest)?;
            Ok((Said::line(format!("{VM} is shut off")), ()))
        })?;
        screen.step("search", || self.search())
    }

    fn boot(&self) -> Result<(Said, Guest)> {
        let guest = self.start()?;
        let line = "virsh start: up, through UEFI, off the sealed disk; libvirt holds no secret now";
        Ok((Said::line(line), guest))
    }

    /// Starts the sealed VM and waits until its guest obeys.
    fn start(&self) -> Result<Guest> {
        self.host.virsh(&["start", VM])?.succeeded()?;
        let mut guest = Guest::attach(self.host, VM)?;
        self.sealed.expect_no_secrets()?;
        guest.wait_for_boot(BOOT_DEADLINE)?;
        Ok(guest)
    }

    fn search(&self) -> Result<(Said, ())> {
        let texts = [&self.markers.all()[..], &[&self.passphrase]].concat();
        let mut parts = Vec::new();
        for (name, file) in objects_of(&self.vm) {
            let bytes = Searched::through(&self.host.path(&file), &texts)?.bytes;
            ensure!(bytes > 0, "{name}: {} is empty or missing", file.display());
            parts.push(format!("{name} {}", size(bytes)));
        }
        let all = Searched::through(self.host.directory(), &texts)?;
        ensure!(
            all.places.is_empty(),
            "in plaintext on the host: {:?}",
            all.places
        );
        let line = format!(
            "no marker in {}: {}, {} other files",
            size(all.bytes),
            parts.join(", "),
            all.files - 3
        );
        Ok((Said::line(line), ()))
    }

    // --- the twin: the same guest, not sealed ---

    fn run_twin(&self) -> Result<()> {
        std::fs::copy(guest_image()?, self.host.path(&self.twin.disk))?;
        self.host.define(&self.twin)?;
        self.host.virsh(&["start", TWIN])?.succeeded()?;
        let mut guest = Guest::attach(self.host, TWIN)?;
        guest.wait_for_boot(BOOT_DEADLINE)?;
        self.twin_markers.write(&mut guest)?;
        stop(self.host, TWIN, &mut guest)
    }

    /// The search must be able to find.
    fn search_twin(&self) -> Result<(Said, ())> {
        let found: Vec<_> = objects_of(&self.twin)
            .into_iter()
            .zip(self.twin_markers.all())
            .map(|((name, file), marker)| {
                let searched = Searched::through(&self.host.path(&file), &[marker])?;
                ensure!(
                    !searched.places.is_empty(),
                    "{marker} is not in {}, so the search proves nothing",
                    file.display()
                );
                Ok(name)
            })
            .collect::<Result<_>>()?;
        let line = format!(
            "the same search in a VM that is not sealed finds all: {}",
            found.join(", ")
        );
        Ok((Said::line(line), ()))
    }

    // --- locked, and unlocked ---

    fn lock(&self) -> Result<(Said, ())> {
        self.sealed.lock()?;
        ensure!(self.provider_state()? == "locked");
        let message = self.host.virsh(&["start", VM])?.refused()?;
        for part in [
            VM,
            "disk vda",
            "provider 'main' is locked",
            "virtseal provider unlock main",
        ] {
            ensure!(
                message.contains(part),
                "the refusal does not say {part:?}: {message}"
            );
        }
        ensure!(self.host.state(VM)? == DomainState::ShutOff);
        self.sealed.expect_no_secrets()?;
        let line = "provider locked: its keys are out of memory, and the VM stays off:";
        Ok((Said::line(line).quote("virsh start web01", &message), ()))
    }

    fn unlock(&self) -> Result<(Said, ())> {
        self.with_passphrase(&["provider", "unlock", "main", "--passphrase-file", "-"])?;
        let mut guest = self.start()?;
        let read = [guest.read_disk()?, guest.read_tpm()?, guest.read_variable()?];
        ensure!(
            read == self.markers.all(),
            "the guest read {read:?} instead of {:?}",
            self.markers.all()
        );
        stop(self.host, VM, &mut guest)?;
        let line = format!("{VM} starts again, and the guest reads all three markers back");
        Ok((Said::line(line), ()))
    }

    // --- virtseal ---

    fn create_volume(&self) -> Result<Output> {
        let image = guest_image()?;
        let image = image.to_str().context("a UTF-8 path")?;
        let vm = self.vm.uuid.to_string();
        self.sealed.virtseal(&[
            "volume", "create", DISK, "--from", image, "--size", "1G", "--vm", &vm,
        ])
    }

    fn with_passphrase(&self, arguments: &[&str]) -> Result<()> {
        self.sealed
            .virtseal_reading(&self.passphrase, arguments)?
            .succeeded()
            .map(drop)
    }

    fn provider_state(&self) -> Result<String> {
        let shown = self.json(&["provider", "show", "main"])?;
        let state = shown["provider"]["state"].as_str().context("no state")?;
        Ok(state.to_owned())
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let printed = self
            .sealed
            .virtseal(&[arguments, &["--json"]].concat())?
            .succeeded()?;
        serde_json::from_str(&printed).with_context(|| format!("no JSON: {printed}"))
    }
}

fn objects_of(vm: &DomainSpec) -> [(&'static str, PathBuf); 3] {
    [
        ("disk", vm.disk.clone()),
        ("TPM", vm.tpm_state()),
        ("NVRAM", vm.nvram()),
    ]
}

fn stop(host: &Host, name: &str, guest: &mut Guest) -> Result<()> {
    guest.power_off()?;
    host.wait_for_state(name, &DomainState::ShutOff, STOP_DEADLINE)
}
