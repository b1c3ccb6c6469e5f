//! What earlier commits leave behind for those that come after them: which image of a disk is the newer one may not be known.

use super::Daemon;
use crate::job::record::Work;
use crate::model::advice::Advice;
use crate::model::envelope::VmId;
use crate::model::job::{JobState, SnapshotAct, Subject};
use crate::model::problem::Problem;
use crate::store::{JobRecord, PivotBy};
use crate::vm::snapshot::{self, OverlaidDisk, OverlayPlan};

/// Far more than are ever kept.
const ALL_JOBS: u32 = 100_000;

/// Whatever a commit has written so far is in the sealed image, and of neither time: only its end leads out. Where QEMU may have gone
/// over to that image, a commit finds out, or root says so by `force`.
pub(super) fn refuse_half_merged(
    daemon: &Daemon,
    vm: VmId,
    name: &str,
    disks: &[OverlaidDisk],
    force: bool,
) -> Result<(), Problem> {
    let refused = |why: &str| {
        let what = format!("{name} stays as it is: {why}");
        Err(Problem::would_lose_key(what).next(Advice::CommitSnapshot(name.to_owned())))
    };
    let jobs = daemon.keystore.jobs(ALL_JOBS)?.whole()?;
    let mut half_merged = Vec::new();
    for disk in disks {
        match disk.pivot(&daemon.host_store, vm)? {
            None => half_merged.push(disk.clone()),
            Some(_) if force => {
                let one = std::slice::from_ref(disk);
                let is_overwritten = jobs.iter().any(|job| is_forced(job) && has_begun(job, vm, one));
                half_merged.extend(is_overwritten.then(|| disk.clone()));
            }
            Some(pivot) => {
                let target = &disk.target;
                return refused(&match pivot.by {
                    PivotBy::Virtseald => format!(
                        "QEMU was asked to let disk {target} go over to its sealed image, and nobody has seen whether it did"
                    ),
                    PivotBy::Others => {
                        format!("disk {target} ran on its sealed image alone since its overlay was made")
                    }
                });
            }
        }
    }
    let counts = |job: &&JobRecord| match force {
        true => has_written(job, vm, &half_merged),
        false => has_begun(job, vm, &half_merged),
    };
    match jobs.iter().rfind(counts) {
        None => Ok(()),
        Some(job) => refused(&format!(
            "job {} has begun to merge it, and its sealed image is neither as it was nor as it is",
            job.id.0
        )),
    }
}

/// Whether a commit may find newer data in the sealed image than in the overlay: no commit of ours has put it there, or somebody has
/// written there after that.
pub(super) fn is_doubtful(daemon: &Daemon, plan: &OverlayPlan) -> Result<bool, Problem> {
    if plan.act != SnapshotAct::Commit || !plan.has_newer_base() {
        return Ok(false);
    }
    let jobs = daemon.keystore.jobs(ALL_JOBS)?.whole()?;
    let disks = plan.jobs_disks();
    Ok(!jobs.iter().any(|job| has_written(job, plan.vm, &disks)))
}

fn is_forced(job: &JobRecord) -> bool {
    matches!(Work::from_json(&job.task), Ok(Work::Overlays(overlays)) if overlays.force)
}

/// Whether a job may have written to a base, and one of the overlays that it was about is still there. So may one of another virtseald,
/// which can't be read.
fn has_begun(job: &JobRecord, vm: VmId, disks: &[OverlaidDisk]) -> bool {
    if job.state == JobState::Done || disks.is_empty() {
        return false;
    }
    let overlays = match Work::from_json(&job.task) {
        Ok(Work::Overlays(overlays)) => overlays,
        Ok(_) => return false,
        Err(_) => return matches!(&job.subject, Subject::Image { vm: of, .. } if *of == vm),
    };
    let is_met = |theirs: &OverlaidDisk| {
        let same_base = disks.iter().filter(|ours| ours.base == theirs.base);
        let mut common = same_base
            .flat_map(|ours| &ours.overlays)
            .filter(|path| theirs.overlays.contains(path));
        common.any(|overlay| snapshot::may_be_of(overlay, job.updated))
    };
    overlays.act == SnapshotAct::Commit && !overlays.reads_only && overlays.disks.iter().any(is_met)
}

/// The same, and nobody else has written to a base since: then that is newer than the overlay by this job alone.
fn has_written(job: &JobRecord, vm: VmId, disks: &[OverlaidDisk]) -> bool {
    has_begun(job, vm, disks) && !disks.iter().any(|disk| disk.was_written_after(job.updated))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::job::record::Overlays;
    use crate::model::job::JobId;
    use crate::store::Pass;

    fn disk(base: &str, overlays: &[&PathBuf]) -> OverlaidDisk {
        OverlaidDisk {
            target: "vda".to_owned(),
            base: base.into(),
            overlays: overlays.iter().copied().cloned().collect(),
        }
    }

    fn job(act: SnapshotAct, state: JobState, disk: &OverlaidDisk, updated: i64) -> JobRecord {
        let work = Work::Overlays(Overlays {
            vm: VmId(uuid::Uuid::from_u128(1)),
            act,
            keep: false,
            force: false,
            reads_only: false,
            disks: vec![disk.clone()],
            snapshots: Vec::new(),
            asked_by: None,
            host: None,
        });
        JobRecord {
            id: JobId(1),
            subject: work.subject(),
            task: work.to_json(),
            state,
            pass: Pass::All,
            cursor: String::new(),
            total: 0,
            seen: 0,
            changed: 0,
            left: 0,
            waiting: String::new(),
            failure: String::new(),
            created: 0,
            updated,
        }
    }

    #[test]
    fn a_commit_that_was_begun_is_remembered_as_long_as_an_overlay_of_it_is_there() {
        use SnapshotAct::{Commit, Delete};
        let vm = VmId(uuid::Uuid::from_u128(1));
        let has_begun = |job: &JobRecord, disks: &[OverlaidDisk]| has_begun(job, vm, disks);
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = ["s1", "s2"].map(|name| directory.path().join(name));
        std::fs::write(&first, "").unwrap();
        std::fs::write(&second, "").unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 + 60;
        let begun = disk("/b", &[&first]);
        // Another snapshot was made on top since.
        let ours = [disk("/c", &[]), disk("/b", &[&second, &first])];
        for state in [
            JobState::Running,
            JobState::Aborted,
            JobState::Failed,
            JobState::Incomplete,
        ] {
            assert!(has_begun(&job(Commit, state, &begun, now), &ours), "{state:?}");
        }
        assert!(!has_begun(&job(Commit, JobState::Done, &begun, now), &ours));
        assert!(!has_begun(&job(Delete, JobState::Aborted, &begun, now), &ours));
        let aborted = |disk: &OverlaidDisk, updated| job(Commit, JobState::Aborted, disk, updated);
        assert!(!has_begun(&aborted(&disk("/other", &[&first]), now), &ours));
        assert!(!has_begun(&aborted(&begun, now), &[disk("/b", &[&second])]));
        // A later virtseald has written it.
        let mut later = job(Commit, JobState::Aborted, &begun, now);
        later.task = r#"{"kind":"overlays","later":1}"#.to_owned();
        assert!(has_begun(&later, &ours));
        assert!(!super::has_begun(&later, VmId::random(), &ours));
        // Another file has the name by now.
        if first.metadata().unwrap().created().is_ok() {
            assert!(!has_begun(&aborted(&begun, 1000), &ours));
        }
    }
}
