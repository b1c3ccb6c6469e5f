//! Every time that virtseald waits, retries or remembers for, and which of them must be shorter than which. A test reads the
//! sources: no other file spells a time. The hook's are in its own `deadline.rs`.

use std::time::Duration;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A sleep without anything due: whatever comes rings, so that only a lost bell is made up for.
pub(crate) const IDLE: Duration = secs(3600);
/// The longest time that a setting takes.
pub(crate) const MAX_SETTING: Duration = secs(3600);

/// What a start waits for, or those who watch it.
pub(crate) mod start {
    use super::{Duration, millis, secs};

    /// The default of `hook_deadline`; hook.conf has the same for its `deadline`.
    pub(crate) const HOOK: Duration = secs(10);
    /// The default of `provider_deadline`.
    pub(crate) const PROVIDER: Duration = secs(5);
    /// The most time that a record may cost a start.
    pub(crate) const RECORD: Duration = secs(1);
    /// How often a start that waits looks whether anybody still waits for it.
    pub(crate) const TICK: Duration = millis(50);
    /// When to ask again about a start that goes on.
    pub(crate) const OVERDUE_AGAIN: Duration = secs(2);
    /// How long after `migrate` or `restore` its `prepare` may come: libvirt waits 30 s for another job on the VM between the two.
    pub(crate) const ARRIVAL: Duration = secs(35);
}

/// The daemon, its listeners and its threads.
pub(crate) mod daemon {
    use super::{Duration, millis, secs};

    /// How long credentials and the TPM may take to unlock providers before virtseald is ready without them: less than systemd
    /// waits for that, and libvirt's units wait for both.
    pub(crate) const FIRST_UNLOCKS: Duration = secs(20);
    /// How long calls in progress may still take when the daemon is told to end.
    pub(crate) const LAST_CALLS: Duration = secs(2);
    /// How long a line waits for a journal that takes none, before it is lost.
    pub(crate) const JOURNAL: Duration = millis(200);
    /// How long a worker waits for more to do before it ends.
    pub(crate) const KEEP_ALIVE: Duration = secs(5);
    /// How long a call waits for its turn.
    pub(crate) const TURN: Duration = secs(10);
    /// How long a reply may take until the other end has room for the whole of it.
    pub(crate) const READ_BY: Duration = secs(10);
    /// How long a reader may take until its next message is complete.
    pub(crate) const NEXT_MESSAGE: Duration = secs(30);
    /// After a connection that could not be accepted: for lack of descriptors, most likely.
    pub(crate) const NOT_ACCEPTED: Duration = millis(100);
    /// How long who closes connections waits where there is no thread to be had.
    pub(crate) const CLOSER_WITHOUT_THREAD: Duration = millis(100);
    /// How long a command waits for another one that has its VM, or begins a job.
    pub(crate) const CLAIM: Duration = secs(10);
    /// How long a job waits where there is no thread to be had.
    pub(crate) const JOB_WITHOUT_THREAD: Duration = secs(1);
}

/// The command line.
pub(crate) mod cli {
    use super::{Duration, millis, secs};

    /// How long virtseald may give no sign of life.
    pub(crate) const SILENCE: Duration = secs(5);
    /// A call that takes longer has virtseald asked for one.
    pub(crate) const ASK_AFTER: Duration = millis(500);
    /// Between two pictures of what shows that a slow call goes on.
    pub(crate) const SPIN: Duration = millis(120);
    /// What systemd may take to say what it knows of virtseald.
    pub(crate) const SYSTEMD: Duration = secs(2);
}

/// What the status is made of.
pub(crate) mod status {
    use super::{Duration, millis, secs};

    /// No look at all VMs that is answered with is older than this.
    pub(crate) const MAX_AGE: Duration = secs(2);
    /// From one look to the next, while somebody asks.
    pub(crate) const EVERY: Duration = millis(1200);
    /// After what root has changed; a host that starts many VMs is not looked at all the time.
    pub(crate) const AT_LEAST: Duration = millis(200);
    /// For how long after the last question.
    pub(crate) const ASKED: Duration = secs(20);
    /// A look that takes less is made for root each time: a status comes within 100 ms then, and no slower than one that is not.
    pub(crate) const CHEAP: Duration = millis(50);
    /// How long a question waits for a look.
    pub(crate) const PATIENCE: Duration = secs(5);
    /// How long a look waits for one file, and as long again where others have answered meanwhile.
    pub(crate) const STORAGE: Duration = secs(1);
    /// Readers share a look at the providers that is not older than this.
    pub(crate) const FRESH_PROVIDERS: Duration = secs(2);
    /// A file that was changed longer ago than this has another time of change once it is changed again, on any file system.
    pub(crate) const SETTLED: Duration = secs(2);
    /// For how long the pages after the first one are of the same look.
    pub(crate) const PAGES: Duration = secs(60);
}

