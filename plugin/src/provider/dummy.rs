//! A kind of provider that tests add by one row: KEKs that never leave a server which is only a constant.

use super::toolbox::gcm::{self, MECHANISM};
use super::toolbox::locks::{Locks, LocksNoted};
use super::{
    Addition, ChangeError, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderStatus,
    SettingsChange,
};
use crate::api::CredentialKind;
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::problem::Problem;
use crate::secret::SecretBytes;
use crate::store::ProviderRecord;

pub(super) struct DummyProvider {
    id: ProviderId,
    name: String,
}

impl DummyProvider {
    pub(super) const KIND: &'static str = "dummy";

    pub(super) fn add(new: &Addition<'_>) -> Result<Self, Problem> {
        let record = new.table.insert(
            ProviderId::random(),
            new.name.as_str(),
            Self::KIND,
            &serde_json::json!({}),
        )?;
        Ok(Self::open(&record))
    }

    pub(super) fn open(record: &ProviderRecord) -> Self {
        Self {
            id: record.id,
            name: record.name.clone(),
        }
    }

    fn key() -> SecretBytes {
        SecretBytes::take(&mut [7; 32]).unwrap()
    }

    fn data(&self, kek: &KekId) -> Vec<u8> {
        gcm::additional_data(self.id, &kek.0, MECHANISM)
    }
}

impl KeyProvider for DummyProvider {
    fn kind(&self) -> &str {
        Self::KIND
    }

    fn id(&self) -> ProviderId {
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn status(&self) -> ProviderStatus {
        ProviderStatus::Ready
    }

    fn create_kek(&self, _: &KekScope) -> Result<KekId, ProviderError> {
        Ok(KekId("the only one".to_owned()))
    }

    fn rotate_kek(&self, scope: &KekScope, _: &KekId) -> Result<KekId, ProviderError> {
        self.create_kek(scope)
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        Ok(Stanza {
            provider: self.id,
            provider_name: self.name.clone(),
            kek: kek.clone(),
            mechanism: MECHANISM.to_owned(),
            body: gcm::wrap(&Self::key(), &self.data(kek), payload)?,
        })
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let open = |stanza: &&Stanza| gcm::unwrap(&Self::key(), &self.data(&stanza.kek), &stanza.body);
        stanzas.iter().map(open).collect()
    }

    fn destroy_kek(&self, kek: &KekId, _: VmId) -> Result<DestroyReceipt, ProviderError> {
        Ok(DestroyReceipt::shared(kek, "it is a constant"))
    }

    fn lock(&self) {}

    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        Ok((change.record)()?)
    }

    fn asks_for(&self) -> Option<CredentialKind> {
        None
    }

    fn locks(&self) -> LocksNoted {
        Locks::default().noted()
    }

    fn unlock_since(&self, _: LocksNoted, _: &SecretBytes) -> Result<(), ProviderError> {
        Ok(())
    }
}
