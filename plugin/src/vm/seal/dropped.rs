//! Copies of envelopes that a seal drops from the XML: one that came from elsewhere may be the only key of something there.

use super::Host;
use crate::domain::Metadata;
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, Precedence};
use crate::model::finding::{Finding, FindingCode};
use crate::model::problem::{Problem, chain};
use crate::model::subject::Subject;
use crate::store::{EnvelopeRecord, EnvelopeState};
use crate::terminal::word;
use crate::vm::forget::{Dropped, keep_aside};
use crate::vm::forgotten::{self, Said};

/// Keeps each that this host has nowhere else, in a file of its own: it need not open for the others to come back.
pub(super) fn keep(host: &Host<'_>, defined: &DefinedDomain, xml: &str) -> Result<Vec<Finding>, Problem> {
    let copies_in = |xml| Metadata::envelopes_in(xml).map_or_else(|_| Vec::new(), |(copies, _)| copies);
    let stay = copies_in(xml);
    let mut kept = Vec::new();
    for copy in copies_in(&defined.xml) {
        let goes = copy.vm == defined.vm && stay.iter().all(|other| other.id != copy.id);
        if !goes || is_forged(host, &copy) || is_known(host, &copy)? {
            continue;
        }
        let what = format!("envelope {} of its {} was in its XML alone", copy.id, copy.kind);
        let record = EnvelopeRecord {
            envelope: copy,
            state: EnvelopeState::Active,
            location: String::new(),
            created: 0,
            updated: 0,
        };
        let dropped = Dropped {
            said: Said::Elsewhere,
            records: &[record],
            damaged: Vec::new(),
        };
        let file = keep_aside(host.keystore, host.host_store, defined.vm, &defined.name, dropped)?;
        let what = format!("{what}, and is kept in {} from now on", word(file.display()));
        let vm = Subject::Vm(defined.name.clone());
        let aside = Finding::warning(FindingCode::KeptAside, vm, what);
        kept.push(aside.next(Advice::AdoptFrom(file).note("once the provider that opens it is here")));
    }
    Ok(kept)
}

/// What nobody who had the key has written opens nothing.
fn is_forged(host: &Host<'_>, copy: &Envelope) -> bool {
    let dek = host.recipients.open_envelope(copy);
    copy.format() == Envelope::FORMAT && dek.is_ok_and(|dek| copy.verify(&dek).is_err())
}

fn is_known(host: &Host<'_>, copy: &Envelope) -> Result<bool, Problem> {
    if let Some(record) = host.keystore.readable_envelope(copy.id)?
        && matches!(
            copy.supersedes(&record.envelope),
            Precedence::Same | Precedence::Older
        )
    {
        return Ok(true);
    }
    let file = forgotten::file_with(host.host_store.dir(), |envelope| envelope == copy);
    Ok(file.map_err(|error| Problem::failed(chain(&error)))?.is_some())
}
