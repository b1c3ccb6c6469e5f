//! One conflict, as each of those that read copies sees it. What a start and the status make of it is tested beside them.

use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::config::Policies;
use crate::host::libvirt::{Background, KeptXml};
use crate::model::envelope::{Binding, ObjectKind, VmId};
use crate::object::OpenedHeaders;
use crate::provider::native::NativeProvider;
use crate::recipients::Recipients;
use crate::secret::SecretBytes;
use crate::store::Stores;
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::adopt::{Formats, adopt};
use crate::vm::confirmed_formats::ConfirmedFormats;
use crate::vm::copies::Standing;
use crate::vm::deletion::delete;
use crate::vm::forget::{Dropped, keep_aside};
use crate::vm::forgotten::Said;

struct Stage {
    _dir: tempfile::TempDir,
    stores: Stores,
    recipients: Recipients,
    libvirt: Background,
    opened_headers: OpenedHeaders,
    record: EnvelopeRecord,
    dek: Dek,
}

impl Stage {
    /// A VM with a vTPM's envelope, which has no file that would have to open.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
        for name in ["main", "spare"] {
            let secret = SecretBytes::take(&mut b"p".to_vec()).unwrap();
            let provider = recipients
                .add_by(|table| NativeProvider::create(table, &name.parse().unwrap(), &secret))
                .unwrap();
            provider
                .confirm_backup(provider.backup(None).unwrap().generation)
                .unwrap();
        }
        recipients.set_recipients(vec!["main".to_owned(), "spare".to_owned()]);
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Vtpm,
        };
        let (envelope, dek) = recipients.seal_new(None, &binding).unwrap();
        stores.keystore.put(&envelope, "").unwrap();
        stores.keystore.remember_vm(envelope.vm, "web01").unwrap();
        let record = stores.keystore.envelope(envelope.id).unwrap().unwrap();
        Self {
            _dir: dir,
            stores,
            recipients,
            libvirt: Background::new("test:///default"),
            opened_headers: OpenedHeaders::default(),
            record,
            dek,
        }
    }

    /// With a VM that has `copy` in its XML.
    fn host(&self, copy: &Envelope) -> Host<'_> {
        let config = crate::config::Config::default();
        Host {
            keystore: self.stores.keystore.as_ref(),
            host_store: &self.stores.host_store,
            recipients: &self.recipients,
            libvirt: &self.libvirt,
            opened_headers: &self.opened_headers,
            swtpm_dir: self._dir.path().join("swtpm"),
            nvram_dir: self._dir.path().join("nvram"),
            confirmed: ConfirmedFormats::default(),
            accepted: AcceptedLosses::default(),
            policies: Policies::default(),
            paths: config.path_rule(),
            kept: vec![KeptXml {
                vm: copy.vm,
                name: "web01".to_owned(),
                snapshot: None,
                xml: xml(copy),
            }],
        }
    }
}

fn xml(copy: &Envelope) -> String {
    format!(
        "<domain type='kvm'><name>web01</name><uuid>{}</uuid><metadata><virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'>\
         <virtseal:envelope>{}</virtseal:envelope></virtseal:vm></metadata><devices><tpm model='tpm-crb'>\
         <backend type='emulator' version='2.0'><encryption secret='{}'/></backend></tpm></devices></domain>",
        copy.vm,
        copy.to_json(),
        copy.id
    )
}

