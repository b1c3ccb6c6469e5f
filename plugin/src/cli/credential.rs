//! What unlocks a provider, asked for by its name.

use std::os::fd::OwnedFd;

use super::passphrase::{ask, to_pipe};
use crate::api::{CredentialKind, ProviderView};
use crate::model::advice::Advice;
use crate::model::problem::Problem;

/// What it asks for, typed here; nothing where it asks for nothing.
pub(super) fn asked_for(name: &str, known: Option<&ProviderView>) -> Result<Vec<OwnedFd>, Problem> {
    let Some(kind) = known.and_then(|provider| provider.asks_for.as_ref()) else {
        return Ok(Vec::new());
    };
    let what = match kind.known() {
        Some(CredentialKind::Passphrase) => "Passphrase",
        Some(CredentialKind::Pin) => "PIN of the token",
        Some(CredentialKind::Token) => "Token",
        Some(CredentialKind::SecretId) => "Secret id",
        // Nobody types that.
        Some(CredentialKind::ClientKey) => {
            return Err(Problem::usage(format!(
                "provider '{name}' logs in by a client certificate, which is in a file with its private key"
            ))
            .next(Advice::UnlockByFile(name.to_owned())));
        }
        None => "Passphrase, PIN or token",
    };
    Ok(vec![to_pipe(&ask(&format!("{what} of '{name}': "))?)?])
}
