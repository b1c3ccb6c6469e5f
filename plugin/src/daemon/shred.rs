//! What `vm shred` asks for: the end of all keys of one VM, and a receipt of what was seen.
//!
//! From the outside in: KEKs at their providers, keyslots and key material, the copies in images and XML, the records last.
//! So it can be repeated from wherever it stopped, and says the same again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use swtpm_state::{State, libvirt_state_dir};

use super::headers::Writing;
use super::vms::unreachable;
use super::{Daemon, lock};
use crate::api::{Receipt, ReceiptLine};
use crate::domain::{Domain, Metadata, encrypted_layers};
use crate::envelope::{EnvelopeId, KekId, ObjectKind, ProviderId, VmId};
use crate::failure::{Code, Failure, chain, word};
use crate::keystore::EnvelopeRecord;
use crate::libvirt::KeptXml;
use crate::provider::ProviderError;
use crate::secret::Passphrase;
use crate::terminal::quoted;
use crate::volume::{self, Shredded, Shredding, VolumeError};

/// A VM to be shredded.
struct Doomed {
    vm: VmId,
    name: String,
    records: Vec<EnvelopeRecord>,
    /// The files that its own XML has for its envelopes: the keystore learns of a moved image only at a start.
    files: BTreeMap<EnvelopeId, BTreeSet<PathBuf>>,
}

