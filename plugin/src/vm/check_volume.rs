//! What `volume check` asks for: whether the image at a path is whole, opens, and carries what the keystore has. It changes nothing.

use std::path::Path;

use super::adopt_volume;
use super::host::Host;
use super::names::VmNames;
use super::status::in_image;
use crate::api::{FindingView, ImageStructure, KeystoreCopy, VolumeChecked};
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, Precedence};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::object::disk::{self, ImageCopy, Structure, VolumeError};

/// Looks at the image at `path`, which root has named.
///
/// # Errors
/// With what keeps it from being opened: it is damaged, no volume, or its provider is locked.
pub(crate) fn check(host: &Host<'_>, path: &Path) -> Result<VolumeChecked, Problem> {
    let place =
        PermittedPath::named_by_root(path).map_err(|source| VolumeError::unreachable(path, source))?;
    let info = disk::inspect(&place)?;
    let (_, copy) = disk::identify(&place)?;
    let found = adopt_volume::find(host, path)?;
    let kept = host.keystore.readable_envelope(found.envelope.id)?;
    let kept = kept.map(|record| record.envelope);
    let vm = VmNames::of_keystore(host.keystore)?.of(found.envelope.vm);
    let structure = disk::check(&place, &found.passphrase)?;
    let mut findings: Vec<_> = of_structure(path, structure).into_iter().collect();
    findings.extend(in_image(
        &vm,
        found.envelope.kind.as_str(),
        path,
        &copy,
        kept.as_ref(),
    ));
    if kept.is_none() {
        let what = format!("{} opens, and this host does not know it", path.display());
        let adopt = Advice::AdoptVolume(path.to_owned());
        findings.push(
            Finding::warning(
                FindingCode::ImageUnknown,
                Subject::Image(path.display().to_string()),
                what,
            )
            .next(adopt),
        );
    }
    let (leaks, errors) = match structure {
        Structure::Leaks(leaks) => (leaks, 0),
        Structure::Corrupt(errors) => (0, errors),
        Structure::Sound | Structure::InUse | Structure::None => (0, 0),
    };
    Ok(VolumeChecked {
        path: path.display().to_string(),
        format: info.format.into(),
        size: info.virtual_size.0,
        envelope: found.envelope.id.to_string(),
        vm,
        generation: found.envelope.generation.stored(),
        copy: standing(&copy, kept.as_ref()).into(),
        structure: word(structure).into(),
        leaks,
        errors,
        findings: FindingView::all(&findings),
    })
}

fn word(structure: Structure) -> ImageStructure {
    match structure {
        Structure::Sound => ImageStructure::Sound,
        Structure::Leaks(_) => ImageStructure::Leaks,
        Structure::Corrupt(_) => ImageStructure::Corrupt,
        Structure::InUse => ImageStructure::InUse,
        Structure::None => ImageStructure::NotChecked,
    }
}

/// How what the image carries stands to the keystore.
fn standing(copy: &ImageCopy, kept: Option<&Envelope>) -> KeystoreCopy {
    match (copy, kept) {
        (_, None) => KeystoreCopy::Unknown,
        (ImageCopy::None, Some(_)) => KeystoreCopy::NotCarried,
        (ImageCopy::Unreadable(_), Some(_)) => KeystoreCopy::Other,
        (ImageCopy::Envelope(copy), Some(kept)) if copy.id != kept.id => KeystoreCopy::Other,
        (ImageCopy::Envelope(copy), Some(kept)) => match copy.supersedes(kept) {
            Precedence::Same => KeystoreCopy::Same,
            Precedence::Older => KeystoreCopy::Older,
            Precedence::Newer | Precedence::Conflict => KeystoreCopy::Other,
        },
    }
}

fn of_structure(path: &Path, structure: Structure) -> Option<Finding> {
    let (subject, shown) = (Subject::Image(path.display().to_string()), path.display());
    match structure {
        Structure::Leaks(leaks) => {
            let what = format!(
                "{leaks} clusters of {shown} are used by nothing: that wastes space, and loses no data"
            );
            let copy = "nothing has to be done; a new volume with its data has none of them";
            Some(Finding::warning(FindingCode::ImageLeaks, subject, what).next(copy))
        }
        Structure::Corrupt(errors) => {
            let what = format!("{shown} is damaged: qemu-img finds {errors} errors in its tables");
            let restore =
                "restore it from a backup; until then leave its VM off, or save what it still reads";
            Some(Finding::critical(FindingCode::ImageCorrupt, subject, what).next(restore))
        }
        Structure::Sound | Structure::InUse | Structure::None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{VmId, fixture};

    #[test]
    fn an_image_is_called_up_to_date_only_if_it_carries_what_the_keystore_has() {
        let kept = fixture::version(&fixture::envelope(VmId::random()), 3, 1);
        let carries = |envelope: &Envelope| ImageCopy::Envelope(Box::new(envelope.clone()));
        let told = |copy: &ImageCopy| standing(copy, Some(&kept));
        assert_eq!(told(&carries(&kept)), KeystoreCopy::Same);
        assert_eq!(
            told(&carries(&fixture::version(&kept, 2, 1))),
            KeystoreCopy::Older
        );
        for other in [
            carries(&fixture::version(&kept, 4, 1)),
            carries(&fixture::version(&kept, 3, 2)),
            carries(&fixture::envelope(kept.vm)),
            ImageCopy::Unreadable("torn".to_owned()),
        ] {
            assert_eq!(told(&other), KeystoreCopy::Other, "{other:?}");
        }
        assert_eq!(told(&ImageCopy::None), KeystoreCopy::NotCarried);
        assert_eq!(standing(&carries(&kept), None), KeystoreCopy::Unknown);
    }

    #[test]
    fn only_what_was_found_is_told() {
        let path = Path::new("/d");
        for fine in [Structure::Sound, Structure::InUse, Structure::None] {
            assert_eq!(of_structure(path, fine), None);
        }
        let leaks = of_structure(path, Structure::Leaks(3)).unwrap();
        let damage = of_structure(path, Structure::Corrupt(1)).unwrap();
        assert!(damage.severity > leaks.severity && damage.advice.is_some() && leaks.advice.is_some());
    }
}
