//! Destroys what [`super::plan`] has decided, and says in a receipt what was seen of it.
//!
//! From the outside in: KEKs at their providers, keyslots and key material, the copies in images and XML, the records last.
//! So it can be repeated from wherever it stopped, and says the same again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::plan::{Consent, KekFate};
use super::{Doomed, Lost, Object};
use crate::api::{FindingView, Receipt, ReceiptLine};
use crate::domain::Metadata;
use crate::model::advice::Advice;
use crate::model::envelope::{KekId, ObjectKind, ProviderId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::nvram;
use crate::object::{Located, Shredded, Shredding};
use crate::provider::ProviderError;
use crate::secret::Passphrase;
use crate::store::{MadeKek, Traces};
use crate::vm::forget::refuse_if_used;
use crate::vm::host::Host;
use crate::vm::names::unreachable;

/// Destroys all keys of a VM that is off, and that no start can begin with: whoever calls this holds its headers. Those at a provider
/// of a VM that is not defined here go by `consent` alone.
pub(crate) fn shred(host: &Host<'_>, doomed: &Doomed, consent: Consent) -> Result<Receipt, Problem> {
    if doomed.records.is_empty() && doomed.lost.is_empty() {
        let reason = format!("{} has no keys here", doomed.name);
        return Err(Problem::not_found(reason));
    }
    refuse_if_used(&host.kept, doomed.vm, &doomed.name, doomed.ids())?;
    // As long as anything opens the envelopes.
    let passphrases: BTreeMap<_, _> = doomed
        .records
        .iter()
        .map(|record| (record.envelope.id, host.passphrase_of(record)))
        .collect();
    refuse_while_open(host, doomed)?;
    let mut lines = destroy_keks(host, doomed, consent)?;
    let half_done = |problem: Problem| {
        let problem = problem.of(format!("some keys of {} are destroyed, and not all", doomed.name));
        let again = || Advice::ShredVm(doomed.name.clone()).within("it goes on from here");
        match problem.advice {
            Some(_) => problem,
            None => problem.next(again()),
        }
    };
    for record in &doomed.records {
        let passphrase = &passphrases[&record.envelope.id];
        let object = Object {
            id: record.envelope.id,
            kind: record.envelope.kind,
            location: &record.location,
        };
        lines.extend(shred_object(host, doomed, object, passphrase, consent).map_err(half_done)?);
    }
    for lost in &doomed.lost {
        lines.extend(shred_lost(host, doomed, lost, consent).map_err(half_done)?);
    }
    let removed_there = host
        .libvirt
        .remove_metadata(doomed.vm, Metadata::NAMESPACE)
        .map_err(|error| half_done(unreachable(&error)))?;
    if removed_there {
        lines.push(gone("the copies in the domain XML", "removed from its metadata"));
    }
    let removed = host.keystore.shred_vm(doomed.vm);
    let removed = removed.map_err(|error| half_done(error.into()))?;
    let traces = match removed.traces {
        Traces::None => "and overwritten in its files",
        Traces::Left => "but its files may have them until virtseald ends",
    };
    lines.push(gone(
        "the records in the keystore",
        &format!("{} envelopes removed, {traces}", removed.envelopes),
    ));
    Ok(Receipt {
        vm: doomed.name.clone(),
        lines,
        survives: survivors(&doomed.name),
    })
}

/// Those that nothing else needs. A provider that does not answer stops it before anything is destroyed.
fn destroy_keks(host: &Host<'_>, doomed: &Doomed, consent: Consent) -> Result<Vec<ReceiptLine>, Problem> {
    let needs = doomed.needs(host)?;
    let fates: Vec<_> = needs
        .own
        .iter()
        .map(|kek| {
            let fate = doomed.kek_fate(host, kek, &needs, consent);
            (kek.clone(), fate)
        })
        .collect();
    for ((provider, _), fate) in &fates {
        if *fate == KekFate::Destroy
            && let Some(failure) = host.recipients.cannot_destroy(*provider)
        {
            return Err(failure.of(format!("{} stays", doomed.name)));
        }
    }
    let mut lines = Vec::new();
    for ((provider, kek), fate) in fates {
        let what = format!("KEK {kek} of provider '{}'", host.recipients.name_of(provider));
        lines.push(match fate {
            KekFate::Destroy => destroy_kek(host, doomed, provider, &KekId(kek), &what)?,
            KekFate::Stays(why) => {
                // Its envelopes go: without this nobody would find it again.
                host.keystore.note_made_kek(&MadeKek {
                    vm: doomed.vm,
                    provider,
                    kek: KekId(kek),
                })?;
                left(&what, why)
            }
        });
    }
    Ok(lines)
}

fn destroy_kek(
    host: &Host<'_>,
    doomed: &Doomed,
    provider: ProviderId,
    kek: &KekId,
    what: &str,
) -> Result<ReceiptLine, Problem> {
    match host.recipients.destroy_kek(provider, kek, doomed.vm) {
        Ok(receipt) if receipt.destroyed => {
            if let Err(error) = host.keystore.forget_made_kek(provider, kek) {
                tracing::warn!("KEK {kek} stays among those that were made: {}", chain(&error));
            }
            let elsewhere = "copies of this VM on other hosts need it too, and no longer open either";
            Ok(gone(what, &format!("{}; {elsewhere}", receipt.observed)))
        }
        Ok(receipt) => Ok(left(what, &receipt.observed)),
        // Another client's, or not on the node that was asked: who says this has not seen the end of a key.
        Err(ProviderError::UnknownKek(_)) => Ok(left(
            what,
            "the provider knows no such key for this client: not proven that it is destroyed",
        )),
        Err(error) => Err(Problem::failed(format!("{what}: {}", chain(&error))).next(
            Advice::ShowProvider(host.recipients.name_of(provider))
                .note("and fix what is wrong with it")
                .then(Advice::ShredVm(doomed.name.clone()).within("it goes on from here")),
        )),
    }
}

/// Before anything is destroyed: half a shredding helps nobody.
fn refuse_while_open(host: &Host<'_>, doomed: &Doomed) -> Result<(), Problem> {
    let stays = |failure: Problem| failure.of(format!("{} stays", doomed.name));
    for place in doomed
        .objects()
        .flat_map(|object| places_of(host, doomed, object))
    {
        if let Some(object) = place.object.map_err(stays)? {
            object.is_free().map_err(|error| stays(error.into()))?;
        }
    }
    Ok(())
}

/// Where an object may be.
struct Place {
    file: Option<PathBuf>,
    /// None where it can't be, because there is no such directory.
    object: Result<Option<Located>, Problem>,
}

fn places_of(host: &Host<'_>, doomed: &Doomed, of: Object<'_>) -> Vec<Place> {
    let files = doomed.files_of(of.id, of.location).into_iter().map(Some);
    let files: Vec<_> = match of.kind.is_kept_by_path() {
        true => files.collect(),
        false => vec![None],
    };
    let locations = || doomed.objects().map(|object| object.location);
    let permit = |path: &Path| host.paths.permit_known(path, locations());
    let located = |file: Option<PathBuf>| Place {
        object: match Located::of(of.kind, doomed.vm, file.as_deref(), &host.swtpm_dir, permit) {
            Err(error) if error.is_missing() => Ok(None),
            located => located.map_err(Problem::from),
        },
        file,
    };
    let mut places: Vec<_> = files.into_iter().map(located).collect();
    if of.kind == ObjectKind::Nvram {
        let stores = places.iter().filter_map(|place| match &place.object {
            Ok(Some(Located::Image(store))) => Some(store),
            _ => None,
        });
        // What a reset has kept opens with the same key.
        let kept: Vec<_> = stores.map(nvram::kept_of).collect();
        for copies in kept {
            match copies {
                Ok(copies) => places.extend(copies.into_iter().map(|copy| Place {
                    file: Some(copy.shown().to_owned()),
                    object: Ok(Some(Located::Image(copy))),
                })),
                Err(error) => places.push(Place {
                    file: None,
                    object: Err(error.into()),
                }),
            }
        }
    }
    places
}

fn shred_object(
    host: &Host<'_>,
    doomed: &Doomed,
    of: Object<'_>,
    passphrase: &Result<Passphrase, String>,
    consent: Consent,
) -> Result<Vec<ReceiptLine>, Problem> {
    let shred = |place: Place| {
        let object = place.object?;
        let path = place.file.as_deref().or(object.as_ref().map(Located::path));
        let what = format!("the {} {}", of.kind, path.unwrap_or(Path::new("")).display());
        let Some(object) = object else {
            return Ok(left(&what, "there is none"));
        };
        if place.file.is_some_and(|file| doomed.leaves_alone(&file, consent)) {
            let seen =
                "left alone: it is on storage that other hosts may share, and the VM is not defined here";
            return Ok(left(&what, seen));
        }
        let shredding = object.shred(of.id, passphrase.as_ref().ok())?;
        let told = match shredding {
            Shredding::Done(_) => gone,
            _ => left,
        };
        Ok(told(&what, &seen_of(shredding, passphrase)))
    };
    places_of(host, doomed, of).into_iter().map(shred).collect()
}

/// Nothing is known of its keys. Where its image still says whose it is, that can be destroyed.
fn shred_lost(
    host: &Host<'_>,
    doomed: &Doomed,
    lost: &Lost,
    consent: Consent,
) -> Result<Vec<ReceiptLine>, Problem> {
    let unknown = Err("its record is damaged".to_owned());
    let mut lines = match lost.object() {
        Some(object) => shred_object(host, doomed, object, &unknown, consent)?,
        None => Vec::new(),
    };
    let seen = "which KEKs wrapped it is not known, so those at providers stay";
    lines.push(left(&format!("the damaged record {}", lost.row), seen));
    Ok(lines)
}

fn seen_of(shredding: Shredding, passphrase: &Result<Passphrase, String>) -> String {
    match (shredding, passphrase) {
        (Shredding::Done(shredded), _) => destroyed(shredded),
        (Shredding::HasNoKey, _) => {
            "left as it is: encrypted with a key that is gone with its stanzas".to_owned()
        }
        (Shredding::Carries(other), _) => {
            format!("left alone: it carries envelope {other}, so it is not the image that this VM had there")
        }
        (Shredding::NotShown(keyslots), Ok(_)) => format!(
            "left alone: the VM's key opens none of its {keyslots} active keyslots; its key material was overwritten before, \
             or it is another file"
        ),
        (Shredding::NotShown(keyslots), Err(why)) => format!(
            "left alone: the VM's key was not unwrapped ({why}), so nobody can tell whether it opens the file, which has \
             {keyslots} active keyslots"
        ),
        (Shredding::Plain, _) => "left as it is: NOT encrypted, whoever has the file can read it".to_owned(),
        (Shredding::Absent, _) => "there is none".to_owned(),
        (Shredding::Unreadable(why), _) => format!("left as it is, and it can't be read: {why}"),
    }
}

fn destroyed(shredded: Shredded) -> String {
    let Shredded {
        keyslots,
        material,
        envelope,
    } = shredded;
    let envelope = if envelope { ", the envelope removed" } else { "" };
    match keyslots {
        0 => format!(
            "its keyslots were dead before, {material} bytes of key material overwritten once more{envelope}"
        ),
        _ => format!("{keyslots} keyslots made dead, {material} bytes of key material overwritten{envelope}"),
    }
}

fn gone(what: &str, observed: &str) -> ReceiptLine {
    ReceiptLine {
        destroyed: true,
        ..left(what, observed)
    }
}

/// Not destroyed, or not known to be.
fn left(what: &str, observed: &str) -> ReceiptLine {
    ReceiptLine {
        what: what.to_owned(),
        destroyed: false,
        observed: observed.to_owned(),
    }
}

fn survivors(vm: &str) -> Vec<FindingView> {
    [
        (
            FindingCode::BackupsStay,
            "backups and snapshots of the images, of the domain XML, of the keystore and of the providers",
        ),
        (
            FindingCode::CopiesElsewhere,
            "copies of the VM on other hosts, as far as their KEKs were not destroyed",
        ),
        (
            FindingCode::MemorySaved,
            "saved states: they hold the guest's memory in plaintext",
        ),
        (
            FindingCode::BlocksRemapped,
            "blocks that an SSD, a copy-on-write file system or storage below it has remapped and not erased",
        ),
    ]
    .map(|(code, what)| Finding::warning(code, Subject::Vm(vm.to_owned()), what).into())
    .to_vec()
}
