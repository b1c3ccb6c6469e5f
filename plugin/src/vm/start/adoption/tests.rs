use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::model::envelope::{Binding, EnvelopeId, Generation, ObjectKind, Stanza, VmId};
use crate::provider::KeyProvider;
use crate::provider::native::NativeProvider;
use crate::secret::SecretBytes;
use crate::store::{EnvelopeState, Stores};

struct Host {
    _dir: tempfile::TempDir,
    recipients: Recipients,
    spare: Arc<NativeProvider>,
    record: EnvelopeRecord,
    dek: Dek,
}

impl Host {
    /// One envelope, which `main` and `spare` open.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
        let add = |name: &str| {
            let secret = SecretBytes::take(&mut b"p".to_vec()).unwrap();
            let provider = recipients
                .add_by(|table| NativeProvider::create(table, &name.parse().unwrap(), &secret))
                .unwrap();
            let generation = provider.backup(None).unwrap().generation;
            provider.confirm_backup(generation).unwrap();
            provider
        };
        let (_main, spare) = (add("main"), add("spare"));
        recipients.set_recipients(vec!["main".to_owned(), "spare".to_owned()]);
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Disk,
        };
        let (envelope, dek) = recipients.seal_new(None, &binding).unwrap();
        stores.keystore.put(&envelope, "/images/disk.qcow2").unwrap();
        let record = stores.keystore.envelope(envelope.id).unwrap().unwrap();
        assert_eq!(record.state, EnvelopeState::Active);
        Self {
            _dir: dir,
            recipients,
            spare,
            record,
            dek,
        }
    }

    fn own(&self) -> Verified {
        self.record.verify(&self.dek).unwrap()
    }

    fn believe(&self, copy: &Envelope) -> Believed {
        believe(&self.recipients, Some(&self.record), Some(copy), &self.dek).unwrap()
    }

    /// Nothing but the keystore's version counts, and somebody hears of the other.
    fn expect_disbelief(&self, copy: &Envelope) -> Doubt {
        let believed = self.believe(copy);
        assert_eq!((believed.envelope, believed.is_news), (self.own(), false));
        believed.doubt.unwrap()
    }
}

fn format_1(envelope: &Envelope) -> Envelope {
    let mut json: serde_json::Value = serde_json::from_str(&envelope.to_json()).unwrap();
    json["version"] = 1.into();
    let fields = json.as_object_mut().unwrap();
    fields.retain(|field, _| !["mac", "seen", "shared_with"].contains(&field.as_str()));
    Envelope::from_json(&json.to_string()).unwrap()
}

#[test]
fn what_was_changed_without_the_key_counts_for_nothing() {
    let host = Host::new();
    let forge = |change: &dyn Fn(&mut Envelope)| {
        let mut copy = host.record.envelope.clone();
        copy.generation = Generation::of_test(1 << 40);
        change(&mut copy);
        copy
    };
    let forged = [
        forge(&|_| {}),
        forge(&|copy| copy.generation = Generation::of_test(i64::MAX as u64)),
        forge(&|copy| copy.generation = Generation::of_test(1)),
        forge(&|copy| copy.generation = Generation::of_test(0)),
        forge(&|copy| drop(copy.stanzas.pop())),
        forge(&|copy| copy.stanzas[1].body[20] ^= 1),
        forge(&|copy| copy.stanzas.swap(0, 1)),
        forge(&|copy| copy.shared_with.push(VmId::random())),
        forge(&|copy| copy.seen = true),
    ];
    for copy in forged.iter().filter(|copy| **copy != host.record.envelope) {
        let doubt = host.expect_disbelief(copy);
        assert!(
            matches!(doubt, Doubt::Unverified(EnvelopeError::Mac { .. })),
            "{doubt:?}"
        );
        assert!(doubt.words(copy, "the XML of web01").contains("the XML of web01"));
        assert_eq!(*host.believe(copy).needed_by(copy), host.record.envelope);
    }
    let mut replayed = format_1(&host.record.envelope);
    replayed.stanzas[0].kek = crate::model::envelope::KekId("another VM's".to_owned());
    let believed = host.believe(&replayed);
    assert!(believed.doubt.is_none() && !believed.is_news);
    assert_eq!(*believed.needed_by(&replayed), host.record.envelope);
    replayed.generation = Generation::of_test(99);
    let doubt = host.expect_disbelief(&replayed);
    assert!(matches!(doubt, Doubt::Unverified(EnvelopeError::Format1)));
    for copy in [&forged[0], &replayed] {
        assert!(believe(&host.recipients, None, Some(copy), &host.dek).is_err());
    }
}

