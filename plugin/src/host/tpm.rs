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

mod digest;
mod policy;
mod session;
mod signed;
#[cfg(test)]
pub(crate) mod stand;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tss_esapi::TctiNameConf;
use zeroize::Zeroize;

use crate::secret::SecretBytes;
use session::Session;
use signed::Signatures;

pub use policy::{BindPolicy, PolicyError};
pub use signed::{NotASigningKey, SigningKey, Unsigned};

/// How to reach a TPM, as the TCG's TSS names it: `device:/dev/tpmrm0`, `tabrmd`, `swtpm:host=…,port=…`,
/// `mssim:host=…,port=…`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Tcti(String);

impl Default for Tcti {
    fn default() -> Self {
        Self("device:/dev/tpmrm0".to_owned())
    }
}

impl fmt::Display for Tcti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a [`Tcti`].
#[derive(Debug, Error)]
#[error(
    "'{0}' is no way to a TPM: it is device:/dev/tpmrm0, tabrmd, swtpm:host=HOST,port=PORT or mssim:host=HOST,port=PORT"
)]
pub struct NotATcti(String);

impl FromStr for Tcti {
    type Err = NotATcti;

    fn from_str(text: &str) -> Result<Self, NotATcti> {
        match text.parse::<TctiNameConf>() {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(_) => Err(NotATcti(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Tcti {
    type Error = NotATcti;

    fn try_from(text: String) -> Result<Self, NotATcti> {
        text.parse()
    }
}

impl Tcti {
    /// Says more of a device that can't be used than the library does, which knows one error for all.
    fn check_device(&self) -> Result<(), TpmError> {
        let Some(path) = self.0.strip_prefix("device:") else {
            return Ok(());
        };
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TpmError::NoDevice(path.to_owned()),
                Some(libc::EBUSY) => TpmError::Busy(path.to_owned()),
                _ => TpmError::Device {
                    path: path.to_owned(),
                    source: error,
                },
            }),
        }
    }
}

/// Which PCRs a policy looks at, such as `7` or `7,11`; systemd's `7+11` is read too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcrList(BTreeSet<u8>);

impl Default for PcrList {
    /// PCR 7: whether Secure Boot is on, and whose keys it trusts.
    fn default() -> Self {
        Self(BTreeSet::from([7]))
    }
}

impl fmt::Display for PcrList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, pcr) in self.0.iter().enumerate() {
            write!(f, "{}{pcr}", if nth == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// The text is not a [`PcrList`].
#[derive(Debug, Error)]
#[error(
    "'{0}' is no list of PCRs: give numbers from 0 to 22, such as 7 or 4,7; not 16, which anybody can reset"
)]
pub struct NotAPcrList(String);

impl PcrList {
    /// How many PCRs a TPM of a PC has (TCG PC Client Platform TPM Profile).
    const COUNT: u8 = 24;

    /// Whether 11 is among them, which a kernel's signature may cover.
    #[must_use]
    pub fn has_kernel(&self) -> bool {
        self.0.contains(&digest::KERNEL)
    }

    /// The others than 11, if there are any.
    #[must_use]
    pub fn without_kernel(&self) -> Option<Self> {
        let others: BTreeSet<_> = self
            .0
            .iter()
            .copied()
            .filter(|pcr| *pcr != digest::KERNEL)
            .collect();
        Some(Self(others)).filter(|list| !list.0.is_empty())
    }

    /// Whether 7 is among them.
    #[must_use]
    pub fn has_secure_boot(&self) -> bool {
        self.0.contains(&7)
    }

    /// Those that each update of a kernel, an initrd or a boot loader changes, and that no signature covers.
    #[must_use]
    pub fn changed_by_updates(&self) -> Option<Self> {
        Some(policy::changed_by_updates(self)).filter(|list| !list.0.is_empty())
    }
}

impl FromStr for PcrList {
    type Err = NotAPcrList;

    fn from_str(text: &str) -> Result<Self, NotAPcrList> {
        text.split([',', '+'])
            .map(|number| {
                number
                    .trim()
                    .parse::<u8>()
                    .ok()
                    .filter(|pcr| *pcr <= 22 && *pcr != 16)
            })
            .collect::<Option<BTreeSet<u8>>>()
            .map(Self)
            .ok_or_else(|| NotAPcrList(text.to_owned()))
    }
}

/// What was bound, with everything but the TPM that it takes to open it. Not secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundToTpm {
    version: u32,
    parent: Parent,
    /// The name (TPM 2.0 Library, Part 1, "Names") of the storage key: it tells one TPM from another.
    #[serde(with = "in_hex")]
    parent_name: Vec<u8>,
    /// What the PCRs were that must stay so, to be able to say which of them differ.
    pcrs: BTreeMap<u8, String>,
    /// From version 2: the public key (a SubjectPublicKeyInfo) that signs what PCR 11 may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signed_by: Option<Hex>,
    /// From version 2: the salt of its PIN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pin_salt: Option<Hex>,
    /// A marshalled TPMT_PUBLIC.
    #[serde(with = "in_hex")]
    public: Vec<u8>,
    /// The buffer of a TPM2B_PRIVATE.
    #[serde(with = "in_hex")]
    private: Vec<u8>,
}

