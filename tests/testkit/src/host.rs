//! A libvirt host of a test's own: [`Host`] starts libvirtd in a [`Namespace`] and offers what stories do with it.
//!
//! Paths given to and returned by it are paths in the namespace, where every program of a story runs;
//! [`Host::path`] turns one into a path that the test itself can open.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::deadline::wait_until;
use crate::domain::DomainSpec;
use crate::guest::guest_image;
use crate::namespace::Namespace;
use crate::process::Process;
use crate::programs::require_stage;
use crate::virsh::{DomainState, Output};

const LIBVIRTD_CONF: &str = include_str!("../../host/libvirtd.conf");
const QEMU_CONF: &str = include_str!("../../host/qemu.conf");
const LIBVIRT_SOCKET: &str = "/run/libvirt/libvirt-sock";
const LIBVIRTD_DEADLINE: Duration = Duration::from_secs(60);
const IMAGES: &str = "/var/lib/libvirt/images";

/// What a host shall be like before it starts.
#[derive(Default)]
pub struct HostBuilder {
    libvirtd_conf: Vec<String>,
    qemu_conf: Vec<String>,
    hook: Option<PathBuf>,
}

impl HostBuilder {
    /// Adds a line to libvirtd.conf, such as `max_workers = 20`.
    pub fn libvirtd_conf(mut self, line: &str) -> Self {
        self.libvirtd_conf.push(line.to_owned());
        self
    }

    /// Adds a line to qemu.conf.
    pub fn qemu_conf(mut self, line: &str) -> Self {
        self.qemu_conf.push(line.to_owned());
        self
    }

    /// Installs the program at `path` as the hook `/etc/libvirt/hooks/qemu.d/virtseal`.
    pub fn hook(mut self, path: &Path) -> Self {
        self.hook = Some(path.to_owned());
        self
    }

    /// Starts libvirtd and waits until it answers.
    ///
    /// # Errors
    /// A missing program or right, or libvirtd's own reason.
    pub fn start(self) -> Result<Host> {
        require_stage()?;
        let namespace = Namespace::new()?;
        self.write_configuration(&namespace)?;
        let libvirtd = start_libvirtd(&namespace)?;
        Ok(Host {
            libvirtd: Some(libvirtd),
            namespace,
        })
    }

    fn write_configuration(&self, namespace: &Namespace) -> Result<()> {
        let etc = namespace.path("/etc/libvirt");
        let uuid = format!("host_uuid = \"{}\"", Uuid::new_v4());
        let libvirtd = format!("{LIBVIRTD_CONF}{uuid}\n{}\n", self.libvirtd_conf.join("\n"));
        fs::write(etc.join("libvirtd.conf"), libvirtd)?;
        fs::write(
            etc.join("qemu.conf"),
            format!("{QEMU_CONF}{}\n", self.qemu_conf.join("\n")),
        )?;
        for directory in [
            "/run/console",
            "/var/log/libvirt",
            IMAGES,
            "/etc/libvirt/hooks/qemu.d",
        ] {
            fs::create_dir_all(namespace.path(directory))?;
        }
        if let Some(hook) = &self.hook {
            install_hook(namespace, "qemu.d", hook)?;
        }
        Ok(())
    }
}

/// A running libvirt host. Dropping it ends all its daemons and VMs and deletes its files.
pub struct Host {
    // First, so that libvirtd goes before the namespace around it.
    libvirtd: Option<Process>,
    namespace: Namespace,
}

impl Host {
    /// A host that starts as soon as it is described.
    pub fn builder() -> HostBuilder {
        HostBuilder::default()
    }

    /// A host without anything special.
    ///
    /// # Errors
    /// As [`HostBuilder::start`].
    pub fn start() -> Result<Self> {
        Self::builder().start()
    }

    /// "libvirt X + QEMU Y", as the running daemons say it.
    ///
    /// # Errors
    /// libvirtd does not answer.
    pub fn versions(&self) -> Result<String> {
        let answer = self.virsh(&["version"])?.succeeded()?;
        parse_versions(&answer).with_context(|| format!("`virsh version` has no versions: {answer}"))
    }

