//! `virtseal provider set …`.

use clap::Args;

use super::client::Client;
use super::document::Answer;
use super::passphrase::PassphraseArgs;
use super::print::Printer;
use crate::api::{HostProxy, SettingAssigned, SettingsRequest};
use crate::model::problem::Problem;

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// The provider's name.
    name: String,
    /// A setting and its new value, as `provider show` lists them; an empty value is the default.
    #[arg(value_name = "KEY=VALUE", required = true, value_parser = assigned)]
    settings: Vec<SettingAssigned>,
    /// Apply them without connecting first: for servers that are not there yet.
    #[arg(long)]
    no_probe: bool,
    /// What to log in with from now on, where the settings change how.
    #[command(flatten)]
    credential: PassphraseArgs,
}

fn assigned(text: &str) -> Result<SettingAssigned, String> {
    let (key, value) = text
        .split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .ok_or("KEY=VALUE is expected")?;
    Ok(SettingAssigned {
        key: key.to_owned(),
        value: value.to_owned(),
    })
}

pub(super) async fn run(args: &SetArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let request = SettingsRequest {
        assigned: args.settings.clone(),
        no_probe: args.no_probe,
    };
    let given = args.credential.is_given();
    let fds = given.then(|| args.credential.open("")).transpose()?;
    let (name, fds) = (&args.name, Vec::from_iter(fds));
    let set = client
        .call(async |host| host.set_provider(name, &request, fds).await)
        .await?;
    printer.warnings(std::slice::from_ref(&set.provider));
    printer.warn_all(&set.warnings);
    let said = match (set.changed, set.tried) {
        (false, _) => format!("'{name}' has these settings already"),
        (true, true) => {
            format!("'{name}' uses them now: its servers have answered, and what is sealed opens")
        }
        (true, false) => format!("'{name}' uses them now"),
    };
    printer.show(Answer::SettingsSet(Box::new(set)), std::iter::once(said.as_str()))
}