/// As `in_hex`, for what may be absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Hex(#[serde(with = "in_hex")] Vec<u8>);

/// Bytes as hex digits in JSON.
mod in_hex {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// The storage key that it is sealed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Parent {
    /// The persistent one at 0x81000001 (TCG TPM v2.0 Provisioning Guidance), which operating systems make.
    Persistent,
    /// One that is made anew for each call, always the same: from the template below under the owner's seed.
    FromSeed,
}

impl BoundToTpm {
    /// The latest form, and the one of a policy of PCRs alone, which earlier releases open too.
    const VERSION: u32 = 2;
    const FIRST_VERSION: u32 = 1;
    /// More than any TPM writes.
    const MAX_BYTES: usize = 16 * 1024;

    /// As it is stored: JSON.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of numbers and texts has a JSON form")
    }

    /// Reads what [`BoundToTpm::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`TpmError::Damaged`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TpmError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(TpmError::Damaged);
        }
        let bound: Self = serde_json::from_slice(bytes).map_err(|_| TpmError::Damaged)?;
        let of_pcrs_alone = bound.signed_by.is_none() && bound.pin_salt.is_none();
        let fits = match bound.version {
            Self::FIRST_VERSION => of_pcrs_alone,
            Self::VERSION => bound.signing_key().is_ok(),
            _ => false,
        };
        let pcrs_exist = bound.pcrs.keys().all(|pcr| *pcr < PcrList::COUNT);
        if fits && pcrs_exist && !bound.pcrs().0.is_empty() {
            Ok(bound)
        } else {
            Err(TpmError::Damaged)
        }
    }

    /// The PCRs that its policy looks at.
    #[must_use]
    pub fn pcrs(&self) -> PcrList {
        let signed = self.signed_by.as_ref().map(|_| digest::KERNEL);
        PcrList(self.exact().0.into_iter().chain(signed).collect())
    }

    /// The PCRs that must be what they were.
    fn exact(&self) -> PcrList {
        PcrList(self.pcrs.keys().copied().collect())
    }

    /// Those of its PCRs that nothing was measured into when it was sealed: they tell no boot from another.
    #[must_use]
    pub fn unmeasured(&self) -> Option<PcrList> {
        let zero = "0".repeat(64);
        let zeros = self.pcrs.iter().filter(|(_, value)| **value == zero);
        Some(PcrList(zeros.map(|(pcr, _)| *pcr).collect())).filter(|list| !list.0.is_empty())
    }

    /// Who signs what PCR 11 may be, if it is among them by way of that.
    #[must_use]
    pub fn signed_by(&self) -> Option<SigningKey> {
        self.signing_key().ok().flatten()
    }

    fn signing_key(&self) -> Result<Option<SigningKey>, NotASigningKey> {
        let der = self.signed_by.as_ref();
        der.map(|der| SigningKey::from_der(&der.0)).transpose()
    }

    /// Whether somebody must type a PIN.
    #[must_use]
    pub fn needs_pin(&self) -> bool {
        self.pin_salt.is_some()
    }

    /// The same policy, for something else to be bound; with `pin` where it needs one.
    #[must_use]
    pub fn policy(&self, pin: Option<&Arc<SecretBytes>>) -> BindPolicy {
        let pin = pin.filter(|_| self.needs_pin()).cloned();
        BindPolicy::of_record(self.pcrs(), self.signed_by()).with_pin(pin)
    }
}

