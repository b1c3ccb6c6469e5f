//! What an admin says of the formats of a VM's disks, where their first bytes say something else.

use std::collections::BTreeMap;

use crate::domain::{DeclaredFormat, Disk, Domain};
use crate::model::problem::Problem;
use crate::object::disk::Declaration;

/// The declarations that an admin has confirmed: `--from-format vda=raw`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConfirmedFormats(BTreeMap<String, DeclaredFormat>);

impl ConfirmedFormats {
    /// Reads `TARGET=FORMAT` each.
    pub(crate) fn parse<S: AsRef<str>>(given: &[S]) -> Result<Self, Problem> {
        let mut formats = BTreeMap::new();
        for given in given.iter().map(AsRef::as_ref) {
            let usage = |what: &str| {
                Problem::usage(format!("--from-format {given:?} {what}"))
                    .next("--from-format TARGET=raw or --from-format TARGET=qcow2, such as vda=raw")
            };
            let (target, format) = given.split_once('=').ok_or_else(|| usage("names no format"))?;
            let format = format
                .parse()
                .map_err(|_| usage("names no format that can be sealed"))?;
            if formats.insert(target.to_owned(), format).is_some() {
                return Err(usage("names a disk for the second time"));
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
    fn confirmations_are_read_whole_or_refused() {
        let parsed = ConfirmedFormats::parse(&["vda=raw", "vdb=qcow2"]).unwrap();
        assert_eq!(parsed.0["vda"], DeclaredFormat::Raw);
        assert_eq!(parsed.0["vdb"], DeclaredFormat::Qcow2);
        for bad in [
            &["vda"][..],
            &["vda=vmdk"],
            &["vda=Raw"],
            &["vda=raw", "vda=raw"],
            &["=="],
        ] {
            let refused = ConfirmedFormats::parse(bad).unwrap_err();
            assert_eq!(refused.code, Code::Usage, "{bad:?}");
            assert!(refused.advice.unwrap().to_string().contains("vda=raw"), "{bad:?}");
        }
    }
}
