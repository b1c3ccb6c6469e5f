//! What `volume adopt` asks for: an image that this host does not know, or no more, gets its envelope back: the one that it carries,
//! the keystore's, or one that was forgotten here. It counts once it has opened the image.

use std::path::Path;

use super::forget::{Whereabouts, whereabouts};
use super::forgotten;
use super::host::{Host, passphrase};
use crate::api::{Outcome, StepView};
use crate::host::permitted::PermittedPath;
use crate::model::act::{StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{Precedence, Verified, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, ImageCopy, VolumeError};
use crate::secret::Passphrase;
use crate::store::{EnvelopeRecord, EnvelopeState, Put};

/// The envelope that has opened the image, and where it came from.
#[derive(Debug)]
pub(crate) struct Found {
    pub(super) envelope: Verified,
    pub(super) passphrase: Passphrase,
    from: String,
}

impl Found {
    /// Whose it is.
    pub(crate) fn vm(&self) -> VmId {
        self.envelope.vm
    }
}

/// An envelope that may open the image.
struct Candidate {
    record: EnvelopeRecord,
    /// Whether root alone can have written it.
    of_root: bool,
    from: String,
}

/// The newest envelope that opens the image at `path`, which root has named.
pub(crate) fn find(host: &Host<'_>, path: &Path) -> Result<Found, Problem> {
    let place =
        PermittedPath::named_by_root(path).map_err(|source| VolumeError::unreachable(path, source))?;
    let (format, copy) = disk::identify(&place)?;
    if !format.is_encrypted() {
        return Err(VolumeError::NotEncrypted(path.to_owned()).into());
    }
    let (mut best, mut failure): (Option<Found>, Option<Problem>) = (None, None);
    for candidate in candidates(host, path, copy)? {
        match opened(host, &place, candidate) {
            Ok(found) => {
                let supersedes =
                    |best: &Found| found.envelope.supersedes(&best.envelope) == Precedence::Newer;
                if best.as_ref().is_none_or(supersedes) {
                    best = Some(found);
                }
            }
            Err(problem) => failure = failure.or(Some(problem)),
        }
    }
    let nothing = || {
        Problem::not_found(format!("nothing on this host opens {}", path.display()))
            .next(Advice::RestoreState.or("adopt it on the host where it was made"))
    };
    best.ok_or_else(|| failure.unwrap_or_else(nothing))
}

/// Those of the id that the image carries; where it carries none, all that were forgotten, and the one that was made for its path.
fn candidates(host: &Host<'_>, path: &Path, copy: ImageCopy) -> Result<Vec<Candidate>, Problem> {
    let shown = path.display().to_string();
    let carried = copy.envelope();
    let id = carried.as_ref().map(|envelope| envelope.id);
    let of_root = |record, from| Candidate {
        record,
        of_root: true,
        from,
    };
    let known = match id {
        Some(id) => host.keystore.readable_envelope(id)?.into_iter().collect(),
        None => {
            let mut at_path = host.keystore.envelopes()?.sound;
            at_path.retain(|record| record.location == shown);
            at_path
        }
    };
    let known = known.into_iter();
    let mut candidates: Vec<_> = known
        .map(|record| of_root(record, "the keystore".to_owned()))
        .collect();
    candidates.extend(carried.map(|envelope| Candidate {
        record: EnvelopeRecord {
            envelope,
            state: EnvelopeState::Active,
            location: shown,
            created: 0,
            updated: 0,
        },
        of_root: false,
        from: "the image".to_owned(),
    }));
    let kept = forgotten::kept(host.host_store.dir()).map_err(|error| Problem::failed(chain(&error)))?;
    // What can't be read opens nothing.
    for (file, kept) in kept
        .into_iter()
        .filter_map(|(file, kept)| Some((file, kept.ok()?)))
    {
        let objects = kept.objects.into_iter().filter(|record| match id {
            Some(id) => record.envelope.id == id,
            None => record.envelope.kind.is_kept_by_path(),
        });
        candidates.extend(objects.map(|record| of_root(record, file.display().to_string())));
    }
    Ok(candidates)
}

fn opened(host: &Host<'_>, place: &PermittedPath, candidate: Candidate) -> Result<Found, Problem> {
    let Candidate {
        record,
        of_root,
        from,
    } = candidate;
    let dek = host.recipients.open_envelope(&record.envelope)?;
    let verified = match of_root {
        true => record.verify(&dek),
        false => record.envelope.verify(&dek),
    };
    let envelope =
        verified.map_err(|error| Problem::failed(format!("the envelope in {from}: {}", chain(&error))))?;
    let passphrase = passphrase(&dek)?;
    disk::open(place, &passphrase)?;
    Ok(Found {
        envelope,
        passphrase,
        from,
    })
}

/// Takes it over, with `path` as its place unless the image is where the keystore has it. Nothing else may be done to its VM meanwhile.
///
/// # Errors
/// When the keystore has another version of the same generation.
pub(crate) fn adopt(host: &Host<'_>, path: &Path, found: &Found) -> Result<Outcome, Problem> {
    let (id, shown) = (found.envelope.id, path.display().to_string());
    let known = host.keystore.readable_envelope(id)?;
    let (mut acts, mut warnings) = (Vec::new(), Vec::new());
    match host.keystore.put(&found.envelope, &shown)? {
        Put::Adopted | Put::Updated => {
            let text = format!("took envelope {id} of {shown} over from {}", found.from);
            acts.push(StepCode::Adopt.told(text).with(id).at(path));
        }
        Put::Unchanged | Put::Stale => {}
    }
    if let Some(known) = known.filter(|known| known.location != shown) {
        match is_at_its_place(host, &known) {
            true => {
                let what = format!("{shown} is a copy of {}, which stays the volume", known.location);
                let copy = Finding::warning(FindingCode::IsCopy, Subject::Image(shown.clone()), what);
                warnings.push(copy.into());
            }
            false => {
                host.keystore.set_location(id, &shown)?;
                let what = format!("that {} is at {shown} now", known.location);
                acts.push(Verb::Note.act(StepCode::NotePath, what).with(id).at(path));
            }
        }
    }
    Ok(Outcome {
        changed: !acts.is_empty(),
        steps: StepView::all(&acts, Tense::Done, &Subject::Image(shown)),
        warnings,
        ..Outcome::default()
    })
}

fn is_at_its_place(host: &Host<'_>, known: &EnvelopeRecord) -> bool {
    !matches!(
        whereabouts(host, known),
        Whereabouts::Absent | Whereabouts::Another
    )
}
