//! Destroys what [`super::plan`] has decided, and says in a receipt what was seen of it.
//!
//! From the outside in: KEKs at their providers, keyslots and key material, the copies in images and XML, the records last.
//! So it can be repeated from wherever it stopped, and says the same again.

use std::collections::BTreeMap;
use std::path::Path;

use super::Doomed;
use super::plan::{Consent, KekFate};
use crate::api::{Receipt, ReceiptLine};
use crate::domain::Metadata;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::{KekId, ProviderId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::Present;
use crate::object::disk::{self, Shredded, Shredding, VolumeError};
use crate::object::vtpm::StateDir;
use crate::provider::ProviderError;
use crate::secret::Passphrase;
use crate::store::{EnvelopeRecord, MadeKek, Traces};
use crate::vm::forget::refuse_if_used;
use crate::vm::host::Host;
use crate::vm::names::unreachable;

/// Destroys all keys of a VM that is off, and that no start can begin with: whoever calls this holds its headers. Those at a provider
/// of a VM that is not defined here go by `consent` alone.
///
/// # Errors
/// With why nothing is destroyed yet; or with what is, and that not all is.
pub fn shred(host: &Host<'_>, doomed: &Doomed, consent: Consent) -> Result<Receipt, Problem> {
    if doomed.records.is_empty() {
        let reason = format!("{} has no keys here", doomed.name);
        return Err(Problem::new(Code::NotFound, reason));
    }
    refuse_if_used(&host.kept, doomed.vm, &doomed.name, &doomed.records)?;
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
        lines.extend(shred_object(host, doomed, record, passphrase, consent).map_err(half_done)?);
    }
    let removed_there = host
        .libvirt
        .remove_metadata(doomed.vm, Metadata::NAMESPACE)
        .map_err(|error| half_done(unreachable(&error)))?;
    if removed_there {
        lines.push(line(
            "the copies in the domain XML",
            true,
            "removed from its metadata",
        ));
    }
    let removed = host.keystore.shred_vm(doomed.vm);
    let removed = removed.map_err(|error| half_done(error.into()))?;
    let log = match removed.traces {
        Traces::None => "the write-ahead log emptied",
        Traces::Left => "but the write-ahead log could not be emptied and has them until virtseald ends",
    };
    lines.push(line(
        "the records in the keystore",
        true,
        &format!(
            "{} envelopes removed, their pages zeroed, {log}",
            removed.envelopes
        ),
    ));
    Ok(Receipt {
        vm: doomed.name.clone(),
        lines,
        survives: survivors(),
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
                line(&what, false, why)
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
            let elsewhere = "copies of this VM on other hosts need it too, and are dead with it";
            Ok(line(what, true, &format!("{}; {elsewhere}", receipt.observed)))
        }
        Ok(receipt) => Ok(line(what, false, &receipt.observed)),
        // Another client's, or not on the node that was asked: who says this has not seen the end of a key.
        Err(ProviderError::UnknownKek(_)) => Ok(line(
            what,
            false,
            "the provider knows no such key for this client: not proven that it is destroyed",
        )),
        Err(error) => Err(
            Problem::new(Code::Failed, format!("{what}: {}", chain(&error))).next(
                Advice::ShowProvider(host.recipients.name_of(provider))
                    .note("and mend what is wrong with it")
                    .then(Advice::ShredVm(doomed.name.clone()).within("it goes on from here")),
            ),
        ),
    }
}

/// Before anything is destroyed: half a shredding helps nobody.
fn refuse_while_open(host: &Host<'_>, doomed: &Doomed) -> Result<(), Problem> {
    let stays = |failure: Problem| failure.of(format!("{} stays", doomed.name));
    for file in doomed.records.iter().flat_map(|record| doomed.files_of(record)) {
        let Some(place) = place_of(host, doomed, &file).map_err(stays)? else {
            continue;
        };
        match disk::is_free(&place) {
            Err(VolumeError::NotFound(_)) | Ok(()) => {}
            Err(error) => return Err(stays(error.into())),
        }
    }
    Ok(())
}

