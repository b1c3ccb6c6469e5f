//! Whether a sealed VM may start, or be sealed, with the side doors that its XML has: the host's policy decides.

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};

use crate::config::Config;
use crate::domain::jobs::JobTarget;
use crate::domain::{
    Domain, Object, ObjectState, Permission, Policy, PolicyKey, Refusal, Rule, SideDoor, objects,
};
use crate::host::libvirt::qemu_conf::QemuConf;
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::advice::Advice;
use crate::model::envelope::ObjectKind;
use crate::model::finding::{Finding, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, VolumeError};
use crate::terminal::visible;

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
                "in a place that qemu.conf does not tell ({})",
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

/// The doors that are really open, each with its rule; `Err` has what is refused.
fn judge(
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
pub fn refuse(domain: &Domain, policy: Policy) -> Result<(), Problem> {
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
            ", as far as can be told: qemu.conf can't be read ({})",
            chain(&error)
        ),
    };
    Err(Problem::new(
        Code::Failed,
        format!("its policy demands TLS of a migration, and libvirt here would let it leave without{why}"),
    )
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

fn refuse_with(domain: &Domain, policy: Policy, memory: impl Fn() -> MemoryFiles) -> Result<(), Problem> {
    let judged = judge(domain, policy, memory);
    let refused = judged.iter().find_map(|(words, door, rule)| match rule {
        Rule::RefusedUnless(key) => Some((words, door, key)),
        Rule::Warned => None,
    });
    let Some((words, door, key)) = refused else {
        return Ok(());
    };
    Err(Problem::new(Code::Failed, words.clone()).next(
        Advice::EditXml(domain.name.clone())
            .within(door.way_out())
            .or_else(allow(*key)),
    ))
}

fn allow(key: PolicyKey) -> Advice {
    Advice::from(format!(
        "allow it with `policy: {{{}: yes}}` in {}",
        key.as_str(),
        Config::DEFAULT_PATH
    ))
    .then(Advice::ReloadDaemon)
}

/// Why a VM stays off of which something is not sealed, with what leads out of that.
#[must_use]
pub fn not_sealed(refusal: &Refusal) -> Problem {
    let next = match refusal {
        Refusal::NotSealed { vm } => Advice::SealVm(vm.clone()),
        Refusal::Plain { vm, kind, path, .. } => {
            // A snapshot of the disk alone puts a plain file on top of the sealed one, and that can't be sealed.
            let seal = Advice::ShowVm(vm.clone()).then("detach or seal it");
            let seal = match path {
                Some(path) => Advice::ListSnapshots(vm.clone())
                    .within(format!(
                        "commit or delete the snapshot if {} is its overlay",
                        path.display()
                    ))
                    .or_else(seal),
                None => seal,
            };
            match kind {
                ObjectKind::Disk => seal.or_else(allow(PolicyKey::MixedDisks)),
                _ => seal,
            }
        }
        Refusal::Unsupported { vm, .. } => Advice::EditXml(vm.clone()),
    };
    Problem::new(Code::Failed, refusal.to_string()).next(next)
}

/// What is allowed and still lands in plaintext somewhere.
#[must_use]
pub fn warnings(domain: &Domain, policy: Policy) -> Vec<String> {
    let judged = judge(domain, policy, MemoryFiles::of_this_host).into_iter();
    judged
        .filter(|(_, _, rule)| *rule == Rule::Warned)
        .map(|(words, door, _)| format!("{}: {words} ({})", visible(&domain.name), door.way_out()))
        .collect()
}

/// [`warnings`], and why the next start of a sealed VM is refused.
#[must_use]
pub fn findings(domain: &Domain, policy: Policy) -> Vec<Finding> {
    let subject = || Subject::Vm(domain.name.clone());
    let refused = refuse(domain, policy).err();
    let refused = refused.map(|problem| problem.of(format!("{} stays off at its next start", domain.name)));
    let warned = warnings(domain, policy).into_iter();
    let warned = warned.map(|words| Finding::warning(subject(), words));
    let refused = refused.map(|problem| Finding::of(subject(), problem));
    refused.into_iter().chain(warned).collect()
}

/// What a running sealed VM has that a start would have refused, or its next start would not have: copies and a backup in the
/// making, and what was attached. No hook runs for these.
#[must_use]
pub fn while_it_runs(
    live: &Domain,
    next: Option<&Domain>,
    backup: &[JobTarget],
    policy: Policy,
) -> Vec<String> {
    let known = next.map(|next| warnings(next, policy)).unwrap_or_default();
    let mut found = warnings(live, policy);
    found.retain(|warning| !known.contains(warning));
    let backup = backup.iter().filter(|target| !target.sealed);
    found.extend(backup.map(|target| {
        format!(
            "{}: {} ({})",
            visible(&live.name),
            visible(&target.to_string()),
            target.way_out()
        )
    }));
    let is_allowed = |disk: &Object| {
        policy.mixed_disks == Permission::Yes && next.is_some_and(|next| objects(next).contains(disk))
    };
    let plain = plain_disks(live).into_iter().filter(|disk| !is_allowed(disk));
    found.extend(plain.map(|disk| {
        format!(
            "{}: {} is in use in plaintext, whatever its image is: {}",
            visible(&live.name),
            visible(&disk.label),
            visible(&disk.path.unwrap_or_default().display().to_string())
        )
    }));
    found
}

/// The disks that the guest may write to, and that libvirt opens without a key.
#[must_use]
pub fn plain_disks(domain: &Domain) -> Vec<Object> {
    let mut disks = objects(domain);
    disks.retain(|object| object.kind == ObjectKind::Disk && object.state == ObjectState::Plain);
    disks
}

/// That a disk is a sealed image, opened as if it were raw.
#[must_use]
pub fn sealed_as_raw(vm: &str, disk: &str, path: &Path, owner: &str) -> String {
    format!(
        "{}: {} is the sealed image {} of {}, opened as raw: the guest sees ciphertext, and what it writes there destroys the image \
         ({})",
        visible(vm),
        visible(disk),
        visible(&path.display().to_string()),
        visible(owner),
        Advice::from("detach it").then(Advice::ShowVolume(path.to_owned()))
    )
}

/// Which plain images the VM's disks are based on.
#[must_use]
pub fn plain_layers(
    domain: &Domain,
    policy: Policy,
    permit: impl Fn(&Path) -> Result<PermittedPath, PathError>,
) -> Vec<String> {
    let mut found = Vec::new();
    if policy.plain_backing == Permission::Yes {
        return found;
    }
    for disk in domain.disks.iter().filter(|disk| !disk.readonly) {
        let Some(Ok(top)) = disk.source.path().map(&permit) else {
            continue;
        };
        let (plain, end) = plain_backing(&top, &permit);
        if let Some(VolumeError::Place(error)) = end {
            found.push(format!(
                "{}: disk {} is based on an image that virtseal does not look at: {}",
                visible(&domain.name),
                visible(&disk.target),
                visible(&chain(&error))
            ));
        }
        found.extend(plain.iter().map(|layer| {
            format!(
                "{}: disk {} is based on the plain image {}: whatever is in that is plaintext (`policy: {{plain_backing: yes}}` \
                 in {} ends this warning)",
                visible(&domain.name),
                visible(&disk.target),
                visible(&layer.display().to_string()),
                Config::DEFAULT_PATH
            )
        }));
    }
    found
}

/// The files below `image`, a sealed disk, that hold their data in plaintext. Headers alone are read.
fn plain_backing(
    image: &PermittedPath,
    permit: impl Fn(&Path) -> Result<PermittedPath, PathError>,
) -> (Vec<PathBuf>, Option<VolumeError>) {
    let (layers, end) = disk::known_layers(image, |path| Ok(permit(path)?));
    let below = layers.into_iter().skip(1).filter(|layer| !layer.encrypted);
    (below.map(|layer| layer.path).collect(), end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::jobs::Role;

    fn domain(inside: &str) -> Domain {
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
        assert_eq!(judge(&vm, allowed, on_disk)[0].2, Rule::Warned);
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
            "disk vdx (/a) of sealed VM my vm is not encrypted. Next: virsh snapshot-list 'my vm': commit or delete the \
             snapshot if /a is its overlay; or virtseal vm status 'my vm', then detach or seal it; or allow it with \
             `policy: {mixed_disks: yes}` in /etc/virtseal/virtseald.yaml, then systemctl reload virtseald"
        );
        assert!(said(ObjectKind::Disk, "disk vdx", None).contains("mixed_disks: yes"));
        assert_eq!(
            said(ObjectKind::Nvram, "nvram", None),
            "nvram of sealed VM my vm is not encrypted. Next: virtseal vm status 'my vm', then detach or seal it"
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
        assert!(matches!(&warned[..], [one] if one.contains("/srv")), "{warned:?}");
    }

    #[test]
    fn what_was_attached_or_is_copied_while_it_runs_is_told() {
        let disk = |inside: &str| {
            format!(
                "<devices><disk type='file'><source file='/d'/><target dev='vdb'/>{inside}</disk></devices>"
            )
        };
        let seen = |live: &Domain, next: Option<&Domain>, policy| while_it_runs(live, next, &[], policy);
        let (next, attached) = (domain(""), domain(&disk("")));
        // Into its definition too, or of a VM that has none: a start would have refused it.
        for next in [Some(&next), Some(&attached), None] {
            let told = seen(&attached, next, Policy::default());
            assert!(
                matches!(&told[..], [one] if one.contains("disk vdb") && one.contains("/d")),
                "{told:?}"
            );
        }
        let mixed = Policy {
            mixed_disks: Permission::Yes,
            ..Policy::default()
        };
        assert!(seen(&attached, Some(&attached), mixed).is_empty());
        assert_eq!(seen(&attached, Some(&next), mixed).len(), 1);
        let copied = domain(&disk(
            "<mirror type='file' job='copy'><source file='/copy'/></mirror>",
        ));
        let told = seen(&copied, Some(&attached), mixed);
        assert!(matches!(&told[..], [one] if one.contains("/copy")), "{told:?}");
        assert!(seen(&next, Some(&next), Policy::default()).is_empty());
    }

    #[test]
    fn a_backup_is_told_where_it_is_plain() {
        let vm = domain("");
        let target = |sealed| JobTarget {
            disk: "vda".into(),
            role: Role::Scratch,
            to: "/x\u{1b}[2J".into(),
            sealed,
        };
        let told = while_it_runs(&vm, Some(&vm), &[target(false), target(true)], Policy::default());
        assert!(
            matches!(&told[..], [one] if one.contains("/x") && one.contains("scratch") && !one.contains('\u{1b}')),
            "{told:?}"
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
