//! One connection to the TPM, and the commands of a seal or an unseal. Dropping it flushes what it has loaded.

use std::collections::BTreeMap;
use std::error::Error as StdError;

use tss_esapi::attributes::{ObjectAttributesBuilder, SessionAttributesBuilder};
use tss_esapi::constants::SessionType;
use tss_esapi::constants::response_code::{Tss2ResponseCode, Tss2ResponseCodeKind as Kind};
use tss_esapi::handles::{KeyHandle, PersistentTpmHandle, SessionHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    Digest, EccPoint, KeyedHashScheme, PcrSelectionList, PcrSelectionListBuilder, PcrSlot, Private, Public,
    PublicBuilder, PublicEccParametersBuilder, PublicKeyedHashParameters, SensitiveData, SymmetricDefinition,
    SymmetricDefinitionObject,
};
use tss_esapi::traits::{Marshall, UnMarshall};
use tss_esapi::{Context, Error};

use super::{Parent, PcrList, SealedByTpm, Tcti, TpmError};
use crate::secret::SecretBytes;

/// Where the TCG wants an operating system to keep the storage root key.
const STORAGE_ROOT_KEY: u32 = 0x8100_0001;

pub(super) struct Session {
    context: Context,
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

    pub(super) fn seal(&mut self, secret: &SecretBytes, pcrs: &PcrList) -> Result<SealedByTpm, TpmError> {
        let values = self.pcr_values(pcrs)?;
        let policy = self.policy(pcrs, &values)?;
        let (parent, key) = self.storage_key()?;
        let encrypted = self.encrypted_session(key, true)?;
        let data = SensitiveData::try_from(secret.expose()).map_err(failed("handing over what to seal"))?;
        let template = sealed_object(policy).map_err(failed("describing what to seal"))?;
        let created = self
            .context
            .execute_with_session(Some(encrypted), |context| {
                context.create(key, template, None, Some(data), None, None)
            })
            .map_err(failed("sealing"))?;
        Ok(SealedByTpm {
            version: SealedByTpm::VERSION,
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

    pub(super) fn unseal(&mut self, sealed: &SealedByTpm) -> Result<SecretBytes, TpmError> {
        let key = match sealed.parent {
            Parent::Persistent => self.persistent()?.ok_or(TpmError::AnotherTpm)?,
            Parent::FromSeed => self.derived()?,
        };
        if self.name(key)? != sealed.parent_name {
            return Err(TpmError::AnotherTpm);
        }
        let loaded = self.load(key, sealed)?;
        let policy = self.pcr_session(SessionType::Policy, &sealed.pcrs(), Digest::default())?;
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
            Err(error) => Err(failed("unsealing")(error)),
        }
    }

    fn load(&mut self, key: KeyHandle, sealed: &SealedByTpm) -> Result<KeyHandle, TpmError> {
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

    /// The digest of the policy that wants `values` in `pcrs`.
    fn policy(&mut self, pcrs: &PcrList, values: &BTreeMap<u8, Vec<u8>>) -> Result<Digest, TpmError> {
        let all: Vec<u8> = values.values().flatten().copied().collect();
        let digest = Digest::try_from(&openssl::sha::sha256(&all)[..]).map_err(failed("hashing PCRs"))?;
        let trial = self.pcr_session(SessionType::Trial, pcrs, digest)?;
        self.context
            .execute_without_session(|context| context.policy_get_digest(trial))
            .map_err(failed("reading the policy"))
    }

    fn pcr_session(
        &mut self,
        session_type: SessionType,
        pcrs: &PcrList,
        digest: Digest,
    ) -> Result<PolicySession, TpmError> {
        let selection = selection(pcrs)?;
        let started = self.context.execute_without_session(|context| {
            context.start_auth_session(
                None,
                None,
                None,
                session_type,
                SymmetricDefinition::AES_128_CFB,
                HashingAlgorithm::Sha256,
            )
        });
        let session =
            PolicySession::try_from(opened(started)?).map_err(failed("starting a policy session"))?;
        self.context
            .execute_without_session(|context| context.policy_pcr(session, digest, selection))
            .map_err(|error| match kind(error) {
                Some(Kind::Value) => TpmError::NoSuchPcr(pcrs.clone()),
                _ => failed("making the policy")(error),
            })?;
        Ok(session)
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
    fn difference(&mut self, sealed: &SealedByTpm) -> Result<TpmError, TpmError> {
        let now = self.pcr_values(&sealed.pcrs())?;
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

/// No password opens it, only the policy; wrong tries do not count, for there is nothing to guess.
fn sealed_object(policy: Digest) -> Result<Public, Error> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_admin_with_policy(true)
        .with_no_da(true)
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
        Some(Kind::Lockout) => TpmError::LockedOut,
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
