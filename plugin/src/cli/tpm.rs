//! `virtseal provider tpm …`.

use clap::Args;

use super::client::Client;
use super::print::Printer;
use crate::api::HostProxy;
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(super) struct TpmArgs {
    /// The provider's name.
    name: String,
    /// Seal its root keys to the TPM; it must be unlocked. Its passphrase goes on unlocking it too.
    #[arg(long, required_unless_present = "remove", conflicts_with = "remove")]
    enroll: bool,
    /// Only while these PCRs are what they are now; unless given, those of the enrolment that this one replaces, or else
    /// PCR 7: Secure Boot's state and keys.
    #[arg(long, value_name = "LIST", requires = "enroll")]
    pcrs: Option<String>,
    /// Take that way in away again.
    #[arg(long)]
    remove: bool,
}

pub(super) async fn run(args: &TpmArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let name = &args.name;
    if args.remove {
        let gone = client.call(async |host| host.remove_tpm(name).await).await?;
        return printer.done(&match gone.removed {
            true => format!("The TPM does not unlock '{name}' any more, its passphrase does"),
            false => format!("The TPM did not unlock '{name}'"),
        });
    }
    let pcrs = args.pcrs.as_deref();
    let enrolled = client
        .call(async |host| host.enroll_tpm(name, pcrs).await)
        .await?;
    printer.done(&format!(
        "The TPM unlocks '{name}' when virtseald starts, while PCR {} is what it is now. Keep the passphrase: it unlocks \
         '{name}' whatever changes",
        enrolled.pcrs
    ))
}
