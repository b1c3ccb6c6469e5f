//! KEKs at a KMS: who asks, whom, and what the answers about a key mean. What is asked stands in `creation.rs`, `wrapping.rs` and
//! `destruction.rs`.

use std::sync::Arc;
use std::time::Instant;

use super::answer;
use super::call::Call;
use super::cluster::Cluster;
use super::error::KmipError;
use super::message::{Outcome, Refusal};
use super::node::Access;
use super::settings::Mode;
use super::tag::{KeyState, Operation};
use super::ttlv::Item;
use crate::model::envelope::{KekId, ProviderId};
use crate::provider::cache::KekCache;
use crate::provider::toolbox::kek_name::KekBook;
use crate::provider::{KekScope, ProviderError};

pub(super) const MAX_KEYS: usize = 64;

/// One call of the provider: who asks, whom, and until when.
pub(super) struct Keys<'a> {
    pub(super) provider: ProviderId,
    pub(super) provider_name: &'a str,
    pub(super) mode: Mode,
    pub(super) cluster: &'a Cluster,
    pub(super) cache: &'a KekCache,
    pub(super) book: &'a KekBook,
    pub(super) access: &'a Arc<Access>,
    pub(super) deadline: Instant,
}

impl Keys<'_> {
    /// Sends one request and hands the outcomes of its calls to `read`, for each server that answers until one is accepted.
    pub(super) fn ask<T>(
        &self,
        calls: Vec<Call>,
        read: impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        self.cluster.call(self.access, calls, self.deadline, read)
    }
    /// What begins the names of the KEKs for `scope`; the whole name of one from before they were counted.
    pub(super) fn stem(&self, scope: &KekScope) -> String {
        let whose = match scope {
            KekScope::Vm(vm) => format!("vm-{vm}"),
            KekScope::Provider => "shared".to_owned(),
        };
        format!("virtseal-{whose}-{}", self.provider)
    }

    pub(super) fn once(&self, kek: &KekId, call: Call) -> Result<(), ProviderError> {
        let operation = call.operation();
        self.ask(vec![call], |outcomes| match &outcomes[0] {
            Ok(_) => Ok(()),
            Err(refusal) => Err(key_refused(kek, operation, refusal)),
        })
    }
}

/// An empty identifier means "the one of the call before" to KMIP.
pub(super) fn known_form(kek: &KekId) -> Result<(), ProviderError> {
    if answer::is_identifier(&kek.0) {
        Ok(())
    } else {
        Err(ProviderError::UnknownKek(kek.clone()))
    }
}

pub(super) fn state_of(kek: &KekId, outcome: &Outcome) -> Result<KeyState, ProviderError> {
    Ok(answer::state(about(kek, Operation::GetAttributes, outcome)?)?)
}

/// The payload of an answer about `kek`.
pub(super) fn about<'m, 'b>(
    kek: &KekId,
    operation: Operation,
    outcome: &Outcome<'m, 'b>,
) -> Result<&'m Item<'b>, ProviderError> {
    let payload = outcome
        .as_ref()
        .map_err(|refusal| key_refused(kek, operation, refusal))?;
    answer::check_subject(payload, kek)?;
    Ok(payload)
}

pub(super) fn check_state(
    kek: &KekId,
    state: KeyState,
    may: impl Fn(KeyState) -> bool,
) -> Result<(), ProviderError> {
    if may(state) {
        return Ok(());
    }
    if state == KeyState::Destroyed {
        return Err(ProviderError::UnknownKek(kek.clone()));
    }
    Err(ProviderError::KekUnusable {
        kek: kek.clone(),
        why: format!("it is {state} at the KMS"),
    })
}

/// A refusal that is about one key.
pub(super) fn key_refused(kek: &KekId, operation: Operation, refusal: &Refusal) -> ProviderError {
    KmipError::refused_key(kek, operation, refusal)
}

pub(super) fn refused(operation: Operation, refusal: &Refusal) -> ProviderError {
    KmipError::refused(operation, refusal.clone()).into()
}