#[test]
fn every_reader_sees_a_conflict_and_none_decides_it() {
    let stage = Stage::new();
    let own = stage.record.verify(&stage.dek).unwrap();
    // Two hosts have made another version of the same one; this one's is in the keystore.
    let ours = own.share_with(VmId::random(), &stage.dek).unwrap();
    let theirs = own
        .with_stanzas(vec![own.stanzas[1].clone()], &stage.dek)
        .unwrap();
    assert_eq!(ours.supersedes(&theirs), Precedence::Conflict);
    stage.stores.keystore.put(&ours, "").unwrap();
    let record = stage.stores.keystore.envelope(ours.id).unwrap().unwrap();
    let host = stage.host(&theirs);

    // Adopting.
    let domain = Domain::parse(&xml(&theirs)).unwrap();
    let adopted = adopt(&host, &domain, Formats::WithMac).unwrap();
    assert!(!adopted.changed);
    assert!(
        adopted.warnings[0].what.contains("different versions"),
        "{:?}",
        adopted.warnings
    );
    // A job.
    let travelling = adopt_foreign_envelopes(&host, |_| Ok(())).unwrap();
    let rivals: Vec<_> = travelling.rivals.iter().map(|left| left.envelope).collect();
    assert_eq!(rivals, [ours.id]);
    // What brings copies up to date.
    let open = || Ok(host.recipients.open_envelope(&record.envelope).unwrap());
    assert_eq!(Standing::of(&theirs, &record, open), Standing::Stays);
    // What deletes a provider, and what shreds: it is authentic, so its KEKs are the VM's.
    assert_eq!(proof_of(&host, &theirs, &record.envelope), Proof::Authentic);
    // None has decided it.
    let kept = stage.stores.keystore.envelope(ours.id).unwrap().unwrap();
    assert_eq!(kept.envelope, *ours);

    // Forged, it is none, and the keystore's follows.
    let mut forged = theirs.clone().into_envelope();
    forged.shared_with = vec![VmId::random()];
    let host = stage.host(&forged);
    assert!(
        adopt_foreign_envelopes(&host, |_| Ok(()))
            .unwrap()
            .rivals
            .is_empty()
    );
    assert_eq!(Standing::of(&forged, &record, open), Standing::GivesWay);
    assert_eq!(proof_of(&host, &forged, &record.envelope), Proof::Forged);
    let behind: BTreeSet<_> = stage
        .stores
        .host_store
        .needed_keks()
        .unwrap()
        .whole()
        .unwrap()
        .into_iter()
        .map(|needed| needed.envelope)
        .collect();
    assert_eq!(behind, BTreeSet::from([ours.id]));
}

#[test]
fn a_tpm_that_was_given_up_does_not_come_back_beside_the_new_one() {
    let stage = Stage::new();
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm: stage.record.envelope.vm,
        kind: ObjectKind::Vtpm,
    };
    let (old, _) = stage.recipients.seal_new(None, &binding).unwrap();
    let host = stage.host(&old);
    let keystore = &stage.stores.keystore;
    let comes_back = || {
        adopt_foreign_envelopes(&host, |_| Ok(())).unwrap();
        keystore.envelope(old.id).unwrap().is_some()
    };
    // One of another host may be that of the state which is still to come.
    assert!(comes_back());
    let record = keystore.envelope(old.id).unwrap().unwrap();
    let dropped = Dropped {
        said: Said::Elsewhere,
        records: std::slice::from_ref(&record),
        damaged: Vec::new(),
    };
    keep_aside(keystore.as_ref(), host.host_store, old.vm, "web01", dropped).unwrap();
    keystore.forget_envelope(&record).unwrap();
    assert!(!comes_back());
    // Whoever comes across it says so, and what leads out.
    let left_out = adopt_foreign_envelopes(&host, |_| Ok(())).unwrap().left_out;
    let domain = Domain::parse(&host.kept[0].xml).unwrap();
    let not_adopted = adopt(&host, &domain, Formats::WithMac).unwrap_err();
    for problem in [&left_out[0], &not_adopted] {
        assert!(problem.message.contains("was given up here"), "{problem}");
        assert!(
            problem.to_string().contains("virtseal vm seal web01"),
            "{problem}"
        );
    }
    let spare = stage.recipients.find("spare").unwrap();
    let needed = delete(&host, &spare, &[], Ok(()), None).unwrap_err();
    let words = [
        "1 objects of 1 VMs",
        "the XML of web01, of a vTPM that was given up",
    ];
    assert!(
        words.iter().all(|words| needed.message.contains(words)),
        "{needed}"
    );
    keystore.forget_envelope(&stage.record).unwrap();
    assert!(comes_back());
}
