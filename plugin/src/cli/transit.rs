//! `virtseal provider add transit …`.

use std::error::Error;
use std::path::PathBuf;

use super::client::Client;
use super::print::Printer;
use super::{LoginMethod, TransitArgs, TransitLoginArgs};
use crate::api::HostProxy;
use crate::failure::{Code, Failure};
use crate::provider::transit::{Address, ApiPath, Auth, HostName, KeyName, SettingsError, TransitSettings};

pub(super) async fn add(args: &TransitArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    args.cache.refuse("transit")?;
    let name = &args.name;
    let settings = settings(args)?;
    let added = client
        .call(async |host| host.add_provider(name, "transit", &settings, vec![]).await)
        .await?;
    printer.providers(&added.providers)?;
    let secret = match args.login.auth {
        LoginMethod::Token => "its token",
        LoginMethod::Approle => "its secret id",
        LoginMethod::Cert => "a PEM file with its private key and certificate",
    };
    printer.advise(&format!(
        "It is locked. Give it {secret}: virtseal provider unlock {name}"
    ))
}

/// The JSON of [`TransitSettings`].
fn settings(args: &TransitArgs) -> Result<String, Failure> {
    let unfit = |error: &dyn Error| {
        Failure::from_error(Code::Usage, format!("can't add provider '{}'", args.name), error)
            .next("virtseal provider add transit --help")
    };
    let ca = args.ca.as_ref().map(std::path::absolute).transpose();
    let ca = ca.map_err(|error| unfit(&error))?;
    let settings = parse(args, ca).map_err(|error| unfit(&error))?;
    serde_json::to_string(&settings).map_err(|error| unfit(&error))
}

fn parse(args: &TransitArgs, ca: Option<PathBuf>) -> Result<TransitSettings, SettingsError> {
    let settings = TransitSettings {
        address: Address::try_from(args.address.clone())?,
        mount: ApiPath::try_from(args.mount.clone())?,
        namespace: args.namespace.clone().map(ApiPath::try_from).transpose()?,
        auth: auth(&args.login)?,
        kek_scope: args.kek_scope,
        key: args.key.clone().map(KeyName::try_from).transpose()?,
        ca,
        server_name: args.server_name.clone().map(HostName::try_from).transpose()?,
        id: args.id,
        timeout_ms: args.timeout_ms,
    };
    settings.validated()
}

/// The method, with the options that belong to it and no others.
fn auth(args: &TransitLoginArgs) -> Result<Auth, SettingsError> {
    let mount = |usual: fn() -> ApiPath| match args.auth_mount.clone() {
        Some(mount) => ApiPath::try_from(mount),
        None => Ok(usual()),
    };
    let method = args.auth;
    for (given, option, belongs_to) in [
        (args.role_id.is_some(), "--role-id", "--auth approle"),
        (args.cert_role.is_some(), "--cert-role", "--auth cert"),
    ] {
        if given && belongs_to != method.option() {
            return Err(SettingsError::Option { option, belongs_to });
        }
    }
    if args.auth_mount.is_some() && matches!(method, LoginMethod::Token) {
        return Err(SettingsError::Option {
            option: "--auth-mount",
            belongs_to: "--auth approle and --auth cert",
        });
    }
    Ok(match method {
        LoginMethod::Token => Auth::Token {},
        LoginMethod::Approle => Auth::AppRole {
            role_id: args.role_id.clone().unwrap_or_default(),
            mount: mount(ApiPath::approle)?,
        },
        LoginMethod::Cert => Auth::Cert {
            role: args.cert_role.clone(),
            mount: mount(ApiPath::cert)?,
        },
    })
}

impl LoginMethod {
    fn option(self) -> &'static str {
        match self {
            Self::Token => "--auth token",
            Self::Approle => "--auth approle",
            Self::Cert => "--auth cert",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{AddCommand, Cli, Command, ProviderCommand};
    use super::*;
    use crate::provider::ScopeSetting;

    fn parsed(options: &[&str]) -> Result<String, String> {
        let common = ["virtseal", "provider", "add", "transit", "vault"];
        let cli = Cli::try_parse_from(common.iter().chain(options)).map_err(|error| error.to_string())?;
        let Command::Provider(ProviderCommand::Add(AddCommand::Transit(args))) = cli.command else {
            return Err("another command".to_owned());
        };
        settings(&args).map_err(|failure| failure.to_string())
    }

    #[test]
    fn options_become_settings() {
        let url = ["--address", "https://kms:8200"];
        let with = |options: &[&str]| parsed(&[&url[..], options].concat());
        let plain = TransitSettings::parse(&with(&[]).unwrap()).unwrap();
        assert_eq!((plain.auth, plain.kek_scope), (Auth::Token {}, ScopeSetting::Vm));
        let shared = with(&[
            "--auth",
            "approle",
            "--role-id",
            "r",
            "--kek-scope",
            "provider",
            "--key",
            "vms",
        ]);
        let shared = TransitSettings::parse(&shared.unwrap()).unwrap();
        assert_eq!(shared.key.unwrap().as_str(), "vms");
        let ca = TransitSettings::parse(&with(&["--ca", "ca.pem"]).unwrap())
            .unwrap()
            .ca
            .unwrap();
        assert!(ca.is_absolute());
    }

    #[test]
    fn mistakes_are_told_before_the_daemon_is_asked() {
        let refused = |options: &[&str]| parsed(options).unwrap_err();
        let url = "--address=https://kms:8200";
        assert!(refused(&["--address", "http://kms:8200"]).contains("in the clear"));
        assert!(refused(&[url, "--auth", "approle"]).contains("--role-id"));
        assert!(refused(&[url, "--role-id", "x"]).contains("--role-id is for --auth approle"));
        assert!(refused(&[url, "--cert-role", "x"]).contains("--cert-role is for --auth cert"));
        assert!(refused(&[url, "--auth-mount", "x"]).contains("--auth-mount"));
        assert!(refused(&[url, "--key", "vms"]).contains("--kek-scope provider"));
        assert!(refused(&[url, "--auth", "ldap"]).contains("approle"));
    }
}
