//! Servers that die, restart, stall or disappear.

use std::time::{Duration, Instant};

use super::super::fixture::{Kmip, settings};
use super::{KmipProvider, Wrapped};
use crate::provider::{KekScope, KeyProvider, ProviderError, ProviderStatus};
use virtseal_testkit::servers::{Manner, Relay, free_port};

#[test]
fn killed_server_is_named_and_a_restarted_one_works_again() {
    let mut kmip = Kmip::with(false, |_| {});
    let wrapped = Wrapped::by(kmip.provider());
    // Only what must fail gets so little time: a busy machine may need more for what works.
    let (hasty, _dir) = kmip.another(|settings| {
        settings.timeout_ms = 900;
        settings.id = Some(wrapped.stanza.provider);
    });
    kmip.server.kill();
    let error = hasty.unwrap_many(&[&wrapped.stanza]).unwrap_err();
    let ProviderError::Unreachable(why) = &error else {
        panic!("{error:?}");
    };
    assert!(why.contains("127.0.0.1"), "{why}");
    assert!(hasty.last_answer().is_some());
    assert!(matches!(hasty.status(), ProviderStatus::Unreachable(_)));
    kmip.server.run().unwrap();
    for provider in [&hasty, kmip.provider()] {
        provider.probe();
        assert_eq!(provider.status(), ProviderStatus::Ready);
    }
    wrapped.assert_opened_by(kmip.provider());
    Wrapped::by(kmip.provider()).assert_opened_by(kmip.provider());
}

#[test]
fn outage_shorter_than_the_retries_costs_time_only() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|set| set.endpoints = settings(&[proxy.port()]).endpoints);
    let wrapped = Wrapped::by(&provider);
    let before = proxy.connections();
    proxy.be(Manner::Refusing).unwrap();
    std::thread::scope(|scope| {
        let mending = scope.spawn(|| {
            // Once it was turned away.
            let began = Instant::now();
            while proxy.connections() == before {
                assert!(began.elapsed() < Duration::from_secs(60), "nobody asks");
                std::thread::sleep(Duration::from_millis(1));
            }
            proxy.be(Manner::Forward).unwrap();
        });
        wrapped.assert_opened_by(&provider);
        mending.join().unwrap();
    });
    assert!(proxy.connections() > before + 1, "it was tried again");
}

#[test]
fn cut_connections_are_replaced_at_once() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|set| set.endpoints = settings(&[proxy.port()]).endpoints);
    let wrapped = Wrapped::by(&provider);
    for _ in 0..3 {
        proxy.cut();
        let before = proxy.connections();
        wrapped.assert_opened_by(&provider);
        assert_eq!(proxy.connections(), before + 1);
        assert_eq!(provider.status(), ProviderStatus::Ready);
    }
}

#[test]
fn connection_that_a_firewall_forgot_does_not_cost_the_call() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|set| {
        set.endpoints = settings(&[proxy.port()]).endpoints;
        set.timeout_ms = 6_000;
    });
    let wrapped = Wrapped::by(&provider);
    proxy.forget();
    let before = proxy.connections();
    wrapped.assert_opened_by(&provider);
    assert_eq!(proxy.connections(), before + 1);
    assert_eq!(provider.status(), ProviderStatus::Ready);
}

#[test]
fn stalled_server_ends_at_the_timeout() {
    let kmip = Kmip::new();
    let proxy = Relay::to(kmip.server.port()).unwrap();
    let (provider, _dir) = kmip.another(|set| {
        set.endpoints = settings(&[proxy.port()]).endpoints;
        set.timeout_ms = 700;
    });
    proxy.be(Manner::Stalled).unwrap();
    let began = Instant::now();
    let error = provider.create_kek(&KekScope::Provider).unwrap_err();
    assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(600) && took < Duration::from_secs(10),
        "{took:?}"
    );
}

#[test]
fn dead_first_node_costs_its_patience_once() {
    let kmip = Kmip::new();
    let first = Relay::to(kmip.server.port()).unwrap();
    let ports = [first.port(), kmip.server.port()];
    let (provider, _dir) = kmip.another(|set| set.endpoints = settings(&ports).endpoints);
    let wrapped = Wrapped::by(&provider);
    // A busy machine may have made it look slow.
    recovered(&provider);
    first.be(Manner::Stalled).unwrap();
    let asked = first.requests();
    let began = Instant::now();
    wrapped.assert_opened_by(&provider);
    let with_dead_node = began.elapsed();
    assert!(first.requests() > asked, "the first node was asked first");
    assert!(with_dead_node >= Duration::from_millis(250));
    assert_eq!(
        provider.line().cluster.order(),
        [1, 0],
        "the second start does not wait for it"
    );
    let began = Instant::now();
    wrapped.assert_opened_by(&provider);
    println!("first start {with_dead_node:?}, second {:?}", began.elapsed());
    first.be(Manner::Forward).unwrap();
    recovered(&provider);
    let asked = first.requests();
    wrapped.assert_opened_by(&provider);
    assert!(first.requests() > asked, "it has its place again");
}

/// Until the first node is the one that is asked first.
fn recovered(provider: &KmipProvider) {
    let began = Instant::now();
    while provider.line().cluster.order() != [0, 1] {
        assert!(began.elapsed() < Duration::from_secs(120), "it never recovers");
        provider.probe();
    }
}

#[test]
fn dead_nodes_are_counted_and_the_living_one_serves() {
    let kmip = Kmip::new();
    let ports = [free_port().unwrap(), free_port().unwrap(), kmip.server.port()];
    let (provider, _dir) = kmip.another(|set| set.endpoints = settings(&ports).endpoints);
    Wrapped::by(&provider).assert_opened_by(&provider);
    let ProviderStatus::Degraded(why) = provider.status() else {
        panic!("{:?}", provider.status());
    };
    assert!(why.starts_with("2 of 3 nodes"), "{why}");
    let (provider, _dir) = kmip.another(|set| set.endpoints = settings(&ports[..2]).endpoints);
    let ProviderStatus::Unreachable(why) = provider.status() else {
        panic!("{:?}", provider.status());
    };
    assert!(why.starts_with("2 of 2 nodes: connection refused"), "{why}");
}

#[test]
fn server_that_speaks_something_else_is_an_error() {
    let kmip = Kmip::new();
    let (provider, _dir) = kmip.another(|set| {
        let port = talkative();
        set.endpoints = settings(&[port]).endpoints;
        set.timeout_ms = 3_000;
    });
    let ProviderStatus::Unreachable(why) = provider.status() else {
        panic!("{:?}", provider.status());
    };
    assert!(why.contains("TLS"), "{why}");
}

/// A server that greets like SSH whoever connects.
fn talkative() -> u16 {
    use std::io::Write;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().take(32).flatten() {
            // A client that has gone by now has seen enough.
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
        }
    });
    port
}
