//! `virtseal provider add pkcs11 …`.

use std::error::Error;

use super::client::Client;
use super::print::Printer;
use super::{Pkcs11Args, TokenArgs};
use crate::api::HostProxy;
use crate::failure::{Code, Failure};
use crate::provider::pkcs11::{KeyBits, Pkcs11Settings, TokenChoice};

pub(super) async fn add(args: &Pkcs11Args, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    args.cache.refuse("pkcs11")?;
    let settings = settings(args)?;
    let fds = vec![args.pin.open(&format!("PIN of the token of '{}': ", args.name))?];
    let added = client
        .call(async |host| host.add_provider(&args.name, "pkcs11", &settings, fds).await)
        .await?;
    printer.providers(&added.providers)
}

/// The JSON of [`Pkcs11Settings`].
fn settings(args: &Pkcs11Args) -> Result<String, Failure> {
    let unfit = |error: &dyn Error| {
        Failure::from_error(Code::Usage, format!("can't add provider '{}'", args.name), error)
            .next("virtseal provider add pkcs11 --help")
    };
    let settings = Pkcs11Settings {
        module: std::path::absolute(&args.module).map_err(|error| unfit(&error))?,
        token: token_choice(&args.token),
        key_bits: KeyBits::try_from(args.key_bits).map_err(|error| unfit(&error))?,
        kek_scope: args.kek_scope,
        init_args: args.init_args.clone(),
        serial: None,
        host: String::new(),
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
