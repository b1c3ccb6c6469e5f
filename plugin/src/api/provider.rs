//! Key providers.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use super::{FindingView, OrNewer};
use crate::model::cache_policy::{CachePolicy, KeepTime};
use crate::model::envelope::ObjectKind;

/// What is behind a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum ProviderKind {
    Native,
    Kmip,
    Pkcs11,
    Transit,
}

/// Whether a provider can be used, from worst to best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum ProviderState {
    /// Trust is not established both ways.
    NotTrusted,
    /// Able to unwrap, refuses to wrap until a backup was made.
    NotBackedUp,
    /// Refuses until unlocked.
    Locked,
    /// Does not answer.
    Unreachable,
    /// Answers, with something wrong.
    Degraded,
    /// Wraps and unwraps.
    Ready,
}

/// What unlocks a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum CredentialKind {
    Passphrase,
    /// Of a token.
    Pin,
    /// A token of Vault or OpenBao.
    Token,
    SecretId,
    /// A client's private key and certificate, in PEM.
    ClientKey,
}

impl CredentialKind {
    /// Whether an unlock with it counts for one that is unlocked: the server gives out another one from time to time.
    pub(crate) fn takes_the_place_of_another(self) -> bool {
        matches!(self, Self::Token | Self::SecretId | Self::ClientKey)
    }
}

/// What encrypts the KEKs that are kept on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum PersistedBy {
    Tpm,
}

/// Where a KEK comes from that no VM of this host needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum KekOrigin {
    /// Envelopes whose VM is not defined here need it.
    VmNotDefined,
    /// Copies need it that are behind.
    CopyBehind,
    /// A job has left it.
    Retired,
    /// A seal that failed has made it.
    NeverUsed,
}

/// A key provider, as `virtseal provider show` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct ProviderView {
    /// Its name on this host.
    pub name: String,
    /// Its UUID, the same on every host.
    pub id: String,
    pub kind: OrNewer<ProviderKind>,
    pub state: OrNewer<ProviderState>,
    /// Why, where there is more to say than the state does.
    pub reason: Option<String>,
    /// Since when it has been in this state, as far as virtseald has seen: RFC 3339, UTC.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub since: String,
    /// When its server or token last did as asked: RFC 3339, UTC. None if it has not since virtseald started, or if there
    /// is neither.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub last_answer: Option<String>,
    /// What is about to go wrong, such as a certificate that ends within 30 days.
    pub warnings: Vec<FindingView>,
    /// How long KEKs are kept in memory, in case its servers don't answer: none, until-lock, or a time such as 24h. None
    /// where no KEK ever comes to this host.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    pub cache: Option<OrNewer<CachePolicy>>,
    /// How many are kept now.
    pub cached_keks: i64,
    /// How they are kept across a reboot besides; None if they are not.
    pub persist: Option<PersistView>,
    /// Whether new envelopes go to it.
    pub is_default: bool,
    /// How many envelopes it has a stanza in.
    pub envelopes: i64,
    /// What an unlock needs; None where there is nothing to give.
    pub asks_for: Option<OrNewer<CredentialKind>>,
    /// What unlocks it on this host, as far as the daemon can tell without asking anybody.
    pub unlocked_by: Vec<String>,
    /// What the TPM of this host asks for before it unlocks it; None if it does not unlock it.
    pub tpm: Option<TpmView>,
    /// Its settings, in the order in which they are shown.
    pub settings: Vec<SettingView>,
    /// What is known of its servers or token, and of the trust between them and this host.
    pub details: Vec<DetailView>,
}

/// One setting of a provider.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct SettingView {
    /// As `provider set` takes it.
    pub key: String,
    /// None where it is not set, and has no default.
    pub value: Option<String>,
    /// Whether `provider set` changes it.
    pub settable: bool,
    /// What changes it otherwise, or why nothing does.
    pub note: Option<String>,
}

/// Something that is known of a provider.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct DetailView {
    /// What it is about: server, trusts, identity, token.
    pub what: String,
    pub said: String,
}

/// A new value of a setting.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct SettingAssigned {
    pub key: String,
    /// Empty: its default.
    pub value: String,
}

/// What `provider set` asks for.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct SettingsRequest {
    pub assigned: Vec<SettingAssigned>,
    /// Without connecting with them first.
    pub no_probe: bool,
}

/// Reply of `provider set`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct SettingsSet {
    /// The provider with its new settings.
    pub provider: ProviderView,
    /// Whether anything changed.
    pub changed: bool,
    /// Whether this host has connected with them, and what is sealed has opened.
    pub tried: bool,
    /// What to mind.
    pub warnings: Vec<FindingView>,
}

