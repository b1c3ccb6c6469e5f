//! One connection to the TPM, and the commands of a seal or an unseal. Dropping it flushes what it has loaded.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::time::Duration;

use tss_esapi::attributes::{ObjectAttributesBuilder, SessionAttributesBuilder};
use tss_esapi::constants::response_code::{Tss2ResponseCode, Tss2ResponseCodeKind as Kind};
use tss_esapi::constants::{CapabilityType, PropertyTag, SessionType};
use tss_esapi::handles::{KeyHandle, PersistentTpmHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    self, Auth, CapabilityData, Digest, EccPoint, HashScheme, KeyedHashScheme, Name, Nonce, PcrSelectionList,
    PcrSelectionListBuilder, PcrSlot, Private, Public, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyRsa, PublicKeyedHashParameters, PublicRsaParametersBuilder, RsaExponent, RsaScheme,
    RsaSignature, SensitiveData, SymmetricDefinition, SymmetricDefinitionObject, TaggedProperty,
    VerifiedTicket,
};
use tss_esapi::traits::{Marshall, UnMarshall};
use tss_esapi::{Context, Error};

use super::digest::PolicyDigest;
use super::policy::{BindPolicy, PinSalt};
use super::signed::{Signature, Signatures, SigningKey};
use super::{BoundToTpm, Hex, Parent, PcrList, Tcti, TpmError};
use crate::secret::SecretBytes;

/// Where the TCG wants an operating system to keep the storage root key.
const STORAGE_ROOT_KEY: u32 = 0x8100_0001;

pub(super) struct Session {
    context: Context,
}

/// A signature that the TPM has verified.
struct Approval {
    signature: Signature,
    /// The name of the key.
    key: Name,
    ticket: VerifiedTicket,
}

impl Session {
    pub(super) fn open(tcti: &Tcti) -> Result<Self, TpmError> {
        tcti.check_device()?;
        let unreachable = |error: Error| TpmError::Unreachable(tcti.clone(), described(error));
        let conf = tcti.0.parse().map_err(unreachable)?;
        Ok(Self {
            context: Context::new(conf).map_err(unreachable)?,
        })
    }

    pub(super) fn seal(&mut self, secret: &SecretBytes, policy: &BindPolicy) -> Result<BoundToTpm, TpmError> {
        let values = self.pcr_values(&policy.exact())?;
        let digest = self.policy_digest(policy, &values)?;
        let salt = policy.pin().map(|_| PinSalt::random()).transpose();
        let salt = salt.map_err(|error| deriving(error.into()))?;
        let pin = salt.as_ref().zip(policy.pin());
        let auth = pin.map(|(salt, pin)| auth(salt, pin)).transpose()?;
        let (parent, key) = self.storage_key()?;
        let encrypted = self.encrypted_session(key, true)?;
        let data = SensitiveData::try_from(secret.expose()).map_err(failed("handing over what to seal"))?;
        let guesses = match auth {
            Some(_) => Guesses::Count,
            None => Guesses::NoneToMake,
        };
        let template = sealed_object(digest, guesses).map_err(failed("describing what to seal"))?;
        let created = self
            .context
            .execute_with_session(Some(encrypted), |context| {
                context.create(key, template, auth, Some(data), None, None)
            })
            .map_err(failed("sealing"))?;
        let of_pcrs_alone = policy.signed_by().is_none() && salt.is_none();
        Ok(BoundToTpm {
            version: match of_pcrs_alone {
                true => BoundToTpm::FIRST_VERSION,
                false => BoundToTpm::VERSION,
            },
            signed_by: policy.signed_by().map(|key| Hex(key.to_der())),
            pin_salt: salt.map(|salt| Hex(salt.0)),
            parent,
            parent_name: self.name(key)?,
            pcrs: values
                .into_iter()
                .map(|(pcr, value)| (pcr, hex::encode(value)))
                .collect(),
            public: created
                .out_public
                .marshall()
                .map_err(failed("reading what was sealed"))?,
            private: created.out_private.value().to_vec(),
        })
    }

