//! A host whose virtseald gets killed on purpose, and what must be true of it afterwards.

use std::env;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use uuid::Uuid;

use crate::{
    Host, HostTpm, KeptEnvelope, Output, RootKey, SealedHost, Step, Trace, Tracer, expect_durable,
    kept_envelopes, require_programs, temporaries,
};

/// Where images are, in the namespace.
pub const IMAGES: &str = "/var/lib/libvirt/images";
/// Where libvirt keeps UEFI variables.
pub const NVRAM: &str = "/var/lib/libvirt/qemu/nvram";
/// Where virtseald keeps its state.
pub const STATE: &str = "/var/lib/virtseal";
/// No command has as many steps.
pub const MAX_STEPS: usize = 250;
/// The least that a command with an effect has: fewer, and the tracer is blind.
pub const LEAST_STEPS: usize = 3;
/// How many steps lie between two kills of [`Rig::at_each_step`]: a sample, unless this says 1, as in `make soak`.
const STRIDE: &str = "VIRTSEAL_KILL_STRIDE";
const SAMPLE: usize = 3;
const END_DEADLINE: Duration = Duration::from_secs(20);

/// A host whose daemon gets killed, and the key that opens everything on it.
pub struct Rig {
    /// The host.
    pub sealed: SealedHost,
    /// Of its provider `main`.
    pub root: RootKey,
    tpm: Option<HostTpm>,
}

impl Rig {
    /// Starts it, with the provider `main` ready.
    ///
    /// # Errors
    /// As [`SealedHost::start`].
    pub fn start() -> Result<Self> {
        require_programs(&[("qemu-io", "qemu-utils")])?;
        let sealed = SealedHost::start()?;
        let root = root_of(&sealed, "main", "/run/root.json")?;
        Ok(Self {
            sealed,
            root,
            tpm: None,
        })
    }

    /// Gives it a TPM, which is freed of what each killed daemon has left in it.
    ///
    /// # Errors
    /// As [`HostTpm::of`].
    pub fn give_tpm(&mut self) -> Result<()> {
        self.tpm = Some(HostTpm::of(&mut self.sealed)?);
        Ok(())
    }

    /// Waits for the daemon, which was killed.
    ///
    /// # Errors
    /// It does not end.
    pub fn expect_killed(&mut self) -> Result<()> {
        self.sealed.daemon()?.wait(END_DEADLINE)?;
        match &self.tpm {
            Some(tpm) => tpm.forget_clients(self.sealed.host()),
            None => Ok(()),
        }
    }

    /// Its libvirt.
    pub fn host(&self) -> &Host {
        self.sealed.host()
    }

    /// Does `work` while the daemon is traced, and kills that before its `nth` step.
    ///
    /// # Errors
    /// `work` can't be done, or it failed without a word.
    pub fn kill_at(
        &mut self,
        nth: usize,
        work: impl FnOnce(&SealedHost) -> Result<Output>,
    ) -> Result<(Output, Trace)> {
        self.killed(nth, Tracer::kill_at, work)
    }

    fn killed(
        &mut self,
        nth: usize,
        kill_at: fn(Pid, usize) -> Result<Tracer>,
        work: impl FnOnce(&SealedHost) -> Result<Output>,
    ) -> Result<(Output, Trace)> {
        let daemon = self.sealed.daemon()?.outside_pid()?;
        let tracer = kill_at(daemon, nth)?;
        let output = work(&self.sealed)?;
        let trace = tracer.finish()?;
        if trace.killed {
            self.expect_killed()?;
            ensure!(
                output.status.success() || !output.stderr.trim().is_empty(),
                "`{}` failed without a word when the daemon was killed at {:?}",
                output.command,
                trace.steps.last()
            );
        }
        Ok((output, trace))
    }

    /// Kills the daemon at each step of `command`, or at each third one (`VIRTSEAL_KILL_STRIDE`): the command is made anew for each of these rounds. `after` looks, with the daemon started and
    /// unlocked again, at what is there, and repeats the command. Returns the steps of the command that gets through, which
    /// leave nothing behind that a power cut would take.
    ///
    /// # Errors
    /// What `command` and `after` say, with the step; or the command has too few steps, or does not end.
    pub fn at_each_step(
        &mut self,
        command: impl Fn(&mut Self, usize) -> Result<Vec<String>>,
        after: impl FnMut(&mut Self, usize, &[&str]) -> Result<()>,
    ) -> Result<Vec<Step>> {
        self.at_each(Tracer::kill_at, command, after)
    }

    /// The same at each change of a file alone: for a command that asks libvirt for so much that messages are most of it.
    ///
    /// # Errors
    /// As [`Rig::at_each_step`].
    pub fn at_each_change(
        &mut self,
        command: impl Fn(&mut Self, usize) -> Result<Vec<String>>,
        after: impl FnMut(&mut Self, usize, &[&str]) -> Result<()>,
    ) -> Result<Vec<Step>> {
        self.at_each(Tracer::kill_at_change, command, after)
    }