/// What the TPM asks for before it unlocks a provider.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct TpmView {
    /// The PCRs that it looks at, such as 7 or 7,11; None for a damaged record.
    pub pcrs: Option<String>,
    /// The fingerprint of the key that signs what PCR 11 may be: SHA-256 of its PKCS #1 form, as systemd has it. None where
    /// all PCRs must be what they were.
    pub signed_by: Option<String>,
    /// Whether somebody must type a PIN.
    pub pin: bool,
    /// Since when: RFC 3339, UTC.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub since: String,
    /// Whether it has none of the newest root key: enroll again.
    pub stale: bool,
}

/// How `provider tpm --enroll` is to let the TPM unlock a provider.
#[derive(Clone, Debug, Default, Serialize, Deserialize, CustomType)]
pub(crate) struct TpmRequest {
    /// The PCRs to look at: those of the enrolment that this one replaces, or else 7, if none are given.
    pub pcrs: Option<String>,
    /// The public key, in PEM, that signs what PCR 11 may be.
    pub public_key: Option<String>,
    /// Without a PIN, though the enrolment that this one replaces has one.
    pub without_pin: bool,
    /// Whether what unlocks the provider comes first among the descriptors.
    pub with_credential: bool,
}

/// How a provider's KEKs are kept across a reboot.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct PersistView {
    pub by: OrNewer<PersistedBy>,
    /// For how long after each was last fetched, such as 24h.
    #[cfg_attr(test, schemars(with = "String"))]
    pub keep: OrNewer<KeepTime>,
    /// The PCRs that must be what they were, such as 7 or 7,11; None for a damaged record.
    pub pcrs: Option<String>,
    /// Since when: RFC 3339, UTC.
    #[cfg_attr(test, schemars(extend("format" = "date-time", "pattern" = "Z$")))]
    pub since: String,
    /// How many are kept now.
    pub keks: i64,
    /// Why they can't be opened, or no more are kept.
    pub problem: Option<String>,
}

/// How `provider cache` is to keep KEKs across a reboot.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct PersistRequest {
    /// For how long, such as 24h.
    pub keep: Option<KeepTime>,
    /// While these PCRs are what they are now: 7, if none are given.
    pub pcrs: Option<String>,
}

/// Reply with providers.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Providers {
    /// In the order of their names.
    pub providers: Vec<ProviderView>,
}

/// Reply of what changes providers.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct ProvidersChanged {
    /// As they are now.
    pub providers: Vec<ProviderView>,
    /// Whether they were otherwise before.
    pub changed: bool,
}

/// Reply of what has nothing to tell but this.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, Type)]
pub(crate) struct Changed {
    /// Whether it was not so before.
    pub changed: bool,
}

/// Reply of `provider default`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct DefaultSet {
    /// Whether it was not the default before.
    pub changed: bool,
    /// Why nothing can be sealed now, if so.
    pub warnings: Vec<FindingView>,
}

/// Which root generation a backup holds.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct BackupMade {
    /// For `ConfirmBackup`, once the file is safe on disk.
    pub generation: i64,
}

/// Reply of `provider tpm --enroll`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct TpmEnrolled {
    /// What the TPM asks for now.
    pub tpm: TpmView,
    /// Why that is worth less than it seems.
    pub warnings: Vec<FindingView>,
}

/// An envelope that no VM uses.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct OrphanEnvelope {
    /// The envelope's UUID.
    pub envelope: String,
    /// Its VM's name, or UUID if no name is known.
    pub vm: String,
    pub kind: OrNewer<ObjectKind>,
    /// Where its object was.
    pub path: Option<String>,
    /// Whether there is still something.
    pub present: bool,
    /// Whether its VM is defined, and does without it.
    pub vm_defined: bool,
    /// The providers that open it.
    pub providers: Vec<String>,
}

/// A KEK that no VM's envelope needs.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct OrphanKek {
    pub provider: String,
    /// Its name there.
    pub kek: String,
    /// How many envelopes without a VM need it.
    pub envelopes: i64,
    /// How many copies that are behind need it.
    pub copies: i64,
    pub origin: OrNewer<KekOrigin>,
}

/// Reply of `provider orphans`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Orphans {
    /// Envelopes whose VM is not defined, or whose image is gone while no VM names it.
    pub envelopes: Vec<OrphanEnvelope>,
    /// The KEKs that only these, or copies that are behind, need, and those that nothing here needs.
    pub keks: Vec<OrphanKek>,
    /// Records that can't be read, and may belong here, with what to do.
    pub damaged: Vec<FindingView>,
    /// What to ask for those after these, if there are more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(skip))]
    pub next: Option<String>,
}