/// libvirt, watched and asked.
pub(crate) mod libvirt {
    use std::ops::Range;

    use super::{Duration, millis, secs};

    /// From one attempt to connect to the next: the first, doubled up to the last.
    pub(crate) const RECONNECT: Range<Duration> = millis(400)..secs(30);
    /// How often a connection is checked.
    pub(crate) const CHECK: Duration = secs(5);
    /// How long whoever is no start waits for libvirt's pools.
    pub(crate) const POOLS: Duration = secs(2);
    /// After this the running VMs are looked at for what has no event.
    pub(crate) const ROUND: Duration = secs(30);
    /// A job on a VM that has just begun may not be in the XML yet.
    pub(crate) const JOB_IN_XML: Duration = millis(300);
    /// After events that could not be waited for.
    pub(crate) const EVENTS_FAILED: Duration = secs(1);
}

/// VMs that start with the host.
pub(crate) mod autostart {
    use std::ops::Range;

    use super::{Duration, secs};

    /// Between two looks at whether what a VM waits for has come.
    pub(crate) const LOOK: Duration = secs(2);
    /// How long the others wait for one that libvirt is starting: it may have a saved state to read.
    pub(crate) const START: Duration = secs(120);
    /// A start that was refused is tried again after this time, and after twice that, up to the limit: storage may come late.
    pub(crate) const AGAIN: Range<Duration> = secs(2)..secs(120);
    /// How often, while no provider becomes ready.
    pub(crate) const TRIES: u32 = 8;
}

/// Jobs and copies.
pub(crate) mod job {
    use std::ops::Range;

    use super::{Duration, millis, secs};

    /// A job that waits is tried again after this time, and after twice that, up to the limit.
    pub(crate) const RETRY: Range<Duration> = secs(1)..secs(60);
    /// A job that waits for the same for longer ends, and says what is left.
    pub(crate) const GIVES_UP: Duration = secs(7 * 24 * 3600);
    /// How far back the pace is measured: long enough to be steady, short enough to follow what changes.
    pub(crate) const PACE_WINDOW: Duration = secs(30);
    /// Before that, a pace is a guess.
    pub(crate) const PACE_AFTER: Duration = secs(1);
    /// How long a watched job that changes all the time is not looked at again.
    pub(crate) const LOOK: Duration = millis(200);
    /// How long one that does not change is not: that is how a listener who left is noticed.
    pub(crate) const UNCHANGED: Duration = secs(2);
    /// Between two looks at the copies: a job that is under way rings after each of its batches.
    pub(crate) const COPIES: Duration = millis(500);
    /// How long, in all, a look at the copies waits for what is done to VMs: they can wait too.
    pub(crate) const COPIES_CLAIM: Duration = secs(1);
    /// After this time a copy that could not follow is tried again, whatever has happened.
    pub(crate) const COPIES_AGAIN: Duration = secs(60);
}

/// Images in use.
pub(crate) mod image {
    use super::{Duration, millis, secs};

    /// Between two looks at whether an image is in use.
    pub(crate) const IN_USE: Duration = millis(10);
    /// How often it is asked whether to go on while qemu-img, which tells of each hundredth, has nothing to tell.
    pub(crate) const GO_ON: Duration = millis(200);
    /// How long qemu-img may read the tables of an image: 128 MiB for a tebibyte, from a slow disk.
    pub(crate) const CHECK: Duration = secs(300);
    /// How long it may take to give one another size.
    pub(crate) const RESIZE: Duration = secs(60);
    /// Between two looks at what QEMU does to a running VM's disk.
    pub(crate) const BLOCK_JOB: Duration = millis(200);
    /// How long a guest may go on writing to an image after libvirt has made an overlay of it, before QEMU writes there.
    pub(crate) const GOES_OVER: Duration = secs(10);
    /// When to go on with a VM that was switched off meanwhile.
    pub(crate) const SWITCHED_OFF: Duration = millis(500);
    /// How long a process that has nothing more to do, or was killed, may take to end before it is said to be stuck.
    pub(crate) const ENDS: Duration = secs(5);
    /// How long an image, or libvirt, is waited for where others wait for their turn.
    pub(crate) const ANSWERS: Duration = secs(10);
    /// How long storage is waited for where a command asks what else there is.
    pub(crate) const SEEN: Duration = secs(5);
    /// How long the directories that the settings name are waited for. A start waits for this too.
    pub(crate) const GROUND: Duration = secs(1);
}

