//! Storage that does not answer: a file system whose server takes requests and answers some of them never. Who waits for one is in
//! uninterruptible sleep, as with a dead NFS server or disk: no signal ends it.
//!
//! The server speaks FUSE, as in <linux/fuse.h>: a directory of files that are read only.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

use crate::Host;

const IDLE: Duration = Duration::from_millis(2);
const ROOT: u64 = 1;
const NO_ENTRY: i32 = nix::errno::Errno::ENOENT as i32;
/// More than a request of at most 128 KiB takes.
const BUFFER: usize = 256 << 10;

/// Mounted until it is dropped. Whoever waits for it then has an error.
pub struct HangingStorage<'a> {
    host: &'a Host,
    mounted: String,
    stop: Arc<AtomicBool>,
    held: Arc<AtomicU64>,
    server: Option<JoinHandle<()>>,
}

/// What is never answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangs {
    /// Whatever is asked.
    Everything,
    /// Reads behind this offset.
    ReadsBehind(u64),
}

impl<'a> HangingStorage<'a> {
    /// Mounts it over a directory of the host, with these files by their names.
    ///
    /// # Errors
    /// A kernel without FUSE, or no such directory.
    pub fn mount(host: &'a Host, directory: &Path, files: &[(&str, Vec<u8>)], hangs: Hangs) -> Result<Self> {
        let fuse = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open("/dev/fuse")
            .context("/dev/fuse")?;
        // For mount, which passes it to the kernel.
        fcntl(&fuse, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let mounted = directory.display().to_string();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            fuse.as_raw_fd()
        );
        host.run(&["mount", "-i", "-t", "fuse", "-o", &options, "hanging", &mounted])?
            .succeeded()?;
        fcntl(&fuse, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let (stop, held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let server = Server {
            fuse,
            files: (ROOT + 1..)
                .zip(files)
                .map(|(node, (name, bytes))| (node, ((*name).to_owned(), bytes.clone())))
                .collect(),
            hangs,
            held: Arc::clone(&held),
        };
        let ends = Arc::clone(&stop);
        let server = thread::spawn(move || server.serve(&ends));
        Ok(Self {
            host,
            mounted,
            stop,
            held,
            server: Some(server),
        })
    }

    /// How many requests wait for an answer that does not come.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }
}

impl Drop for HangingStorage<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // With the server's descriptor goes the connection: the kernel fails what waits.
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
        let _ = self.host.run(&["umount", "--lazy", &self.mounted]);
    }
}

struct Server {
    fuse: File,
    files: BTreeMap<u64, (String, Vec<u8>)>,
    hangs: Hangs,
    held: Arc<AtomicU64>,
}

/// One request, as `struct fuse_in_header` begins it.
struct Request<'a> {
    opcode: u32,
    unique: u64,
    node: u64,
    body: &'a [u8],
}

