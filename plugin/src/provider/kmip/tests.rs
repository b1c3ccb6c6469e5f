//! What only a KMIP provider can show, against PyKMIP. The suite that all kinds share is in `conformance`.

mod cache;
mod faults;
mod jobs;
mod names;
mod others;
mod persisted;
pub(in crate::provider) mod trust;

use super::call::Call;
use super::fixture::{Kept, Kmip, secret, settings};
use super::*;
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, VmId};
use crate::provider::ScopeSetting;
use crate::provider::toolbox::kek_name::KekGeneration;
use crate::secret::Dek;
use crate::store::Stores;
use virtseal_testkit::servers::Relay;

/// A payload, wrapped under the KEK of its VM.
pub(super) struct Wrapped {
    pub(super) vm: VmId,
    pub(super) payload: Payload,
    pub(super) stanza: Stanza,
}

impl Wrapped {
    pub(super) fn by(provider: &KmipProvider) -> Self {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Disk,
        };
        let payload = Payload::bind(&Dek::random().unwrap(), &binding).unwrap();
        let kek = provider.create_kek(&KekScope::Vm(binding.vm)).unwrap();
        let stanza = provider.wrap(&kek, &payload).unwrap();
        Self {
            vm: binding.vm,
            payload,
            stanza,
        }
    }

    pub(super) fn assert_opened_by(&self, provider: &KmipProvider) {
        let opened = provider.unwrap_many(&[&self.stanza]).unwrap();
        assert_eq!(opened[0].expose(), self.payload.expose());
    }
}

#[test]
fn every_version_does_the_whole_job() {
    let kmip = Kmip::new();
    assert_eq!(
        kmip.provider().line().cluster.nodes()[0].version(),
        Some("2.0".parse().unwrap())
    );
    for version in ["1.1", "1.2", "1.3", "1.4", "2.0"] {
        let (provider, _dir) =
            kmip.another(|settings| settings.kmip_version = Some(version.parse().unwrap()));
        assert_eq!(provider.status(), ProviderStatus::Ready, "{version}");
        let wrapped = Wrapped::by(&provider);
        wrapped.assert_opened_by(&provider);
        let receipt = provider.destroy_kek(&wrapped.stanza.kek, wrapped.vm).unwrap();
        assert!(receipt.destroyed, "{version}: {}", receipt.observed);
    }
}

#[test]
fn version_that_the_server_lacks_is_named() {
    let kmip = Kmip::new();
    let (provider, _dir) = kmip.another(|settings| settings.kmip_version = Some("2.1".parse().unwrap()));
    let error = provider.create_kek(&KekScope::Provider).unwrap_err();
    assert!(chain(&error).contains("2.1"), "{error:?}");
}

#[test]
fn eight_disks_cost_one_round_trip() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|settings| *settings = super::fixture::settings(&[proxy.port()]));
    let wrapped: Vec<_> = (0..8).map(|_| Wrapped::by(&provider)).collect();
    let stanzas: Vec<_> = wrapped.iter().map(|one| &one.stanza).collect();
    let (before, connections) = (proxy.requests(), proxy.connections());
    let opened = provider.unwrap_many(&stanzas).unwrap();
    assert_eq!(proxy.requests() - before, 1);
    assert_eq!(proxy.connections(), connections);
    for (payload, one) in opened.iter().zip(&wrapped) {
        assert_eq!(payload.expose(), one.payload.expose());
    }
}

#[test]
fn state_at_the_server_decides() {
    const PRE_ACTIVE: u32 = 1;
    const ACTIVE: u32 = 2;
    const DEACTIVATED: u32 = 3;
    const COMPROMISED: u32 = 4;
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let wrapped = Wrapped::by(provider);
    let kek = &wrapped.stanza.kek;
    for (state, wraps, unwraps) in [
        (DEACTIVATED, false, true),
        (COMPROMISED, false, true),
        (PRE_ACTIVE, false, false),
        (ACTIVE, true, true),
    ] {
        kmip.server.set_state(kek, state);
        let wrap = provider.wrap(kek, &wrapped.payload);
        let unwrap = provider.unwrap_many(&[&wrapped.stanza]);
        assert_eq!((wrap.is_ok(), unwrap.is_ok()), (wraps, unwraps), "state {state}");
        if let Err(error) = wrap {
            assert!(matches!(&error, ProviderError::KekUnusable { kek: named, .. } if named == kek));
            assert!(chain(&error).contains("at the KMS"), "{error}");
        }
    }
}

