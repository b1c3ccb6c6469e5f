//! A [`Host`] with virtseal on it: the hook installed, virtseald running, a native provider ready.

mod commands;
mod readiness;
mod way;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

pub use commands::{codes, expect_names};
pub use readiness::Readiness;
pub use way::Way;

use crate::{DomainSpec, DomainState, Host, HostBuilder, Process, built_program, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(20);

/// The host, with a virtseald of its own.
pub struct SealedHost {
    // First: one that a story has stopped keeps its namespace from ending.
    daemon: Option<Process>,
    host: Host,
}

impl SealedHost {
    /// The passphrase of the provider `main`.
    pub const PASSPHRASE: &str = "correct horse battery staple";
    /// Where the daemon listens, in the namespace.
    pub const SOCKET: &str = "/run/virtseal/virtseald.sock";
    /// Where it listens for the hook.
    pub const HOOK_SOCKET: &str = "/run/virtseal/hook.sock";

    /// libvirtd with the hook, virtseald, and a provider `main` that is backed up and unlocked.
    ///
    /// # Errors
    /// When something does not start; the message has its output.
    pub fn start() -> Result<Self> {
        Self::start_on(Host::builder())
    }

    /// The same on a host that is set up by `builder`.
    ///
    /// # Errors
    /// As [`SealedHost::start`].
    pub fn start_on(builder: HostBuilder) -> Result<Self> {
        let sealed = Self::start_without_provider(builder)?;
        sealed.add_provider("main")?;
        Ok(sealed)
    }

    /// The same without any provider.
    ///
    /// # Errors
    /// As [`SealedHost::start`].
    pub fn start_without_provider(builder: HostBuilder) -> Result<Self> {
        let host = builder.hook(&built_program("virtseal-hook")?).start()?;
        let mut sealed = Self { host, daemon: None };
        sealed.start_daemon()?;
        Ok(sealed)
    }

    /// Adds a native provider and backs it up, with [`SealedHost::PASSPHRASE`] for both.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn add_provider(&self, name: &str) -> Result<PathBuf> {
        let passphrase = self.passphrase_file()?;
        let passphrase = passphrase.to_str().context("a UTF-8 path")?;
        let backup = PathBuf::from(format!("/var/lib/virtseal/{name}.age"));
        self.virtseal(&["provider", "add", "native", name, "--passphrase-file", passphrase])?
            .succeeded()?;
        self.virtseal(&[
            "provider",
            "backup",
            name,
            "--output",
            backup.to_str().context("a UTF-8 path")?,
            "--passphrase-file",
            passphrase,
        ])?
        .succeeded()?;
        Ok(backup)
    }

    /// A file with [`SealedHost::PASSPHRASE`], as a path in the namespace.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn passphrase_file(&self) -> Result<PathBuf> {
        let file = PathBuf::from("/run/passphrase");
        fs::write(self.host.path(&file), Self::PASSPHRASE)?;
        Ok(file)
    }

    /// Starts virtseald and waits until it answers.
    ///
    /// # Errors
    /// When it ends instead.
    pub fn start_daemon(&mut self) -> Result<()> {
        self.start_daemon_through(&[])
    }

    /// The same through a program that sets something up for it, such as `env NAME=VALUE`.
    ///
    /// # Errors
    /// As [`SealedHost::start_daemon`].
    pub fn start_daemon_through(&mut self, launcher: &[&str]) -> Result<()> {
        let program = built_program("virtseald")?;
        let program = program.to_str().context("a UTF-8 path")?;
        let daemon = self.host.spawn("virtseald", &[launcher, &[program]].concat())?;
        let socket = self.host.path(Self::SOCKET);
        self.daemon = Some(daemon);
        wait_until(START_DEADLINE, "virtseald to listen", || {
            let daemon = self.daemon.as_mut().context("the daemon was just started")?;
            if let Some(status) = daemon.ended()? {
                anyhow::bail!("virtseald ended with {status}: {}", daemon.output());
            }
            Ok(std::os::unix::net::UnixStream::connect(&socket)
                .is_ok()
                .then_some(()))
        })
    }

    /// Ends virtseald: with SIGTERM as systemd does, or any other way.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop_daemon(&mut self, signal: Signal) -> Result<()> {
        let mut daemon = self.daemon.take().context("virtseald is not running")?;
        daemon.signal(signal)?;
        daemon.wait(START_DEADLINE).map(drop)
    }

    /// Ends virtseald as a crash does, and starts it again; every provider is locked then.
    ///
    /// # Errors
    /// As [`SealedHost::start_daemon`].
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.stop_daemon(Signal::SIGKILL)?;
        self.start_daemon()
    }

    /// Writes the daemon's configuration, which it reads when it starts and at SIGHUP.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn configure(&self, yaml: &str) -> Result<()> {
        let file = self.host.path("/etc/virtseal/virtseald.yaml");
        fs::write(&file, yaml).with_context(|| file.display().to_string())
    }

    /// The running virtseald, to be ended by the story itself.
    ///
    /// # Errors
    /// When it was stopped.
    pub fn take_daemon(&mut self) -> Result<Process> {
        self.daemon.take().context("virtseald is not running")
    }

    /// The running virtseald.
    ///
    /// # Errors
    /// When it was stopped.
    pub fn daemon(&mut self) -> Result<&mut Process> {
        self.daemon.as_mut().context("virtseald is not running")
    }

    /// Its libvirt.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its libvirt, to be restarted.
    pub fn host_mut(&mut self) -> &mut Host {
        &mut self.host
    }

    /// Defines a VM whose disk is a sealed copy of `image`, and seals it.
    ///
    /// # Errors
    /// When libvirt or virtseal refuses.
    pub fn seal_from(&self, spec: &DomainSpec, image: &Path) -> Result<()> {
        let disk = spec.disk.to_str().context("a UTF-8 path")?;
        let image = image.to_str().context("a UTF-8 path")?;
        let vm = spec.uuid.to_string();
        self.virtseal(&["volume", "create", disk, "--from", image, "--vm", &vm])?
            .succeeded()?;
        self.host.define(spec)?;
        self.virtseal(&["vm", "seal", &spec.name])?.succeeded().map(drop)
    }

    /// Defines a VM with an empty sealed disk, and seals it.
    ///
    /// # Errors
    /// When libvirt or virtseal refuses.
    pub fn seal_empty(&self, spec: &DomainSpec) -> Result<()> {
        let disk = spec.disk.to_str().context("a UTF-8 path")?;
        let vm = spec.uuid.to_string();
        self.virtseal(&["volume", "create", disk, "--size", "64M", "--vm", &vm])?
            .succeeded()?;
        self.host.define(spec)?;
        self.virtseal(&["vm", "seal", &spec.name])?.succeeded().map(drop)
    }

    /// Defines and seals a VM that is not meant to run its guest, with a TPM and an empty disk of 64 MiB.
    ///
    /// # Errors
    /// When libvirt or virtseal refuses.
    pub fn seal_new(&self, name: &str) -> Result<DomainSpec> {
        let spec = Self::spec(name);
        self.seal_empty(&spec)?;
        Ok(spec)
    }

    /// What [`SealedHost::seal_new`] defines.
    #[must_use]
    pub fn spec(name: &str) -> DomainSpec {
        let disk = PathBuf::from(format!("/var/lib/libvirt/images/{name}.qcow2"));
        DomainSpec {
            disk_format: "qcow2",
            ..DomainSpec::minimal(name, &disk)
        }
    }

    /// Starts a VM without running its vCPUs; no key may be left in libvirt then.
    ///
    /// # Errors
    /// When it does not start, or a key is left.
    pub fn start_paused(&self, vm: &str) -> Result<()> {
        self.host
            .virsh(&["start", "--paused", vm])?
            .succeeded()
            .with_context(|| format!("{vm} did not start"))?;
        self.expect_no_secrets()
    }

    /// Starts a VM as far as QEMU, and ends it.
    ///
    /// # Errors
    /// As [`SealedHost::start_paused`].
    pub fn expect_start(&self, vm: &str) -> Result<()> {
        self.start_paused(vm)?;
        self.destroy(vm)
    }

    /// Switches a VM off the hard way.
    ///
    /// # Errors
    /// When it does not run.
    pub fn destroy(&self, vm: &str) -> Result<()> {
        self.host.virsh(&["destroy", vm])?.succeeded().map(drop)
    }

    /// Tries to start a VM that the hook must refuse, and returns the hook's message as the user sees it.
    ///
    /// # Errors
    /// When it starts, fails for another reason, shows more than one line, or leaves a key in libvirt.
    pub fn refused_start(&self, vm: &str) -> Result<String> {
        let said = self.host.virsh(&["start", "--paused", vm])?.refused()?;
        let message = refusal_in(&said).with_context(|| format!("not refused by the hook: {said}"))?;
        ensure!(
            self.host.state(vm)? == DomainState::ShutOff,
            "{vm} was refused, yet it runs"
        );
        self.expect_no_secrets()?;
        Ok(message)
    }

    /// The XML of the next start, byte for byte.
    ///
    /// # Errors
    /// When libvirt does not know the VM.
    pub fn dumpxml(&self, vm: &str) -> Result<String> {
        let dumped = self
            .host
            .virsh(&["dumpxml", "--inactive", "--security-info", vm])?;
        ensure!(dumped.status.success(), "{}", dumped.stderr);
        Ok(dumped.stdout)
    }

    /// The secrets that libvirt holds.
    ///
    /// # Errors
    /// When virsh fails.
    pub fn secrets(&self) -> Result<Vec<String>> {
        let listed = self.host.virsh(&["-q", "secret-list"])?.succeeded()?;
        Ok(listed
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(str::to_owned)
            .collect())
    }

    /// Ends with an error that shows them if libvirt holds any secret.
    ///
    /// # Errors
    /// See above.
    pub fn expect_no_secrets(&self) -> Result<()> {
        let secrets = self.secrets()?;
        ensure!(secrets.is_empty(), "left in libvirt: {secrets:?}");
        Ok(())
    }
}

/// The XML with its only `from` replaced.
///
/// # Errors
/// There is none, or more than one: the story is about something else than it says.
pub fn edited(xml: &str, from: &str, to: &str) -> Result<String> {
    let found = xml.matches(from).count();
    ensure!(found == 1, "{from:?} is there {found} times in {xml}");
    Ok(xml.replace(from, to))
}

/// The one line of the hook in what virsh says: libvirt puts the command and its exit status before it.
fn refusal_in(said: &str) -> Option<String> {
    let mut lines = said
        .lines()
        .skip_while(|line| !line.contains("Hook script execution failed"));
    let (_, message) = lines.next()?.split_once("unexpected exit status 1: ")?;
    let rest: String = lines.collect();
    rest.trim().is_empty().then(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::refusal_in;

    #[test]
    fn refusals_are_one_line() {
        let said = "error: Failed to start domain 'a'\n\
            error: Hook script execution failed: internal error: Child process (LC_ALL=C /etc/hook a prepare begin -) \
            unexpected exit status 1: a stays off: locked\n";
        assert_eq!(refusal_in(said).unwrap(), "a stays off: locked");
        assert_eq!(refusal_in(&format!("{said}second line\n")), None);
        assert_eq!(refusal_in("error: no domain"), None);
    }
}
