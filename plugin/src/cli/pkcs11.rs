//! `virtseal provider add pkcs11 …`.

use std::error::Error;
use std::path::PathBuf;

use clap::Args;

use super::add_args::{NoCacheArgs, kek_scope};
use super::client::Client;
use super::passphrase::PassphraseArgs;
use super::print::Printer;
use crate::api::{HostProxy, ProviderKind};
use crate::model::advice::Advice;
use crate::model::envelope::ProviderId;
use crate::model::problem::{Code, Problem};
use crate::provider::ScopeSetting;
use crate::provider::pkcs11::{KeyBits, Pkcs11Settings, TokenChoice};

#[derive(Debug, Args)]
pub(super) struct Pkcs11Args {
    /// Its name.
    name: String,
    /// The module: a shared library that only root can change.
    #[arg(long, value_name = "PATH")]
    module: PathBuf,
    #[command(flatten)]
    token: TokenArgs,
    /// The size of new KEKs: 128, 192 or 256.
    #[arg(long, value_name = "BITS", default_value = "256")]
    key_bits: u32,
    /// Whom a KEK serves: one for all VMs (provider), or one for each (vm).
    #[arg(long, value_name = "SCOPE", default_value = "provider", value_parser = kek_scope())]
    kek_scope: ScopeSetting,
    #[command(flatten)]
    cache: NoCacheArgs,
    /// The string that the module wants for C_Initialize, where it wants one (NSS).
    #[arg(long, value_name = "TEXT")]
    init_args: Option<String>,
    /// The provider's UUID on other hosts, where the token holds KEKs of several.
    #[arg(long, value_name = "UUID")]
    id: Option<ProviderId>,
    /// The PIN.
    #[command(flatten)]
    pin: PassphraseArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct TokenArgs {
    /// The token with this label.
    #[arg(long, value_name = "LABEL")]
    token_label: Option<String>,
    /// The token with this serial number.
    #[arg(long, value_name = "SERIAL")]
    token_serial: Option<String>,
    /// The token in the slot of this number.
    #[arg(long, value_name = "NUMBER")]
    slot: Option<u64>,
}

pub(super) async fn add(args: &Pkcs11Args, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    args.cache.refuse("pkcs11")?;
    let settings = settings(args)?;
    let fds = vec![args.pin.open(&format!("PIN of the token of '{}': ", args.name))?];
    let added = client
        .call(async |host| {
            host.add_provider(&args.name, ProviderKind::Pkcs11, &settings, fds)
                .await
        })
        .await?;
    printer.providers_after(&args.name, &added.providers, true)
}

/// The JSON of [`Pkcs11Settings`].
fn settings(args: &Pkcs11Args) -> Result<String, Problem> {
    let unfit = |error: &dyn Error| {
        Problem::from_error(Code::Usage, format!("can't add provider '{}'", args.name), error)
            .next(Advice::AddProviderHelp(Some("pkcs11")))
    };
    let settings = Pkcs11Settings {
        module: std::path::absolute(&args.module).map_err(|error| unfit(&error))?,
        token: token_choice(&args.token),
        key_bits: KeyBits::try_from(args.key_bits).map_err(|error| unfit(&error))?,
        kek_scope: args.kek_scope,
        init_args: args.init_args.clone(),
        serial: None,
        host: String::new(),
        description: None,
        id: args.id,
    };
    serde_json::to_string(&settings).map_err(|error| unfit(&error))
}

fn token_choice(args: &TokenArgs) -> TokenChoice {
    match (&args.token_label, &args.token_serial, args.slot) {
        (Some(label), _, _) => TokenChoice::Label(label.clone()),
        (None, Some(serial), _) => TokenChoice::Serial(serial.clone()),
        (None, None, slot) => TokenChoice::Slot(slot.expect("clap requires one of the three")),
    }
}
