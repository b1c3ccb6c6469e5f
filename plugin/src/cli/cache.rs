//! `virtseal provider cache`.

use clap::{Args, ValueEnum};

use super::client::Client;
use super::print::Printer;
use crate::api::{HostProxy, PersistRequest};
use crate::model::cache_policy::{CachePolicy, KeepTime};
use crate::model::problem::Problem;

#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    /// The provider's name.
    name: String,
    /// none, until-lock, or a time such as 4h: counted from when each was last fetched.
    policy: CachePolicy,
    /// Keep them on disk too, sealed by the TPM of this host, so that VMs start after a reboot while the servers are down.
    #[arg(long, value_enum, default_value_t)]
    persist: PersistBy,
    /// For how long that is, from when each was last fetched; 24h unless given.
    #[arg(long, value_name = "TIME")]
    persist_for: Option<KeepTime>,
    /// Only while these PCRs are what they are now: PCR 7, unless given, is Secure Boot's state and keys.
    #[arg(long, value_name = "LIST")]
    pcrs: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum PersistBy {
    /// Not at all; what was kept is removed.
    #[default]
    None,
    /// By the TPM 2.0 of this host.
    Tpm,
}

impl CacheArgs {
    fn persist(&self) -> Result<Option<PersistRequest>, Problem> {
        match self.persist {
            PersistBy::Tpm => Ok(Some(PersistRequest {
                keep: self.persist_for,
                pcrs: self.pcrs.clone(),
            })),
            PersistBy::None if self.persist_for.is_none() && self.pcrs.is_none() => Ok(None),
            PersistBy::None => Err(Problem::usage(
                "--persist-for and --pcrs are about --persist tpm, which is missing",
            )),
        }
    }
}

pub(super) async fn set(args: &CacheArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let persist = args.persist()?;
    let set = client
        .call(async |host| {
            host.set_provider_cache(&args.name, args.policy, persist.clone())
                .await
        })
        .await?;
    let provider = set
        .providers
        .into_iter()
        .find(|provider| provider.name == args.name);
    match provider {
        Some(provider) => printer.provider_changed(provider, set.changed),
        None => Ok(()),
    }
}
