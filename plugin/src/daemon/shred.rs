//! What `vm shred` asks for: the end of all keys of one VM, and a receipt of what was seen.
//!
//! From the outside in: KEKs at their providers, keyslots and key material, the copies in images and XML, the records last.
//! So it can be repeated from wherever it stopped, and says the same again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::headers::Writing;
use super::paths;
use super::{Daemon, lock, records};
use crate::api::{Receipt, ReceiptLine, ShredPreview};
use crate::audit::Actor;
use crate::domain::{Domain, Metadata, encrypted_layers};
use crate::host::libvirt::{DefinedDomain, KeptXml};
use crate::host::permitted::{PathRule, PermittedPath};
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, KekId, ProviderId, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::Present;
use crate::object::disk::{self, Shredded, Shredding, VolumeError};
use crate::object::vtpm::StateDir;
use crate::provider::ProviderError;
use crate::secret::Passphrase;
use crate::store::{EnvelopeRecord, MadeKek, Traces};
use crate::vm::names::{self, unreachable};

/// A VM to be shredded.
struct Doomed {
    vm: VmId,
    name: String,
    /// Whether libvirt has it here.
    is_defined: bool,
    /// Whether the KEKs of one that is not defined here go as well.
    keks: Consent,
    records: Vec<EnvelopeRecord>,
    /// The files that its own XML has for its envelopes: the keystore learns of a moved image only at a start.
    files: BTreeMap<EnvelopeId, BTreeSet<PathBuf>>,
    /// Where these may be.
    paths: PathRule,
}

type Keks = BTreeSet<(ProviderId, String)>;

/// To destroy what a VM on another host may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consent {
    Given,
    NotGiven,
}

/// What is known of a KEK and its VM before anything is destroyed.
#[derive(Clone, Copy, Debug)]
struct KekFacts {
    others_need_it: bool,
    provider_is_here: bool,
    /// Whether it exists at all, and is not derived from another key whenever it is needed.
    is_kept_by_provider: bool,
    vm_is_defined: bool,
    consent: Consent,
}

/// What becomes of a KEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KekFate {
    Destroy,
    Stays(&'static str),
}

const ELSEWHERE: &str =
    "not destroyed: the VM is not defined here, so it may be on another host, and need it there";

/// One host's view is not all there is: a VM that is not defined here may run on another host by the same KEK.
fn kek_fate(facts: KekFacts) -> KekFate {
    if facts.others_need_it {
        KekFate::Stays("not destroyed: other VMs need it")
    } else if !facts.provider_is_here {
        KekFate::Stays("not destroyed: this host does not have the provider")
    } else if facts.is_kept_by_provider && !facts.vm_is_defined && facts.consent == Consent::NotGiven {
        KekFate::Stays(ELSEWHERE)
    } else {
        KekFate::Destroy
    }
}

impl Doomed {
    fn ids(&self) -> impl Iterator<Item = EnvelopeId> {
        self.records.iter().map(|record| record.envelope.id)
    }

    /// Where the object of `record` may be.
    fn files_of(&self, record: &EnvelopeRecord) -> BTreeSet<PathBuf> {
        let mut files = self.files.get(&record.envelope.id).cloned().unwrap_or_default();
        if !record.location.is_empty() {
            files.insert(PathBuf::from(&record.location));
        }
        files
    }

    /// Another host may have the file open, and the VM may be there.
    fn leaves_alone(&self, file: &Path) -> bool {
        !self.is_defined && self.keks == Consent::NotGiven && is_shared(file)
    }

    fn note_files(&mut self, kept: &[KeptXml]) {
        let own = kept.iter().filter(|kept| kept.vm == self.vm);
        for domain in own.filter_map(|kept| Domain::parse(&kept.xml).ok()) {
            for (id, path) in encrypted_layers(&domain) {
                self.files.entry(id).or_default().insert(path);
            }
        }
    }
}

