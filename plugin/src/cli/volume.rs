//! `virtseal volume …`.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::client::Client;
use super::document::{Answer, VolumeMade};
use super::job;
use super::patience::Patience;
use super::print::Printer;
use super::sums;
use crate::api::{HostProxy, ImageStructure, KeystoreCopy, VolumeChecked, VolumeRequest};
use crate::domain::DeclaredFormat;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::digest::{Algorithm, Digest};
use crate::model::envelope::EnvelopeId;
use crate::model::problem::{Code, Problem};
use crate::model::subject::Subject;
use crate::object::disk::{self, Bytes, KeyslotInfo, LuksInfo, VolumeInfo};

#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Create an encrypted qcow2 image.
    Create(Box<CreateArgs>),
    /// Let another VM have an encrypted image, or no longer.
    Share(ShareArgs),
    /// Drop the envelope of a volume whose image was deleted. No key is destroyed; if the image turns up, `volume adopt` brings it
    /// back.
    Forget(ForgetArgs),
    /// Take over the envelope of an image that this host does not know, or no longer knows, once it has opened it.
    Adopt {
        /// The image.
        path: PathBuf,
    },
    /// Check an image: its header, its key, the envelope that it carries, and the tables of its data. Changes nothing.
    Check {
        /// The image.
        path: PathBuf,
    },
    /// Give a disk another size; its VM may run.
    Resize(ResizeArgs),
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
    /// Virtual size: bytes, or as 20G, 1.5T (powers of 1024), 20GB (of 1000).
    #[arg(long, required_unless_present_any = ["from", "backing"], value_parser = disk_size)]
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
    /// Format of the backing image: raw or qcow2.
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<DeclaredFormat>,
    /// Fill it from this raw or qcow2 image; it grows to --size.
    #[arg(long, value_name = "IMAGE")]
    from: Option<PathBuf>,
    /// Format of that image, where its first bytes are not to be believed: raw or qcow2.
    #[arg(long, value_name = "FORMAT", requires = "from")]
    from_format: Option<DeclaredFormat>,
    /// The SHA-256 that this image must have: else nothing is made.
    #[arg(long, value_name = "HEX", requires = "from", value_parser = sha256)]
    sha256: Option<Digest>,
    /// The file with its sum, as distributions publish it beside an image (SHA256SUMS, SHA512SUMS, CHECKSUM).
    #[arg(long, value_name = "FILE", requires = "from", conflicts_with = "sha256")]
    sums: Option<PathBuf>,
    /// The keys that may have signed that file; its signature is inside, or beside it (.sign, .gpg, .asc, .sig).
    #[arg(long, value_name = "FILE", requires = "sums")]
    keyring: Option<PathBuf>,
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

