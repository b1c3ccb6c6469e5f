//! What `provider delete` and `provider orphans` ask for: nothing that is needed goes without saying what it would cost.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::glance::Age;
use super::visible::{Place, Proof};
use super::{Daemon, lock, records};
use crate::api::pages;
use crate::api::{OrphanEnvelope, OrphanKek, Orphans, Outcome};
use crate::audit::Actor;
use crate::job::record::Work;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::recipients::{Provider, bring_back};
use crate::store::CopyPlace;
use crate::terminal::word;
use crate::vm::forgotten::{self, ForgottenError};
use crate::vm::names::{ProviderNames, VmNames};
use crate::vm::names::{some_of, unreachable};
use crate::vm::status::damaged;

/// Readers share a look that is not older than this.
const FRESH: Duration = Duration::from_secs(2);
/// For how long the pages after the first one are of the same look.
const PAGES: Duration = Duration::from_secs(60);

/// The orphans that were seen last, and when.
pub(super) type Seen = Mutex<Option<(Instant, Arc<Orphans>)>>;

/// What needs a provider.
#[derive(Debug, Default)]
struct Uses {
    /// The VM of each envelope that has a stanza of it.
    objects: Vec<VmId>,
    /// How many of these nobody else opens.
    alone: usize,
    /// Copies that are behind and have a stanza of it.
    copies: BTreeSet<String>,
    /// Those among them that nobody can change.
    fixed: usize,
}

/// What needs a KEK that no defined VM's envelope needs.
#[derive(Debug, Default)]
struct OrphanUses {
    envelopes: i64,
    copies: i64,
    is_retired: bool,
}

impl OrphanUses {
    fn origin(&self) -> &'static str {
        match self {
            Self { envelopes: 1.., .. } => "vm-not-defined",
            Self { copies: 1.., .. } => "copy-behind",
            Self { is_retired: true, .. } => "retired",
            _ => "never-used",
        }
    }
}

impl Daemon {
    /// Deletes a provider. One that is needed goes only when its name was `typed`; the default one only as the last.
    pub fn delete_provider(&self, by: Actor, name: &str, typed: Option<&str>) -> Result<Outcome, Problem> {
        let _sealing = lock(&self.sealing);
        let deleted = self.delete(name, typed);
        records::note_provider(self, by, "provider-delete", name, &deleted);
        deleted
    }

    fn delete(&self, name: &str, typed: Option<&str>) -> Result<Outcome, Problem> {
        let known = self.recipients.find(name)?;
        let (id, name) = (known.provider().id(), known.provider().name().to_owned());
        let others = self.recipients.providers().len() - 1;
        let default = self
            .recipients
            .default_provider()
            .map(|known| known.provider().id());
        if default == Some(id) && others > 0 {
            return Err(Problem::new(
                Code::WouldLoseKey,
                format!("'{name}' stays: it is the default provider, and there are others"),
            )
            .next(Advice::MakeDefault("OTHER".into())));
        }
        self.refuse_while_a_job_needs(id, &name)?;
        let mut uses = self.uses(id)?;
        match self.visible_uses(id, &mut uses) {
            Err(blind) if typed.is_none() => {
                return Err(blind.of(format!("'{name}' stays: it can't be seen who needs it")));
            }
            // Whoever types the name knows.
            Ok(()) | Err(_) => {}
        }
        match self.forgotten_uses(id, &mut uses) {
            Err(unreadable) if typed.is_none() => {
                return Err(unreadable.of(format!("'{name}' stays: it can't be seen who needs it")));
            }
            Ok(()) | Err(_) => {}
        }
        let in_policy = others > 0 && self.is_recipient(id);
        let needed = !uses.objects.is_empty() || !uses.copies.is_empty() || in_policy;
        match typed {
            Some(typed) if typed != name => {
                let what = match typed {
                    "" => "its name was not typed".to_owned(),
                    typed => format!("'{typed}' was typed, which is not its name"),
                };
                return Err(
                    Problem::new(Code::WouldLoseKey, format!("'{name}' stays: {what}"))
                        .next(Advice::DeleteProvider(name.to_owned()).note("which says who needs it")),
                );
            }
            None if needed => return Err(self.in_use(id, &name, &uses, in_policy)?),
            _ => {}
        }
        let mut warnings = Vec::new();
        if typed.is_none()
            && let Some(path) = self.keep_root_aside(&known)?
        {
            warnings.push(format!(
                "what is unused here may be needed elsewhere: its sealed root keys are kept in {}, and {} brings it back by its passphrase", word(path.display()), Advice::RestoreProviderFrom(name.clone(), path.clone())
            ));
        }
        // In this order: where it can't be deleted it goes on working.
        self.recipients.delete(id)?;
        known.provider().lock();
        crate::host::process::trim();
        if !uses.objects.is_empty() {
            warnings.push(format!(
                "{} had a stanza of it, {} of them with no other: these stay locked until it is back: {}",
                VmNames::of_keystore(self.keystore.as_ref())?.objects_of_vms(&uses.objects),
                uses.alone,
                bring_back(id, name.clone(), Some(known.kind()))
            ));
        }
        Ok(Outcome {
            steps: vec![format!(
                "delete provider '{name}' ({id}) with its keys and settings on this host; backups and servers keep theirs"
            )],
            warnings,
            changed: true,
        })
    }

