//! That libvirtd has just looked which hooks there are: it does so when it starts and when it reloads, and calls
//! `/etc/libvirt/hooks/daemon.d/virtseal` then. A libvirtd that has left no note here since it was started may not know of `qemu.d/virtseal`
//! yet, and starts VMs without it; virtseald tells of that in its status.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// That of virtseald's sockets.
const DIRECTORY: &str = "/run/virtseal";
/// The daemons that run VMs.
const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];

/// Leaves the pid of the libvirtd that has called this program, in a file that has its name.
pub(crate) fn note() -> io::Result<()> {
    let pid = std::os::unix::process::parent_id();
    let name = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    let name = name.trim_end();
    if !DAEMONS.contains(&name) {
        return Ok(());
    }
    let directory = Path::new(DIRECTORY);
    match DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let new = directory.join(format!("{name}.hooks.new"));
    fs::write(&new, format!("{pid}\n"))?;
    fs::rename(new, directory.join(format!("{name}.hooks")))
}
