//! Why a sealed object can't be read or opened.

use thiserror::Error;

use super::disk::VolumeError;
use super::vtpm::StateError;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::terminal::word;

/// Of any kind of object.
#[derive(Debug, Error)]
pub(crate) enum ObjectError {
    #[error(transparent)]
    Image(#[from] VolumeError),
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<ObjectError> for Problem {
    fn from(error: ObjectError) -> Self {
        match error {
            ObjectError::State(error) => error.into(),
            // Elsewhere a missing image is one to be created; here it had data.
            ObjectError::Image(VolumeError::NotFound(path)) => {
                let path = path.display();
                Self::new(Code::NotFound, format!("{path} does not exist")).next(format!(
                    "put {} back where it was, or restore it from a backup",
                    word(path)
                ))
            }
            ObjectError::Image(VolumeError::NoKeyslotOpens(path)) => {
                let shown = path.display();
                Self::new(
                    Code::Failed,
                    format!("no keyslot of {shown} opens with its key: it was encrypted under another one"),
                )
                .next(
                    Advice::ShowVolume(path.clone())
                        .then("put this VM's own image back there, or restore it from a backup"),
                )
            }
            ObjectError::Image(error) => error.into(),
        }
    }
}
