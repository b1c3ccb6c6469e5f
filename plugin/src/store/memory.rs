//! An [`EnvelopeStore`](super::EnvelopeStore) in memory: for tests, and the proof that the contract asks for no database.

mod jobs;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Mutex, PoisonError};

use self::jobs::Job;
use super::damage::Rows;
use super::error::StoreError;
use super::records::{
    Change, DeletedProvider, EnvelopeRecord, EnvelopeState, IfNeeded, MadeKek, Mark, PageEnd, ProviderRecord,
    Put, RetiredKek, ShreddedRows, Traces, VmRecord,
};
use super::shared::{Envelopes, Keks, Providers, Vms};
use super::sqlite::database::now;
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, Stanza, Verified, VmId};

const PAGE: usize = 7;

#[derive(Debug, Default)]
pub(crate) struct Memory(Mutex<State>);

#[derive(Clone, Debug, Default)]
struct State {
    /// By their places: the order in which they came.
    envelopes: BTreeMap<i64, EnvelopeRecord>,
    vms: BTreeMap<VmId, VmRecord>,
    plain: BTreeSet<VmId>,
    providers: Vec<ProviderRecord>,
    deleted: Vec<DeletedProvider>,
    provider_changes: u64,
    made: Vec<MadeKek>,
    retired: Vec<RetiredKek>,
    jobs: Vec<Job>,
}

fn sound<T>(sound: Vec<T>) -> Rows<T> {
    Rows {
        sound,
        damaged: Vec::new(),
    }
}

fn changed(is_changed: bool) -> Change {
    Change::of_rows(usize::from(is_changed))
}

impl Memory {
    fn read<T>(&self, query: impl FnOnce(&State) -> T) -> T {
        query(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All of `change`, or nothing where it fails.
    fn write<T>(&self, change: impl FnOnce(&mut State) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = state.clone();
        let outcome = change(&mut next)?;
        *state = next;
        Ok(outcome)
    }
}

impl State {
    fn place(&self, id: EnvelopeId) -> Option<i64> {
        let mut places = self.envelopes.iter();
        places
            .find(|(_, record)| record.envelope.id == id)
            .map(|(place, _)| *place)
    }

    fn find(&self, id: EnvelopeId) -> Option<&EnvelopeRecord> {
        self.envelopes.get(&self.place(id)?)
    }

    fn known(&mut self, id: EnvelopeId) -> Result<&mut EnvelopeRecord, StoreError> {
        let place = self.place(id).ok_or(StoreError::UnknownEnvelope(id))?;
        Ok(self.envelopes.get_mut(&place).expect("it is in its place"))
    }

    fn sorted(&self, is_wanted: impl Fn(&EnvelopeRecord) -> bool) -> Vec<EnvelopeRecord> {
        let mut found: Vec<_> = self
            .envelopes
            .values()
            .filter(|record| is_wanted(record))
            .cloned()
            .collect();
        found.sort_by_key(|record| (record.created, record.envelope.id.to_string()));
        found
    }

    fn refuse_deleted<'a>(&self, mut stanzas: impl Iterator<Item = &'a Stanza>) -> Result<(), StoreError> {
        let is_deleted = |stanza: &&Stanza| self.deleted.iter().any(|deleted| deleted.id == stanza.provider);
        match stanzas.find(is_deleted) {
            Some(stanza) => Err(StoreError::ProviderDeleted(stanza.provider)),
            None => Ok(()),
        }
    }

    fn insert(&mut self, envelope: &Envelope, state: EnvelopeState, location: &str) {
        let last = self.envelopes.last_key_value().map_or(0, |(place, _)| *place);
        let record = EnvelopeRecord {
            envelope: envelope.clone(),
            state,
            location: location.to_owned(),
            created: now(),
            updated: now(),
        };
        self.envelopes.insert(last + 1, record);
        self.show_running_sweeps(envelope);
    }

    fn take_over(
        &mut self,
        envelope: &Envelope,
        state: EnvelopeState,
        location: &str,
    ) -> Result<Put, StoreError> {
        let verdict = Put::of(self.find(envelope.id).map(|record| &record.envelope), envelope)?;
        match verdict {
            Put::Adopted => self.insert(envelope, state, location),
            Put::Updated => {
                self.known(envelope.id)?.envelope = envelope.clone();
                self.show_running_sweeps(envelope);
            }
            Put::Unchanged | Put::Stale => {}
        }
        Ok(verdict)
    }

    fn remove(&mut self, is_gone: impl Fn(&Envelope) -> bool) -> usize {
        let before = self.envelopes.len();
        let gone: Vec<_> = self
            .envelopes
            .values()
            .map(|record| &record.envelope)
            .filter(|envelope| is_gone(envelope))
            .map(|envelope| envelope.id)
            .collect();
        self.envelopes.retain(|_, record| !is_gone(&record.envelope));
        for job in &mut self.jobs {
            job.left.retain(|id, _| !gone.contains(id));
        }
        before - self.envelopes.len()
    }

    fn remove_vm(&mut self, vm: VmId) -> usize {
        self.vms.remove(&vm);
        self.plain.remove(&vm);
        self.retired.retain(|retired| retired.vm != vm);
        self.remove(|envelope| envelope.vm == vm)
    }

    fn retire(&mut self, retired: &[RetiredKek]) {
        for kek in retired {
            if !self.retired.contains(kek) {
                self.retired.push(kek.clone());
            }
        }
    }
}

impl Envelopes for Memory {
    fn insert_pending(&self, envelope: &Verified, location: &str) -> Result<(), StoreError> {
        self.write(|state| match state.find(envelope.id) {
            Some(_) => Err(StoreError::EnvelopeExists(envelope.id)),
            None => {
                state.refuse_deleted(envelope.stanzas.iter())?;
                state.insert(envelope, EnvelopeState::Pending, location);
                Ok(())
            }
        })
    }

