//! A member of the group that may read, who means no good: `reader ATTACK UID GID`, in the private host.
//!
//! Becomes that user, does what the attack says until its standard input ends, and then prints what it got, as a number.
//! Stories run several at once.

use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use virtseal_testkit::SealedHost;

/// How long a connection is left alone that was refused.
const PAUSE: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reader: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [attack, uid, gid] = &arguments[..] else {
        bail!("usage: reader ATTACK UID GID")
    };
    let attack: Attack = match attack.as_str() {
        "status" => |got| repeat(got, 5, &call("Status", "{}")),
        "audit" => |got| repeat(got, 4, &call("ShowAudit", r#"{"records":10000}"#)),
        "watch" => watch,
        "idle" => |got| hold(got, 350, b""),
        "unread" => |got| hold(got, 20, &call("Status", "{}").repeat(200)),
        "trickle" => |got| hold(got, 20, br#"{"method":"io.virt"#),
        "descriptors" => descriptors,
        "linger" => linger,
        "endless" => endless,
        other => bail!("there is no attack {other:?}"),
    };
    let (uid, gid) = (Uid::from_raw(uid.parse()?), Gid::from_raw(gid.parse()?));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    ensure!(
        UnixStream::connect(SealedHost::HOOK_SOCKET).is_err(),
        "the hook's socket is open to a reader"
    );
    let got = Arc::new(Got::default());
    attack(&got)?;
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    got.over.store(true, Ordering::SeqCst);
    // A story that has failed does not listen.
    let _ = writeln!(std::io::stdout(), "{}", got.count.load(Ordering::SeqCst));
    Ok(())
}

type Attack = fn(&Arc<Got>) -> Result<()>;

/// How much an attack has got so far.
#[derive(Default)]
struct Got {
    count: AtomicU64,
    over: AtomicBool,
}

impl Got {
    fn add(&self, count: u64) {
        self.count.fetch_add(count, Ordering::SeqCst);
    }

    /// Does `work` again and again in a thread.
    fn keep(self: &Arc<Self>, work: impl Fn(&Self) -> Result<()> + Send + 'static) {
        let got = Arc::clone(self);
        thread::spawn(move || {
            while !got.over.load(Ordering::SeqCst) {
                if work(&got).is_err() {
                    thread::sleep(PAUSE);
                }
            }
        });
    }
}

fn call(method: &str, parameters: &str) -> Vec<u8> {
    format!("{{\"method\":\"io.virtseal.Host.{method}\",\"parameters\":{parameters}}}\0").into_bytes()
}

fn connect() -> Result<UnixStream> {
    Ok(UnixStream::connect(SealedHost::SOCKET)?)
}

/// Reads a reply to its end; the failures of a refused call count for nothing.
fn reply(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let (mut reply, mut chunk) = (Vec::new(), [0; 65536]);
    loop {
        let count = stream.read(&mut chunk)?;
        ensure!(count > 0, "hung up");
        reply.extend_from_slice(&chunk[..count]);
        if reply.last() == Some(&0) {
            ensure!(!reply.starts_with(b"{\"error\""), "refused");
            return Ok(reply);
        }
    }
}

/// The same call in loops, as fast as it is answered. Counts the answers.
fn repeat(got: &Arc<Got>, loops: usize, request: &[u8]) -> Result<()> {
    for _ in 0..loops {
        let request = request.to_vec();
        got.keep(move |got| {
            let mut stream = connect()?;
            while !got.over.load(Ordering::SeqCst) {
                stream.write_all(&request)?;
                reply(&mut stream)?;
                got.add(1);
            }
            Ok(())
        });
    }
    Ok(())
}

/// Watches the job that runs, 64 times. Counts those that were told of it.
fn watch(got: &Arc<Got>) -> Result<()> {
    let mut watch = String::from_utf8(call("WatchJob", "{}"))?;
    watch = watch.replace(r#","parameters""#, r#","more":true,"parameters""#);
    let mut streams = Vec::new();
    for _ in 0..64 {
        let mut stream = connect()?;
        stream.write_all(watch.as_bytes())?;
        streams.push(stream);
    }
    for stream in &mut streams {
        reply(stream).context("a watcher is not told of the job")?;
        got.add(1);
    }
    thread::spawn(move || {
        loop {
            for stream in &mut streams {
                let _ = reply(stream);
            }
        }
    });
    Ok(())
}

/// Opens as many connections as it can, with a few bytes on each, and reads nothing. Counts those that are still open.
fn hold(got: &Arc<Got>, count: usize, bytes: &[u8]) -> Result<()> {
    let bytes = bytes.to_vec();
    let open = move || -> Result<UnixStream> {
        let stream = connect()?;
        stream.set_nonblocking(true)?;
        // As much as fits.
        let _ = (&stream).write(&bytes);
        Ok(stream)
    };
    let mut streams = (0..count).map(|_| open()).collect::<Result<Vec<_>>>()?;
    thread::sleep(Duration::from_secs(1));
    let is_open = |stream: &UnixStream| {
        let mut ends = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        // The other end has hung up when there is an event.
        poll(&mut ends, PollTimeout::ZERO) == Ok(0)
    };
    got.add(streams.iter().filter(|stream| is_open(stream)).count() as u64);
    // Whoever is hung up on comes again.
    thread::spawn(move || {
        loop {
            thread::sleep(PAUSE);
            for stream in streams.iter_mut().filter(|stream| !is_open(stream)) {
                if let Ok(new) = open() {
                    *stream = new;
                }
            }
        }
    });
    Ok(())
}

/// 1,500 descriptors on one connection, again and again. Counts those that were taken.
fn descriptors(got: &Arc<Got>) -> Result<()> {
    got.keep(|got| {
        let stream = connect()?;
        let fds = [stream.as_raw_fd(); 150];
        let rights = [ControlMessage::ScmRights(&fds)];
        for _ in 0..10 {
            sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(b"{")],
                &rights,
                MsgFlags::empty(),
                None,
            )?;
            got.add(fds.len() as u64);
        }
        thread::sleep(PAUSE);
        Ok(())
    });
    Ok(())
}

/// A TCP socket that waits for an hour when it is closed. Counts how many were sent.
fn linger(got: &Arc<Got>) -> Result<()> {
    got.keep(|got| {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut socket = TcpStream::connect(listener.local_addr()?)?;
        let hour = nix::libc::linger {
            l_onoff: 1,
            l_linger: 3600,
        };
        setsockopt(&socket, sockopt::Linger, &hour)?;
        socket.set_nonblocking(true)?;
        while socket.write(&[0; 65536]).is_ok() {}
        let stream = connect()?;
        let fds = [socket.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let status = call("Status", "{}");
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&status)],
            &rights,
            MsgFlags::empty(),
            None,
        )?;
        drop(socket);
        got.add(1);
        thread::sleep(PAUSE);
        Ok(())
    });
    Ok(())
}

/// 20 messages of 99 MB without an end at once, again and again. Counts the megabytes that were taken.
fn endless(got: &Arc<Got>) -> Result<()> {
    for _ in 0..20 {
        got.keep(|got| {
            let mut stream = connect()?;
            for _ in 0..99 {
                stream.write_all(&[b'x'; 1_000_000])?;
                got.add(1);
            }
            Ok(())
        });
    }
    Ok(())
}
