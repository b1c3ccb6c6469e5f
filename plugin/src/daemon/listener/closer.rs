//! Closes connections of readers. In their sockets may be descriptors that nobody has received, and the kernel closes
//! those too: the last reference to a TCP socket with SO_LINGER keeps whoever drops it waiting, for as long as its owner
//! wants, unless that is a thread that ends.
//!
//! So a thread takes a table of descriptors of its own, this process lets go of the connections, and the thread ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{io, thread};

use nix::sched::{CloneFlags, unshare};

use crate::daemon::gate::Pass;
use crate::model::deadlines::daemon::CLOSER_WITHOUT_THREAD;

/// A connection that is over, and the pass that it had.
type Over = (OwnedFd, Option<Arc<Pass>>);

/// Where connections are sent that are over.
#[derive(Clone, Debug)]
pub(super) struct Closer(Sender<Over>);

impl Closer {
    /// Starts the thread that sees to them.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("closer".to_owned())
            .spawn(move || close_all(&receiver))?;
        Ok(Self(sender))
    }

    /// Closes it, without waiting for that.
    pub(super) fn close(&self, connection: OwnedFd, pass: Option<Arc<Pass>>) {
        // The thread lives as long as there is a sender.
        let _ = self.0.send((connection, pass));
    }
}

fn close_all(over: &Receiver<Over>) {
    while let Ok(first) = over.recv() {
        let mut batch = vec![first];
        batch.extend(over.try_iter());
        close_on_ending_thread(batch);
    }
}

fn close_on_ending_thread(batch: Vec<Over>) {
    loop {
        let (holds, held) = channel();
        let (let_go, may_end) = channel::<()>();
        let spawned = thread::Builder::new().name("closing".to_owned()).spawn(move || {
            let has_own_table = unshare(CloneFlags::CLONE_FILES).is_ok();
            if holds.send(has_own_table).is_ok() {
                // It ends by being dropped.
                let _ = may_end.recv();
            }
        });
        match (spawned, held.recv()) {
            (Ok(_), Ok(true)) => {
                drop(batch);
                drop(let_go);
                return;
            }
            // The kernel refuses that: then a thread of their own waits for them.
            (Ok(_), _) => {
                tracing::warn!("connections are closed without a table of descriptors of its own");
                drop(thread::spawn(move || drop(batch)));
                return;
            }
            (Err(_), _) => thread::sleep(CLOSER_WITHOUT_THREAD),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

    use std::time::Duration;

    use super::*;

    /// A TCP socket whose other end reads nothing, with data that it would wait for two minutes to get rid of.
    fn lingering() -> (TcpStream, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 120,
        };
        setsockopt(&stream, sockopt::Linger, &linger).unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 65536]).is_ok() {}
        (stream, listener)
    }

    #[test]
    fn nobody_waits_for_a_lingering_descriptor_in_a_connection() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let (socket, _listener) = lingering();
        let message = [ControlMessage::ScmRights(&[socket.as_raw_fd()])];
        sendmsg::<()>(
            theirs.as_raw_fd(),
            &[IoSlice::new(b"{")],
            &message,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        // Only the one that is on its way is left: dropping this one waits for nothing.
        drop(socket);
        let began = Instant::now();
        let closer = Closer::start().unwrap();
        closer.close(ours.into(), None);
        // The next one is closed as well: the thread that sees to them does not wait.
        let (other, ours) = UnixStream::pair().unwrap();
        closer.close(ours.into(), None);
        for closed in [theirs, other] {
            closed.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let _ = std::io::Read::read(&mut &closed, &mut [0]);
        }
        assert!(began.elapsed() < Duration::from_secs(50), "it lingered");
    }
}