type Keks = BTreeSet<(ProviderId, String)>;

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
    /// Destroys all keys of a VM that is off, if its name was `typed`.
    pub fn shred_vm(&self, vm: &str, typed: Option<&str>) -> Result<Receipt, Failure> {
        let _sealing = lock(&self.sealing);
        let _copying = lock(&self.copying);
        let mut doomed = self.doomed(vm)?;
        let name = doomed.name.clone();
        if typed != Some(&name) {
            let said = typed.map_or_else(String::new, |typed| format!(", and '{typed}' was typed"));
            return Err(Failure::new(
                Code::WouldLoseKey,
                format!("{name} stays: what is on its disks would be lost for ever{said}"),
            )
            .next(format!(
                "virtseal vm shred --yes-shred={} {}",
                quoted(&name),
                word(&name)
            )));
        }
        let shredded = self
            .refuse_to_shred(&mut doomed)
            .and_then(|()| self.keep_off(&doomed))
            .and_then(|_kept_off| self.shred(&doomed));
        self.audit_vm("shred", doomed.vm, &name, &shredded);
        shredded
    }

    fn doomed(&self, vm: &str) -> Result<Doomed, Failure> {
        let (id, name) = match self.find_domain(vm) {
            Ok(defined) if defined.active => {
                return Err(Failure::new(Code::Busy, format!("{} is running", defined.name))
                    .next(format!("virsh shutdown {}", word(&defined.name))));
            }
            Ok(defined) => (defined.vm, defined.name),
            Err(absent) if absent.code == Code::NotFound => self.known_as(vm)?.ok_or(absent)?,
            Err(failure) => return Err(failure),
        };
        Ok(Doomed {
            vm: id,
            name,
            records: self.keystore.envelopes_of(id)?,
            files: BTreeMap::new(),
        })
    }

    /// A VM that only the keystore knows, if only by the UUID in its envelopes. Of several that had this name, which one is
    /// meant can't be guessed.
    fn known_as(&self, vm: &str) -> Result<Option<(VmId, String)>, Failure> {
        let known = self.keystore.vms()?.into_iter();
        let mut found: Vec<_> = known
            .filter(|known| known.name == vm || vm.parse() == Ok(known.vm))
            .map(|known| (known.vm, known.name))
            .collect();
        if found.len() > 1 {
            let ids: Vec<_> = found.iter().map(|(id, _)| id.to_string()).collect();
            return Err(Failure::new(
                Code::WouldLoseKey,
                format!(
                    "{} VMs were called {vm}, and none of them is defined",
                    found.len()
                ),
            )
            .next(format!("virtseal vm shred UUID, one of {}", ids.join(", "))));
        }
        let never_defined = || vm.parse::<VmId>().ok().map(|id| (id, id.to_string()));
        Ok(found.pop().or_else(never_defined))
    }

    fn refuse_to_shred(&self, doomed: &mut Doomed) -> Result<(), Failure> {
        let name = &doomed.name;
        if doomed.records.is_empty() {
            return Err(Failure::new(Code::NotFound, format!("{name} has no keys here")));
        }
        if let Some(job) = self.keystore.running_job()? {
            return Err(Failure::new(Code::Busy, format!("job {} runs", job.id.0))
                .next(format!("virtseal jobs watch {}", job.id.0)));
        }
        let ids: Vec<String> = doomed.ids().map(|id| id.to_string()).collect();
        let kept = self.background.every_xml().map_err(|error| unreachable(&error))?;
        for other in kept.iter().filter(|other| other.vm != doomed.vm) {
            // As text: an XML that can't be read may need its disk all the same.
            if ids.iter().any(|id| other.xml.contains(id)) {
                return Err(Failure::new(
                    Code::WouldLoseKey,
                    format!("{name} stays: {} uses one of its disks", other.name),
                )
                .next(format!("virsh edit {}: remove that disk", word(&other.name))));
            }
        }
        doomed.note_files(&kept);
        Ok(())
    }

    /// A start that comes now waits until this is dropped, and finds no key; one that came before it makes this fail.
    fn keep_off(&self, doomed: &Doomed) -> Result<Vec<Writing<'_>>, Failure> {
        let starting = || Failure::new(Code::Busy, format!("{} is starting", doomed.name));
        let taken: Option<Vec<_>> = doomed.ids().map(|id| self.headers.write(id)).collect();
        let taken = taken.ok_or_else(starting)?;
        if doomed.ids().any(|id| lock(&self.arms).needs(id)) {
            return Err(starting());
        }
        // It may have started while this looked around.
        match self.background.domain(&doomed.vm.to_string()) {
            Ok(Some(defined)) if defined.active => Err(starting()),
            Ok(_) => Ok(taken),
            Err(error) => Err(unreachable(&error)),
        }
    }

    fn shred(&self, doomed: &Doomed) -> Result<Receipt, Failure> {
        // As long as anything opens the envelopes.
        let passphrases: BTreeMap<_, _> = doomed
            .records
            .iter()
            .filter_map(|record| Some((record.envelope.id, self.passphrase_of(record)?)))
            .collect();
        self.refuse_while_open(doomed)?;
        let mut lines = self.destroy_keks(doomed)?;
        let half_done = |failure: Failure| {
            let failure = failure.of(format!("some keys of {} are destroyed, and not all", doomed.name));
            match failure.next {
                Some(_) => failure,
                None => failure.next(format!(
                    "virtseal vm shred {}: it goes on from here",
                    word(&doomed.name)
                )),
            }
        };
        for record in &doomed.records {
            let passphrase = passphrases.get(&record.envelope.id);
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
        let (removed, emptied) = removed.map_err(|error| half_done(error.into()))?;
        let log = match emptied {
            true => "the write-ahead log emptied",
            false => "but the write-ahead log could not be emptied and has them until virtseald ends",
        };
        lines.push(line(
            "the records in the keystore",
            true,
            &format!("{removed} envelopes removed, their pages zeroed, {log}"),
        ));
        Ok(Receipt {
            vm: doomed.name.clone(),
            lines,
            survives: survivors(),
        })
    }

    /// Those that nothing else needs. A provider that does not answer stops it before anything is destroyed.
    fn destroy_keks(&self, doomed: &Doomed) -> Result<Vec<ReceiptLine>, Failure> {
        let (own, others) = self.keks(doomed)?;
        for (provider, _) in own.difference(&others) {
            if let Some(failure) = self.registry.cannot_destroy(*provider) {
                return Err(failure.of(format!("{} stays", doomed.name)));
            }
        }
        let mut lines = Vec::new();
        for (provider, kek) in own {
            let what = format!("KEK {kek} of provider '{}'", self.name_of(provider));
            let id = KekId(kek.clone());
            lines.push(if others.contains(&(provider, kek)) {
                line(&what, false, "not destroyed: other VMs need it")
            } else if self.registry.by_id(provider).is_none() {
                line(
                    &what,
                    false,
                    "not destroyed: this host does not have the provider",
                )
            } else {
                match self.registry.destroy_kek(provider, &id, doomed.vm) {
                    Ok(receipt) => line(&what, receipt.destroyed, &receipt.observed),
                    Err(ProviderError::UnknownKek(_)) => {
                        line(&what, true, "the provider does not know it any more")
                    }
                    Err(error) => {
                        return Err(
                            Failure::new(Code::Failed, format!("{what}: {}", chain(&error))).next(format!(
                                "virtseal vm shred {}: it goes on from here",
                                word(&doomed.name)
                            )),
                        );
                    }
                }
            });
        }
        Ok(lines)
    }

    /// The KEKs of the VM's envelopes and of their copies, those from before a rotation too; and those of all others.
    fn keks(&self, doomed: &Doomed) -> Result<(Keks, Keks), Failure> {
        let (mut own, mut others) = (Keks::new(), Keks::new());
        let ids: BTreeSet<EnvelopeId> = doomed.ids().collect();
        let mut note = |is_own: bool, provider: ProviderId, KekId(kek)| {
            let set = if is_own { &mut own } else { &mut others };
            set.insert((provider, kek));
        };
        for record in self.keystore.envelopes()? {
            let is_own = ids.contains(&record.envelope.id);
            for stanza in record.envelope.stanzas {
                note(is_own, stanza.provider, stanza.kek);
            }
        }
        for needed in self.keystore.needed_keks()? {
            note(ids.contains(&needed.envelope), needed.provider, needed.kek);
        }
        for retired in self.keystore.retired_keks()? {
            note(retired.vm == doomed.vm, retired.provider, retired.kek);
        }
        Ok((own, others))
    }

    /// What tells the VM's own variable store, which carries no envelope, from another that is in its place by now.
    fn passphrase_of(&self, record: &EnvelopeRecord) -> Option<Passphrase> {
        let dek = self.registry.open_envelope(&record.envelope).ok()?;
        dek.passphrase().ok()
    }

    /// Before anything is destroyed: half a shredding helps nobody.
    fn refuse_while_open(&self, doomed: &Doomed) -> Result<(), Failure> {
        for file in doomed.records.iter().flat_map(|record| doomed.files_of(record)) {
            match volume::is_free(&file) {
                Err(VolumeError::NotFound(_)) | Ok(()) => {}
                Err(error) => return Err(Failure::from(error).of(format!("{} stays", doomed.name))),
            }
        }
        Ok(())
    }

    fn shred_object(
        &self,
        doomed: &Doomed,
        record: &EnvelopeRecord,
        passphrase: Option<&Passphrase>,
    ) -> Result<Vec<ReceiptLine>, Failure> {
        if record.envelope.kind == ObjectKind::Vtpm {
            let dir = libvirt_state_dir(&self.config().swtpm_dir, &doomed.vm);
            let what = format!("the state of the vTPM in {}", dir.display());
            return Ok(vec![line(&what, false, &vtpm_state(&dir))]);
        }
        let files = doomed.files_of(record).into_iter();
        files.map(|file| shred_file(&file, record, passphrase)).collect()
    }
}

