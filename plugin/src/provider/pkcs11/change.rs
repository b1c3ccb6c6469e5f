//! Another way to the same token: a module at another path, another label. Tried by a login of its own, then recorded, then in effect.

use std::sync::Arc;

use super::Pkcs11Provider;
use super::link::Link;
use super::settings::Pkcs11Settings;
use super::unwrap_one;
use crate::model::envelope::Stanza;
use crate::provider::change::try_each;
use crate::provider::toolbox::lock;
use crate::provider::{ChangeError, KeyProvider, ProviderError, SettingsChange, of_kind};
use crate::secret::SecretBytes;

impl Pkcs11Provider {
    /// See [`KeyProvider::change`]. The serial number is that of before: no other token gets to see the PIN.
    pub(super) fn change_settings(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        let settings = serde_json::from_value::<Pkcs11Settings>(change.settings.clone())
            .map_err(|error| ChangeError::Settings(error.into()))?;
        settings
            .check_module()
            .map_err(|error| ChangeError::Settings(error.into()))?;
        let _changing = lock(&self.changing);
        let before = self.link.get();
        let (held, since) = before.unlocked_with();
        let pin = change.credential.or(held.as_deref());
        let link = Link::new(settings, before.deadline()).map_err(ProviderError::from)?;
        match (change.trial, pin) {
            (Some(stanzas), Some(pin)) => self.try_link(&link, pin, stanzas, change.others)?,
            (Some(_), None) => return Err(ProviderError::Locked.into()),
            (None, Some(pin)) => {
                // One that is away is waited for; what is wrong with it is its status.
                let _ = link.unlock(pin, link.locks());
            }
            (None, None) => {}
        }
        (change.record)()?;
        self.link.replace(link, |before, next| {
            if before.was_locked(since) && change.credential.is_none() {
                next.lock();
            }
        });
        Ok(())
    }

    fn try_link(
        &self,
        link: &Link,
        pin: &SecretBytes,
        stanzas: &[Stanza],
        others: &[Arc<dyn KeyProvider>],
    ) -> Result<(), ChangeError> {
        link.find()?;
        let others = others.iter().filter(|other| other.id() != self.id);
        for other in others.cloned().filter_map(of_kind::<Self>) {
            if other.link.get().is_same_token(link) {
                return Err(ChangeError::TokenInUse(other.name.clone()));
            }
        }
        link.unlock(pin, link.locks())?;
        let owner = self.owner();
        try_each(stanzas, |some| {
            let (owner, some) = (
                owner.clone(),
                some.iter().map(|one| (*one).clone()).collect::<Vec<_>>(),
            );
            link.call(move |token| {
                some.iter()
                    .try_for_each(|stanza| unwrap_one(token, &owner, stanza).map(drop))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::stand::{Host, next_label, softhsm_settings, with_softhsm};
    use super::super::tests::{assert_opens, wrapped};
    use super::*;
    use crate::provider::ProviderStatus;
    use crate::provider::conformance::fixtures::change;

    #[test]
    fn the_same_token_by_another_way_and_no_other_token() {
        with_softhsm("ALL", || {
            let label = next_label();
            let (host, other) = (Host::with(softhsm_settings(&label)), next_label());
            let provider = host.pkcs11();
            let sealed = wrapped(provider);
            let stanzas = [sealed.1.clone()];
            let serial = provider.link.get().serial().unwrap().clone();
            let by = |token: serde_json::Value| {
                let mut settings = provider.link.get().settings.clone();
                settings.serial = Some(serial.clone());
                settings.token = serde_json::from_value(token).unwrap();
                settings
            };
            let (refused, recorded) = change(
                provider,
                &by(serde_json::json!({"label": other})),
                None,
                Some(&stanzas),
            );
            assert!(refused.is_err() && !recorded, "{refused:?}");
            let (refused, recorded) = change(
                provider,
                &by(serde_json::json!({"label": "nobody"})),
                None,
                Some(&stanzas),
            );
            assert!(refused.is_err() && !recorded, "{refused:?}");
            assert_opens(provider, &sealed);
            let (changed, recorded) = change(
                provider,
                &by(serde_json::json!({"serial": serial})),
                None,
                Some(&stanzas),
            );
            changed.unwrap();
            assert!(recorded);
            assert_eq!(provider.status(), ProviderStatus::Ready);
            assert_opens(provider, &sealed);
            provider.lock();
            let (refused, _) = change(
                provider,
                &by(serde_json::json!({"label": label})),
                None,
                Some(&stanzas),
            );
            assert!(matches!(
                refused,
                Err(ChangeError::Refused(ProviderError::Locked))
            ));
            change(provider, &by(serde_json::json!({"label": label})), None, None)
                .0
                .unwrap();
            assert_eq!(provider.status(), ProviderStatus::Locked);
        });
    }
}
