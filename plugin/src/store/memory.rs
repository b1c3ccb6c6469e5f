//! An [`EnvelopeStore`](super::EnvelopeStore) in memory: for tests, and the proof that the contract asks for no database.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Mutex, PoisonError};

use super::damage::Rows;
use super::error::StoreError;
use super::job_records::{JobRecord, LeftBehind, NewJob, Pass, Verdict};
use super::records::{
    Change, DeletedProvider, EnvelopeRecord, EnvelopeState, MadeKek, Mark, PageEnd, ProviderRecord, Put,
    RetiredKek, ShreddedRows, Traces, VmRecord,
};
use super::shared::{Envelopes, Jobs, Keks, Providers, Vms};
use super::sqlite::database::now;
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, Verified, VmId};
use crate::model::job::{JobId, JobState, Subject, Unit};

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

#[derive(Clone, Debug)]
struct Job {
    record: JobRecord,
    left: BTreeMap<EnvelopeId, LeftBehind>,
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

fn came_meanwhile(envelope: EnvelopeId) -> LeftBehind {
    LeftBehind {
        envelope,
        reason: "it came here meanwhile".to_owned(),
        again: true,
    }
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

    fn show_running_sweeps(&mut self, envelope: &Envelope) {
        let place = self.place(envelope.id).unwrap_or(0);
        for job in &mut self.jobs {
            let has_passed = job.record.pass == Pass::Left || place <= cursor(&job.record);
            if job.record.state == JobState::Running && covers(&job.record.subject, envelope) && has_passed {
                job.left.insert(envelope.id, came_meanwhile(envelope.id));
            }
        }
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

    fn job(&mut self, id: JobId) -> Result<&mut Job, StoreError> {
        let mut jobs = self.jobs.iter_mut();
        jobs.find(|job| job.record.id == id)
            .ok_or(StoreError::UnknownJob(id.0))
    }

    fn refuse_excluded(&self, subject: &Subject) -> Result<(), StoreError> {
        let mut running = self
            .jobs
            .iter()
            .map(|job| &job.record)
            .filter(|job| job.state == JobState::Running);
        match running.find(|job| job.subject.excludes(subject)) {
            Some(job) => Err(StoreError::JobRunning(job.id.0)),
            None => Ok(()),
        }
    }

    fn units(&self, subject: &Subject, given: u64) -> u64 {
        match subject.unit() {
            Unit::Envelopes => {
                let envelopes = self.envelopes.values();
                envelopes
                    .filter(|record| covers(subject, &record.envelope))
                    .count() as u64
            }
            Unit::Bytes => given,
        }
    }
}

fn cursor(job: &JobRecord) -> i64 {
    job.cursor.parse().unwrap_or(0)
}

/// Whether a sweep goes through `envelope`.
fn covers(subject: &Subject, envelope: &Envelope) -> bool {
    subject.path().is_none() && subject.vm().is_none_or(|vm| vm == envelope.vm)
}

impl Job {
    fn now(&self) -> JobRecord {
        JobRecord {
            left: self.left.len() as u64,
            ..self.record.clone()
        }
    }

    fn begin(&mut self, total: u64, left: &[LeftBehind]) {
        self.left = left.iter().map(|left| (left.envelope, left.clone())).collect();
        self.record = JobRecord {
            state: JobState::Running,
            pass: Pass::All,
            cursor: String::new(),
            total,
            seen: 0,
            changed: 0,
            waiting: String::new(),
            failure: String::new(),
            updated: now(),
            ..self.record.clone()
        };
    }

    fn is_running(&self) -> bool {
        self.record.state == JobState::Running
    }
}

impl Envelopes for Memory {
    fn insert_pending(&self, envelope: &Verified, location: &str) -> Result<(), StoreError> {
        self.write(|state| match state.find(envelope.id) {
            Some(_) => Err(StoreError::EnvelopeExists(envelope.id)),
            None => {
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

    fn forget_vm(&self, vm: VmId, saved: &[EnvelopeRecord]) -> Result<Change, StoreError> {
        self.write(|state| {
            let is_saved = state.sorted(|record| record.envelope.vm == vm) == saved;
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

    fn delete_provider(&self, id: ProviderId) -> Result<(), StoreError> {
        self.write(|state| {
            let at = state.providers.iter().position(|known| known.id == id);
            let gone = state.providers.remove(at.ok_or(StoreError::UnknownProvider(id))?);
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

impl Jobs for Memory {
    fn insert_job(&self, new: &NewJob<'_>) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            state.refuse_excluded(new.subject)?;
            let total = state.units(new.subject, new.total);
            let record = JobRecord {
                id: JobId(state.jobs.len() as i64 + 1),
                subject: new.subject.clone(),
                task: new.task.to_owned(),
                state: JobState::Running,
                pass: Pass::All,
                cursor: String::new(),
                total,
                seen: 0,
                changed: 0,
                left: 0,
                waiting: String::new(),
                failure: String::new(),
                created: now(),
                updated: now(),
            };
            let left = BTreeMap::new();
            let mut job = Job { record, left };
            job.begin(total, new.left);
            state.jobs.push(job.clone());
            Ok(job.now())
        })
    }

    fn resume_job(&self, job: JobId, left: &[LeftBehind]) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let ended = state.job(job)?.record.clone();
            state.refuse_excluded(&ended.subject)?;
            let total = state.units(&ended.subject, ended.total);
            let job = state.job(job)?;
            job.begin(total, left);
            Ok(job.now())
        })
    }

    fn running_jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        Ok(self.read(|state| {
            state
                .jobs
                .iter()
                .filter(|job| job.is_running())
                .map(Job::now)
                .collect()
        }))
    }

    fn job(&self, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        Ok(self.read(|state| state.jobs.iter().find(|job| job.record.id == id).map(Job::now)))
    }

    fn jobs(&self, most: u32) -> Result<Rows<JobRecord>, StoreError> {
        let skipped = |jobs: usize| jobs.saturating_sub(most as usize);
        Ok(sound(self.read(|state| {
            state
                .jobs
                .iter()
                .skip(skipped(state.jobs.len()))
                .map(Job::now)
                .collect()
        })))
    }

    fn left_behind(&self, job: JobId, most: u32) -> Result<Vec<LeftBehind>, StoreError> {
        self.write(|state| {
            Ok(state
                .job(job)?
                .left
                .values()
                .take(most as usize)
                .cloned()
                .collect())
        })
    }

    fn next_of_job(&self, job: &JobRecord, most: u32) -> Result<Rows<EnvelopeRecord>, StoreError> {
        self.write(|state| {
            let left = state.job(job.id)?.left.clone();
            let is_next = |record: &EnvelopeRecord| {
                let left = left.get(&record.envelope.id).map(|left| left.again);
                covers(&job.subject, &record.envelope)
                    && match job.pass {
                        Pass::All => left != Some(false),
                        Pass::Left => left == Some(true),
                    }
            };
            let later = state.envelopes.range(cursor(job) + 1..).map(|(_, record)| record);
            Ok(sound(
                later
                    .filter(|record| is_next(record))
                    .take(most as usize)
                    .cloned()
                    .collect(),
            ))
        })
    }

    fn commit_batch(&self, job: JobId, verdicts: &[Verdict]) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            if !state.job(job)?.is_running() {
                return Ok(state.job(job)?.now());
            }
            let mut changed = 0;
            for verdict in verdicts {
                let (id, left) = match verdict {
                    Verdict::Unchanged(id) => (*id, None),
                    Verdict::Left(left) => (left.envelope, Some(left.clone())),
                    Verdict::Damaged(_) => unreachable!("no row in memory is damaged"),
                    Verdict::Replace(old, new) => match state.known(old.id) {
                        Ok(record) if record.envelope == **old => {
                            record.envelope = new.clone().into_envelope();
                            state.retire(&RetiredKek::between(old, new));
                            changed += 1;
                            (old.id, None)
                        }
                        _ => {
                            let reason = "it changed meanwhile".to_owned();
                            let (envelope, again) = (old.id, true);
                            (
                                old.id,
                                Some(LeftBehind {
                                    envelope,
                                    reason,
                                    again,
                                }),
                            )
                        }
                    },
                };
                let place = state.place(id).unwrap_or(0);
                let job = state.job(job)?;
                match left {
                    Some(left) => job.left.insert(id, left),
                    None => job.left.remove(&id),
                };
                job.record.cursor = cursor(&job.record).max(place).to_string();
            }
            let job = state.job(job)?;
            if job.record.pass == Pass::All {
                job.record.seen += verdicts.len() as u64;
            }
            job.record.total = job.record.total.max(job.record.seen);
            job.record.changed += changed;
            job.record.waiting.clear();
            Ok(job.now())
        })
    }

    fn end_pass(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let known: BTreeMap<_, _> = state
                .envelopes
                .iter()
                .map(|(place, record)| (record.envelope.id, *place))
                .collect();
            let envelopes: Vec<_> = state
                .envelopes
                .values()
                .map(|record| record.envelope.clone())
                .collect();
            let job = state.job(job)?;
            if !job.is_running() {
                return Ok(job.now());
            }
            let behind = |envelope: &&Envelope| {
                covers(&job.record.subject, envelope) && known[&envelope.id] > cursor(&job.record)
            };
            if job.record.pass == Pass::All {
                for envelope in envelopes.iter().filter(behind) {
                    job.left
                        .entry(envelope.id)
                        .or_insert_with(|| came_meanwhile(envelope.id));
                }
            }
            job.left.retain(|id, _| known.contains_key(id));
            job.record.state = match (job.left.values().any(|left| left.again), job.left.is_empty()) {
                (true, _) => JobState::Running,
                (false, false) => JobState::Incomplete,
                (false, true) => JobState::Done,
            };
            (job.record.pass, job.record.cursor) = (Pass::Left, String::new());
            job.record.waiting.clear();
            Ok(job.now())
        })
    }

    fn job_waits(&self, job: JobId, waiting: &str) -> Result<(), StoreError> {
        self.write(|state| {
            if let Ok(job) = state.job(job)
                && job.is_running()
            {
                job.record.waiting = waiting.to_owned();
            }
            Ok(())
        })
    }

    fn end_job(&self, job: JobId, failure: Option<&str>) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let job = state.job(job)?;
            let (is_running, was_aborted) = (job.is_running(), job.record.state == JobState::Aborted);
            match failure {
                None if is_running || was_aborted => {
                    (job.record.state, job.record.seen) = (JobState::Done, job.record.total);
                }
                Some(failure) if is_running => {
                    (job.record.state, job.record.failure) = (JobState::Failed, failure.to_owned());
                }
                None | Some(_) => {}
            }
            Ok(job.now())
        })
    }

    fn abort_job(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let job = state.job(job)?;
            if job.is_running() {
                job.record.state = JobState::Aborted;
                job.record.waiting.clear();
            }
            Ok(job.now())
        })
    }
}
