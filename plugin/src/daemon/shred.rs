//! What `vm shred` asks for: the end of all keys of one VM, and a receipt of what was seen.
//!
//! From the outside in: KEKs at their providers, keyslots and key material, the copies in images and XML, the records last.
//! So it can be repeated from wherever it stopped, and says the same again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use swtpm_state::libvirt_state_dir;

use super::headers::Writing;
use super::vms::{KnownVm, unreachable};
use super::{Daemon, lock};
use crate::api::{Receipt, ReceiptLine};
use crate::domain::Metadata;
use crate::envelope::{EnvelopeId, KekId, ObjectKind, ProviderId, VmId};
use crate::failure::{Code, Failure, chain};
use crate::keystore::EnvelopeRecord;
use crate::provider::ProviderError;
use crate::secret::Passphrase;
use crate::volume::{self, VolumeError};

/// A VM to be shredded.
struct Doomed {
    vm: VmId,
    name: String,
    records: Vec<EnvelopeRecord>,
}

type Keks = BTreeSet<(ProviderId, String)>;

impl Doomed {
    fn ids(&self) -> impl Iterator<Item = EnvelopeId> {
        self.records.iter().map(|record| record.envelope.id)
    }
}

impl Daemon {
    /// Destroys all keys of a VM that is off, if its name was `typed`.
    pub fn shred_vm(&self, vm: &str, typed: Option<&str>) -> Result<Receipt, Failure> {
        let _sealing = lock(&self.sealing);
        let doomed = self.doomed(vm)?;
        let name = &doomed.name;
        if typed != Some(name) {
            let said = typed.map_or_else(String::new, |typed| format!(", and '{typed}' was typed"));
            return Err(Failure::new(
                Code::WouldLoseKey,
                format!("{name} stays: what is on its disks would be lost for ever{said}"),
            )
            .next(format!("virtseal vm shred {name} --yes-shred {name}")));
        }
        let shredded = self
            .refuse_to_shred(&doomed)
            .and_then(|()| self.keep_off(&doomed))
            .and_then(|_kept_off| self.shred(&doomed));
        self.audit_vm("shred", doomed.vm, name, &shredded);
        shredded
    }

    fn doomed(&self, vm: &str) -> Result<Doomed, Failure> {
        let (id, name) = match (self.find_vm(vm), vm.parse::<VmId>()) {
            (Ok(KnownVm::Defined(defined)), _) if defined.active => {
                return Err(Failure::new(Code::Busy, format!("{} is running", defined.name))
                    .next(format!("virsh shutdown {}", defined.name)));
            }
            (Ok(KnownVm::Defined(defined)), _) => (defined.vm, defined.name),
            (Ok(KnownVm::Undefined(known)), _) => (known.vm, known.name),
            // A volume may have been made for one that was never defined.
            (Err(absent), Ok(id)) if absent.code == Code::NotFound => (id, id.to_string()),
            (Err(failure), _) => return Err(failure),
        };
        Ok(Doomed {
            vm: id,
            name,
            records: self.keystore.envelopes_of(id)?,
        })
    }

    fn refuse_to_shred(&self, doomed: &Doomed) -> Result<(), Failure> {
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
                .next(format!("virsh edit {}: remove that disk", other.name)));
            }
        }
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
        for record in &doomed.records {
            let passphrase = passphrases.get(&record.envelope.id);
            lines.extend(self.shred_object(doomed.vm, record, passphrase)?);
        }
        let defined = self
            .background
            .remove_metadata(doomed.vm, Metadata::NAMESPACE)
            .map_err(|error| unreachable(&error))?;
        if defined {
            lines.push(line(
                "the copies in the domain XML",
                true,
                "removed from its metadata",
            ));
        }
        let removed = self.keystore.shred_vm(doomed.vm)?;
        lines.push(line(
            "the records in the keystore",
            true,
            &format!("{removed} envelopes removed, their pages zeroed, the write-ahead log emptied"),
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
                match self.registry.destroy_kek(provider, &id) {
                    Ok(receipt) => line(&what, receipt.destroyed, &receipt.observed),
                    Err(ProviderError::UnknownKek(_)) => {
                        line(&what, true, "the provider does not know it any more")
                    }
                    Err(error) => {
                        return Err(Failure::new(Code::Failed, format!("{what}: {}", chain(&error)))
                            .next(format!("virtseal vm shred {}: it goes on from here", doomed.name)));
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
        for record in doomed.records.iter().filter(|record| !record.location.is_empty()) {
            match volume::is_free(Path::new(&record.location)) {
                Err(VolumeError::NotFound(_)) | Ok(()) => {}
                Err(error) => return Err(Failure::from(error).of(format!("{} stays", doomed.name))),
            }
        }
        Ok(())
    }

    fn shred_object(
        &self,
        vm: VmId,
        record: &EnvelopeRecord,
        passphrase: Option<&Passphrase>,
    ) -> Result<Vec<ReceiptLine>, Failure> {
        let kind = record.envelope.kind;
        if kind == ObjectKind::Vtpm {
            let dir = libvirt_state_dir(&self.config().swtpm_dir, &vm);
            let what = format!("the state of the vTPM in {}", dir.display());
            return Ok(vec![line(
                &what,
                false,
                "left as it is: encrypted with a key that is gone with its stanzas",
            )]);
        }
        let path = Path::new(&record.location);
        let what = format!("the {kind} {}", path.display());
        let opens = || passphrase.is_some_and(|passphrase| volume::verify(path, passphrase).is_ok());
        match volume::shred_keys(path, record.envelope.id, opens) {
            Ok(None) => Ok(vec![line(
                &what,
                false,
                "left alone: it is not, or can't be shown to be, the image that this VM had there",
            )]),
            Ok(Some(shredded)) => {
                let envelope = if shredded.envelope {
                    ", the envelope removed"
                } else {
                    ""
                };
                Ok(vec![line(
                    &what,
                    true,
                    &format!(
                        "{} keyslots made dead, {} bytes of key material overwritten{envelope}",
                        shredded.keyslots, shredded.material
                    ),
                )])
            }
            Err(VolumeError::NotFound(_)) => Ok(vec![line(&what, false, "there is no such file")]),
            Err(VolumeError::NotEncrypted(_)) => {
                Ok(vec![line(&what, false, "there is another file, not encrypted")])
            }
            Err(error) => Err(error.into()),
        }
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
