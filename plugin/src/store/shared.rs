//! What the hosts of a fleet would share, whichever backend keeps it: envelopes, VMs, key providers, KEKs that were made or taken
//! out of use, and jobs.
//!
//! A change is on stable storage when its call returns, whole or not at all. No row goes as a side effect. What a change means for
//! this host (the hook's index, copies of envelopes that are stale from then on) is noted in the same step or before it, see
//! ADR 25: whoever changes an envelope here has nothing else to note. `contract.rs` has what every backend must pass.

use std::collections::HashSet;
use std::fmt;

use super::damage::Rows;
use super::error::StoreError;
use super::job_records::{JobRecord, LeftBehind, NewJob, Verdict};
use super::records::{
    Change, DeletedProvider, EnvelopeRecord, IfNeeded, MadeKek, Mark, PageEnd, ProviderRecord, Put,
    RetiredKek, ShreddedRows, VmRecord,
};
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, Verified, VmId};
use crate::model::job::JobId;

/// All that a fleet would share.
pub(crate) trait EnvelopeStore:
    Envelopes + Vms + Providers + Keks + Jobs + fmt::Debug + Send + Sync
{
}

impl<T: Envelopes + Vms + Providers + Keks + Jobs + fmt::Debug + Send + Sync> EnvelopeStore for T {}

pub(crate) trait Envelopes {
    /// Adds a new envelope as pending, before its object is made at `location`.
    ///
    /// # Errors
    /// [`StoreError::EnvelopeExists`] when the id is taken, [`StoreError::ProviderDeleted`] when that has happened since its DEK was
    /// wrapped.
    fn insert_pending(&self, envelope: &Verified, location: &str) -> Result<(), StoreError>;

    /// Marks an envelope active, once its object was opened with it.
    fn activate(&self, id: EnvelopeId) -> Result<Change, StoreError>;

    /// Removes an envelope that is still pending, and nothing else. Only for who has inserted it, and knows that no object
    /// was made with it.
    fn withdraw(&self, id: EnvelopeId) -> Result<Change, StoreError>;

    /// Notes that an envelope's object is at another path now.
    fn set_location(&self, id: EnvelopeId, location: &str) -> Result<Change, StoreError>;

    /// Takes over an envelope whose object has opened with the DEK that verified it: a copy from a domain's XML or an
    /// image, or a new generation made here. The newest wins; an unknown one becomes active at `location`, and so does one whose
    /// row is damaged: that is kept aside.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] for another envelope of the same generation, [`StoreError::OtherObject`]
    /// when VM or kind differ from what is known. Neither changes anything.
    fn put(&self, envelope: &Verified, location: &str) -> Result<Put, StoreError>;

    /// The envelope called `id`.
    fn envelope(&self, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, StoreError>;

    /// The envelope called `id`, if there is one that can be read: what is believed in its place takes the place of a damaged
    /// row, see [`Envelopes::put`].
    fn readable_envelope(&self, id: EnvelopeId) -> Result<Option<EnvelopeRecord>, StoreError> {
        match self.envelope(id) {
            Err(error) if error.is_of_row() => Ok(None),
            found => found,
        }
    }

    /// What a damaged row of `id` still has: a copy like any other, until it was verified.
    fn held_envelope(&self, id: EnvelopeId) -> Result<Option<Envelope>, StoreError>;

    /// The envelopes of one VM, oldest first.
    fn envelopes_of(&self, vm: VmId) -> Result<Rows<EnvelopeRecord>, StoreError>;

    /// All envelopes, by VM.
    fn envelopes(&self) -> Result<Rows<EnvelopeRecord>, StoreError>;

    /// Some envelopes whose rows can be read, those behind `after`, and where they end; `None` once there are no more. For who
    /// goes through all of them: there may be too many for the memory.
    fn envelope_page(
        &self,
        after: Option<&PageEnd>,
    ) -> Result<(Vec<EnvelopeRecord>, Option<PageEnd>), StoreError>;

    /// Drops one envelope, if it is still `saved`.
    fn forget_envelope(&self, saved: &EnvelopeRecord) -> Result<Change, StoreError>;

    /// Takes back a row that was forgotten, as it was; one that is known by now stays if it is as new. Only for what root
    /// alone can have written: it is believed as the store is.
    fn bring_back(&self, record: &EnvelopeRecord) -> Result<Put, StoreError>;
}

impl dyn EnvelopeStore + '_ {
    /// Shows `visit` every envelope whose row can be read. One that changes meanwhile is seen as it was or as it is.
    pub(crate) fn each_envelope(&self, mut visit: impl FnMut(EnvelopeRecord)) -> Result<(), StoreError> {
        let mut after = None;
        loop {
            let (page, end) = self.envelope_page(after.as_ref())?;
            page.into_iter().for_each(&mut visit);
            match end {
                Some(end) => after = Some(end),
                None => return Ok(()),
            }
        }
    }
}

