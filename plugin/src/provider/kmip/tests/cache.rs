//! What still opens while the KMS does not answer, and what does not.

use std::time::{Duration, Instant};

use super::super::fixture::{Kept, Kmip, identity, secret, settings};
use super::{KmipProvider, Wrapped};
use crate::model::cache_policy::CachePolicy;
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem};
use crate::provider::kmip::{KmipProviderError, KmipSettings, Mode, ServerTrust, SettingsError};
use crate::provider::{KekScope, KeyProvider, ProviderError};
use crate::recipients::Recipients;
use crate::store::Stores;
use virtseal_testkit::servers::{Authority, Manner, Relay};

const COMPROMISED: u32 = 4;
const PRE_ACTIVE: u32 = 1;

/// As without any word on a cache.
fn by_default(settings: &mut KmipSettings) {
    settings.cache = None;
}

/// Ends the server, and lets the provider learn of it: the next call does not try several times.
fn kill(kmip: &mut Kmip) {
    kmip.server.kill();
    kmip.provider().probe();
}

fn bring_back(kmip: &mut Kmip) {
    kmip.server.run().unwrap();
    kmip.provider().probe();
}

fn is_unreachable(provider: &KmipProvider, wrapped: &Wrapped) -> bool {
    matches!(
        provider.unwrap_many(&[&wrapped.stanza]),
        Err(ProviderError::Unreachable(_))
    )
}

fn kept(provider: &KmipProvider) -> usize {
    provider.cache().unwrap().len()
}

#[test]
fn what_was_fetched_opens_until_it_is_locked_or_restarted() {
    let mut kmip = Kmip::with(false, by_default);
    let (opened, sealed) = (Wrapped::by(kmip.provider()), Wrapped::by(kmip.provider()));
    assert_eq!(kept(kmip.provider()), 0, "a wrap keeps nothing");
    opened.assert_opened_by(kmip.provider());
    assert_eq!(kept(kmip.provider()), 1);

    kill(&mut kmip);
    opened.assert_opened_by(kmip.provider());
    assert!(is_unreachable(kmip.provider(), &sealed));
    let both = kmip.provider().unwrap_many(&[&opened.stanza, &sealed.stanza]);
    assert!(
        matches!(both, Err(ProviderError::Unreachable(_))),
        "all or nothing"
    );
    let wrap = kmip.provider().wrap(&opened.stanza.kek, &opened.payload);
    assert!(
        matches!(wrap, Err(ProviderError::Unreachable(_))),
        "it wraps nothing"
    );

    kmip.provider().lock();
    assert_eq!(kept(kmip.provider()), 0);
    kmip.provider().unlock(&secret("anything")).unwrap();
    assert!(is_unreachable(kmip.provider(), &opened));

    bring_back(&mut kmip);
    opened.assert_opened_by(kmip.provider());
    kill(&mut kmip);
    opened.assert_opened_by(kmip.provider());
    kmip.restart();
    kmip.provider().probe();
    assert!(is_unreachable(kmip.provider(), &opened));
}

#[test]
fn what_the_kms_has_said_counts_when_it_is_gone() {
    let mut kmip = Kmip::with(false, by_default);
    let (refused, compromised) = (Wrapped::by(kmip.provider()), Wrapped::by(kmip.provider()));
    for wrapped in [&refused, &compromised] {
        wrapped.assert_opened_by(kmip.provider());
    }
    kmip.server.set_state(&refused.stanza.kek, PRE_ACTIVE);
    kmip.server.set_state(&compromised.stanza.kek, COMPROMISED);
    let asked = kmip.provider().unwrap_many(&[&refused.stanza]);
    assert!(
        matches!(asked, Err(ProviderError::KekUnusable { .. })),
        "it answers, so it is asked"
    );
    compromised.assert_opened_by(kmip.provider());
    kill(&mut kmip);
    assert!(is_unreachable(kmip.provider(), &refused));
    compromised.assert_opened_by(kmip.provider());
    let wrap = kmip
        .provider()
        .wrap(&compromised.stanza.kek, &compromised.payload);
    assert!(wrap.is_err());
}

#[test]
fn kms_that_turns_this_host_away_ends_the_cache() {
    let mut kmip = Kmip::with(false, by_default);
    let wrapped = Wrapped::by(kmip.provider());
    wrapped.assert_opened_by(kmip.provider());
    kmip.server.kill();
    kmip.server.accept(&Authority::new()).unwrap();
    bring_back(&mut kmip);
    let asked = kmip.provider().unwrap_many(&[&wrapped.stanza]);
    assert!(matches!(asked, Err(ProviderError::RefusesUs(_))), "{asked:?}");
    assert_eq!(kept(kmip.provider()), 0);
    // Whoever cuts the network then takes nothing of that back.
    kill(&mut kmip);
    let asked = kmip.provider().unwrap_many(&[&wrapped.stanza]);
    assert!(matches!(asked, Err(ProviderError::RefusesUs(_))), "{asked:?}");
}

#[test]
fn impostor_gets_nothing_out_of_the_cache() {
    let mut kmip = Kmip::with(false, by_default);
    let wrapped = Wrapped::by(kmip.provider());
    wrapped.assert_opened_by(kmip.provider());
    kmip.server.kill();
    kmip.server.certify(&Authority::new(), 90).unwrap();
    bring_back(&mut kmip);
    let asked = kmip.provider().unwrap_many(&[&wrapped.stanza]);
    assert!(matches!(asked, Err(ProviderError::NotTrusted(_))), "{asked:?}");
}

