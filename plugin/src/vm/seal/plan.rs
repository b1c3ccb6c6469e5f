//! What sealing a domain takes, and all that stands in its way. Looks only; nothing is changed here.

use std::collections::BTreeMap;
use std::path::Path;

use super::disks::{DiskStep, DiskWork, plan_disk};
use super::loss::{Anew, Loss, Obstacle, Way};
use super::others::{OtherUses, refuse_one_file_twice};
use super::room::{NewFile, without_room};
use super::store::{NvramStep, plan_nvram};
use super::vtpm::{VtpmStep, plan_vtpm};
use super::{Host, keys};
use crate::api::{FindingView, Outcome, StepView};
use crate::domain::edit::{LoaderPin, SealEdit};
use crate::domain::{self, Disk, DiskDevice, Domain, Source};
use crate::host::libvirt::DefinedDomain;
use crate::model::act::{Act, StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId};
use crate::model::finding::{Finding, Subject};
use crate::model::problem::{Problem, chain};
use crate::store::EnvelopeRecord;
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::moved::Moved;
use crate::vm::{autostart, side_doors};

/// What sealing a VM takes, as far as that can be told, and what stands in its way.
#[derive(Debug)]
pub(crate) struct Survey {
    plan: Plan,
    notes: Vec<Act>,
    obstacles: Vec<Obstacle>,
}

#[derive(Debug)]
pub(crate) struct Plan {
    name: String,
    /// It is off, so that it can be started.
    starts: bool,
    pub(super) disks: Vec<DiskStep>,
    pub(super) nvram: NvramStep,
    pub(super) vtpm: VtpmStep,
    /// What no step opens, and is elsewhere than the keystore has it.
    pub(super) moved: Vec<Moved>,
    warnings: Vec<Finding>,
}

impl Survey {
    /// Of a dry run.
    pub(crate) fn outcome(&self) -> Outcome {
        Outcome {
            steps: self.plan.steps(Tense::Planned),
            notes: StepView::all(&self.notes, Tense::Planned, &self.plan.subject()),
            obstacles: self.obstacles.iter().map(Obstacle::view).collect(),
            warnings: FindingView::all(&self.plan.warnings),
            ..Outcome::default()
        }
    }

    /// Adds whose key can't be had of what is to be opened: only a dry run does not find out by itself.
    #[must_use]
    pub(crate) fn with_keys_tried(mut self, host: &Host<'_>) -> Self {
        let disks = self.plan.disks.iter().filter_map(|step| match &step.work {
            DiskWork::Adopt(envelope) => Some((format!("disk {}", step.target), vec![envelope])),
            DiskWork::Sealed(_) | DiskWork::Replace(_) => None,
        });
        let nvram = ("nvram".to_owned(), self.plan.nvram.to_open());
        let vtpm = ("vtpm".to_owned(), self.plan.vtpm.to_open());
        for (object, envelopes) in disks.chain([nvram, vtpm]) {
            let failed = envelopes
                .iter()
                .map(|envelope| host.recipients.open_envelope(envelope).err());
            let failed: Option<Vec<_>> = failed.collect();
            if let Some(error) = failed.and_then(|failed| failed.into_iter().next()) {
                let failure = Problem::from(error).of(&object).of(&self.plan.name);
                let subject = Subject::object(&self.plan.name, &object);
                self.obstacles.push(failure.about(subject).into());
            }
        }
        self
    }

    /// # Errors
    /// The first obstacle, and how to see the others.
    pub(crate) fn ready(self) -> Result<Plan, Problem> {
        let count = self.obstacles.len();
        let Some(Obstacle { problem: first, .. }) = self.obstacles.into_iter().next() else {
            return Ok(self.plan);
        };
        if count == 1 {
            return Err(first);
        }
        let all = Advice::PlanSeal(self.plan.name).note(format!("which lists all {count} obstacles"));
        // What destroys is last in it.
        let advice = match first.advice.clone() {
            Some(advice) => all.also(advice),
            None => all,
        };
        Err(first.next(advice))
    }
}

impl Plan {
    /// What was done.
    pub(crate) fn outcome(&self, changed: bool) -> Outcome {
        Outcome {
            steps: self.steps(Tense::Done),
            result: Some(format!("{} is sealed", self.name)),
            next: self
                .starts
                .then(|| Advice::StartVm(self.name.clone()).to_string()),
            warnings: FindingView::all(&self.warnings),
            changed,
            ..Outcome::default()
        }
    }

