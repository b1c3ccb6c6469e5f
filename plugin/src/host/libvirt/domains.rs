//! Domains and storage pools, for what no hook waits for.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use virt::domain::{Domain, DomainShutoffReason, DomainState, DomainStateReason};
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::glance::{DomainEntry, KnownXmls, ReadXml};
use super::link::Link;
use super::{LibvirtError, Part, Untold, absent_is, find, saved, told};
use crate::domain::parse_document;
use crate::model::envelope::VmId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DefinedDomain {
    pub vm: VmId,
    pub name: String,
    /// Whether it runs now.
    pub active: bool,
    /// Whether libvirt itself starts it with the host.
    pub autostart: bool,
    /// Whether it has a saved state that the next start restores.
    pub managed_save: bool,
    /// The XML of its next start.
    pub xml: String,
}

impl DefinedDomain {
    /// All but its XML.
    pub(crate) fn entry(&self) -> DomainEntry {
        DomainEntry {
            vm: self.vm,
            name: self.name.clone(),
            active: self.active,
            autostart: self.autostart,
            managed_save: self.managed_save,
        }
    }
}

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Power {
    /// It does not, or there is no such VM.
    Off,
    /// libvirt is about to run it: it may yet need its secrets.
    Starting,
    /// QEMU is there.
    On,
}

impl std::fmt::Display for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::On => "on",
        })
    }
}

/// Whether libvirt itself starts a VM with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByLibvirt {
    Yes,
    No,
}

/// What became of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    Running,
    Off,
    /// It is off, and `virsh save` has written its state somewhere; this is the XML of its definition.
    SavedToAFile(String),
}

/// An XML that libvirt keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptXml {
    pub vm: VmId,
    pub name: String,
    /// Where it is kept besides the VM itself: `snapshot NAME`, `managed save`. Nobody changes it there.
    pub snapshot: Option<String>,
    /// The text; that of a snapshot has the domain inside.
    pub xml: String,
}

/// A storage pool, as one of libvirt's users has defined it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoragePool {
    /// `dir`, `logical`, …
    pub kind: String,
    /// Where its volumes are.
    pub path: PathBuf,
}

/// What is held of the XML of all VMs. Who may define VMs writes as much as libvirt takes, and a daemon that runs out of memory locks
/// every provider.
const MAX_KEPT: usize = 512 << 20;

/// A connection that no start waits for.
#[derive(Debug)]
pub(crate) struct Background {
    pub(super) link: Link,
    pub(super) known: KnownXmls,
}

impl Background {
    /// For the libvirt at `uri`; does not connect yet.
    pub(crate) fn new(uri: &str) -> Self {
        Self {
            link: Link::new(uri),
            known: KnownXmls::default(),
        }
    }

    /// Connects unless the connection stands.
    pub(crate) fn connect(&self) -> Result<(), LibvirtError> {
        self.link.connect()
    }

    /// The domain with this name or UUID, or `None`.
    ///
    /// # Errors
    /// [`LibvirtError::Untold`] where libvirt does not tell its XML.
    pub(crate) fn domain(&self, name_or_uuid: &str) -> Result<Option<DefinedDomain>, LibvirtError> {
        self.link.with_each("read the domain", |connection| {
            let found = match name_or_uuid.parse::<VmId>() {
                Ok(vm) => find(connection, vm)?,
                Err(_) => None,
            };
            let found = match found {
                Some(domain) => Some(domain),
                None => absent_is(None, connection.lookup_domain_by_name(name_or_uuid).map(Some))?,
            };
            let Some(domain) = found else {
                return Ok(Ok(None));
            };
            told(
                connection,
                &domain,
                read(&domain).map_err(|error| (Part::Xml, error)),
            )
        })
    }

    /// Whether the VM runs. Waits for libvirt to have done what it does with that VM.
    pub(crate) fn power(&self, vm: VmId) -> Result<Power, LibvirtError> {
        self.link.with("see whether the domain runs", |connection| {
            let found = find(connection, vm)?;
            found.map_or(Ok(Power::Off), |domain| absent_is(Power::Off, power_of(&domain)))
        })
    }

