//! The second half of an act: files that are complete get their names, and what can't be undone begins.

use super::Host;
use crate::model::act::{Act, Tense};
use crate::model::advice::Advice;
use crate::model::envelope::EnvelopeId;
use crate::model::problem::Problem;
use crate::object::disk::{ImageLock, Prepared};

/// A file that is ready, with what giving it its name comes to.
#[derive(Debug)]
pub(super) struct Ready {
    /// As the plan has it.
    pub(super) act: Act,
    pub(super) file: Prepared,
    /// Becomes active when the file has its name.
    pub(super) envelope: Option<EnvelopeId>,
}

/// What an act has replaced.
#[derive(Debug, Default)]
pub(crate) struct Replaced {
    /// The old files: until the domain is defined, a start may still be opening them.
    held: Vec<ImageLock>,
    done: Vec<Act>,
}

impl Replaced {
    /// Gives each its name, in this order. `again` is the command that goes on after a failure.
    ///
    /// # Errors
    /// The first that fails, with what was done before it.
    pub(super) fn publish(host: &Host<'_>, ready: Vec<Ready>, again: &Advice) -> Result<Self, Problem> {
        let mut replaced = Self::default();
        let again = |failure: Problem| {
            let goes_on = again.clone().within("it goes on from here");
            failure.next(Advice::from("mend that").then(goes_on))
        };
        for Ready { act, file, envelope } in ready {
            let published = file.publish().map_err(Problem::from);
            let old =
                published.map_err(|failure| again(replaced.after(failure.of(format!("can't {act}")))))?;
            replaced.held.extend(old);
            replaced.done.push(act);
            if let Some(id) = envelope {
                let activated = host.keystore.activate(id).map_err(Problem::from);
                activated.map_err(|failure| again(replaced.after(failure)))?;
            }
        }
        Ok(replaced)
    }

    /// Says in a failure what was done before it.
    pub(crate) fn after(&self, mut failure: Problem) -> Problem {
        failure.message.push_str(&match &self.done[..] {
            [] => "; no file was changed".to_owned(),
            done => {
                let done: Vec<_> = done.iter().map(|act| act.told(Tense::Done)).collect();
                format!("; before that it {}", done.join(", and "))
            }
        });
        failure
    }
}
