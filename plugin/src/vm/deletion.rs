//! What `provider delete` asks for: nothing that is needed goes without saying what it would cost.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::foreign::{Proof, given_up, note_behind, proof_of};
use super::forgotten::{self, ForgottenError, Said};
use super::host::Host;
use super::names::{VmNames, some_of};
use super::visible::{Place, Visible};
use crate::api::{FindingView, Outcome, StepView};
use crate::model::act::{StepCode, Tense};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ProviderId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::recipients::{Provider, bring_back};
use crate::store::{CopyPlace, IfNeeded, StoreError};
use crate::terminal::word;

/// What needs a provider.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    /// The VM of each envelope that has a stanza of it.
    objects: Vec<VmId>,
    /// How many of these nobody else opens.
    alone: usize,
    /// Copies that are behind and have a stanza of it.
    copies: BTreeSet<String>,
    /// Those among them that nobody can change.
    fixed: usize,
    /// Whether the settings have it among the recipients of what is sealed.
    in_policy: bool,
    /// VMs whose XML has a vTPM that was given up.
    renewed: BTreeSet<String>,
    /// Files of what was forgotten, and may be elsewhere.
    forgotten: BTreeSet<PathBuf>,
    /// Files of what was forgotten as deleted, and would open by it: nothing needs them unless an image turns up.
    deleted: BTreeSet<PathBuf>,
}

/// Whether a copy can be brought up to date, and need the provider no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Follows {
    ByItself,
    Never,
}

impl Uses {
    fn note(&mut self, id: ProviderId, envelope: &Envelope) {
        if has(id, envelope) {
            self.objects.push(envelope.vm);
            let alone = envelope.stanzas.iter().all(|stanza| stanza.provider == id);
            self.alone += usize::from(alone);
        }
    }

    fn note_copy(&mut self, place: String, follows: Follows) {
        self.copies.insert(place);
        self.fixed += usize::from(follows == Follows::Never);
    }

    fn is_none(&self) -> bool {
        self.objects.is_empty() && self.copies.is_empty() && !self.in_policy
    }
}

/// Whether all was seen that may need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    Whole,
    Partial,
}

/// Whether it is the default provider, and not the only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    DefaultOfSeveral,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing here needs it. Its root keys are kept aside: something elsewhere may.
    Goes,
    /// Its name was typed, by somebody who knows what it costs.
    GoesForGood,
    IsDefault,
    NotSeen,
    OtherTyped,
    Needed,
}

/// Nothing that is needed, or may be, goes unless its very name was typed.
fn decide(name: &str, role: Role, sight: Sight, uses: &Uses, typed: Option<&str>) -> Verdict {
    match typed {
        _ if role == Role::DefaultOfSeveral => Verdict::IsDefault,
        Some(typed) if typed != name => Verdict::OtherTyped,
        Some(_) => Verdict::GoesForGood,
        None if sight == Sight::Partial => Verdict::NotSeen,
        None if !uses.is_none() => Verdict::Needed,
        None => Verdict::Goes,
    }
}

