//! What a start decides before there is any key: for the start itself, and for a status that tells whether one would be refused.

use super::versions::{Kept, Versions};
use crate::domain::{Domain, ObjectRef, Policy, sealed_objects_under};
use crate::model::envelope::{Envelope, EnvelopeId};
use crate::model::problem::Problem;
use crate::recipients::{OpenError, Outlook};
use crate::store::StoreError;
use crate::vm::side_doors;
use crate::vm::whose::Whose;

/// What keeps a VM off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Obstacle {
    /// The label of the object that it is about, if it is about one.
    pub object: Option<String>,
    pub problem: Box<Problem>,
}

impl Obstacle {
    pub(crate) fn of_vm(problem: Problem) -> Self {
        Self {
            object: None,
            problem: Box::new(problem),
        }
    }

    pub(crate) fn of_object(label: &str, problem: Problem) -> Self {
        Self {
            object: Some(label.to_owned()),
            problem: Box::new(problem),
        }
    }
}

/// The objects that need a key, each with the versions that there are of its envelope.
///
/// # Errors
/// Why there is no start, whatever the providers say.
pub(super) fn needed(
    domain: &Domain,
    policy: Policy,
    kept: impl Fn(EnvelopeId) -> Result<Kept, StoreError>,
    whose: impl Fn(&Envelope) -> Whose,
) -> Result<Vec<(ObjectRef, Versions)>, Obstacle> {
    let objects = sealed_objects_under(domain, policy)
        .map_err(|refusal| Obstacle::of_vm(side_doors::not_sealed(&refusal)))?;
    side_doors::refuse(domain, policy).map_err(Obstacle::of_vm)?;
    let mut needed = Vec::with_capacity(objects.len());
    for object in objects {
        let kept = kept(object.secret).map_err(Problem::from);
        let versions = kept.and_then(|kept| Versions::of(domain, &object, kept, &whose));
        let versions = versions.map_err(|problem| Obstacle::of_object(&object.label, problem))?;
        needed.push((object, versions));
    }
    Ok(needed)
}

/// What is known without opening anything: `kept` is what this host keeps of an envelope, `in_the_way` what would keep an object from
/// being opened with the right key.
pub(crate) fn foresee(
    domain: &Domain,
    policy: Policy,
    providers: &Outlook,
    kept: impl Fn(EnvelopeId) -> Result<Kept, StoreError>,
    whose: impl Fn(&Envelope) -> Whose,
    in_the_way: impl Fn(&ObjectRef) -> Option<Problem>,
) -> Result<(), Obstacle> {
    let needed = needed(domain, policy, kept, whose)?;
    for (_, versions) in &needed {
        // Of which object it is does not matter: the provider is named.
        let closed = |error: OpenError| {
            Obstacle::of_vm(Problem {
                message: error.reasons(),
                ..Problem::from(error)
            })
        };
        versions
            .open_by(|envelope| providers.opens(envelope))
            .map_err(closed)?;
    }
    let blocked = needed
        .iter()
        .find_map(|(object, _)| Some(Obstacle::of_object(&object.label, in_the_way(object)?)));
    blocked.map_or(Ok(()), Err)
}
