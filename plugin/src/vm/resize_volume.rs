//! What `volume resize` asks for: another size for a disk, by libvirt while its VM runs, else by `qemu-img`.
//!
//! A larger one costs nothing. A smaller one loses what is beyond its end, so it takes a typed name, and a VM that is off.

mod users;

use std::path::Path;

use super::host::{Host, passphrase};
use super::names::VmNames;
use crate::api::{Outcome, StepView};
use crate::host::permitted::PermittedPath;
use crate::model::act::{StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{ObjectKind, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};
use crate::object::disk::{self, Bytes, VolumeError};
use crate::store::EnvelopeRecord;
use users::{Power, Role, User, users};

/// How it is done.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// It has that size.
    Nothing,
    /// By libvirt, on this VM's disk.
    Online {
        vm: VmId,
        target: String,
    },
    Offline,
}

#[derive(Debug)]
struct Facts<'a> {
    path: &'a Path,
    /// The name of its VM.
    owner: &'a str,
    old: Bytes,
    new: Bytes,
    users: &'a [User],
    /// What nobody can see, and may be based on it.
    unseen: Option<&'a Problem>,
    typed: Option<&'a str>,
}

impl Facts<'_> {
    fn decide(&self) -> Result<Way, Problem> {
        let shown = self.path.display();
        if self.old == self.new {
            return Ok(Way::Nothing);
        }
        if let Some((user, disk)) = self.users.iter().find_map(|user| match &user.role {
            Role::Below(disk) => Some((user, disk)),
            Role::Disk(_) | Role::Alien(_) => None,
        }) {
            return Err(Problem::busy(format!(
                "{shown} keeps its size: disk {disk} of {} is based on it",
                user.name
            ))
            .next("resize the disk on top of it"));
        }
        if let Some(saved) = self.users.iter().find(|user| user.power == Power::Saved) {
            let name = &saved.name;
            return Err(Problem::busy(format!(
                "{shown} keeps its size: {name} has a saved state, which does not know another one"
            ))
            .next(Advice::StartVm(name.clone()).then(self.again())));
        }
        let mut running = self.users.iter().filter(|user| user.power == Power::Running);
        let (first, second) = (running.next(), running.next());
        if self.new < self.old {
            return self.shrink(first);
        }
        match (first, second) {
            (None, _) => Ok(Way::Offline),
            (
                Some(User {
                    vm,
                    role: Role::Disk(target),
                    ..
                }),
                None,
            ) => Ok(Way::Online {
                vm: *vm,
                target: target.clone(),
            }),
            (
                Some(User {
                    name,
                    role: Role::Alien(target),
                    ..
                }),
                None,
            ) => Err(Problem::busy(format!(
                "{shown} keeps its size: {name} runs with it as disk {target}, and not by its key"
            ))
            .next(Advice::ShutDownVm(name.clone()).then(self.again()))),
            (Some(user), _) => Err(Problem::busy(format!(
                "{shown} keeps its size: several VMs that run have it"
            ))
            .next(Advice::ShutDownVm(user.name.clone()).then(self.again()))),
        }
    }

    fn shrink(&self, running: Option<&User>) -> Result<Way, Problem> {
        let (shown, old, new) = (self.path.display(), self.old, self.new);
        let shrink = || Advice::ShrinkVolume {
            path: self.path.to_owned(),
            size: new.0,
        };
        if let Some(user) = running {
            return Err(Problem::busy(format!(
                "{shown} keeps its size: {} runs, and would lose data",
                user.name
            ))
            .next(Advice::ShutDownVm(user.name.clone()).then(shrink())));
        }
        if let Some(unseen) = self.unseen {
            let mend = unseen.advice.clone().unwrap_or_else(|| "mend that".into());
            let unseen = unseen.clone().of(format!(
                "{shown} keeps its size, for something may be based on it"
            ));
            return Err(unseen.next(mend.then(shrink())));
        }
        match self.typed {
            Some(typed) if typed == self.owner => Ok(Way::Offline),
            Some(typed) => Err(Problem::would_lose_key(format!(
                "{shown} keeps its size: '{typed}' was typed, and its VM is called {}",
                self.owner
            ))
            .next(shrink())),
            None => Err(Problem::would_lose_key(format!(
                "{shown} has {old}: all beyond {new} would be lost"
            ))
            .next(Advice::from("make its file systems and partitions smaller in the guest").then(shrink()))),
        }
    }

    fn again(&self) -> Advice {
        Advice::ResizeVolume {
            path: self.path.to_owned(),
            size: self.new.0,
        }
    }
}