/// Deletes `provider`. One that is needed goes only when its name was `typed`; the default one only as the last. `seen` says whether
/// `host` has what libvirt knows, `policy` which recipients the settings name. No job may be about it.
pub(crate) fn delete(
    host: &Host<'_>,
    provider: &Provider,
    policy: &[String],
    seen: Result<(), Problem>,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let (id, name) = (provider.provider().id(), provider.provider().name().to_owned());
    let has_others = host.recipients.providers().len() > 1;
    let default = host.recipients.default_provider();
    let is_default = default.is_some_and(|default| default.provider().id() == id);
    let role = match is_default && has_others {
        true => Role::DefaultOfSeveral,
        false => Role::Other,
    };
    let mut uses = Uses {
        in_policy: has_others && is_recipient(host, policy, id),
        ..Uses::default()
    };
    let seen = known_uses(host, id, &mut uses)
        .and(seen)
        .and_then(|()| visible_uses(host, id, &mut uses))
        .and_then(|()| forgotten_uses(host, id, &mut uses));
    let sight = match &seen {
        Ok(()) => Sight::Whole,
        Err(_) => Sight::Partial,
    };
    let verdict = decide(&name, role, sight, &uses, typed);
    let stays = |why: &str| Problem::would_lose_key(format!("'{name}' stays: {why}"));
    let subject = Subject::Provider(name.clone());
    let mut warnings = Vec::new();
    match verdict {
        Verdict::Goes => warnings.extend(keep_root_aside(host, provider)?),
        Verdict::GoesForGood => {}
        Verdict::IsDefault => {
            return Err(stays("it is the default provider, and there are others")
                .next(Advice::MakeDefault("OTHER".into())));
        }
        Verdict::NotSeen => {
            let blind = seen
                .err()
                .unwrap_or_else(|| stays("what needs it can't be determined"));
            return Err(blind.of(format!("'{name}' stays: what needs it can't be determined")));
        }
        Verdict::OtherTyped => {
            let typed = match typed.unwrap_or_default() {
                "" => "its name was not typed".to_owned(),
                typed => format!("'{typed}' was typed, which is not its name"),
            };
            return Err(stays(&typed).next(Advice::DeleteProvider(name).note("which says who needs it")));
        }
        Verdict::Needed => {
            let names = VmNames::of_keystore(host.keystore)?;
            return Err(needed(&name, &uses, &names, where_to_move(host, id)));
        }
    }
    // In this order: where it can't be deleted it goes on working.
    let if_needed = match verdict {
        Verdict::GoesForGood => IfNeeded::Goes,
        _ => IfNeeded::Stays,
    };
    let deleted = host.recipients.delete(id, if_needed).map_err(Problem::from);
    deleted.map_err(|problem| problem.of(format!("'{name}' stays")))?;
    provider.provider().lock();
    crate::host::process::trim();
    if !uses.objects.is_empty() {
        let what = format!(
            "{} had a stanza of it, {} of them with no other: these stay locked until it is back",
            VmNames::of_keystore(host.keystore)?.objects_of_vms(&uses.objects),
            uses.alone,
        );
        let locked = Finding::warning(FindingCode::ObjectsLocked, subject.clone(), what);
        warnings.push(locked.next(bring_back(id, name.clone(), Some(provider.kind()))));
    }
    warnings.extend(uses.deleted.iter().map(|file| {
        let file = word(file.display());
        let what = format!("should an image turn up that was forgotten as deleted ({file}), '{name}' must be here again to open it");
        Finding::warning(FindingCode::NeededIfFound, subject.clone(), what)
    }));
    let text = format!(
        "deleted provider '{name}' ({id}) with its keys and settings on this host; backups and servers keep theirs"
    );
    let deleted = StepCode::DeleteProvider.told(text);
    Ok(Outcome {
        steps: StepView::all(&[deleted], Tense::Done, &subject),
        warnings: FindingView::all(&warnings),
        changed: true,
        ..Outcome::default()
    })
}

/// The root keys of a native provider exist here and in its backups only: they go for good by a typed name alone.
fn keep_root_aside(host: &Host<'_>, provider: &Provider) -> Result<Option<Finding>, Problem> {
    let (id, name) = (provider.provider().id(), provider.provider().name());
    let Some(root) = host.host_store.native(id).root()? else {
        return Ok(None);
    };
    let kept: PathBuf =
        forgotten::keep_bytes(host.host_store.dir(), &format!("-{name}.age"), &root.encrypted).map_err(
            |error| {
                Problem::from_error(
                    Code::Failed,
                    format!("'{name}' stays: its root keys can't be kept aside"),
                    &error,
                )
            },
        )?;
    let what = format!(
        "what is unused here may be needed elsewhere: its sealed root keys are kept in {}, and come back by its passphrase",
        word(kept.display())
    );
    let provider = Subject::Provider(name.to_owned());
    let kept_aside = Finding::warning(FindingCode::KeptAside, provider, what);
    Ok(Some(
        kept_aside.next(Advice::RestoreProviderFrom(name.to_string(), kept)),
    ))
}

