//! `virtseal provider add kmip …`.

use clap::Args;

use super::add_args::kek_scope;
use super::client::Client;
use super::print::Printer;
use crate::api::{HostProxy, ProviderKind};
use crate::model::advice::Advice;
use crate::model::cache_policy::CachePolicy;
use crate::model::deadlines::kmip::TIMEOUT_MS;
use crate::model::envelope::ProviderId;
use crate::model::problem::Problem;
use crate::provider::ScopeSetting;
use crate::provider::kmip::{Endpoint, KmipVersion};

/// As the settings of the kind have it; the daemon reads them.
#[derive(Debug, Args)]
pub(super) struct KmipArgs {
    /// Its name.
    name: String,
    /// A server of the KMS; repeat it for the other nodes of the same cluster, in the order to ask them.
    #[arg(long = "endpoint", value_name = "HOST[:PORT]", required = true)]
    endpoints: Vec<Endpoint>,
    /// Where keys do their work: fetched and used on this host, or never leaving the server.
    #[arg(long, value_parser = ["local", "server"], default_value = "local")]
    mode: String,
    /// Whom one key serves.
    #[arg(long, value_parser = kek_scope(), default_value = "vm")]
    kek_scope: ScopeSetting,
    /// How long a fetched key is kept for when no server answers: none, until-lock, or a time such as 4h [default: 24h].
    #[arg(long, value_name = "POLICY")]
    cache: Option<CachePolicy>,
    /// Speak this version instead of the best that both sides have.
    #[arg(long, value_name = "1.1 … 2.1")]
    kmip_version: Option<KmipVersion>,
    /// The most time for one operation with its retries, in milliseconds.
    #[arg(long, value_name = "N", default_value_t = TIMEOUT_MS)]
    timeout_ms: u64,
    /// The provider's UUID on another host: both open what the other sealed.
    #[arg(long, value_name = "UUID")]
    id: Option<ProviderId>,
}

pub(super) async fn add(args: &KmipArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let settings = serde_json::json!({
        "endpoints": args.endpoints,
        "mode": args.mode,
        "kek_scope": args.kek_scope,
        "cache": args.cache,
        "kmip_version": args.kmip_version,
        "timeout_ms": args.timeout_ms,
        "id": args.id,
    });
    let (name, settings) = (&args.name, settings.to_string());
    let added = client
        .call(async |host| {
            host.add_provider(name, ProviderKind::Kmip, &settings, Vec::new())
                .await
        })
        .await?;
    printer.providers_after(name, &added.providers, true)?;
    let (trust, identity, request) = (
        Advice::TrustProvider(name.clone()),
        Advice::SetIdentity(name.clone()),
        Advice::RequestCertificate(name.clone()),
    );
    printer.advise(&format!(
        "Next: {trust}, and {identity} --key FILE (or {request})"
    ))
}