    /// The root keys of a native provider exist here and in its backups only: they go for good by a typed name alone.
    fn keep_root_aside(&self, known: &Provider) -> Result<Option<PathBuf>, Problem> {
        let (id, name) = (known.provider().id(), known.provider().name());
        let Some(root) = self.host_store.native(id).root()? else {
            return Ok(None);
        };
        let kept = forgotten::keep_bytes(self.host_store.dir(), &format!("-{name}.age"), &root.sealed);
        kept.map(Some).map_err(|error| {
            Problem::from_error(
                Code::Failed,
                format!("'{name}' stays: its root keys can't be kept aside"),
                &error,
            )
        })
    }

    fn refuse_while_a_job_needs(&self, id: ProviderId, name: &str) -> Result<(), Problem> {
        for job in self.keystore.running_jobs()? {
            if Work::from_json(&job.task)?.providers().contains(&id) {
                return Err(Problem::new(
                    Code::Busy,
                    format!("'{name}' stays: job {} is about it", job.id.0),
                )
                .next(Advice::WatchJob(job.id.0).or(Advice::AbortJob(job.id.0))));
            }
        }
        Ok(())
    }

    fn is_recipient(&self, id: ProviderId) -> bool {
        let recipients = self.config().recipients;
        let named = recipients
            .iter()
            .filter_map(|name| self.recipients.find(name).ok());
        named.into_iter().any(|known| known.provider().id() == id)
    }

    fn uses(&self, id: ProviderId) -> Result<Uses, Problem> {
        let mut uses = Uses::default();
        for record in self.keystore.envelopes()?.whole()? {
            let stanzas = &record.envelope.stanzas;
            if stanzas.iter().any(|stanza| stanza.provider == id) {
                uses.objects.push(record.envelope.vm);
                uses.alone += usize::from(stanzas.iter().all(|stanza| stanza.provider == id));
            }
        }
        for needed in self.host_store.needed_keks()?.whole()? {
            if needed.provider == id {
                uses.copies.insert(self.copy_name(needed.envelope, needed.place)?);
            }
        }
        Ok(uses)
    }

    fn copy_name(&self, envelope: EnvelopeId, place: CopyPlace) -> Result<String, Problem> {
        let Some(record) = self.keystore.envelope(envelope)? else {
            return Ok(format!("a copy of envelope {envelope}"));
        };
        let place = match place {
            CopyPlace::Xml => {
                Place::Xml(VmNames::of_keystore(self.keystore.as_ref())?.of(record.envelope.vm))
            }
            CopyPlace::Image => Place::Image(record.location.into()),
        };
        Ok(place.to_string())
    }

