//! One call of one Varlink method (<https://varlink.org/Method-Call>): JSON, ended by a NUL byte, each way.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt::PeerCredentials,
};
use serde_json::{Value, json};

use crate::deadline::{Deadline, Elapsed, QUEUE_PAUSE};

/// No reply of the daemon comes near this.
const MAX_REPLY: usize = 64 * 1024;

/// Why a call was not answered with success.
#[derive(Debug)]
pub(crate) enum CallError {
    /// The daemon says no, in words for the user.
    Refused(String),
    /// The daemon says no with another Varlink error.
    Error(String),
    /// Nobody listens.
    Connect(io::Error),
    /// The host's policy keeps the hook off the socket.
    Denied,
    /// Too late, in this stage.
    Deadline(&'static str),
    /// The connection ended.
    Closed(String),
    /// The reply is none.
    Garbage(&'static str),
    /// Somebody else than root listens.
    NotRoot(u32),
}

/// Calls a method of `io.virtseal.Lifecycle`.
pub(crate) fn call(
    path: &Path,
    method: &str,
    parameters: Value,
    deadline: &Deadline,
) -> Result<(), CallError> {
    let mut stream = open(path, deadline)?;
    only_root_answers(&stream)?;
    let method = format!("io.virtseal.Lifecycle.{method}");
    let mut request = json!({ "method": method, "parameters": parameters })
        .to_string()
        .into_bytes();
    request.push(0);
    send(&mut stream, &request, deadline)?;
    judge(&receive(&mut stream, deadline)?)
}

/// Unlike `UnixStream::connect` this does not wait for ever on a full listen queue.
fn open(path: &Path, deadline: &Deadline) -> Result<UnixStream, CallError> {
    let failed = |errno: Errno| match errno {
        Errno::EACCES | Errno::EPERM => CallError::Denied,
        other => CallError::Connect(other.into()),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
    let address = UnixAddr::new(path).map_err(failed)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::EAGAIN | Errno::EINTR) => {
                let left = deadline
                    .left()
                    .map_err(|Elapsed| CallError::Deadline("accept a connection"))?;
                std::thread::sleep(QUEUE_PAUSE.min(left));
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Who could make the socket could agree to anything. The kernel says who began to listen: virtseald, or systemd for it.
fn only_root_answers(stream: &UnixStream) -> Result<(), CallError> {
    match getsockopt(stream, PeerCredentials) {
        Ok(peer) if peer.uid() == 0 => Ok(()),
        Ok(peer) => Err(CallError::NotRoot(peer.uid())),
        Err(errno) => Err(CallError::Connect(errno.into())),
    }
}

fn send(stream: &mut UnixStream, mut request: &[u8], deadline: &Deadline) -> Result<(), CallError> {
    while !request.is_empty() {
        let late = |Elapsed| CallError::Deadline("read the request");
        deadline.wait(&*stream, PollFlags::POLLOUT).map_err(late)?;
        match stream.write(request) {
            Ok(count) => request = &request[count..],
            Err(error) if is_temporary(&error) => {}
            Err(error) => return Err(CallError::Closed(format!(" ({error})"))),
        }
    }
    Ok(())
}

/// The reply up to its NUL byte.
fn receive(stream: &mut UnixStream, deadline: &Deadline) -> Result<Vec<u8>, CallError> {
    let mut reply = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        deadline
            .wait(&*stream, PollFlags::POLLIN)
            .map_err(|Elapsed| CallError::Deadline("answer"))?;
        let count = match stream.read(&mut chunk) {
            Ok(0) => return Err(CallError::Closed(String::new())),
            Ok(count) => count,
            Err(error) if is_temporary(&error) => continue,
            Err(error) => return Err(CallError::Closed(format!(" ({error})"))),
        };
        if let Some(end) = chunk[..count].iter().position(|byte| *byte == 0) {
            reply.extend_from_slice(&chunk[..end]);
            return Ok(reply);
        }
        reply.extend_from_slice(&chunk[..count]);
        if reply.len() > MAX_REPLY {
            return Err(CallError::Garbage("its reply does not end"));
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn judge(reply: &[u8]) -> Result<(), CallError> {
    let garbage = CallError::Garbage("its reply is not a Varlink message");
    let Ok(Value::Object(reply)) = serde_json::from_slice(reply) else {
        return Err(garbage);
    };
    let message = || {
        reply
            .get("parameters")
            .and_then(|found| found.get("message"))
            .and_then(Value::as_str)
    };
    match (reply.get("error"), reply.get("parameters")) {
        (None, None | Some(Value::Object(_))) => Ok(()),
        (Some(Value::String(error)), _) => Err(match message() {
            Some(message) if error == "io.virtseal.Lifecycle.Refused" && !message.trim().is_empty() => {
                CallError::Refused(message.to_owned())
            }
            Some(message) => CallError::Error(format!("{error}: {message}")),
            None => CallError::Error(error.clone()),
        }),
        _ => Err(garbage),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_is_an_object_without_an_error() {
        assert!(judge(b"{}").is_ok());
        assert!(judge(b"{\"parameters\":{}}").is_ok());
        for garbage in [
            "",
            "null",
            "[]",
            "{\"error\":7}",
            "{\"error\":null}",
            "{\"parameters\":1}",
            "{} x",
        ] {
            assert!(
                matches!(judge(garbage.as_bytes()), Err(CallError::Garbage(_))),
                "{garbage}"
            );
        }
    }

    #[test]
    fn only_a_refusal_speaks_to_the_user() {
        let refused = br#"{"error":"io.virtseal.Lifecycle.Refused","parameters":{"message":"locked"}}"#;
        assert!(matches!(judge(refused), Err(CallError::Refused(message)) if message == "locked"));
        let silent = br#"{"error":"io.virtseal.Lifecycle.Refused","parameters":{"message":" "}}"#;
        assert!(matches!(judge(silent), Err(CallError::Error(_))));
        let other = br#"{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"a"}}"#;
        assert!(matches!(judge(other), Err(CallError::Error(name)) if name.ends_with("MethodNotFound")));
    }
}
