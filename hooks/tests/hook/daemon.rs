//! A daemon for the faults that the real one can't be made to show.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use serde_json::Value;

/// What it does with a connection.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// Reads the request and sends this and a NUL byte.
    Reply(String),
    /// Reads the request and agrees after that long.
    Late(Duration),
    /// Reads the request and says nothing.
    Silent,
    /// Reads the request and sends a byte every now and then.
    Trickle,
    /// Reads the request and hangs up in the middle of its reply.
    HalfReply,
    /// Reads the request and hangs up.
    Close,
    /// Hangs up at once.
    CloseUnread,
    /// Accepts and leaves it at that.
    NeverReads,
    /// Leaves its queue full.
    NeverAccepts,
}

impl Answer {
    pub(crate) fn reply(text: &str) -> Self {
        Self::Reply(text.to_owned())
    }
}

/// Serves until the test's process ends.
pub(crate) struct Daemon {
    requests: Receiver<Value>,
    _queued: Vec<UnixStream>,
}

impl Daemon {
    pub(crate) fn start(path: &Path, answer: Answer) -> Self {
        let (sender, requests) = channel();
        if matches!(answer, Answer::NeverAccepts) {
            return Self {
                requests,
                _queued: full_queue(path),
            };
        }
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                if !matches!(answer, Answer::NeverReads | Answer::CloseUnread) {
                    let _ = sender.send(request(&mut stream));
                }
                if serve(&mut stream, &answer) {
                    kept.push(stream);
                }
            }
        });
        Self {
            requests,
            _queued: Vec::new(),
        }
    }

    /// The next request that came.
    pub(crate) fn request(&self) -> Value {
        self.requests.recv_timeout(Duration::from_secs(10)).unwrap()
    }
}

/// Whether the connection stays open. The hook may be gone by now, so writing may fail.
fn serve(stream: &mut UnixStream, answer: &Answer) -> bool {
    match answer {
        Answer::Reply(text) => {
            let _ = stream.write_all(&[text.as_bytes(), b"\0"].concat());
        }
        Answer::Late(pause) => {
            thread::sleep(*pause);
            let _ = stream.write_all(b"{}\0");
        }
        Answer::Trickle => {
            for _ in 0..400 {
                let _ = stream.write_all(b" ");
                thread::sleep(Duration::from_millis(50));
            }
        }
        Answer::HalfReply => {
            let _ = stream.write_all(b"{\"parameters\":");
        }
        Answer::Close | Answer::CloseUnread => {}
        Answer::Silent | Answer::NeverReads | Answer::NeverAccepts => return true,
    }
    false
}

fn request(stream: &mut UnixStream) -> Value {
    let mut request = Vec::new();
    let mut chunk = [0; 65536];
    while !request.contains(&0) {
        let count = stream.read(&mut chunk).unwrap();
        assert!(count > 0, "the request has no end");
        request.extend_from_slice(&chunk[..count]);
    }
    assert_eq!(request.pop(), Some(0), "one request and its NUL byte");
    serde_json::from_slice(&request).unwrap()
}

/// A listening socket to which no further client can connect.
fn full_queue(path: &Path) -> Vec<UnixStream> {
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(
        std::os::fd::AsRawFd::as_raw_fd(&listener),
        &UnixAddr::new(path).unwrap(),
    )
    .unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    vec![UnixStream::from(listener), UnixStream::connect(path).unwrap()]
}
