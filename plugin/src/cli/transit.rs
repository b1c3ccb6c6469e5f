//! `virtseal provider add transit …`.

use serde_json::{Value, json};

use super::client::Client;
use super::print::Printer;
use super::{TransitArgs, TransitLoginArgs};
use crate::api::HostProxy;
use crate::failure::{Code, Failure};
use crate::provider::transit::TransitSettings;

pub(super) async fn add(args: &TransitArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let name = &args.name;
    let settings = settings(args)?;
    let added = client
        .call(async |host| host.add_provider(name, "transit", &settings, vec![]).await)
        .await?;
    printer.providers(&added.providers)?;
    let secret = match args.login.auth.as_str() {
        "approle" => "its secret id",
        "cert" => "a PEM file with its private key and certificate",
        _ => "its token",
    };
    printer.advise(&format!(
        "It is locked. Give it {secret}: virtseal provider unlock {name}"
    ))
}

/// The JSON of [`TransitSettings`]; checked here too, so that a mistake is told without a daemon.
fn settings(args: &TransitArgs) -> Result<String, Failure> {
    let unfit = |error: &dyn std::error::Error| {
        Failure::from_error(Code::Usage, format!("can't add provider '{}'", args.name), error)
            .next("virtseal provider add transit --help")
    };
    let ca = args.ca.as_ref().map(std::path::absolute).transpose();
    let mut settings = json!({
        "address": args.address, "mount": args.mount, "auth": login(&args.login), "kek_scope": args.kek_scope,
        "timeout_ms": args.timeout_ms
    });
    let ca = ca.map_err(|error| unfit(&error))?;
    set(&mut settings, "namespace", json!(args.namespace));
    set(&mut settings, "key", json!(args.key));
    set(&mut settings, "ca", json!(ca));
    set(&mut settings, "server_name", json!(args.server_name));
    set(&mut settings, "id", json!(args.id));
    let settings = settings.to_string();
    TransitSettings::parse(&settings).map_err(|error| unfit(&error))?;
    Ok(settings)
}

fn login(args: &TransitLoginArgs) -> Value {
    let mut login = json!({"method": args.auth});
    set(&mut login, "role_id", json!(args.role_id));
    set(&mut login, "role", json!(args.cert_role));
    set(&mut login, "mount", json!(args.auth_mount));
    login
}

/// What was not given is left out, and what does not belong to the method is refused with it.
fn set(object: &mut Value, field: &str, value: Value) {
    if !value.is_null() {
        object[field] = value;
    }
}