impl Daemon {
    /// What a shredding of the VM asks a word for.
    pub fn preview_shred(&self, vm: &str) -> Result<ShredPreview, Problem> {
        let doomed = self.doomed(vm)?;
        let mut kept = Vec::new();
        let (own, others) = self.keks(&doomed)?;
        for kek in own {
            if self.kek_fate(&doomed, &kek, &others) == KekFate::Stays(ELSEWHERE) {
                kept.push(format!("KEK {} of provider '{}'", kek.1, self.name_of(kek.0)));
            }
        }
        for record in &doomed.records {
            let files = doomed.files_of(record).into_iter();
            kept.extend(
                files
                    .filter(|file| doomed.leaves_alone(file))
                    .map(|file| format!("the {} {}", record.envelope.kind, file.display())),
            );
        }
        Ok(ShredPreview {
            vm: doomed.vm.to_string(),
            name: doomed.name,
            kept_for_others: kept,
        })
    }

    /// Destroys all keys of a VM that is off, if its name was `typed`. Those at a provider of a VM that is not defined here
    /// stay unless it was typed again for them.
    pub fn shred_vm(
        &self,
        by: Actor,
        vm: &str,
        typed: Option<&str>,
        typed_for_keks: Option<&str>,
    ) -> Result<Receipt, Problem> {
        let _sealing = lock(&self.sealing);
        let _copying = lock(&self.copying);
        let mut doomed = self.doomed(vm)?;
        let name = doomed.name.clone();
        let refused = |said: &str| {
            let said = match said {
                "" => String::new(),
                said => format!(", and '{said}' was typed"),
            };
            let stays = format!("{name} stays: what is on its disks would be lost for ever{said}");
            let shred = Advice::ShredAsTyped(name.clone());
            Problem::new(Code::WouldLoseKey, stays).next(match doomed.is_defined {
                true => shred,
                false => Advice::ForgetVm(name.clone())
                    .note("if it is on another host")
                    .also(shred.note("if it is not")),
            })
        };
        match (typed, typed_for_keks) {
            (Some(typed), _) if typed != name => return Err(refused(typed)),
            (_, Some(typed)) if typed != name => return Err(refused(typed)),
            (None, _) => return Err(refused("")),
            (Some(_), Some(_)) => doomed.keks = Consent::Given,
            (Some(_), None) => {}
        }
        let shredded = self
            .refuse_to_shred(&mut doomed)
            .and_then(|()| self.keep_off(&doomed))
            .and_then(|_kept_off| self.shred(&doomed));
        records::note_vm(self, by, "shred", doomed.vm, &name, &shredded);
        shredded
    }

    fn doomed(&self, vm: &str) -> Result<Doomed, Problem> {
        let (id, name, is_defined) = match names::find_domain(&self.background, vm) {
            Ok(defined) if defined.active => {
                return Err(Problem::new(Code::Busy, format!("{} is running", defined.name))
                    .next(Advice::ShutDownVm(defined.name.clone())));
            }
            Ok(defined) => {
                refuse_state_elsewhere(&defined, &self.config().swtpm_dir)?;
                (defined.vm, defined.name, true)
            }
            Err(absent) if absent.code == Code::NotFound => {
                let (id, name) = self.known_as(vm, Advice::ShredVm)?.ok_or(absent)?;
                (id, name, false)
            }
            Err(failure) => return Err(failure),
        };
        Ok(Doomed {
            vm: id,
            name,
            is_defined,
            keks: Consent::NotGiven,
            records: self.keystore.envelopes_of(id)?.whole()?,
            files: BTreeMap::new(),
            paths: paths::rule(self),
        })
    }

    /// A VM that only the keystore knows, if only by the UUID in its envelopes. Of several that had this name, which one is
    /// meant can't be guessed.
    pub(super) fn known_as(
        &self,
        vm: &str,
        again: fn(String) -> Advice,
    ) -> Result<Option<(VmId, String)>, Problem> {
        let known = self.keystore.vms()?.whole()?;
        let found =
            names::undefined(&known, vm).map_err(|several| several.refuse(Code::WouldLoseKey, again))?;
        let never_defined = || vm.parse::<VmId>().ok().map(|id| (id, id.to_string()));
        Ok(found
            .map(|known| (known.vm, known.name.clone()))
            .or_else(never_defined))
    }