    /// What the keystore does not know of: VMs that came here and have not started yet, and copies from before a job.
    fn visible_uses(&self, id: ProviderId, uses: &mut Uses) -> Result<(), Problem> {
        let of_it = |envelope: &Envelope| envelope.stanzas.iter().any(|stanza| stanza.provider == id);
        let mut unknown = BTreeSet::new();
        let visible = self.visible_copies()?;
        if let Some(unreadable) = visible.unreadable.first() {
            return Err(Problem::new(Code::Failed, unreadable.clone()));
        }
        for copy in visible.copies.iter().filter(|copy| of_it(&copy.envelope)) {
            match self.keystore.envelope(copy.envelope.id)? {
                Some(record) if of_it(&record.envelope) => {}
                Some(record) => {
                    let proof = self.proof_of(copy, &record);
                    let follows = self.note_behind(copy, &record, proof)?;
                    // One that was forged opens nothing, with this provider or without.
                    if proof != Proof::Forged {
                        uses.copies.insert(copy.place.to_string());
                        uses.fixed += usize::from(!follows);
                    }
                }
                None => {
                    if unknown.insert(copy.envelope.id) {
                        uses.objects.push(copy.envelope.vm);
                        let others = copy.envelope.stanzas.iter().any(|stanza| stanza.provider != id);
                        uses.alone += usize::from(!others);
                    }
                }
            }
        }
        Ok(())
    }

    /// What was forgotten here may be needed again, and saved states have copies that nobody can change.
    fn forgotten_uses(&self, id: ProviderId, uses: &mut Uses) -> Result<(), Problem> {
        let of_it = |envelope: &Envelope| envelope.stanzas.iter().any(|stanza| stanza.provider == id);
        let failed = |error: &ForgottenError| Problem::new(Code::Failed, chain(error));
        let known: BTreeSet<EnvelopeId> = self
            .keystore
            .envelopes()?
            .whole()?
            .iter()
            .map(|record| record.envelope.id)
            .collect();
        for (path, kept) in forgotten::kept(self.host_store.dir()).map_err(|error| failed(&error))? {
            let kept = kept.map_err(|error| failed(&error).of(path.display()))?;
            let alone = forgotten::only_there(&kept, |id| known.contains(&id));
            if alone.into_iter().any(of_it) {
                uses.copies
                    .insert(format!("{}, forgotten in {}", kept.vm.name, path.display()));
                uses.fixed += 1;
            }
        }
        let names = VmNames::of_keystore(self.keystore.as_ref())?;
        for saved in self.host_store.saved_states()?.whole()? {
            if saved.envelopes.iter().any(of_it) {
                uses.copies.insert(format!(
                    "the state of {} that was saved to a file",
                    names.of(saved.vm)
                ));
                uses.fixed += 1;
            }
        }
        Ok(())
    }

    fn in_use(&self, id: ProviderId, name: &str, uses: &Uses, in_policy: bool) -> Result<Problem, Problem> {
        let mut reasons = Vec::new();
        if !uses.objects.is_empty() {
            reasons.push(format!(
                "{} need it, {} of them have no other",
                VmNames::of_keystore(self.keystore.as_ref())?.objects_of_vms(&uses.objects),
                uses.alone
            ));
        }
        if !uses.copies.is_empty() {
            reasons.push(format!(
                "{} copies that are behind need it ({})",
                uses.copies.len(),
                some_of(&uses.copies)
            ));
        }
        if in_policy {
            reasons.push("it is one of the recipients in virtseald.yaml".to_owned());
        }
        let other = self.where_to_move(id);
        let next = match (uses.objects.len(), uses.alone) {
            (0, _) if uses.fixed > 0 => Advice::from("start what was saved")
                .also(Advice::AdoptFrom("FILE".into()).note("with what was forgotten"))
                .then(Advice::MoveProvider {
                    from: name.to_owned(),
                    to: other,
                })
                .also("copies in snapshots go with these, and with --force the provider goes without"),
            (0, _) if !uses.copies.is_empty() => {
                Advice::ListJobs.within("it shows the copies and what they wait for")
            }
            (0, _) => Advice::from("take it out of recipients in virtseald.yaml").then(Advice::ReloadDaemon),
            (_, 0) => Advice::RemoveRecipient(name.to_owned()),
            _ => Advice::MoveProvider {
                from: name.to_owned(),
                to: other,
            },
        };
        Ok(Problem::new(
            Code::WouldLoseKey,
            format!("'{name}' stays: {}", reasons.join("; ")),
        )
        .next(next))
    }

