//! The only room that talks to libvirt, by connections that are opened when they are first needed, and again after libvirtd was
//! restarted. Everything blocks, and runs on a worker thread with a deadline.
//!
//! **Which connection a call uses.** [`StartConnection`] is for what a hook waits for, and offers no more than the *secret*
//! driver: the domain API would wait for the very VM whose start waits for us. All else is asked of a [`Background`], where a
//! call that hangs holds up no start. A start that has to know the storage pools has them asked for there, by another thread, and
//! waits a part of its deadline.

mod blocks;
mod domains;
pub(crate) mod events;
mod glance;
mod link;
mod probe;
pub(crate) mod qemu_conf;
mod running;
mod saved;
mod secrets;

use std::time::Duration;

use thiserror::Error;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use crate::model::envelope::{EnvelopeId, VmId};

pub(crate) use blocks::{BlockJob, JobEnd};
pub(crate) use domains::{Background, ByLibvirt, DefinedDomain, KeptXml, Power, StoragePool, Whereabouts};
pub(crate) use glance::{DomainEntry, ReadXml};
pub(crate) use running::RunningVm;
pub(crate) use secrets::{Arming, StartConnection};

/// Why libvirt did not do as asked.
#[derive(Clone, Debug, Error)]
pub(crate) enum LibvirtError {
    #[error("libvirt ({uri}) could not {what}: {message}")]
    Call {
        what: &'static str,
        uri: String,
        message: String,
    },
    #[error("libvirt ({uri}) did not answer within {:.1} s; while a libvirtd autostarts VMs it can't", waited.as_secs_f64())]
    Silent { uri: String, waited: Duration },
    /// It answers, and does not tell this. What a VM has is written by whoever may define it, and may be more than a call can carry.
    #[error("libvirt ({uri}) does not tell {part} of VM {vm}: {message}")]
    Untold {
        vm: String,
        part: Part,
        uri: String,
        message: String,
    },
    /// Another client of libvirt has defined a secret while it was getting its value.
    #[error(
        "somebody else has replaced secret {envelope} in libvirt while it was getting its value: who did may have read the key"
    )]
    Usurped { envelope: EnvelopeId },
    /// A call failed, and so did taking back what had been done before it.
    #[error("secrets may be left in libvirt, because undoing failed as well ({rollback})")]
    Rollback {
        #[source]
        source: Box<LibvirtError>,
        /// The failure of the undoing.
        rollback: String,
    },
}

/// A part of what libvirt has of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Xml,
    /// The list of its snapshots.
    Snapshots,
    /// The XML of the snapshot with this name.
    Snapshot(String),
    SavedState,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Xml => f.write_str("the XML"),
            Self::Snapshots => f.write_str("the snapshots"),
            Self::Snapshot(name) => write!(f, "the snapshot {name}"),
            Self::SavedState => f.write_str("the saved state"),
        }
    }
}

/// A part of one VM that libvirt, which answers, does not tell.
#[derive(Debug)]
struct Untold {
    vm: String,
    part: Part,
    message: String,
}

/// What was read of a domain, if it is still there. Without a connection nothing is told of any.
fn told<T>(
    connection: &Connect,
    domain: &Domain,
    read: Result<T, (Part, Error)>,
) -> Result<Result<Option<T>, Untold>, Error> {
    let (part, error) = match read {
        Ok(read) => return Ok(Ok(Some(read))),
        Err(failed) => failed,
    };
    if is_absence(&error) {
        return Ok(Ok(None));
    }
    if !connection.is_alive().unwrap_or(false) {
        return Err(error);
    }
    Ok(Err(Untold {
        vm: domain.name()?,
        part,
        message: error.message().to_owned(),
    }))
}

/// `default` where libvirt says that there is no such domain or secret.
fn absent_is<T>(default: T, result: Result<T, Error>) -> Result<T, Error> {
    match result {
        Err(error) if is_absence(&error) => Ok(default),
        other => other,
    }
}

/// The domain, or `None` where libvirt has none.
fn find(connection: &Connect, vm: VmId) -> Result<Option<Domain>, Error> {
    absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))
}

fn is_absence(error: &Error) -> bool {
    [
        ErrorNumber::NoSecret,
        ErrorNumber::NoDomain,
        ErrorNumber::NoDomainMetadata,
        ErrorNumber::NoDomainSnapshot,
    ]
    .into_iter()
    .any(|number| error.code() == number.into())
}