fn is_recipient(host: &Host<'_>, policy: &[String], id: ProviderId) -> bool {
    let mut named = policy.iter().filter_map(|name| host.recipients.find(name).ok());
    named.any(|known| known.provider().id() == id)
}

fn has(id: ProviderId, envelope: &Envelope) -> bool {
    envelope.stanzas.iter().any(|stanza| stanza.provider == id)
}

/// Also where one row can't be read, which may need it: whoever types the name is told of the others.
fn known_uses(host: &Host<'_>, id: ProviderId, uses: &mut Uses) -> Result<(), Problem> {
    let (known, mut silent) = host.keystore.envelopes()?.claims();
    for envelope in &known {
        uses.note(id, envelope);
    }
    let behind = host.host_store.needed_keks()?;
    for needed in behind.sound.into_iter().filter(|needed| needed.provider == id) {
        let place = copy_name(host, needed.envelope, needed.place)?;
        uses.note_copy(place, Follows::ByItself);
    }
    silent.extend(behind.damaged);
    match silent.into_iter().next() {
        None => Ok(()),
        Some(row) => Err(StoreError::from(row).into()),
    }
}

fn copy_name(host: &Host<'_>, envelope: EnvelopeId, place: CopyPlace) -> Result<String, Problem> {
    let Some(record) = host.keystore.readable_envelope(envelope)? else {
        return Ok(format!("a copy of envelope {envelope}"));
    };
    let place = match place {
        CopyPlace::Xml => Place::Xml(VmNames::of_keystore(host.keystore)?.of(record.envelope.vm)),
        CopyPlace::Image => Place::Image(record.location.into()),
    };
    Ok(place.to_string())
}

/// What the keystore does not know of: VMs that came here and have not started yet, and copies from before a job.
fn visible_uses(host: &Host<'_>, id: ProviderId, uses: &mut Uses) -> Result<(), Problem> {
    let mut unknown = BTreeSet::new();
    let visible = Visible::of_host(host)?;
    if let Some(unreadable) = visible.unreadable.first() {
        return Err(unreadable.clone());
    }
    for copy in visible.copies.iter().filter(|copy| has(id, &copy.envelope)) {
        match host.keystore.envelope(copy.envelope.id)? {
            Some(record) if has(id, &record.envelope) => {}
            Some(record) => {
                let proof = proof_of(host, &copy.envelope, &record.envelope);
                let follows = match note_behind(host, copy, &record, proof)? {
                    true => Follows::ByItself,
                    false => Follows::Never,
                };
                // One that was forged opens nothing, with this provider or without.
                if proof != Proof::Forged {
                    uses.note_copy(copy.place.to_string(), follows);
                }
            }
            // A job does not take it in, so it can't be moved as it is.
            None if given_up(host, &copy.envelope)?.is_some() => {
                let place = format!("{}, of a vTPM that was given up", copy.place);
                uses.note_copy(place, Follows::Never);
                if let Place::Xml(vm) = &copy.place {
                    uses.renewed.insert(vm.clone());
                }
            }
            None => {
                if unknown.insert(copy.envelope.id) {
                    uses.note(id, &copy.envelope);
                }
            }
        }
    }
    Ok(())
}