/// Gives the volume of `record`, which root has named as `path`, `size` in whole sectors; a smaller one only if the name of its VM was
/// `typed`. Nothing else may be done to the VM meanwhile, and no start may have its header.
///
/// # Errors
/// With who has it, or what would be lost.
pub(crate) fn resize(
    host: &Host<'_>,
    path: &Path,
    record: &EnvelopeRecord,
    size: Bytes,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let shown = path.display();
    if record.envelope.kind != ObjectKind::Disk {
        let kind = record.envelope.kind;
        return Err(Problem::usage(format!(
            "{shown} is the {kind} of a VM: only disks can be resized"
        ))
        .next(Advice::ShowVms));
    }
    let place =
        PermittedPath::named_by_root(path).map_err(|source| VolumeError::unreachable(path, source))?;
    let info = disk::inspect(&place)?;
    let new = size.whole_sectors().filter(|new| new.0 > 0);
    let new =
        new.ok_or_else(|| Problem::usage(format!("{shown} can't have {size}")).next("give another size"))?;
    let (users, unseen) = users(host, info.file_id, &record.envelope)?;
    let facts = Facts {
        path,
        owner: &VmNames::of_keystore(host.keystore)?.of(record.envelope.vm),
        old: info.virtual_size,
        new,
        users: &users,
        unseen: unseen.as_ref(),
        typed,
    };
    match facts.decide()? {
        Way::Nothing => {
            return Ok(Outcome::default());
        }
        Way::Offline => {
            let dek = host.recipients.open_envelope(&record.envelope)?;
            disk::resize(&place, &passphrase(&dek)?, new)?;
        }
        Way::Online { vm, target } => {
            let resized = host.libvirt.resize_disk(vm, &target, new.0);
            resized.map_err(|error| {
                let failure = Problem::from_error(Code::Failed, format!("{shown} is not resized"), &error);
                // QEMU has not opened the disks for writing, where the VM was saved while it was paused, and is restored.
                let paused = facts.users.iter().find(|user| user.vm == vm);
                let paused = paused.filter(|_| matches!(host.libvirt.is_paused(vm), Ok(true)));
                failure.advised(paused.map(|user| Advice::ResumeVm(user.name.clone()).then(facts.again())))
            })?;
            let found = disk::inspect(&place)?.virtual_size;
            if found != new {
                return Err(Problem::failed(format!("{shown} has {found} now, and not {new}"))
                    .next(Advice::CheckVolume(path.to_owned())));
            }
        }
    }
    let grown = new > info.virtual_size;
    let image = Subject::Image(shown.to_string());
    let what = format!("{shown} from {} to {new}", info.virtual_size);
    let (act, code, note) = match grown {
        true => (
            Verb::Grow.act(StepCode::Grow, what),
            FindingCode::GuestToGrow,
            "the guest has to grow its partitions and file systems itself",
        ),
        false => (
            Verb::Shrink.act(StepCode::Shrink, what),
            FindingCode::DataLost,
            "what was beyond its end is lost",
        ),
    };
    Ok(Outcome {
        steps: StepView::all(&[act.at(path)], Tense::Done, &image),
        warnings: vec![Finding::warning(code, image, note).into()],
        changed: true,
        ..Outcome::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(role: Role, power: Power) -> User {
        User {
            vm: VmId(uuid::Uuid::nil()),
            name: "web01".to_owned(),
            role,
            power,
        }
    }

    fn decide(old: u64, new: u64, users: &[User], typed: Option<&str>) -> Result<Way, (Code, String)> {
        decide_unless(None, old, new, users, typed)
    }

    fn decide_unless(
        unseen: Option<&Problem>,
        old: u64,
        new: u64,
        users: &[User],
        typed: Option<&str>,
    ) -> Result<Way, (Code, String)> {
        let facts = Facts {
            path: Path::new("/d"),
            owner: "web01",
            old: Bytes(old),
            new: Bytes(new),
            users,
            unseen,
            typed,
        };
        facts
            .decide()
            .map_err(|problem| (problem.code, problem.to_string()))
    }

    #[test]
    fn nothing_is_lost_without_the_typed_name_of_a_vm_that_is_off() {
        let disk = || Role::Disk("vda".to_owned());
        let both = [Power::Off, Power::Running].map(|power| user(disk(), power));
        let all = [&[][..], &both[..1], &both[1..], &both[..]];
        for users in all {
            for typed in [None, Some(""), Some("db01"), Some("web01")] {
                let runs = users.iter().any(|user| user.power == Power::Running);
                let shrunk = decide(2048, 1024, users, typed);
                assert_eq!(
                    shrunk == Ok(Way::Offline),
                    !runs && typed == Some("web01"),
                    "{shrunk:?}"
                );
                assert_eq!(decide(1024, 1024, users, typed), Ok(Way::Nothing));
            }
        }
        let (code, said) = decide(2048, 1024, &[], None).unwrap_err();
        assert_eq!(code, Code::WouldLoseKey);
        assert!(said.contains("volume resize --shrink /d 1024"), "{said}");
    }

    #[test]
    fn what_nobody_can_see_loses_nothing() {
        let unseen = Problem::failed("web02: disk vda: Permission denied").next("mount it");
        let (code, said) = decide_unless(Some(&unseen), 2048, 1024, &[], Some("web01")).unwrap_err();
        assert_eq!(code, Code::Failed);
        assert!(
            said.contains("web02: disk vda")
                && said.contains("mount it, then virtseal volume resize --shrink"),
            "{said}"
        );
        assert_eq!(
            decide_unless(Some(&unseen), 1024, 2048, &[], None),
            Ok(Way::Offline)
        );
    }

    #[test]
    fn a_disk_grows_where_qemu_has_it() {
        let disk = || Role::Disk("vda".to_owned());
        let below = || Role::Below("vdb".to_owned());
        let online = Way::Online {
            vm: VmId(uuid::Uuid::nil()),
            target: "vda".to_owned(),
        };
        assert_eq!(decide(1024, 2048, &[], None), Ok(Way::Offline));
        assert_eq!(
            decide(1024, 2048, &[user(disk(), Power::Off)], None),
            Ok(Way::Offline)
        );
        assert_eq!(
            decide(1024, 2048, &[user(disk(), Power::Running)], None),
            Ok(online)
        );
        for users in [
            vec![user(disk(), Power::Running), user(disk(), Power::Running)],
            vec![user(Role::Alien("vda".to_owned()), Power::Running)],
            vec![user(disk(), Power::Saved)],
            vec![user(below(), Power::Off)],
            vec![user(below(), Power::Running)],
        ] {
            let (code, said) = decide(1024, 2048, &users, Some("web01")).unwrap_err();
            assert!(code == Code::Busy && said.contains("Next: "), "{said}");
        }
    }
}