/// Why the TPM did not do as asked. The caller adds what it was for.
#[derive(Debug, Error)]
pub enum TpmError {
    /// No such device.
    #[error("this host has no TPM at {0}")]
    NoDevice(String),
    /// Somebody else has the device, which is not the resource manager's.
    #[error("{0} is in use by another program: use device:/dev/tpmrm0, which many can share")]
    Busy(String),
    /// The device can't be opened.
    #[error("can't open {path}")]
    Device {
        /// The device.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The library can't reach it.
    #[error("can't reach the TPM at {0}")]
    Unreachable(Tcti, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The connection broke.
    #[error("the TPM stopped answering")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It did not answer in time.
    #[error("the TPM did not answer within {:.1} s", .0.as_secs_f64())]
    Silent(Duration),
    /// Another storage key than the one it was sealed under.
    #[error("this is not the TPM that sealed it, or it was cleared since")]
    AnotherTpm,
    /// The host did not boot as it did then.
    #[error("{} from when it was enrolled", differ(.0))]
    PcrsDiffer(PcrList),
    /// It has no such PCRs.
    #[error("the TPM has no PCR {0} in its SHA-256 bank")]
    NoSuchPcr(PcrList),
    /// No signature by the enrolled key covers what PCR 11 is.
    #[error("what PCR 11 is now is not signed by the key {key}: {why}")]
    NotSigned {
        /// Its fingerprint.
        key: String,
        /// What was found instead.
        why: Unsigned,
    },
    /// Nobody has given one.
    #[error("it needs its PIN")]
    NeedsPin,
    /// Another PIN than the one it was enrolled with.
    #[error("the TPM does not accept this PIN{}", tries_left(*.left))]
    WrongPin {
        /// Tries before the TPM locks itself, if it tells.
        left: Option<u32>,
    },
    /// Too many wrong passwords or PINs, by anybody.
    #[error(
        "the TPM is locked out after too many wrong PINs or passwords, {}: tpm2_dictionarylockout --clear-lockout ends \
         that at once",
        heals(*.one_more_in)
    )]
    LockedOut {
        /// After so long it allows one more try, if it tells.
        one_more_in: Option<Duration>,
    },
    /// Its owner has set a password.
    #[error(
        "the owner of the TPM has set a password, and there is no storage root key that works without it: \
         make one (tpm2_createprimary -C o -P PASSWORD -c srk.ctx && tpm2_evictcontrol -C o -P PASSWORD -c srk.ctx 0x81000001)"
    )]
    OwnerPassword,
    /// All of its handles are taken.
    #[error("the TPM has no room for one more key or session: another program holds them")]
    Full,
    /// It is off, or failed its self-test.
    #[error("the TPM is disabled, not started, or has failed its self-test")]
    OutOfOrder,
    /// What is stored is not what the TPM returned.
    #[error("what the TPM has sealed is damaged")]
    Damaged,
    /// More than a TPM takes.
    #[error("a TPM binds at most {} bytes", Tpm::MAX_BYTES)]
    TooLong,
    /// Anything else.
    #[error("the TPM failed: {doing}")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// What the library says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A failure of this host.
    #[error("no memory or no thread for a call to the TPM")]
    Host(#[source] io::Error),
}

impl TpmError {
    /// Whether it may go away by waiting.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::NoDevice(_)
                | Self::Busy(_)
                | Self::Unreachable(..)
                | Self::Lost(_)
                | Self::Silent(_)
                | Self::Full
        )
    }
}

fn tries_left(left: Option<u32>) -> String {
    match left {
        None => String::new(),
        Some(0) => "; no try is left, it locks itself now".to_owned(),
        Some(1) => "; one try is left before it locks itself".to_owned(),
        Some(left) => format!("; {left} tries are left before it locks itself"),
    }
}

fn heals(one_more_in: Option<Duration>) -> String {
    match one_more_in {
        None => "and takes none for now".to_owned(),
        Some(time) if time.is_zero() => "and stays so".to_owned(),
        Some(time) if time.as_secs() < 120 => {
            format!("and takes one more in {} s at the most", time.as_secs())
        }
        Some(time) => format!(
            "and takes one more in {} minutes at the most",
            time.as_secs().div_ceil(60)
        ),
    }
}

fn differ(pcrs: &PcrList) -> String {
    match pcrs.0.len() {
        1 => format!("PCR {pcrs} differs"),
        _ => format!("PCRs {pcrs} differ"),
    }
}

/// The TPM of this host. Nothing is opened before the first call, and nothing stays open after one.
#[derive(Debug)]
pub struct Tpm {
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
    pub const MAX_BYTES: usize = 128;

    /// The most time for one call. A slow chip takes a second for its storage key, and may have others to serve.
    pub const DEADLINE: Duration = Duration::from_secs(10);

    /// The TPM behind `tcti`; no call takes longer than `deadline`.
    #[must_use]
    pub fn new(tcti: Tcti, deadline: Duration) -> Self {
        Self {
            tcti,
            deadline,
            root: "/".into(),
            turn: Arc::default(),
        }
    }

    /// The same, with another root directory to look for signatures in.
    #[cfg(test)]
    pub(crate) fn with_root(self, root: &std::path::Path) -> Self {
        Self {
            root: root.to_owned(),
            ..self
        }
    }

    /// How it is reached.
    #[must_use]
    pub fn tcti(&self) -> &Tcti {
        &self.tcti
    }

    /// Binds `secret` to this TPM by `policy`. Only [`Tpm::open`] tells whether that can be satisfied, and the caller has it do
    /// so before it relies on it.
    ///
    /// # Errors
    /// [`TpmError::TooLong`], or why the TPM does not.
    pub fn bind(&self, secret: &Arc<SecretBytes>, policy: &BindPolicy) -> Result<BoundToTpm, TpmError> {
        if secret.expose().len() > Self::MAX_BYTES {
            return Err(TpmError::TooLong);
        }
        let (secret, policy) = (Arc::clone(secret), policy.clone());
        self.call(move |session| session.seal(&secret, &policy))
    }

    /// Opens what [`Tpm::bind`] returned, with `pin` if it needs one. Without one the TPM is not asked.
    ///
    /// # Errors
    /// [`TpmError::PcrsDiffer`], [`TpmError::AnotherTpm`], [`TpmError::NeedsPin`], [`TpmError::WrongPin`],
    /// [`TpmError::LockedOut`], [`TpmError::NotSigned`], or why else the TPM does not.
    pub fn open(&self, bound: &BoundToTpm, pin: Option<&Arc<SecretBytes>>) -> Result<SecretBytes, TpmError> {
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
            session.unseal(&bound, pin.as_deref(), &signatures)
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
