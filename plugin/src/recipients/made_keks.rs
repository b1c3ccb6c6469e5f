//! KEKs that a provider has made and nothing is wrapped with yet: a seal that fails after its KEK was made leaves one at the
//! server. The keystore knows of each before it is used, so that the next try takes it, and `provider orphans` lists it.

use super::Provider;
use crate::model::envelope::{Binding, KekId, Payload, Stanza, VmId};
use crate::provider::{KekScope, ProviderError};
use crate::store::{EnvelopeStore, MadeKek, StoreError};

/// Wraps `payload` by the KEK that an earlier try has left, or by the provider's own choice.
pub(super) fn wrap(
    keystore: &dyn EnvelopeStore,
    known: &Provider,
    binding: &Binding,
    payload: &Payload,
) -> Result<Stanza, ProviderError> {
    let provider = known.provider();
    let unrecorded = ProviderError::internal::<StoreError>;
    if let Some(left) = left_over(keystore, known, binding.vm).map_err(unrecorded("looking for a KEK"))? {
        match provider.wrap(&left, payload) {
            // Somebody has destroyed it, or taken it out of use.
            Err(ProviderError::UnknownKek(_) | ProviderError::KekUnusable { .. }) => {}
            wrapped => return wrapped,
        }
    }
    let kek = provider.create_kek(&KekScope::Vm(binding.vm))?;
    note(keystore, known, binding.vm, &kek)?;
    provider.wrap(&kek, payload)
}

/// Notes that `known` has made `kek` for `vm`, or has it.
pub(super) fn note(
    keystore: &dyn EnvelopeStore,
    known: &Provider,
    vm: VmId,
    kek: &KekId,
) -> Result<(), ProviderError> {
    if !known.keeps_keks() {
        return Ok(());
    }
    let made = MadeKek {
        vm,
        provider: known.provider().id(),
        kek: kek.clone(),
    };
    keystore
        .note_made_kek(&made)
        .map_err(ProviderError::internal("noting a new KEK"))
}

/// The newest KEK that was made for `vm` by this provider, if nothing ever was wrapped with it. One that a job has replaced is
/// not taken up again.
fn left_over(keystore: &dyn EnvelopeStore, known: &Provider, vm: VmId) -> Result<Option<KekId>, StoreError> {
    let provider = known.provider().id();
    let made = keystore.made_keks()?.sound.into_iter();
    let Some(newest) = made
        .filter(|made| made.provider == provider)
        .find(|made| made.vm == vm)
    else {
        return Ok(None);
    };
    let (known, retired) = (keystore.envelopes_of(vm)?, keystore.retired_keks()?);
    if !known.damaged.is_empty() || !retired.damaged.is_empty() {
        // One of these may have it: a new KEK is never wrong.
        return Ok(None);
    }
    let is_used = known.sound.iter().any(|record| {
        let mut stanzas = record.envelope.stanzas.iter();
        stanzas.any(|stanza| stanza.provider == provider)
    });
    let is_retired = retired
        .sound
        .iter()
        .any(|retired| retired.provider == provider && (retired.vm == vm || retired.kek == newest.kek));
    Ok((!is_used && !is_retired).then_some(newest.kek))
}
