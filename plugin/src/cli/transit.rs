//! `virtseal provider add transit …`.

use std::error::Error;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::add_args::{NoCacheArgs, kek_scope};
use super::client::Client;
use super::print::Printer;
use crate::api::{HostProxy, ProviderKind};
use crate::model::advice::Advice;
use crate::model::deadlines::transit::TIMEOUT_MS;
use crate::model::envelope::ProviderId;
use crate::model::problem::{Code, Problem};
use crate::provider::ScopeSetting;
use crate::provider::transit::{Address, ApiPath, Auth, HostName, KeyName, SettingsError, TransitSettings};

#[derive(Debug, Args)]
pub(super) struct TransitArgs {
    /// Its name.
    name: String,
    /// The server, or the load balancer of its cluster: https://HOST:PORT.
    #[arg(long, value_name = "URL")]
    address: String,
    /// Where the transit engine is mounted.
    #[arg(long, value_name = "PATH", default_value = "transit")]
    mount: String,
    /// The namespace of engine and login.
    #[arg(long, value_name = "PATH")]
    namespace: Option<String>,
    #[command(flatten)]
    login: TransitLoginArgs,
    /// Whom a key serves: one VM each (vm), or all, with a context for each VM (provider).
    #[arg(long, value_name = "SCOPE", default_value = "vm", value_parser = kek_scope())]
    kek_scope: ScopeSetting,
    /// The name of the shared key.
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// PEM certificates to trust in place of the system's.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The name in the server's certificate, where the address is another.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    #[command(flatten)]
    cache: NoCacheArgs,
    /// The most time for one operation, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = TIMEOUT_MS)]
    timeout_ms: u32,
    /// The provider's UUID on another host: both open what the other sealed.
    #[arg(long, value_name = "UUID")]
    id: Option<ProviderId>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum LoginMethod {
    /// With a token.
    Token,
    /// With a role id and a secret id.
    Approle,
    /// With a client certificate.
    Cert,
}

#[derive(Debug, Args)]
pub(super) struct TransitLoginArgs {
    /// How to log in; the secret for it is given to `virtseal provider unlock`.
    #[arg(long, value_name = "METHOD", value_enum, default_value = "token")]
    auth: LoginMethod,
    /// The AppRole's id.
    #[arg(long, value_name = "ID", required_if_eq("auth", "approle"))]
    role_id: Option<String>,
    /// The certificate role; any that fits without it.
    #[arg(long, value_name = "NAME")]
    cert_role: Option<String>,
    /// Where the login method is mounted, if not at its usual place.
    #[arg(long, value_name = "PATH")]
    auth_mount: Option<String>,
}

pub(super) async fn add(args: &TransitArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    args.cache.refuse("transit")?;
    let name = &args.name;
    let settings = settings(args)?;
    let added = client
        .call(async |host| {
            host.add_provider(name, ProviderKind::Transit, &settings, vec![])
                .await
        })
        .await?;
    printer.providers_after(name, &added.providers, true)?;
    let secret = match args.login.auth {
        LoginMethod::Token => "its token",
        LoginMethod::Approle => "its secret id",
        LoginMethod::Cert => "a PEM file with its private key and certificate",
    };
    printer.advise(&format!(
        "It is locked until it gets {secret}. Next: {}",
        Advice::UnlockProvider(name.clone())
    ))
}

/// The JSON of [`TransitSettings`].
fn settings(args: &TransitArgs) -> Result<String, Problem> {
    let unfit = |error: &dyn Error| {
        Problem::from_error(Code::Usage, format!("can't add provider '{}'", args.name), error)
            .next(Advice::AddProviderHelp(Some("transit")))
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
        description: None,
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

    use super::super::provider::ProviderCommand;
    use super::super::provider_add::AddCommand;
    use super::super::{Cli, Command};
    use super::*;

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