    fn refuse_to_shred(&self, doomed: &mut Doomed) -> Result<(), Problem> {
        let name = &doomed.name;
        if doomed.records.is_empty() {
            return Err(Problem::new(Code::NotFound, format!("{name} has no keys here")));
        }
        self.refuse_while_a_job_concerns(doomed.vm)?;
        let kept = self.background.every_xml().map_err(|error| unreachable(&error))?;
        refuse_if_used(&kept, doomed.vm, name, &doomed.records)?;
        doomed.note_files(&kept);
        Ok(())
    }

    /// A start that comes now waits until this is dropped, and finds no key; one that came before it makes this fail.
    fn keep_off(&self, doomed: &Doomed) -> Result<Vec<Writing<'_>>, Problem> {
        let starting = || Problem::new(Code::Busy, format!("{} is starting", doomed.name));
        let taken: Option<Vec<_>> = doomed.ids().map(|id| self.headers.write(id)).collect();
        let taken = taken.ok_or_else(starting)?;
        if doomed.ids().any(|id| lock(&self.armed).needs(id)) {
            return Err(starting());
        }
        // It may have started while this looked around.
        match self.background.domain(&doomed.vm.to_string()) {
            Ok(Some(defined)) if defined.active => Err(starting()),
            Ok(_) => Ok(taken),
            Err(error) => Err(unreachable(&error)),
        }
    }

    fn shred(&self, doomed: &Doomed) -> Result<Receipt, Problem> {
        // As long as anything opens the envelopes.
        let passphrases: BTreeMap<_, _> = doomed
            .records
            .iter()
            .map(|record| (record.envelope.id, self.passphrase_of(record)))
            .collect();
        self.refuse_while_open(doomed)?;
        let mut lines = self.destroy_keks(doomed)?;
        let half_done = |failure: Problem| {
            let failure = failure.of(format!("some keys of {} are destroyed, and not all", doomed.name));
            let again = || Advice::ShredVm(doomed.name.clone()).within("it goes on from here");
            match failure.advice {
                Some(_) => failure,
                None => failure.next(again()),
            }
        };
        for record in &doomed.records {
            let passphrase = &passphrases[&record.envelope.id];
            lines.extend(self.shred_object(doomed, record, passphrase).map_err(half_done)?);
        }
        let removed_there = self
            .background
            .remove_metadata(doomed.vm, Metadata::NAMESPACE)
            .map_err(|error| half_done(unreachable(&error)))?;
        if removed_there {
            lines.push(line(
                "the copies in the domain XML",
                true,
                "removed from its metadata",
            ));
        }
        let removed = self.keystore.shred_vm(doomed.vm);
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
    fn destroy_keks(&self, doomed: &Doomed) -> Result<Vec<ReceiptLine>, Problem> {
        let (own, others) = self.keks(doomed)?;
        let fates: Vec<_> = own
            .into_iter()
            .map(|kek| {
                let fate = self.kek_fate(doomed, &kek, &others);
                (kek, fate)
            })
            .collect();
        for ((provider, _), fate) in &fates {
            if *fate == KekFate::Destroy
                && let Some(failure) = self.recipients.cannot_destroy(*provider)
            {
                return Err(failure.of(format!("{} stays", doomed.name)));
            }
        }
        let mut lines = Vec::new();
        for ((provider, kek), fate) in fates {
            let what = format!("KEK {kek} of provider '{}'", self.name_of(provider));
            lines.push(match fate {
                KekFate::Destroy => self.destroy_kek(doomed, provider, &KekId(kek), &what)?,
                KekFate::Stays(why) => {
                    // Its envelopes go: without this nobody would find it again.
                    self.keystore.note_made_kek(&MadeKek {
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

    fn kek_fate(&self, doomed: &Doomed, kek: &(ProviderId, String), others: &Keks) -> KekFate {
        let provider = self.recipients.by_id(kek.0);
        kek_fate(KekFacts {
            others_need_it: others.contains(kek),
            provider_is_here: provider.is_some(),
            is_kept_by_provider: provider.is_none_or(|provider| provider.keeps_keks()),
            vm_is_defined: doomed.is_defined,
            consent: doomed.keks,
        })
    }

    fn destroy_kek(
        &self,
        doomed: &Doomed,
        provider: ProviderId,
        kek: &KekId,
        what: &str,
    ) -> Result<ReceiptLine, Problem> {
        match self.recipients.destroy_kek(provider, kek, doomed.vm) {
            Ok(receipt) if receipt.destroyed => {
                if let Err(error) = self.keystore.forget_made_kek(provider, kek) {
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
                    Advice::ShowProvider(self.name_of(provider))
                        .note("and mend what is wrong with it")
                        .then(Advice::ShredVm(doomed.name.clone()).within("it goes on from here")),
                ),
            ),
        }
    }

    /// The KEKs of the VM's envelopes and of their copies, those from before a rotation too; and those of all others.
    fn keks(&self, doomed: &Doomed) -> Result<(Keks, Keks), Problem> {
        let (mut own, mut others) = (Keks::new(), Keks::new());
        let ids: BTreeSet<EnvelopeId> = doomed.ids().collect();
        let mut note = |is_own: bool, provider: ProviderId, KekId(kek)| {
            let set = if is_own { &mut own } else { &mut others };
            set.insert((provider, kek));
        };
        for record in self.keystore.envelopes()?.whole()? {
            let is_own = ids.contains(&record.envelope.id);
            for stanza in record.envelope.stanzas {
                note(is_own, stanza.provider, stanza.kek);
            }
        }
        for needed in self.host_store.needed_keks()?.whole()? {
            note(ids.contains(&needed.envelope), needed.provider, needed.kek);
        }
        for retired in self.keystore.retired_keks()?.whole()? {
            note(retired.vm == doomed.vm, retired.provider, retired.kek);
        }
        Ok((own, others))
    }

    /// What tells the VM's own variable store, which carries no envelope, from another that is in its place by now.
    pub(super) fn passphrase_of(&self, record: &EnvelopeRecord) -> Result<Passphrase, String> {
        let opened = self.recipients.open_envelope(&record.envelope);
        let dek = opened.map_err(|error| error.reasons())?;
        dek.passphrase().map_err(|error| chain(&error))
    }

    /// Before anything is destroyed: half a shredding helps nobody.
    fn refuse_while_open(&self, doomed: &Doomed) -> Result<(), Problem> {
        let stays = |failure: Problem| failure.of(format!("{} stays", doomed.name));
        for file in doomed.records.iter().flat_map(|record| doomed.files_of(record)) {
            let Some(place) = self.place_of(doomed, &file).map_err(stays)? else {
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
    fn place_of(&self, doomed: &Doomed, file: &Path) -> Result<Option<PermittedPath>, Problem> {
        let locations = doomed.records.iter().map(|record| &record.location);
        match doomed.paths.permit_known(file, locations) {
            Ok(place) => Ok(Some(place)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn shred_object(
        &self,
        doomed: &Doomed,
        record: &EnvelopeRecord,
        passphrase: &Result<Passphrase, String>,
    ) -> Result<Vec<ReceiptLine>, Problem> {
        if !record.envelope.kind.is_kept_by_path() {
            let dir = StateDir::of(doomed.vm, &self.config().swtpm_dir);
            let what = format!("the state of the vTPM in {}", dir.path().display());
            return Ok(vec![line(&what, false, &left_as_it_is(&dir))]);
        }
        let files = doomed.files_of(record).into_iter();
        files
            .map(|file| {
                let what = format!("the {} {}", record.envelope.kind, file.display());
                let Some(place) = self.place_of(doomed, &file)? else {
                    return Ok(line(&what, false, "there is no such file"));
                };
                if doomed.leaves_alone(&file) {
                    let seen = "left alone: it is on storage that other hosts may share, and the VM is not defined here";
                    return Ok(line(&what, false, seen));
                }
                shred_file(&place, record, passphrase)
            })
            .collect()
    }
}

/// What is there would go on to be readable, and the receipt would not say so. XML that can't be read is shredded all the same.
fn refuse_state_elsewhere(defined: &DefinedDomain, swtpm_dir: &Path) -> Result<(), Problem> {
    let Ok(domain) = Domain::parse(&defined.xml) else {
        return Ok(());
    };
    let stays = |elsewhere| Problem::from(elsewhere).of(format!("{} stays", defined.name));
    StateDir::of_domain(&domain, swtpm_dir).map(drop).map_err(stays)
}

/// An image of the VM that another one uses, by what libvirt has.
pub(super) fn refuse_if_used(
    kept: &[KeptXml],
    vm: VmId,
    name: &str,
    records: &[EnvelopeRecord],
) -> Result<(), Problem> {
    let ids: Vec<String> = records
        .iter()
        .map(|record| record.envelope.id.to_string())
        .collect();
    // As text: an XML that can't be read may need its disk all the same.
    let user = kept
        .iter()
        .filter(|other| other.vm != vm)
        .find(|other| ids.iter().any(|id| other.xml.contains(id)));
    match user {
        None => Ok(()),
        Some(other) => Err(Problem::new(
            Code::WouldLoseKey,
            format!("{name} stays: {} uses one of its disks", other.name),
        )
        .next(Advice::EditXml(other.name.clone()).within("remove that disk"))),
    }
}

/// Whether other hosts may have the file open where no lock of theirs is seen here.
fn is_shared(path: &Path) -> bool {
    /// `f_type` of NFS, SMB (both), Ceph, GFS2, OCFS2, FUSE (GlusterFS for one), 9p and AFS: statfs(2).
    const SHARED: [i64; 9] = [
        0x6969,
        0xfe53_4d42,
        0xff53_4d42,
        0x00c3_6400,
        0x0116_1970,
        0x7461_636f,
        0x6573_5546,
        0x0102_1997,
        0x5346_414f,
    ];
    let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let on_network = nix::sys::statfs::statfs(path)
        .is_ok_and(|found| SHARED.contains(&(found.filesystem_type().0 & 0xffff_ffff)));
    is_device || on_network
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
fn left_as_it_is(dir: &StateDir) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: KekFacts = KekFacts {
        others_need_it: false,
        provider_is_here: true,
        is_kept_by_provider: true,
        vm_is_defined: true,
        consent: Consent::NotGiven,
    };

    #[test]
    fn a_kek_of_a_vm_that_is_elsewhere_goes_only_by_a_second_word() {
        assert_eq!(kek_fate(FACTS), KekFate::Destroy);
        let elsewhere = KekFacts {
            vm_is_defined: false,
            ..FACTS
        };
        assert!(matches!(kek_fate(elsewhere), KekFate::Stays(why) if why.contains("another host")));
        let consented = KekFacts {
            consent: Consent::Given,
            ..elsewhere
        };
        assert_eq!(kek_fate(consented), KekFate::Destroy);
        let derived = KekFacts {
            is_kept_by_provider: false,
            ..elsewhere
        };
        assert_eq!(kek_fate(derived), KekFate::Destroy);
    }

    #[test]
    fn no_word_destroys_what_others_need() {
        for consent in [Consent::Given, Consent::NotGiven] {
            for vm_is_defined in [true, false] {
                let facts = KekFacts {
                    others_need_it: true,
                    vm_is_defined,
                    consent,
                    ..FACTS
                };
                assert!(matches!(kek_fate(facts), KekFate::Stays(_)));
            }
        }
    }
}