#[test]
fn what_was_changed_with_the_key_counts_if_it_is_newer_and_opens() {
    let host = Host::new();
    let own = host.own();
    let newer = own.share_with(VmId::random(), &host.dek).unwrap();
    let believed = host.believe(&newer);
    assert_eq!((&believed.envelope, believed.is_news), (&newer, true));
    assert!(believed.doubt.is_none());
    // By a provider that this host does not have, or that does not answer now.
    let mut stanza: Stanza = own.stanzas[1].clone();
    stanza.provider = crate::model::envelope::ProviderId::random();
    let elsewhere = own.with_stanzas(vec![stanza], &host.dek).unwrap();
    assert!(matches!(host.expect_disbelief(&elsewhere), Doubt::DoesNotOpen));
    assert_eq!(
        *host.believe(&elsewhere).needed_by(&elsewhere),
        *elsewhere,
        "by those who have the provider"
    );
    let spare_alone = own.with_stanzas(vec![own.stanzas[1].clone()], &host.dek).unwrap();
    assert_eq!(host.believe(&spare_alone).envelope, spare_alone);
    host.spare.lock();
    assert!(matches!(host.expect_disbelief(&spare_alone), Doubt::DoesNotOpen));
}

#[test]
fn of_two_of_one_generation_the_keystores_stays() {
    let mut host = Host::new();
    let (ours, theirs) = (
        host.own().share_with(VmId::random(), &host.dek).unwrap(),
        host.own().share_with(VmId::random(), &host.dek).unwrap(),
    );
    let older = host.record.envelope.clone();
    host.record.envelope = ours.into_envelope();
    assert!(matches!(host.expect_disbelief(&theirs), Doubt::Conflict));
    assert!(host.believe(&older).doubt.is_none());
}

#[test]
fn the_keystores_format_1_is_upgraded_and_its_copies_are_behind() {
    let mut host = Host::new();
    let old = format_1(&host.record.envelope);
    host.record.envelope = old.clone();
    let believed = host.believe(&old);
    assert!(believed.is_news && believed.doubt.is_none());
    assert_eq!(
        (believed.envelope.format(), believed.envelope.generation),
        (2, Generation::of_test(2))
    );
    assert_eq!(believed.envelope.stanzas, old.stanzas);
}

/// The row says less than it did, but what is in it may be newer than what travels.
#[test]
fn a_damaged_row_gives_way_to_no_earlier_version() {
    let host = Host::new();
    let older = host.own();
    let newer = older.share_with(VmId::random(), &host.dek).unwrap();
    let without_row = |held: &Envelope, copy: &Envelope| {
        let believed = believe_without_row(&host.recipients, held, copy, &host.dek).unwrap();
        assert!(believed.is_news);
        believed.envelope
    };
    assert_eq!(without_row(&newer, &older), newer);
    assert_eq!(without_row(&older, &newer), newer);
    let mut forged = newer.clone().into_envelope();
    forged.generation = Generation::of_test(99);
    assert_eq!(without_row(&forged, &older), older);
    assert_eq!(without_row(&older, &forged), older);
    let old_form = format_1(&older);
    assert_eq!(without_row(&old_form, &older), older);
    assert!(believe_without_row(&host.recipients, &forged, &old_form, &host.dek).is_err());
    // A newer one that opens by nothing here is no use alone.
    let spare_alone = newer
        .with_stanzas(vec![newer.stanzas[1].clone()], &host.dek)
        .unwrap();
    assert_eq!(without_row(&spare_alone, &older), spare_alone);
    host.spare.lock();
    assert_eq!(without_row(&spare_alone, &older), older);
    assert_eq!(without_row(&older, &spare_alone), older);
}
