//! What KEKs are called at a server that keeps them by name, and which of them is in use.
//!
//! A name says whose KEK it is, which generation, and a random part: `STEM-gN-RANDOM`. Generations are this host's own: no
//! clock of a server, and no order of its lists, says which KEK is the newest. Before a server is asked for a KEK its name is
//! in the keystore, so none is ever used twice, and one that was made without an answer is found by its exact name.

use crate::model::envelope::KekId;
use crate::provider::{KekScope, ProviderError};
use crate::store::{KekNameRecord, KekNames, StoreError};

/// Which KEK of a scope it is: they rise by one. 0 is one from a virtseal that did not count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KekGeneration(pub(in crate::provider) u32);

impl KekGeneration {
    /// Of a KEK whose name says none.
    pub(crate) const UNCOUNTED: Self = Self(0);

    pub(crate) fn next(self) -> Result<Self, ProviderError> {
        let next = self.0.checked_add(1).map(Self);
        next.ok_or_else(|| ProviderError::Refused("the generation of the KEK can't rise any more".into()))
    }
}

/// How many names without a KEK are looked for.
const MAX_UNANSWERED: usize = 4;

/// The name of a KEK of generation `generation`, which was never given before.
fn new_name(stem: &str, generation: KekGeneration) -> Result<String, ProviderError> {
    let mut random = [0; 8];
    openssl::rand::rand_bytes(&mut random).map_err(ProviderError::internal("making a name for a KEK"))?;
    Ok(format!("{stem}-g{}-{}", generation.0, hex::encode(random)))
}

/// Which generation of `stem` a KEK called `name` is; `None` if it is none of them.
pub(crate) fn generation(stem: &str, name: &str) -> Option<KekGeneration> {
    let rest = name.strip_prefix(stem)?;
    if rest.is_empty() {
        return Some(KekGeneration::UNCOUNTED);
    }
    let (number, random) = rest.strip_prefix("-g")?.split_once('-')?;
    let number_is_plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
    let random_is_ours = random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !number_is_plain || !random_is_ours {
        return None;
    }
    number.parse().ok().map(KekGeneration)
}

/// What this host knows of the KEKs of one provider.
pub(crate) struct KekBook {
    rows: KekNames,
}

/// What it knows of those for one scope.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// KEKs that may be in use: made here or named by an envelope, and not retired.
    pub(crate) keks: Vec<KekId>,
    /// Names of later generations than those, asked for without an answer, the latest first.
    pub(crate) unanswered: Vec<String>,
    /// The highest generation that was ever made here, also of KEKs that are retired.
    pub(crate) made: Option<KekGeneration>,
    /// The highest that was ever asked for here.
    pub(crate) asked: Option<KekGeneration>,
}

impl Known {
    /// Whether a KEK from before generations may be all that there is.
    pub(crate) fn is_empty(&self) -> bool {
        self.keks.is_empty() && self.asked.is_none()
    }
}

impl KekBook {
    pub(crate) fn new(rows: KekNames) -> Self {
        Self { rows }
    }

    /// What is known of the KEKs for `scope`, whose names begin with `stem`.
    pub(crate) fn known(&self, scope: &KekScope, stem: &str) -> Result<Known, ProviderError> {
        let records = self.rows.of_scope(scope).map_err(unreadable())?;
        let of_envelopes = match scope {
            KekScope::Vm(vm) => self.rows.keks_of_envelopes(Some(*vm)),
            // All envelopes are read only where nothing else is known.
            KekScope::Provider if records.is_empty() => self.rows.keks_of_envelopes(None),
            KekScope::Provider => Ok(Vec::new()),
        };
        let generation = |record: &KekNameRecord| generation(stem, &record.name);
        let made = records.iter().filter(|record| record.kek.is_some());
        let mut known = Known {
            keks: of_envelopes.map_err(unreadable())?,
            unanswered: Vec::new(),
            made: made.filter_map(generation).max(),
            asked: records.iter().filter_map(generation).max(),
        };
        for record in records {
            let is_later = generation(&record) > known.made;
            match record.kek {
                Some(kek) if known.keks.contains(&kek) => {}
                Some(kek) => known.keks.push(kek),
                None if is_later && known.unanswered.len() < MAX_UNANSWERED => {
                    known.unanswered.push(record.name);
                }
                None => {}
            }
        }
        known.keks = self.without_retired(known.keks)?;
        Ok(known)
    }

