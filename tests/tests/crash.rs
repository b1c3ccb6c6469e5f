//! kill -9 of virtseald at every step of what it does leaves every object openable, and the same command goes on from there.
//!
//! Each story repeats one command on fresh objects and kills the daemon at its first, second, third … step, until the command
//! is through: see [`virtseal_e2e::Tracer`] for what counts as a step. After each kill the daemon starts again, the keystore's
//! envelopes and their objects are opened without virtseal's code, and the command is repeated.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use nix::sys::signal::Signal;
use uuid::Uuid;
use virtseal_e2e::{
    DomainSpec, Host, KeptEnvelope, Output, RootKey, SealedHost, Trace, Tracer, built_program,
    kept_envelopes, require_programs, temporaries, wait_until,
};

const IMAGES: &str = "/var/lib/libvirt/images";
const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";
const STATE: &str = "/var/lib/virtseal";
/// No command has as many steps.
const MOST_STEPS: usize = 250;
/// The least that a command with an effect has: fewer, and the tracer is blind.
const LEAST_STEPS: usize = 3;
const END_DEADLINE: Duration = Duration::from_secs(20);

/// A host whose daemon gets killed, and the key that opens everything on it.
struct Rig {
    sealed: SealedHost,
    root: RootKey,
}

impl Rig {
    fn start() -> Result<Self> {
        require_programs(&[("qemu-io", "qemu-utils")])?;
        let sealed = SealedHost::start()?;
        let root = root_of(&sealed, "main", "/run/root.json")?;
        Ok(Self { sealed, root })
    }

    fn host(&self) -> &Host {
        self.sealed.host()
    }

    /// Runs `command` while the daemon is traced, and kills that before its `nth` step.
    fn kill_at(&mut self, nth: usize, command: &[&str]) -> Result<(Output, Trace)> {
        let daemon = self.sealed.daemon()?.outside_pid()?;
        let tracer = Tracer::kill_at(daemon, nth)?;
        let output = self.sealed.virtseal(command)?;
        let trace = tracer.finish()?;
        if trace.killed {
            self.sealed.daemon()?.wait(END_DEADLINE)?;
            ensure!(
                output.status.success() || !output.stderr.trim().is_empty(),
                "`{}` failed without a word when the daemon was killed at {:?}",
                output.command,
                trace.steps.last()
            );
        }
        Ok((output, trace))
    }

    /// Kills the daemon at each step of `command`, which is made anew for each. `after` looks, with the daemon started and
    /// unlocked again, at what is there, and repeats the command.
    fn at_each_step(
        &mut self,
        command: impl Fn(&mut Self, usize) -> Result<Vec<String>>,
        mut after: impl FnMut(&mut Self, usize, &[&str]) -> Result<()>,
    ) -> Result<()> {
        for nth in 1..MOST_STEPS {
            let arguments = command(self, nth)?;
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let (output, trace) = self.kill_at(nth, &arguments)?;
            let step = trace.steps.last().cloned().unwrap_or_default();
            if !trace.killed {
                output.succeeded()?;
                println!("{} steps: {:?}", trace.steps.len(), trace.steps);
                ensure!(
                    trace.steps.len() >= LEAST_STEPS,
                    "too few steps: {:?}",
                    trace.steps
                );
                return Ok(());
            }
            let what = || format!("killed at step {nth}, {step}, of `{}`", output.command);
            self.sealed.start_daemon().with_context(what)?;
            after(self, nth, &arguments).with_context(what)?;
        }
        bail!("the command does not get through in {MOST_STEPS} steps")
    }

    /// The envelopes that are about `vm`.
    fn envelopes(&self, vm: &Uuid) -> Result<Vec<KeptEnvelope>> {
        let mut envelopes = kept_envelopes(&self.host().path(STATE))?;
        envelopes.retain(|envelope| envelope.vm == vm.to_string());
        Ok(envelopes)
    }

    /// Every envelope of `vm` opens, and so does the object of each active one, and each encrypted object that has its name.
    fn expect_openable(&self, vm: &Uuid) -> Result<()> {
        for envelope in self.envelopes(vm)? {
            self.root.dek(&envelope)?;
            let path = self.host().path(&envelope.location);
            if envelope.state == "active" || (path.is_file() && is_encrypted(&path)?) {
                self.root.open_object(self.host(), &envelope)?;
            }
        }
        Ok(())
    }