fn shred_file(
    path: &Path,
    record: &EnvelopeRecord,
    passphrase: Option<&Passphrase>,
) -> Result<ReceiptLine, Failure> {
    let what = format!("the {} {}", record.envelope.kind, path.display());
    let opens = || passphrase.is_some_and(|passphrase| volume::verify(path, passphrase).is_ok());
    let left = |seen: &str| Ok(line(&what, false, &format!("left alone: {seen}")));
    match volume::shred_keys(path, record.envelope.id, opens) {
        Ok(Shredding::Done(shredded)) => Ok(line(&what, true, &destroyed(shredded))),
        Ok(Shredding::Carries(other)) => left(&format!(
            "it carries envelope {other}, so it is not the image that this VM had there"
        )),
        Ok(Shredding::NotShown(keyslots)) if passphrase.is_some() => left(&format!(
            "the VM's key opens none of its {keyslots} active keyslots; its key material was overwritten before, or it is \
             another file"
        )),
        Ok(Shredding::NotShown(keyslots)) => left(&format!(
            "nothing unwraps the VM's key any more, so nobody can tell whether that opens the file, which has {keyslots} \
             active keyslots"
        )),
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
fn vtpm_state(dir: &Path) -> String {
    match State::read(dir) {
        Ok(State::Absent) => "there is none".to_owned(),
        Ok(State::Encrypted(_)) => {
            "left as it is: encrypted with a key that is gone with its stanzas".to_owned()
        }
        Ok(State::Plain(_)) => "left as it is: NOT encrypted, whoever has the file can read it".to_owned(),
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
        "copies of the VM on other hosts",
        "saved states (virsh managedsave): they hold the guest's memory in plaintext",
        "blocks that an SSD, a copy-on-write file system or storage below it has remapped and not erased",
    ]
    .map(str::to_owned)
    .to_vec()
}