impl Server {
    fn serve(self, stop: &AtomicBool) {
        let mut buffer = vec![0; BUFFER];
        while !stop.load(Ordering::SeqCst) {
            match (&self.fuse).read(&mut buffer) {
                Ok(length) => self.take(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(IDLE),
                // Unmounted; or a request was taken back while it was read.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(_) => return,
            }
        }
    }

    fn take(&self, bytes: &[u8]) {
        let request = Request {
            opcode: u32_at(bytes, 4),
            unique: u64_at(bytes, 8),
            node: u64_at(bytes, 16),
            body: &bytes[40..],
        };
        match self.answer(&request) {
            Answer::None => {}
            Answer::Never => drop(self.held.fetch_add(1, Ordering::SeqCst)),
            Answer::Error(errno) => self.reply(request.unique, -errno, &[]),
            Answer::Body(body) => self.reply(request.unique, 0, &body),
        }
    }

    fn reply(&self, unique: u64, error: i32, body: &[u8]) {
        let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
        let reply = [
            &length.to_ne_bytes()[..],
            &error.to_ne_bytes(),
            &unique.to_ne_bytes(),
            body,
        ]
        .concat();
        // Whoever asked may have gone.
        let _ = (&self.fuse).write(&reply);
    }

    fn answer(&self, request: &Request<'_>) -> Answer {
        const LOOKUP: u32 = 1;
        const FORGET: u32 = 2;
        const GETATTR: u32 = 3;
        const OPEN: u32 = 14;
        const READ: u32 = 15;
        const STATFS: u32 = 17;
        const RELEASE: u32 = 18;
        const FLUSH: u32 = 25;
        const INIT: u32 = 26;
        const OPENDIR: u32 = 27;
        const READDIR: u32 = 28;
        const RELEASEDIR: u32 = 29;
        const INTERRUPT: u32 = 36;
        const BATCH_FORGET: u32 = 42;
        match request.opcode {
            INIT => return Answer::Body(init(request.body)),
            FORGET | BATCH_FORGET | INTERRUPT => return Answer::None,
            _ if self.hangs == Hangs::Everything => return Answer::Never,
            _ => {}
        }
        match request.opcode {
            LOOKUP => self.look_up(request.body),
            GETATTR => match self.attributes(request.node) {
                Some(attributes) => Answer::Body([&[0; 16][..], &attributes].concat()),
                None => Answer::Error(NO_ENTRY),
            },
            // FOPEN_DIRECT_IO: nothing is answered from a cache.
            OPEN | OPENDIR => Answer::Body([&[0; 8][..], &1_u32.to_ne_bytes(), &[0; 4]].concat()),
            READ => self.read(request),
            STATFS => Answer::Body(vec![0; 80]),
            RELEASE | FLUSH | READDIR | RELEASEDIR => Answer::Body(Vec::new()),
            _ => Answer::Error(nix::errno::Errno::ENOSYS as i32),
        }
    }

    fn look_up(&self, name: &[u8]) -> Answer {
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let found = self.files.iter().find(|(_, (known, _))| known.as_bytes() == name);
        let Some((node, attributes)) = found.and_then(|(node, _)| Some((node, self.attributes(*node)?)))
        else {
            return Answer::Error(NO_ENTRY);
        };
        Answer::Body([&node.to_ne_bytes()[..], &[0; 32], &attributes].concat())
    }

    fn read(&self, request: &Request<'_>) -> Answer {
        let offset = u64_at(request.body, 8);
        let size = u64::from(u32_at(request.body, 16));
        if matches!(self.hangs, Hangs::ReadsBehind(limit) if offset + size > limit) {
            return Answer::Never;
        }
        let Some((_, bytes)) = self.files.get(&request.node) else {
            return Answer::Error(NO_ENTRY);
        };
        let length = bytes.len() as u64;
        let (begin, end) = (offset.min(length), (offset + size).min(length));
        Answer::Body(bytes[begin as usize..end as usize].to_vec())
    }

    /// `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Option<Vec<u8>> {
        let (mode, size) = match node {
            ROOT => (0o040_755_u32, 0),
            node => (0o100_644, self.files.get(&node)?.1.len() as u64),
        };
        let words = [node, size, size.div_ceil(512), 0, 0, 0];
        let halves = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0_u32];
        let words = words.iter().flat_map(|word| word.to_ne_bytes());
        Some(
            words
                .chain(halves.iter().flat_map(|half| half.to_ne_bytes()))
                .collect(),
        )
    }
}

enum Answer {
    /// The request has none.
    None,
    Never,
    Error(i32),
    Body(Vec<u8>),
}

/// `struct fuse_init_out` of version 7.31, without any feature.
fn init(body: &[u8]) -> Vec<u8> {
    let halves = [7, 31, u32_at(body, 8), 0, 0, 128 << 10, 1];
    let mut reply: Vec<u8> = halves.iter().flat_map(|half: &u32| half.to_ne_bytes()).collect();
    reply.resize(64, 0);
    reply
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
