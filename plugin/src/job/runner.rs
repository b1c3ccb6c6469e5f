//! Which of the jobs that run are at work now: those that may, oldest first, in as many places as there are.

use std::time::Instant;

use crate::model::job::{JobId, Subject, Unit};

/// How many jobs of one unit are at work at once: a sweep waits for servers, an image for disks, and neither for the other.
pub(crate) const PLACES: usize = 4;

/// How a job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Its number: the lower, the older.
    pub id: JobId,
    pub subject: Subject,
    /// Whether a thread has it now.
    pub at_work: bool,
    /// When it is to be tried again; none for now.
    pub rests_until: Option<Instant>,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    /// These go to work.
    pub begin: Vec<JobId>,
    /// These would, if there was a place.
    pub in_line: Vec<JobId>,
    /// When the first of those that rest is to be tried again.
    pub look_again: Option<Instant>,
}

/// Decides it. One that rests has no place, so it holds up nobody.
pub(crate) fn decide(jobs: &[Standing], now: Instant) -> Decision {
    let mut working: Vec<&Standing> = jobs.iter().filter(|job| job.at_work).collect();
    let mut idle: Vec<&Standing> = jobs.iter().filter(|job| !job.at_work).collect();
    idle.sort_by_key(|job| job.id);
    let mut decision = Decision::default();
    for job in idle {
        if let Some(until) = job.rests_until.filter(|until| *until > now) {
            decision.look_again = Some(decision.look_again.map_or(until, |first| first.min(until)));
        } else if may_work(job, &working) {
            decision.begin.push(job.id);
            working.push(job);
        } else {
            decision.in_line.push(job.id);
        }
    }
    decision
}

/// None that excludes another is ever kept beside it; what is at work is asked all the same.
fn may_work(job: &Standing, working: &[&Standing]) -> bool {
    let unit: Unit = job.subject.unit();
    let places = working
        .iter()
        .filter(|other| other.subject.unit() == unit)
        .count();
    places < PLACES && !working.iter().any(|other| other.subject.excludes(&job.subject))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::model::envelope::VmId;

    fn subjects() -> impl Strategy<Value = Subject> {
        let vm = (0_u8..4).prop_map(|byte| {
            format!("00000000-0000-4000-8000-0000000000{byte:02}")
                .parse::<VmId>()
                .unwrap()
        });
        prop_oneof![
            Just(Subject::AllEnvelopes),
            vm.clone().prop_map(Subject::EnvelopesOf),
            (vm, 0_u8..12).prop_map(|(vm, path)| Subject::Image {
                vm,
                path: format!("/images/{path}")
            }),
        ]
    }

    /// With what a decision has begun at work.
    fn after(jobs: &[Standing], decision: &Decision) -> Vec<Standing> {
        let mut jobs = jobs.to_vec();
        for job in &mut jobs {
            job.at_work |= decision.begin.contains(&job.id);
        }
        jobs
    }

    proptest! {
        #[test]
        fn none_is_beside_one_that_excludes_it_and_none_waits_without_a_reason(
            given in prop::collection::vec((subjects(), any::<bool>(), prop::option::of(-5_i64..5)), 0..30),
        ) {
            let now = Instant::now() + Duration::from_secs(100);
            let mut jobs: Vec<Standing> = Vec::new();
            for (number, (subject, at_work, rests)) in given.into_iter().enumerate() {
                let until = rests.map(|seconds| (now - Duration::from_secs(5)) + Duration::from_secs((seconds + 5) as u64));
                let mut job = Standing { id: JobId(number as i64), subject, at_work: false, rests_until: until };
                let working: Vec<_> = jobs.iter().filter(|job| job.at_work).collect();
                job.at_work = at_work && may_work(&job, &working);
                jobs.push(job);
            }
            let decision = decide(&jobs, now);
            let then = after(&jobs, &decision);
            let working: Vec<_> = then.iter().filter(|job| job.at_work).collect();
            for (at, job) in working.iter().enumerate() {
                prop_assert!(!working[at + 1..].iter().any(|other| other.subject.excludes(&job.subject)));
            }
            for unit in [Unit::Envelopes, Unit::Bytes] {
                prop_assert!(working.iter().filter(|job| job.subject.unit() == unit).count() <= PLACES);
            }
            for job in &jobs {
                let resting = job.rests_until.filter(|until| *until > now);
                let told = [job.at_work, decision.begin.contains(&job.id), decision.in_line.contains(&job.id),
                    !job.at_work && resting.is_some()];
                prop_assert_eq!(told.iter().filter(|is| **is).count(), 1, "{:?}", job);
                if let (Some(until), false) = (resting, job.at_work) {
                    prop_assert!(decision.look_again.is_some_and(|again| again <= until));
                }
                // A place is free for it, or something that it must not be beside is at work.
                if decision.in_line.contains(&job.id) {
                    prop_assert!(!may_work(job, &working));
                }
            }
            prop_assert_eq!(decide(&then, now).begin, []);
        }

        #[test]
        fn a_job_on_one_vm_that_waits_changes_nothing_for_another(
            others in prop::collection::vec(subjects(), 0..6), waits in subjects(),
        ) {
            let now = Instant::now();
            let standing = |id, subject: &Subject, rests_until| Standing { id: JobId(id), subject: subject.clone(), at_work: false, rests_until };
            let mut jobs: Vec<_> = others.iter().enumerate().map(|(at, subject)| standing(at as i64 + 1, subject, None)).collect();
            let alone = decide(&jobs, now);
            jobs.push(standing(0, &waits, Some(now + Duration::from_secs(60))));
            let beside = decide(&jobs, now);
            prop_assert_eq!((alone.begin, alone.in_line), (beside.begin, beside.in_line));
        }
    }
}