    /// `pin` is there if `sealed` needs one.
    pub(super) fn unseal(
        &mut self,
        sealed: &BoundToTpm,
        pin: Option<&SecretBytes>,
        signatures: &Signatures,
    ) -> Result<SecretBytes, TpmError> {
        let key = match sealed.parent {
            Parent::Persistent => self.persistent()?.ok_or(TpmError::AnotherTpm)?,
            Parent::FromSeed => self.derived()?,
        };
        if self.name(key)? != sealed.parent_name {
            return Err(TpmError::AnotherTpm);
        }
        let approval = self.approval(sealed, signatures)?;
        let loaded = self.load(key, sealed)?;
        let policy = self.policy_session(key)?;
        self.satisfy(policy, sealed, approval)?;
        if let Some((Hex(salt), pin)) = sealed.pin_salt.as_ref().zip(pin) {
            let auth = auth(&PinSalt(salt.clone()), pin)?;
            self.context
                .tr_set_auth(loaded.into(), auth)
                .map_err(failed("handing over the PIN"))?;
        }
        let encrypted = self.encrypted_session(key, false)?;
        let sessions = (Some(AuthSession::from(policy)), Some(encrypted), None);
        let unsealed = self
            .context
            .execute_with_sessions(sessions, |context| context.unseal(loaded.into()));
        match unsealed {
            Ok(data) => {
                let mut secret = SecretBytes::zeroed(data.value().len()).map_err(TpmError::Host)?;
                secret.expose_mut().copy_from_slice(data.value());
                Ok(secret)
            }
            Err(error) if kind(error) == Some(Kind::PolicyFail) => Err(self.difference(sealed)?),
            Err(error) if matches!(kind(error), Some(Kind::AuthFail | Kind::BadAuth)) => {
                Err(TpmError::WrongPin { left: None })
            }
            Err(error) => Err(failed("unsealing")(error)),
        }
    }

    fn load(&mut self, key: KeyHandle, sealed: &BoundToTpm) -> Result<KeyHandle, TpmError> {
        let public = Public::unmarshall(&sealed.public).map_err(|_| TpmError::Damaged)?;
        let private = Private::try_from(&sealed.private[..]).map_err(|_| TpmError::Damaged)?;
        let encrypted = self.encrypted_session(key, true)?;
        let loaded = self
            .context
            .execute_with_session(Some(encrypted), |context| context.load(key, private, public));
        // Many a TPM has room for three sessions, and two are to come.
        self.context
            .flush_context(SessionHandle::from(encrypted).into())
            .map_err(failed("ending a session"))?;
        loaded.map_err(|error| match kind(error) {
            // The storage key is the one that it was sealed under.
            Some(
                Kind::Integrity
                | Kind::Size
                | Kind::Value
                | Kind::Type
                | Kind::Attributes
                | Kind::Hash
                | Kind::Scheme
                | Kind::Insufficient
                | Kind::Binding
                | Kind::Sensitive,
            ) => TpmError::Damaged,
            _ => failed("loading what was sealed")(error),
        })
    }

    /// The storage key: the persistent one where there is one, for it works without the owner's password.
    fn storage_key(&mut self) -> Result<(Parent, KeyHandle), TpmError> {
        match self.persistent()? {
            Some(key) => Ok((Parent::Persistent, key)),
            None => Ok((Parent::FromSeed, self.derived()?)),
        }
    }

    fn persistent(&mut self) -> Result<Option<KeyHandle>, TpmError> {
        let handle = PersistentTpmHandle::new(STORAGE_ROOT_KEY).expect("it is in the persistent range");
        let found = self
            .context
            .execute_without_session(|context| context.tr_from_tpm_public(TpmHandle::Persistent(handle)));
        match found {
            Ok(object) => Ok(Some(KeyHandle::from(object))),
            Err(error) if matches!(kind(error), Some(Kind::Handle | Kind::Value)) => Ok(None),
            Err(error) => Err(failed("looking for the storage root key")(error)),
        }
    }

