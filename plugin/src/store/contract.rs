//! What every [`EnvelopeStore`] must pass.

mod jobs;

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use self::jobs::{
    a_job_ends_once_and_can_be_taken_up_again, a_sweep_is_incomplete_with_what_it_can_not_change,
    a_sweep_replaces_what_is_still_there_and_retires_its_keks, a_sweep_sees_what_comes_and_changes_meanwhile,
    a_sweep_that_waits_ends_with_all_that_it_has_not_come_to, jobs_about_the_same_exclude_each_other, sweep,
};
use super::memory::Memory;
use super::{
    Change, EnvelopeState, EnvelopeStore, IfNeeded, MadeKek, Mark, ProviderRecord, Put, RetiredKek,
    StoreError, Stores, Traces, Verdict,
};
use crate::model::envelope::fixture::{changed, envelope, version};
use crate::model::envelope::{
    Envelope, EnvelopeId, Generation, KekId, ObjectKind, ProviderId, Verified, VmId,
};
use crate::model::job::Subject;

macro_rules! contract {
    ($($promise:ident),+ $(,)?) => {
        mod sqlite {
            $(#[test]
            fn $promise() {
                let dir = tempfile::tempdir().unwrap();
                super::$promise(&*super::Stores::open(dir.path()).unwrap().keystore);
            })+
        }

        mod memory {
            $(#[test]
            fn $promise() {
                super::$promise(&super::Memory::default());
            })+
        }
    };
}

contract!(
    an_id_is_taken_once,
    only_what_is_pending_is_withdrawn,
    a_location_follows_its_disk,
    an_envelope_never_changes_its_vm_or_kind,
    generations_never_go_back_and_conflicts_are_told,
    who_goes_through_all_sees_each_once,
    made_keks_are_known_until_their_end_was_seen,
    a_vm_keeps_its_date_and_follows_its_name,
    what_is_forgotten_comes_back_and_what_is_newer_stays,
    what_is_shredded_is_gone,
    there_is_one_default_from_the_first_provider_on,
    names_and_ids_of_providers_are_taken_once,
    changes_of_providers_are_counted,
    settings_change_only_from_what_was_read,
    what_needs_a_provider_keeps_it_and_nothing_new_needs_one_that_is_gone,
    a_sweep_sees_what_comes_and_changes_meanwhile,
    a_sweep_replaces_what_is_still_there_and_retires_its_keks,
    a_sweep_is_incomplete_with_what_it_can_not_change,
    jobs_about_the_same_exclude_each_other,
    a_job_ends_once_and_can_be_taken_up_again,
    a_sweep_that_waits_ends_with_all_that_it_has_not_come_to,
);

fn an_id_is_taken_once(store: &dyn EnvelopeStore) {
    let envelope = envelope(VmId::random());
    store.insert_pending(&envelope, "a").unwrap();
    let again = store.insert_pending(&version(&envelope, 5, 5), "b");
    assert!(matches!(again, Err(StoreError::EnvelopeExists(_))));
    assert_eq!(store.envelope(envelope.id).unwrap().unwrap().location, "a");
    let nobody = EnvelopeId::random();
    assert!(matches!(
        store.activate(nobody),
        Err(StoreError::UnknownEnvelope(id)) if id == nobody
    ));
}

fn only_what_is_pending_is_withdrawn(store: &dyn EnvelopeStore) {
    let (failed, made) = (envelope(VmId::random()), envelope(VmId::random()));
    for envelope in [&failed, &made] {
        store.insert_pending(envelope, "/images/web01.qcow2").unwrap();
    }
    assert_eq!(store.activate(made.id).unwrap(), Change::Changed);
    assert_eq!(store.activate(made.id).unwrap(), Change::Unchanged);
    assert_eq!(store.withdraw(made.id).unwrap(), Change::Unchanged);
    assert_eq!(store.withdraw(failed.id).unwrap(), Change::Changed);
    assert_eq!(store.withdraw(failed.id).unwrap(), Change::Unchanged);
    assert_eq!(store.envelope(failed.id).unwrap(), None);
    let left = store.envelopes().unwrap().whole().unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(
        (&left[0].envelope, left[0].state),
        (&*made, EnvelopeState::Active)
    );
}

