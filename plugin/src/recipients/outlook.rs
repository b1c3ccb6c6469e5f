//! What the providers would say to envelopes if they were asked now: gathered once, and then no one is asked.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::opening::{Attempt, OpenError, Refusal, printable};
use super::{Provider, Recipients};
use crate::model::envelope::{Envelope, ProviderId, Stanza};
use crate::provider::ProviderError;
use crate::provider::kind::Kind;
use crate::store::DeletedProvider;

/// Of all providers of a host.
#[derive(Debug, Default)]
pub(crate) struct Outlook {
    providers: HashMap<ProviderId, Foreseen>,
    deleted: Vec<DeletedProvider>,
}

#[derive(Debug)]
struct Foreseen {
    name: String,
    kind: Option<&'static Kind>,
    last_answer: Option<SystemTime>,
    /// Why it would do nothing.
    refuses: Option<Arc<ProviderError>>,
}

impl Recipients {
    /// How the providers are at this moment, as far as that shows without asking them.
    pub(crate) fn outlook(&self) -> Outlook {
        let foreseen = |known: &Provider| {
            let provider = known.provider();
            let foreseen = Foreseen {
                name: provider.name().to_owned(),
                kind: Kind::named(provider.kind()),
                last_answer: provider.last_answer(),
                refuses: provider.refuses().map(Arc::new),
            };
            (provider.id(), foreseen)
        };
        let deleted = self.keystore.deleted_providers().map(|rows| rows.sound);
        Outlook {
            providers: self.providers().iter().map(foreseen).collect(),
            deleted: deleted.unwrap_or_default(),
        }
    }
}

impl Outlook {
    /// Whether a provider of the envelope would be asked for its key.
    pub(crate) fn opens(&self, envelope: &Envelope) -> Result<(), OpenError> {
        let mut attempts = Vec::with_capacity(envelope.stanzas.len());
        for stanza in &envelope.stanzas {
            attempts.push(match self.providers.get(&stanza.provider) {
                None => unknown(stanza),
                Some(Foreseen { refuses: None, .. }) => return Ok(()),
                Some(Foreseen {
                    name,
                    kind,
                    last_answer,
                    refuses: Some(error),
                }) => Attempt {
                    provider: stanza.provider,
                    name: name.clone(),
                    kind: *kind,
                    why: Refusal::Provider(Arc::clone(error)),
                    last_answer: *last_answer,
                },
            });
        }
        let binding = envelope.binding();
        Err(OpenError { binding, attempts }.with_deleted(&self.deleted))
    }
}

fn unknown(stanza: &Stanza) -> Attempt {
    Attempt {
        provider: stanza.provider,
        name: printable(&stanza.provider_name),
        kind: None,
        why: Refusal::NotKnown { kind: None },
        last_answer: None,
    }
}
