//! Which KEK of a scope is in use, and how the next one is made.
//!
//! What a KEK is called is in the keystore before it is made: one whose Create got no answer is found by that name. Whatever a
//! server finds is compared with what was looked for before it is used.

use std::cell::Cell;

use super::answer::{self, FoundKey};
use super::call::{Call, LOCATED_PAGE, Label};
use super::error::About;
use super::keys::{Keys, MAX_KEYS, about, check_state, key_refused, refused, state_of};
use super::tag::{KeyState, Operation};
use crate::model::envelope::KekId;
use crate::provider::toolbox::kek_name::KekGeneration;
use crate::provider::{ErrorClass, KekScope, ProviderError};

/// The most pages of a list that are read, and the most keys of it that are looked at: a name is used once.
const MAX_PAGES: i32 = 16;
const MAX_LOCATED: usize = 512;

impl Keys<'_> {
    /// The active KEK for `scope`: the one of the highest generation, or a new one where that was taken out of use. An earlier
    /// one is never taken up again, nor is one that a job has retired.
    pub(super) fn create(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let there = self.look_for(scope, None)?;
        match there.in_use {
            Some(kek) => Ok(kek),
            None => self.create_next(scope, there.highest),
        }
    }

    /// The KEK that takes the place of `old`: a new one, unless another one is in use by now.
    pub(super) fn rotate(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        let there = self.look_for(scope, Some(old))?;
        match there.in_use {
            Some(kek) if kek != *old => Ok(kek),
            _ => self.create_next(scope, there.highest),
        }
    }
    pub(super) fn label(&self, scope: &KekScope, name: String) -> Label {
        let vm = match scope {
            KekScope::Vm(vm) => format!("vm={vm}; "),
            KekScope::Provider => String::new(),
        };
        let host = super::host_name();
        Label {
            name,
            tag: Some(format!(
                "{vm}host={host}; purpose=virtseal-kek; provider={}",
                self.provider_name
            )),
        }
    }

    /// Which KEKs there are for `scope`: of those that are known here and `old`, those that an earlier Create made without an
    /// answer, and, where there are none of these, those from before they were counted.
    fn look_for(&self, scope: &KekScope, old: Option<&KekId>) -> Result<There, ProviderError> {
        let stem = self.stem(scope);
        let known = self.book.known(scope, &stem)?;
        let old = old.filter(|old| !known.keks.contains(old)).cloned();
        let uncounted = known.is_empty() && old.is_none();
        let keks: Vec<_> = known.keks.into_iter().chain(old).collect();
        let mut found = Vec::new();
        for keks in keks.chunks(MAX_KEYS) {
            found.extend(self.look_at(keks, &stem)?);
        }
        for name in &known.unanswered {
            for (kek, key) in self.located(name, &stem)? {
                self.book.made(name, &kek)?;
                found.push((kek, key));
            }
        }
        if uncounted {
            found.extend(self.located(&stem, &stem)?);
        }
        let highest = found
            .iter()
            .map(|(_, key)| key.generation)
            .chain(known.made)
            .max();
        let mut serving: Vec<_> = found
            .into_iter()
            .filter(|(_, key)| Some(key.generation) == highest && key.may_serve())
            .collect();
        let kept = self
            .book
            .without_retired(serving.iter().map(|(kek, _)| kek.clone()).collect())?;
        serving.retain(|(kek, _)| kept.contains(kek));
        // Which of several that were not counted is the newest, nobody knows.
        let ambiguous = serving.len() > 1 && highest == Some(KekGeneration::UNCOUNTED);
        let first = serving
            .into_iter()
            .filter(|_| !ambiguous)
            .min_by(|(a, _), (b, _)| (a.0.len(), &a.0).cmp(&(b.0.len(), &b.0)));
        let in_use = match first {
            Some((kek, key)) => {
                if key.state == KeyState::PreActive {
                    self.activate(&kek)?;
                }
                Some(kek)
            }
            None => None,
        };
        Ok(There {
            highest: highest.max(known.asked),
            in_use,
        })
    }

    /// The keys that the servers find by exactly `name`, which begins with `stem`, and that bear it.
    fn located(&self, name: &str, stem: &str) -> Result<Vec<(KekId, FoundKey)>, ProviderError> {
        let mut keks: Vec<KekId> = Vec::new();
        for page in 0..MAX_PAGES {
            let locate = Call::Locate {
                name: name.to_owned(),
                offset: page * LOCATED_PAGE,
            };
            let listed = self.ask(vec![locate], |outcomes| match &outcomes[0] {
                Ok(payload) => Ok(answer::located(payload)),
                // Some servers call it an error to find nothing.
                Err(refusal) if refusal.reason.about() == About::UnknownKey => Ok(Vec::new()),
                Err(refusal) => Err(refused(Operation::Locate, refusal)),
            })?;
            let (count, before) = (listed.len(), keks.len());
            for kek in listed {
                if !keks.contains(&kek) {
                    keks.push(kek);
                }
            }
            // The last page, or all of a server that knows no pages.
            if i32::try_from(count) != Ok(LOCATED_PAGE) || keks.len() == before {
                break;
            }
        }
        keks.truncate(MAX_LOCATED);
        let mut found = Vec::new();
        for keks in keks.chunks(MAX_KEYS) {
            found.extend(self.look_at(keks, stem)?);
        }
        found.retain(|(_, key)| key.name == name);
        Ok(found)
    }

    /// What those of `keks` are that bear a name of `stem`. Others are left out: destroyed meanwhile, another client's, or
    /// another VM's, which a server found that ignores what it was asked for.
    fn look_at(&self, keks: &[KekId], stem: &str) -> Result<Vec<(KekId, FoundKey)>, ProviderError> {
        let calls = keks.iter().cloned().map(Call::GetAttributesAndName).collect();
        self.ask(calls, |outcomes| {
            let mut found = Vec::new();
            for (kek, outcome) in keks.iter().zip(outcomes) {
                let payload = match outcome {
                    Ok(payload) => payload,
                    Err(refusal) => match key_refused(kek, Operation::GetAttributes, refusal) {
                        error if error.class() == ErrorClass::Key => continue,
                        error => return Err(error),
                    },
                };
                found.extend(answer::found(payload, kek, stem)?.map(|key| (kek.clone(), key)));
            }
            Ok(found)
        })
    }

    /// A new KEK, of the generation after `highest`.
    fn create_next(&self, scope: &KekScope, highest: Option<KekGeneration>) -> Result<KekId, ProviderError> {
        let next = highest.unwrap_or(KekGeneration::UNCOUNTED).next()?;
        let stem = self.stem(scope);
        let name = self.book.plan(scope, &stem, next)?;
        let kek = match self.create_labelled(self.label(scope, name.clone())) {
            Ok(kek) => kek,
            // Another node has made it, perhaps, and its answer was lost.
            Err(error @ ProviderError::Refused(_)) => match self.located(&name, &stem)?.pop() {
                Some((kek, _)) => kek,
                None => {
                    self.book.refused(&name)?;
                    return Err(error);
                }
            },
            Err(error) => return Err(error),
        };
        // A server that answers with a key that was there before must not have that used, nor activated.
        let made = self.look_at_new(&kek, &stem)?;
        match made.filter(|key| key.name == name && key.fits) {
            Some(key) if key.state == KeyState::PreActive => self.activate(&kek)?,
            Some(key) => check_state(&kek, key.state, KeyState::may_wrap)?,
            None => {
                return Err(ProviderError::BesideTheQuestion(format!(
                    "it made the key {kek}, and does not say that this is an AES key of 256 bits called {name}"
                )));
            }
        }
        self.book.made(&name, &kek)?;
        Ok(kek)
    }

    /// As [`Keys::look_at`], where a node that does not have it yet is no answer.
    fn look_at_new(&self, kek: &KekId, stem: &str) -> Result<Option<FoundKey>, ProviderError> {
        self.ask(vec![Call::GetAttributesAndName(kek.clone())], |outcomes| {
            let payload = about(kek, Operation::GetAttributes, &outcomes[0])?;
            Ok(answer::found(payload, kek, stem)?)
        })
    }

    fn create_labelled(&self, label: Label) -> Result<KekId, ProviderError> {
        let mut plain = label.clone();
        plain.tag = None;
        let dislikes_an_attribute = Cell::new(false);
        let create = |label| {
            self.ask(vec![Call::Create(label)], |outcomes| match &outcomes[0] {
                Ok(payload) => Ok(answer::created(payload)?),
                Err(refusal) => {
                    if refusal.reason.is_about_an_attribute() {
                        dislikes_an_attribute.set(true);
                    }
                    Err(refused(Operation::Create, refusal))
                }
            })
        };
        match create(label) {
            // The name says most of what the tag does.
            Err(_) if dislikes_an_attribute.get() => create(plain),
            created => created,
        }
    }

    /// Some servers make keys active at once and refuse to do it again.
    fn activate(&self, kek: &KekId) -> Result<(), ProviderError> {
        let activated = self.once(kek, Call::Activate(kek.clone()));
        match activated {
            Err(error) if error.class() != ErrorClass::Trouble => match self.state(kek)? {
                KeyState::Active => Ok(()),
                _ => Err(error),
            },
            activated => activated,
        }
    }

    fn state(&self, kek: &KekId) -> Result<KeyState, ProviderError> {
        self.ask(vec![Call::GetAttributes(kek.clone())], |outcomes| {
            state_of(kek, &outcomes[0])
        })
    }
}

/// What there is for a scope.
struct There {
    /// Of all that were ever asked for, also of those that are out of use.
    highest: Option<KekGeneration>,
    /// The KEK of that generation, if it may be used.
    in_use: Option<KekId>,
}