fn a_location_follows_its_disk(store: &dyn EnvelopeStore) {
    let envelope = envelope(VmId::random());
    store.insert_pending(&envelope, "a").unwrap();
    assert_eq!(store.set_location(envelope.id, "a").unwrap(), Change::Unchanged);
    assert_eq!(store.set_location(envelope.id, "b").unwrap(), Change::Changed);
    assert_eq!(store.envelope(envelope.id).unwrap().unwrap().location, "b");
}

fn an_envelope_never_changes_its_vm_or_kind(store: &dyn EnvelopeStore) {
    let known = envelope(VmId::random());
    store.put(&known, "a").unwrap();
    for other in [
        changed(&version(&known, 9, 7), |envelope| envelope.vm = VmId::random()),
        changed(&version(&known, 9, 7), |envelope| {
            envelope.kind = ObjectKind::Vtpm;
        }),
    ] {
        assert!(matches!(
            store.put(&other, "a"),
            Err(StoreError::OtherObject { .. })
        ));
    }
    assert_eq!(store.envelope(known.id).unwrap().unwrap().envelope, *known);
}

fn generations_never_go_back_and_conflicts_are_told(store: &dyn EnvelopeStore) {
    let offers = prop::collection::vec((1..5_u64, 0..2_u8), 1..8);
    let check = |offers: Vec<(u64, u8)>| {
        let base = envelope(VmId::random());
        let mut known: Option<(u64, u8)> = None;
        for (generation, body) in offers {
            let outcome = store.put(&version(&base, generation, body), "");
            match known {
                None => prop_assert_eq!(outcome.unwrap(), Put::Adopted),
                Some((newest, _)) if generation > newest => prop_assert_eq!(outcome.unwrap(), Put::Updated),
                Some((newest, _)) if generation < newest => prop_assert_eq!(outcome.unwrap(), Put::Stale),
                Some((_, same)) if body == same => prop_assert_eq!(outcome.unwrap(), Put::Unchanged),
                Some((newest, _)) => {
                    let error = outcome.unwrap_err();
                    prop_assert!(error.to_string().contains(&base.id.to_string()));
                    let conflict = matches!(error, StoreError::Conflict { generation, .. }
                        if generation == Generation::of_test(newest));
                    prop_assert!(conflict);
                    continue;
                }
            }
            if known.is_none_or(|(newest, _)| generation > newest) {
                known = Some((generation, body));
            }
            let (newest, body) = known.unwrap();
            let stored = store.envelope(base.id).unwrap().unwrap();
            prop_assert_eq!(stored.envelope, version(&base, newest, body).into_envelope());
            prop_assert_eq!(stored.state, EnvelopeState::Active);
        }
        Ok(())
    };
    let mut runner = TestRunner::new(ProptestConfig::with_cases(16));
    runner.run(&offers, check).unwrap();
}

fn who_goes_through_all_sees_each_once(store: &dyn EnvelopeStore) {
    let made: BTreeSet<_> = (0..600)
        .map(|_| {
            let envelope = envelope(VmId::random());
            store.put(&envelope, "").unwrap();
            envelope.id
        })
        .collect();
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let (page, end) = store.envelope_page(after.as_ref()).unwrap();
        seen.extend(page.into_iter().map(|record| record.envelope.id));
        let Some(end) = end else { break };
        after = Some(end);
    }
    assert_eq!(seen.len(), made.len());
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), made);
}

fn made_keks_are_known_until_their_end_was_seen(store: &dyn EnvelopeStore) {
    let (provider, vm) = (ProviderId::random(), VmId::random());
    let made = ["a", "b"].map(|kek| MadeKek {
        vm,
        provider,
        kek: KekId(kek.to_owned()),
    });
    for made in made.iter().chain(&made) {
        store.note_made_kek(made).unwrap();
    }
    assert_eq!(
        store.made_keks().unwrap().whole().unwrap(),
        [made[1].clone(), made[0].clone()]
    );
    store.forget_made_kek(provider, &made[1].kek).unwrap();
    assert_eq!(store.made_keks().unwrap().whole().unwrap(), [made[0].clone()]);
}