/// The signature of a file.
pub(crate) mod signature {
    use super::{Duration, millis, secs};

    /// How long gpgv may take.
    pub(crate) const VERIFIED_BY: Duration = secs(20);
    /// Between two looks at whether it has ended.
    pub(crate) const LOOK: Duration = millis(5);
}

/// The keystore and the audit log.
pub(crate) mod store {
    use super::{Duration, secs};

    /// How long another's lock of the database is waited for.
    pub(crate) const BUSY: Duration = secs(2);
    /// Changes that follow each other share one checkpoint.
    pub(crate) const GATHER: Duration = secs(2);
    /// After a checkpoint that failed, or that met a reader.
    pub(crate) const CHECKPOINT_AGAIN: Duration = secs(1);
    /// How long a failed write to the audit log rests when nobody asks for it.
    pub(crate) const AUDIT_RETRY: Duration = secs(1);
    /// How long records may be written before that is noted.
    pub(crate) const AUDIT_NOTE_AFTER: Duration = secs(1);
    /// How long the note in a restored keystore may take.
    pub(crate) const RESTORED_NOTE: Duration = secs(10);
}

/// The TPM of this host.
pub(crate) mod tpm {
    use std::ops::Range;

    use super::{Duration, millis, secs};

    /// The most time for one call. A slow chip takes a second for its storage key, and may have others to serve.
    pub(crate) const CALL: Duration = secs(10);
    /// What it unlocks when the daemon starts is tried again after this, doubled up to the limit, then no more: its driver may
    /// come later than the daemon, or others use it first.
    pub(crate) const AT_START: Range<Duration> = millis(500)..secs(64);
    /// How often that is.
    pub(crate) const TRIES_AT_START: u32 = 8;
}

/// Providers of every kind.
pub(crate) mod provider {
    use std::ops::RangeInclusive;

    use super::{Duration, millis, secs};

    /// The default of `probe_interval`.
    pub(crate) const PROBE: Duration = secs(60);
    /// The first pause after a probe that went wrong; each further one doubles it, up to the interval.
    pub(crate) const PROBE_SOONEST: Duration = secs(5);
    /// What a provider's own timeout may be, in milliseconds.
    pub(crate) const TIMEOUTS_MS: RangeInclusive<u64> = 100..=60_000;
    /// How long the next address is not tried while one may still answer (RFC 8305, section 5).
    pub(crate) const HEAD_START: Duration = millis(250);
    /// How long the resolver is waited for where there is an address that was good before.
    pub(crate) const RESOLVER: Duration = secs(1);
    /// How long keys are kept for by default.
    pub(crate) const CACHE: Duration = secs(24 * 3600);
    /// For how long they may be.
    pub(crate) const CACHES: RangeInclusive<Duration> = secs(1)..=secs(366 * 86_400);
}

/// KMIP servers.
pub(crate) mod kmip {
    use std::ops::Range;

    use super::{Duration, millis, secs};

    /// The default of a provider's timeout: less than [`super::start::PROVIDER`], whose message knows nothing of nodes.
    pub(crate) const TIMEOUT_MS: u64 = 4_500;
    /// Before a request is sent again.
    pub(crate) const REPEAT: Range<Duration> = secs(1)..secs(2);
    /// What a probe may take.
    pub(crate) const PROBE: Duration = secs(3);
    /// How long the next server is not asked while one may still answer.
    pub(crate) const NEXT_SERVER: Duration = millis(250);
    /// How long a KMS may take to answer for keys that are cached; a start waits for no more of it.
    pub(crate) const RECALL_AFTER: Duration = secs(2);
    /// What a look at a server's certificate may take.
    pub(crate) const LOOK: Duration = millis(3500);
    /// What is left after it to ask who was found.
    pub(crate) const FIRST_QUESTION: Duration = millis(800);
}

/// PKCS#11 modules.
pub(crate) mod pkcs11 {
    use super::{Duration, millis, secs};

    /// The most time for one call, less than [`super::start::PROVIDER`]: this one's message says more.
    pub(crate) const CALL: Duration = millis(4500);
    /// How long a token is not looked at, whatever the pace of other providers: it may be taken out at any time.
    pub(crate) const PROBE: Duration = secs(30);
    /// How often a module is initialized anew for a missing token while it serves other tokens.
    pub(crate) const RESET: Duration = secs(30);
    /// How long calls in progress may still take when the process exits.
    pub(crate) const LAST_CALLS: Duration = secs(1);
    /// Between two looks at whether they have ended.
    pub(crate) const LAST_CALLS_LOOK: Duration = millis(1);
}

