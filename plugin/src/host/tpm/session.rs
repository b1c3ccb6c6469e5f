//! One connection to the TPM, and what it is asked for binding something to it and opening that. Dropping it flushes what it has loaded.

mod bind;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::time::Duration;

use tss_esapi::attributes::SessionAttributesBuilder;
use tss_esapi::constants::response_code::Tss2ResponseCodeKind as Kind;
use tss_esapi::constants::{CapabilityType, PropertyTag, SessionType};
use tss_esapi::handles::{KeyHandle, PersistentTpmHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    CapabilityData, Digest, PcrSelectionList, PcrSelectionListBuilder, PcrSlot, SymmetricDefinition,
    TaggedProperty,
};
use tss_esapi::{Context, Error};

use super::TpmError;
use super::bound::Parent;
use super::pcr_list::PcrList;
use super::signed::SigningKey;
use super::tcti::Tcti;
use super::template::{signing_key_template, storage_key_template};
use super::tss_error::{described, failed, kind};

/// Where the TCG wants an operating system to keep the storage root key.
const STORAGE_ROOT_KEY: u32 = 0x8100_0001;

pub(super) struct Session {
    context: Context,
}

/// Whose first parameter a session encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encrypts {
    Answer,
    CommandAndAnswer,
}

impl Session {
    pub(super) fn open(tcti: &Tcti) -> Result<Self, TpmError> {
        check_device(tcti)?;
        let unreachable = |error: Error| TpmError::Unreachable(tcti.clone(), described(error));
        let conf = tcti.0.parse().map_err(unreachable)?;
        Ok(Self {
            context: Context::new(conf).map_err(unreachable)?,
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

    /// A session that is salted with `key`.
    fn start(&mut self, key: KeyHandle, kind: SessionType) -> Result<AuthSession, TpmError> {
        const DOING: &str = "starting a session";
        let cipher = SymmetricDefinition::AES_128_CFB;
        let started = self.context.execute_without_session(|context| {
            context.start_auth_session(Some(key), None, None, kind, cipher, HashingAlgorithm::Sha256)
        });
        started.map_err(failed(DOING))?.ok_or_else(|| TpmError::Failed {
            doing: DOING,
            source: "it returned none".into(),
        })
    }

    /// A session that keeps the first parameter from whoever listens on the bus.
    fn encrypted_session(&mut self, key: KeyHandle, encrypts: Encrypts) -> Result<AuthSession, TpmError> {
        let session = self.start(key, SessionType::Hmac)?;
        let (attributes, mask) = SessionAttributesBuilder::new()
            .with_encrypt(true)
            .with_decrypt(encrypts == Encrypts::CommandAndAnswer)
            .build();
        self.context
            .tr_sess_set_attributes(session, attributes, mask)
            .map_err(failed("encrypting a session"))?;
        Ok(session)
    }

    /// A session that is to satisfy a policy. It is salted, or a listener on the bus could try PINs on what it hears.
    fn policy_session(&mut self, key: KeyHandle) -> Result<PolicySession, TpmError> {
        PolicySession::try_from(self.start(key, SessionType::Policy)?)
            .map_err(failed("starting a policy session"))
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

/// Says more of a device that can't be used than the library does, which knows one error for all.
fn check_device(tcti: &Tcti) -> Result<(), TpmError> {
    let Some(path) = tcti.0.strip_prefix("device:") else {
        return Ok(());
    };
    let opened = OpenOptions::new().read(true).write(true).open(path).map(drop);
    opened.map_err(|source| {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TpmError::NoDevice(path),
            Some(libc::EBUSY) => TpmError::Busy(path),
            _ => TpmError::Device { path, source },
        }
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
