//! Whether a sealed VM may start, or be sealed, with the side doors that its XML has: the host's policy decides.

mod found;

use std::io;
use std::path::Path;

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};

use crate::config::Config;
use crate::domain::{Domain, Permission, Policy, PolicyKey, Refusal, Rule, SideDoor};
use crate::host::libvirt::qemu_conf::QemuConf;
use crate::model::advice::Advice;
use crate::model::envelope::ObjectKind;
use crate::model::problem::{Problem, chain};
use crate::terminal::{visible, word};

pub(crate) use found::{findings, plain_disks, plain_layers, sealed_as_raw, warnings, while_it_runs};

/// Not in libc for every target.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Where memory that is a file would lie.
#[derive(Clone, Debug, PartialEq, Eq)]
enum MemoryFiles {
    /// On tmpfs, or in huge pages.
    InMemory,
    /// On a disk, or nobody knows where.
    OnDisk(String),
}

impl MemoryFiles {
    /// Looks at this host, if the domain needs to know.
    fn of_this_host() -> Self {
        match QemuConf::read() {
            Ok(conf) => Self::at(&conf.memory_dir()),
            Err(error) => Self::OnDisk(format!(
                "in a place that qemu.conf does not name ({})",
                chain(&error)
            )),
        }
    }

    /// libvirt makes the directory when it is first needed.
    fn at(directory: &Path) -> Self {
        let file_system = directory.ancestors().find_map(|above| statfs(above).ok());
        let kind = file_system.map(|found| found.filesystem_type());
        if kind.is_some_and(|kind| [TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS_MAGIC].contains(&kind)) {
            Self::InMemory
        } else {
            Self::OnDisk(format!("in {}, which is on a disk", directory.display()))
        }
    }
}

/// The doors that are really open, each with its words and its rule.
fn judge(domain: &Domain, policy: Policy) -> Vec<(String, &SideDoor, Rule)> {
    judge_with(domain, policy, MemoryFiles::of_this_host)
}

fn judge_with(
    domain: &Domain,
    policy: Policy,
    memory: impl Fn() -> MemoryFiles,
) -> Vec<(String, &SideDoor, Rule)> {
    let mut found = Vec::new();
    for door in &domain.side_doors {
        let words = match (door, door.rule()) {
            (SideDoor::FileMemory, _) => match memory() {
                MemoryFiles::InMemory => continue,
                MemoryFiles::OnDisk(place) => format!("{door} {place}"),
            },
            _ => visible(&door.to_string()).into_owned(),
        };
        let rule = match door.rule() {
            // Allowed, and still to be known.
            Rule::RefusedUnless(key) if policy.allows(key) => Rule::Warned,
            rule => rule,
        };
        found.push((words, door, rule));
    }
    found
}

/// Refuses the first one that the policy does not allow.
///
/// # Errors
/// With what to change in the XML, and the key that would allow it.
pub(crate) fn refuse(domain: &Domain, policy: Policy) -> Result<(), Problem> {
    refuse_with(domain, policy, MemoryFiles::of_this_host)?;
    refuse_without_tls(policy, QemuConf::read)
}

/// No hook runs where a VM leaves, and none is told whether it comes by TLS. So a VM whose policy demands that runs only on hosts
/// whose libvirt lets none leave without.
fn refuse_without_tls(policy: Policy, conf: impl Fn() -> io::Result<QemuConf>) -> Result<(), Problem> {
    if policy.migration_tls == Permission::No {
        return Ok(());
    }
    let why = match conf() {
        Ok(conf) if conf.forces_migration_tls() => return Ok(()),
        Ok(_) => String::new(),
        Err(error) => format!(
            ", as far as is known: qemu.conf can't be read ({})",
            chain(&error)
        ),
    };
    Err(Problem::failed(format!(
        "its policy demands TLS of a migration, and libvirt here would let it leave without{why}"
    ))
    .next(
        Advice::from(format!("set migrate_tls_force = 1 in {}", QemuConf::PATH))
            .then(Advice::RestartLibvirtd)
            .or_else(format!(
                "`policy: {{migration_tls: no}}` in {}",
                Config::DEFAULT_PATH
            ))
            .then(Advice::ReloadDaemon),
    ))
}