/// Vault and OpenBao.
pub(crate) mod transit {
    use super::{Duration, millis, secs};

    /// The default of a provider's timeout, less than [`super::start::PROVIDER`].
    pub(crate) const TIMEOUT_MS: u32 = 4_000;
    /// The most time to get a connection.
    pub(crate) const CONNECT: Duration = secs(2);
    /// How long a connection that nobody uses is kept.
    pub(crate) const UNUSED: Duration = secs(60);
    /// For how long a call that went well stands for a look.
    pub(crate) const FRESH: Duration = secs(30);
    /// The least time between two looks, whatever a token's lease says: one that comes to its end is due all the time.
    pub(crate) const LEAST: Duration = secs(5);
    /// The same where a token lasts no longer than a few of these.
    pub(crate) const LEAST_OF_SHORT: Duration = millis(500);
}

/// What would break one by one if somebody changed a time without its neighbours.
const _: () = {
    const fn shorter(one: Duration, other: Duration) -> bool {
        one.as_millis() < other.as_millis()
    }
    // A provider that does not answer leaves time for another, and for the record.
    assert!(shorter(start::PROVIDER, start::HOOK));
    assert!(shorter(start::RECORD, start::PROVIDER));
    // Whoever knows more of what went wrong speaks first.
    assert!(shorter(pkcs11::CALL, start::PROVIDER));
    assert!(shorter(millis(kmip::TIMEOUT_MS), start::PROVIDER));
    assert!(shorter(millis(transit::TIMEOUT_MS as u64), start::PROVIDER));
    assert!(shorter(transit::CONNECT, millis(transit::TIMEOUT_MS as u64)));
    // A TPM that hangs says so before virtseald is ready without it.
    assert!(shorter(tpm::CALL, daemon::FIRST_UNLOCKS));
    // A certificate is looked at, and its owner asked, within one call.
    assert!(kmip::LOOK.as_millis() + kmip::FIRST_QUESTION.as_millis() < kmip::TIMEOUT_MS as u128);
    // A cache answers while its KMS does not.
    assert!(shorter(kmip::RECALL_AFTER, millis(kmip::TIMEOUT_MS)));
    // libvirt waits 30 s between the two calls of its hook.
    assert!(shorter(secs(30), start::ARRIVAL));
    // Who follows a job hears of it before it takes virtseald for dead.
    assert!(shorter(job::UNCHANGED, cli::SILENCE));
    assert!(shorter(cli::ASK_AFTER, cli::SILENCE));
    // Modules end before the threads that call them are left.
    assert!(shorter(pkcs11::LAST_CALLS, daemon::LAST_CALLS));
};

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// A time in figures, or the wait for one.
    fn spells_a_time(line: &str) -> bool {
        let code = line.split("//").next().unwrap_or_default();
        [
            "from_secs",
            "from_millis",
            "from_micros",
            "from_nanos",
            "from_mins",
            "from_hours",
        ]
        .iter()
        .filter_map(|of| code.split_once(&format!("Duration::{of}(")))
        .chain(code.split_once("Duration::new("))
        .any(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()))
    }

    #[test]
    fn every_wait_has_a_name() {
        assert!(spells_a_time("sleep(Duration::from_millis(5));"));
        assert!(!spells_a_time(
            "Duration::from_millis(self.timeout_ms) // Duration::from_secs(1)"
        ));
        let plugin = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (mut open, mut read, mut found) = (
            vec![
                plugin.join("src"),
                plugin.join("../hooks/src"),
                plugin.join("../swtpm-state/src"),
            ],
            0,
            Vec::new(),
        );
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(plugin).unwrap_or(&path).display().to_string();
                let is_for_tests = [
                    "test",
                    "fixture",
                    "conformance",
                    "contract",
                    "/stand.rs",
                    "/bao.rs",
                    "/crash.rs",
                ]
                .iter()
                .any(|part| name.contains(part));
                if is_for_tests || name.ends_with("deadlines.rs") || name.ends_with("hooks/src/deadline.rs") {
                    continue;
                }
                if path.is_dir() {
                    open.push(path);
                    continue;
                }
                read += 1;
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                let lines = code.lines().zip(1..).filter(|(line, _)| spells_a_time(line));
                found.extend(lines.map(|(line, number)| format!("{name}:{number}: {line}")));
            }
        }
        assert!(read > 150, "{read} files");
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}
