//! Other makers' servers, and clusters whose nodes do not agree: which "no" counts, and what is believed.

use std::time::{Duration, Instant};

use super::super::fixture::{Fake, Fault, identity, settings};
use super::{KmipProvider, Wrapped};
use crate::model::envelope::VmId;
use crate::model::problem::Code;
use crate::provider::kind::Kind;
use crate::provider::kmip::ServerTrust;
use crate::provider::toolbox::address;
use crate::provider::{ErrorClass, KekScope, KeyProvider, ProviderError, ProviderStatus};
use crate::store::Stores;
use virtseal_testkit::servers::{Authority, Manner, Relay, free_port};

const GENERAL_FAILURE: u32 = 0x100;
const NOT_FOUND: u32 = 0x1;

/// A host that trusts the servers at these ports, and caches keys.
fn at(authority: &Authority, ports: &[u16]) -> (KmipProvider, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let mut settings = settings(ports);
    settings.cache = None;
    settings.timeout_ms = 8_000;
    let provider = KmipProvider::create(&stores.providers(), &"kms".parse().unwrap(), settings).unwrap();
    provider.set_identity(&identity(authority, false)).unwrap();
    provider.trust(ServerTrust::Ca(authority.pem())).unwrap();
    (provider, dir)
}

fn cluster() -> (Authority, Fake, Fake) {
    let authority = Authority::new();
    let first = Fake::start(&authority);
    let second = first.clone_of(&authority);
    (authority, first, second)
}

fn class(provider: &KmipProvider, wrapped: &Wrapped) -> ErrorClass {
    provider.unwrap_many(&[&wrapped.stanza]).unwrap_err().class()
}

/// Seen before: VM C got the KEK of VM B, and a shred of B lost C.
#[test]
fn a_server_that_ignores_the_filter_gives_no_vm_the_kek_of_another() {
    let authority = Authority::new();
    let server = Fake::start(&authority);
    server.has(&[Fault::IgnoresTheFilter]);
    let (provider, _dir) = at(&authority, &[server.port()]);
    let vms: Vec<_> = (0..3).map(|_| Wrapped::by(&provider)).collect();
    assert_eq!(server.keys(), 3);
    assert!(
        provider
            .destroy_kek(&vms[1].stanza.kek, vms[1].vm)
            .unwrap()
            .destroyed
    );
    for other in [&vms[0], &vms[2]] {
        other.assert_opened_by(&provider);
        assert!(
            !provider
                .destroy_kek(&other.stanza.kek, vms[1].vm)
                .unwrap()
                .destroyed
        );
    }
    // Nor does one that answers a Create with what it had.
    server.has(&[Fault::CreatesAnOldKey]);
    let error = provider.create_kek(&KekScope::Vm(VmId::random())).unwrap_err();
    assert!(matches!(error, ProviderError::BesideTheQuestion(_)), "{error:?}");
}

#[test]
fn locate_asks_for_one_name_in_pages() {
    let authority = Authority::new();
    let server = Fake::start(&authority);
    let (provider, _dir) = at(&authority, &[server.port()]);
    let vm = VmId::random();
    let kek = provider.create_kek(&KekScope::Vm(vm)).unwrap();
    assert_eq!(provider.create_kek(&KekScope::Vm(vm)).unwrap(), kek);
    let located = server.located();
    assert!(!located.is_empty());
    for (name, most, offset) in located {
        assert_eq!(
            (name, most, offset),
            (format!("virtseal-vm-{vm}-{}", provider.id()), Some(32), Some(0))
        );
    }
}

#[test]
fn one_lagging_node_s_not_found_counts_for_nothing() {
    let (authority, first, second) = cluster();
    let (provider, _dir) = at(&authority, &[first.port(), second.port()]);
    let wrapped = Wrapped::by(&provider);
    wrapped.assert_opened_by(&provider);
    for reason in [NOT_FOUND, GENERAL_FAILURE, 0xC, 0x43] {
        first.has(&[Fault::Refuses(reason)]);
        wrapped.assert_opened_by(&provider);
        assert_eq!(provider.cache().unwrap().len(), 1, "{reason:#x}");
    }
    // Both say so: then it is.
    second.has(&[Fault::Refuses(NOT_FOUND)]);
    first.has(&[Fault::Refuses(NOT_FOUND)]);
    let error = provider.unwrap_many(&[&wrapped.stanza]).unwrap_err();
    assert!(matches!(error, ProviderError::UnknownKek(_)), "{error:?}");
    assert_eq!(provider.cache().unwrap().len(), 0);
}

#[test]
fn trouble_of_the_servers_opens_from_the_cache_and_is_shown() {
    let (authority, first, second) = cluster();
    let (provider, _dir) = at(&authority, &[first.port(), second.port()]);
    let (opened, other) = (Wrapped::by(&provider), Wrapped::by(&provider));
    opened.assert_opened_by(&provider);
    // General Failure, Internal Server Error, Server Limit Exceeded, none at all, and a maker's own.
    for reason in [GENERAL_FAILURE, 0x2A, 0x3A, 0, 0x8000_0042] {
        first.has(&[Fault::Refuses(reason)]);
        second.has(&[Fault::Refuses(NOT_FOUND)]);
        opened.assert_opened_by(&provider);
        let error = provider.unwrap_many(&[&other.stanza]).unwrap_err();
        assert!(matches!(error, ProviderError::Trouble(_)), "{error:?}");
        assert_eq!(error.advice("kms", Kind::named("kmip")).0, Code::Unreachable);
        assert!(
            matches!(provider.status(), ProviderStatus::Degraded(_)),
            "{}",
            provider.status()
        );
    }
    first.has(&[]);
    opened.assert_opened_by(&provider);
}

