//! Looks whether libvirt knows of the hook: [`crate::vm::status::hook`] says what that comes to.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Daemon, lock};
use crate::model::envelope::VmId;
use crate::model::finding::Finding;
use crate::vm::status::hook::{self, HookFacts, Libvirtd};

const HOOK: &str = "/etc/libvirt/hooks/qemu.d/virtseal";
/// The libvirt whose hook that is.
const URI: &str = "qemu:///system";
/// The modular one first: where it runs, the other does not.
const DAEMONS: [&str; 2] = ["virtqemud", "libvirtd"];

/// What is wrong with it, if anything is.
pub(super) fn finding(daemon: &Daemon) -> Option<Finding> {
    if daemon.config().libvirt_uri != URI {
        return None;
    }
    let libvirtd = DAEMONS.into_iter().find_map(running);
    let facts = HookFacts {
        installed: changed(Path::new(HOOK)),
        looked: libvirtd.as_ref().and_then(|libvirtd| looked(libvirtd.name)),
        libvirtd,
        heard: *lock(&daemon.hook_heard),
    };
    hook::finding(Path::new(HOOK), &facts)
}

/// The daemon that runs VMs.
pub(super) fn libvirtd() -> &'static str {
    DAEMONS
        .into_iter()
        .find_map(running)
        .map_or(DAEMONS[1], |libvirtd| libvirtd.name)
}

/// Whether a VM that has just been started was never told of by the hook; not known of what began before this virtseald.
pub(super) fn was_passed_by(daemon: &Daemon, vm: VmId) -> bool {
    daemon.opened.elapsed() > daemon.hook_deadline() && !lock(&daemon.prepared).contains(&vm)
}

/// libvirt writes its pid when it starts, and removes the file when it ends.
fn running(name: &'static str) -> Option<Libvirtd> {
    let file = format!("/run/{name}.pid");
    Some(Libvirtd {
        name,
        pid: fs::read_to_string(&file).ok()?.trim().parse().ok()?,
        started: fs::metadata(&file).ok()?.modified().ok()?,
    })
}

/// By what our hook for daemons has noted.
fn looked(name: &str) -> Option<u32> {
    let noted = fs::read_to_string(format!("/run/virtseal/{name}.hooks")).ok()?;
    noted.trim().parse().ok()
}

/// When it was put there, whatever time the package has given to it.
fn changed(path: &Path) -> Option<SystemTime> {
    let found = fs::symlink_metadata(path).ok()?;
    let since = Duration::new(
        found.ctime().try_into().ok()?,
        found.ctime_nsec().try_into().ok()?,
    );
    Some(UNIX_EPOCH + since)
}