    /// The same once the command is through: each is active, too, and there are as many as there should be.
    fn expect_active(&self, vm: &Uuid, kinds: &[&str]) -> Result<()> {
        self.expect_openable(vm)?;
        let envelopes = self.envelopes(vm)?;
        let mut found: Vec<_> = envelopes.iter().map(|envelope| envelope.kind.as_str()).collect();
        found.sort_unstable();
        ensure!(found == kinds, "{found:?}, not {kinds:?}");
        let pending = envelopes.iter().find(|envelope| envelope.state != "active");
        ensure!(pending.is_none(), "still pending: {pending:?}");
        Ok(())
    }

    fn expect_no_temporaries(&self) -> Result<()> {
        for directory in [IMAGES, NVRAM] {
            let left = temporaries(&self.host().path(directory))?;
            ensure!(left.is_empty(), "left in {directory}: {left:?}");
        }
        Ok(())
    }

    /// Starts a VM as far as QEMU, and ends it.
    fn expect_start(&self, vm: &str) -> Result<()> {
        self.host().virsh(&["start", "--paused", vm])?.succeeded()?;
        self.sealed.expect_no_secrets()?;
        self.host().virsh(&["destroy", vm])?.succeeded().map(drop)
    }

    fn passphrase(&self) -> Result<String> {
        let file = self.sealed.passphrase_file()?;
        Ok(file.to_str().context("a UTF-8 path")?.to_owned())
    }

    fn unlock(&self, provider: &str) -> Result<()> {
        let passphrase = self.passphrase()?;
        self.sealed
            .virtseal(&["provider", "unlock", provider, "--passphrase-file", &passphrase])?
            .succeeded()
            .map(drop)
    }

    fn restart(&mut self) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGTERM)?;
        self.sealed.start_daemon()
    }

    fn root_in(&self, backup: &str) -> Result<RootKey> {
        let text = fs::read(self.host().path(backup)).with_context(|| backup.to_owned())?;
        RootKey::from_backup(&text).with_context(|| backup.to_owned())
    }

    fn state_of(&self, provider: &str) -> Result<Option<String>> {
        let listed = self
            .sealed
            .virtseal(&["--json", "provider", "list"])?
            .succeeded()?;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        let providers = listed.as_array().or_else(|| listed["providers"].as_array());
        let found = providers
            .context("no list of providers")?
            .iter()
            .find(|found| found["name"] == provider);
        Ok(found.and_then(|found| found["state"].as_str()).map(str::to_owned))
    }
}

#[test]
fn volume_create_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let vm_of = |nth: usize| Uuid::from_u128(0x1000 + nth as u128);
    let path_of = |nth: usize| format!("{IMAGES}/create-{nth}.qcow2");
    rig.at_each_step(
        |_, nth| {
            words(&[
                "volume",
                "create",
                &path_of(nth),
                "--size",
                "8M",
                "--vm",
                &vm_of(nth).to_string(),
            ])
        },
        |rig, nth, command| {
            rig.expect_openable(&vm_of(nth))?;
            rig.sealed.unlock()?;
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "exists")?;
            rig.expect_openable(&vm_of(nth))?;
            let envelopes = rig.envelopes(&vm_of(nth))?;
            ensure!(envelopes.len() == 1, "not one envelope: {envelopes:?}");
            ensure!(rig.host().path(path_of(nth)).exists(), "no image");
            rig.expect_no_temporaries()
        },
    )
}

#[test]
fn volume_create_from_an_image_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let source = format!("{IMAGES}/source.raw");
    fs::write(rig.host().path(&source), vec![0x5a; 2 << 20])?;
    let vm_of = |nth: usize| Uuid::from_u128(0x2000 + nth as u128);
    let path_of = |nth: usize| format!("{IMAGES}/from-{nth}.qcow2");
    rig.at_each_step(
        |_, nth| {
            words(&[
                "volume",
                "create",
                &path_of(nth),
                "--from",
                &source,
                "--vm",
                &vm_of(nth).to_string(),
            ])
        },
        |rig, nth, command| {
            rig.expect_openable(&vm_of(nth))?;
            rig.sealed.unlock()?;
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "exists")?;
            let envelopes = rig.envelopes(&vm_of(nth))?;
            ensure!(envelopes.len() == 1, "not one envelope: {envelopes:?}");
            rig.root.open_object(rig.host(), &envelopes[0])?;
            rig.root
                .expect_pattern(rig.host(), &envelopes[0], 0x5a, 2 << 20)?;
            rig.expect_no_temporaries()
        },
    )
}