#[test]
fn silent_kms_costs_a_start_two_seconds() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|set| {
        set.endpoints = settings(&[proxy.port()]).endpoints;
        by_default(set);
    });
    let wrapped = Wrapped::by(&provider);
    wrapped.assert_opened_by(&provider);
    proxy.be(Manner::Stalled).unwrap();
    let began = Instant::now();
    wrapped.assert_opened_by(&provider);
    let took = began.elapsed();
    // Its own timeout is 20 s.
    assert!(
        took >= Duration::from_millis(1900) && took < Duration::from_secs(15),
        "{took:?}"
    );
}

#[test]
fn policy_is_kept_and_can_be_changed() {
    let mut kmip = Kmip::with(false, |set| set.cache = Some("until-lock".parse().unwrap()));
    let stores = kmip.stores();
    let policy = |kmip: &Kmip| kmip.provider().cache().unwrap().policy();
    assert_eq!(policy(&kmip), CachePolicy::UntilLock);
    let wrapped = Wrapped::by(kmip.provider());
    wrapped.assert_opened_by(kmip.provider());
    kmip.provider().set_cache(CachePolicy::None, None).unwrap();
    assert_eq!(kept(kmip.provider()), 0);
    wrapped.assert_opened_by(kmip.provider());
    assert_eq!(kept(kmip.provider()), 0);
    kill(&mut kmip);
    assert!(is_unreachable(kmip.provider(), &wrapped));
    drop(stores);
    kmip.restart();
    assert_eq!(policy(&kmip), CachePolicy::None);
    let (standard, _dir) = kmip.another(by_default);
    assert_eq!(standard.cache().unwrap().policy().to_string(), "24h");
}

#[test]
fn server_mode_has_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let create = |name: &str, cache: Option<&str>| {
        let mut settings = settings(&[1]);
        settings.mode = Mode::Server;
        settings.cache = cache.map(|policy| policy.parse().unwrap());
        KmipProvider::create(&stores.providers(), &name.parse().unwrap(), settings)
    };
    assert!(matches!(
        create("a", Some("4h")),
        Err(KmipProviderError::Settings(SettingsError::Cache(_)))
    ));
    assert!(stores.keystore.providers().unwrap().whole().unwrap().is_empty());
    let provider = create("b", None).unwrap();
    assert!(provider.cache().is_none());
    let error = provider.set_cache(CachePolicy::UntilLock, None).unwrap_err();
    assert!(error.to_string().contains("never leave its server"), "{error}");
    create("c", Some("none")).unwrap();
}

/// As the daemon does it, with what it tells the user.
#[test]
fn new_seal_without_its_kms_fails_and_leaves_nothing() {
    let mut kmip = Kmip::with(false, by_default);
    let (dir, vm) = (tempfile::tempdir().unwrap(), VmId::random());
    let stores = Stores::open(dir.path()).unwrap();
    let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
    let mut cached = settings(&[kmip.server.port()]);
    by_default(&mut cached);
    let provider = recipients
        .add_by(|table| KmipProvider::create(table, &"kms".parse().unwrap(), cached))
        .unwrap();
    provider.set_identity(&identity(&kmip.authority, false)).unwrap();
    provider.trust(ServerTrust::Ca(kmip.authority.pem())).unwrap();
    let binding = |kind| Binding {
        envelope: EnvelopeId::random(),
        vm,
        kind,
    };
    let (envelope, dek) = recipients.seal_new(None, &binding(ObjectKind::Disk)).unwrap();
    let keys = kmip.server.keys();

    kmip.server.kill();
    provider.probe();
    let failure = Problem::from(
        recipients
            .seal_new(None, &binding(ObjectKind::Nvram))
            .unwrap_err(),
    );
    assert_eq!(failure.code, Code::Unreachable);
    assert!(
        failure
            .to_string()
            .starts_with("provider 'kms' unreachable (127.0.0.1:"),
        "{failure}"
    );
    // The check of the first seal has fetched the VM's key, so that one opens.
    assert_eq!(
        recipients.open_envelope(&envelope).unwrap().expose(),
        dek.expose()
    );
    provider.lock();
    provider.unlock(&secret("anything")).unwrap();
    let error = recipients.open_envelope(&envelope).unwrap_err();
    let last = crate::host::local_time::time_of_day(provider.last_answer().unwrap());
    let (reasons, end) = (
        error.reasons(),
        format!("connection refused), last answer {last}"),
    );
    assert!(
        reasons.starts_with("provider 'kms' unreachable (") && reasons.ends_with(&end),
        "{reasons}"
    );

    kmip.server.run().unwrap();
    assert_eq!(kmip.server.keys(), keys);
    assert!(recipients.open_envelope(&envelope).is_ok());
    let report = recipients.report(&recipients.find("kms").unwrap());
    assert!(report.last_answer.is_some());
    assert!(
        recipients
            .find("kms")
            .unwrap()
            .of_kind::<KmipProvider>()
            .is_some()
    );
    provider.create_kek(&KekScope::Vm(vm)).unwrap();
    assert_eq!(kmip.server.keys(), keys, "no key was left half-made");
}
