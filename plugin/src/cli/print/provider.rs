//! Key providers, their servers, and what they have that nobody here is known to need.

use super::super::document::{Answer, IdentityChanged, ProviderChanged, ProviderShown};
use super::super::out::{line, line_with_state, note, table};
use super::Printer;
use super::one_provider::{STATE, because, lines, local, provider_name};
use crate::api::{CertificateView, FindingView, IdentitySet, Orphans, ProviderView, Providers, ServerView};
use crate::model::advice::Advice;
use crate::model::problem::Problem;

impl Printer {
    pub(in crate::cli) fn providers(&self, providers: Providers) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Providers(providers));
        }
        self.providers_in_full(&providers.providers)?;
        self.warnings(&providers.providers);
        Ok(())
    }

    /// The same after a command that has changed one of them: what is about to go wrong with others is not told each time.
    pub(in crate::cli) fn providers_after(
        &self,
        name: &str,
        providers: &[ProviderView],
        changed: bool,
    ) -> Result<(), Problem> {
        if !self.json {
            self.providers_in_full(providers)?;
        }
        let mut about = providers.iter().filter(|provider| provider.name == name);
        about
            .clone()
            .for_each(|provider| self.provider_warnings(provider));
        match about.next() {
            Some(provider) if self.json => self.tell_of_change(provider.clone(), changed),
            _ => Ok(()),
        }
    }

    fn tell_of_change(&self, provider: ProviderView, changed: bool) -> Result<(), Problem> {
        self.tell(Answer::ProviderChanged(Box::new(ProviderChanged {
            provider,
            changed,
            warnings: Vec::new(),
        })))
    }

    pub(super) fn providers_in_full(&self, providers: &[ProviderView]) -> Result<(), Problem> {
        let rows = providers.iter().map(|provider| {
            vec![
                provider_name(provider),
                provider.kind.to_string(),
                because(&provider.state, provider.reason.as_deref()),
                local(Some(&provider.since)),
                local(provider.last_answer.as_deref()),
                provider.envelopes.to_string(),
                provider.id.clone(),
            ]
        });
        let header = [
            "PROVIDER",
            "KIND",
            "STATE",
            "SINCE",
            "LAST ANSWER",
            "ENVELOPES",
            "ID",
        ];
        table(&header, rows)
    }

    /// One, with all there is to say of it.
    pub(in crate::cli) fn provider(&self, provider: ProviderView) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Provider(Box::new(ProviderShown { provider })));
        }
        all_of(&provider)?;
        self.provider_warnings(&provider);
        Ok(())
    }

    /// The same of one that the command has changed.
    pub(in crate::cli) fn provider_changed(
        &self,
        provider: ProviderView,
        changed: bool,
    ) -> Result<(), Problem> {
        if !self.json {
            all_of(&provider)?;
        }
        self.provider_warnings(&provider);
        match self.json {
            true => self.tell_of_change(provider, changed),
            false => Ok(()),
        }
    }

    /// What is about to go wrong with a provider that this command did not ask about, but may need.
    pub(in crate::cli) fn warnings(&self, providers: &[ProviderView]) {
        providers
            .iter()
            .for_each(|provider| self.provider_warnings(provider));
    }

    fn provider_warnings(&self, provider: &ProviderView) {
        for warning in &provider.warnings {
            self.warn(FindingView {
                what: format!("provider '{}': {}", provider.name, warning.what),
                ..warning.clone()
            });
        }
    }

    /// What this host shows to the servers of a provider from now on.
    pub(in crate::cli) fn identity_set(&self, name: &str, set: IdentitySet) -> Result<(), Problem> {
        self.warn_all(&set.warnings);
        if self.json {
            return self.tell(Answer::IdentitySet(Box::new(IdentityChanged {
                provider: set.provider,
                certificate: set.certificate,
                changed: true,
                warnings: set.warnings,
            })));
        }
        self.providers_in_full(std::slice::from_ref(&set.provider))?;
        self.provider_warnings(&set.provider);
        line(&format!(
            "This host presents to '{name}' the certificate {}, SHA-256 {}, until {}",
            set.certificate.subject, set.certificate.sha256, set.certificate.not_after
        ))
    }

    /// For people who compare fingerprints, on standard error: what follows may be asked for as JSON.
    pub(in crate::cli) fn servers(&self, servers: &[ServerView]) {
        for server in servers {
            note(&server.endpoint);
            if let Some(problem) = &server.problem {
                note(&format!("    shows no certificate: {problem}"));
            }
            for (nth, certificate) in server.chain.iter().enumerate() {
                self.certificate(if nth == 0 { "server " } else { "signer " }, certificate);
            }
        }
    }

    fn certificate(&self, role: &str, certificate: &CertificateView) {
        note(&format!("    {role}  {}", certificate.subject));
        note(&format!("      issuer   {}", certificate.issuer));
        if !certificate.names.is_empty() {
            note(&format!("      names    {}", certificate.names.join(", ")));
        }
        note(&format!("      SHA-256  {}", certificate.sha256));
        note(&format!(
            "      expires  {} ({} days)",
            certificate.not_after, certificate.days_left
        ));
    }

    pub(in crate::cli) fn orphans(&self, orphans: Orphans) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Orphans(orphans));
        }
        let rows = orphans.envelopes.iter().map(|orphan| {
            vec![
                orphan.vm.clone(),
                orphan.kind.to_string(),
                orphan.envelope.clone(),
                orphan.providers.join(", "),
                match (&orphan.path, orphan.present) {
                    (Some(path), true) => path.clone(),
                    (Some(path), false) => format!("{path} (missing)"),
                    (None, _) => "-".to_owned(),
                },
            ]
        });
        table(&["VM", "KIND", "ENVELOPE", "PROVIDERS", "PATH"], rows)?;
        let mut envelopes = orphans.envelopes.iter();
        let missing = envelopes.clone().find(|orphan| !orphan.present);
        if let Some(path) = missing.and_then(|orphan| orphan.path.clone()) {
            line(&format!(
                "If an image was deleted: {}",
                Advice::ForgetVolume(path)
            ))?;
        }
        if let Some(first) = envelopes.find(|orphan| !orphan.vm_defined) {
            line(&format!(
                "That a VM is not defined here does not mean that it is gone. If it is on another host: {}",
                Advice::ForgetVm(first.vm.clone())
            ))?;
        }
        line("")?;
        let rows = orphans.keks.iter().map(|kek| {
            vec![
                kek.provider.clone(),
                kek.kek.clone(),
                kek.envelopes.to_string(),
                kek.copies.to_string(),
                kek.origin.to_string(),
            ]
        });
        table(&["PROVIDER", "KEK", "ENVELOPES", "COPIES", "ORIGIN"], rows)?;
        self.warn_all(&orphans.damaged);
        match orphans.keks.is_empty() {
            true => Ok(()),
            false => line("They stay: backups, and VMs on other hosts, may need them."),
        }
    }
}

fn all_of(provider: &ProviderView) -> Result<(), Problem> {
    let all = lines(provider);
    all.iter()
        .try_for_each(|text| match text.starts_with("  state ") {
            true => line_with_state(text, STATE),
            false => line(text),
        })
}
