//! What every [`EnvelopeStore`] must pass.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{Change, EnvelopeState, EnvelopeStore, MadeKek, Put, StoreError, Stores};
use crate::model::envelope::fixture::{changed, envelope, version};
use crate::model::envelope::{EnvelopeId, Generation, KekId, ObjectKind, ProviderId, VmId};

macro_rules! contract {
    ($($promise:ident),+ $(,)?) => {
        mod sqlite {
            use super::*;

            $(#[test]
            fn $promise() {
                let dir = tempfile::tempdir().unwrap();
                super::$promise(&*Stores::open(dir.path()).unwrap().keystore);
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