    fn steps(&self, tense: Tense) -> Vec<StepView> {
        StepView::all(&self.acts(), tense, &self.subject())
    }

    fn subject(&self) -> Subject {
        Subject::Vm(self.name.clone())
    }

    fn acts(&self) -> Vec<Act> {
        let mut acts: Vec<_> = self.disks.iter().filter_map(DiskStep::act).collect();
        acts.extend(self.nvram.act());
        acts.extend(self.nvram.loader().map(LoaderPin::act));
        acts.extend(self.vtpm.act());
        if !acts.is_empty() {
            acts.push(Verb::Redefine.act(StepCode::Redefine, "the domain"));
        }
        acts.extend(self.moved.iter().map(Moved::act));
        acts
    }

    /// Whether a key is to be made.
    fn makes_keys(&self) -> bool {
        let for_disk = |step: &DiskStep| matches!(step.work, DiskWork::Replace(_));
        self.disks.iter().any(for_disk)
            || matches!(self.nvram, NvramStep::Create(_))
            || matches!(self.vtpm, VtpmStep::Add | VtpmStep::Encrypt | VtpmStep::Renew(_))
    }

    /// What has a key already.
    fn known(&self) -> impl Iterator<Item = (String, &Envelope)> {
        let disks = self.disks.iter().filter_map(|step| {
            let known = step.work.known()?;
            Some((format!("disk {}", step.target), known))
        });
        let nvram = self.nvram.known().map(|known| ("nvram".to_owned(), known));
        let vtpm = self.vtpm.known().map(|known| ("vtpm".to_owned(), known));
        disks.chain(nvram).chain(vtpm)
    }

    /// What is written beside what is there.
    fn new_files(&self) -> impl Iterator<Item = NewFile<'_>> {
        let store = match &self.nvram {
            NvramStep::Create(store) => Some(NewFile {
                place: &store.place,
                bytes: STORE_BYTES,
            }),
            _ => None,
        };
        let disks = self.disks.iter().filter_map(|step| match &step.work {
            DiskWork::Replace(info) => Some(NewFile {
                place: &step.place,
                // The tables of an empty image grow with its disk.
                bytes: IMAGE_BYTES + (info.virtual_size.0 >> 22),
            }),
            DiskWork::Sealed(_) | DiskWork::Adopt(_) => None,
        });
        store.into_iter().chain(disks)
    }

    /// The change of the XML, before anything is made for it: with ids that nobody will have.
    fn try_edit(&self, defined: &DefinedDomain) -> Result<(), Problem> {
        let envelope_of = |known: Option<&Envelope>| known.map_or_else(EnvelopeId::random, |known| known.id);
        let edit = SealEdit {
            disks: self
                .disks
                .iter()
                .map(|step| step.edit(envelope_of(step.work.known())))
                .collect(),
            nvram: self.nvram.edit(envelope_of(self.nvram.known())),
            vtpm: self.vtpm.edit(envelope_of(self.vtpm.known())),
            envelopes: &[],
        };
        domain::edit::seal(&defined.xml, &edit)
            .map(drop)
            .map_err(|error| Problem::failed(chain(&error)).next(Advice::EditXml(defined.name.clone())))
    }
}

/// Larger than any store with its LUKS header.
const STORE_BYTES: u64 = 8 << 20;
/// Larger than the headers and key material of an empty image.
const IMAGE_BYTES: u64 = 4 << 20;

/// What was found to be in the way, in the order in which it is told.
#[derive(Debug)]
struct Findings<'a> {
    vm: &'a str,
    found: Vec<Found>,
}

#[derive(Debug)]
enum Found {
    Obstacle(Problem),
    Loss(Loss),
}

