//! What a disk to be sealed is: what the XML declares, and an admin where its first bytes say something else.
//!
//! A disk that passes for empty is replaced, so a guest's header must not make it one: see [`crate::object::disk::inspect_declared`].

use std::collections::BTreeMap;
use std::path::Path;

use super::Host;
use crate::domain::{DeclaredFormat, Disk, Domain};
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::ObjectKind;
use crate::model::problem::{Code, Problem};
use crate::object::disk::{self, Declaration, VolumeError, VolumeInfo};

/// The declarations that an admin has confirmed: `--from-format vda=raw`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfirmedFormats(BTreeMap<String, DeclaredFormat>);

impl ConfirmedFormats {
    /// Reads `TARGET=FORMAT` each.
    ///
    /// # Errors
    /// With the one that is no such thing, or names a disk twice.
    pub fn parse<S: AsRef<str>>(given: &[S]) -> Result<Self, Problem> {
        let mut formats = BTreeMap::new();
        for given in given.iter().map(AsRef::as_ref) {
            let usage = |what: &str| {
                Problem::new(Code::Usage, format!("--from-format {given:?} {what}"))
                    .next("--from-format TARGET=raw or --from-format TARGET=qcow2, such as vda=raw")
            };
            let (target, format) = given.split_once('=').ok_or_else(|| usage("names no format"))?;
            let format = format
                .parse()
                .map_err(|()| usage("names no format that can be sealed"))?;
            if formats.insert(target.to_owned(), format).is_some() {
                return Err(usage("names a disk for the second time"));
            }
        }
        Ok(Self(formats))
    }

    /// A misspelt target confirms nothing.
    pub(super) fn refuse_unknown(&self, domain: &Domain) -> Result<(), Problem> {
        let Some(unknown) = self.0.keys().find(|target| domain.disk(target).is_none()) else {
            return Ok(());
        };
        let targets: Vec<_> = domain.disks.iter().map(|disk| disk.target.as_str()).collect();
        Err(Problem::new(
            Code::Usage,
            format!("--from-format: there is no disk {unknown:?}"),
        )
        .next(format!("name one of {}", targets.join(", "))))
    }

    fn declaration(&self, disk: &Disk, stated: DeclaredFormat) -> Result<Declaration, Problem> {
        match self.0.get(&disk.target) {
            None => Ok(Declaration::Stated(stated)),
            Some(confirmed) if *confirmed == stated => Ok(Declaration::Confirmed(stated)),
            Some(other) => Err(Problem::new(
                Code::Usage,
                format!("the XML declares it {stated}, and --from-format says {other}"),
            )
            .next("change <driver type=…> in the XML first, if that is wrong")),
        }
    }
}

/// Looks at the image of a disk, as what the XML declares it to be.
pub(super) fn inspect(
    host: &Host<'_>,
    domain: &Domain,
    disk: &Disk,
    place: &PermittedPath,
) -> Result<VolumeInfo, Problem> {
    let stated = disk.declared_format().map_err(|other| {
        Problem::new(
            Code::Failed,
            format!("the XML declares it {other:?}: only raw and qcow2 disks can be sealed"),
        )
        .next(
            Advice::from("convert it to qcow2 as its owner, not as root")
                .then(Advice::EditXml(domain.name.clone()).within("name that")),
        )
    })?;
    let declaration = host.confirmed.declaration(disk, stated)?;
    match disk::inspect_declared(place, declaration) {
        Ok(info) => Ok(info),
        Err(VolumeError::Contradiction {
            path,
            declared,
            found,
        }) => {
            match disk::inspect(place) {
                // The start of a raw disk under LUKS, which is what the XML says.
                Ok(info) if info.format.is_encrypted() && disk.encryption.is_some() => Ok(info),
                // An older XML came back: the keystore knows better, and the image is still to open with its key.
                Ok(info) if is_known(host, domain, &info)? => Ok(info),
                _ => Err(contradiction(domain, disk, &path, declared, found)),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn is_known(host: &Host<'_>, domain: &Domain, info: &VolumeInfo) -> Result<bool, Problem> {
    let location = info.path.display().to_string();
    let carried = info.envelope.as_ref().map(|envelope| envelope.id);
    Ok(info.format.is_encrypted()
        && host
            .keystore
            .envelopes_of(domain.uuid)?
            .sound
            .iter()
            .any(|record| {
                record.envelope.kind == ObjectKind::Disk
                    && (carried == Some(record.envelope.id)
                        || carried.is_none() && record.location == location)
            }))
}

fn contradiction(
    domain: &Domain,
    disk: &Disk,
    path: &Path,
    declared: DeclaredFormat,
    found: &'static str,
) -> Problem {
    let error = VolumeError::Contradiction {
        path: path.to_owned(),
        declared,
        found,
    };
    let edit = Advice::EditXml(domain.name.clone());
    let next = match declared {
        DeclaredFormat::Raw => Advice::from("if the XML is wrong").within(edit).also(
            Advice::from("if the guest has written that to its raw disk").within(Advice::SealDeclared {
                vm: domain.name.clone(),
                disk: disk.target.clone(),
            }),
        ),
        DeclaredFormat::Qcow2 => Advice::from("if the XML is wrong")
            .within(edit.note("<driver type='raw'>"))
            .also("else restore the image from a backup"),
    };
    let next = Advice::ShowVolume(path.to_owned()).also(next);
    Problem::new(Code::WouldLoseKey, error.to_string()).next(next)
}

#[cfg(test)]
mod tests {
    use super::*;

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
