//! The end of a KEK at a KMS, and what can truly be said of it afterwards.

use std::time::Instant;

use super::answer;
use super::call::Call;
use super::keys::{Keys, about, known_form, state_of};
use super::tag::{KeyState, Operation};
use crate::model::deadlines::kmip::RECALL_AFTER;
use crate::model::envelope::{KekId, VmId};
use crate::model::problem::chain;
use crate::provider::toolbox::kek_name::generation;
use crate::provider::{DestroyReceipt, KekScope, ProviderError};

impl Keys<'_> {
    /// Revokes and destroys a key that bears the name of the keys of `vm`; can be repeated from wherever it was interrupted.
    pub(super) fn destroy(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        known_form(kek)?;
        let stem = self.stem(&KekScope::Vm(vm));
        let (before, is_own) = self.ask(vec![Call::GetAttributesAndName(kek.clone())], |outcomes| {
            let payload = about(kek, Operation::GetAttributes, &outcomes[0])?;
            let state = answer::state(payload)?;
            let mut names = answer::names(payload).into_iter();
            Ok((state, names.any(|name| generation(&stem, name).is_some())))
        })?;
        if !is_own && before != KeyState::Destroyed {
            let why = format!("at the KMS it bears no name of this VM's keys ({stem}-…)");
            return Ok(DestroyReceipt::shared(kek, &why));
        }
        let had_it = self.nodes_with(kek);
        self.cache.forget(kek).map_err(stays_on_disk())?;
        if before == KeyState::Active {
            self.once(kek, Call::Revoke(kek.clone()))?;
        }
        if before != KeyState::Destroyed {
            self.once(kek, Call::Destroy(kek.clone()))?;
        }
        let ask = [Call::GetAttributes(kek.clone())];
        let each = self
            .cluster
            .ask_each(self.access, &ask, self.deadline, |outcomes| {
                state_of(kek, &outcomes[0])
            });
        let (destroyed, seen) = end_of_key(&had_it, &each);
        let kept = match self.cache.persistence() {
            Some(_) => "; what this host kept of it for a reboot is removed",
            None => "",
        };
        Ok(DestroyReceipt {
            kek: kek.clone(),
            destroyed,
            observed: format!(
                "the KMS was told to destroy the key (it was {before}): {seen}; backups and replicas of the KMS may \
                 still hold it{kept}"
            ),
        })
    }

    /// The nodes that have the key now, for this client: of these alone a later "no such key" says that it has come to an end.
    /// One that is silent is not waited for until the deadline.
    fn nodes_with(&self, kek: &KekId) -> Vec<String> {
        if let [node] = self.cluster.nodes() {
            // It has just described the key.
            return vec![node.endpoint.to_string()];
        }
        let deadline = self.deadline.min(Instant::now() + RECALL_AFTER);
        let ask = [Call::GetAttributes(kek.clone())];
        let each = self.cluster.ask_each(self.access, &ask, deadline, |outcomes| {
            state_of(kek, &outcomes[0]).map(drop)
        });
        let have_it = each.into_iter().filter(|(_, found)| found.is_ok());
        have_it.map(|(node, _)| node).collect()
    }
}

/// Whether the end of a key was seen at every node, and what each said. A node that lags, or that hides the key from this client,
/// knows no such key either: that counts where it `had_it` before.
fn end_of_key(had_it: &[String], each: &[(String, Result<KeyState, ProviderError>)]) -> (bool, String) {
    let mut destroyed = !each.is_empty();
    let said = each.iter().map(|(node, found)| match found {
        Ok(KeyState::Destroyed) => format!("{node} says that the key is {}", KeyState::Destroyed),
        Err(ProviderError::UnknownKek(_)) if had_it.contains(node) => {
            format!("{node} had it, and says that it has no such key now")
        }
        Err(ProviderError::UnknownKek(_)) => {
            destroyed = false;
            format!("{node} knows no such key for this client, nor did it before: not proven")
        }
        Ok(state) => {
            destroyed = false;
            format!("{node} says that the key is {state}")
        }
        Err(error) => {
            destroyed = false;
            format!("{node} has not said that it is gone: {}", chain(error))
        }
    });
    let said = said.collect::<Vec<_>>().join("; ");
    (destroyed, said)
}

/// A KEK that is to be destroyed must be off this host's disk too.
pub(super) fn stays_on_disk<E: Into<Box<dyn std::error::Error + Send + Sync>>>()
-> impl FnOnce(E) -> ProviderError {
    ProviderError::internal("removing the KEK that is kept on disk")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_destroyed_when_every_node_says_so() {
        let node = |name: &str, found| (name.to_owned(), found);
        let gone = || Ok(KeyState::Destroyed);
        let unknown = || Err(ProviderError::UnknownKek(KekId("7".to_owned())));
        let silent = || Err(ProviderError::Unreachable("connect timed out".to_owned()));
        let both = ["a".to_owned(), "b".to_owned()];
        assert!(end_of_key(&both, &[node("a", gone()), node("b", unknown())]).0);
        assert!(end_of_key(&both[..1], &[node("a", unknown())]).0);
        assert!(!end_of_key(&both, &[]).0);
        for other in [Ok(KeyState::Active), silent()] {
            let (destroyed, said) = end_of_key(&both, &[node("a", gone()), node("b", other)]);
            assert!(!destroyed && said.contains("b "), "{said}");
        }
        // It lags, or hides the key from this client: it will have it, or has it.
        for had_it in [&both[..1], &[]] {
            let (destroyed, said) = end_of_key(had_it, &[node("a", gone()), node("b", unknown())]);
            assert!(!destroyed && said.contains("b knows no such key"), "{said}");
        }
    }
}