    // --- commands and daemons inside ---

    /// A command that will run inside the host, in the directory `/`.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.namespace.command(program)
    }

    /// Runs a command inside the host to its end.
    ///
    /// # Errors
    /// It could not be started. That it failed is in the [`Output`].
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        let (program, arguments) = argv.split_first().context("no command given")?;
        let output = self
            .command(program)
            .args(arguments)
            .output()
            .with_context(|| format!("{program} did not start"))?;
        Ok(Output::new(argv.join(" "), &output))
    }

    /// Starts a daemon inside the host, such as `virtseald`. It is killed when the [`Process`] is dropped.
    ///
    /// # Errors
    /// It ended at once.
    pub fn spawn(&self, name: &str, argv: &[&str]) -> Result<Process> {
        Process::spawn(&self.namespace, name, argv)
    }

    /// Runs virsh on this host's libvirtd.
    ///
    /// # Errors
    /// virsh could not be started.
    pub fn virsh(&self, arguments: &[&str]) -> Result<Output> {
        // Without a terminal, on which it would look for polkit and complain.
        let output = self
            .command("setsid")
            .args(["--wait", "virsh", "--connect", "qemu:///system"])
            .args(arguments)
            .output()
            .context("virsh did not start")?;
        Ok(Output::new(format!("virsh {}", arguments.join(" ")), &output))
    }

    /// Where this side finds the path `inside` of the host.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.namespace.path(inside)
    }

    /// The directory that backs all the host's private paths on disk.
    pub fn directory(&self) -> &Path {
        self.namespace.directory()
    }

    // --- libvirtd ---

    /// The running libvirtd.
    ///
    /// # Errors
    /// It was stopped.
    pub fn libvirtd(&mut self) -> Result<&mut Process> {
        self.libvirtd.as_mut().context("libvirtd is stopped")
    }

    /// Ends libvirtd as an administrator does; VMs go on.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_libvirtd(&mut self) -> Result<()> {
        if let Some(mut libvirtd) = self.libvirtd.take() {
            libvirtd.signal(Signal::SIGTERM)?;
            libvirtd.wait(LIBVIRTD_DEADLINE)?;
        }
        Ok(())
    }

    /// Ends libvirtd as a crash does; VMs go on.
    ///
    /// # Errors
    /// It was stopped, or does not end.
    pub fn kill_libvirtd(&mut self) -> Result<()> {
        let mut libvirtd = self.libvirtd.take().context("libvirtd is stopped")?;
        libvirtd.signal(Signal::SIGKILL)?;
        libvirtd.wait(LIBVIRTD_DEADLINE).map(drop)
    }

    /// Ends libvirtd and starts it again; it finds its VMs running.
    ///
    /// # Errors
    /// It does not end, or not start.
    pub fn restart_libvirtd(&mut self) -> Result<()> {
        self.stop_libvirtd()?;
        self.libvirtd = Some(start_libvirtd(&self.namespace)?);
        Ok(())
    }

    /// Installs a hook into the running host. libvirtd looks for hooks only when it starts, so restart it afterwards.
    ///
    /// # Errors
    /// The file can't be copied.
    pub fn install_hook(&self, path: &Path) -> Result<()> {
        install_hook(&self.namespace, "qemu.d", path)
    }

    /// The same for what libvirtd calls about itself.
    ///
    /// # Errors
    /// The file can't be copied.
    pub fn install_daemon_hook(&self, path: &Path) -> Result<()> {
        install_hook(&self.namespace, "daemon.d", path)
    }

    // --- VMs ---

    /// A fresh copy of the guest image for the VM `name`.
    ///
    /// # Errors
    /// The image can't be built or copied.
    pub fn guest_disk(&self, name: &str) -> Result<PathBuf> {
        let disk = Path::new(IMAGES).join(format!("{name}.raw"));
        fs::copy(guest_image()?, self.path(&disk)).context("the guest image could not be copied")?;
        Ok(disk)
    }

    /// An empty raw disk of `bytes` for the VM `name`.
    ///
    /// # Errors
    /// The file can't be made.
    pub fn empty_disk(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let disk = Path::new(IMAGES).join(format!("{name}.raw"));
        fs::File::create(self.path(&disk))?.set_len(bytes)?;
        Ok(disk)
    }

    /// Defines a VM.
    ///
    /// # Errors
    /// libvirt's own reason.
    pub fn define(&self, spec: &DomainSpec) -> Result<()> {
        self.define_xml(&spec.xml())
    }

    /// Defines a VM by its XML.
    ///
    /// # Errors
    /// libvirt's own reason.
    pub fn define_xml(&self, xml: &str) -> Result<()> {
        let file = format!("/run/define-{}.xml", Uuid::new_v4());
        fs::write(self.path(&file), xml)?;
        let outcome = self.virsh(&["define", &file])?.succeeded();
        fs::remove_file(self.path(&file))?;
        outcome.map(drop)
    }

    /// Undefines a VM as an administrator does who wants to define it again: its files stay.
    ///
    /// # Errors
    /// libvirt's own reason.
    pub fn undefine(&self, name: &str) -> Result<()> {
        self.virsh(&["undefine", "--keep-nvram", "--keep-tpm", name])?
            .succeeded()
            .map(drop)
    }

    /// The state of a VM.
    ///
    /// # Errors
    /// libvirt does not know it.
    pub fn state(&self, name: &str) -> Result<DomainState> {
        Ok(DomainState::parse(&self.virsh(&["domstate", name])?.succeeded()?))
    }

    /// Waits for a state of a VM.
    ///
    /// # Errors
    /// It was not reached within `limit`.
    pub fn wait_for_state(&self, name: &str, state: &DomainState, limit: Duration) -> Result<()> {
        let what = format!("{name} being {state:?}");
        wait_until(limit, &what, || Ok((self.state(name)? == *state).then_some(())))
    }
}