#[test]
fn retired_key_is_replaced_for_what_comes() {
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let scope = KekScope::Vm(VmId::random());
    let old = provider.create_kek(&scope).unwrap();
    kmip.server.set_state(&old, 3);
    let new = provider.create_kek(&scope).unwrap();
    assert_ne!(new, old);
    assert_eq!(provider.create_kek(&scope).unwrap(), new);
}

#[test]
fn create_whose_answer_was_lost_leaves_no_orphan() {
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let (scope, access) = (KekScope::Vm(VmId::random()), provider.access().unwrap());
    let line = provider.line();
    let keys = provider.keys(&line, &access);
    let name = keys
        .book
        .plan(&scope, &keys.stem(&scope), KekGeneration(1))
        .unwrap();
    let create = Call::Create(keys.label(&scope, name));
    // Its identifier is in the answer that the caller never sees; the key stays Pre-Active.
    line.cluster
        .call(&access, vec![create], keys.deadline, |_| Ok(()))
        .unwrap();
    let kek = provider.create_kek(&scope).unwrap();
    assert_eq!(kmip.server.keys(), 1);
    let dek = Payload::bind(
        &Dek::random().unwrap(),
        &Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Nvram,
        },
    );
    provider.wrap(&kek, &dek.unwrap()).unwrap();
}

/// Seen before: after the clock of the KMS had gone back, each rotation made new KEKs and took up the old one again.
#[test]
fn age_is_not_what_the_server_says() {
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let scope = KekScope::Vm(VmId::random());
    let mut last = provider.create_kek(&scope).unwrap();
    for made in 2..5 {
        kmip.server.turn_clock_back(3600);
        let next = provider.rotate_kek(&scope, &last).unwrap();
        assert_eq!(kmip.server.keys(), made);
        assert_eq!(provider.create_kek(&scope).unwrap(), next);
        assert_eq!(provider.rotate_kek(&scope, &last).unwrap(), next);
        last = next;
    }
    assert_eq!(kmip.server.keys(), 4);
    let labels = kmip.server.labels();
    for generation in 1..5 {
        assert!(labels.contains(&format!("-g{generation}-")), "{labels}");
    }
}

/// A rotation whose Create came to nothing does not put the KEK in use out of use.
#[test]
fn a_generation_that_was_never_made_retires_nothing() {
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let scope = KekScope::Vm(VmId::random());
    let first = provider.create_kek(&scope).unwrap();
    let access = provider.access().unwrap();
    let line = provider.line();
    let keys = provider.keys(&line, &access);
    keys.book
        .plan(&scope, &keys.stem(&scope), KekGeneration(2))
        .unwrap();
    assert_eq!(provider.create_kek(&scope).unwrap(), first);
    let next = provider.rotate_kek(&scope, &first).unwrap();
    assert_eq!(provider.create_kek(&scope).unwrap(), next);
    assert!(kmip.server.labels().contains("-g3-"));
}

#[test]
fn a_kek_from_before_generations_goes_on_and_several_are_left_alone() {
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let access = provider.access().unwrap();
    let line = provider.line();
    let keys = provider.keys(&line, &access);
    let uncounted = |scope: &KekScope| {
        let label = keys.label(scope, keys.stem(scope));
        let calls = vec![Call::Create(label)];
        let made = line.cluster.call(&access, calls, keys.deadline, |outcomes| {
            Ok(super::answer::created(outcomes[0].as_ref().unwrap()).unwrap())
        });
        made.unwrap()
    };
    let scope = KekScope::Vm(VmId::random());
    let old = uncounted(&scope);
    assert_eq!(provider.create_kek(&scope).unwrap(), old);
    let next = provider.rotate_kek(&scope, &old).unwrap();
    assert_ne!(next, old);
    assert_eq!(provider.create_kek(&scope).unwrap(), next);
    let scope = KekScope::Vm(VmId::random());
    let several = [uncounted(&scope), uncounted(&scope)];
    let made = provider.create_kek(&scope).unwrap();
    assert!(!several.contains(&made));
}

#[test]
fn a_name_is_never_used_twice() {
    let kmip = Kmip::new();
    let (provider, vm) = (kmip.provider(), VmId::random());
    let mut names = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let kek = provider.create_kek(&KekScope::Vm(vm)).unwrap();
        names.extend(
            kmip.server
                .labels()
                .lines()
                .map(str::to_owned)
                .filter(|label| label.contains("-g")),
        );
        assert!(provider.destroy_kek(&kek, vm).unwrap().destroyed);
    }
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn keys_say_whose_they_are() {
    let kmip = Kmip::new();
    let vm = VmId::random();
    kmip.provider().create_kek(&KekScope::Vm(vm)).unwrap();
    let labels = kmip.server.labels();
    for needle in [
        format!("virtseal-vm-{vm}-{}", kmip.provider().id()),
        format!("vm={vm}; host={}; purpose=virtseal-kek", host_name()),
    ] {
        assert!(labels.contains(&needle), "{labels}");
    }
}