fn a_vm_keeps_its_date_and_follows_its_name(store: &dyn EnvelopeStore) {
    let vm = VmId::random();
    assert!(matches!(store.set_vtpm_seen(vm), Err(StoreError::UnknownVm(_))));
    assert_eq!(store.mark(vm).unwrap(), None);
    assert_eq!(store.remember_vm(vm, "web01").unwrap(), Change::Changed);
    assert_eq!(store.remember_vm(vm, "web01").unwrap(), Change::Unchanged);
    let sealed_at = store.vm(vm).unwrap().unwrap().sealed_at;
    assert!(!store.vtpm_was_seen(vm).unwrap());
    store.set_vtpm_seen(vm).unwrap();
    assert_eq!(store.set_vtpm_seen(vm).unwrap(), Change::Unchanged);
    assert_eq!(store.remember_vm(vm, "web02").unwrap(), Change::Changed);
    let vms = store.vms().unwrap().whole().unwrap();
    assert_eq!(vms.len(), 1);
    assert!(vms[0].vtpm_seen && vms[0].name == "web02" && vms[0].sealed_at == sealed_at);
    assert_eq!(store.clear_vtpm_seen(vm).unwrap(), Change::Changed);
    assert_eq!(store.clear_vtpm_seen(vm).unwrap(), Change::Unchanged);
    assert!(!store.vtpm_was_seen(vm).unwrap());
    assert_eq!(store.clear_vtpm_seen(VmId::random()).unwrap(), Change::Unchanged);
    // Plain until it is sealed again.
    assert_eq!(store.note_plain(vm).unwrap(), Change::Changed);
    assert_eq!(store.note_plain(vm).unwrap(), Change::Unchanged);
    assert!(!store.is_sealed(vm).unwrap() && store.mark(vm).unwrap() == Some(Mark::Plain));
    assert_eq!(store.remember_vm(vm, "web02").unwrap(), Change::Changed);
    assert!(store.is_sealed(vm).unwrap() && store.mark(vm).unwrap() == Some(Mark::Sealed));
}

fn what_is_forgotten_comes_back_and_what_is_newer_stays(store: &dyn EnvelopeStore) {
    let (vm, other) = (VmId::random(), envelope(VmId::random()));
    let (kept, pending) = (envelope(vm), envelope(vm));
    store.put(&other, "").unwrap();
    store.put(&kept, "/a").unwrap();
    store.insert_pending(&pending, "/b").unwrap();
    store.remember_vm(vm, "web01").unwrap();
    store.note_plain(vm).unwrap();
    let (record, saved) = (store.vm(vm).unwrap().unwrap(), store.envelopes_of(vm).unwrap());
    assert_eq!(saved.sound.len(), 2);
    // One that has changed since it was saved would be lost.
    store.set_location(kept.id, "/c").unwrap();
    assert_eq!(store.forget_vm(vm, &saved).unwrap(), Change::Unchanged);
    let saved = store.envelopes_of(vm).unwrap();
    let of_kept = saved
        .sound
        .iter()
        .find(|record| record.envelope.id == kept.id)
        .unwrap();
    assert_eq!(store.forget_envelope(of_kept).unwrap(), Change::Changed);
    assert_eq!(store.forget_envelope(of_kept).unwrap(), Change::Unchanged);
    assert_eq!(store.bring_back(of_kept).unwrap(), Put::Adopted);
    let saved = store.envelopes_of(vm).unwrap();
    assert_eq!(store.forget_vm(vm, &saved).unwrap(), Change::Changed);
    assert!(store.envelopes_of(vm).unwrap().is_empty() && store.vm(vm).unwrap().is_none());
    assert!(store.envelope(other.id).unwrap().is_some());

    let retired = RetiredKek {
        vm,
        provider: ProviderId::random(),
        kek: KekId("old".to_owned()),
    };
    // A later one has come meanwhile.
    store.put(&version(&kept, 5, 5), "/d").unwrap();
    for saved in &saved.sound {
        store.bring_back(saved).unwrap();
    }
    store
        .bring_back_vm(&record, Mark::Plain, std::slice::from_ref(&retired))
        .unwrap();
    let back = store.envelopes_of(vm).unwrap().whole().unwrap();
    let state = |of: &Verified| {
        let found = back.iter().find(|record| record.envelope.id == of.id).unwrap();
        (found.state, found.location.clone(), found.envelope.clone())
    };
    assert_eq!(
        state(&kept),
        (
            EnvelopeState::Active,
            "/d".to_owned(),
            version(&kept, 5, 5).into_envelope()
        )
    );
    assert_eq!(
        state(&pending),
        (EnvelopeState::Pending, "/b".to_owned(), pending.into_envelope())
    );
    assert_eq!(store.vm(vm).unwrap(), Some(record.clone()));
    assert_eq!(store.mark(vm).unwrap(), Some(Mark::Plain));
    assert_eq!(store.retired_keks().unwrap().whole().unwrap(), [retired]);
    // Who is sealed by now stays so, whatever an old file says.
    store.remember_vm(vm, "web01").unwrap();
    store.bring_back_vm(&record, Mark::Plain, &[]).unwrap();
    assert!(store.is_sealed(vm).unwrap());
}

