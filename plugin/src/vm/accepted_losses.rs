//! What an admin lets a seal make anew because it is lost.

use std::collections::BTreeSet;

use crate::domain::Domain;
use crate::model::problem::Problem;

/// The objects that an admin has given up: `--replace nvram`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AcceptedLosses(BTreeSet<String>);

impl AcceptedLosses {
    pub(crate) const NVRAM: &str = "nvram";
    pub(crate) const VTPM: &str = "vtpm";

    /// `nvram`, `vtpm`, or the target of a disk.
    pub(crate) fn of<S: AsRef<str>>(given: &[S]) -> Self {
        Self(given.iter().map(|object| object.as_ref().to_owned()).collect())
    }

    /// Whether this one may be made anew. What is there is kept all the same.
    pub(crate) fn has(&self, object: &str) -> bool {
        self.0.contains(object)
    }

    pub(crate) fn objects(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// A misspelt object gives nothing up.
    pub(crate) fn refuse_unknown(&self, domain: &Domain) -> Result<(), Problem> {
        let targets = || domain.disks.iter().map(|disk| disk.target.as_str());
        let known: Vec<_> = [Self::NVRAM, Self::VTPM].into_iter().chain(targets()).collect();
        match self.objects().find(|object| !known.contains(object)) {
            None => Ok(()),
            Some(unknown) => Err(
                Problem::usage(format!("--replace: there is no object {unknown:?}"))
                    .next(format!("name one of {}", known.join(", "))),
            ),
        }
    }
}
