//! Which VM a name means: of those that libvirt has, and of those that only the keystore knows.
//!
//! A UUID means the VM that has it, whatever others are called. A name means the VM that libvirt has by it, else the one that had
//! it here; of several that had it, none.

use std::collections::{BTreeMap, BTreeSet};

use crate::host::libvirt::{Background, DefinedDomain, LibvirtError, Part};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ProviderId, Stanza, VmId};
use crate::model::nearest::name_hint;
use crate::model::problem::{Code, Problem, chain};
use crate::recipients::{Provider, Recipients};
use crate::store::{EnvelopeStore, StoreError, VmRecord};

/// How many names a message has.
const MAX_NAMED: usize = 8;

#[derive(Debug)]
pub(crate) enum KnownVm {
    /// libvirt has it.
    Defined(DefinedDomain),
    /// Only the keystore does.
    Undefined(VmRecord),
}

/// Several VMs had this name, and none of them is defined: which one is meant can't be guessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ambiguous {
    name: String,
    vms: Vec<VmId>,
}

impl Ambiguous {
    /// `command` takes a UUID too.
    pub(crate) fn refuse(&self, code: Code, advice: fn(String) -> Advice) -> Problem {
        let (count, name) = (self.vms.len(), &self.name);
        let ids: Vec<_> = self.vms.iter().map(ToString::to_string).collect();
        Problem::new(
            code,
            format!("{count} VMs were called {name}, and none of them is defined"),
        )
        .next(advice("UUID".into()).note(format!("one of {}", ids.join(", "))))
    }
}

/// Which of the VMs that only the keystore knows is meant by `asked`, a name or a UUID.
pub(crate) fn undefined<'a>(records: &'a [VmRecord], asked: &str) -> Result<Option<&'a VmRecord>, Ambiguous> {
    if let Ok(id) = asked.parse::<VmId>() {
        return Ok(records.iter().find(|record| record.vm == id));
    }
    let named: Vec<_> = records.iter().filter(|record| record.name == asked).collect();
    match &named[..] {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        several => Err(Ambiguous {
            name: asked.to_owned(),
            vms: several.iter().map(|record| record.vm).collect(),
        }),
    }
}

/// A VM that only the keystore knows, if only by the UUID in its envelopes, for what is destroyed or dropped of it: so every row must be
/// readable. `again` is the command, which takes a UUID too.
pub(crate) fn find_undefined(
    keystore: &dyn EnvelopeStore,
    asked: &str,
    again: fn(String) -> Advice,
) -> Result<Option<(VmId, String)>, Problem> {
    let records = match asked.parse::<VmId>() {
        Ok(_) => keystore.vms()?.sound,
        // One that can't be read may have that name too.
        Err(_) => keystore.vms()?.whole()?,
    };
    let found = undefined(&records, asked).map_err(|several| several.refuse(Code::WouldLoseKey, again))?;
    let never_defined = || asked.parse::<VmId>().ok().map(|id| (id, id.to_string()));
    Ok(found
        .map(|record| (record.vm, record.name.clone()))
        .or_else(never_defined))
}

/// Whether what libvirt has found is what was asked for: it takes a UUID for a name where no VM has that UUID.
fn is_meant(asked: &str, found: VmId) -> bool {
    asked.parse().map_or(true, |id: VmId| id == found)
}

/// The VM with this name or UUID.
pub(crate) fn find_vm(
    libvirt: &Background,
    keystore: &dyn EnvelopeStore,
    asked: &str,
) -> Result<KnownVm, Problem> {
    let absent = match find_domain(libvirt, asked) {
        Ok(defined) => return Ok(KnownVm::Defined(defined)),
        Err(absent) if absent.code == Code::NotFound => absent,
        Err(failure) => return Err(failure),
    };
    let records = keystore.vms()?.sound;
    let found = undefined(&records, asked).map_err(|several| several.refuse(Code::Usage, Advice::ShowVm))?;
    found.cloned().map(KnownVm::Undefined).ok_or(absent)
}

/// The domain with this name or UUID.
pub(crate) fn find_domain(libvirt: &Background, asked: &str) -> Result<DefinedDomain, Problem> {
    let found = libvirt.domain(asked).map_err(|error| unreachable(&error))?;
    let found = found.filter(|found| is_meant(asked, found.vm));
    found.ok_or_else(|| absent(libvirt, asked).next(Advice::ListDomains))
}

