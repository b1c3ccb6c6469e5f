//! The host's TPM 2.0: binds up to 128 bytes so that only this machine, in the state it is in now, opens them.
//!
//! What is bound is a keyed-hash object (TPM 2.0 Library, Part 1, "Sealed Data") under the storage root key of the
//! owner hierarchy, with a policy over PCRs of the SHA-256 bank (see [`BindPolicy`]) and no other way to authorize. On the way to the chip
//! and back it is encrypted (a session salted with that storage key, AES-128-CFB), and the key's name is remembered, so
//! that neither a listener on the bus nor a chip put in its place learns it.
//!
//! Nothing stays behind in the TPM: every handle and session of a call is flushed before it returns. A call runs on a
//! thread of its own, one at a time, with a deadline. This module is the only one that knows `tss-esapi`, which zeroizes
//! what it holds itself (`SensitiveData`); the buffers of the C library are overwritten when they are freed
//! (`M_PERTURB`, see [`crate::host::process`]), those of the thread's own cache when it ends, and its stack is scrubbed here.

mod bound;
mod digest;
mod error;
mod pcr_list;
mod policy;
mod session;
mod signed;
mod tcti;
mod template;
mod tss_error;

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use zeroize::Zeroize;

use crate::secret::SecretBytes;
use session::Session;
use signed::Signatures;

pub(crate) use bound::BoundToTpm;
pub(crate) use error::TpmError;
pub(crate) use pcr_list::PcrList;
pub(crate) use policy::BindPolicy;
pub(crate) use signed::SigningKey;
pub(crate) use tcti::Tcti;

/// The TPM of this host. Nothing is opened before the first call, and nothing stays open after one.
#[derive(Debug)]
pub(crate) struct Tpm {
    tcti: Tcti,
    deadline: Duration,
    /// Below which signatures of PCRs are looked for.
    root: PathBuf,
    turn: Arc<Turn>,
}

/// One call at a time: without a resource manager a TPM has room for three keys, and a simulator for one connection.
#[derive(Debug, Default)]
struct Turn {
    taken: Mutex<()>,
    running: Mutex<Running>,
}

/// The call whose turn it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Running {
    #[default]
    None,
    InTime,
    /// Somebody has given up waiting for it.
    Late,
}

impl Tpm {
    /// The most bytes that can be bound (TPM 2.0 Library, MAX_SYM_DATA).
    pub(crate) const MAX_BYTES: usize = 128;

    /// The TPM behind `tcti`; no call takes longer than `deadline`.
    pub(crate) fn new(tcti: Tcti, deadline: Duration) -> Self {
        Self {
            tcti,
            deadline,
            root: "/".into(),
            turn: Arc::default(),
        }
    }

    #[cfg(test)]
    pub(crate) fn of(swtpm: &virtseal_testkit::Swtpm) -> Self {
        Self::new(
            swtpm.tcti().parse().unwrap(),
            crate::model::deadlines::tpm::CALL * 3,
        )
    }

    /// The same, with another root directory to look for signatures in.
    #[cfg(test)]
    pub(crate) fn with_root(self, root: &std::path::Path) -> Self {
        Self {
            root: root.to_owned(),
            ..self
        }
    }

    /// Binds `secret` to this TPM by `policy`. Only [`Tpm::open`] tells whether that can be satisfied, and the caller has it do
    /// so before it relies on it.
    ///
    /// # Errors
    /// [`TpmError::TooLong`], or why the TPM does not.
    pub(crate) fn bind(
        &self,
        secret: &Arc<SecretBytes>,
        policy: &BindPolicy,
    ) -> Result<BoundToTpm, TpmError> {
        if secret.expose().len() > Self::MAX_BYTES {
            return Err(TpmError::TooLong);
        }
        let (secret, policy) = (Arc::clone(secret), policy.clone());
        self.call(move |session| session.bind(&secret, &policy))
    }

    /// Opens what [`Tpm::bind`] returned, with `pin` if it needs one. Without one the TPM is not asked.
    ///
    /// # Errors
    /// [`TpmError::PcrsDiffer`], [`TpmError::AnotherTpm`], [`TpmError::NeedsPin`], [`TpmError::WrongPin`],
    /// [`TpmError::LockedOut`], [`TpmError::NotSigned`], or why else the TPM does not.
    pub(crate) fn open(
        &self,
        bound: &BoundToTpm,
        pin: Option<&Arc<SecretBytes>>,
    ) -> Result<SecretBytes, TpmError> {
        let pin = pin.filter(|_| bound.needs_pin()).cloned();
        if bound.needs_pin() && pin.is_none() {
            return Err(TpmError::NeedsPin);
        }
        let (bound, root) = (bound.clone(), self.root.clone());
        self.call(move |session| {
            let signatures = match bound.signed_by {
                Some(_) => Signatures::read(&root),
                None => Signatures::default(),
            };
            session.open_bound(&bound, pin.as_deref(), &signatures)
        })
    }

    fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Session) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        // One that hangs already takes all that come after it along: no thread for each of them.
        if *self.turn.running() == Running::Late {
            return Err(TpmError::Silent(self.deadline));
        }
        let (sender, receiver) = sync_channel(1);
        let (turn, tcti) = (Arc::clone(&self.turn), self.tcti.clone());
        std::thread::Builder::new()
            .name("tpm".to_owned())
            .spawn(move || {
                let done = turn.take(|| {
                    let mut session = Session::open(&tcti)?;
                    work(&mut session).map_err(|error| session.explained(error))
                });
                scrub_stack();
                // Nobody waits any more when this fails; what is in it is wiped then.
                let _ = sender.send(done);
            })
            .map_err(TpmError::Host)?;
        match receiver.recv_timeout(self.deadline) {
            Ok(done) => done,
            Err(RecvTimeoutError::Timeout) => {
                self.turn.is_late();
                Err(TpmError::Silent(self.deadline))
            }
            Err(RecvTimeoutError::Disconnected) => Err(TpmError::Host(io::Error::other("its thread ended"))),
        }
    }
}

impl Turn {
    fn take<T>(&self, work: impl FnOnce() -> T) -> T {
        let _turn = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *self.running() = Running::InTime;
        let _ended = Ended(self);
        work()
    }

    fn is_late(&self) {
        let mut running = self.running();
        if *running == Running::InTime {
            *running = Running::Late;
        }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a call, also of one that panics: else one that was late by then would stop all to come.
struct Ended<'a>(&'a Turn);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        *self.0.running() = Running::None;
    }
}

/// The library's structures are passed by value, and hold what is sealed.
#[inline(never)]
fn scrub_stack() {
    let mut deeper = [0_u8; 64 * 1024];
    deeper.zeroize();
    std::hint::black_box(&deeper);
}

#[cfg(test)]
mod tests;
