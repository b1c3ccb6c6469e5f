//! `virtseal provider add …`.

use clap::Subcommand;

use super::add_args::NoCacheArgs;
use super::client::Client;
use super::kmip::KmipArgs;
use super::passphrase::NewPassphraseArgs;
use super::pkcs11::Pkcs11Args;
use super::print::Printer;
use super::transit::TransitArgs;
use super::{kmip, pkcs11, transit};
use crate::api::{HostProxy, ProviderKind};
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::model::subject::Subject;

#[derive(Debug, Subcommand)]
pub(super) enum AddCommand {
    /// The embedded provider: a root key of its own, encrypted by a passphrase.
    Native {
        /// Its name.
        name: String,
        #[command(flatten)]
        cache: NoCacheArgs,
        #[command(flatten)]
        passphrase: NewPassphraseArgs,
    },
    /// The transit engine of a HashiCorp Vault or OpenBao. Its KEKs never leave it.
    Transit(Box<TransitArgs>),
    /// A token behind a PKCS#11 module: an HSM, a smart card, SoftHSM. Its KEKs never leave it.
    Pkcs11(Pkcs11Args),
    /// Keys at a key management server that speaks KMIP.
    Kmip(KmipArgs),
}

pub(super) async fn run(command: AddCommand, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    match command {
        AddCommand::Native {
            name,
            cache,
            passphrase,
        } => {
            cache.refuse("native")?;
            let prompt = format!("New passphrase of '{name}': ");
            let provider = Subject::Provider(name.clone());
            let fds = vec![passphrase.open(&prompt, &provider, printer)?];
            let added = client
                .call(async |host| host.add_provider(&name, ProviderKind::Native, "", fds).await)
                .await?;
            printer.providers_after(&name, &added.providers, true)?;
            let backup = Advice::BackUpProvider(name);
            printer.advise(&format!("It wraps nothing until it is backed up. Next: {backup}"))
        }
        AddCommand::Transit(args) => transit::add(&args, client, printer).await,
        AddCommand::Pkcs11(args) => pkcs11::add(&args, client, printer).await,
        AddCommand::Kmip(args) => kmip::add(&args, client, printer).await,
    }
}
