//! `virtseal provider add kmip`, `identity`, `csr` and `trust`: trust between this host and a KMS, both ways.

use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};

use super::client::Client;
use super::print::Printer;
use super::{CsrArgs, IdentityArgs, KmipArgs, TrustArgs, passphrase};
use crate::api::{HostProxy, IdentityParts, NewKey, ServerView};
use crate::failure::{Code, Failure};

pub(super) async fn add_kmip(args: &KmipArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let settings = serde_json::json!({
        "endpoints": args.endpoints,
        "mode": args.mode,
        "kek_scope": args.kek_scope,
        "cache": args.cache,
        "kmip_version": args.kmip_version,
        "timeout_ms": args.timeout_ms,
        "id": args.id,
    });
    let (name, settings) = (&args.name, settings.to_string());
    let added = client
        .call(async |host| host.add_provider(name, "kmip", &settings, Vec::new()).await)
        .await?;
    printer.providers(&added.providers)?;
    printer.advise(&format!(
        "Next: virtseal provider trust {name}, and virtseal provider identity {name} --cert FILE --key FILE (or \
         virtseal provider csr {name})"
    ))
}

pub(super) async fn identity(
    args: &IdentityArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Failure> {
    let name = &args.name;
    let parts = IdentityParts {
        key: args.key.is_some(),
        user: args.user.clone(),
        seal: args.seal || args.passphrase.is_given(),
    };
    let mut fds = vec![passphrase::open_file(&args.cert)?];
    for file in args.key.iter().chain(&args.password_file) {
        fds.push(passphrase::open_file(file)?);
    }
    if parts.seal {
        fds.push(args.passphrase.open(&format!("New passphrase of '{name}': "))?);
    }
    let set = client
        .call(async |host| host.set_provider_identity(name, &parts, fds).await)
        .await?;
    let certificate = &set.certificate;
    if certificate.days_left <= 30 {
        printer.warn(&format!(
            "the client certificate expires in {} days, on {}",
            certificate.days_left, certificate.not_after
        ));
    }
    printer.providers(&[set.provider])?;
    printer.advise(&format!(
        "'{name}' shows itself as {}, SHA-256 {}, until {}",
        certificate.subject, certificate.sha256, certificate.not_after
    ))
}

pub(super) async fn csr(args: &CsrArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let new = args.new.then(|| NewKey {
        rsa: args.rsa,
        common_name: args.common_name.clone(),
    });
    let made = client
        .call(async |host| host.provider_signing_request(&args.name, new.as_ref()).await)
        .await?;
    let Some(path) = &args.output else {
        return printer.show(&made, &made.pem);
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    file.and_then(|mut file| file.write_all(made.pem.as_bytes()))
        .map_err(|error| {
            Failure::from_error(Code::Failed, format!("can't write {}", path.display()), &error)
        })?;
    printer.done(&format!(
        "{} is the request; have it signed, then virtseal provider identity {} --cert FILE",
        path.display(),
        args.name
    ))
}

pub(super) async fn trust(args: &TrustArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let name = &args.name;
    let shown = client
        .call(async |host| host.provider_servers(name).await)
        .await?
        .servers;
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
    printer.providers(&trusted.providers)
}

/// Those of the servers' own certificates: what the admin sees is what is trusted, whatever is shown a moment later.
fn shown_fingerprints(name: &str, shown: &[ServerView]) -> Result<Vec<String>, Failure> {
    let own = shown.iter().filter_map(|server| server.chain.first());
    let mut fingerprints: Vec<_> = own.map(|certificate| certificate.sha256.clone()).collect();
    fingerprints.sort();
    fingerprints.dedup();
    if fingerprints.is_empty() {
        let failure = Failure::new(
            Code::Unreachable,
            format!("provider '{name}': no server shows a certificate"),
        );
        return Err(failure.next(format!("virtseal provider show {name}")));
    }
    Ok(fingerprints)
}

fn confirm(name: &str, args: &TrustArgs) -> Result<(), Failure> {
    if !std::io::stdin().is_terminal() {
        let failure = Failure::new(
            Code::Usage,
            format!(
                "provider '{name}': somebody must compare the fingerprints, and there is no terminal to ask on"
            ),
        );
        return Err(failure.next(format!(
            "virtseal provider trust {name} --ca FILE --yes, or --fingerprint HEX --yes"
        )));
    }
    let question = match (&args.ca, args.fingerprints.is_empty()) {
        (Some(ca), _) => format!("Trust servers signed by {}?", ca.display()),
        (None, false) => "Trust servers with the fingerprints given?".to_owned(),
        (None, true) => "Are these the fingerprints that the KMS's admin has? Trust them?".to_owned(),
    };
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    if read.is_ok() && ["y", "yes"].contains(&answer.trim().to_lowercase().as_str()) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Failed,
        format!("provider '{name}' is not trusted: nothing was changed"),
    ))
}
