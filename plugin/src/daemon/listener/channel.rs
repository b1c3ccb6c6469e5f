//! Messages of one connection (<https://varlink.org/Method-Call>): JSON, each ended by a NUL byte, within bounds that
//! depend on who sends them.
//!
//! What is too long is cut at its bound. From a reader no descriptor is ever received: a look at the message without
//! taking it shows that there are some, and the connection ends.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use thiserror::Error;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::closer::Closer;
use crate::daemon::gate::Pass;
use crate::model::deadlines::daemon::{NEXT_MESSAGE, READ_BY};

/// How much is read at a time.
const CHUNK: usize = 16 * 1024;
/// The most descriptors that a message of root's has.
const MAX_DESCRIPTORS: usize = 16;
/// The most that the kernel passes at a time (SCM_MAX_FD): with less room for them, it would leave some that nobody knows of.
const PASSED_AT_ONCE: usize = 253;

/// What may come from the other end.
#[derive(Debug)]
pub(super) enum Sender {
    /// Root, with an XML or with descriptors.
    Admin,
    /// Anybody else. The socket goes to the closer in the end, with the pass.
    Reader(Closer, Option<Arc<Pass>>),
}

impl Sender {
    /// The most bytes of a message. The hook takes XML of 4 MiB, and JSON has two bytes for some of these.
    const OF_ADMIN: usize = 16 * 1024 * 1024;
    const OF_READER: usize = 64 * 1024;

    fn max_message(&self) -> usize {
        match self {
            Self::Admin => Self::OF_ADMIN,
            Self::Reader(..) => Self::OF_READER,
        }
    }
}