#[derive(Debug, Args)]
pub(super) struct ForgetArgs {
    /// Where the image was, or the UUID of its envelope.
    #[arg(value_name = "PATH|UUID")]
    volume: String,
    /// Drop it although the image, or a VM that has it, is still there; asks for the name of its VM.
    #[arg(long)]
    force: bool,
    /// That name, typed here instead of at the prompt.
    #[arg(long, value_name = "NAME", requires = "force")]
    yes_forget: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ResizeArgs {
    /// The image.
    path: PathBuf,
    /// Its new virtual size: bytes, or as 20G, 1.5T (powers of 1024), 20GB (of 1000).
    size: Bytes,
    /// Make it smaller: what is beyond its new end is lost; asks for the name of its VM.
    #[arg(long)]
    shrink: bool,
    /// That name, typed here instead of at the prompt.
    #[arg(long, value_name = "NAME", requires = "shrink")]
    yes_shrink: Option<String>,
}

pub(super) async fn resize(args: ResizeArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let (path, size) = (absolute(&args.path)?, args.size);
    let question = format!("What {path} has beyond {size} will be lost. Type the name of its VM: ");
    let typed = args
        .shrink
        .then(|| job::typed(args.yes_shrink, &question))
        .transpose()?;
    let outcome = client
        .call(async |host| host.resize_volume(&path, size.0, typed.as_deref()).await)
        .await?;
    printer.outcome(outcome)
}

pub(super) async fn check(path: &Path, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let path = absolute(path)?;
    let checked = client.call(async |host| host.check_volume(&path).await).await?;
    let rows = [
        ("file", checked.path.clone()),
        ("format", checked.format.to_string()),
        ("virtual size", Bytes(checked.size).to_string()),
        (
            "key",
            format!("opens, by envelope {} of {}", checked.envelope, checked.vm),
        ),
        ("carries", carried(&checked)),
        ("data", checked.structure.to_string()),
    ];
    let text: Vec<_> = rows
        .into_iter()
        .map(|(name, value)| format!("{name:<14}{value}"))
        .collect();
    printer.show(
        Answer::VolumeChecked(checked.clone()),
        text.iter().map(String::as_str),
    )?;
    judge(&checked, printer)
}

fn carried(checked: &VolumeChecked) -> String {
    match checked.copy.known() {
        Some(KeystoreCopy::Same) => "what the keystore has".to_owned(),
        Some(KeystoreCopy::Older) => "an older version, which is updated from the keystore".to_owned(),
        Some(KeystoreCopy::Other) => "not what the keystore has".to_owned(),
        Some(KeystoreCopy::NotCarried) => "no envelope; the keystore has it".to_owned(),
        Some(KeystoreCopy::Unknown) => "what this host does not know".to_owned(),
        None => checked.copy.to_string(),
    }
}

/// What the command ends with: 1 where anything is wrong, 9 where nobody could tell.
fn judge(checked: &VolumeChecked, printer: &Printer) -> Result<(), Problem> {
    let (path, findings) = (&checked.path, &checked.findings);
    if let Some((last, others)) = findings.split_last() {
        others
            .iter()
            .for_each(|finding| printer.caution(&finding.to_string()));
        let problem = Problem::failed(last.what.clone()).about(Subject::Image(path.clone()));
        return Err(problem.advised(last.next.clone().map(Advice::from)));
    }
    match checked.structure.known() {
        Some(ImageStructure::InUse) => Err(Problem::busy(format!(
            "{path} has a sound header and key; its data was not checked, because somebody has it open"
        ))
        .about(Subject::Image(path.clone()))
        .next(Advice::CheckVolume(path.into()).note("while its VM is off"))),
        _ => Ok(()),
    }
}

pub(super) async fn forget(args: ForgetArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let volume = match args.volume.parse::<EnvelopeId>() {
        Ok(id) => id.to_string(),
        Err(_) => absolute(Path::new(&args.volume))?,
    };
    let question = format!("This host will not open {volume} any more. Type the name of its VM: ");
    let typed = args
        .force
        .then(|| job::typed(args.yes_forget, &question))
        .transpose()?;
    let outcome = client
        .call(async |host| host.forget_volume(&volume, typed.as_deref()).await)
        .await?;
    printer.outcome(outcome)
}

pub(super) async fn adopt(path: &Path, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let path = absolute(path)?;
    let outcome = client.call(async |host| host.adopt_volume(&path).await).await?;
    printer.outcome(outcome)
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
    printer.outcome(outcome)
}

impl CreateArgs {
    fn digest(&self) -> Result<Option<Digest>, Problem> {
        match (&self.sums, &self.from) {
            (Some(file), Some(image)) => sums::of_image(file, self.keyring.as_deref(), image).map(Some),
            _ => Ok(self.sha256.clone()),
        }
    }
}

/// virt-install takes `size=20` for 20 GiB.
fn disk_size(text: &str) -> Result<Bytes, String> {
    const LEAST_WITHOUT_UNIT: u64 = 1 << 20;
    let size: Bytes = text
        .parse()
        .map_err(|error: <Bytes as FromStr>::Err| error.to_string())?;
    let has_unit = text.trim_end().ends_with(|c: char| c.is_ascii_alphabetic());
    match has_unit || size.0 >= LEAST_WITHOUT_UNIT {
        true => Ok(size),
        false => Err(format!(
            "a number without a unit is one of bytes: write {text}G for GiB, or {text}B"
        )),
    }
}

fn sha256(hex: &str) -> Result<Digest, String> {
    Digest::from_hex(hex)
        .filter(|digest| digest.algorithm() == Algorithm::Sha256)
        .ok_or_else(|| "a SHA-256 has 64 hex digits".to_owned())
}

pub(super) async fn create(args: &CreateArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let request = VolumeRequest {
        path: absolute(&args.path)?,
        size: args.size.map(|size| size.0),
        vm: args.vm.clone(),
        cluster_size: args.cluster_size.map(|size| size.0),
        backing: args.backing.as_deref().map(absolute).transpose()?,
        backing_format: args.backing_format,
        from: args.from.as_deref().map(absolute).transpose()?,
        from_format: args.from_format,
        digest: args.digest()?.map(String::from),
        provider: args.provider.clone(),
    };
    let created = client
        .call(async |host| host.create_volume(&request).await)
        .await?;
    let made = |envelope: Option<String>, size, job| VolumeMade {
        path: request.path.clone(),
        envelope: envelope.unwrap_or_default(),
        size,
        job,
        changed: true,
    };
    let Some(job) = created.job else {
        return printer.volume_created(made(created.envelope, created.size, None));
    };
    printer.advise(&format!(
        "Job {} fills it, and goes on without this command: {}",
        job.id,
        Advice::WatchJob(job.id)
    ))?;
    let ended = job::follow(Some(job.id), client, printer).await?;
    job::judge(&ended)?;
    let size = Bytes(request.size.unwrap_or(ended.total.unsigned_abs())).whole_sectors();
    printer.volume_created(made(ended.envelope, size.map(|size| size.0), Some(job.id)))
}

pub(super) fn info(path: &Path, patience: Patience, printer: &Printer) -> Result<(), Problem> {
    let info = inspect(path.to_owned(), patience.limit())
        .map_err(|problem| match problem.code {
            Code::Denied => problem.next(Advice::RunAsRoot),
            _ => problem,
        })
        .map_err(|problem| problem.about(Subject::Image(path.display().to_string())))?;
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
            .map(|backing| ("backing file", backing.name.clone())),
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
    printer.show(
        Answer::VolumeInfo(Box::new(info)),
        text.iter().map(String::as_str),
    )
}

/// In a thread that is left behind where storage does not answer.
fn inspect(path: PathBuf, limit: Duration) -> Result<VolumeInfo, Problem> {
    let (sender, receiver) = mpsc::channel();
    let inspected = path.clone();
    thread::spawn(move || {
        let place = PermittedPath::named_by_root(&inspected)
            .map_err(|source| disk::VolumeError::unreachable(&inspected, source));
        // Nobody waits for it any more when this fails.
        let _ = sender.send(place.and_then(|place| disk::inspect(&place)));
    });
    let inspected = receiver.recv_timeout(limit).map_err(|_| {
        Problem::unreachable(format!(
            "the storage of {} does not answer: nothing came for {limit:?}",
            path.display()
        ))
        .about(Subject::Image(path.display().to_string()))
        .next("see whether it can be read at all, and the kernel's log: dmesg")
    })?;
    Ok(inspected?)
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
        Problem::usage(format!(
            "{} is not UTF-8, which libvirt can't hold",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_size_has_a_unit() {
        for (text, bytes) in [
            ("20G", 20 << 30),
            ("512B", 512),
            ("1048576", 1 << 20),
            (" 1k ", 1024),
        ] {
            assert_eq!(disk_size(text).unwrap().0, bytes, "{text}");
        }
        for text in ["20", "0", "1048575"] {
            assert!(
                disk_size(text).unwrap_err().contains(&format!("{text}G")),
                "{text}"
            );
        }
    }
}