    fn activate(&self, id: EnvelopeId) -> Result<Change, StoreError> {
        self.write(|state| {
            let record = state.known(id)?;
            let before = std::mem::replace(&mut record.state, EnvelopeState::Active);
            Ok(changed(before != EnvelopeState::Active))
        })
    }

    fn withdraw(&self, id: EnvelopeId) -> Result<Change, StoreError> {
        self.write(|state| {
            let is_pending = state
                .find(id)
                .is_some_and(|record| record.state == EnvelopeState::Pending);
            Ok(changed(
                is_pending && state.remove(|envelope| envelope.id == id) > 0,
            ))
        })
    }

    fn set_location(&self, id: EnvelopeId, location: &str) -> Result<Change, StoreError> {
        self.write(|state| {
            let record = state.known(id)?;
            let before = std::mem::replace(&mut record.location, location.to_owned());
            Ok(changed(before != location))
        })
    }

    fn put(&self, envelope: &Verified, location: &str) -> Result<Put, StoreError> {
        self.write(|state| state.take_over(envelope, EnvelopeState::Active, location))
    }

    fn envelope(&self, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, StoreError> {
        Ok(self.read(|state| state.find(id).cloned()))
    }

    fn held_envelope(&self, _: EnvelopeId) -> Result<Option<Envelope>, StoreError> {
        Ok(None)
    }

    fn envelopes_of(&self, vm: VmId) -> Result<Rows<EnvelopeRecord>, StoreError> {
        Ok(sound(
            self.read(|state| state.sorted(|record| record.envelope.vm == vm)),
        ))
    }

    fn envelopes(&self) -> Result<Rows<EnvelopeRecord>, StoreError> {
        let mut all = self.read(|state| state.sorted(|_| true));
        all.sort_by_key(|record| record.envelope.vm.to_string());
        Ok(sound(all))
    }

    fn envelope_page(
        &self,
        after: Option<&PageEnd>,
    ) -> Result<(Vec<EnvelopeRecord>, Option<PageEnd>), StoreError> {
        let after: i64 = after.map_or(0, |PageEnd(place)| place.parse().unwrap_or(i64::MAX));
        Ok(self.read(|state| {
            let page: Vec<_> = state.envelopes.range(after + 1..).take(PAGE).collect();
            let end = page.last().filter(|_| page.len() == PAGE);
            let end = end.map(|(place, _)| PageEnd(place.to_string()));
            (page.into_iter().map(|(_, record)| record.clone()).collect(), end)
        }))
    }

    fn forget_envelope(&self, saved: &EnvelopeRecord) -> Result<Change, StoreError> {
        self.write(|state| {
            let id = saved.envelope.id;
            let is_saved = state.find(id) == Some(saved);
            Ok(changed(
                is_saved && state.remove(|envelope| envelope.id == id) > 0,
            ))
        })
    }

    fn bring_back(&self, record: &EnvelopeRecord) -> Result<Put, StoreError> {
        self.write(|state| state.take_over(&record.envelope, record.state, &record.location))
    }
}

impl Vms for Memory {
    fn remember_vm(&self, vm: VmId, name: &str) -> Result<Change, StoreError> {
        self.write(|state| {
            let was_plain = state.plain.remove(&vm);
            let known = state.vms.get(&vm).cloned();
            let renamed = known.as_ref().is_none_or(|known| known.name != name);
            let record = known.unwrap_or(VmRecord {
                vm,
                name: String::new(),
                sealed_at: now(),
                vtpm_seen: false,
            });
            let name = name.to_owned();
            state.vms.insert(vm, VmRecord { name, ..record });
            Ok(changed(renamed || was_plain))
        })
    }