/// The VMs that have, or had, sealed objects.
pub(crate) trait Vms {
    /// Notes that `vm` is sealed, and its name now. A damaged row is mended by that: its vTPM may have been seen, so it was.
    fn remember_vm(&self, vm: VmId, name: &str) -> Result<Change, StoreError>;

    /// Notes that `vm` is plain again: from then on the hook lets it start without virtseal's metadata.
    fn note_plain(&self, vm: VmId) -> Result<Change, StoreError>;

    /// Whether `vm` is sealed, as far as is known.
    fn is_sealed(&self, vm: VmId) -> Result<bool, StoreError>;

    /// What `vm` counts as; `None` for one that is not known.
    fn mark(&self, vm: VmId) -> Result<Option<Mark>, StoreError>;

    /// Notes that the encrypted vTPM state of `vm` was seen on disk.
    ///
    /// # Errors
    /// [`StoreError::UnknownVm`] before [`Vms::remember_vm`].
    fn set_vtpm_seen(&self, vm: VmId) -> Result<Change, StoreError>;

    /// Takes that note away: it is to have a new vTPM.
    fn clear_vtpm_seen(&self, vm: VmId) -> Result<Change, StoreError>;

    /// The VM called `vm`.
    fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, StoreError>;

    /// Whether the encrypted vTPM state of `vm` was ever seen on disk. A damaged row tells nothing against it.
    fn vtpm_was_seen(&self, vm: VmId) -> Result<bool, StoreError> {
        match self.vm(vm) {
            Err(error) if error.is_of_row() => Ok(true),
            known => Ok(known?.is_some_and(|record| record.vtpm_seen)),
        }
    }

    /// All VMs, by name.
    fn vms(&self) -> Result<Rows<VmRecord>, StoreError>;

    /// Removes a VM and its envelopes with everything that is known of them. Whoever calls this means to lose the keys.
    fn shred_vm(&self, vm: VmId) -> Result<ShreddedRows, StoreError>;

    /// Drops what is known of `vm`, damaged rows too, if those of its envelopes are still `saved`: one that has changed since would
    /// be lost.
    ///
    /// # Errors
    /// The backend's; [`Change::Unchanged`] when they are not.
    fn forget_vm(&self, vm: VmId, saved: &Rows<EnvelopeRecord>) -> Result<Change, StoreError>;

    /// Takes back what was known of a VM. What is known by now stays, its mark too.
    fn bring_back_vm(&self, vm: &VmRecord, mark: Mark, retired: &[RetiredKek]) -> Result<(), StoreError>;
}

/// The key providers, by what they are called and how they are reached.
pub(crate) trait Providers {
    /// Adds a provider of any kind. The first one becomes the default.
    fn insert_provider(
        &self,
        id: ProviderId,
        name: &str,
        kind: &str,
        settings: &serde_json::Value,
    ) -> Result<ProviderRecord, StoreError>;

    /// All providers, by name.
    fn providers(&self) -> Result<Rows<ProviderRecord>, StoreError>;

    /// How often the providers have changed so far, by whomever: as long as it stays the same, what was read of them holds.
    /// Waits for nothing.
    fn provider_changes(&self) -> u64;

    /// Makes `id` the default in place of the one that was.
    ///
    /// # Errors
    /// [`StoreError::UnknownProvider`]; the default stays what it was.
    fn set_default_provider(&self, id: ProviderId) -> Result<Change, StoreError>;

    /// Puts `after` in the place of the settings `before`.
    ///
    /// # Errors
    /// [`StoreError::UnknownProvider`]; [`StoreError::SettingsChanged`] if they are not `before` any more.
    fn change_provider_settings(
        &self,
        id: ProviderId,
        before: &serde_json::Value,
        after: &serde_json::Value,
    ) -> Result<Change, StoreError>;

