//! `virtseal volume share`: root lets another VM have a volume, and takes that back. What the envelope says is checked at each
//! start; `<shareable/>` and `<readonly/>` in domain XML, which a consumer writes, grant nothing.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::host::{Host, passphrase};
use super::names;
use crate::api::{FindingView, Outcome, StepView};
use crate::host::libvirt::Power;
use crate::host::permitted::PermittedPath;
use crate::model::act::{StepCode, Tense};
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, ObjectKind, Verified, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};
use crate::object::disk::{self, VolumeError};
use crate::store::{Change, CopyPlace, EnvelopeRecord, Put, StoreError};

/// What root wants of a VM's right to a volume that is another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    With,
    Without,
}

/// What is asked for.
struct Request<'a> {
    path: &'a Path,
    /// As it was typed.
    vm: &'a str,
    id: VmId,
    sharing: Sharing,
}

/// How often another change of the envelope, by a job, may come between.
const TRIES: usize = 5;

/// The VM whose volume is at `path`.
pub(crate) fn owner_of(host: &Host<'_>, path: &Path) -> Result<VmId, Problem> {
    Ok(volume_record(host, path)?.envelope.vm)
}

/// Lets a VM have the volume at `path`, or no longer. It needs not be defined. Nothing else may be done to the owner meanwhile.
pub(crate) fn share(host: &Host<'_>, path: &Path, vm: &str, sharing: Sharing) -> Result<Outcome, Problem> {
    let id = vm_to_share_with(host, vm)?;
    let request = Request {
        path,
        vm,
        id,
        sharing,
    };
    let mut record = volume_record(host, path)?;
    let carried = match sharing {
        Sharing::With => carried_where_kept(host, path, &record)?,
        Sharing::Without => None,
    };
    request.refuse(&record, carried)?;
    for _ in 0..TRIES {
        let next = request.changed(host, &record)?;
        if *next == record.envelope {
            return Ok(request.outcome(Change::Unchanged, power_of(host, id)));
        }
        match host.keystore.put(&next, &record.location) {
            Ok(Put::Updated | Put::Adopted | Put::Unchanged) => {
                host.host_store.copy_is_behind(&record.envelope, CopyPlace::Xml)?;
                return Ok(request.outcome(Change::Changed, power_of(host, id)));
            }
            // A job was faster: on top of what it made.
            Ok(Put::Stale) | Err(StoreError::Conflict { .. }) => {
                record = record_of(host, path, record.envelope.id)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(Problem::busy(format!(
        "the envelope of {} is being changed by a job",
        path.display()
    ))
    .next(Advice::ListJobs.then("the same command again")))
}

impl Request<'_> {
    /// Decides whether the volume of `record` may be shared so. `carried` is the envelope of another file, which is where the keystore
    /// has the volume: what an image carries says which volume root would share, and of somebody's copy of another VM's image it
    /// says that of the other VM.
    fn refuse(&self, record: &EnvelopeRecord, carried: Option<EnvelopeId>) -> Result<(), Problem> {
        let (path, envelope) = (self.path.display(), &record.envelope);
        if envelope.kind != ObjectKind::Disk {
            let kind = envelope.kind;
            let refused = Problem::usage(format!("{path} is the {kind} of a VM: only disks can be shared"));
            return Err(refused.next(Advice::ShowVms));
        }
        if envelope.vm == self.id {
            return Err(Problem::usage(format!("{path} is {}'s own", self.vm))
                .next(Advice::from("name another VM").or(Advice::ShowVms)));
        }
        if self.sharing == Sharing::Without || carried != Some(envelope.id) {
            return Ok(());
        }
        let (original, vm) = (&record.location, envelope.vm);
        let share = Advice::ShareVolume {
            path: original.into(),
            vm: self.vm.to_owned(),
        };
        let what = format!("{path} is a copy of {original}, which is a volume of VM {vm}");
        Err(Problem::denied(what).next(share.note("if it may have that volume")))
    }

    /// The next version of the envelope, after its key has opened the image. To take a right back, the image need not be there.
    fn changed(&self, host: &Host<'_>, record: &EnvelopeRecord) -> Result<Verified, Problem> {
        let unusable = |error| Problem::from_error(Code::Failed, self.path.display(), &error);
        let dek = host.recipients.open_envelope(&record.envelope)?;
        let own = record.verify(&dek).map_err(unusable)?;
        match self.sharing {
            Sharing::Without => own.unshare(self.id, &dek),
            Sharing::With => {
                disk::open(&named_by_root(self.path)?, &passphrase(&dek)?)?;
                own.share_with(self.id, &dek)
            }
        }
        .map_err(unusable)
    }

    fn outcome(&self, change: Change, power: Power) -> Outcome {
        let changed = change == Change::Changed;
        let (vm, path) = (self.vm, self.path.display());
        let image = Subject::Image(path.to_string());
        let (act, mut warnings) = match self.sharing {
            Sharing::With => (StepCode::Share.told(format!("{vm} gets {path} too")), Vec::new()),
            Sharing::Without => {
                let elsewhere = "a host that has only an older copy of the envelope, in a domain's XML, lets it start there: \
                                 define VMs that have it from a new dumpxml";
                (
                    StepCode::Unshare.told(format!("{vm} does not get {path} any more")),
                    vec![Finding::warning(
                        FindingCode::SharedByCopies,
                        image.clone(),
                        elsewhere,
                    )],
                )
            }
        };
        if power == Power::On && self.sharing == Sharing::Without {
            let what = format!("{vm} runs, and has it until it ends");
            let in_use = Finding::warning(FindingCode::InUse, image, what);
            warnings.insert(0, in_use.next(Advice::ShutDownVm(vm.to_owned())));
        }
        Outcome {
            steps: match changed {
                true => StepView::all(&[act.at(self.path)], Tense::Done, &Subject::Vm(vm.to_owned())),
                false => Vec::new(),
            },
            warnings: FindingView::all(&warnings),
            changed,
            ..Outcome::default()
        }
    }
}

/// As far as libvirt tells.
fn power_of(host: &Host<'_>, vm: VmId) -> Power {
    match host.libvirt.domain(&vm.to_string()) {
        Ok(Some(domain)) if domain.active => Power::On,
        Ok(_) | Err(_) => Power::Off,
    }
}

/// The envelope in the file where the keystore has the volume, unless that is `path`. None where the volume was moved.
fn carried_where_kept(
    host: &Host<'_>,
    path: &Path,
    record: &EnvelopeRecord,
) -> Result<Option<EnvelopeId>, Problem> {
    let kept_at = Path::new(&record.location);
    let which = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    if kept_at == path || which(kept_at) == which(path) {
        return Ok(None);
    }
    let place = match host.known_place(kept_at) {
        Err(error) if error.is_missing() => return Ok(None),
        place => place?,
    };
    match disk::identify(&place) {
        Ok((_, copy)) => Ok(copy.envelope().map(|envelope| envelope.id)),
        Err(VolumeError::NotFound(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A VM that is gone has its UUID in the keystore, or the admin has it.
fn vm_to_share_with(host: &Host<'_>, vm: &str) -> Result<VmId, Problem> {
    let known = host.keystore.vms()?.sound;
    names::vm_id(host.libvirt, vm).or_else(|problem| {
        let known = names::undefined(&known, vm).map_err(|several| {
            several.refuse(Code::Usage, |id| format!("the same command with its {id}").into())
        })?;
        known.map(|known| known.vm).ok_or(problem)
    })
}

/// By the envelope that the image carries, else by its path.
pub(crate) fn volume_record(host: &Host<'_>, path: &Path) -> Result<EnvelopeRecord, Problem> {
    let carried = match named_by_root(path).and_then(|place| disk::identify(&place)) {
        Ok((_, copy)) => copy.envelope().map(|envelope| envelope.id),
        Err(VolumeError::NotFound(_)) => None,
        Err(error) => return Err(error.into()),
    };
    if let Some(id) = carried {
        return record_of(host, path, id);
    }
    let shown = path.display().to_string();
    let mut records = host.keystore.envelopes()?.sound.into_iter();
    let here = records.find(|record| record.location == shown);
    here.ok_or_else(|| not_known(path))
}

fn record_of(host: &Host<'_>, path: &Path, id: EnvelopeId) -> Result<EnvelopeRecord, Problem> {
    host.keystore.envelope(id)?.ok_or_else(|| not_known(path))
}

fn named_by_root(path: &Path) -> Result<PermittedPath, VolumeError> {
    PermittedPath::named_by_root(path).map_err(|source| VolumeError::unreachable(path, source))
}

fn not_known(path: &Path) -> Problem {
    Problem::not_found(format!("this host knows no volume {}", path.display()))
        .next(Advice::AdoptVolume(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::fixture;
    use crate::store::EnvelopeState;

    fn asked(id: VmId, sharing: Sharing) -> Request<'static> {
        Request {
            path: Path::new("/d"),
            vm: "web",
            id,
            sharing,
        }
    }

    #[test]
    fn only_a_disk_of_another_vm_is_shared_and_no_copy_in_the_place_of_the_volume() {
        let (owner, web) = (VmId::random(), VmId::random());
        let mut record = EnvelopeRecord {
            envelope: fixture::envelope(owner).into_envelope(),
            state: EnvelopeState::Active,
            location: "/kept".to_owned(),
            created: 0,
            updated: 0,
        };
        let own = Some(record.envelope.id);
        let refused = |id, sharing, record: &EnvelopeRecord, carried| {
            asked(id, sharing)
                .refuse(record, carried)
                .map_err(|problem| problem.code)
        };
        for sharing in [Sharing::With, Sharing::Without] {
            assert_eq!(refused(owner, sharing, &record, None), Err(Code::Usage));
            assert_eq!(refused(web, sharing, &record, None), Ok(()));
            // Something else is where the keystore has the volume: it was moved.
            assert_eq!(refused(web, sharing, &record, Some(EnvelopeId::random())), Ok(()));
        }
        assert_eq!(refused(web, Sharing::With, &record, own), Err(Code::Denied));
        assert_eq!(refused(web, Sharing::Without, &record, own), Ok(()));
        let advice = asked(web, Sharing::With).refuse(&record, own).unwrap_err().advice;
        assert!(advice.unwrap().to_string().contains("/kept"));
        record.envelope.kind = ObjectKind::Nvram;
        assert_eq!(refused(web, Sharing::With, &record, None), Err(Code::Usage));
    }

    #[test]
    fn who_takes_a_right_back_learns_until_when_it_lasts() {
        let outcome = |sharing, change, power| asked(VmId::random(), sharing).outcome(change, power);
        let taken_back = |change, power| outcome(Sharing::Without, change, power);
        assert!(
            outcome(Sharing::With, Change::Changed, Power::On)
                .warnings
                .is_empty()
        );
        assert_eq!(taken_back(Change::Changed, Power::Off).warnings.len(), 1);
        let running = taken_back(Change::Unchanged, Power::On);
        assert!(running.steps.is_empty() && !running.changed);
        assert!(
            running.warnings[0].what.starts_with("web runs, "),
            "{:?}",
            running.warnings
        );
    }
}