/// What was forgotten here may be needed again, and saved states have copies that nobody can change.
fn forgotten_uses(host: &Host<'_>, id: ProviderId, uses: &mut Uses) -> Result<(), Problem> {
    let failed = |error: &ForgottenError| Problem::failed(chain(error));
    let (known, _silent) = host.keystore.envelopes()?.claims();
    let known: BTreeSet<EnvelopeId> = known.iter().map(|envelope| envelope.id).collect();
    for (path, kept) in forgotten::kept(host.host_store.dir()).map_err(|error| failed(&error))? {
        let kept = kept.map_err(|error| failed(&error).of(path.display()))?;
        let alone = forgotten::only_there(&kept, |id| known.contains(&id));
        if alone.into_iter().any(|envelope| has(id, envelope)) {
            match kept.said {
                Said::Elsewhere => {
                    let place = format!("{}, forgotten in {}", kept.vm.name, path.display());
                    uses.note_copy(place, Follows::Never);
                    uses.forgotten.insert(path);
                }
                Said::Deleted => drop(uses.deleted.insert(path)),
            }
        }
    }
    let names = VmNames::of_keystore(host.keystore)?;
    for saved in host.host_store.saved_states()?.whole()? {
        if saved.envelopes.iter().any(|envelope| has(id, envelope)) {
            let place = format!("the state of {} that was saved to a file", names.of(saved.vm));
            uses.note_copy(place, Follows::Never);
        }
    }
    Ok(())
}

/// Who needs the provider `name`, and what frees it: `other` is where its envelopes may go.
fn needed(name: &str, uses: &Uses, names: &VmNames, other: String) -> Problem {
    let mut reasons = Vec::new();
    if !uses.objects.is_empty() {
        reasons.push(format!(
            "{} need it, {} of them have no other",
            names.objects_of_vms(&uses.objects),
            uses.alone
        ));
    }
    if !uses.copies.is_empty() {
        let some = some_of(&uses.copies);
        reasons.push(match uses.copies.len() {
            1 => format!("an outdated copy needs it ({some})"),
            many => format!("{many} outdated copies need it ({some})"),
        });
    }
    if uses.in_policy {
        reasons.push("it is one of the recipients in virtseald.yaml".to_owned());
    }
    let move_it = Advice::MoveProvider {
        from: name.to_owned(),
        to: other,
    };
    let file = uses.forgotten.first().cloned().unwrap_or_else(|| "FILE".into());
    let next = match (uses.objects.len(), uses.alone, uses.renewed.first()) {
        (0, _, Some(vm)) => Advice::SealVm(vm.clone())
            .note("which names the new vTPM in its XML")
            .then(Advice::DeleteProvider(name.to_owned())),
        (0, _, None) if uses.fixed > 0 => Advice::from("start what was saved")
            .also(Advice::AdoptFrom(file).note("with what was forgotten"))
            .then(move_it)
            .also("copies in snapshots go with these, and with --force the provider goes without"),
        (0, _, None) if !uses.copies.is_empty() => {
            Advice::ListJobs.within("it shows the copies and what they wait for")
        }
        (0, _, None) => {
            Advice::from("take it out of recipients in virtseald.yaml").then(Advice::ReloadDaemon)
        }
        (_, 0, _) => Advice::RemoveRecipient(name.to_owned()),
        _ => move_it,
    };
    Problem::would_lose_key(format!("'{name}' stays: {}", reasons.join("; "))).next(next)
}

