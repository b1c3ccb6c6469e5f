//! Why a TPM does not do as asked.

use std::io;
use std::time::Duration;

use thiserror::Error;

use super::Tpm;
use super::pcr_list::PcrList;
use super::signed::Unsigned;
use super::tcti::Tcti;

/// Why the TPM did not do as asked. The caller adds what it was for.
#[derive(Debug, Error)]
pub(crate) enum TpmError {
    #[error("this host has no TPM at {0}")]
    NoDevice(String),
    /// Somebody else has the device, which is not the resource manager's.
    #[error("{0} is in use by another program: use device:/dev/tpmrm0, which many can share")]
    Busy(String),
    #[error("can't open {path}")]
    Device {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("can't reach the TPM at {0}")]
    Unreachable(Tcti, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the TPM stopped answering")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the TPM did not answer within {:.1} s", .0.as_secs_f64())]
    Silent(Duration),
    /// Another storage key than the one it was sealed under.
    #[error("this is not the TPM that sealed it, or it was cleared since")]
    AnotherTpm,
    /// The host did not boot as it did then.
    #[error("{} from when it was enrolled", differ(.0))]
    PcrsDiffer(PcrList),
    #[error("the TPM has no PCR {0} in its SHA-256 bank")]
    NoSuchPcr(PcrList),
    /// No signature by the enrolled key covers what PCR 11 is.
    #[error("what PCR 11 is now is not signed by the key {key}: {why}")]
    NotSigned { key: String, why: Unsigned },
    #[error("it needs its PIN")]
    NeedsPin,
    /// Another PIN than the one it was enrolled with.
    #[error("the TPM does not accept this PIN{}", tries_left(*.left))]
    WrongPin {
        /// Tries before the TPM locks itself, if it tells.
        left: Option<u32>,
    },
    /// Too many wrong passwords or PINs, by anybody.
    #[error(
        "the TPM is locked out after too many wrong PINs or passwords, {}: tpm2_dictionarylockout --clear-lockout ends \
         that at once",
        heals(*.one_more_in)
    )]
    LockedOut {
        /// After so long it allows one more try, if it tells.
        one_more_in: Option<Duration>,
    },
    #[error(
        "the owner of the TPM has set a password, and there is no storage root key that works without it: \
         make one (tpm2_createprimary -C o -P PASSWORD -c srk.ctx && tpm2_evictcontrol -C o -P PASSWORD -c srk.ctx 0x81000001)"
    )]
    OwnerPassword,
    #[error("the TPM has no room for one more key or session: another program holds them")]
    Full,
    #[error("the TPM is disabled, not started, or has failed its self-test")]
    OutOfOrder,
    /// What is stored is not what the TPM returned.
    #[error("what the TPM has sealed is damaged")]
    Damaged,
    #[error("a TPM binds at most {} bytes", Tpm::MAX_BYTES)]
    TooLong,
    #[error("the TPM failed: {doing}")]
    Failed {
        doing: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("no memory or no thread for a call to the TPM")]
    Host(#[source] io::Error),
}

impl TpmError {
    /// Whether it may go away by waiting.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::NoDevice(_)
                | Self::Busy(_)
                | Self::Unreachable(..)
                | Self::Lost(_)
                | Self::Silent(_)
                | Self::Full
        )
    }
}

fn tries_left(left: Option<u32>) -> String {
    match left {
        None => String::new(),
        Some(0) => "; no try is left, it locks itself now".to_owned(),
        Some(1) => "; one try is left before it locks itself".to_owned(),
        Some(left) => format!("; {left} tries are left before it locks itself"),
    }
}

fn heals(one_more_in: Option<Duration>) -> String {
    match one_more_in {
        None => "and takes none for now".to_owned(),
        Some(time) if time.is_zero() => "and stays so".to_owned(),
        Some(time) if time.as_secs() < 120 => {
            format!("and takes one more in {} s at the most", time.as_secs())
        }
        Some(time) => format!(
            "and takes one more in {} minutes at the most",
            time.as_secs().div_ceil(60)
        ),
    }
}

fn differ(pcrs: &PcrList) -> String {
    match pcrs.0.len() {
        1 => format!("PCR {pcrs} differs"),
        _ => format!("PCRs {pcrs} differ"),
    }
}
