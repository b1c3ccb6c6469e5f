//! All domains at once, for those who look again and again: what libvirt wrote into a file, and has not written again, it is not asked for
//! once more.
//!
//! libvirt rewrites `/etc/libvirt/qemu/NAME.xml`, by a rename, whenever the XML of a domain's next start changes, and it does both
//! under the domain's lock. So a file that is the same file as before, unchanged, stands for the same XML. The file itself is never read:
//! what libvirt says counts. A domain without such a file, as a transient one, is asked about each time.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::stat::lstat;
use virt::sys;

use super::link::Link;
use super::{LibvirtError, absent_is};
use crate::domain::{Domain, DomainError, Metadata};
use crate::host::file_stamp::FileStamp;
use crate::model::envelope::VmId;

/// The libvirt whose files are there.
const URI: &str = "qemu:///system";
const DIRECTORY: &str = "/etc/libvirt/qemu";

/// A domain, but for its XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainEntry {
    pub vm: VmId,
    pub name: String,
    /// Whether it runs now.
    pub active: bool,
    /// Whether libvirt itself starts it with the host.
    pub autostart: bool,
    /// Whether it has a saved state that the next start restores.
    pub managed_save: bool,
}

/// The XML of its next start.
#[derive(Debug)]
pub(crate) struct ReadXml {
    pub domain: Result<Domain, DomainError>,
    /// Whether it has the name of virtseal's metadata, if only somewhere.
    pub names_us: bool,
}

impl ReadXml {
    fn of(xml: &str) -> Self {
        Self {
            domain: Domain::parse(xml),
            names_us: xml.contains(Metadata::NAMESPACE),
        }
    }
}

/// The file in which libvirt keeps the XML of a domain that is called so.
fn stamp_of(name: &str) -> Option<FileStamp> {
    if name.contains('/') {
        return None;
    }
    let file = Path::new(DIRECTORY).join(format!("{name}.xml"));
    FileStamp::of(&lstat(&file).ok()?)
}

/// What was read, and of which file that is the XML.
#[derive(Debug, Default)]
pub(crate) struct KnownXmls(Mutex<HashMap<VmId, (FileStamp, Arc<ReadXml>)>>);

impl KnownXmls {
    /// As [`super::Background::domains_at_a_glance`].
    pub(super) fn look(&self, link: &Link) -> Result<Vec<(DomainEntry, Arc<ReadXml>)>, LibvirtError> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let has_files = link.uri() == URI;
        let (seen, found) = link.with("list the domains", |connection| {
            let those = |flag| -> Result<BTreeSet<uuid::Uuid>, virt::error::Error> {
                let found = connection.list_all_domains(flag)?;
                found.iter().map(virt::domain::Domain::uuid).collect()
            };
            let saved = those(sys::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)?;
            let autostart = those(sys::VIR_CONNECT_LIST_DOMAINS_AUTOSTART)?;
            let (mut seen, mut found) = (HashMap::new(), Vec::new());
            for domain in connection.list_all_domains(0)? {
                let (vm, name) = (domain.uuid()?, domain.name()?);
                // Before libvirt is asked: what it writes after that is read the next time.
                let stamp = has_files.then(|| stamp_of(&name)).flatten();
                let entry = DomainEntry {
                    vm: VmId(vm),
                    name,
                    active: domain.id().is_some(),
                    autostart: autostart.contains(&vm),
                    managed_save: saved.contains(&vm),
                };
                let before = known.get(&entry.vm).filter(|(before, _)| Some(*before) == stamp);
                let xml = match before {
                    Some((_, xml)) => Arc::clone(xml),
                    None => {
                        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
                        // One that was undefined meanwhile is simply no longer there.
                        match absent_is(None, domain.xml_desc(flags).map(Some))? {
                            Some(xml) => Arc::new(ReadXml::of(&xml)),
                            None => continue,
                        }
                    }
                };
                if let Some(stamp) = stamp {
                    seen.insert(entry.vm, (stamp, Arc::clone(&xml)));
                }
                found.push((entry, xml));
            }
            Ok((seen, found))
        })?;
        *known = seen;
        Ok(found)
    }
}