/// All that [`refuse`] would refuse for, one after the other.
pub(crate) fn refusals(domain: &Domain, policy: Policy) -> Vec<Problem> {
    let mut refused = refusals_with(domain, policy, MemoryFiles::of_this_host);
    refused.extend(refuse_without_tls(policy, QemuConf::read).err());
    refused
}

fn refuse_with(domain: &Domain, policy: Policy, memory: impl Fn() -> MemoryFiles) -> Result<(), Problem> {
    let first = refusals_with(domain, policy, memory).into_iter().next();
    first.map_or(Ok(()), Err)
}

fn refusals_with(domain: &Domain, policy: Policy, memory: impl Fn() -> MemoryFiles) -> Vec<Problem> {
    let judged = judge_with(domain, policy, memory).into_iter();
    let refused = judged.filter_map(|(words, door, rule)| match rule {
        Rule::RefusedUnless(key) => {
            Some(Problem::failed(words).next(door.way_out(&domain.name).or_else(allow(key.as_str()))))
        }
        Rule::Warned => None,
    });
    refused.collect()
}

fn allow(key: &str) -> Advice {
    let settings = Config::DEFAULT_PATH;
    Advice::from(format!("allow it with `policy: {{{key}: yes}}` in {settings}")).then(Advice::ReloadDaemon)
}

/// Why a VM stays off of which something is not sealed, with what leads out of that.
pub(crate) fn not_sealed(refusal: &Refusal) -> Problem {
    let next = match refusal {
        Refusal::NotSealed { vm } => Advice::SealVm(vm.clone()),
        // A snapshot of the disk alone puts a plain file on top of the sealed one, and that can't be sealed.
        Refusal::Overlaid { vm, .. } => free_of_overlays(vm),
        Refusal::Plain { vm, kind, path, .. } => {
            let seal = Advice::SealVm(vm.clone()).note("which seals it, or says what else leads out");
            // The XML may not name what is below.
            let seal = match path {
                Some(path) => seal.or_else(Advice::CommitSnapshot(vm.clone()).note(format!(
                    "if {} is the overlay of a snapshot",
                    word(path.display())
                ))),
                None => seal,
            };
            match kind {
                ObjectKind::Disk => seal.or_else(allow(PolicyKey::MixedDisks.as_str())),
                _ => seal,
            }
        }
        Refusal::Unsupported { vm, .. } => Advice::EditXml(vm.clone()),
    };
    Problem::failed(refusal.to_string()).next(next)
}