impl Findings<'_> {
    /// `step`, unless it can't be taken for that object.
    fn of_object<T>(&mut self, object: &str, way: Result<Way<T>, Problem>) -> Option<T> {
        let told = |failure: Problem| {
            let subject = Subject::object(self.vm, object);
            failure.about(subject).of(object).of(self.vm)
        };
        let found = match way {
            Ok(Way::Open(step)) => return Some(step),
            Ok(Way::Lost(loss)) => Found::Loss(loss.told(told)),
            Err(failure) => Found::Obstacle(told(failure)),
        };
        self.found.push(found);
        None
    }

    fn of_vm<T>(&mut self, looked: Result<T, Problem>) {
        let told = |failure: Problem| failure.about(Subject::Vm(self.vm.to_owned())).of(self.vm);
        self.found.extend(looked.err().map(told).map(Found::Obstacle));
    }

    /// Says of each loss how to accept it together with all others, and those that are accepted already.
    fn obstacles(self, accepted: &AcceptedLosses) -> Vec<Obstacle> {
        let lost = self.found.iter().filter_map(|found| match found {
            Found::Loss(loss) => Some(loss),
            Found::Obstacle(_) => None,
        });
        let all = Anew::of(lost, accepted);
        let obstacle = |found| match found {
            Found::Obstacle(problem) => problem.into(),
            Found::Loss(loss) => Obstacle::of_loss(self.vm, loss, &all),
        };
        self.found.into_iter().map(obstacle).collect()
    }
}

/// Looks at the domain and decides what sealing it takes; new keys are to be for `provider`, if it is named. Of the disks in
/// `not_found` nobody knows the files.
pub(crate) fn survey(
    host: &Host<'_>,
    defined: &DefinedDomain,
    mut not_found: BTreeMap<String, Problem>,
    provider: Option<&str>,
) -> Result<Survey, Problem> {
    let name = &defined.name;
    let domain = parse(defined)?;
    let confirmed = host.confirmed.refuse_unknown(&domain);
    let known = confirmed.and_then(|()| host.accepted.refuse_unknown(&domain));
    known.map_err(|failure| failure.of(name))?;
    let (wrapping, none_wraps) = match keys::wrapping(host, provider) {
        Ok(wrapping) => (wrapping, None),
        Err(unknown) if provider.is_some() => return Err(unknown),
        Err(none) => (Vec::new(), Some(none)),
    };
    let mut obstacles = Findings {
        vm: name,
        found: Vec::new(),
    };
    let others = OtherUses::among(&host.kept, domain.uuid);
    let (sealed, left): (Vec<_>, Vec<_>) = domain
        .disks
        .iter()
        .partition(|disk| !disk.readonly && disk.source != Source::Empty);
    let mut disks = Vec::new();
    for disk in sealed {
        let step = match not_found.remove(&disk.target) {
            Some(unknown) => Err(unknown),
            None => plan_disk(host, &domain, disk, &others),
        };
        disks.extend(obstacles.of_object(&format!("disk {}", disk.target), step));
    }
    let nvram = obstacles.of_object("nvram", plan_nvram(host, &domain, &others));
    let vtpm = obstacles.of_object("vtpm", plan_vtpm(host, &domain));
    let policy = host.policies.of(&domain);
    obstacles.of_vm(refuse_one_file_twice(&domain));
    obstacles.of_vm(refuse_name(&domain));
    for refused in side_doors::refusals(&domain, policy) {
        obstacles.of_vm(Err::<(), _>(refused));
    }
    let records = host.keystore.envelopes_of(domain.uuid)?.sound;
    let mut moved = Moved::among(&domain, &records);
    let nvram = nvram.unwrap_or(NvramStep::None);
    // What a step opens is written down with that.
    let opened: Vec<_> = disks
        .iter()
        .filter_map(DiskStep::opened)
        .chain(nvram.to_open().into_iter().map(|envelope| envelope.id))
        .collect();
    // And what gets another key there has not moved there.
    let is_taken = |moved: &Moved| {
        let is_there = |step: &DiskStep| step.act().is_some() && step.place.shown() == moved.to;
        opened.contains(&moved.envelope) || disks.iter().any(is_there)
    };
    moved.retain(|moved| !is_taken(moved) && moved.has_left(host));
    let mut plan = Plan {
        name: name.clone(),
        starts: !defined.active,
        disks,
        nvram,
        vtpm: vtpm.unwrap_or(VtpmStep::None),
        moved,
        warnings: warnings(host, defined, &domain, &records)?,
    };
    for failure in without_room(plan.new_files()) {
        obstacles.of_vm(Err::<(), _>(failure));
    }
    if obstacles.found.is_empty() {
        obstacles.of_vm(plan.try_edit(defined));
    }
    if plan.makes_keys() {
        for failure in none_wraps.into_iter().chain(keys::cannot_wrap(host, &wrapping)) {
            obstacles.of_vm(Err::<(), _>(failure));
        }
    }
    // Whoever has nothing done to it may run.
    if !plan.acts().is_empty() || !obstacles.found.is_empty() {
        let off = refuse_unless_off(defined, &Advice::SealVm(name.clone())).err();
        obstacles.found.extend(off.map(Found::Obstacle));
    }
    if provider.is_some() || !plan.acts().is_empty() {
        let stay = keys::stay(host, &wrapping, &domain, plan.known());
        plan.warnings.extend(stay);
    }
    plan.warnings.extend(plan.nvram.warning(name));
    let for_whom = plan.makes_keys() && !wrapping.is_empty();
    let notes = for_whom.then(|| keys::told(&wrapping)).into_iter();
    let notes = notes.chain(plan.disks.iter().filter_map(DiskStep::note));
    Ok(Survey {
        notes: notes.chain(left.into_iter().map(stays)).collect(),
        obstacles: obstacles.obstacles(&host.accepted),
        plan,
    })
}