    /// Whether the VM stands still in the middle of its run.
    pub(crate) fn is_paused(&self, vm: VmId) -> Result<bool, LibvirtError> {
        self.link.with("see whether the domain is paused", |connection| {
            let found = find(connection, vm)?.map(|domain| domain.state()).transpose()?;
            let paused = Enum::Known(DomainState::Paused);
            Ok(found.is_some_and(|(state, _)| state == paused))
        })
    }

    /// Whether the VM is off because a start of it has failed, and nothing has happened to it since.
    pub(crate) fn has_failed_to_start(&self, vm: VmId) -> Result<bool, LibvirtError> {
        self.link.with("see why the domain is off", |connection| {
            let found = find(connection, vm)?.map(|domain| domain.state()).transpose()?;
            let failed = Enum::Known(DomainShutoffReason::Failed);
            let failed = Enum::Known(DomainStateReason::Shutoff(failed));
            Ok(found.is_some_and(|(_, reason)| reason == failed))
        })
    }

    /// The names of all domains.
    pub(crate) fn names(&self) -> Result<Vec<String>, LibvirtError> {
        self.link.with("list the domains", |connection| {
            let domains = connection.list_all_domains(0)?;
            domains.iter().map(Domain::name).collect()
        })
    }

    /// All domains, those too that libvirt forgets when they end.
    ///
    /// # Errors
    /// As [`Background::every_xml`].
    pub(crate) fn domains(&self) -> Result<Vec<DefinedDomain>, LibvirtError> {
        self.link.with_each("list the domains", |connection| {
            let mut found = Vec::new();
            for domain in connection.list_all_domains(0)? {
                let entry = read(&domain).map_err(|error| (Part::Xml, error));
                match told(connection, &domain, entry)? {
                    Ok(defined) => found.extend(defined),
                    Err(untold) => return Ok(Err(untold)),
                }
            }
            Ok(Ok(found))
        })
    }

    /// All domains, those too that libvirt forgets when they end: three calls for all, and one for each whose XML has changed.
    pub(crate) fn domains_at_a_glance(&self) -> Result<Vec<(DomainEntry, Arc<ReadXml>)>, LibvirtError> {
        self.known.look(&self.link)
    }

    /// Every XML with which libvirt could start or revert a VM: of the next start and of now, and of its snapshots.
    ///
    /// # Errors
    /// [`LibvirtError::Untold`] names a VM of which libvirt does not tell all, or which has most of more than can be held.
    pub(crate) fn every_xml(&self) -> Result<Vec<KeptXml>, LibvirtError> {
        self.link.with_each("read every domain", |connection| {
            let (mut found, mut bytes) = (Vec::new(), 0);
            for domain in connection.list_all_domains(0)? {
                let of_domain = match told(connection, &domain, xml_of(&domain, MAX_KEPT))? {
                    Ok(of_domain) => of_domain.unwrap_or_default(),
                    Err(untold) => return Ok(Err(untold)),
                };
                bytes += of_domain.iter().map(|kept| kept.xml.len()).sum::<usize>();
                found.extend(of_domain);
                if bytes > MAX_KEPT {
                    return Ok(most_of(&found).map_or(Ok(found), Err));
                }
            }
            Ok(Ok(found))
        })
    }

    /// The active storage pools that are at a path; none where libvirt has no storage driver.
    pub(crate) fn active_pools(&self) -> Result<Vec<StoragePool>, LibvirtError> {
        self.link.with("list the storage pools", |connection| {
            let listed = connection.list_all_storage_pools(sys::VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE);
            let pools = match listed {
                Err(error) if error.code() == ErrorNumber::NoSupport.into() => Vec::new(),
                listed => listed?,
            };
            // One that is gone meanwhile is not active.
            let xml = pools.iter().filter_map(|pool| pool.xml_desc(0).ok());
            Ok(xml.filter_map(|xml| storage_pool(&xml)).collect())
        })
    }

    /// Where a volume of an active storage pool is.
    pub(crate) fn volume_path(&self, pool: &str, volume: &str) -> Result<PathBuf, LibvirtError> {
        self.link
            .with("find the volume of the storage pool", |connection| {
                let pool = connection.lookup_storage_pool_by_name(pool)?;
                Ok(pool.lookup_storage_vol_by_name(volume)?.path()?.into())
            })
    }