    /// The default provider, which is never the one that goes; else one that wraps now.
    fn where_to_move(&self, from: ProviderId) -> String {
        let others = self
            .recipients
            .providers()
            .into_iter()
            .chain(self.recipients.default_provider());
        let others: Vec<_> = others.filter(|known| known.provider().id() != from).collect();
        let ready = others
            .iter()
            .rfind(|known| self.recipients.cannot_wrap(known.provider().id()).is_none());
        let chosen = ready.or(others.last());
        chosen.map_or_else(|| "OTHER".to_owned(), |known| known.provider().name().to_owned())
    }

    /// Envelopes whose VM is not defined, and KEKs that no defined VM's envelope needs. What one host sees is no reason to destroy
    /// any of them.
    pub fn orphans(&self, age: Age, after: Option<&str>) -> Result<Orphans, Problem> {
        let most = match (age, after) {
            (_, Some(_)) => PAGES,
            (Age::Lately, None) => FRESH,
            (Age::Now, None) => Duration::ZERO,
        };
        // One look at a time, however many ask.
        let mut seen = lock(&self.orphans);
        let all = match seen.take().filter(|(at, _)| at.elapsed() < most) {
            Some((at, all)) => (at, all),
            None => (Instant::now(), Arc::new(self.all_orphans()?)),
        };
        let page = pages::of_orphans(&all.1, after);
        // What had to be read in pages is kept until the last one.
        *seen = Some(all).filter(|_| after.is_none() || page.next.is_some());
        Ok(page)
    }

    fn all_orphans(&self) -> Result<Orphans, Problem> {
        let domains = self.background.domains().map_err(|error| unreachable(&error))?;
        let defined: BTreeSet<VmId> = domains.iter().map(|domain| domain.vm).collect();
        let names = VmNames::of_keystore(self.keystore.as_ref())?;
        let providers = ProviderNames::of_host(&self.recipients, self.keystore.as_ref());
        let (mut envelopes, mut in_use) = (Vec::new(), BTreeSet::new());
        let mut keks: BTreeMap<(ProviderId, String), OrphanUses> = BTreeMap::new();
        // What destroys a key asks for all of them; here those that can't be read are named.
        for record in self.keystore.envelopes()?.sound {
            let envelope = &record.envelope;
            let used = defined.contains(&envelope.vm);
            for stanza in &envelope.stanzas {
                let kek = (stanza.provider, stanza.kek.0.clone());
                if used {
                    in_use.insert(kek);
                } else {
                    keks.entry(kek).or_default().envelopes += 1;
                }
            }
            if !used {
                envelopes.push(OrphanEnvelope {
                    envelope: envelope.id.to_string(),
                    vm: names.of(envelope.vm),
                    kind: envelope.kind.to_string(),
                    path: (!record.location.is_empty()).then(|| record.location.clone()),
                    present: !record.location.is_empty() && Path::new(&record.location).exists(),
                    providers: providers.of(envelope),
                });
            }
        }
        for needed in self.host_store.needed_keks()?.sound {
            let KekId(kek) = needed.kek;
            keks.entry((needed.provider, kek)).or_default().copies += 1;
        }
        for retired in self.keystore.retired_keks()?.sound {
            keks.entry((retired.provider, retired.kek.0))
                .or_default()
                .is_retired = true;
        }
        for made in self.keystore.made_keks()?.sound {
            keks.entry((made.provider, made.kek.0)).or_default();
        }
        keks.retain(|kek, _| !in_use.contains(kek));
        let keks = keks.into_iter().map(|((provider, kek), uses)| OrphanKek {
            provider: self.name_of(provider),
            kek,
            envelopes: uses.envelopes,
            copies: uses.copies,
            origin: uses.origin().to_owned(),
        });
        let mut all = Orphans {
            envelopes,
            keks: keks.collect(),
            damaged: damaged::records(self.keystore.as_ref(), &self.host_store)
                .iter()
                .map(ToString::to_string)
                .collect(),
            next: None,
        };
        pages::sort(&mut all);
        Ok(all)
    }
}