/// A UUID needs no libvirt: the VM may be defined later.
pub(crate) fn vm_id(libvirt: &Background, asked: &str) -> Result<VmId, Problem> {
    if let Ok(id) = asked.parse() {
        return Ok(id);
    }
    let found = libvirt
        .domain(asked)
        .map_err(|error| unreachable(&error).next(Advice::ShowStatus.or("give its UUID")))?;
    let id = found.map(|domain| domain.vm);
    id.ok_or_else(|| absent(libvirt, asked).next("define it first, or give the UUID that it will have"))
}

/// As the hook names a VM.
pub(crate) fn uuid_of_hook(uuid: &str) -> Result<VmId, Problem> {
    uuid.parse()
        .map_err(|error| Problem::from_error(Code::Usage, format!("'{uuid}' is not a VM's UUID"), &error))
}

fn absent(libvirt: &Background, asked: &str) -> Problem {
    // Where libvirt has stopped to answer meanwhile, no other name is known.
    let names = libvirt.names().unwrap_or_default();
    let hint = name_hint(asked, names.iter().map(String::as_str));
    Problem::not_found(format!("there is no VM '{asked}'{hint}"))
}

/// For a command that can't do without libvirt.
pub(crate) fn unreachable(error: &LibvirtError) -> Problem {
    match error {
        LibvirtError::Untold { vm, part, .. } => Problem::failed(chain(error)).next(told_again(vm, part)),
        _ => Problem::unreachable(chain(error)).next(Advice::ShowStatus),
    }
}

/// What lets libvirt tell it, or does without.
fn told_again(vm: &str, part: &Part) -> Advice {
    let vm = vm.to_owned();
    match part {
        Part::Xml => Advice::DefineXml
            .note("with an earlier dumpxml of it")
            .or_else(Advice::UndefineVm(vm).note("if nobody needs it")),
        Part::Snapshots => Advice::ListSnapshots(vm).within("delete those that nobody needs"),
        Part::Snapshot(snapshot) => Advice::ForgetSnapshot {
            vm,
            snapshot: snapshot.clone(),
        }
        .note("its files stay"),
        Part::SavedState => Advice::DropSavedState(vm).note("which loses what was in its memory"),
    }
}

/// For a command that changes the XML of the VM called `name`.
pub(crate) fn not_redefined(name: &str, error: &LibvirtError) -> Problem {
    Problem::failed(format!("{name} is not redefined: {}", chain(error)))
}

/// The names of the VMs that the keystore knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct VmNames(BTreeMap<VmId, String>);

impl VmNames {
    pub(crate) fn of_records(records: &[VmRecord]) -> Self {
        Self(
            records
                .iter()
                .map(|record| (record.vm, record.name.clone()))
                .collect(),
        )
    }

    /// Those of all records that can be read.
    pub(crate) fn of_keystore(keystore: &dyn EnvelopeStore) -> Result<Self, StoreError> {
        Ok(Self::of_records(&keystore.vms()?.sound))
    }

    /// Its UUID, if it has no name.
    pub(crate) fn of(&self, vm: VmId) -> String {
        self.0.get(&vm).cloned().unwrap_or_else(|| vm.to_string())
    }

    /// `12 objects of 4 VMs (a, b, c, d)`, given the VM of each object.
    pub(crate) fn objects_of_vms(&self, objects: &[VmId]) -> String {
        let vms: BTreeSet<String> = objects.iter().map(|vm| self.of(*vm)).collect();
        let (objects, count) = (objects.len(), vms.len());
        format!("{objects} objects of {count} VMs ({})", some_of(&vms))
    }
}

/// The names of key providers: of those here, and of those that were deleted here.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProviderNames {
    here: BTreeMap<ProviderId, String>,
    deleted: BTreeMap<ProviderId, String>,
}

impl ProviderNames {
    /// Those of this host.
    pub(crate) fn of_host(recipients: &Recipients, keystore: &dyn EnvelopeStore) -> Self {
        let here = recipients.providers();
        let here = here.iter().map(Provider::provider);
        // What can't be read is a finding of its own.
        let deleted = keystore.deleted_providers().map(|rows| rows.sound);
        let deleted = deleted.unwrap_or_default().into_iter();
        Self {
            here: here
                .map(|provider| (provider.id(), provider.name().to_owned()))
                .collect(),
            deleted: deleted.map(|deleted| (deleted.id, deleted.name)).collect(),
        }
    }

