//! `virtseal provider identity`, `csr` and `trust`: trust between this host and a KMS, both ways.

use std::fs::{self, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::client::Client;
use super::document::{Answer, SigningRequest};
use super::new_backup::absolute;
use super::passphrase::{self, NewPassphraseArgs};
use super::print::Printer;
use super::tpm::tpm_of;
use crate::api::{HostProxy, IdentityParts, NewKey, ServerView};
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::model::subject::Subject;
use crate::provider::kmip::Fingerprint;

#[derive(Debug, Args)]
pub(super) struct IdentityArgs {
    /// The provider's name.
    name: String,
    /// The client's certificate in PEM, then those that signed it; - is standard input.
    #[arg(long, value_name = "FILE")]
    cert: PathBuf,
    /// Its private key in PEM; not needed if it is in the same file or belongs to the last `provider csr`.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// A user name, for a KMS that asks for more than a certificate.
    #[arg(long, value_name = "NAME", requires = "password_file")]
    user: Option<String>,
    /// Read that user's password from this file.
    #[arg(long, value_name = "FILE", requires = "user")]
    password_file: Option<PathBuf>,
    /// Encrypt the private key: by a passphrase, and the provider is locked then until it is unlocked; or by the TPM 2.0 of this host,
    /// which unlocks it when virtseald starts.
    #[arg(
        long,
        alias = "seal",
        value_name = "BY",
        value_enum,
        num_args = 0..=1,
        default_missing_value = "passphrase"
    )]
    encrypt: Option<EncryptBy>,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EncryptBy {
    /// Somebody types it.
    Passphrase,
    /// While PCR 7 is what it is now; as it was enrolled, with its PIN, where it is already.
    Tpm,
}

#[derive(Debug, Args)]
pub(super) struct CsrArgs {
    /// The provider's name.
    name: String,
    /// Make a new private key and request; else it is the one that waits, or one for the key in use.
    #[arg(long)]
    new: bool,
    /// An RSA key of 3072 bits instead of a NIST P-256 one.
    #[arg(long, requires = "new")]
    rsa: bool,
    /// The common name to ask for instead of the host's name; many a KMS takes it for the user's name.
    #[arg(long, value_name = "NAME", requires = "new")]
    common_name: Option<String>,
    /// Write it to this file.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct TrustArgs {
    /// The provider's name.
    name: String,
    /// Trust servers whose certificate was signed by a CA in this PEM file and bears the endpoint's name.
    #[arg(long, value_name = "FILE", group = "known_by")]
    ca: Option<PathBuf>,
    /// Refuse certificates that this revocation list of the CA (PEM) names. Renew it before it runs out.
    #[arg(long, value_name = "FILE", requires = "ca")]
    crl: Option<PathBuf>,
    /// Trust a server with this SHA-256 fingerprint; repeat it for every node.
    #[arg(long = "fingerprint", value_name = "HEX", group = "known_by")]
    fingerprints: Vec<Fingerprint>,
    /// Do not ask.
    #[arg(long, requires = "known_by")]
    yes: bool,
}

pub(super) async fn identity(
    args: &IdentityArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let name = &args.name;
    let by_tpm = args.encrypt == Some(EncryptBy::Tpm);
    let tpm = match by_tpm {
        true => tpm_of(name, client).await?,
        false => None,
    };
    let pin = tpm.as_ref().is_some_and(|tpm| tpm.pin);
    // Of a damaged one nobody knows, and virtseald says so.
    let has_no_pin = !pin && tpm.is_none_or(|tpm| tpm.pcrs.is_some());
    if by_tpm && has_no_pin && args.passphrase.is_given() {
        return Err(Problem::usage("with --encrypt tpm nobody knows the passphrase"));
    }
    let parts = IdentityParts {
        key: args.key.is_some(),
        user: args.user.clone(),
        encrypt: !by_tpm && (args.encrypt.is_some() || args.passphrase.is_given()),
        by_tpm,
        pin,
    };
    let mut fds = vec![passphrase::open_file(&args.cert)?];
    for file in args.key.iter().chain(&args.password_file) {
        fds.push(passphrase::open_file(file)?);
    }
    if parts.encrypt {
        let prompt = format!("New passphrase of '{name}': ");
        let provider = Subject::Provider(name.clone());
        fds.push(args.passphrase.open(&prompt, &provider, printer)?);
    }
    if pin {
        let question = format!("PIN of '{name}' for the TPM: ");
        fds.push(args.passphrase.open_pin(&question, printer)?);
    }
    let set = client
        .call(async |host| host.set_provider_identity(name, &parts, fds).await)
        .await?;
    printer.identity_set(name, set)
}