#[test]
fn an_answer_beside_the_question_neither_empties_the_cache_nor_opens_it() {
    let authority = Authority::new();
    let server = Fake::start(&authority);
    let (provider, _dir) = at(&authority, &[server.port()]);
    let wrapped = Wrapped::by(&provider);
    wrapped.assert_opened_by(&provider);
    for fault in [Fault::HidesTheState, Fault::MixesUp("fake-9")] {
        server.has(&[fault]);
        let error = provider.unwrap_many(&[&wrapped.stanza]).unwrap_err();
        assert!(matches!(error, ProviderError::BesideTheQuestion(_)), "{error:?}");
        assert_eq!(provider.cache().unwrap().len(), 1);
        server.has(&[]);
        wrapped.assert_opened_by(&provider);
    }
}

/// TLS 1.3: for the client the handshake has ended before the server has judged its certificate.
#[test]
fn a_host_that_is_turned_away_opens_nothing_from_the_cache() {
    let (authority, first, second) = cluster();
    let (provider, _dir) = at(&authority, &[first.port(), second.port()]);
    let wrapped = Wrapped::by(&provider);
    wrapped.assert_opened_by(&provider);
    first.has(&[Fault::TurnsAway]);
    wrapped.assert_opened_by(&provider);
    second.has(&[Fault::TurnsAway]);
    let error = provider.unwrap_many(&[&wrapped.stanza]).unwrap_err();
    assert!(matches!(error, ProviderError::TurnedAway(_)), "{error:?}");
    let (code, next) = error.advice("kms", Kind::named("kmip"));
    assert_eq!((code, code as i64), (Code::NotTrusted, 5));
    assert!(next.unwrap().to_string().contains("provider identity kms"));
    assert!(
        matches!(provider.status(), ProviderStatus::NotTrusted(_)),
        "{}",
        provider.status()
    );
    // Trouble of the other node, or its end, does not make it welcome again.
    second.has(&[Fault::Refuses(GENERAL_FAILURE)]);
    assert_eq!(class(&provider, &wrapped), ErrorClass::Client);
    drop((first, second));
    assert_eq!(class(&provider, &wrapped), ErrorClass::Client);
    assert_eq!(provider.cache().unwrap().len(), 1);
}

#[test]
fn a_server_that_grants_no_queries_is_tried_in_each_version() {
    let authority = Authority::new();
    let server = Fake::start(&authority);
    server.has(&[Fault::GrantsNoQueries]);
    let (provider, _dir) = at(&authority, &[server.port()]);
    assert_eq!(provider.status(), ProviderStatus::Ready);
    Wrapped::by(&provider).assert_opened_by(&provider);
    assert_eq!(
        provider.line().cluster.nodes()[0].version().unwrap().to_string(),
        "1.4"
    );
    // So is one that closes the connection each time.
    server.has(&[Fault::GrantsNoQueries, Fault::ClosesAfterEachAnswer]);
    let (provider, _dir) = at(&authority, &[server.port()]);
    Wrapped::by(&provider).assert_opened_by(&provider);
}

#[test]
fn a_server_that_closes_after_each_answer_does_the_whole_job() {
    let authority = Authority::new();
    let server = Fake::start(&authority);
    server.has(&[Fault::ClosesAfterEachAnswer]);
    let (provider, _dir) = at(&authority, &[server.port()]);
    for _ in 0..3 {
        let wrapped = Wrapped::by(&provider);
        wrapped.assert_opened_by(&provider);
        assert!(
            provider
                .destroy_kek(&wrapped.stanza.kek, wrapped.vm)
                .unwrap()
                .destroyed
        );
    }
    assert_eq!((server.keys(), server.creates()), (3, 3));
}

#[test]
fn a_create_that_a_clone_refuses_goes_to_the_next_node() {
    let (authority, first, second) = cluster();
    let (provider, _dir) = at(&authority, &[first.port(), second.port()]);
    // Permission Denied, Operation Not Supported, General Failure.
    for reason in [0xC, 0x5, GENERAL_FAILURE] {
        first.has(&[Fault::RefusesCreate(reason)]);
        Wrapped::by(&provider).assert_opened_by(&provider);
    }
    assert_eq!(second.creates(), 3);
    // Of nodes that are not there, nobody waits.
    let (provider, _dir) = at(&authority, &[free_port().unwrap(), second.port()]);
    Wrapped::by(&provider).assert_opened_by(&provider);
}

#[test]
fn a_slow_first_node_does_not_block_a_create() {
    let (authority, first, second) = cluster();
    let proxy = Relay::to(first.port()).unwrap();
    let (provider, _dir) = at(&authority, &[proxy.port(), second.port()]);
    proxy.be(Manner::Stalled).unwrap();
    let began = Instant::now();
    Wrapped::by(&provider).assert_opened_by(&provider);
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert_eq!(second.creates(), 1);
}

#[test]
fn an_unknown_name_server_s_silence_ends_in_time() {
    let began = Instant::now();
    let error = address::of("kms.invalid", 5696, None, began + Duration::from_secs(2)).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5), "{error}");
    // What answered there before does without.
    let good = "127.0.0.1:1".parse().unwrap();
    let found = address::of("kms.invalid", 5696, Some(good), began + Duration::from_secs(9)).unwrap();
    assert_eq!(found, [good]);
}