    fn derived(&mut self) -> Result<KeyHandle, TpmError> {
        let template = storage_key_template().map_err(failed("describing the storage key"))?;
        let created = self.context.execute_with_nullauth_session(|context| {
            context.create_primary(Hierarchy::Owner, template, None, None, None, None)
        });
        match created {
            Ok(created) => Ok(created.key_handle),
            Err(error) if matches!(kind(error), Some(Kind::AuthFail | Kind::BadAuth)) => {
                Err(TpmError::OwnerPassword)
            }
            Err(error) => Err(failed("making the storage key")(error)),
        }
    }

    fn name(&mut self, key: KeyHandle) -> Result<Vec<u8>, TpmError> {
        let name = self.context.tr_get_name(key.into());
        Ok(name.map_err(failed("naming the storage key"))?.value().to_vec())
    }

    /// A session that encrypts the first parameter of the answer and, with `both_ways`, of the command.
    fn encrypted_session(&mut self, key: KeyHandle, both_ways: bool) -> Result<AuthSession, TpmError> {
        let started = self.context.execute_without_session(|context| {
            context.start_auth_session(
                Some(key),
                None,
                None,
                SessionType::Hmac,
                SymmetricDefinition::AES_128_CFB,
                HashingAlgorithm::Sha256,
            )
        });
        let session = opened(started)?;
        let (attributes, mask) = SessionAttributesBuilder::new()
            .with_encrypt(true)
            .with_decrypt(both_ways)
            .build();
        self.context
            .tr_sess_set_attributes(session, attributes, mask)
            .map_err(failed("encrypting a session"))?;
        Ok(session)
    }

    /// The digest of the policy that wants `values`, and what else `policy` asks for.
    fn policy_digest(
        &mut self,
        policy: &BindPolicy,
        values: &BTreeMap<u8, Vec<u8>>,
    ) -> Result<Digest, TpmError> {
        let mut digest = PolicyDigest::EMPTY;
        if let Some(key) = policy.signed_by() {
            let loaded = self.load_signing_key(key)?;
            digest = PolicyDigest::authorized_by(&self.name(loaded)?);
            self.flush(loaded)?;
        }
        if !values.is_empty() {
            digest = digest.pcrs(values);
        }
        if policy.pin().is_some() {
            digest = digest.auth_value();
        }
        Digest::try_from(&digest.0[..]).map_err(failed("making the policy"))
    }

    /// A session that is to satisfy a policy. It is salted, or a listener on the bus could try PINs on what it hears.
    fn policy_session(&mut self, key: KeyHandle) -> Result<PolicySession, TpmError> {
        let started = self.context.execute_without_session(|context| {
            context.start_auth_session(
                Some(key),
                None,
                None,
                SessionType::Policy,
                SymmetricDefinition::AES_128_CFB,
                HashingAlgorithm::Sha256,
            )
        });
        PolicySession::try_from(opened(started)?).map_err(failed("starting a policy session"))
    }

    /// In the order of [`Session::policy_digest`].
    fn satisfy(
        &mut self,
        session: PolicySession,
        sealed: &BoundToTpm,
        approval: Option<Approval>,
    ) -> Result<(), TpmError> {
        if let Some(approval) = approval {
            self.policy_pcr(session, &PcrList(approval.signature.pcrs))?;
            let policy = approval.signature.policy.0;
            let policy = Digest::try_from(&policy[..]).map_err(failed("making the policy"))?;
            self.context
                .execute_without_session(|context| {
                    let nonce = Nonce::default();
                    context.policy_authorize(session, policy, nonce, &approval.key, approval.ticket)
                })
                .map_err(failed("showing what was signed"))?;
        }
        let exact = sealed.exact();
        if !exact.0.is_empty() {
            self.policy_pcr(session, &exact)?;
        }
        if sealed.needs_pin() {
            self.context
                .execute_without_session(|context| context.policy_auth_value(session))
                .map_err(failed("making the policy"))?;
        }
        Ok(())
    }

