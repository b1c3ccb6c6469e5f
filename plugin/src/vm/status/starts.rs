//! Whether a VM would start now: what a start decides without a key, over what was gathered for the status.

use super::known::Known;
use super::look::SeenObject;
use super::standing::Found;
use crate::api::{ObjectStanding, StartView};
use crate::domain::{Domain, ObjectRef, ObjectState};
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::vm::has_run::HasRun;
use crate::vm::start::outlook::{Obstacle, foresee};

/// Of a VM that libvirt has. `standings` are those of its objects.
pub(super) fn of(
    domain: &Domain,
    seen: &[SeenObject],
    standings: &[ObjectStanding],
    known: &Known,
) -> StartView {
    if domain.metadata.is_none() {
        let objection = without_metadata(domain, seen, standings, known);
        return objection.map_or_else(StartView::yes, |problem| refused(&Obstacle::of_vm(problem)));
    }
    let kept = |id| Ok(known.kept(id));
    let in_the_way = |object: &ObjectRef| {
        let seen = seen.iter().find(|seen| seen.object.label == object.label)?;
        let is_to_be_made = seen.found == Found::Nothing
            && object.kind.is_made_at_first_start()
            && known.has_run(domain.uuid) != HasRun::Yes;
        seen.obstacle.clone().filter(|_| !is_to_be_made)
    };
    match foresee(
        domain,
        known.policy_of(domain),
        &known.outlook,
        kept,
        |envelope| known.whose(envelope),
        in_the_way,
    ) {
        Err(obstacle) => refused(&obstacle),
        // Whether it opens with the key of the other one shows when that is tried.
        Ok(()) if standings.contains(&ObjectStanding::OtherEnvelope) => {
            StartView::unknown("an image carries another envelope than its own")
        }
        Ok(()) => StartView::yes(),
    }
}

/// What the hook refuses by its index, without asking anybody.
fn without_metadata(
    domain: &Domain,
    seen: &[SeenObject],
    standings: &[ObjectStanding],
    known: &Known,
) -> Option<Problem> {
    let name = &domain.name;
    if known.has(domain.uuid) && standings.contains(&ObjectStanding::NotInXml) {
        let problem = Problem::failed("it is sealed, and its XML does not say so");
        return Some(problem.next(Advice::SealVm(name.clone())));
    }
    let names_ours = seen.iter().find(|seen| match seen.object.state {
        ObjectState::Sealed(id) => known.envelope(id).is_some(),
        ObjectState::Plain | ObjectState::Unsupported(_) => false,
    });
    names_ours.map(|seen| {
        let what = format!("{} has the secret of a sealed VM", seen.object.label);
        Problem::denied(what).next(Advice::EditXml(name.clone()).within("a VM has secrets of its own"))
    })
}

pub(super) fn refused(obstacle: &Obstacle) -> StartView {
    let message = &obstacle.problem.message;
    let why = match &obstacle.object {
        Some(label) => format!("{label}: {message}"),
        None => message.clone(),
    };
    StartView::no(why, obstacle.problem.advice.as_ref())
}
