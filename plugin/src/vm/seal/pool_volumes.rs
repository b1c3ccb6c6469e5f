//! Disks that the XML has as volumes of storage pools. libvirt finds their files only after it has called the hook, so a sealed VM has the
//! files in its XML: sealing writes them there. That libvirt names a file permits nothing: it is looked at as any path of the XML.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;

use crate::domain::edit::{self, DiskFile};
use crate::domain::{Domain, Source};
use crate::host::libvirt::{Background, DefinedDomain, LibvirtError};
use crate::model::act::{Act, StepCode, Verb};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};

/// A VM with the files of such disks in its XML.
#[derive(Debug)]
pub(crate) struct WithFiles {
    pub(crate) domain: DefinedDomain,
    /// What is to be done for that.
    pub(crate) acts: Vec<Act>,
    /// The disks whose files libvirt does not tell now, by their targets, and why.
    pub(crate) not_found: BTreeMap<String, Problem>,
}

pub(crate) fn with_files(libvirt: &Background, domain: DefinedDomain) -> Result<WithFiles, Problem> {
    let (mut files, mut acts, mut not_found) = (Vec::new(), Vec::new(), BTreeMap::new());
    // What can't be read is for the plan to say.
    let disks = Domain::parse(&domain.xml).map_or_else(|_| Vec::new(), |parsed| parsed.disks);
    for disk in disks {
        let Source::Volume { pool, volume } = &disk.source else {
            continue;
        };
        let path = match libvirt.volume_path(pool, volume) {
            Ok(path) => path,
            Err(error) => {
                not_found.insert(disk.target, not_told(&domain.name, pool, &error));
                continue;
            }
        };
        let what = format!(
            "{} for {} in place of volume {volume} of pool {pool}",
            path.display(),
            disk.target
        );
        let act = Verb::Name.act(StepCode::NameFile, what);
        acts.push(act.on(format!("disk {}", disk.target)).at(&path));
        files.push(DiskFile {
            target: disk.target,
            is_device: path
                .metadata()
                .is_ok_and(|found| found.file_type().is_block_device()),
            path,
        });
    }
    let xml = edit::name_files(&domain.xml, &files)
        .map_err(|error| Problem::failed(format!("{}: {}", domain.name, chain(&error))))?;
    Ok(WithFiles {
        domain: DefinedDomain { xml, ..domain },
        acts,
        not_found,
    })
}

fn not_told(vm: &str, pool: &str, error: &LibvirtError) -> Problem {
    let again = || Advice::SealVm(vm.to_owned());
    let start = Advice::StartPool(pool.to_owned()).then(again());
    let refresh = Advice::RefreshPool(pool.to_owned()).note("if it is active");
    let name = Advice::EditXml(vm.to_owned()).within("name the file itself, as a disk of type='file'");
    Problem::new(Code::NotFound, chain(error))
        .next(start.or_else(refresh.then(again())).or_else(name.then(again())))
}
