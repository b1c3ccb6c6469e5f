//! Ways on which a sealed VM's data or memory would reach the host's disks beside its sealed objects.
//!
//! Each is read from the XML, and [`SideDoor::rule`] says what becomes of it: some refuse a start unless the host's policy
//! allows them, the others are only warned of. What libvirt writes without asking a hook (saves, snapshots, backups) has no
//! place in this XML.

mod read;

use std::fmt;
use std::path::PathBuf;

use super::PolicyKey;
use super::jobs::JobTarget;
use crate::model::advice::Advice;

pub(super) use read::read;

/// One way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SideDoor {
    /// The guest's memory is a file, in the directory that qemu.conf names.
    FileMemory,
    /// `<memory model=…>`: an NVDIMM or virtio-pmem device, which keeps what the guest writes.
    PersistentMemory {
        /// `nvdimm`, `virtio-pmem`.
        model: String,
        /// Its file or device.
        path: Option<PathBuf>,
    },
    /// `<qemu:commandline>` adds a disk.
    StorageArgument(String),
    /// `<qemu:commandline>` adds memory that is a file.
    MemoryArgument(String),
    /// Any other argument in `<qemu:commandline>`.
    Argument(String),
    /// `<filesystem>` that the guest may write to: a directory of the host.
    Directory {
        /// `virtiofs`, or what libvirt calls 9p: `path`.
        driver: String,
        /// The directory, if it is one.
        path: String,
    },
    /// `<pstore>`: the guest's kernel writes its last log to a file.
    Pstore(String),
    /// A serial port, console or channel whose output goes to a file.
    Output {
        /// `serial`, `console`, …
        device: String,
        path: String,
    },
    /// While it runs, a disk is being copied to a plain image.
    Mirror(JobTarget),
    /// The guest's memory is dumped to a file when it crashes or its watchdog fires.
    Dump(&'static str),
    /// libvirt would make an internal snapshot of the running VM, which kills a QEMU that has a sealed qcow2 disk.
    InternalSnapshots(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Refused, unless the policy allows it.
    RefusedUnless(PolicyKey),
    /// Said in the plan and in the status.
    Warned,
}

impl SideDoor {
    pub(crate) fn rule(&self) -> Rule {
        match self {
            Self::FileMemory | Self::PersistentMemory { .. } | Self::MemoryArgument(_) => {
                Rule::RefusedUnless(PolicyKey::MemoryOnDisk)
            }
            Self::StorageArgument(_) => Rule::RefusedUnless(PolicyKey::MixedDisks),
            Self::Argument(_)
            | Self::Directory { .. }
            | Self::Pstore(_)
            | Self::Output { .. }
            | Self::Mirror(_)
            | Self::Dump(_)
            | Self::InternalSnapshots(_) => Rule::Warned,
        }
    }

    /// What to change in the XML of `vm`, or what to end.
    pub(crate) fn way_out(&self, vm: &str) -> Advice {
        let change = match self {
            Self::FileMemory => "<memoryBacking> with <source type='memfd'/>",
            Self::PersistentMemory { .. } => "remove that <memory>",
            Self::StorageArgument(_) | Self::MemoryArgument(_) | Self::Argument(_) => {
                "take it out of <qemu:commandline>; a <disk> can be sealed"
            }
            Self::Directory { .. } => "remove that <filesystem>, or add <readonly/>",
            Self::Pstore(_) => "remove <pstore>",
            Self::Output { .. } => "type='pty' without <log>",
            Self::Mirror(copy) => return copy.way_out(vm),
            Self::Dump(_) => "have it destroyed or restarted instead, in <on_crash> or <watchdog>",
            Self::InternalSnapshots(_) => "have UEFI variables in a raw <nvram>",
        };
        Advice::EditXml(vm.to_owned()).within(change)
    }
}

impl fmt::Display for SideDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FileMemory => f.write_str("its memory is a file"),
            Self::PersistentMemory { model, path } => {
                write!(f, "its {model} memory keeps what the guest writes in plaintext")?;
                path.as_ref()
                    .map_or(Ok(()), |path| write!(f, ", in {}", path.display()))
            }
            Self::StorageArgument(argument) => {
                write!(f, "<qemu:commandline> adds storage that nobody seals: {argument}")
            }
            Self::MemoryArgument(argument) => {
                write!(f, "<qemu:commandline> makes its memory a file: {argument}")
            }
            Self::Argument(argument) => {
                write!(
                    f,
                    "<qemu:commandline> has {argument}, which virtseal does not check"
                )
            }
            Self::Directory { driver, path } => write!(
                f,
                "what the guest writes to the shared directory {path} ({driver}) is plaintext on the host"
            ),
            Self::Pstore(path) => {
                write!(
                    f,
                    "what the guest's kernel writes to its pstore is plaintext in {path}"
                )
            }
            Self::Output { device, path } => {
                write!(
                    f,
                    "the output of a {device} port is written to {path} in plaintext"
                )
            }
            Self::Mirror(copy) => write!(f, "{copy}"),
            Self::Dump(when) => write!(f, "its memory is dumped to a file in plaintext {when}"),
            Self::InternalSnapshots(why) => write!(
                f,
                "{why}, so that libvirt does not refuse an internal snapshot while it runs (the default of snapshot-create-as \
                 and of virt-manager), and that kills a QEMU with a sealed qcow2 disk: use --disk-only and an encrypted overlay"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Domain;
    use super::super::arguments::QEMU_NAMESPACE;
    use super::*;

    fn doors(inside: &str) -> Vec<SideDoor> {
        let xml = format!(
            "<domain type='kvm' xmlns:qemu='{QEMU_NAMESPACE}'><name>a</name><uuid>{}</uuid>\
             <os><loader type='pflash'>/c</loader><nvram>/v</nvram></os>{inside}</domain>",
            uuid::Uuid::new_v4()
        );
        Domain::parse(&xml).unwrap().side_doors
    }

    #[test]
    fn memory_is_a_file_wherever_libvirt_makes_it_one() {
        for inside in [
            "<memoryBacking><source type='file'/></memoryBacking>",
            "<memoryBacking><access mode='shared'/></memoryBacking>",
            "<memoryBacking><access mode='private'/></memoryBacking>",
            "<memoryBacking><source type='anonymous'/><access mode='shared'/></memoryBacking>",
            "<cpu><numa><cell id='0' memory='1' memAccess='shared'/></numa></cpu>",
            "<memoryBacking><hugepages><page size='2' unit='M' nodeset='1'/></hugepages><access mode='shared'/></memoryBacking>",
            "<memoryBacking><source type='file'/></memoryBacking><devices/>",
        ] {
            assert_eq!(doors(inside), [SideDoor::FileMemory], "{inside}");
        }
        for inside in [
            "",
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
            "<memoryBacking><hugepages/><access mode='shared'/></memoryBacking>",
            "<memoryBacking><source type='anonymous'/><locked/></memoryBacking>",
        ] {
            assert_eq!(doors(inside), [], "{inside}");
        }
    }

    #[test]
    fn persistent_memory_is_refused() {
        for model in ["nvdimm", "virtio-pmem"] {
            let found = doors(&format!(
                "<devices><memory model='{model}'><source><path>/img/nv</path></source></memory></devices>"
            ));
            assert_eq!(found[0].rule(), Rule::RefusedUnless(PolicyKey::MemoryOnDisk));
            assert!(found[0].to_string().contains("/img/nv"), "{found:?}");
        }
        assert_eq!(
            doors("<devices><memory model='dimm'><target/></memory></devices>"),
            []
        );
    }

    #[test]
    fn arguments_that_add_storage_or_memory_files_are_refused() {
        let line = |arguments: &[&str]| {
            let arguments: String = arguments
                .iter()
                .map(|value| format!("<qemu:arg value='{value}'/>"))
                .collect();
            doors(&format!("<qemu:commandline>{arguments}</qemu:commandline>"))
        };
        for arguments in [
            &["-drive", "file=/x,if=none"][..],
            &["--drive", "file=/x"],
            &["-blockdev", "{\"driver\":\"raw\"}"],
            &["-hda", "/x"],
            &["/x.img"],
            &["-snapshot"],
            &["-virtfs", "local,path=/x"],
            &["-readconfig", "/x"],
            &["-device", "virtio-blk-pci,drive=d"],
            &["-device", "nvme,serial=1,drive=d"],
            &["-device", "{\"driver\":\"virtio-blk-pci\",\"drive\":\"d\"}"],
            &["-device", "driver=usb-storage,drive=d"],
        ] {
            let found = line(arguments);
            let storage = |door: &SideDoor| door.rule() == Rule::RefusedUnless(PolicyKey::MixedDisks);
            assert!(found.iter().any(storage), "{arguments:?}: {found:?}");
        }
        for arguments in [
            &["-mem-path", "/x"][..],
            &["-object", "memory-backend-file,id=m,mem-path=/x"],
            &["-object", "{\"qom-type\":\"memory-backend-file\"}"],
            &["-device", "nvdimm,memdev=m"],
            &["-device", "virtio-pmem-pci,memdev=m"],
        ] {
            let found = line(arguments);
            let memory = |door: &SideDoor| door.rule() == Rule::RefusedUnless(PolicyKey::MemoryOnDisk);
            assert!(found.iter().any(memory), "{arguments:?}: {found:?}");
        }
        for arguments in [
            &["-cpu", "host"][..],
            &["-device", "virtio-scsi-pci"],
            &["-device", "vfio-pci,host=01:00.0"],
            &["-D", "/x"],
        ] {
            assert_eq!(line(arguments), [SideDoor::Argument(arguments.join(" "))]);
        }
    }

    #[test]
    fn what_lands_in_files_is_warned_of() {
        for (inside, named) in [
            (
                "<filesystem><source dir='/srv'/><target dir='t'/></filesystem>",
                "/srv",
            ),
            (
                "<filesystem><driver type='virtiofs'/><source dir='/srv'/><target dir='t'/></filesystem>",
                "virtiofs",
            ),
            ("<pstore backend='acpi-erst'><path>/p</path></pstore>", "/p"),
            ("<serial type='file'><source path='/s'/></serial>", "/s"),
            ("<console type='pty'><log file='/l'/></console>", "/l"),
            ("<channel type='file'><source path='/c'/></channel>", "/c"),
            ("<watchdog model='i6300esb' action='dump'/>", "watchdog"),
        ] {
            let found = doors(&format!("<devices>{inside}</devices>"));
            assert_eq!(found.len(), 1, "{inside}: {found:?}");
            assert_eq!(found[0].rule(), Rule::Warned);
            assert!(found[0].to_string().contains(named), "{found:?}");
        }
        assert_eq!(
            doors("<on_crash>coredump-destroy</on_crash>"),
            [SideDoor::Dump("when the guest crashes")]
        );
        for harmless in [
            "<filesystem><source dir='/srv'/><readonly/></filesystem>",
            "<serial type='pty'/>",
        ] {
            assert_eq!(doors(&format!("<devices>{harmless}</devices>")), [], "{harmless}");
        }
    }

    #[test]
    fn a_copy_in_the_making_is_warned_of_unless_it_is_encrypted() {
        let disk = |inside: &str| {
            doors(&format!(
                "<devices><disk type='file'><source file='/d'/><target dev='vda'/>\
                 <mirror type='file' job='copy'><source file='/copy'>{inside}</source></mirror></disk></devices>"
            ))
        };
        let found = disk("");
        assert!(matches!(&found[..], [SideDoor::Mirror(_)]), "{found:?}");
        assert!(found[0].to_string().contains("vda is being copied to /copy"));
        assert_eq!(disk("<encryption format='luks' engine='qemu'/>"), []);
    }

    #[test]
    fn only_a_raw_variable_store_keeps_libvirt_from_internal_snapshots() {
        let with = |os: &str| {
            let xml = format!(
                "<domain type='kvm'><name>a</name><uuid>{}</uuid><os>{os}</os></domain>",
                uuid::Uuid::new_v4()
            );
            Domain::parse(&xml).unwrap().side_doors
        };
        for os in [
            "<type>hvm</type>",
            "<loader type='pflash' stateless='yes'>/c</loader>",
            "<loader type='pflash'>/c</loader><nvram format='qcow2'>/v</nvram>",
        ] {
            assert!(matches!(with(os)[..], [SideDoor::InternalSnapshots(_)]), "{os}");
        }
        assert_eq!(
            with("<loader type='pflash'>/c</loader><nvram format='raw'>/v</nvram>"),
            []
        );
    }
}