#[test]
fn vm_seal_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let define = |rig: &mut Rig, nth: usize| {
        let spec = spec(nth);
        let disk = spec.disk.to_str().context("a UTF-8 path")?;
        rig.host()
            .run(&["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"])?
            .succeeded()?;
        fs::create_dir_all(rig.host().path(NVRAM))?;
        if nth % 2 == 1 {
            // As libvirt leaves it when a start has failed: to be replaced.
            fs::copy(&spec.firmware.variables, rig.host().path(spec.nvram()))?;
        }
        rig.host().define(&spec)?;
        words(&["vm", "seal", &spec.name])
    };
    rig.at_each_step(define, |rig, nth, command| {
        let spec = spec(nth);
        rig.expect_openable(&spec.uuid)?;
        if nth % 10 == 0 {
            // Half sealed, it starts as it was, or not at all; nothing is lost by trying.
            rig.sealed.unlock()?;
            let _ = rig.host().virsh(&["start", "--paused", &spec.name])?;
            let _ = rig.host().virsh(&["destroy", &spec.name])?;
            rig.expect_openable(&spec.uuid)?;
            return Ok(());
        }
        rig.sealed.unlock()?;
        rig.sealed.virtseal(command)?.succeeded()?;
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
        rig.expect_no_temporaries()?;
        if nth % 8 == 1 {
            rig.expect_start(&spec.name)?;
        }
        Ok(())
    })
}

#[test]
fn provider_add_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let name_of = |nth: usize| format!("added-{nth}");
    rig.at_each_step(
        |_, nth| {
            words(&[
                "provider",
                "add",
                "native",
                &name_of(nth),
                "--passphrase-file",
                &passphrase,
            ])
        },
        |rig, nth, command| {
            let name = name_of(nth);
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "already")?;
            // Whichever of the two runs made it, its passphrase opens it, and it wraps nothing yet.
            rig.restart()?;
            rig.unlock(&name)?;
            ensure!(rig.state_of(&name)?.as_deref() == Some("NotBackedUp"));
            Ok(())
        },
    )
}

#[test]
fn provider_backup_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let name_of = |nth: usize| format!("saved-{nth}");
    let file_of = |nth: usize| format!("/run/saved-{nth}.json");
    rig.at_each_step(
        |rig, nth| {
            let name = name_of(nth);
            rig.sealed
                .virtseal(&[
                    "provider",
                    "add",
                    "native",
                    &name,
                    "--passphrase-file",
                    &passphrase,
                ])?
                .succeeded()?;
            words(&[
                "provider",
                "backup",
                &name,
                "--output",
                &file_of(nth),
                "--no-passphrase",
            ])
        },
        |rig, nth, command| {
            let (name, file) = (name_of(nth), file_of(nth));
            rig.unlock(&name)?;
            if rig.state_of(&name)?.as_deref() == Some("Ready") {
                // It wraps from now on, and relies on this file.
                rig.root_in(&file)?;
            }
            let again = rig.sealed.virtseal(command)?;
            if !again.status.success() {
                done_or(again, "never overwritten")?;
                let other = format!("{file}.2");
                let elsewhere = ["provider", "backup", &name, "--output", &other, "--no-passphrase"];
                rig.sealed.virtseal(&elsewhere)?.succeeded()?;
                ensure!(
                    rig.root_in(&file)?.key == rig.root_in(&other)?.key,
                    "two root keys"
                );
            }
            rig.root_in(&file)?;
            ensure!(rig.state_of(&name)?.as_deref() == Some("Ready"));
            Ok(())
        },
    )
}

#[test]
fn provider_unlock_and_lock_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let vm = Uuid::from_u128(0x4000);
    let image = format!("{IMAGES}/locked.qcow2");
    rig.sealed
        .virtseal(&[
            "volume",
            "create",
            &image,
            "--size",
            "8M",
            "--vm",
            &vm.to_string(),
        ])?
        .succeeded()?;
    for verb in ["unlock", "lock"] {
        rig.at_each_step(
            |rig, _| match verb {
                "unlock" => {
                    rig.sealed.lock()?;
                    words(&["provider", "unlock", "main", "--passphrase-file", &passphrase])
                }
                _ => words(&["provider", "lock", "main"]),
            },
            |rig, _, command| {
                // A new daemon holds no key, whatever the old one was about.
                ensure!(rig.state_of("main")?.as_deref() == Some("Locked"));
                rig.expect_active(&vm, &["disk"])?;
                rig.sealed.virtseal(command)?.succeeded()?;
                rig.unlock("main")?;
                ensure!(rig.state_of("main")?.as_deref() == Some("Ready"));
                Ok(())
            },
        )?;
    }
    Ok(())
}

