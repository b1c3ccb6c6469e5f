//! A loopback port before a server, that can be dead in several ways, and counts what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;

/// How a relay treats what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Passes everything on at once.
    Forward,
    /// A black hole: takes connections, and never answers on these and on older ones.
    Silent,
    /// Late: what comes is passed on when it is in another manner again.
    Stalled,
    /// Closes every connection, old and new.
    Refusing,
    /// Nobody listens: connections are refused, and older ones are cut.
    Dead,
}

/// The relay, ended when dropped.
pub struct Relay {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    server: u16,
    state: Mutex<State>,
    changed: Condvar,
    connections: AtomicUsize,
    requests: AtomicUsize,
}

struct State {
    manner: Manner,
    /// Counts the listeners there have been: the one that waits for clients ends when it is no more the last.
    listener: usize,
    /// Connections up to this one get nothing through any more.
    forgotten: usize,
    open: Vec<TcpStream>,
}

impl Relay {
    /// A relay to `server`, a port on 127.0.0.1.
    ///
    /// # Errors
    /// No port is free.
    pub fn to(server: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            server,
            state: Mutex::new(State {
                manner: Manner::Forward,
                listener: 0,
                forgotten: 0,
                open: Vec::new(),
            }),
            changed: Condvar::new(),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
        });
        accept(listener, 0, Arc::clone(&shared));
        Ok(Self { port, shared })
    }

    /// Where it listens, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes how it is, from now on.
    ///
    /// # Errors
    /// Somebody else has taken its port meanwhile.
    pub fn be(&self, manner: Manner) -> Result<()> {
        let mut state = self.shared.state();
        let before = std::mem::replace(&mut state.manner, manner);
        match (before, manner) {
            (Manner::Dead, Manner::Dead) => {}
            (_, Manner::Dead) => {
                state.listener += 1;
                state.cut();
                drop(state);
                self.wake();
            }
            (Manner::Dead, _) => {
                let listener = TcpListener::bind(("127.0.0.1", self.port))?;
                accept(listener, state.listener, Arc::clone(&self.shared));
            }
            // Bytes that were swallowed would be missed: such connections are over.
            (Manner::Silent, _) | (_, Manner::Refusing) => state.cut(),
            _ => {}
        }
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Cuts every connection that is open, as a restart of the server would.
    pub fn cut(&self) {
        self.shared.state().cut();
    }

    /// Swallows what comes by the connections that there are, as a firewall does that has forgotten them.
    pub fn forget(&self) {
        self.shared.state().forgotten = self.connections();
    }

    /// How many connections there have been.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many requests clients have sent: those of HTTP/1.1, or the records with data of TLS 1.2.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Lets a listener that waits notice that its time is over.
    fn wake(&self) {
        while TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
            thread::yield_now();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Dying needs no port, so it can't fail.
        let _ = self.be(Manner::Dead);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while nothing of the connection `number` may pass; whether anything ever may.
    fn may_pass(&self, number: usize) -> bool {
        let state = self.state();
        let waits = |state: &mut State| match state.manner {
            Manner::Silent | Manner::Stalled => true,
            Manner::Forward => number <= state.forgotten,
            Manner::Refusing | Manner::Dead => false,
        };
        let state = self
            .changed
            .wait_while(state, waits)
            .unwrap_or_else(PoisonError::into_inner);
        state.manner == Manner::Forward
    }
}

impl State {
    fn cut(&mut self) {
        for stream in self.open.drain(..) {
            // Closed by the other side already when this fails.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: TcpListener, number: usize, shared: Arc<Shared>) {
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let mut state = shared.state();
            if state.listener != number {
                return;
            }
            let connection = 1 + shared.connections.fetch_add(1, Ordering::SeqCst);
            if state.manner == Manner::Refusing {
                continue;
            }
            let server = TcpStream::connect(("127.0.0.1", shared.server));
            let copies = server.and_then(|server| {
                state.open.extend([client.try_clone()?, server.try_clone()?]);
                Ok((client.try_clone()?, server.try_clone()?, server))
            });
            // Whose server has gone sees its connection end.
            if let Ok((reading, writing, server)) = copies {
                pump(
                    reading,
                    writing,
                    connection,
                    Some(Counter::default()),
                    Arc::clone(&shared),
                );
                pump(server, client, connection, None, Arc::clone(&shared));
            }
        }
    });
}

fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    number: usize,
    mut counter: Option<Counter>,
    shared: Arc<Shared>,
) {
    thread::spawn(move || {
        let mut buffer = [0; 64 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            if let Some(counter) = &mut counter {
                let requests = counter.requests(&buffer[..read]);
                shared.requests.fetch_add(requests, Ordering::SeqCst);
            }
            if !shared.may_pass(number) || to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        // Ended by the other side already when these fail.
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// Counts requests in the bytes of one client, however they are cut into pieces.
#[derive(Default)]
struct Counter {
    /// What has come and is no whole record or line yet.
    rest: Vec<u8>,
}

impl Counter {
    /// A TLS record: type (1 byte), version (2), length (2).
    const HEADER: usize = 5;
    const HANDSHAKE_TYPES: std::ops::Range<u8> = 20..24;
    const DATA: u8 = 23;

    fn requests(&mut self, bytes: &[u8]) -> usize {
        self.rest.extend_from_slice(bytes);
        match self.rest.first() {
            Some(first) if Self::HANDSHAKE_TYPES.contains(first) => self.records(),
            _ => self.lines(),
        }
    }

    fn records(&mut self) -> usize {
        let mut found = 0;
        while let [kind, _, _, high, low, ..] = self.rest[..] {
            let length = Self::HEADER + usize::from(u16::from_be_bytes([high, low]));
            if self.rest.len() < length {
                break;
            }
            found += usize::from(kind == Self::DATA);
            self.rest.drain(..length);
        }
        found
    }

    fn lines(&mut self) -> usize {
        let Some(end) = memchr::memrchr(b'\n', &self.rest) else {
            return 0;
        };
        let whole: Vec<_> = self.rest.drain(..=end).collect();
        memchr::memmem::find_iter(&whole, b" HTTP/1.1\r\n").count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_however_they_come() {
        let tls = [
            &[22, 3, 1, 0, 2, 9, 9][..],
            &[23, 3, 3, 0, 3, 23, 23, 23],
            &[21, 3, 3, 0, 0],
            &[23, 3, 3, 0, 0],
        ]
        .concat();
        let http = b"POST /a HTTP/1.1\r\nHost: x\r\n\r\n{\"a\":1}GET /b HTTP/1.1\r\n\r\n".to_vec();
        for bytes in [tls, http] {
            for size in [1, 3, 7, bytes.len()] {
                let mut counter = Counter::default();
                let counted: usize = bytes.chunks(size).map(|piece| counter.requests(piece)).sum();
                assert_eq!(counted, 2, "in pieces of {size}");
            }
        }
    }
}