    fn note_plain(&self, vm: VmId) -> Result<Change, StoreError> {
        self.write(|state| Ok(changed(state.plain.insert(vm))))
    }

    fn is_sealed(&self, vm: VmId) -> Result<bool, StoreError> {
        Ok(self.mark(vm)? == Some(Mark::Sealed))
    }

    fn mark(&self, vm: VmId) -> Result<Option<Mark>, StoreError> {
        Ok(self.read(|state| {
            let mark = match state.plain.contains(&vm) {
                true => Mark::Plain,
                false => Mark::Sealed,
            };
            state.vms.contains_key(&vm).then_some(mark)
        }))
    }

    fn set_vtpm_seen(&self, vm: VmId) -> Result<Change, StoreError> {
        self.write(|state| {
            let record = state.vms.get_mut(&vm).ok_or(StoreError::UnknownVm(vm))?;
            Ok(changed(!std::mem::replace(&mut record.vtpm_seen, true)))
        })
    }

    fn clear_vtpm_seen(&self, vm: VmId) -> Result<Change, StoreError> {
        self.write(|state| {
            let record = state.vms.get_mut(&vm);
            Ok(changed(record.is_some_and(|record| {
                std::mem::replace(&mut record.vtpm_seen, false)
            })))
        })
    }

    fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, StoreError> {
        Ok(self.read(|state| state.vms.get(&vm).cloned()))
    }

    fn vms(&self) -> Result<Rows<VmRecord>, StoreError> {
        let mut vms: Vec<_> = self.read(|state| state.vms.values().cloned().collect());
        vms.sort_by_key(|record: &VmRecord| (record.name.clone(), record.vm.to_string()));
        Ok(sound(vms))
    }

    fn shred_vm(&self, vm: VmId) -> Result<ShreddedRows, StoreError> {
        let envelopes = self.write(|state| Ok(state.remove_vm(vm)))?;
        let traces = Traces::None;
        Ok(ShreddedRows { envelopes, traces })
    }

    fn forget_vm(&self, vm: VmId, saved: &Rows<EnvelopeRecord>) -> Result<Change, StoreError> {
        self.write(|state| {
            let is_saved = state.sorted(|record| record.envelope.vm == vm) == saved.sound;
            if is_saved {
                state.remove_vm(vm);
            }
            Ok(changed(is_saved))
        })
    }

    fn bring_back_vm(&self, vm: &VmRecord, mark: Mark, retired: &[RetiredKek]) -> Result<(), StoreError> {
        self.write(|state| {
            match state.vms.get_mut(&vm.vm) {
                Some(known) => known.vtpm_seen |= vm.vtpm_seen,
                None => {
                    if mark == Mark::Plain {
                        state.plain.insert(vm.vm);
                    }
                    state.vms.insert(vm.vm, vm.clone());
                }
            }
            state.retire(retired);
            Ok(())
        })
    }
}

impl Providers for Memory {
    fn insert_provider(
        &self,
        id: ProviderId,
        name: &str,
        kind: &str,
        settings: &serde_json::Value,
    ) -> Result<ProviderRecord, StoreError> {
        self.write(|state| {
            if state.providers.iter().any(|known| known.name == name) {
                return Err(StoreError::ProviderNameTaken(name.to_owned()));
            }
            if let Some(known) = state.providers.iter().find(|known| known.id == id) {
                let name = known.name.clone();
                return Err(StoreError::ProviderExists { id, name });
            }
            state.deleted.retain(|deleted| deleted.id != id);
            let record = ProviderRecord {
                id,
                name: name.to_owned(),
                kind: kind.to_owned(),
                is_default: state.providers.is_empty(),
                created: now(),
                settings: settings.clone(),
            };
            state.providers.push(record.clone());
            state.provider_changes += 1;
            Ok(record)
        })
    }