/// The default provider, which is never the one that goes; else one that wraps now.
fn where_to_move(host: &Host<'_>, from: ProviderId) -> String {
    let others = host
        .recipients
        .providers()
        .into_iter()
        .chain(host.recipients.default_provider());
    let others: Vec<_> = others.filter(|known| known.provider().id() != from).collect();
    let ready = others
        .iter()
        .rfind(|known| host.recipients.cannot_wrap(known.provider().id()).is_none());
    let chosen = ready.or(others.last());
    chosen.map_or_else(|| "OTHER".to_owned(), |known| known.provider().name().to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::envelope::{Binding, KekId, ObjectKind, Stanza, Verified};
    use crate::secret::Dek;

    fn envelope(providers: &[ProviderId]) -> Envelope {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Disk,
        };
        let stanzas = providers.iter().map(|provider| Stanza {
            provider: *provider,
            provider_name: "main".to_owned(),
            kek: KekId("v1:provider".to_owned()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        });
        let dek = Dek::from_bytes(&[7; 32]).unwrap();
        Verified::new(&binding, stanzas.collect(), &dek)
            .unwrap()
            .into_envelope()
    }

    #[test]
    fn who_needs_a_provider_decides_what_frees_it() {
        let vm = VmId::random();
        let advice = |uses: &Uses| {
            let problem = needed("main", uses, &VmNames::default(), "spare".to_owned());
            problem.advice.unwrap().to_string()
        };
        let objects = |alone| Uses {
            objects: vec![vm; 2],
            alone,
            ..Uses::default()
        };
        assert_eq!(advice(&objects(0)), "virtseal provider recipients remove main");
        assert_eq!(advice(&objects(1)), "virtseal provider move main spare");
        let mut copies = Uses::default();
        copies.note_copy("the XML of a".to_owned(), Follows::ByItself);
        assert!(advice(&copies).starts_with("virtseal jobs: "));
        copies.note_copy("a snapshot".to_owned(), Follows::Never);
        assert!(advice(&copies).starts_with("start what was saved; virtseal vm adopt --from FILE"));
        let in_policy = Uses {
            in_policy: true,
            ..Uses::default()
        };
        assert!(advice(&in_policy).ends_with("systemctl reload virtseald"));
        let problem = needed("main", &objects(1), &VmNames::default(), "spare".to_owned());
        let said = format!("'main' stays: 2 objects of 1 VMs ({vm}) need it, 1 of them have no other");
        assert_eq!((problem.code, problem.message), (Code::WouldLoseKey, said));
    }

    proptest! {
        /// Whatever else is so: what is needed, and what can't be seen not to be, goes by its typed name alone; another name deletes
        /// nothing, and the default of several stays.
        #[test]
        fn nothing_that_is_needed_goes_unless_its_name_is_typed(
            openers in prop::collection::vec(prop::collection::vec(0..3_usize, 1..4), 0..6),
            copies in prop::collection::vec(any::<bool>(), 0..3),
            in_policy in any::<bool>(),
            is_default in any::<bool>(),
            is_whole in any::<bool>(),
            typed in prop_oneof![Just(None), Just(Some("main")), Just(Some("")), Just(Some("Main"))],
        ) {
            let providers = [0; 3].map(|_| ProviderId::random());
            let mut uses = Uses { in_policy, ..Uses::default() };
            for openers in &openers {
                let of: Vec<_> = openers.iter().map(|nth| providers[*nth]).collect();
                uses.note(providers[0], &envelope(&of));
            }
            for (nth, follows) in copies.iter().enumerate() {
                let follows = if *follows { Follows::ByItself } else { Follows::Never };
                uses.note_copy(nth.to_string(), follows);
            }
            let last_way = openers.iter().filter(|of| of.iter().all(|nth| *nth == 0)).count();
            prop_assert_eq!(uses.alone, last_way);
            let needed = openers.iter().any(|of| of.contains(&0)) || !copies.is_empty() || in_policy;
            prop_assert_eq!(needed, !uses.is_none());
            let role = if is_default { Role::DefaultOfSeveral } else { Role::Other };
            let sight = if is_whole { Sight::Whole } else { Sight::Partial };
            match decide("main", role, sight, &uses, typed) {
                Verdict::Goes => prop_assert!(!needed && is_whole && typed.is_none() && !is_default),
                Verdict::GoesForGood => prop_assert!(typed == Some("main") && !is_default),
                Verdict::IsDefault => prop_assert!(is_default),
                Verdict::NotSeen => prop_assert!(!is_whole && typed.is_none()),
                Verdict::OtherTyped => prop_assert!(typed.is_some_and(|typed| typed != "main")),
                Verdict::Needed => prop_assert!(needed && typed.is_none()),
            }
        }
    }
}