    /// Of those that have a stanza: the name here, else the one that it had where the stanza was made.
    pub(crate) fn of(&self, envelope: &Envelope) -> Vec<String> {
        let stanzas = envelope.stanzas.iter();
        let name = |stanza: &Stanza| {
            self.here
                .get(&stanza.provider)
                .unwrap_or(&stanza.provider_name)
                .clone()
        };
        stanzas.map(name).collect()
    }

    /// Why nobody on this host can ever open it, if that is so.
    pub(crate) fn gone(&self, envelope: &Envelope) -> Option<String> {
        let mut why = Vec::with_capacity(envelope.stanzas.len());
        for Stanza {
            provider,
            provider_name,
            ..
        } in &envelope.stanzas
        {
            why.push(match (self.here.get(provider), self.deleted.get(provider)) {
                (Some(_), _) => return None,
                (None, Some(deleted)) => format!("provider '{deleted}' was deleted"),
                (None, None) => format!("provider '{provider_name}' is not on this host"),
            });
        }
        Some(why.join(", "))
    }
}

/// The first of them, and how many more there are.
pub(crate) fn some_of(names: &BTreeSet<String>) -> String {
    let mut named: Vec<_> = names.iter().take(MAX_NAMED).cloned().collect();
    if names.len() > MAX_NAMED {
        named.push(format!("{} more", names.len() - MAX_NAMED));
    }
    named.join(", ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record((vm, name): &(u128, String)) -> VmRecord {
        VmRecord {
            vm: VmId(uuid::Uuid::from_u128(*vm)),
            name: name.clone(),
            sealed_at: 0,
            vtpm_seen: false,
        }
    }

    /// Few VMs and fewer names, some of which are another VM's UUID.
    fn records() -> impl Strategy<Value = Vec<VmRecord>> {
        let name = prop_oneof![
            "[ab]",
            (0..4u128).prop_map(|vm| uuid::Uuid::from_u128(vm).to_string())
        ];
        prop::collection::btree_map(0..4u128, name, 0..4)
            .prop_map(|vms| vms.into_iter().map(|vm| record(&vm)).collect())
    }

    proptest! {
        #[test]
        fn no_name_means_two_vms_and_no_uuid_another_ones(mut records in records(), of in 0..4u128, name in "[abc]") {
            let id = VmId(uuid::Uuid::from_u128(of));
            let by_id = undefined(&records, &id.to_string()).unwrap().map(|record| record.vm);
            prop_assert_eq!(by_id, records.iter().map(|record| record.vm).find(|vm| *vm == id));
            prop_assert_eq!(is_meant(&id.to_string(), id), true);
            prop_assert!(!is_meant(&id.to_string(), VmId(uuid::Uuid::from_u128(of + 1))));

            let found = undefined(&records, &name).map(|found| found.map(|record| record.vm));
            let named = records.iter().filter(|record| record.name == name).count();
            match &found {
                Ok(None) => prop_assert_eq!(named, 0),
                Ok(Some(vm)) => prop_assert!(named == 1 && records.iter().any(|record| record.vm == *vm && record.name == name)),
                Err(several) => prop_assert!(named > 1 && several.vms.len() == named),
            }
            // In whatever order the keystore tells of them.
            records.reverse();
            prop_assert_eq!(undefined(&records, &name).is_err(), found.is_err());
            if let Ok(found) = found {
                prop_assert_eq!(undefined(&records, &name).unwrap().map(|record| record.vm), found);
            }
        }
    }

    #[test]
    fn of_several_none_is_guessed_and_each_can_be_named() {
        let records = [(1, "a".to_owned()), (2, "a".to_owned())].each_ref().map(record);
        let refused = undefined(&records, "a")
            .unwrap_err()
            .refuse(Code::WouldLoseKey, Advice::ShredVm);
        assert!(refused.message.starts_with("2 VMs were called a"), "{refused}");
        let next = refused.advice.unwrap().to_string();
        for record in &records {
            assert!(next.contains(&record.vm.to_string()), "{next}");
        }
    }

    #[test]
    fn many_vms_are_counted_and_a_few_named() {
        let records: Vec<_> = (0..12).map(|n| record(&(n, format!("vm{n:02}")))).collect();
        let objects: Vec<_> = records.iter().flat_map(|record| [record.vm; 2]).collect();
        let named = VmNames::of_records(&records).objects_of_vms(&objects);
        assert!(
            named.starts_with("24 objects of 12 VMs (vm00, ") && named.ends_with("vm07, 4 more)"),
            "{named}"
        );
    }
}