    /// Those that no job has taken out of use: they never come back.
    pub(crate) fn without_retired(&self, keks: Vec<KekId>) -> Result<Vec<KekId>, ProviderError> {
        let retired = self.rows.retired().map_err(unreadable())?;
        Ok(keks.into_iter().filter(|kek| !retired.contains(kek)).collect())
    }

    /// A name for the KEK of generation `next`; it is on disk when this returns.
    pub(crate) fn plan(
        &self,
        scope: &KekScope,
        stem: &str,
        next: KekGeneration,
    ) -> Result<String, ProviderError> {
        let name = new_name(stem, next)?;
        self.plan_exactly(scope, &name)?;
        Ok(name)
    }

    /// No server has made a KEK called `name`, nor will one.
    pub(crate) fn refused(&self, name: &str) -> Result<(), ProviderError> {
        self.rows
            .forget(name)
            .map_err(ProviderError::internal("forgetting the name of a KEK"))
    }

    /// Notes that a KEK with this very name will be asked for, which must never have been.
    pub(crate) fn plan_exactly(&self, scope: &KekScope, name: &str) -> Result<(), ProviderError> {
        self.rows
            .plan(scope, name)
            .map_err(ProviderError::internal("noting the name of a KEK"))
    }

    /// `kek` bears `name`.
    pub(crate) fn made(&self, name: &str, kek: &KekId) -> Result<(), ProviderError> {
        self.rows
            .note_kek(name, kek)
            .map_err(ProviderError::internal("noting which KEK was made"))
    }
}

fn unreadable() -> impl FnOnce(StoreError) -> ProviderError {
    ProviderError::internal("reading which KEKs are known")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::ProviderId;
    use crate::model::envelope::VmId;
    use crate::store::Stores;

    #[test]
    fn names_say_their_generation_and_are_never_the_same() {
        let stem = "virtseal-vm-x-p";
        let names = [1, 1, 2, 4_000_000_000].map(|nth| new_name(stem, KekGeneration(nth)).unwrap());
        assert_ne!(names[0], names[1]);
        assert_eq!(generation(stem, &names[3]), Some(KekGeneration(4_000_000_000)));
        assert_eq!(generation(stem, stem), Some(KekGeneration(0)));
        for other in [
            "virtseal-vm-y-p-g1-0123456789abcdef",
            "virtseal-vm-x-p-g0-0123456789abcdef",
            "virtseal-vm-x-p-g+1-0123456789abcdef",
            "virtseal-vm-x-p-g01-0123456789abcdef",
            "virtseal-vm-x-p-g1",
            "virtseal-vm-x-p-g1-xyz",
            "virtseal-vm-x-pq",
            "virtseal-vm-x-p-g99999999999-0123456789abcdef",
            "",
        ] {
            assert_eq!(generation(stem, other), None, "{other}");
        }
    }

    #[test]
    fn what_was_planned_is_known_and_what_is_retired_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let book = KekBook::new(stores.providers().kek_names(ProviderId::random()));
        let scope = KekScope::Vm(VmId::random());
        assert!(book.known(&scope, "s").unwrap().is_empty());
        let first = book.plan(&scope, "s", KekGeneration(1)).unwrap();
        let known = book.known(&scope, "s").unwrap();
        assert_eq!((known.unanswered, known.made), (vec![first.clone()], None));
        assert_eq!(known.asked, Some(KekGeneration(1)));
        let kek = KekId("7".into());
        book.made(&first, &kek).unwrap();
        let known = book.known(&scope, "s").unwrap();
        assert!(known.unanswered.is_empty() && known.keks == [kek]);
        // One that was refused is forgotten, one without an answer is looked for until there is a later one.
        let refused = book.plan(&scope, "s", KekGeneration(2)).unwrap();
        book.refused(&refused).unwrap();
        assert!(book.known(&scope, "s").unwrap().unanswered.is_empty());
        let lost = book.plan(&scope, "s", KekGeneration(2)).unwrap();
        assert_eq!(book.known(&scope, "s").unwrap().unanswered, [lost]);
        let later = book.plan(&scope, "s", KekGeneration(3)).unwrap();
        book.made(&later, &KekId("8".into())).unwrap();
        let known = book.known(&scope, "s").unwrap();
        assert!(known.unanswered.is_empty() && known.made == known.asked);
    }
}