/// The way out that loses nothing, and the other one.
pub(crate) fn free_of_overlays(vm: &str) -> Advice {
    let (commit, delete) = (
        Advice::CommitSnapshot(vm.to_owned()),
        Advice::DeleteSnapshot {
            vm: vm.to_owned(),
            typed: false,
        },
    );
    commit
        .note("which merges it into the sealed disk")
        .or_else(delete.note("which drops what was written since the snapshot"))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn domain(inside: &str) -> Domain {
        let xml = format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>my vm</name><uuid>{}</uuid>\
             <os><loader type='pflash'>/c</loader><nvram>/v</nvram></os>{inside}</domain>",
            uuid::Uuid::new_v4()
        );
        Domain::parse(&xml).unwrap()
    }

    const FILE_MEMORY: &str = "<memoryBacking><source type='file'/></memoryBacking>";

    fn on_disk() -> MemoryFiles {
        MemoryFiles::OnDisk("in /ram, which is on a disk".into())
    }

    #[test]
    fn file_memory_is_refused_on_a_disk_alone_and_its_policy_allows_it() {
        let vm = domain(FILE_MEMORY);
        let refused = refuse_with(&vm, Policy::default(), on_disk)
            .unwrap_err()
            .to_string();
        for part in [
            "its memory is a file in /ram",
            "virsh edit 'my vm'",
            "memfd",
            "memory_on_disk: yes",
        ] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(refuse_with(&vm, Policy::default(), || MemoryFiles::InMemory).is_ok());
        let allowed = Policy {
            memory_on_disk: Permission::Yes,
            ..Policy::default()
        };
        assert!(refuse_with(&vm, allowed, on_disk).is_ok());
        let other = Policy {
            mixed_disks: Permission::Yes,
            ..Policy::default()
        };
        assert!(refuse_with(&vm, other, on_disk).is_err());
        assert_eq!(judge_with(&vm, allowed, on_disk)[0].2, Rule::Warned);
    }

    #[test]
    fn a_plain_disk_may_be_allowed_and_a_plain_store_may_not() {
        let said = |kind, label: &str, path: Option<&str>| {
            let vm = "my vm".to_owned();
            let (label, path) = (label.to_owned(), path.map(Into::into));
            not_sealed(&Refusal::Plain {
                vm,
                kind,
                label,
                path,
            })
            .to_string()
        };
        assert_eq!(
            said(ObjectKind::Disk, "disk vdx", Some("/a")),
            "disk vdx (/a) of sealed VM my vm is not encrypted. Next: virtseal vm seal 'my vm', which seals it, or says what else \
             leads out; or virtseal vm snapshot commit 'my vm', if /a is the overlay of a snapshot; or allow it with \
             `policy: {mixed_disks: yes}` in /etc/virtseal/virtseald.yaml, then systemctl reload virtseald"
        );
        assert!(said(ObjectKind::Disk, "disk vdx", None).contains("mixed_disks: yes"));
        assert_eq!(
            said(ObjectKind::Nvram, "nvram", None),
            "nvram of sealed VM my vm is not encrypted. Next: virtseal vm seal 'my vm', which seals it, or says what else leads out"
        );
    }

    #[test]
    fn tls_is_demanded_where_the_policy_says_so_alone() {
        let demanded = Policy {
            migration_tls: Permission::Yes,
            ..Policy::default()
        };
        let without = || Ok(QemuConf::default());
        assert!(refuse_without_tls(Policy::default(), || unreachable!("nobody asks")).is_ok());
        let refused = refuse_without_tls(demanded, without).unwrap_err().to_string();
        for part in ["migrate_tls_force = 1", "qemu.conf", "migration_tls: no"] {
            assert!(refused.contains(part), "{refused}");
        }
        let unreadable = || Err(io::Error::other("it can't be parsed"));
        let refused = refuse_without_tls(demanded, unreadable).unwrap_err().to_string();
        assert!(refused.contains("can't be parsed"), "{refused}");
    }

    #[test]
    fn a_disk_by_argument_is_refused_and_a_shared_directory_is_not() {
        let drive =
            "<qemu:commandline><qemu:arg value='-drive'/><qemu:arg value='file=/x'/></qemu:commandline>";
        let refused = refuse(&domain(drive), Policy::default()).unwrap_err().to_string();
        assert!(
            refused.contains("-drive file=/x") && refused.contains("mixed_disks"),
            "{refused}"
        );
        let shared = domain("<devices><filesystem><source dir='/srv'/></filesystem></devices>");
        assert!(refuse(&shared, Policy::default()).is_ok());
        let warned = warnings(&shared, Policy::default());
        assert!(
            matches!(&warned[..], [one] if one.what.contains("/srv") && one.advice.is_some()),
            "{warned:?}"
        );
    }

    #[test]
    fn the_file_system_decides_also_before_the_directory_is_made() {
        assert_eq!(
            MemoryFiles::at(Path::new("/dev/shm/not/yet")),
            MemoryFiles::InMemory
        );
        let on_disk = MemoryFiles::at(Path::new("/proc/not/yet"));
        assert!(matches!(on_disk, MemoryFiles::OnDisk(_)), "{on_disk:?}");
    }
}