#[test]
fn one_key_for_all_where_the_admin_says_so() {
    let kmip = Kmip::with(false, |settings| settings.kek_scope = ScopeSetting::Provider);
    let keks = [0, 1].map(|_| kmip.provider().create_kek(&KekScope::Vm(VmId::random())).unwrap());
    assert_eq!(keks[0], keks[1]);
}

#[test]
fn server_that_encrypts_must_say_so() {
    let kmip = Kmip::new();
    let (provider, _dir) = kmip.another(|settings| {
        settings.mode = Mode::Server;
        settings.kmip_version = Some("1.2".parse().unwrap());
    });
    assert!(matches!(provider.status(), ProviderStatus::Degraded(_)));
    let wrapped = Wrapped::by(kmip.provider());
    let error = provider.wrap(&wrapped.stanza.kek, &wrapped.payload).unwrap_err();
    assert!(chain(&error).contains("--mode local"), "{error}");
}

#[test]
fn key_never_leaves_a_server_that_encrypts() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|settings| {
        settings.mode = Mode::Server;
        settings.endpoints = super::fixture::settings(&[proxy.port()]).endpoints;
    });
    let wrapped = Wrapped::by(&provider);
    assert_eq!(wrapped.stanza.mechanism, "KMIP-A256GCM");
    wrapped.assert_opened_by(&provider);
    // Switching the mode leaves nothing behind closed doors.
    let local = Wrapped::by(kmip.provider());
    let mut foreign = local.stanza.clone();
    foreign.mechanism = wrapped.stanza.mechanism.clone();
    assert!(matches!(
        kmip.provider().unwrap_many(&[&foreign]),
        Err(ProviderError::Tampered)
    ));
}

#[test]
fn provider_with_the_same_id_opens_what_another_host_sealed() {
    let here = Kmip::new();
    let wrapped = Wrapped::by(here.provider());
    let id = Some(here.provider().id());
    let (there, _dir) = here.another(|settings| settings.id = id);
    wrapped.assert_opened_by(&there);
    let (stranger, _dir) = here.another(|_| {});
    let refused = stranger.unwrap_many(&[&wrapped.stanza]);
    assert!(matches!(refused, Err(ProviderError::Tampered)));
}

#[test]
fn settings_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let create = |change: &dyn Fn(&mut KmipSettings)| {
        let mut settings = settings(&[1]);
        change(&mut settings);
        KmipProvider::create(&stores.providers(), &"kms".parse().unwrap(), settings).err()
    };
    assert!(matches!(
        create(&|settings| settings.endpoints.clear()),
        Some(KmipProviderError::Settings(SettingsError::Endpoints))
    ));
    assert!(matches!(
        create(&|settings| settings.timeout_ms = 0),
        Some(KmipProviderError::Settings(SettingsError::Timeout))
    ));
    assert!(stores.keystore.providers().unwrap().whole().unwrap().is_empty());
    for json in [
        r#"{"endpoints":["a"],"pin":"x"}"#,
        r#"{"endpoints":["https://a"]}"#,
        r#"{"endpoints":["a"],"kmip_version":"1.0"}"#,
    ] {
        assert!(serde_json::from_str::<KmipSettings>(json).is_err(), "{json}");
    }
    let plain: KmipSettings = serde_json::from_str(r#"{"endpoints":["a"]}"#).unwrap();
    assert_eq!((plain.mode, plain.kek_scope), (Mode::Local, ScopeSetting::Vm));
}

#[test]
fn key_in_the_clear_on_disk_needs_no_unlock_after_a_restart() {
    let mut kmip = Kmip::with(false, |_| {});
    let wrapped = Wrapped::by(kmip.provider());
    kmip.restart();
    wrapped.assert_opened_by(kmip.provider());
    kmip.provider().lock();
    assert!(matches!(
        kmip.provider().unwrap_many(&[&wrapped.stanza]),
        Err(ProviderError::Locked)
    ));
    kmip.provider().unlock(&secret("anything")).unwrap();
    wrapped.assert_opened_by(kmip.provider());
}
