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
use virt::error::ErrorNumber;

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

/// `default` where libvirt says that there is no such domain or secret.
fn absent_is<T>(default: T, result: Result<T, virt::error::Error>) -> Result<T, virt::error::Error> {
    match result {
        Err(error) if is_absence(&error) => Ok(default),
        other => other,
    }
}

/// The domain, or `None` where libvirt has none.
fn find(connection: &Connect, vm: VmId) -> Result<Option<virt::domain::Domain>, virt::error::Error> {
    absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))
}

fn is_absence(error: &virt::error::Error) -> bool {
    [
        ErrorNumber::NoSecret,
        ErrorNumber::NoDomain,
        ErrorNumber::NoDomainMetadata,
    ]
    .into_iter()
    .any(|number| error.code() == number.into())
}