    /// Removes a provider with what this host keeps for it, and remembers its name: from then on no new stanza of it comes here
    /// but with an envelope that travels.
    ///
    /// # Errors
    /// [`StoreError::UnknownProvider`]; [`StoreError::ProviderNeeded`] if an envelope has a stanza of it, and it was not to go then.
    fn delete_provider(&self, id: ProviderId, if_needed: IfNeeded) -> Result<(), StoreError>;

    /// The providers that were deleted and did not come back.
    fn deleted_providers(&self) -> Result<Rows<DeletedProvider>, StoreError>;
}

/// The KEKs that were made, and those that jobs have taken out of use.
pub(crate) trait Keks {
    /// Notes that a provider has made a KEK for a VM, before anything is wrapped with it.
    fn note_made_kek(&self, made: &MadeKek) -> Result<(), StoreError>;

    /// Notes that a KEK is gone for good: its destruction was seen.
    fn forget_made_kek(&self, provider: ProviderId, kek: &KekId) -> Result<(), StoreError>;

    /// The KEKs that were made here, the newest first.
    fn made_keks(&self) -> Result<Rows<MadeKek>, StoreError>;

    /// The KEKs that jobs have taken out of use.
    fn retired_keks(&self) -> Result<Rows<RetiredKek>, StoreError>;

    /// Those of `provider`. A row that does not tell its provider counts for each of them: what was taken out of use must not
    /// come back.
    fn retired_of(&self, provider: ProviderId) -> Result<HashSet<KekId>, StoreError>;
}

/// The work that outlives a request. The envelopes of a batch, where the job is, and what it left behind change in one step: so
/// each envelope is visited once, whenever the daemon dies.
pub(crate) trait Jobs {
    /// Starts a job.
    ///
    /// # Errors
    /// [`StoreError::JobRunning`]: one that excludes it runs.
    fn insert_job(&self, new: &NewJob<'_>) -> Result<JobRecord, StoreError>;

    /// Starts a job that has ended once more, from its beginning.
    ///
    /// # Errors
    /// As [`Jobs::insert_job`]; [`StoreError::UnknownJob`].
    fn resume_job(&self, job: JobId, left: &[LeftBehind]) -> Result<JobRecord, StoreError>;

    /// The jobs that run, the oldest first.
    fn running_jobs(&self) -> Result<Vec<JobRecord>, StoreError>;

    /// The job with this number.
    fn job(&self, id: JobId) -> Result<Option<JobRecord>, StoreError>;

    /// The last `most` jobs, oldest first.
    fn jobs(&self, most: u32) -> Result<Rows<JobRecord>, StoreError>;

    /// The first `most` envelopes that a job left behind.
    fn left_behind(&self, job: JobId, most: u32) -> Result<Vec<LeftBehind>, StoreError>;

    /// The next `most` envelopes of a job's pass.
    fn next_of_job(&self, job: &JobRecord, most: u32) -> Result<Rows<EnvelopeRecord>, StoreError>;

    /// Writes down what became of a batch and that the job is behind its last envelope, in one step. An envelope
    /// that was changed by someone else meanwhile is left for the next pass, and so is one that would get a stanza of a provider that is
    /// gone. Each copy of a replaced envelope that
    /// travels is stale from here on.
    fn commit_batch(&self, job: JobId, verdicts: &[Verdict]) -> Result<JobRecord, StoreError>;

    /// Ends a pass: with envelopes left that may open later, another one follows once something has changed; else the
    /// job is through.
    fn end_pass(&self, job: JobId) -> Result<JobRecord, StoreError>;

    /// Notes what a job waits for.
    fn job_waits(&self, job: JobId, waiting: &str) -> Result<(), StoreError>;

    /// Ends a sweep that waits: with what it has not come to, or could not do, left behind for when it is resumed. One that does not wait
    /// stays as it is.
    fn end_waiting(&self, job: JobId) -> Result<JobRecord, StoreError>;

    /// Notes how a job that is no sweep has ended: with all units done, or given up for a reason, as JSON. What has been done is
    /// told of one that was aborted at that very moment, too.
    fn end_job(&self, job: JobId, failure: Option<&str>) -> Result<JobRecord, StoreError>;

    /// Ends a job where it is; says how it stands then.
    fn abort_job(&self, job: JobId) -> Result<JobRecord, StoreError>;
}
