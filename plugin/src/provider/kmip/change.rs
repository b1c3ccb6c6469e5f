//! Other servers, or other ways to speak with them: tried with the identity and the trust in use, then recorded, then in effect.

use std::sync::Arc;

use super::settings::{KmipSettings, Mode};
use super::{KmipProvider, Line, cannot_encrypt};
use crate::model::envelope::Stanza;
use crate::provider::change::try_each;
use crate::provider::toolbox::lock;
use crate::provider::{ChangeError, KeyProvider, ProviderError, SettingsChange};

impl KmipProvider {
    /// See [`KeyProvider::change`]. Identity and trust stay as they are, and so does what is cached.
    pub(super) fn change_settings(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        let settings = serde_json::from_value::<KmipSettings>(change.settings.clone())
            .map_err(|error| ChangeError::Settings(error.into()))?;
        let _changing = lock(&self.changing);
        let before = self.line();
        let policy = settings.cache();
        if policy != before.settings.cache() && self.cache.persistence().is_some() {
            return Err(ChangeError::Persists);
        }
        let line = Line::new(settings);
        if let Some(stanzas) = change.trial {
            self.try_line(&before, &line, stanzas)?;
        }
        (change.record)()?;
        if policy != before.settings.cache() {
            // The row says so already: a death in between costs nothing.
            self.cache.set(policy, None, change.settings)?;
        }
        self.work_by(line);
        self.probe();
        Ok(())
    }

    /// From now on. What is under way ends as it began.
    pub(super) fn work_by(&self, line: Line) {
        let mut held = self.held_mut();
        let before = self.line();
        self.line.replace(line, |_, _| {});
        if !Arc::ptr_eq(&before.cluster, &self.line().cluster) {
            self.renew_access(&mut held);
        }
    }

    /// A server that was there before may be down now; a new one must do.
    fn try_line(&self, before: &Line, line: &Line, stanzas: &[Stanza]) -> Result<(), ChangeError> {
        let access = self.access()?;
        line.cluster.close(access.epoch);
        line.cluster.probe(&access);
        match line.cluster.status() {
            Ok(()) | Err(ProviderError::Trouble(_)) => {}
            Err(error) => return Err(error.into()),
        }
        for node in line.cluster.nodes() {
            if let Some(failure) = lock(&node.health).failure()
                && !before.settings.endpoints.contains(&node.endpoint)
            {
                return Err(ChangeError::Server {
                    server: node.endpoint.to_string(),
                    why: failure.to_string(),
                });
            }
        }
        if let (Mode::Server, Some(why)) = (line.settings.mode, cannot_encrypt(&line.cluster)) {
            return Err(ProviderError::Refused(why).into());
        }
        try_each(stanzas, |some| self.keys(line, &access).opens(some))
    }

    /// Who both sides are to each other, and what the servers speak.
    pub(super) fn details_of_trust(&self) -> Vec<(&'static str, String)> {
        let (mut details, line) = (Vec::new(), self.line());
        let of_server = |version: Option<_>, certificate: Option<_>| {
            let version = version.map(|version: super::KmipVersion| format!("KMIP {version}"));
            let certificate = certificate.map(|facts: super::CertificateFacts| facts.to_string());
            [version, certificate]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(", ")
        };
        for node in line.cluster.nodes() {
            let said = of_server(node.version(), node.certificate());
            let endpoint = &node.endpoint;
            details.push((
                "server",
                match said.is_empty() {
                    true => format!("{endpoint}, not known yet"),
                    false => format!("{endpoint}, {said}"),
                },
            ));
        }
        let held = self.held();
        if let Some(trust) = &held.trust {
            details.push(("trusts", trust.to_string()));
        }
        let key = match held.is_encrypted {
            true => "its private key is encrypted by a passphrase",
            false => "its private key is in a file that root alone reads",
        };
        let identity = held.identity.as_ref().and_then(|identity| identity.leaf().ok());
        match identity.and_then(|leaf| super::CertificateFacts::of(leaf).ok()) {
            Some(facts) => details.push(("identity", format!("{facts}; {key}"))),
            None if held.is_encrypted => details.push(("identity", key.to_owned())),
            None => {}
        }
        if let Some(login) = held
            .identity
            .as_ref()
            .and_then(|identity| identity.login.as_ref())
        {
            details.push(("login", format!("as {}, with a password", login.user)));
        }
        details
    }
}

#[cfg(test)]
mod tests {
    use virtseal_testkit::servers::{PyKmip, Relay, free_port};