#[derive(Debug)]
pub(super) struct Message {
    /// Its JSON.
    pub(super) bytes: Vec<u8>,
    /// What came with it.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Why a connection ends before its other end wants it to.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("a message of more than {0} bytes")]
    TooLong(usize),
    #[error("file descriptors, which are taken from root alone")]
    Descriptors,
    #[error("more than {MAX_DESCRIPTORS} file descriptors")]
    TooManyDescriptors,
    #[error("no message within {} s", .0.as_secs())]
    Idle(Duration),
    #[error("a message that is not a call")]
    NotACall(#[source] serde_json::Error),
    #[error("the other end does not read what it asked for")]
    Unread,
    #[error("the connection broke")]
    Io(#[from] io::Error),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Channel {
    // Always there until it is dropped.
    socket: Option<UnixStream>,
    sender: Sender,
    unread: Vec<u8>,
    /// Descriptors that were received, each with the position of the last byte that came with it.
    pending: Vec<(usize, OwnedFd)>,
}

impl Channel {
    pub(super) fn new(socket: UnixStream, sender: Sender) -> Self {
        Self {
            socket: Some(socket),
            sender,
            unread: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// The most bytes of a reply.
    pub(super) fn max_reply(&self) -> usize {
        match &self.sender {
            Sender::Admin => usize::MAX,
            Sender::Reader(..) => Sender::OF_READER,
        }
    }

    /// The next message; `None` at the end.
    pub(super) async fn message(&mut self) -> Result<Option<Message>, Fault> {
        match &self.sender {
            Sender::Admin => self.read_message().await,
            Sender::Reader(..) => match timeout(NEXT_MESSAGE, self.read_message()).await {
                Ok(message) => message,
                Err(_) => Err(Fault::Idle(NEXT_MESSAGE)),
            },
        }
    }

    async fn read_message(&mut self) -> Result<Option<Message>, Fault> {
        let (max, mut searched) = (self.sender.max_message(), 0);
        loop {
            let end = self.unread[searched..].iter().position(|byte| *byte == 0);
            if let Some(end) = end.map(|end| searched + end).filter(|end| *end <= max) {
                return Ok(Some(self.take(end)));
            }
            if end.is_some() || self.unread.len() > max {
                return Err(Fault::TooLong(max));
            }
            searched = self.unread.len();
            if !self.read().await? {
                return Ok(None);
            }
        }
    }

    /// The message that ends before the NUL byte at `end`, and what came with its bytes.
    fn take(&mut self, end: usize) -> Message {
        let rest = self.unread.split_off(end + 1);
        let mut bytes = std::mem::replace(&mut self.unread, rest);
        bytes.pop();
        let (of_this, later) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|(position, _)| *position <= end);
        self.pending = later;
        for (position, _) in &mut self.pending {
            *position -= end + 1;
        }
        let of_this: Vec<(usize, OwnedFd)> = of_this;
        Message {
            bytes,
            descriptors: of_this.into_iter().map(|(_, descriptor)| descriptor).collect(),
        }
    }

    /// Says whether there was something.
    async fn read(&mut self) -> Result<bool, Fault> {
        let socket = self.socket.as_ref().expect("it is there until it is dropped");
        let receive = match self.sender {
            Sender::Admin => receive_with_descriptors,
            Sender::Reader(..) => receive_bytes,
        };
        let unread = &mut self.unread;
        let (count, descriptors) = loop {
            socket.readable().await?;
            let received = socket.try_io(Interest::READABLE, || match receive(socket, unread) {
                Err(Fault::Io(error)) => Err(error),
                other => Ok(other),
            });
            match received {
                Ok(received) => break received?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        };
        let last = self.unread.len().saturating_sub(1);
        self.pending
            .extend(descriptors.into_iter().map(|descriptor| (last, descriptor)));
        if self.pending.len() > MAX_DESCRIPTORS {
            return Err(Fault::TooManyDescriptors);
        }
        Ok(count > 0)
    }

    /// Sends a message, as long as the other end reads it.
    pub(super) async fn send(&mut self, mut message: &[u8]) -> Result<(), Fault> {
        let socket = self.socket.as_ref().expect("it is there until it is dropped");
        let write = async {
            while !message.is_empty() {
                socket.writable().await?;
                match socket.try_write(message) {
                    Ok(count) => message = &message[count..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        match timeout(READ_BY, write).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(Fault::Unread),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let (Some(socket), Sender::Reader(closer, pass)) = (self.socket.take(), &mut self.sender) else {
            return;
        };
        if let Ok(socket) = socket.into_std() {
            closer.close(socket.into(), pass.take());
        }
    }
}

type Received = (usize, Vec<OwnedFd>);

/// Takes only bytes that no descriptor is with: to look at them shows whether one is, and takes none.
fn receive_bytes(socket: &UnixStream, unread: &mut Vec<u8>) -> Result<Received, Fault> {
    let mut chunk = [0; CHUNK];
    let look = |chunk: &mut [u8], flags| {
        let mut buffers = [IoSliceMut::new(chunk)];
        let flags = flags | MsgFlags::MSG_DONTWAIT;
        let seen = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, None, flags).map_err(io_fault)?;
        if seen.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(Fault::Descriptors);
        }
        Ok(seen.bytes)
    };
    let count = look(&mut chunk, MsgFlags::MSG_PEEK)?;
    let count = look(&mut chunk[..count], MsgFlags::empty())?;
    unread.extend_from_slice(&chunk[..count]);
    Ok((count, Vec::new()))
}

fn receive_with_descriptors(socket: &UnixStream, unread: &mut Vec<u8>) -> Result<Received, Fault> {
    let mut chunk = [0; CHUNK];
    let mut space = cmsg_space!([RawFd; PASSED_AT_ONCE]);
    let mut buffers = [IoSliceMut::new(&mut chunk)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received =
        recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags).map_err(io_fault)?;
    let mut descriptors = Vec::new();
    for message in received.cmsgs().map_err(io_fault)? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel has just made them for this process, and nothing else here knows of them.
            descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let count = received.bytes;
    unread.extend_from_slice(&chunk[..count]);
    Ok((count, descriptors))
}

fn io_fault(errno: Errno) -> Fault {
    Fault::Io(errno.into())
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;
    use crate::daemon::gate::Gate;

    type Other = std::os::unix::net::UnixStream;

    fn pair(sender: Sender) -> (Channel, Other) {
        let (ours, theirs) = Other::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Channel::new(UnixStream::from_std(ours).unwrap(), sender), theirs)
    }

    fn reader() -> Sender {
        let (pass, _) = Arc::new(Gate::default()).enter(nix::unistd::Uid::from_raw(7));
        Sender::Reader(Closer::start().unwrap(), pass.map(Arc::new))
    }

    fn send_descriptors(to: &Other, text: &[u8], count: usize) {
        let fds = vec![to.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(
            to.as_raw_fd(),
            &[IoSlice::new(text)],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[tokio::test]
    async fn messages_come_one_by_one_however_they_are_cut() {
        for sender in [Sender::Admin, reader()] {
            let (mut channel, mut other) = pair(sender);
            other.write_all(b"{1}\0{2").unwrap();
            assert_eq!(channel.message().await.unwrap().unwrap().bytes, b"{1}");
            other.write_all(b"}\0\0{3}").unwrap();
            assert_eq!(channel.message().await.unwrap().unwrap().bytes, b"{2}");
            assert_eq!(channel.message().await.unwrap().unwrap().bytes, b"");
            drop(other);
            assert!(channel.message().await.unwrap().is_none());
        }
    }

    #[tokio::test]
    async fn a_message_without_an_end_is_cut_at_its_bound() {
        for (sender, bound) in [(Sender::Admin, Sender::OF_ADMIN), (reader(), Sender::OF_READER)] {
            let (mut channel, other) = pair(sender);
            let sent = std::thread::spawn(move || {
                let chunk = [b'x'; CHUNK];
                let mut sent = 0;
                while let Ok(count) = (&other).write(&chunk) {
                    sent += count;
                }
                sent
            });
            assert!(matches!(channel.message().await, Err(Fault::TooLong(found)) if found == bound));
            assert!(channel.unread.len() <= bound + CHUNK, "{}", channel.unread.len());
            drop(channel);
            assert!(sent.join().unwrap() < bound + 1024 * 1024);
        }
        // One that has an end, and is too long.
        let (mut channel, mut other) = pair(reader());
        let mut long = vec![b'x'; Sender::OF_READER + 1];
        long.push(0);
        std::thread::spawn(move || other.write_all(&long));
        assert!(matches!(channel.message().await, Err(Fault::TooLong(_))));
    }

    #[tokio::test]
    async fn roots_descriptors_come_with_their_message() {
        let (mut channel, mut other) = pair(Sender::Admin);
        other.write_all(b"{1}\0").unwrap();
        send_descriptors(&other, b"{2}\0", 2);
        other.write_all(b"{3}\0").unwrap();
        for count in [0, 2, 0] {
            let message = channel.message().await.unwrap().unwrap();
            assert_eq!(message.descriptors.len(), count, "{message:?}");
        }
        for too_many in [MAX_DESCRIPTORS + 1, PASSED_AT_ONCE] {
            let (mut channel, other) = pair(Sender::Admin);
            send_descriptors(&other, b"{4}\0", too_many);
            assert!(matches!(channel.message().await, Err(Fault::TooManyDescriptors)));
        }
    }

    #[tokio::test]
    async fn no_descriptor_is_received_from_a_reader() {
        for before in ["", "{1}\0", "{"] {
            let (mut channel, mut other) = pair(reader());
            other.write_all(before.as_bytes()).unwrap();
            let open = open_descriptors();
            for _ in 0..100 {
                send_descriptors(&other, b"{2}\0", 15);
            }
            if before.ends_with('\0') {
                let first = channel.message().await;
                assert!(matches!(first, Err(Fault::Descriptors)) || first.unwrap().is_some());
            }
            assert!(
                matches!(channel.message().await, Err(Fault::Descriptors)),
                "{before}"
            );
            assert!(open_descriptors() <= open + 8, "{before}");
        }
    }
}
