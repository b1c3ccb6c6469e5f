//! What is believed of an envelope of which there are two versions: the keystore's, and a copy that travelled.
//!
//! Whoever can edit a domain or an image can write a copy, so a copy counts only if its MAC verifies under the DEK that has
//! opened the object, and takes the keystore's place only if it also opens by itself. One that does not counts for nothing:
//! it replaces nothing, and it stops nothing that the keystore's version opens.

use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeError, Precedence, Verified};
use crate::model::finding::FindingCode;
use crate::model::problem::{Problem, chain};
use crate::recipients::Recipients;
use crate::secret::Dek;
use crate::store::EnvelopeRecord;

/// The version that counts.
#[derive(Debug)]
pub(crate) struct Believed {
    /// It, with the proof.
    pub envelope: Verified,
    /// Whether the keystore has yet to learn of it.
    pub is_news: bool,
    /// What there is to say of the copy, where it does not count.
    pub doubt: Option<Doubt>,
}

impl Believed {
    /// Whose KEKs to keep until `copy` is brought up to date: its own, if it is authentic. What anybody may have written would keep
    /// the KEKs of others, or have them taken for this VM's.
    pub(crate) fn needed_by<'a>(&'a self, copy: &'a Envelope) -> &'a Envelope {
        let is_forged = matches!(self.doubt, Some(Doubt::Unverified(_)));
        if is_forged || copy.format() != Envelope::FORMAT {
            &self.envelope
        } else {
            copy
        }
    }
}

/// Why a copy does not count.
#[derive(Debug)]
pub(crate) enum Doubt {
    /// Its MAC does not verify, or it has none while the keystore knows better.
    Unverified(EnvelopeError),
    /// Somebody who had the key made another version of the same generation.
    Conflict,
    /// It is newer, and does not open by itself on this host.
    DoesNotOpen,
}

impl Doubt {
    pub(crate) fn code(&self) -> FindingCode {
        match self {
            Self::Unverified(_) => FindingCode::CopyUnverified,
            Self::Conflict => FindingCode::CopyConflict,
            Self::DoesNotOpen => FindingCode::CopyNewer,
        }
    }

    /// In words, of the copy that is in `place`.
    pub(crate) fn words(&self, envelope: &Envelope, place: &str) -> String {
        let id = envelope.id;
        match self {
            Self::Unverified(error) => format!(
                "the copy of envelope {id} in {place} is not believed: {}; the keystore's is used",
                chain(error)
            ),
            Self::Conflict => format!(
                "the keystore and {place} have different versions of generation {} of envelope {id}; the keystore's is used",
                envelope.generation
            ),
            Self::DoesNotOpen => format!(
                "{place} has a newer version of envelope {id}, which opens with no key provider of this host; the keystore's \
                 is used"
            ),
        }
    }
}

/// What to make of `copy` beside what the keystore has, once one of them has opened to `dek`. At least one of them is there.
///
/// # Errors
/// When none of them verifies under `dek`.
pub(crate) fn believe(
    recipients: &Recipients,
    record: Option<&EnvelopeRecord>,
    copy: Option<&Envelope>,
    dek: &Dek,
) -> Result<Believed, EnvelopeError> {
    let Some(record) = record else {
        let envelope = copy.map_or(Err(EnvelopeError::Format1), |copy| copy.verify(dek))?;
        return Ok(Believed {
            envelope,
            is_news: true,
            doubt: None,
        });
    };
    let own = record.verify(dek)?;
    let (envelope, doubt) = match copy.filter(|copy| **copy != record.envelope) {
        None => (own, None),
        Some(copy) => match weigh(&own, copy, dek) {
            Weighed::Counts(copy) if opens_alone(recipients, &copy, dek) => (copy, None),
            Weighed::Counts(_) => (own, Some(Doubt::DoesNotOpen)),
            Weighed::IsBehind => (own, None),
            Weighed::Doubtful(doubt) => (own, Some(doubt)),
        },
    };
    Ok(Believed {
        is_news: *envelope != record.envelope,
        envelope,
        doubt,
    })
}

/// What to make of two versions of an envelope whose row in the keystore is damaged: what that still holds, and a copy. Once one
/// of them has opened to `dek`, the newer authentic one that opens by itself counts.
///
/// # Errors
/// When none of them verifies under `dek`.
pub(crate) fn believe_without_row(
    recipients: &Recipients,
    held: &Envelope,
    copy: &Envelope,
    dek: &Dek,
) -> Result<Believed, EnvelopeError> {
    let envelope = match (held.verify(dek), copy.verify(dek)) {
        (Ok(held), Ok(copy)) => {
            let (newer, older) = match copy.supersedes(&held) {
                Precedence::Newer => (copy, held),
                Precedence::Same | Precedence::Older | Precedence::Conflict => (held, copy),
            };
            match opens_alone(recipients, &newer, dek) || !opens_alone(recipients, &older, dek) {
                true => newer,
                false => older,
            }
        }
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => one,
        (Err(_), Err(error)) => return Err(error),
    };
    Ok(Believed {
        envelope,
        is_news: true,
        doubt: None,
    })
}

/// What a copy is beside the version that is believed.
#[derive(Debug)]
pub(crate) enum Weighed {
    /// It is authentic, and newer.
    Counts(Verified),
    /// It is equal, or an earlier version.
    IsBehind,
    /// It is not to be believed, or not to be decided.
    Doubtful(Doubt),
}

/// Decides by nothing but MAC and generation.
pub(crate) fn weigh(own: &Verified, copy: &Envelope, dek: &Dek) -> Weighed {
    match copy.verify(dek) {
        Err(EnvelopeError::Format1) if !copy.claims_more_changes_than(own.generation) => Weighed::IsBehind,
        Err(error) => Weighed::Doubtful(Doubt::Unverified(error)),
        Ok(copy) => match copy.supersedes(own) {
            Precedence::Newer => Weighed::Counts(copy),
            Precedence::Same | Precedence::Older => Weighed::IsBehind,
            Precedence::Conflict => Weighed::Doubtful(Doubt::Conflict),
        },
    }
}

/// Whether the keystore could do with `copy` alone. Asks nobody who is known not to answer: a start waits for this.
fn opens_alone(recipients: &Recipients, copy: &Verified, dek: &Dek) -> bool {
    let opened = recipients.open_usable(copy);
    opened.is_some_and(|opened| openssl::memcmp::eq(opened.expose(), dek.expose()))
}

/// Why the start, or the adoption, of the VM called `name` stops here.
pub(crate) fn not_believed(name: &str, error: &EnvelopeError) -> Problem {
    let failure = Problem::failed(chain(error));
    match error {
        EnvelopeError::Format1 => failure.next(
            Advice::AdoptFormat1(name.to_owned()).note("if you know where its XML and images come from"),
        ),
        _ => failure.next(Advice::DefineSealedXml(Some(name.to_owned()))),
    }
}

#[cfg(test)]
mod tests;