    use super::super::fixture::{Kmip, secret, settings};
    use super::super::tests::Wrapped;
    use super::*;
    use crate::provider::ProviderStatus;
    use crate::provider::conformance::fixtures::change;

    #[test]
    fn servers_without_the_keys_change_nothing() {
        let kmip = Kmip::new();
        let provider = kmip.provider();
        let wrapped = Wrapped::by(provider);
        let stanzas = [wrapped.stanza.clone()];
        let empty = PyKmip::certified_by(&kmip.authority, 90).unwrap();
        let (refused, recorded) = change(provider, &settings(&[empty.port()]), None, Some(&stanzas));
        assert!(
            matches!(refused, Err(ChangeError::StaysShut { .. })),
            "{refused:?}"
        );
        assert!(!recorded);
        let dead = settings(&[free_port().unwrap()]);
        let (refused, recorded) = change(provider, &dead, None, Some(&stanzas));
        let unreachable = matches!(&refused, Err(ChangeError::Refused(ProviderError::Unreachable(_))));
        assert!(unreachable && !recorded, "{refused:?}");
        // Beside one that does, too.
        let (refused, recorded) = change(
            provider,
            &settings(&[kmip.server.port(), free_port().unwrap()]),
            None,
            Some(&stanzas),
        );
        assert!(
            matches!(refused, Err(ChangeError::Server { .. })) && !recorded,
            "{refused:?}"
        );
        assert_eq!(provider.status(), ProviderStatus::Ready);
        wrapped.assert_opened_by(provider);
    }

    #[test]
    fn other_servers_take_effect_with_what_is_unlocked() {
        let kmip = Kmip::new();
        let provider = kmip.provider();
        let wrapped = Wrapped::by(provider);
        let stanzas = [wrapped.stanza.clone()];
        let relay = Relay::to(kmip.server.port()).unwrap();
        let (changed, recorded) = change(provider, &settings(&[relay.port()]), None, Some(&stanzas));
        changed.unwrap();
        assert!(recorded);
        wrapped.assert_opened_by(provider);
        let shown = provider.details();
        assert!(
            shown.iter().any(|(what, said)| *what == "server"
                && said.contains(&relay.port().to_string())
                && said.contains("KMIP 2.0")),
            "{shown:?}"
        );
        // Nobody is asked, so nobody has to be there.
        let (changed, _) = change(provider, &settings(&[free_port().unwrap()]), None, None);
        changed.unwrap();
        assert!(matches!(provider.status(), ProviderStatus::Unreachable(_)));
        change(provider, &settings(&[kmip.server.port()]), None, Some(&stanzas))
            .0
            .unwrap();
        wrapped.assert_opened_by(provider);
    }

    #[test]
    fn a_lock_outlives_a_change_and_keeps_a_trial_from_being_made() {
        let kmip = Kmip::new();
        let provider = kmip.provider();
        let wrapped = Wrapped::by(provider);
        provider.lock();
        let relay = Relay::to(kmip.server.port()).unwrap();
        let new = settings(&[relay.port()]);
        let (refused, recorded) = change(provider, &new, None, Some(&[]));
        assert!(matches!(refused, Err(ChangeError::Refused(ProviderError::Locked))) && !recorded);
        change(provider, &new, None, None).0.unwrap();
        assert_eq!(provider.status(), ProviderStatus::Locked);
        provider.unlock(&secret(Kmip::CREDENTIAL)).unwrap();
        wrapped.assert_opened_by(provider);
    }

    #[test]
    fn what_is_cached_stays_and_a_trial_takes_nothing_from_it() {
        let kmip = Kmip::with(true, |settings| settings.cache = Some("1h".parse().unwrap()));
        let provider = kmip.provider();
        let wrapped = Wrapped::by(provider);
        wrapped.assert_opened_by(provider);
        assert_eq!(provider.cache().unwrap().len(), 1);
        let empty = PyKmip::certified_by(&kmip.authority, 90).unwrap();
        let mut new = settings(&[empty.port()]);
        new.cache = Some("1h".parse().unwrap());
        let (refused, _) = change(provider, &new, None, Some(std::slice::from_ref(&wrapped.stanza)));
        assert!(
            matches!(refused, Err(ChangeError::StaysShut { .. })),
            "{refused:?}"
        );
        assert_eq!(provider.cache().unwrap().len(), 1);
        let mut none = settings(&[kmip.server.port()]);
        none.cache = Some("none".parse().unwrap());
        change(provider, &none, None, None).0.unwrap();
        assert_eq!(provider.cache().unwrap().len(), 0);
    }
}