    fn policy_pcr(&mut self, session: PolicySession, pcrs: &PcrList) -> Result<(), TpmError> {
        let selection = selection(pcrs)?;
        self.context
            .execute_without_session(|context| context.policy_pcr(session, Digest::default(), selection))
            .map_err(|error| match kind(error) {
                Some(Kind::Value) => TpmError::NoSuchPcr(pcrs.clone()),
                _ => failed("making the policy")(error),
            })
    }

    /// The signature that covers what PCR 11 is now, verified by the TPM; `None` if none is asked for.
    fn approval(
        &mut self,
        sealed: &BoundToTpm,
        signatures: &Signatures,
    ) -> Result<Option<Approval>, TpmError> {
        let Some(key) = sealed.signing_key().map_err(|_| TpmError::Damaged)? else {
            return Ok(None);
        };
        let values = self.pcr_values(&PcrList(signatures.pcrs()))?;
        let not_signed = |why| TpmError::NotSigned {
            key: key.fingerprint(),
            why,
        };
        let signature = signatures.find(&key, &values).map_err(not_signed)?;
        let loaded = self.load_signing_key(&key)?;
        let name = self.context.tr_get_name(loaded.into());
        let name = name.map_err(failed("naming the signing key"))?;
        let ticket = self.verified(loaded, signature)?;
        self.flush(loaded)?;
        Ok(Some(Approval {
            signature: signature.clone(),
            key: name,
            ticket,
        }))
    }

    fn verified(&mut self, key: KeyHandle, signature: &Signature) -> Result<VerifiedTicket, TpmError> {
        const DOING: &str = "verifying what was signed";
        let digest = openssl::sha::sha256(&signature.policy.0);
        let digest = Digest::try_from(&digest[..]).map_err(failed(DOING))?;
        let bytes = PublicKeyRsa::try_from(&signature.bytes[..]).map_err(failed(DOING))?;
        let bytes = RsaSignature::create(HashingAlgorithm::Sha256, bytes).map_err(failed(DOING))?;
        self.context
            .execute_without_session(|context| {
                context.verify_signature(key, digest, structures::Signature::RsaSsa(bytes))
            })
            .map_err(failed(DOING))
    }

    fn load_signing_key(&mut self, key: &SigningKey) -> Result<KeyHandle, TpmError> {
        const DOING: &str = "loading the public key";
        let public = signing_key_template(key).map_err(failed(DOING))?;
        self.context
            .execute_without_session(|context| context.load_external_public(public, Hierarchy::Owner))
            .map_err(failed(DOING))
    }

    fn flush(&mut self, key: KeyHandle) -> Result<(), TpmError> {
        self.context
            .flush_context(key.into())
            .map_err(failed("taking a key out again"))
    }

    /// Adds what the TPM tells of its lockout to an error that is about it.
    pub(super) fn explained(&mut self, error: TpmError) -> TpmError {
        match error {
            TpmError::WrongPin { .. } => {
                let most = self.property(PropertyTag::MaxAuthFail);
                let failed = self.property(PropertyTag::LockoutCounter);
                let left = most.zip(failed).map(|(most, failed)| most.saturating_sub(failed));
                TpmError::WrongPin { left }
            }
            TpmError::LockedOut { .. } => {
                let interval = self.property(PropertyTag::LockoutInterval);
                TpmError::LockedOut {
                    one_more_in: interval.map(|seconds| Duration::from_secs(seconds.into())),
                }
            }
            error => error,
        }
    }

