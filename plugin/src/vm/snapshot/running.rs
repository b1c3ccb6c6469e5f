//! The overlays of a VM that runs: QEMU merges them with the keys that it has, asked through libvirt.

use std::ops::ControlFlow;
use std::thread::sleep;

use super::{OverlaidDisk, Standing};
use crate::domain::overlays::mirror_of;
use crate::host::libvirt::{Background, BlockJob, JobEnd, LibvirtError};
use crate::model::advice::Advice;
use crate::model::deadlines::image::BLOCK_JOB;
use crate::model::envelope::VmId;
use crate::model::problem::{Problem, chain};
use crate::vm::names::unreachable;

/// How a merge has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// libvirt says that the disk is the sealed image again.
    Merged,
    /// The VM has what it had.
    Stopped,
    /// The VM runs no more, and has what it had.
    PoweredOff,
}

/// Has QEMU merge the overlays of `disk`. One that is at work already is waited for. `note` is called before QEMU is asked to go over:
/// where it fails, QEMU's merge is ended, as what nobody has noted must not come to be.
///
/// # Errors
/// When libvirt refuses, or has lost it: the VM has what it had, unless QEMU was asked to go over.
pub(crate) fn merge(
    libvirt: &Background,
    vm: VmId,
    name: &str,
    disk: &OverlaidDisk,
    note: impl Fn() -> Result<(), Problem>,
    mut watch: impl FnMut(Option<BlockJob>) -> ControlFlow<()>,
) -> Result<Ended, Problem> {
    let (target, base) = (&disk.target, disk.base.display().to_string());
    let failed = |error: &LibvirtError| Problem::failed(format!("{name}: disk {target}: {}", chain(error)));
    let (mut begun, mut pivot) = (false, Ok(()));
    loop {
        let seen = libvirt.as_it_runs(vm).map_err(|error| unreachable(&error))?;
        let Some(running) = seen else {
            return Ok(Ended::PoweredOff);
        };
        match disk.standing(&running.live)? {
            Standing::Bare => return Ok(Ended::Merged),
            Standing::Other => return Err(disk.changed(name)),
            Standing::Overlaid => pivot.map_err(|error| failed(&error))?,
        }
        let mirror = mirror_of(&running.live, target).map_err(|error| Problem::failed(chain(&error)))?;
        pivot = match mirror {
            None if begun => {
                let what = format!("{name}: QEMU has given up the merge of disk {target}");
                return Err(Problem::failed(what).next(Advice::from("see its log, /var/log/libvirt/qemu")));
            }
            None => {
                begun = true;
                libvirt
                    .begin_commit(vm, target, &base)
                    .map_err(|error| failed(&error))?;
                Ok(())
            }
            Some(mirror) if !mirror.is_commit => {
                let what = format!("{name}: disk {target} is being copied");
                let abort = Advice::AbortBlockJob {
                    vm: name.to_owned(),
                    disk: target.clone(),
                };
                return Err(Problem::busy(what).next(Advice::from("wait for that").or(abort)));
            }
            Some(mirror) if mirror.is_ready => match note() {
                Ok(()) => libvirt.end_block_job(vm, target, JobEnd::Pivot),
                Err(failure) => {
                    let ended = libvirt.end_block_job(vm, target, JobEnd::Abort);
                    return Err(not_noted(failure, name, target, ended));
                }
            },
            Some(_) => Ok(()),
        };
        // It may have ended since.
        if watch(libvirt.block_job(vm, target).unwrap_or_default()).is_break() {
            // What is written down stays where it is; the overlay has it too.
            return match libvirt.end_block_job(vm, target, JobEnd::Abort) {
                Ok(()) => Ok(Ended::Stopped),
                Err(error) => Err(failed(&error)),
            };
        }
        sleep(BLOCK_JOB);
    }
}

/// QEMU would go on copying what the guest writes for as long as the VM runs.
fn not_noted(failure: Problem, name: &str, target: &str, ended: Result<(), LibvirtError>) -> Problem {
    let mut failure = failure.of(format!("{name}: disk {target}"));
    match ended {
        Ok(()) => {
            let what = format!("; its merge was ended, and {name} has what it had");
            failure.message.push_str(&what);
        }
        Err(error) => {
            let what = format!("; QEMU's merge goes on, and can't be ended: {}", chain(&error));
            failure.message.push_str(&what);
            let abort = Advice::AbortBlockJob {
                vm: name.to_owned(),
                disk: target.to_owned(),
            };
            failure = failure.next(abort);
        }
    }
    failure
}