/// A disk that nothing is written to.
fn stays(disk: &Disk) -> Act {
    let device = match disk.device {
        DiskDevice::Cdrom => "a CD",
        DiskDevice::Floppy => "a floppy",
        _ => "read-only",
    };
    let (target, path) = (&disk.target, disk.source.path());
    let what = match path {
        Some(path) => format!("{target} stays as it is: {device}, {}", path.display()),
        None => format!("{target} stays as it is: {device}"),
    };
    let act = StepCode::LeaveAsIs.told(what).on(format!("disk {target}"));
    path.into_iter().fold(act, Act::at)
}

fn warnings(
    host: &Host<'_>,
    defined: &DefinedDomain,
    domain: &Domain,
    records: &[EnvelopeRecord],
) -> Result<Vec<Finding>, Problem> {
    let (name, policy) = (&defined.name, host.policies.of(domain));
    let autostart = defined.autostart.then(|| {
        let instead = Advice::Autostart(name.clone()).note("once it is sealed");
        autostart::by_libvirt(name, instead)
    });
    let known: Vec<_> = records.iter().map(|record| record.location.clone()).collect();
    let rule = host.paths.clone();
    let permit = move |path: &Path| rule.permit_known(path, known.iter());
    let found = autostart
        .into_iter()
        .chain(side_doors::warnings(domain, policy))
        .chain(side_doors::plain_layers(domain, policy, permit));
    Ok(found.collect())
}

/// What swtpm_setup, which the first start runs with the name in its arguments, can't take.
fn refuse_name(domain: &Domain) -> Result<(), Problem> {
    let name = &domain.name;
    if !name.contains(['\\', '/']) && !name.contains(char::is_control) {
        return Ok(());
    }
    Err(Problem::failed(format!(
        "the name {name:?} has a character that swtpm_setup or libvirt's files can't have"
    ))
    .next(Advice::RenameVm(name.to_owned()).then(Advice::SealVm("NEW".to_owned()))))
}

/// `again` is what was refused.
pub(super) fn refuse_unless_off(defined: &DefinedDomain, again: &Advice) -> Result<(), Problem> {
    let name = &defined.name;
    if defined.active {
        let off = Advice::ShutDownVm(name.clone()).then(again.clone());
        return Err(Problem::busy(format!("{name} is running")).next(off));
    }
    if defined.managed_save {
        return Err(
            Problem::busy(format!("{name} has a saved state, made from the VM as it is now")).next(
                Advice::StartVm(name.clone())
                    .then("shut it down")
                    .then(again.clone())
                    .or_else(
                        Advice::DropSavedState(name.clone())
                            .note("which loses what was in its memory")
                            .then(again.clone()),
                    ),
            ),
        );
    }
    Ok(())
}

pub(super) fn parse(defined: &DefinedDomain) -> Result<Domain, Problem> {
    Domain::parse(&defined.xml)
        .map_err(|error| Problem::failed(format!("{}: {}", defined.name, chain(&error))))
}