    fn property(&mut self, tag: PropertyTag) -> Option<u32> {
        let found = self
            .context
            .execute_without_session(|context| {
                context.get_capability(CapabilityType::TpmProperties, tag.into(), 1)
            })
            .ok()?;
        match found.0 {
            CapabilityData::TpmProperties(list) => list.find(tag).map(TaggedProperty::value),
            _ => None,
        }
    }

    /// A read returns eight at the most: one after the other, then.
    fn pcr_values(&mut self, pcrs: &PcrList) -> Result<BTreeMap<u8, Vec<u8>>, TpmError> {
        let mut values = BTreeMap::new();
        for pcr in &pcrs.0 {
            let one = PcrList([*pcr].into());
            let selection = selection(&one)?;
            let (_, _, digests) = self
                .context
                .execute_without_session(|context| context.pcr_read(selection))
                .map_err(failed("reading a PCR"))?;
            let value = digests.value().first().ok_or(TpmError::NoSuchPcr(one))?;
            values.insert(*pcr, value.value().to_vec());
        }
        Ok(values)
    }

    /// Which PCRs made the policy fail.
    fn difference(&mut self, sealed: &BoundToTpm) -> Result<TpmError, TpmError> {
        let now = self.pcr_values(&sealed.exact())?;
        let differs = |(pcr, value): (&u8, &String)| (hex::encode(&now[pcr]) != *value).then_some(*pcr);
        let differing: std::collections::BTreeSet<u8> = sealed.pcrs.iter().filter_map(differs).collect();
        if differing.is_empty() {
            // What is noted of the PCRs is not what the policy has.
            Ok(TpmError::Damaged)
        } else {
            Ok(TpmError::PcrsDiffer(PcrList(differing)))
        }
    }

    /// For tests, which do to a TPM what booting does.
    #[cfg(test)]
    pub(super) fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    /// As an operating system does that provisions a TPM.
    #[cfg(test)]
    pub(super) fn keep_storage_key(&mut self) {
        use tss_esapi::interface_types::dynamic_handles::Persistent;
        use tss_esapi::interface_types::resource_handles::Provision;
        let key = self.derived().unwrap();
        let handle = Persistent::Persistent(PersistentTpmHandle::new(STORAGE_ROOT_KEY).unwrap());
        self.context
            .execute_with_nullauth_session(|context| {
                context.evict_control(Provision::Owner, key.into(), handle)
            })
            .unwrap();
    }
}

fn opened(started: Result<Option<AuthSession>, Error>) -> Result<AuthSession, TpmError> {
    started
        .map_err(failed("starting a session"))?
        .ok_or_else(|| TpmError::Failed {
            doing: "starting a session",
            source: "it returned none".into(),
        })
}

fn selection(pcrs: &PcrList) -> Result<PcrSelectionList, TpmError> {
    let slots: Result<Vec<_>, Error> = pcrs.0.iter().map(|pcr| PcrSlot::try_from(1_u32 << pcr)).collect();
    let slots = slots.map_err(failed("selecting PCRs"))?;
    PcrSelectionListBuilder::new()
        .with_selection(HashingAlgorithm::Sha256, &slots)
        .build()
        .map_err(failed("selecting PCRs"))
}

/// A NIST P-256 storage key with AES-128-CFB: the template of the TCG's EK Credential Profile, appendix B.4, with empty
/// policy and unique field, as tpm2-tools and systemd have it. The same seed always yields the same key.
fn storage_key_template() -> Result<Public, Error> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_decrypt(true)
        .build()?;
    let parameters = PublicEccParametersBuilder::new_restricted_decryption_key(
        SymmetricDefinitionObject::AES_128_CFB,
        EccCurve::NistP256,
    )
    .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
}