    fn providers(&self) -> Result<Rows<ProviderRecord>, StoreError> {
        let mut providers = self.read(|state| state.providers.clone());
        providers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(sound(providers))
    }

    fn provider_changes(&self) -> u64 {
        self.read(|state| state.provider_changes)
    }

    fn set_default_provider(&self, id: ProviderId) -> Result<Change, StoreError> {
        self.write(|state| {
            let known = state.providers.iter().find(|known| known.id == id);
            if known.ok_or(StoreError::UnknownProvider(id))?.is_default {
                return Ok(Change::Unchanged);
            }
            for known in &mut state.providers {
                known.is_default = known.id == id;
            }
            state.provider_changes += 1;
            Ok(Change::Changed)
        })
    }

    fn change_provider_settings(
        &self,
        id: ProviderId,
        before: &serde_json::Value,
        after: &serde_json::Value,
    ) -> Result<Change, StoreError> {
        self.write(|state| {
            let known = state.providers.iter_mut().find(|known| known.id == id);
            let known = known.ok_or(StoreError::UnknownProvider(id))?;
            if known.settings != *before {
                return Err(StoreError::SettingsChanged(known.name.clone()));
            }
            if before == after {
                return Ok(Change::Unchanged);
            }
            known.settings = after.clone();
            state.provider_changes += 1;
            Ok(Change::Changed)
        })
    }

    fn delete_provider(&self, id: ProviderId, if_needed: IfNeeded) -> Result<(), StoreError> {
        self.write(|state| {
            let at = state.providers.iter().position(|known| known.id == id);
            let at = at.ok_or(StoreError::UnknownProvider(id))?;
            let mut records = state.envelopes.values();
            let needed =
                records.any(|record| record.envelope.stanzas.iter().any(|stanza| stanza.provider == id));
            if needed && if_needed == IfNeeded::Stays {
                return Err(StoreError::ProviderNeeded(id));
            }
            let gone = state.providers.remove(at);
            state.deleted.push(DeletedProvider {
                id,
                name: gone.name,
                kind: gone.kind,
                deleted: now(),
            });
            state.provider_changes += 1;
            Ok(())
        })
    }

    fn deleted_providers(&self) -> Result<Rows<DeletedProvider>, StoreError> {
        Ok(sound(self.read(|state| state.deleted.clone())))
    }
}

impl Keks for Memory {
    fn note_made_kek(&self, made: &MadeKek) -> Result<(), StoreError> {
        self.write(|state| {
            let is_known = |known: &MadeKek| (known.provider, &known.kek) == (made.provider, &made.kek);
            if !state.made.iter().any(is_known) {
                state.made.push(made.clone());
            }
            Ok(())
        })
    }

    fn forget_made_kek(&self, provider: ProviderId, kek: &KekId) -> Result<(), StoreError> {
        self.write(|state| {
            state
                .made
                .retain(|made| (made.provider, &made.kek) != (provider, kek));
            Ok(())
        })
    }

    fn made_keks(&self) -> Result<Rows<MadeKek>, StoreError> {
        Ok(sound(
            self.read(|state| state.made.iter().rev().cloned().collect()),
        ))
    }

    fn retired_keks(&self) -> Result<Rows<RetiredKek>, StoreError> {
        Ok(sound(self.read(|state| state.retired.clone())))
    }

    fn retired_of(&self, provider: ProviderId) -> Result<HashSet<KekId>, StoreError> {
        let of = |retired: &&RetiredKek| retired.provider == provider;
        Ok(self.read(|state| {
            state
                .retired
                .iter()
                .filter(of)
                .map(|retired| retired.kek.clone())
                .collect()
        }))
    }
}
