//! What an admin says of the formats of a VM's disks, where their first bytes say something else.

use std::collections::BTreeMap;

use crate::api::DiskFormat;
use crate::domain::{DeclaredFormat, Disk, Domain};
use crate::model::problem::Problem;
use crate::object::disk::Declaration;

/// The declarations that an admin has confirmed: `--from-format vda=raw`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConfirmedFormats(BTreeMap<String, DeclaredFormat>);

impl ConfirmedFormats {
    pub(crate) fn of(given: &[DiskFormat]) -> Result<Self, Problem> {
        let mut formats = BTreeMap::new();
        for DiskFormat { target, format } in given {
            if formats.insert(target.clone(), *format).is_some() {
                return Err(Problem::usage(format!(
                    "--from-format names disk {target:?} for the second time"
                ))
                .next("name it once"));
            }
        }
        Ok(Self(formats))
    }

    /// A misspelt target confirms nothing.
    pub(crate) fn refuse_unknown(&self, domain: &Domain) -> Result<(), Problem> {
        let Some(unknown) = self.0.keys().find(|target| domain.disk(target).is_none()) else {
            return Ok(());
        };
        let targets: Vec<_> = domain.disks.iter().map(|disk| disk.target.as_str()).collect();
        Err(
            Problem::usage(format!("--from-format: there is no disk {unknown:?}"))
                .next(format!("name one of {}", targets.join(", "))),
        )
    }

    /// What the disk is taken to be, whose XML declares it `stated`.
    pub(crate) fn declaration(&self, disk: &Disk, stated: DeclaredFormat) -> Result<Declaration, Problem> {
        match self.0.get(&disk.target) {
            None => Ok(Declaration::Stated(stated)),
            Some(confirmed) if *confirmed == stated => Ok(Declaration::Confirmed(stated)),
            Some(other) => Err(Problem::usage(format!(
                "the XML declares it {stated}, and --from-format says {other}"
            ))
            .next("change <driver type=…> in the XML first, if that is wrong")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::problem::Code;

    #[test]
    fn a_disk_is_confirmed_once() {
        let disk = |target: &str, format| DiskFormat {
            target: target.to_owned(),
            format,
        };
        let (raw, qcow2) = (DeclaredFormat::Raw, DeclaredFormat::Qcow2);
        let confirmed = ConfirmedFormats::of(&[disk("vda", raw), disk("vdb", qcow2)]).unwrap();
        assert_eq!((confirmed.0["vda"], confirmed.0["vdb"]), (raw, qcow2));
        for second in [raw, qcow2] {
            let refused = ConfirmedFormats::of(&[disk("vda", raw), disk("vda", second)]).unwrap_err();
            assert_eq!(refused.code, Code::Usage);
        }
    }
}
