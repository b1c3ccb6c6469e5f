//! Key providers.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

/// A key provider, as `virtseal provider show` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ProviderView {
    /// Its name on this host.
    pub name: String,
    /// Its UUID, the same on every host.
    pub id: String,
    /// `native`, …
    pub kind: String,
    /// NotTrusted, NotBackedUp, Locked, Unreachable, Degraded or Ready.
    pub state: String,
    /// Why, where there is more to say than the state does.
    pub reason: Option<String>,
    /// Since when it has been in this state, as far as virtseald has seen: RFC 3339, UTC.
    pub since: String,
    /// When its server or token last did as asked: RFC 3339, UTC. None if it has not since virtseald started, or if there
    /// is neither.
    pub last_answer: Option<String>,
    /// What is about to go wrong, such as a certificate that ends within 30 days.
    pub warnings: Vec<String>,
    /// How long KEKs are kept in memory, in case its servers don't answer: none, until-lock, or a time such as 24h. None
    /// where no KEK ever comes to this host.
    pub cache: Option<String>,
    /// How many are kept now.
    pub cached_keks: i64,
    /// How they are kept across a reboot besides; None if they are not.
    pub persist: Option<PersistView>,
    /// Whether new envelopes go to it.
    pub is_default: bool,
    /// How many envelopes it has a stanza in.
    pub envelopes: i64,
    /// What unlocks it on this host, as far as the daemon can tell without asking anybody.
    pub unlocked_by: Vec<String>,
    /// What the TPM of this host asks for before it unlocks it; None if it does not unlock it.
    pub tpm: Option<TpmView>,
}

/// What the TPM asks for before it unlocks a provider.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct TpmView {
    /// The PCRs that it looks at, such as 7 or 7,11; None for a damaged record.
    pub pcrs: Option<String>,
    /// The fingerprint of the key that signs what PCR 11 may be: SHA-256 of its PKCS #1 form, as systemd has it. None where
    /// all PCRs must be what they were.
    pub signed_by: Option<String>,
    /// Whether somebody must type a PIN.
    pub pin: bool,
    /// Since when: RFC 3339, UTC.
    pub since: String,
    /// Whether it has none of the newest root key: enroll again.
    pub stale: bool,
}

/// How `provider tpm --enroll` is to let the TPM unlock a provider.
#[derive(Clone, Debug, Default, Serialize, Deserialize, CustomType)]
pub struct TpmRequest {
    /// The PCRs to look at: those of the enrolment that this one replaces, or else 7, if none are given.
    pub pcrs: Option<String>,
    /// The public key, in PEM, that signs what PCR 11 may be.
    pub public_key: Option<String>,
    /// Without a PIN, though the enrolment that this one replaces has one.
    pub without_pin: bool,
}

/// How a provider's KEKs are kept across a reboot.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct PersistView {
    /// What seals them: tpm.
    pub by: String,
    /// For how long after each was last fetched, such as 24h.
    pub keep: String,
    /// The PCRs that must be what they were, such as 7 or 7,11; None for a damaged record.
    pub pcrs: Option<String>,
    /// Since when: RFC 3339, UTC.
    pub since: String,
    /// How many are kept now.
    pub keks: i64,
    /// Why they can't be opened, or no more are kept.
    pub problem: Option<String>,
}

/// How `provider cache` is to keep KEKs across a reboot.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct PersistRequest {
    /// For how long, such as 24h.
    pub keep: Option<String>,
    /// While these PCRs are what they are now: 7, if none are given.
    pub pcrs: Option<String>,
}

/// Reply with providers.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Providers {
    /// In the order of their names.
    pub providers: Vec<ProviderView>,
}

/// Which root generation a backup holds.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct BackupMade {
    /// For `ConfirmBackup`, once the file is safe on disk.
    pub generation: i64,
}

/// Reply of `provider tpm --enroll`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct TpmEnrolled {
    /// What the TPM asks for now.
    pub tpm: TpmView,
    /// Why that is worth less than it seems.
    pub warnings: Vec<String>,
}

/// Reply of `provider tpm --remove`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct TpmRemoved {
    /// Whether there was anything to remove.
    pub removed: bool,
}

/// An envelope that no VM uses.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct OrphanEnvelope {
    /// The envelope's UUID.
    pub envelope: String,
    /// Its VM's name, or UUID if no name is known.
    pub vm: String,
    /// disk, vtpm or nvram.
    pub kind: String,
    /// Where its object was.
    pub path: Option<String>,
    /// Whether there is still something.
    pub present: bool,
    /// The providers that open it.
    pub providers: Vec<String>,
}

/// A KEK that no VM's envelope needs.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct OrphanKek {
    /// Its provider.
    pub provider: String,
    /// Its name there.
    pub kek: String,
    /// How many envelopes without a VM need it.
    pub envelopes: i64,
    /// How many copies that are behind need it.
    pub copies: i64,
    /// Where it comes from: `vm-not-defined`, `copy-behind`, `retired`, or `never-used` (a seal that failed).
    pub origin: String,
}

/// Reply of `provider orphans`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Orphans {
    /// Envelopes whose VM is not defined.
    pub envelopes: Vec<OrphanEnvelope>,
    /// The KEKs that only these, or copies that are behind, need, and those that nothing here needs.
    pub keks: Vec<OrphanKek>,
    /// Records that can't be read, and may belong here, with what to do.
    pub damaged: Vec<String>,
    /// What to ask for those after these, if there are more.
    pub next: Option<String>,
}
