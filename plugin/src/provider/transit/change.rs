//! Another server, or another way to log in: tried by a login of its own, then recorded, then in effect.

use super::TransitProvider;
use super::link::Link;
use super::settings::TransitSettings;
use crate::provider::change::try_each;
use crate::provider::toolbox::lock;
use crate::provider::{ChangeError, ProviderError, SettingsChange};

impl TransitProvider {
    /// See [`KeyProvider::change`](crate::provider::KeyProvider::change).
    pub(super) fn change_settings(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        let settings = serde_json::from_value::<TransitSettings>(change.settings.clone())
            .map_err(|error| ChangeError::Settings(error.into()))?;
        let _changing = lock(&self.changing);
        let before = self.link.get();
        let (held, since) = before.unlocked_with();
        let asks_for = settings.auth.credential();
        let fits = asks_for == before.settings.auth.credential();
        let credential = change.credential.or(held.as_deref().filter(|_| fits));
        let link = Link::new(self.id, settings);
        match (change.trial, credential) {
            (Some(stanzas), Some(credential)) => {
                link.unlock(credential, link.locks())
                    .map_err(ProviderError::from)?;
                if let Some(fault) = link.fault() {
                    return Err(fault.into());
                }
                try_each(stanzas, |some| {
                    let wrapped = self.wrapped_for(&link, some)?;
                    link.with_engine(|engine| engine.decrypt(&wrapped)).map(drop)
                })?;
            }
            (Some(_), None) if fits => return Err(ProviderError::Locked.into()),
            (Some(_), None) => return Err(ChangeError::NeedsCredential(asks_for)),
            (None, Some(credential)) => {
                // One that is away or sealed is tried again; what is wrong with it is its status.
                let _ = link.unlock(credential, link.locks());
            }
            (None, None) => {}
        }
        (change.record)()?;
        self.link.replace(link, |before, next| {
            if before.was_locked(since) && change.credential.is_none() {
                next.lock();
            }
            before.lock();
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::bao::{Bao, secret};
    use super::super::tests::{Sealed, Tested};
    use super::*;
    use crate::api::CredentialKind;
    use crate::provider::conformance::fixtures::change;
    use crate::provider::{KeyProvider, ProviderStatus};

    #[test]
    fn what_does_not_open_changes_nothing_and_a_login_carries_over() {
        let bao = Bao::shared();
        let (mount, other) = (bao.engine(), bao.engine());
        let policy = bao.policy(&mount);
        let of = |mount: &str, timeout: u32| json!({"address": bao.address, "mount": mount, "auth": {"method": "token"}, "timeout_ms": timeout});
        let provider = Tested::new(serde_json::from_value(of(&mount, 5000)).unwrap());
        provider
            .unlock(&secret(&bao.token(&policy, json!({"period": "1h"}))))
            .unwrap();
        let sealed = Sealed::of(&provider, crate::model::envelope::VmId::random());
        let stanzas = [sealed.stanza.clone()];
        for elsewhere in [
            of(&other, 5000),
            of("nowhere", 5000),
            json!({"address": "http://127.0.0.1:1", "auth": {"method": "token"}}),
        ] {
            let (refused, recorded) = change(&*provider, &elsewhere, None, Some(&stanzas));
            assert!(refused.is_err() && !recorded, "{elsewhere}");
            sealed.opened_by(&provider);
        }
        let (changed, recorded) = change(&*provider, &of(&mount, 4321), None, Some(&stanzas));
        changed.unwrap();
        assert!(recorded);
        sealed.opened_by(&provider);
        assert_eq!(provider.link.get().settings.timeout_ms, 4321);

        let (role_id, secret_id) = bao.approle(&policy, "1h", "1h");
        let approle = json!({"address": bao.address, "mount": mount, "auth": {"method": "approle", "role_id": role_id}});
        let (refused, recorded) = change(&*provider, &approle, None, Some(&stanzas));
        assert!(
            matches!(
                refused,
                Err(ChangeError::NeedsCredential(CredentialKind::SecretId))
            ) && !recorded
        );
        let (refused, _) = change(&*provider, &approle, Some(&secret("not it")), Some(&stanzas));
        assert!(matches!(refused, Err(ChangeError::Refused(_))), "{refused:?}");
        sealed.opened_by(&provider);
        change(&*provider, &approle, Some(&secret(&secret_id)), Some(&stanzas))
            .0
            .unwrap();
        assert_eq!(provider.asks_for(), Some(CredentialKind::SecretId));
        sealed.opened_by(&provider);

        provider.lock();
        let (refused, recorded) = change(&*provider, &approle, None, Some(&stanzas));
        assert!(matches!(refused, Err(ChangeError::Refused(ProviderError::Locked))) && !recorded);
        change(&*provider, &of(&mount, 4000), None, None).0.unwrap();
        assert_eq!(provider.status(), ProviderStatus::Locked);
    }
}