fn what_is_shredded_is_gone(store: &dyn EnvelopeStore) {
    let (doomed, other) = (VmId::random(), envelope(VmId::random()));
    store.put(&other, "").unwrap();
    for _ in 0..3 {
        store.put(&envelope(doomed), "").unwrap();
    }
    store.remember_vm(doomed, "web01").unwrap();
    let shredded = store.shred_vm(doomed).unwrap();
    assert_eq!((shredded.envelopes, shredded.traces), (3, Traces::None));
    assert!(store.envelopes_of(doomed).unwrap().is_empty() && store.vm(doomed).unwrap().is_none());
    assert_eq!(store.envelopes().unwrap().whole().unwrap().len(), 1);
}

fn insert_provider(
    store: &dyn EnvelopeStore,
    id: ProviderId,
    name: &str,
) -> Result<ProviderRecord, StoreError> {
    store.insert_provider(id, name, "kmip", &serde_json::json!({"endpoint": "kms.example"}))
}

fn default_of(store: &dyn EnvelopeStore) -> Vec<String> {
    let providers = store.providers().unwrap().whole().unwrap();
    let defaults = providers.into_iter().filter(|record| record.is_default);
    defaults.map(|record| record.name).collect()
}

fn there_is_one_default_from_the_first_provider_on(store: &dyn EnvelopeStore) {
    assert!(default_of(store).is_empty());
    let (one, two) = (ProviderId::random(), ProviderId::random());
    insert_provider(store, one, "one").unwrap();
    insert_provider(store, two, "two").unwrap();
    assert_eq!(default_of(store), ["one"]);
    assert_eq!(store.set_default_provider(two).unwrap(), Change::Changed);
    assert_eq!(store.set_default_provider(two).unwrap(), Change::Unchanged);
    assert_eq!(default_of(store), ["two"]);
    assert!(store.set_default_provider(ProviderId::random()).is_err());
    assert_eq!(default_of(store), ["two"]);
}

fn names_and_ids_of_providers_are_taken_once(store: &dyn EnvelopeStore) {
    let id = ProviderId::random();
    let made = insert_provider(store, id, "main").unwrap();
    assert!(matches!(
        insert_provider(store, ProviderId::random(), "main"),
        Err(StoreError::ProviderNameTaken(_))
    ));
    let error = insert_provider(store, id, "other").unwrap_err();
    assert!(matches!(&error, StoreError::ProviderExists { name, .. } if name == "main"));
    assert_eq!(store.providers().unwrap().whole().unwrap(), [made]);
    // Its name is remembered until it comes back.
    store.delete_provider(id, IfNeeded::Stays).unwrap();
    assert!(matches!(
        store.delete_provider(id, IfNeeded::Stays),
        Err(StoreError::UnknownProvider(_))
    ));
    let deleted = store.deleted_providers().unwrap().whole().unwrap();
    assert_eq!(
        (deleted.len(), deleted[0].id, deleted[0].name.as_str()),
        (1, id, "main")
    );
    insert_provider(store, id, "again").unwrap();
    assert!(store.deleted_providers().unwrap().is_empty());
}

