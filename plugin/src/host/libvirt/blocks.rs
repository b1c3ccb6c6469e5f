//! Snapshots of a VM's disks while it runs: what was laid over an image goes down into it.

use std::ffi::CString;

use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::{Background, LibvirtError, find};
use crate::model::envelope::VmId;

/// How far a block job is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockJob {
    pub done: u64,
    pub total: u64,
}

/// How a block job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobEnd {
    /// The VM goes on with the image that was written to.
    Pivot,
    /// It goes on with the one that it had.
    Abort,
}

impl Background {
    /// Begins to write down into `base` what is above it in the chain of `disk`, and what the guest writes meanwhile.
    pub(crate) fn begin_commit(&self, vm: VmId, disk: &str, base: &str) -> Result<(), LibvirtError> {
        let (disk, base) = (text(disk), text(base));
        self.link.with("merge the overlays of a disk", |connection| {
            let domain = connection.lookup_domain_by_uuid(vm.0)?;
            let flags = sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE;
            // SAFETY: the domain and both texts, which end with a zero, live until the call is over; no `top` means the image that
            // the VM writes to.
            let begun = unsafe {
                sys::virDomainBlockCommit(
                    domain.as_ptr(),
                    disk.as_ptr(),
                    base.as_ptr(),
                    std::ptr::null(),
                    0,
                    flags,
                )
            };
            checked(begun).map(drop)
        })
    }

    /// The block job of `disk`, if there is one.
    pub(crate) fn block_job(&self, vm: VmId, disk: &str) -> Result<Option<BlockJob>, LibvirtError> {
        let disk = text(disk);
        self.link.with("look at a block job", |connection| {
            let domain = connection.lookup_domain_by_uuid(vm.0)?;
            let mut info = sys::virDomainBlockJobInfo {
                type_: 0,
                bandwidth: 0,
                cur: 0,
                end: 0,
            };
            // SAFETY: all three live until the call is over, and libvirt writes to `info` alone.
            let found =
                unsafe { sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0) };
            Ok((checked(found)? > 0).then_some(BlockJob {
                done: info.cur,
                total: info.end,
            }))
        })
    }

    pub(crate) fn end_block_job(&self, vm: VmId, disk: &str, end: JobEnd) -> Result<(), LibvirtError> {
        let disk = text(disk);
        let flags = match end {
            JobEnd::Pivot => sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT,
            JobEnd::Abort => 0,
        };
        self.link.with("end a block job", |connection| {
            let domain = connection.lookup_domain_by_uuid(vm.0)?;
            // SAFETY: the domain and the text, which ends with a zero, live until the call is over.
            checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) }).map(drop)
        })
    }

    /// Lets libvirt forget a snapshot, and nothing else; one that is not there is forgotten.
    pub(crate) fn forget_snapshot(&self, vm: VmId, name: &str) -> Result<(), LibvirtError> {
        self.link.with("forget a snapshot", |connection| {
            let Some(domain) = find(connection, vm)? else {
                return Ok(());
            };
            match Domain::lookup_snapshot_by_name(&domain, name, 0) {
                Err(error) if error.code() == ErrorNumber::NoDomainSnapshot.into() => Ok(()),
                found => found?.delete(sys::VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY),
            }
        })
    }
}

/// Names from XML, which has no zeros.
fn text(name: &str) -> CString {
    CString::new(name.replace('\0', "")).expect("it has no zeros any more")
}

fn checked(result: libc::c_int) -> Result<libc::c_int, Error> {
    match result {
        -1 => Err(Error::last_error()),
        done => Ok(done),
    }
}
