//! The only room that talks to libvirt, by connections that are opened when they are first needed, and again after libvirtd was
//! restarted. Everything blocks, and runs on a worker thread with a deadline.
//!
//! **Which connection a call uses.** [`StartConnection`] is for what a hook waits for, and offers no more than the *secret*
//! driver: the domain API would wait for the very VM whose start waits for us. All else is asked of a [`Background`], where a
//! call that hangs holds up no start. A start that has to know the storage pools has them asked for there, by another thread, and
//! waits a part of its deadline.

mod domains;
pub mod events;
mod link;
mod probe;
pub mod qemu_conf;
mod running;
mod saved;
mod secrets;

use std::time::Duration;

use thiserror::Error;
use virt::error::ErrorNumber;

use crate::model::envelope::EnvelopeId;

pub use domains::{Background, DefinedDomain, KeptXml, Power, StoragePool, Whereabouts};
pub use running::RunningVm;
pub use secrets::{Arming, StartConnection};

/// Why libvirt did not do as asked.
#[derive(Clone, Debug, Error)]
pub enum LibvirtError {
    /// A call failed.
    #[error("libvirt ({uri}) could not {what}: {message}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// Of which libvirt.
        uri: String,
        /// Its message.
        message: String,
    },
    /// Nothing was heard.
    #[error("libvirt ({uri}) did not answer within {:.1} s; while a libvirtd autostarts VMs it can't", waited.as_secs_f64())]
    Silent {
        /// Which libvirt.
        uri: String,
        /// For how long.
        waited: Duration,
    },
    /// Another client of libvirt has defined a secret while it was getting its value.
    #[error(
        "somebody else has replaced secret {envelope} in libvirt while it was getting its value: who did may have read the key"
    )]
    Usurped {
        /// Whose secret it is.
        envelope: EnvelopeId,
    },
    /// A call failed, and so did taking back what had been done before it.
    #[error("secrets may be left in libvirt, because undoing failed as well ({rollback})")]
    Rollback {
        /// The first failure.
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

fn is_absence(error: &virt::error::Error) -> bool {
    [
        ErrorNumber::NoSecret,
        ErrorNumber::NoDomain,
        ErrorNumber::NoDomainMetadata,
    ]
    .into_iter()
    .any(|number| error.code() == number.into())
}