    fn at_each(
        &mut self,
        kill_at: fn(Pid, usize) -> Result<Tracer>,
        command: impl Fn(&mut Self, usize) -> Result<Vec<String>>,
        mut after: impl FnMut(&mut Self, usize, &[&str]) -> Result<()>,
    ) -> Result<Vec<Step>> {
        for (nth, round) in (1..MAX_STEPS).step_by(stride()?).zip(1..) {
            let arguments = command(self, round)?;
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let (output, trace) = self.killed(nth, kill_at, |sealed| sealed.virtseal(&arguments))?;
            let step = trace.steps.last().cloned().unwrap_or_default();
            if !trace.killed {
                output.succeeded()?;
                println!("{} steps: {:?}", trace.steps.len(), trace.steps);
                expect_durable(&trace.steps)?;
                ensure!(
                    trace.steps.len() >= LEAST_STEPS,
                    "too few steps: {:?}",
                    trace.steps
                );
                return Ok(trace.steps);
            }
            let what = || format!("killed at step {nth}, {step}, of `{}`", output.command);
            self.sealed.start_daemon().with_context(what)?;
            after(self, round, &arguments).with_context(what)?;
        }
        bail!("the command does not get through in {MAX_STEPS} steps")
    }

    /// The envelopes that are about `vm`.
    ///
    /// # Errors
    /// The keystore can't be read.
    pub fn envelopes(&self, vm: &Uuid) -> Result<Vec<KeptEnvelope>> {
        let mut envelopes = kept_envelopes(&self.host().path(STATE))?;
        envelopes.retain(|envelope| envelope.vm == vm.to_string());
        Ok(envelopes)
    }

    /// Every envelope of `vm` opens, and so does the object of each active one, and each encrypted object that has its name.
    ///
    /// # Errors
    /// The first that does not open.
    pub fn expect_openable(&self, vm: &Uuid) -> Result<()> {
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
    ///
    /// # Errors
    /// The first thing that is not so.
    pub fn expect_active(&self, vm: &Uuid, kinds: &[&str]) -> Result<()> {
        self.expect_openable(vm)?;
        let envelopes = self.envelopes(vm)?;
        let mut found: Vec<_> = envelopes.iter().map(|envelope| envelope.kind.as_str()).collect();
        found.sort_unstable();
        ensure!(found == kinds, "{found:?}, not {kinds:?}");
        let pending = envelopes.iter().find(|envelope| envelope.state != "active");
        ensure!(pending.is_none(), "still pending: {pending:?}");
        Ok(())
    }

    /// Nothing half-made is left.
    ///
    /// # Errors
    /// What is left.
    pub fn expect_no_temporaries(&self) -> Result<()> {
        for directory in [IMAGES, NVRAM] {
            let left = temporaries(&self.host().path(directory))?;
            ensure!(left.is_empty(), "left in {directory}: {left:?}");
        }
        Ok(())
    }

    /// A file with the passphrase, as a path in the namespace.
    ///
    /// # Errors
    /// It can't be written.
    pub fn passphrase(&self) -> Result<String> {
        let file = self.sealed.passphrase_file()?;
        Ok(file.to_str().context("a UTF-8 path")?.to_owned())
    }

    /// Ends the daemon in good order and starts it again.
    ///
    /// # Errors
    /// It does not end, or not start.
    pub fn restart(&mut self) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGTERM)?;
        self.sealed.start_daemon()
    }

    /// The root key in a backup without a passphrase.
    ///
    /// # Errors
    /// There is none.
    pub fn root_in(&self, backup: &str) -> Result<RootKey> {
        let text = fs::read(self.host().path(backup)).with_context(|| backup.to_owned())?;
        RootKey::from_backup(&text).with_context(|| backup.to_owned())
    }

    /// The state of a provider; `None` if there is none of that name.
    ///
    /// # Errors
    /// The daemon does not say.
    pub fn state_of(&self, provider: &str) -> Result<Option<String>> {
        let listed = self
            .sealed
            .virtseal(&["--json", "provider", "list"])?
            .succeeded()?;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        let found = listed["providers"]
            .as_array()
            .context("no list of providers")?
            .iter()
            .find(|found| found["name"] == provider);
        Ok(found.and_then(|found| found["state"].as_str()).map(str::to_owned))
    }
}

/// The root key of a provider that is unlocked.
///
/// # Errors
/// It can't be backed up.
pub fn root_of(sealed: &SealedHost, provider: &str, backup: &str) -> Result<RootKey> {
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
///
/// # Errors
/// What it says instead.
pub fn done_or(output: Output, word: &str) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = output.refused()?;
    ensure!(said.contains(word), "neither done nor said to be: {said}");
    Ok(())
}

/// An owned command line.
///
/// # Errors
/// Never; it is for the end of closures that can fail.
pub fn words(words: &[&str]) -> Result<Vec<String>> {
    Ok(words.iter().map(|word| (*word).to_owned()).collect())
}

fn stride() -> Result<usize> {
    match env::var(STRIDE) {
        Ok(steps) => steps
            .parse::<NonZeroUsize>()
            .map(NonZeroUsize::get)
            .with_context(|| format!("{STRIDE}={steps}")),
        Err(_) => Ok(SAMPLE),
    }
}

fn is_encrypted(path: &Path) -> Result<bool> {
    let bytes = fs::read(path)?;
    let luks = |bytes: &[u8]| bytes.starts_with(b"LUKS\xba\xbe");
    // crypt_method, in bytes 32 to 35 of a qcow2 header.
    Ok(luks(&bytes) || (bytes.starts_with(b"QFI\xfb") && bytes.get(32..36) == Some(&[0, 0, 0, 2])))
}