fn start_libvirtd(namespace: &Namespace) -> Result<Process> {
    let mut libvirtd = Process::spawn(
        namespace,
        "libvirtd",
        &["libvirtd", "--pid-file", "/run/libvirtd.pid"],
    )?;
    let socket = namespace.path(LIBVIRT_SOCKET);
    wait_until(LIBVIRTD_DEADLINE, "libvirtd's start", || {
        if let Some(status) = libvirtd.ended()? {
            bail!("libvirtd ended with {status}: {}", libvirtd.output());
        }
        // A successful virsh, not a connection: libvirtd accepts before its drivers are ready.
        if UnixStream::connect(&socket).is_err() {
            return Ok(None);
        }
        let answer = namespace
            .command("virsh")
            .args(["--connect", "qemu:///system", "uri"])
            .output()?;
        Ok(answer.status.success().then_some(()))
    })?;
    Ok(libvirtd)
}

fn install_hook(namespace: &Namespace, kind: &str, hook: &Path) -> Result<()> {
    let directory = namespace.path("/etc/libvirt/hooks").join(kind);
    fs::create_dir_all(&directory)?;
    let target = directory.join("virtseal");
    fs::copy(hook, &target).with_context(|| format!("the hook {} could not be installed", hook.display()))?;
    fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// From `virsh version`: "Using library: libvirt 9.0.0", "Running hypervisor: QEMU 7.2.0".
fn parse_versions(answer: &str) -> Option<String> {
    let value = |key: &str| answer.lines().find_map(|line| line.strip_prefix(key));
    Some(format!(
        "{} + {}",
        value("Using library: ")?,
        value("Running hypervisor: ")?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_virsh() {
        let answer = "Compiled against library: libvirt 9.0.0\nUsing library: libvirt 9.0.0\nUsing API: QEMU 9.0.0\n\
            Running hypervisor: QEMU 7.2.22\n";
        assert_eq!(parse_versions(answer).unwrap(), "libvirt 9.0.0 + QEMU 7.2.22");
        assert_eq!(parse_versions("error"), None);
    }
}
