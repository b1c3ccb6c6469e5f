//! `virtseal provider add …`, and what its kinds have in common.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};

use super::client::Client;
use super::kmip::KmipArgs;
use super::passphrase::NewPassphraseArgs;
use super::pkcs11::Pkcs11Args;
use super::print::Printer;
use super::transit::TransitArgs;
use super::{kmip, pkcs11, transit};
use crate::api::HostProxy;
use crate::model::problem::{Code, Problem};
use crate::provider::ScopeSetting;
use crate::provider::cache::CachePolicy;
use crate::provider::kind::Kind;

#[derive(Debug, Subcommand)]
pub(super) enum AddCommand {
    /// The embedded provider: a root key of its own, sealed by a passphrase.
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

/// For kinds without a cache, so that who asks for one learns why there is none.
#[derive(Debug, Args)]
pub(super) struct NoCacheArgs {
    #[arg(long, value_name = "POLICY", hide = true)]
    cache: Option<CachePolicy>,
}

impl NoCacheArgs {
    pub(super) fn refuse(&self, kind: &str) -> Result<(), Problem> {
        match (
            self.cache,
            Kind::named(kind).and_then(|kind| kind.nothing_to_cache),
        ) {
            (Some(CachePolicy::For(_) | CachePolicy::UntilLock), Some(why)) => {
                Err(Problem::new(Code::Usage, why.to_string()).next("the same command without --cache"))
            }
            _ => Ok(()),
        }
    }
}

/// Parses whom KEKs serve.
pub(super) fn kek_scope() -> impl TypedValueParser<Value = ScopeSetting> {
    PossibleValuesParser::new(["vm", "provider"]).map(|word| match word.as_str() {
        "provider" => ScopeSetting::Provider,
        _ => ScopeSetting::Vm,
    })
}

pub(super) async fn run(command: AddCommand, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    match command {
        AddCommand::Native {
            name,
            cache,
            passphrase,
        } => {
            cache.refuse("native")?;
            let fds = vec![passphrase.open(&format!("New passphrase of '{name}': "))?];
            let added = client
                .call(async |host| host.add_provider(&name, "native", "", fds).await)
                .await?;
            printer.providers(&added.providers)?;
            printer.advise(&format!(
                "It wraps nothing until it is backed up: virtseal provider backup {name} --output FILE"
            ))
        }
        AddCommand::Transit(args) => transit::add(&args, client, printer).await,
        AddCommand::Pkcs11(args) => pkcs11::add(&args, client, printer).await,
        AddCommand::Kmip(args) => kmip::add(&args, client, printer).await,
    }
}