/// One of the VM's files, unless its directory is not there.
fn place_of(host: &Host<'_>, doomed: &Doomed, file: &Path) -> Result<Option<PermittedPath>, Problem> {
    let locations = doomed.records.iter().map(|record| &record.location);
    match host.paths.permit_known(file, locations) {
        Ok(place) => Ok(Some(place)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn shred_object(
    host: &Host<'_>,
    doomed: &Doomed,
    record: &EnvelopeRecord,
    passphrase: &Result<Passphrase, String>,
    consent: Consent,
) -> Result<Vec<ReceiptLine>, Problem> {
    if !record.envelope.kind.is_kept_by_path() {
        let dir = StateDir::of(doomed.vm, &host.swtpm_dir);
        let what = format!("the state of the vTPM in {}", dir.path().display());
        return Ok(vec![line(&what, false, &vtpm_state(&dir))]);
    }
    let files = doomed.files_of(record).into_iter();
    files
        .map(|file| {
            let what = format!("the {} {}", record.envelope.kind, file.display());
            let Some(place) = place_of(host, doomed, &file)? else {
                return Ok(line(&what, false, "there is no such file"));
            };
            if doomed.leaves_alone(&file, consent) {
                let seen =
                    "left alone: it is on storage that other hosts may share, and the VM is not defined here";
                return Ok(line(&what, false, seen));
            }
            shred_file(&place, record, passphrase)
        })
        .collect()
}

fn shred_file(
    place: &PermittedPath,
    record: &EnvelopeRecord,
    passphrase: &Result<Passphrase, String>,
) -> Result<ReceiptLine, Problem> {
    let what = format!("the {} {}", record.envelope.kind, place.shown().display());
    let left = |seen: &str| Ok(line(&what, false, &format!("left alone: {seen}")));
    match disk::shred_keys(place, record.envelope.id, passphrase.as_ref().ok()) {
        Ok(Shredding::Done(shredded)) => Ok(line(&what, true, &destroyed(shredded))),
        Ok(Shredding::Carries(other)) => left(&format!(
            "it carries envelope {other}, so it is not the image that this VM had there"
        )),
        Ok(Shredding::NotShown(keyslots)) => left(&match passphrase {
            Ok(_) => format!(
                "the VM's key opens none of its {keyslots} active keyslots; its key material was overwritten before, or it \
                 is another file"
            ),
            Err(why) => format!(
                "the VM's key was not unwrapped ({why}), so nobody can tell whether it opens the file, which has {keyslots} \
                 active keyslots"
            ),
        }),
        Err(VolumeError::NotFound(_)) => Ok(line(&what, false, "there is no such file")),
        Err(VolumeError::NotEncrypted(_)) => Ok(line(&what, false, "there is another file, not encrypted")),
        Err(error) => Err(error.into()),
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

/// What is there, by its header alone.
fn vtpm_state(dir: &StateDir) -> String {
    match dir.inspect() {
        Ok(Present::Absent) => "there is none".to_owned(),
        Ok(Present::Encrypted(_)) => {
            "left as it is: encrypted with a key that is gone with its stanzas".to_owned()
        }
        Ok(Present::Plain) => "left as it is: NOT encrypted, whoever has the file can read it".to_owned(),
        Err(error) => format!("left as it is, and it can't be read: {}", chain(&error)),
    }
}

fn line(what: &str, destroyed: bool, observed: &str) -> ReceiptLine {
    ReceiptLine {
        what: what.to_owned(),
        destroyed,
        observed: observed.to_owned(),
    }
}

fn survivors() -> Vec<String> {
    [
        "backups and snapshots of the images, of the domain XML, of the keystore and of the providers",
        "copies of the VM on other hosts, as far as their KEKs were not destroyed",
        "saved states: they hold the guest's memory in plaintext",
        "blocks that an SSD, a copy-on-write file system or storage below it has remapped and not erased",
    ]
    .map(str::to_owned)
    .to_vec()
}