#[test]
fn provider_restore_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let backup = "/run/main.json";
    rig.sealed
        .virtseal(&[
            "provider",
            "backup",
            "main",
            "--output",
            backup,
            "--no-passphrase",
        ])?
        .succeeded()?;
    rig.at_each_step(
        |rig, _| {
            // A host that has never seen the provider.
            rig.sealed.stop_daemon(Signal::SIGTERM)?;
            fs::remove_dir_all(rig.host().path(STATE))?;
            rig.sealed.start_daemon()?;
            words(&[
                "provider",
                "restore",
                "main",
                "--input",
                backup,
                "--no-backup-passphrase",
                "--passphrase-file",
                &passphrase,
            ])
        },
        |rig, _, command| {
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "already")?;
            rig.restart()?;
            rig.unlock("main")?;
            ensure!(rig.state_of("main")?.as_deref() == Some("Ready"));
            let again = root_of(&rig.sealed, "main", "/run/again.json")?;
            ensure!(again.key == rig.root.key, "another root key");
            Ok(())
        },
    )
}

#[test]
fn first_start_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let daemon = built_program("virtseald")?;
    let daemon = daemon.to_str().context("a UTF-8 path")?;
    for nth in 1..MOST_STEPS {
        rig.sealed.stop_daemon(Signal::SIGKILL)?;
        fs::remove_dir_all(rig.host().path(STATE))?;
        // Held before its first step, so that the tracer sees them all.
        let held = ["sh", "-c", "read go </run/go; exec \"$0\"", daemon];
        rig.host()
            .run(&["sh", "-c", "rm -f /run/go; mkfifo /run/go"])?
            .succeeded()?;
        let mut process = rig.host().spawn("held", &held)?;
        let tracer = Tracer::kill_at(process.outside_pid()?, nth)?;
        fs::write(rig.host().path("/run/go"), "go\n")?;
        wait_until(END_DEADLINE, "the first start", || {
            let answers =
                || Ok::<_, anyhow::Error>(rig.sealed.virtseal(&["provider", "list"])?.status.success());
            Ok((tracer.process_is_gone() || answers()?).then_some(()))
        })?;
        let trace = tracer.finish()?;
        if process.ended()?.is_none() {
            process.signal(Signal::SIGKILL)?;
        }
        process.wait(END_DEADLINE)?;
        rig.sealed
            .start_daemon()
            .with_context(|| format!("after {:?}", trace.steps.last()))?;
        ensure!(rig.state_of("main")?.is_none());
        if !trace.killed {
            println!("{} steps: {:?}", trace.steps.len(), trace.steps);
            ensure!(
                trace.steps.len() > LEAST_STEPS,
                "too few steps: {:?}",
                trace.steps
            );
            return Ok(());
        }
    }
    bail!("the daemon does not start in {MOST_STEPS} steps")
}

fn spec(nth: usize) -> DomainSpec {
    let name = format!("seal{nth}");
    let disk = PathBuf::from(format!("{IMAGES}/{name}.qcow2"));
    DomainSpec {
        uuid: Uuid::from_u128(0x3000 + nth as u128),
        disk_format: "qcow2",
        tpm: !nth.is_multiple_of(3),
        ..DomainSpec::minimal(&name, &disk)
    }
}

fn root_of(sealed: &SealedHost, provider: &str, backup: &str) -> Result<RootKey> {
    sealed
        .virtseal(&[
            "provider",
            "backup",
            provider,
            "--output",
            backup,
            "--no-passphrase",
        ])?
        .succeeded()?;
    let root = RootKey::from_backup(&fs::read(sealed.host().path(backup))?)?;
    fs::remove_file(sealed.host().path(backup))?;
    Ok(root)
}

/// It succeeded, or says with `word` that it was done before.
fn done_or(output: Output, word: &str) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = output.refused()?;
    ensure!(said.contains(word), "neither done nor said to be: {said}");
    Ok(())
}

fn is_encrypted(path: &Path) -> Result<bool> {
    let bytes = fs::read(path)?;
    let luks = |bytes: &[u8]| bytes.starts_with(b"LUKS\xba\xbe");
    // crypt_method, in bytes 32 to 35 of a qcow2 header.
    Ok(luks(&bytes) || (bytes.starts_with(b"QFI\xfb") && bytes.get(32..36) == Some(&[0, 0, 0, 2])))
}

fn words(words: &[&str]) -> Result<Vec<String>> {
    Ok(words.iter().map(|word| (*word).to_owned()).collect())
}
