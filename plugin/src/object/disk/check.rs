//! What `qemu-img check` finds in the tables of an encrypted image, which it opens with its key and reads only.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::time::Instant;

use serde::Deserialize;

use super::error::{Attempt, VolumeError};
use super::file_id::FileId;
use super::open::Image;
use super::qemu_img::{Answer, Locking, QemuImg};
use super::rewrite::is_free;
use crate::host::permitted::PermittedPath;
use crate::model::deadlines::image::CHECK;
use crate::model::image_format::Format;
use crate::secret::Passphrase;

/// How the clusters of an image fit to what says where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Structure {
    Sound,
    /// So many clusters are used by nothing: that wastes space, and loses no data.
    Leaks(u64),
    /// So many errors: data is lost, or will be.
    Corrupt(u64),
    /// Somebody has it open, or wrote to it meanwhile: nothing can be told.
    InUse,
    /// Its format has no tables.
    None,
}

/// Checks the image at `place`, which `passphrase` opens. No VM is kept from starting with it meanwhile.
pub(crate) fn check(place: &PermittedPath, passphrase: &Passphrase) -> Result<Structure, VolumeError> {
    let path = place.shown();
    match is_free(place) {
        Ok(()) => {}
        Err(VolumeError::InUse(_)) => return Ok(Structure::InUse),
        Err(error) => return Err(error),
    }
    let file = place.open(OpenOptions::new().read(true)).attempt("open", path)?;
    let before = FileId::from(&file.metadata().attempt("look at", path)?);
    let image = Image::from_file(file.try_clone().attempt("read", path)?, path, None)?;
    match image.format()? {
        Format::Qcow2Luks1 => {}
        Format::Luks1 | Format::Luks2 => return Ok(Structure::None),
        Format::Qcow2 | Format::Raw => return Err(VolumeError::NotEncrypted(path.to_owned())),
    }
    let answer = QemuImg::new(&["check", "--output=json"])?
        .with_key(passphrase)
        .attempt("pass a key for", path)?
        .reading(file.as_fd())
        .sealed(file.as_fd(), Locking::None)
        .answer(path, Instant::now() + CHECK)?;
    let after = FileId::from(&file.metadata().attempt("look at", path)?);
    if after != before || matches!(is_free(place), Err(VolumeError::InUse(_))) {
        return Ok(Structure::InUse);
    }
    structure(&answer).ok_or_else(|| VolumeError::QemuImg {
        path: path.to_owned(),
        said: answer.said,
    })
}

/// The numbers are left out where they are zero (QEMU, `qapi/block-core.json`, ImageCheck).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    check_errors: u64,
    #[serde(default)]
    corruptions: u64,
    #[serde(default)]
    leaks: u64,
}

/// By exit code (`qemu-img(1)`: 0 sound, 2 corrupt, 3 leaks) and report, whichever is worse.
fn structure(answer: &Answer) -> Option<Structure> {
    let report: Report = serde_json::from_slice(&answer.stdout).ok()?;
    let errors = report.check_errors + report.corruptions;
    match (answer.code?, errors, report.leaks) {
        (0, 0, 0) => Some(Structure::Sound),
        (0 | 3, 0, leaks) => Some(Structure::Leaks(leaks)),
        (0 | 2 | 3, errors, _) => Some(Structure::Corrupt(errors.max(1))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_called_sound_that_qemu_img_finds_anything_in() {
        let told = |code, stdout: &str| {
            structure(&Answer {
                code,
                stdout: stdout.into(),
                said: String::new(),
            })
        };
        let sound = r#"{"image-end-offset": 262144, "check-errors": 0, "filename": "x", "format": "qcow2"}"#;
        assert_eq!(told(Some(0), sound), Some(Structure::Sound));
        let leaks = r#"{"leaks": 3, "check-errors": 0}"#;
        assert_eq!(told(Some(3), leaks), Some(Structure::Leaks(3)));
        assert_eq!(told(Some(0), leaks), Some(Structure::Leaks(3)));
        assert_eq!(
            told(Some(2), r#"{"corruptions": 2, "leaks": 1, "check-errors": 0}"#),
            Some(Structure::Corrupt(2))
        );
        assert_eq!(told(Some(2), sound), Some(Structure::Corrupt(1)));
        assert_eq!(
            told(Some(0), r#"{"check-errors": 4}"#),
            Some(Structure::Corrupt(4))
        );
        for (code, text) in [
            (None, sound),
            (Some(1), sound),
            (Some(63), sound),
            (Some(0), ""),
            (Some(0), "{}"),
        ] {
            assert_eq!(told(code, text), None, "{code:?} {text}");
        }
    }
}
