//! The addresses of a server: found within a deadline, and raced, for one of them may swallow what is sent.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::race::{Raced, race};
use super::tls::TlsFailure;
use crate::model::deadlines::provider::{HEAD_START, RESOLVER};

/// More of them are of no use.
const MAX_ADDRESSES: usize = 8;

/// The addresses of `host`, `good` first: that one alone where the resolver does not say in time. Who answers there must
/// show the trusted certificate all the same.
pub(crate) fn of(
    host: &str,
    port: u16,
    good: Option<SocketAddr>,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, TlsFailure> {
    let left = deadline.saturating_duration_since(Instant::now());
    let patience = match good {
        Some(_) => RESOLVER.min(left / 2),
        None => left,
    };
    let mut found = match (resolve(host, port, patience), good) {
        (Ok(found), _) => found,
        (Err(_), Some(good)) => vec![good],
        (Err(why), None) => return Err(TlsFailure::Io(io::ErrorKind::HostUnreachable, why)),
    };
    found.sort_by_key(|address| Some(*address) != good);
    found.dedup();
    found.truncate(MAX_ADDRESSES);
    match found.is_empty() {
        true => Err(TlsFailure::Io(
            io::ErrorKind::HostUnreachable,
            format!("'{host}' has no address"),
        )),
        false => Ok(found),
    }
}

/// On a thread of its own where it may hang: nothing ends a resolver that waits for its servers.
fn resolve(host: &str, port: u16, patience: Duration) -> Result<Vec<SocketAddr>, String> {
    if let Ok(address) = host.parse() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (sender, answer) = channel();
    let name = host.to_owned();
    let look = move || {
        let found = (name.as_str(), port).to_socket_addrs();
        // Nobody waits any more when this fails.
        let _ = sender.send(found.map(Iterator::collect));
    };
    let started = std::thread::Builder::new()
        .name("resolver".to_owned())
        .spawn(look);
    started.map_err(|error| format!("can't start a thread: {error}"))?;
    match answer.recv_timeout(patience) {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(format!("can't resolve '{host}': {error}")),
        Err(_) => Err(format!("can't resolve '{host}': the resolver does not answer")),
    }
}

/// What `connect` makes of the first of `addresses` that does: each one is tried as soon as the one before has failed, or has
/// been silent for [`HEAD_START`].
///
/// # Errors
/// What is wrong with the one that an admin has to look at first.
pub(crate) fn connect<T: Send + 'static>(
    addresses: Vec<SocketAddr>,
    deadline: Instant,
    connect: impl Fn(SocketAddr) -> Result<T, TlsFailure> + Clone + Send + 'static,
) -> Result<T, TlsFailure> {
    if let [only] = addresses[..] {
        return connect(only);
    }
    let mut failures = Vec::new();
    let judge = |_, connected: Result<T, _>| connected.map_err(|failure| failures.push(failure)).ok();
    match race(addresses, HEAD_START, deadline, connect, judge) {
        Ok(Raced::Won(connected, _)) => Ok(connected),
        Ok(Raced::Lost(_)) => Err(first_to_look_at(failures)),
        Err(error) => Err(TlsFailure::Io(
            error.kind(),
            format!("can't start a thread: {error}"),
        )),
    }
}

fn first_to_look_at(failures: Vec<TlsFailure>) -> TlsFailure {
    let rank = |failure: &TlsFailure| match failure {
        TlsFailure::NotTrusted(_) => 0,
        TlsFailure::RefusesUs(_) | TlsFailure::TurnedAway(_) => 1,
        _ => 2,
    };
    let first = failures.into_iter().min_by_key(rank);
    first.unwrap_or_else(|| TlsFailure::Io(io::ErrorKind::TimedOut, "connect timed out".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use nix::sys::socket::{Backlog, listen};

    use super::*;

    /// An address whose packets get no answer: its queue of connections is full. Returned with what keeps it so.
    fn silent() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            waiting.push(stream);
            assert!(waiting.len() < 100, "the queue never fills up");
        }
        (address, listener, waiting)
    }

    fn connecting(deadline: Instant) -> impl Fn(SocketAddr) -> Result<SocketAddr, TlsFailure> + Clone {
        move |address| {
            let left = deadline.saturating_duration_since(Instant::now());
            let stream = TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1)));
            let stream = stream.map_err(|error| TlsFailure::Io(error.kind(), error.to_string()))?;
            Ok(stream.peer_addr().unwrap())
        }
    }

    #[test]
    fn a_silent_address_costs_its_head_start() {
        let (silent, _listener, _waiting) = silent();
        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = good.local_addr().map(|address| (address, good)).unwrap();
        let (began, time) = (Instant::now(), Duration::from_secs(20));
        let found = super::connect(vec![silent, good.0], began + time, connecting(began + time)).unwrap();
        assert_eq!(found, good.0);
        assert!(began.elapsed() >= HEAD_START && began.elapsed() < time / 2);
        // One that fails costs nothing, and one that is known to be good comes first.
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(super::connect(vec![closed, good.0], began + time, connecting(began + time)).is_ok());
        let found = of("127.0.0.1", good.0.port(), Some(good.0), began + time).unwrap();
        assert_eq!(found[0], good.0);
        let deadline = Instant::now() + Duration::from_millis(400);
        let error = super::connect(vec![silent, silent], deadline, connecting(deadline)).unwrap_err();
        assert!(matches!(error, TlsFailure::Io(..)), "{error:?}");
    }

    #[test]
    fn an_impostor_among_the_addresses_is_what_is_told() {
        let any = || SocketAddr::from(([127, 0, 0, 1], 1));
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = super::connect(
            vec![any(), SocketAddr::from(([127, 0, 0, 2], 1))],
            deadline,
            move |address| {
                Err::<(), _>(match address == any() {
                    true => TlsFailure::NotTrusted("impostor".into()),
                    false => TlsFailure::Io(io::ErrorKind::ConnectionRefused, "connection refused".into()),
                })
            },
        );
        assert!(matches!(error, Err(TlsFailure::NotTrusted(_))));
    }
}
