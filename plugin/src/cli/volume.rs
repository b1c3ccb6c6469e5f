//! `virtseal volume …`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::client::Client;
use super::job;
use super::print::Printer;
use crate::api::{HostProxy, VolumeRequest};
use crate::host::permitted::PermittedPath;
use crate::model::problem::{Code, Problem};
use crate::object::disk::{self, Bytes, KeyslotInfo, LuksInfo};

#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Create an encrypted qcow2 image.
    Create(CreateArgs),
    /// Let another VM have an encrypted image, or no longer.
    Share(ShareArgs),
    /// Show header, keyslots and envelope of an image; needs no key and no daemon.
    Info {
        /// The image.
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Where to create it.
    path: PathBuf,
    /// Virtual size: bytes, or with K, M, G, T (powers of 1024).
    #[arg(long, required_unless_present_any = ["from", "backing"])]
    size: Option<Bytes>,
    /// The VM that the image is for: name or UUID.
    #[arg(long)]
    vm: String,
    /// qcow2 cluster size.
    #[arg(long, value_name = "SIZE")]
    cluster_size: Option<Bytes>,
    /// Put the image on top of this one.
    #[arg(long, value_name = "IMAGE", conflicts_with = "from")]
    backing: Option<PathBuf>,
    /// Format of the backing image.
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,
    /// Fill it from this raw or qcow2 image; it grows to --size.
    #[arg(long, value_name = "IMAGE")]
    from: Option<PathBuf>,
    /// Format of that image, where its first bytes are not to be believed: raw or qcow2.
    #[arg(long, value_name = "FORMAT", requires = "from")]
    from_format: Option<String>,
    /// Use this provider instead of the default one.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ShareArgs {
    /// The image.
    path: PathBuf,
    #[command(flatten)]
    whom: Whom,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Whom {
    /// Let this VM have it too: name or UUID.
    #[arg(long, value_name = "VM")]
    with: Option<String>,
    /// Take that back: from its next start on this VM may not have it.
    #[arg(long, value_name = "VM")]
    without: Option<String>,
}

pub(super) async fn share(args: &ShareArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let path = absolute(&args.path)?;
    let whom = &args.whom;
    let outcome = client
        .call(async |host| match (&whom.with, &whom.without) {
            (_, Some(vm)) => host.unshare_volume(&path, vm).await,
            (vm, None) => host.share_volume(&path, vm.as_deref().unwrap_or_default()).await,
        })
        .await?;
    printer.outcome(&outcome, false)
}

pub(super) async fn create(args: &CreateArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let request = VolumeRequest {
        path: absolute(&args.path)?,
        size: args.size.map(|size| size.0),
        vm: args.vm.clone(),
        cluster_size: args.cluster_size.map(|size| size.0),
        backing: args.backing.as_deref().map(absolute).transpose()?,
        backing_format: args.backing_format.clone(),
        from: args.from.as_deref().map(absolute).transpose()?,
        from_format: args.from_format.clone(),
        provider: args.provider.clone(),
    };
    let created = client
        .call(async |host| host.create_volume(&request).await)
        .await?;
    let Some(job) = created.job else {
        return printer.volume_created(&request.path, &created.envelope.unwrap_or_default(), created.size);
    };
    printer.advise(&format!(
        "Job {} fills it, and goes on without this command: virtseal jobs watch {0}",
        job.id
    ))?;
    let ended = job::follow(Some(job.id), client, printer).await?;
    job::judge(&ended)?;
    let size = Bytes(request.size.unwrap_or(ended.total.unsigned_abs())).whole_sectors();
    printer.volume_created(
        &request.path,
        &ended.envelope.unwrap_or_default(),
        size.map(|size| size.0),
    )
}

pub(super) fn info(path: &Path, printer: &Printer) -> Result<(), Problem> {
    let place =
        PermittedPath::named_by_root(path).map_err(|source| disk::VolumeError::unreachable(path, source))?;
    let info = disk::inspect(&place)?;
    let mut rows = vec![
        ("file", info.path.display().to_string()),
        ("format", info.format.as_str().to_owned()),
        ("virtual size", info.virtual_size.to_string()),
    ];
    rows.extend(
        info.cluster_size
            .map(|size| ("cluster size", Bytes(size.bytes()).to_string())),
    );
    rows.extend(
        info.backing
            .iter()
            .map(|backing| ("backing file", backing.path.clone())),
    );
    if let Some(luks) = &info.luks {
        rows.extend(luks_rows(luks));
    }
    rows.extend(
        info.unreadable_envelope
            .iter()
            .map(|why| ("bad copy", why.clone())),
    );
    if let Some(envelope) = &info.envelope {
        let providers: Vec<_> = envelope
            .stanzas
            .iter()
            .map(|stanza| stanza.provider_name.as_str())
            .collect();
        rows.push((
            "envelope",
            format!("{} (claims generation {})", envelope.id, envelope.generation),
        ));
        rows.push(("made for", format!("{} of VM {}", envelope.kind, envelope.vm)));
        rows.push(("providers", providers.join(", ")));
        if !envelope.shared_with.is_empty() {
            let vms: Vec<_> = envelope.shared_with.iter().map(ToString::to_string).collect();
            rows.push(("shared with", vms.join(", ")));
        }
    }
    let text: Vec<_> = rows
        .into_iter()
        .map(|(name, value)| format!("{name:<14}{value}"))
        .collect();
    printer.show(&info, text.iter().map(String::as_str))
}

fn luks_rows(luks: &LuksInfo) -> [(&'static str, String); 3] {
    let slots = luks
        .keyslots
        .iter()
        .enumerate()
        .filter_map(|(number, slot)| match slot {
            KeyslotInfo::Active { iterations } => Some(format!("{number} ({iterations} iterations)")),
            KeyslotInfo::Dead => None,
        });
    [
        ("cipher", format!("{}, {}-bit key", luks.cipher, luks.key_bits)),
        ("payload at", luks.payload_offset.to_string()),
        ("keyslots", slots.collect::<Vec<_>>().join(", ")),
    ]
}

/// The daemon has another working directory.
fn absolute(path: &Path) -> Result<String, Problem> {
    let absolute: PathBuf = std::path::absolute(path)
        .map_err(|error| Problem::from_error(Code::Usage, format!("{}", path.display()), &error))?;
    absolute.into_os_string().into_string().map_err(|path| {
        Problem::new(
            Code::Usage,
            format!("{} is not UTF-8, which libvirt can't hold", path.display()),
        )
    })
}