/// The public half of a key that signs PCR policies: its name is part of a policy, so this must not change.
fn signing_key_template(key: &SigningKey) -> Result<Public, Error> {
    let modulus = key.modulus();
    let bits = u16::try_from(modulus.len() * 8).unwrap_or(u16::MAX);
    let attributes = ObjectAttributesBuilder::new()
        .with_user_with_auth(true)
        .with_sign_encrypt(true)
        .build()?;
    let scheme = RsaScheme::RsaSsa(HashScheme::new(HashingAlgorithm::Sha256));
    let parameters = PublicRsaParametersBuilder::new_unrestricted_signing_key(
        scheme,
        RsaKeyBits::try_from(bits)?,
        RsaExponent::ZERO_EXPONENT,
    )
    .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Rsa)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_rsa_parameters(parameters)
        .with_rsa_unique_identifier(PublicKeyRsa::try_from(modulus)?)
        .build()
}

/// Whether there is a PIN that somebody may guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guesses {
    NoneToMake,
    /// The TPM counts wrong ones, and locks itself after some.
    Count,
}

/// Only the policy opens it.
fn sealed_object(policy: Digest, guesses: Guesses) -> Result<Public, Error> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_admin_with_policy(true)
        .with_no_da(guesses == Guesses::NoneToMake)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_auth_policy(policy)
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
        .with_keyed_hash_unique_identifier(Digest::default())
        .build()
}

/// A PIN as the TPM gets it.
fn auth(salt: &PinSalt, pin: &SecretBytes) -> Result<Auth, TpmError> {
    let value = salt.auth_value(pin).map_err(|error| deriving(error.into()))?;
    Auth::try_from(value.expose()).map_err(failed("handing over the PIN"))
}

fn deriving(source: Box<dyn StdError + Send + Sync>) -> TpmError {
    TpmError::Failed {
        doing: "deriving a key from the PIN",
        source,
    }
}

/// What the TPM said, apart from the layers of software in front of it, whose codes the library takes for the TPM's.
fn kind(error: Error) -> Option<Kind> {
    match (error, Layer::of(error)) {
        (Error::Tss2Error(code), Layer::Tpm) => code.kind(),
        _ => None,
    }
}

/// Who in the TSS raised an error (TCG TSS 2.0 Overview and Common Structures, "Response Codes").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    /// The TPM, or a resource manager in its name.
    Tpm,
    /// The connection to it.
    Connection,
    /// The library.
    Library,
}

impl Layer {
    fn of(error: Error) -> Self {
        match code(error).map(|code| code >> 16) {
            Some(0 | 11) => Self::Tpm,
            Some(10) => Self::Connection,
            _ => Self::Library,
        }
    }
}

/// The 32 bits themselves, which the library shows in this way only.
fn code(error: Error) -> Option<u32> {
    let shown = match error {
        Error::Tss2Error(Tss2ResponseCode::FormatZero(code)) => code.to_string(),
        Error::Tss2Error(Tss2ResponseCode::FormatOne(code)) => code.to_string(),
        _ => return None,
    };
    u32::from_str_radix(shown.rsplit_once("0x")?.1, 16).ok()
}

/// Names the errors that say what to do; the rest keeps what the library says.
fn failed(doing: &'static str) -> impl FnOnce(Error) -> TpmError {
    move |error| match kind(error) {
        _ if Layer::of(error) == Layer::Connection => TpmError::Lost(described(error)),
        Some(Kind::Lockout) => TpmError::LockedOut { one_more_in: None },
        Some(
            Kind::ObjectMemory
            | Kind::SessionMemory
            | Kind::SessionHandles
            | Kind::ObjectHandles
            | Kind::Memory,
        ) => TpmError::Full,
        Some(Kind::Initialize | Kind::Failure | Kind::Disabled | Kind::NeedsTest | Kind::Hierarchy) => {
            TpmError::OutOfOrder
        }
        _ => TpmError::Failed {
            doing,
            source: described(error),
        },
    }
}

fn described(error: Error) -> Box<dyn StdError + Send + Sync> {
    match (kind(error), code(error)) {
        (None, Some(code)) => format!("TSS response code {code:#x}").into(),
        _ => error.to_string().into(),
    }
}