pub(super) async fn csr(args: &CsrArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let new = args.new.then(|| NewKey {
        rsa: args.rsa,
        common_name: args.common_name.clone(),
    });
    let made = client
        .call(async |host| host.provider_signing_request(&args.name, new.as_ref()).await)
        .await?;
    let (pem, changed) = (made.pem, made.changed);
    let told = |path, changed| {
        Answer::SigningRequest(SigningRequest {
            pem: pem.clone(),
            path,
            changed,
        })
    };
    let Some(path) = &args.output else {
        return printer.show(told(None, changed), pem.lines());
    };
    write_request(path, pem.as_bytes()).map_err(|error| {
        Problem::from_io(format!("can't write {}", path.display()), &error)
            .next("the same command with another --output: the request waits until it is answered")
    })?;
    let text = format!(
        "{} is the request; have it signed, then {}",
        path.display(),
        Advice::SetIdentity(args.name.clone())
    );
    let path = Some(absolute(path)?);
    printer.show(told(path, true), std::iter::once(text.as_str()))
}

/// What this command has made goes again where not all of it can be written.
fn write_request(path: &Path, pem: &[u8]) -> io::Result<()> {
    let made = OpenOptions::new().write(true).create_new(true).open(path);
    let is_new = made.is_ok();
    let file = match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).truncate(true).open(path)
        }
        made => made,
    };
    let written = file.and_then(|mut file| file.write_all(pem));
    if written.is_err() && is_new {
        let _ = fs::remove_file(path);
    }
    written
}

pub(super) async fn trust(args: &TrustArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let name = &args.name;
    // Whom nobody compares is not waited for twice.
    let shown = match args.yes {
        true => Vec::new(),
        false => {
            let shown = client.call(async |host| host.provider_servers(name).await);
            shown.await?.servers
        }
    };
    printer.servers(&shown);
    let ca = args.ca.as_deref().map(passphrase::open_file).transpose()?;
    let fingerprints = match (&ca, args.fingerprints.as_slice()) {
        (Some(_), _) => Vec::new(),
        (None, []) => shown_fingerprints(name, &shown)?,
        (None, given) => given.iter().map(ToString::to_string).collect(),
    };
    if !args.yes {
        confirm(name, args)?;
    }
    let crl = args.crl.as_deref().map(passphrase::open_file).transpose()?;
    let fds = ca.into_iter().chain(crl).collect();
    let trusted = client
        .call(async |host| host.trust_provider(name, &fingerprints, fds).await)
        .await?;
    printer.providers_after(name, &trusted.providers, trusted.changed)
}

/// Those of the servers' own certificates: what the admin sees is what is trusted, whatever is shown a moment later.
fn shown_fingerprints(name: &str, shown: &[ServerView]) -> Result<Vec<String>, Problem> {
    let own = shown.iter().filter_map(|server| server.chain.first());
    let mut fingerprints: Vec<_> = own.map(|certificate| certificate.sha256.clone()).collect();
    fingerprints.sort();
    fingerprints.dedup();
    if fingerprints.is_empty() {
        let failure = Problem::unreachable(format!("provider '{name}': no server shows a certificate"));
        return Err(failure.next(Advice::ShowProvider(name.to_owned())));
    }
    Ok(fingerprints)
}

fn confirm(name: &str, args: &TrustArgs) -> Result<(), Problem> {
    if !std::io::stdin().is_terminal() {
        let failure = Problem::usage(format!(
            "provider '{name}': somebody must compare the fingerprints, and there is no terminal to ask on"
        ));
        return Err(failure.next(
            Advice::TrustProvider(name.to_owned()).note("with --ca FILE --yes or --fingerprint HEX --yes"),
        ));
    }
    let question = match (&args.ca, args.fingerprints.is_empty()) {
        (Some(ca), _) => format!("Trust servers signed by {}?", ca.display()),
        (None, false) => "Trust servers with the fingerprints given?".to_owned(),
        (None, true) => "Are these the fingerprints that the KMS's admin has? Trust them?".to_owned(),
    };
    let mut answer = String::new();
    let read = super::out::question(&format!("{question} [y/N]"))
        .and_then(|()| std::io::stdin().read_line(&mut answer));
    if read.is_ok() && ["y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
        return Ok(());
    }
    Err(Problem::failed(format!(
        "provider '{name}' is not trusted: nothing was changed"
    )))
}