fn settings_change_only_from_what_was_read(store: &dyn EnvelopeStore) {
    let id = ProviderId::random();
    let before = insert_provider(store, id, "one").unwrap().settings;
    let (one, two) = (
        serde_json::json!({"endpoint": "a"}),
        serde_json::json!({"endpoint": "b"}),
    );
    let settings = || store.providers().unwrap().whole().unwrap()[0].settings.clone();
    let change = |from, to| store.change_provider_settings(id, from, to);
    assert_eq!(change(&before, &before).unwrap(), Change::Unchanged);
    assert_eq!(change(&before, &one).unwrap(), Change::Changed);
    assert!(matches!(change(&before, &two), Err(StoreError::SettingsChanged(name)) if name == "one"));
    assert_eq!(settings(), one);
    assert!(matches!(
        store.change_provider_settings(ProviderId::random(), &one, &two),
        Err(StoreError::UnknownProvider(_))
    ));
}

fn changes_of_providers_are_counted(store: &dyn EnvelopeStore) {
    let (id, mut before) = (ProviderId::random(), store.provider_changes());
    let mut has_changed = || {
        let now = store.provider_changes();
        now > std::mem::replace(&mut before, now)
    };
    insert_provider(store, id, "one").unwrap();
    assert!(has_changed());
    store.put(&envelope(VmId::random()), "").unwrap();
    store.providers().unwrap().whole().unwrap();
    assert!(!has_changed());
    insert_provider(store, ProviderId::random(), "two").unwrap();
    assert!(has_changed());
    let two = store.providers().unwrap().whole().unwrap()[1].id;
    store.set_default_provider(two).unwrap();
    assert!(has_changed());
    let (before, after) = (
        serde_json::json!({"endpoint": "kms.example"}),
        serde_json::json!({}),
    );
    store.change_provider_settings(two, &before, &after).unwrap();
    assert!(has_changed());
    store.delete_provider(id, IfNeeded::Stays).unwrap();
    assert!(has_changed());
}

fn what_needs_a_provider_keeps_it_and_nothing_new_needs_one_that_is_gone(store: &dyn EnvelopeStore) {
    let (known, late) = (envelope(VmId::random()), envelope(VmId::random()));
    let provider = known.stanzas[0].provider;
    insert_provider(store, provider, "main").unwrap();
    store.insert_pending(&known, "a").unwrap();
    let stays = store.delete_provider(provider, IfNeeded::Stays);
    assert!(matches!(stays, Err(StoreError::ProviderNeeded(id)) if id == provider));
    store.delete_provider(provider, IfNeeded::Goes).unwrap();
    let of_it = changed(&late, |envelope| envelope.stanzas = known.stanzas.clone());
    let refused = store.insert_pending(&of_it, "b");
    assert!(matches!(refused, Err(StoreError::ProviderDeleted(id)) if id == provider));
    // What travels here may need it still, and what had a stanza of it keeps that.
    store.put(&of_it, "b").unwrap();
    let job = store.insert_job(&sweep(&Subject::AllEnvelopes, &[])).unwrap();
    let next = |change: fn(&mut Envelope)| {
        let new = changed(&known, |envelope| {
            envelope.generation = Generation::of_test(2);
            change(envelope);
        });
        let old = Box::new(known.clone().into_envelope());
        store
            .commit_batch(job.id, &[Verdict::Replace(old, Box::new(new))])
            .unwrap()
    };
    let left = next(|envelope| envelope.stanzas[0].kek = KekId("new".into()));
    assert_eq!((left.changed, left.left), (0, 1));
    let kept = next(|envelope| {
        let mut other = envelope.stanzas[0].clone();
        other.provider = ProviderId::random();
        envelope.stanzas.push(other);
    });
    assert_eq!((kept.changed, kept.left), (1, 0));
    insert_provider(store, provider, "main").unwrap();
    store
        .insert_pending(
            &changed(&of_it, |envelope| envelope.id = EnvelopeId::random()),
            "c",
        )
        .unwrap();
}