    /// What became of a VM that has ended or started; `None` if it is not defined.
    pub(crate) fn whereabouts(&self, vm: VmId) -> Result<Option<Whereabouts>, LibvirtError> {
        self.link.with("look at the domain", |connection| {
            let Some(domain) = find(connection, vm)? else {
                return Ok(None);
            };
            let found = if domain.is_active()? {
                Whereabouts::Running
            } else if saved::is_in_a_file(&domain)? {
                Whereabouts::SavedToAFile(domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?)
            } else {
                Whereabouts::Off
            };
            Ok(Some(found))
        })
    }

    /// Starts a domain that is off, with the state that a managed save has kept of it. Returns once QEMU runs it.
    pub(crate) fn start(&self, vm: VmId) -> Result<(), LibvirtError> {
        self.link.with("start the domain", |connection| {
            connection.lookup_domain_by_uuid(vm.0)?.create()
        })
    }

    /// Has libvirt itself start a domain with the host, or not.
    pub(crate) fn set_autostart(&self, vm: VmId, autostart: ByLibvirt) -> Result<(), LibvirtError> {
        self.link.with("change the domain's autostart", |connection| {
            let domain = connection.lookup_domain_by_uuid(vm.0)?;
            domain.set_autostart(autostart == ByLibvirt::Yes)
        })
    }

    pub(crate) fn define(&self, xml: &str) -> Result<(), LibvirtError> {
        self.link.with("define the domain", |connection| {
            connection.define_domain_xml(xml).map(drop)
        })
    }

    /// Changes the metadata element of a domain in the namespace `uri`, in the XML of its next start and, while it runs, in
    /// that of now; nothing else in the XML is touched. `edit` gets the element without its namespace and returns the new
    /// one, or `None` to leave it. Says whether the domain is defined.
    pub(crate) fn edit_metadata(
        &self,
        vm: VmId,
        (prefix, uri): (&str, &str),
        edit: impl Fn(&str) -> Option<String>,
    ) -> Result<bool, LibvirtError> {
        self.link.with("change the metadata of the domain", |connection| {
            let Some(domain) = find(connection, vm)? else {
                return Ok(false);
            };
            for impact in impacts(&domain)? {
                let found = domain.metadata(ELEMENT, Some(uri), impact).map(Some);
                if let Some(new) = absent_is(None, found)?.as_deref().and_then(&edit) {
                    domain.set_metadata(ELEMENT, Some(&new), Some(prefix), Some(uri), impact)?;
                }
            }
            Ok(true)
        })
    }

    /// Gives the disk `target` of a running domain another size, in bytes.
    pub(crate) fn resize_disk(&self, vm: VmId, target: &str, bytes: u64) -> Result<(), LibvirtError> {
        self.link.with("resize the disk of the domain", |connection| {
            let domain = connection.lookup_domain_by_uuid(vm.0)?;
            domain.block_resize(target, bytes, sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        })
    }

    /// Removes the metadata element of a domain in the namespace `uri`. Says whether there was one.
    pub(crate) fn remove_metadata(&self, vm: VmId, uri: &str) -> Result<bool, LibvirtError> {
        self.link.with("change the metadata of the domain", |connection| {
            let Some(domain) = find(connection, vm)? else {
                return Ok(false);
            };
            let config = sys::VIR_DOMAIN_AFFECT_CONFIG;
            if absent_is(None, domain.metadata(ELEMENT, Some(uri), config).map(Some))?.is_none() {
                return Ok(false);
            }
            absent_is((), domain.set_metadata(ELEMENT, None, None, Some(uri), config))?;
            Ok(true)
        })
    }
}

const ELEMENT: i32 = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;

/// Which of a domain's XMLs there are to change.
fn impacts(domain: &Domain) -> Result<Vec<u32>, Error> {
    let mut impacts = Vec::new();
    if domain.is_persistent()? {
        impacts.push(sys::VIR_DOMAIN_AFFECT_CONFIG);
    }
    if domain.is_active()? {
        impacts.push(sys::VIR_DOMAIN_AFFECT_LIVE);
    }
    Ok(impacts)
}

/// `<pool type=…>` and its `<target><path>`.
fn storage_pool(xml: &str) -> Option<StoragePool> {
    let document = parse_document(xml).ok()?;
    let mut parts = document.root_element().descendants();
    let path = parts.find(|node| {
        node.has_tag_name("path") && node.parent().is_some_and(|parent| parent.has_tag_name("target"))
    })?;
    Some(StoragePool {
        kind: document.root_element().attribute("type")?.to_owned(),
        path: PathBuf::from(path.text()?.trim()),
    })
}

fn read(domain: &Domain) -> Result<DefinedDomain, Error> {
    Ok(DefinedDomain {
        vm: VmId(domain.uuid()?),
        name: domain.name()?,
        active: domain.is_active()?,
        autostart: domain.autostart()?,
        managed_save: domain.has_managed_save(0)?,
        xml: domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE)?,
    })
}

