//! What the library's errors say.

use std::error::Error as StdError;

use tss_esapi::Error;
use tss_esapi::constants::response_code::{Tss2ResponseCode, Tss2ResponseCodeKind as Kind};

use super::TpmError;

/// What the TPM said, apart from the layers of software in front of it, whose codes the library takes for the TPM's.
pub(super) fn kind(error: Error) -> Option<Kind> {
    match (error, Layer::of(error)) {
        (Error::Tss2Error(code), Layer::Tpm) => code.kind(),
        _ => None,
    }
}

/// Who in the TSS raised an error (TCG TSS 2.0 Overview and Common Structures, "Response Codes").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    /// The TPM, or a resource manager in its name.
    Tpm,
    Connection,
    Library,
}

impl Layer {
    fn of(error: Error) -> Self {
        match code(error).map(|code| code >> 16) {
            Some(0 | 11) => Self::Tpm,
            Some(10) => Self::Connection,
            _ => Self::Library,
        }
    }
}

/// The 32 bits themselves, which the library shows in this way only.
fn code(error: Error) -> Option<u32> {
    let shown = match error {
        Error::Tss2Error(Tss2ResponseCode::FormatZero(code)) => code.to_string(),
        Error::Tss2Error(Tss2ResponseCode::FormatOne(code)) => code.to_string(),
        _ => return None,
    };
    u32::from_str_radix(shown.rsplit_once("0x")?.1, 16).ok()
}

/// Names the errors that say what to do; the rest keeps what the library says.
pub(super) fn failed(doing: &'static str) -> impl FnOnce(Error) -> TpmError {
    move |error| match kind(error) {
        _ if Layer::of(error) == Layer::Connection => TpmError::Lost(described(error)),
        Some(Kind::Lockout) => TpmError::LockedOut { one_more_in: None },
        Some(
            Kind::ObjectMemory
            | Kind::SessionMemory
            | Kind::SessionHandles
            | Kind::ObjectHandles
            | Kind::Memory,
        ) => TpmError::Full,
        Some(Kind::Initialize | Kind::Failure | Kind::Disabled | Kind::NeedsTest | Kind::Hierarchy) => {
            TpmError::OutOfOrder
        }
        _ => TpmError::Failed {
            doing,
            source: described(error),
        },
    }
}

pub(super) fn described(error: Error) -> Box<dyn StdError + Send + Sync> {
    match (kind(error), code(error)) {
        (None, Some(code)) => format!("TSS response code {code:#x}").into(),
        _ => error.to_string().into(),
    }
}
