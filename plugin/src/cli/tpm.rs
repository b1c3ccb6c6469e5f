//! `virtseal provider tpm …`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};

use super::client::Client;
use super::credential::asked_for;
use super::document::{Answer, Deed, TpmChanged};
use super::passphrase::{NewPassphraseArgs, open_file};
use super::print::Printer;

use crate::api::{HostProxy, ProviderView, TpmRequest, TpmView, words};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::provider::kind::{KeysAt, Kind};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("way").required(true).multiple(false)))]
pub(super) struct TpmArgs {
    /// The provider's name.
    name: String,
    /// Bind to the TPM what unlocks it: a native provider's root keys, for which it must be unlocked, or another's passphrase, PIN, token,
    /// secret id or client key. That goes on unlocking it too.
    #[arg(long, group = "way")]
    enroll: bool,
    /// Only while these PCRs are what they are now; unless given, those of the enrolment that this one replaces, or else
    /// PCR 7: Secure Boot's state and keys.
    #[arg(long, visible_alias = "pcr", value_name = "LIST", requires = "enroll")]
    pcrs: Option<String>,
    /// The public key, in PEM, that signs what PCR 11 may be: each kernel brings its signature, as for systemd-cryptenroll.
    #[arg(long, value_name = "FILE", requires = "enroll")]
    pcr_public_key: Option<PathBuf>,
    /// Have the TPM ask for a PIN too: the provider does not unlock by itself then.
    #[arg(long, requires = "enroll")]
    pin: bool,
    /// Drop the PIN.
    #[arg(long, requires = "enroll", conflicts_with_all = ["pin", "passphrase_source"])]
    no_pin: bool,
    #[command(flatten)]
    new_pin: NewPassphraseArgs,
    /// Read what unlocks it, where it is not a native one, from this file; - is standard input.
    #[arg(long, value_name = "FILE", requires = "enroll")]
    credential_file: Option<PathBuf>,
    /// Stop the TPM from unlocking it.
    #[arg(long, group = "way")]
    remove: bool,
}

pub(super) async fn run(args: &TpmArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let name = &args.name;
    if args.remove {
        let gone = client.call(async |host| host.remove_tpm(name).await).await?;
        return printer.done(
            Deed::TpmRemoved,
            name,
            gone.changed,
            &match gone.changed {
                true => format!("The TPM does not unlock '{name}' any more"),
                false => format!("The TPM did not unlock '{name}'"),
            },
        );
    }
    let credential = credential(args, client).await?;
    let request = TpmRequest {
        with_credential: credential.is_some(),
        pcrs: args.pcrs.clone(),
        public_key: args.pcr_public_key.as_deref().map(public_key).transpose()?,
        without_pin: args.no_pin,
    };
    let wants_pin = args.pin || args.new_pin.is_given() || (!args.no_pin && needs_pin(name, client).await?);
    let mut fds: Vec<_> = credential.into_iter().collect();
    if wants_pin {
        let question = format!("PIN of '{name}' for the TPM: ");
        fds.push(args.new_pin.open_pin(&question, printer)?);
    }
    let enrolled = client
        .call(async |host| host.enroll_tpm(name, &request, fds).await)
        .await?;
    printer.warn_all(&enrolled.warnings);
    let text = said(name, &enrolled.tpm);
    let told = TpmChanged {
        tpm: enrolled.tpm,
        changed: true,
        warnings: enrolled.warnings,
    };
    printer.show(Answer::TpmEnrolled(told), std::iter::once(text.as_str()))
}

/// What a provider is unlocked with whose root keys are not here. One that is enrolled has the TPM open it.
async fn credential(args: &TpmArgs, client: &mut Client) -> Result<Option<OwnedFd>, Problem> {
    if let Some(file) = &args.credential_file {
        return open_file(file).map(Some);
    }
    let known = client.provider(&args.name).await?;
    let is_native =
        |known: &ProviderView| Kind::named(&words(&known.kind)).is_none_or(|kind| kind.keys == KeysAt::Host);
    match known.filter(|known| !is_native(known) && known.tpm.is_none()) {
        Some(known) => Ok(asked_for(&args.name, Some(&known))?.pop()),
        None => Ok(None),
    }
}

/// What the TPM asks for before it unlocks it, if it does.
pub(super) async fn tpm_of(name: &str, client: &mut Client) -> Result<Option<TpmView>, Problem> {
    Ok(client.provider(name).await?.and_then(|provider| provider.tpm))
}

/// Whether that is a PIN.
pub(super) async fn needs_pin(name: &str, client: &mut Client) -> Result<bool, Problem> {
    Ok(tpm_of(name, client).await?.is_some_and(|tpm| tpm.pin))
}

/// What it does from now on, and what it does not look at.
fn said(name: &str, tpm: &TpmView) -> String {
    let when = match tpm.pin {
        true => format!(
            "when somebody types its PIN ({})",
            Advice::UnlockByTpm(name.to_owned())
        ),
        false => "when virtseald starts".to_owned(),
    };
    let pcrs = tpm.pcrs.as_deref().unwrap_or_default();
    let exact: Vec<_> = pcrs
        .split(',')
        .filter(|pcr| *pcr != "11" || tpm.signed_by.is_none())
        .collect();
    let mut conditions = Vec::new();
    if !exact.is_empty() {
        conditions.push(format!("PCR {} is what it is now", exact.join(",")));
    }
    if let Some(key) = &tpm.signed_by {
        conditions.push(format!("PCR 11 is what the key {key} has signed"));
    }
    let uncovered = match exact.contains(&"7") && tpm.signed_by.is_none() {
        true => {
            ". PCR 7 covers whether Secure Boot is on and whose keys it trusts; not which of the signed kernels boots, nor its command line or initrd (PCRs 9, 11, 12)"
        }
        false => "",
    };
    format!(
        "The TPM unlocks '{name}' {when}, while {}{uncovered}. Keep the passphrase, PIN or secret of '{name}': it opens whatever changes",
        conditions.join(" and ")
    )
}

fn public_key(path: &Path) -> Result<String, Problem> {
    let failed = |error: &dyn std::error::Error| {
        Problem::from_error(Code::Usage, format!("can't read {}", path.display()), error)
    };
    let text = std::fs::read(path).map_err(|error| failed(&error))?;
    // Nobody's private key goes to the daemon by mistake.
    if text.windows(12).any(|part| part == b"PRIVATE KEY-") {
        return Err(Problem::usage(format!(
            "{} is a private key, and the public one is needed",
            path.display()
        ))
        .next(format!("openssl pkey -in {} -pubout", path.display())));
    }
    String::from_utf8(text).map_err(|error| failed(&error))
}
