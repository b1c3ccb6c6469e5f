//! What a name leads to: several addresses of which one answers, and a resolver that says nothing.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::super::fixture::{Fake, Fault, identity, settings};
use super::super::{Endpoint, ServerTrust};
use super::{KmipProvider, Wrapped};
use crate::host::own_process;
use crate::provider::{KeyProvider, ProviderStatus};
use crate::store::Stores;
use virtseal_testkit::servers::{Authority, free_port};

const HANGING: &str = "kms.example:5696";

fn at(endpoints: &[String], authority: &Authority) -> (KmipProvider, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let mut settings = settings(&[]);
    settings.endpoints = endpoints
        .iter()
        .map(|endpoint| endpoint.parse::<Endpoint>().unwrap())
        .collect();
    let provider = KmipProvider::create(&stores.providers(), &"kms".parse().unwrap(), settings).unwrap();
    provider.set_identity(&identity(authority, false)).unwrap();
    (provider, dir)
}

/// Runs `test`, which is the current one, where `hosts` is all that is known of names, and whoever is asked for others is silent.
fn with_names(hosts: &str, test: fn()) {
    if own_process::is_this() {
        return test();
    }
    let resolver = silent_resolver();
    let IpAddr::V4(address) = resolver.local_addr().unwrap().ip() else {
        panic!("it was bound to one");
    };
    own_process::start_with_files(&[
        ("/etc/hosts", hosts),
        ("/etc/nsswitch.conf", "hosts: files dns\n"),
        (
            "/etc/resolv.conf",
            &format!("nameserver {address}\noptions timeout:30 attempts:5\n"),
        ),
    ]);
}

/// It takes questions, and never reads them.
fn silent_resolver() -> UdpSocket {
    let own = std::process::id().to_be_bytes();
    (1..255)
        .find_map(|last| UdpSocket::bind((Ipv4Addr::new(127, own[2], own[3], last), 53)).ok())
        .expect("one of these is free, and the test runs as root")
}

#[test]
fn trust_with_a_hanging_resolver_ends_in_five_seconds() {
    with_names("127.0.0.1 localhost\n", || {
        let authority = Authority::new();
        let server = Fake::start(&authority);
        let (provider, _dir) = at(
            &[HANGING.to_owned(), format!("localhost:{}", server.port())],
            &authority,
        );
        let began = Instant::now();
        let shown = provider.presented();
        let took = began.elapsed();
        // It really hangs, or this test would show nothing.
        assert!(
            took > Duration::from_secs(2) && took < Duration::from_secs(5),
            "{took:?}"
        );
        let problem = shown[0].chain.as_ref().unwrap_err();
        assert!(problem.contains("the resolver does not answer"), "{problem}");
        assert!(shown[1].chain.is_ok());

        let began = Instant::now();
        provider.trust(ServerTrust::Ca(authority.pem())).unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(
            matches!(provider.status(), ProviderStatus::Degraded(_)),
            "{}",
            provider.status()
        );
        Wrapped::by(&provider).assert_opened_by(&provider);
    });
}

/// At each of the addresses of a name; the good one passes on to a server, the others take connections and say nothing.
struct Passage {
    listener: TcpListener,
    ended: Arc<AtomicBool>,
}

impl Passage {
    fn to(server: u16, at: SocketAddr) -> Self {
        let listener = TcpListener::bind(at).unwrap();
        let (accepting, ended) = (listener.try_clone().unwrap(), Arc::new(AtomicBool::new(false)));
        let its = Arc::clone(&ended);
        std::thread::spawn(move || {
            for client in accepting.incoming() {
                if its.load(Ordering::SeqCst) {
                    return;
                }
                let client = client.unwrap();
                let server = TcpStream::connect(("127.0.0.1", server)).unwrap();
                for (mut from, mut into) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server, client),
                ] {
                    std::thread::spawn(move || {
                        // Either side may go at any time.
                        let _ = io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        Self { listener, ended }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.listener.local_addr().unwrap());
    }
}

/// How many connections have come to one that says nothing.
fn taken(silent: &TcpListener) -> usize {
    let mut taken = 0;
    while let Ok(connection) = silent.accept() {
        // Open for as long as the process: the other side waits for its answer.
        std::mem::forget(connection);
        taken += 1;
    }
    taken
}

fn silent_at(address: SocketAddr) -> TcpListener {
    let silent = TcpListener::bind(address).unwrap();
    silent.set_nonblocking(true).unwrap();
    silent
}

#[test]
fn addresses_of_a_name_are_raced_and_the_good_one_is_remembered() {
    with_names(
        "127.0.0.1 localhost\n127.0.0.2 localhost\n::1 localhost\n",
        || {
            const CALLS: usize = 8;
            let authority = Authority::new();
            let server = Fake::start(&authority);
            // So each call needs a connection of its own.
            server.has(&[Fault::ClosesAfterEachAnswer]);
            let port = free_port().unwrap();
            let mut addresses: Vec<_> = ("localhost", port).to_socket_addrs().unwrap().collect();
            addresses.dedup();
            // Where the machine has no IPv6, that address fails at once.
            addresses.retain(|address| address.is_ipv4() || TcpListener::bind(address).is_ok());
            assert!(addresses.len() >= 2, "{addresses:?}");
            let (last, others) = addresses.split_last().unwrap();
            let mut silent: Vec<_> = others.iter().map(|address| silent_at(*address)).collect();
            let passage = Passage::to(server.port(), *last);

            let (provider, _dir) = at(&[format!("localhost:{port}")], &authority);
            provider.trust(ServerTrust::Ca(authority.pem())).unwrap();
            Wrapped::by(&provider).assert_opened_by(&provider);
            for silent in &silent {
                assert!(taken(silent) > 0, "{silent:?} was never tried");
            }
            for _ in 0..CALLS {
                Wrapped::by(&provider).assert_opened_by(&provider);
            }
            // Now and then the good one may need longer than its head start.
            for silent in &silent {
                let taken = taken(silent);
                assert!(taken < CALLS, "{silent:?}: {taken}");
            }
            // It goes, and another one is the good one.
            drop(passage);
            silent.remove(0);
            let _passage = Passage::to(server.port(), others[0]);
            Wrapped::by(&provider).assert_opened_by(&provider);
            assert_eq!(provider.status(), ProviderStatus::Ready);
        },
    );
}