/// A domain that has its id and not yet QEMU counts as active, and as shut off.
fn power_of(domain: &Domain) -> Result<Power, Error> {
    if !domain.is_active()? {
        return Ok(Power::Off);
    }
    let (state, _) = domain.state()?;
    let is_without_qemu = [DomainState::Shutoff, DomainState::NoState]
        .into_iter()
        .any(|known| state == Enum::Known(known));
    Ok(if is_without_qemu {
        Power::Starting
    } else {
        Power::On
    })
}

/// The VM that has most of `kept`, which is more than is held.
fn most_of(kept: &[KeptXml]) -> Option<Untold> {
    let mut sizes = BTreeMap::<_, (usize, &KeptXml)>::new();
    for kept in kept {
        sizes.entry(kept.vm).or_insert((0, kept)).0 += kept.xml.len();
    }
    let (size, most) = sizes.into_values().max_by_key(|(size, _)| *size)?;
    let has_snapshots = kept
        .iter()
        .any(|kept| kept.vm == most.vm && kept.snapshot.is_some());
    Some(Untold {
        vm: most.name.clone(),
        part: if has_snapshots { Part::Snapshots } else { Part::Xml },
        message: format!(
            "all XML of all VMs is more than the {} MiB that are read, and {} MiB of it are this one's",
            MAX_KEPT >> 20,
            size >> 20
        ),
    })
}

/// Stops once there are more bytes of it than `most`.
fn xml_of(domain: &Domain, most: usize) -> Result<Vec<KeptXml>, (Part, Error)> {
    let of = |part: Part| move |error| (part, error);
    let xml = || of(Part::Xml);
    let (vm, name) = (VmId(domain.uuid().map_err(xml())?), domain.name().map_err(xml())?);
    let kept = |snapshot, xml| KeptXml {
        vm,
        name: name.clone(),
        snapshot,
        xml,
    };
    let now = domain.xml_desc(sys::VIR_DOMAIN_XML_SECURE).map_err(xml())?;
    let mut found = vec![kept(None, now)];
    if domain.is_persistent().map_err(xml())? && domain.is_active().map_err(xml())? {
        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
        found.push(kept(None, domain.xml_desc(flags).map_err(xml())?));
    }
    let mut bytes = 0;
    for snapshot in domain.list_all_snapshots(0).map_err(of(Part::Snapshots))? {
        let name = snapshot.name().map_err(of(Part::Snapshots))?;
        let text = absent_is(None, snapshot.xml_desc(0).map(Some));
        let text = text.map_err(of(Part::Snapshot(name.clone())))?;
        bytes += text.as_ref().map_or(0, String::len);
        found.extend(text.map(|text| kept(Some(format!("snapshot {name}")), text)));
        if bytes > most {
            return Ok(found);
        }
    }
    let managed = saved::managed_xml(domain).map_err(of(Part::SavedState))?;
    found.extend(managed.map(|xml| kept(Some("managed save".to_owned()), xml)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_most_of_more_than_is_held_is_named() {
        let kept = |vm: u128, snapshot: Option<&str>, size: usize| KeptXml {
            vm: VmId(uuid::Uuid::from_u128(vm)),
            name: format!("vm{vm}"),
            snapshot: snapshot.map(str::to_owned),
            xml: " ".repeat(size),
        };
        // Not the one with the largest XML.
        let found = most_of(&[kept(1, None, 5), kept(2, None, 3), kept(2, Some("s"), 3)]).unwrap();
        assert_eq!((found.vm.as_str(), found.part), ("vm2", Part::Snapshots));
        let found = most_of(&[kept(1, None, 5), kept(3, None, 6)]).unwrap();
        assert_eq!((found.vm.as_str(), found.part), ("vm3", Part::Xml));
    }
}
