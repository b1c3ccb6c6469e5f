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
    fn of(xml: &str, most: usize) -> Self {
        let found = xml.len();
        Self {
            domain: match found > most {
                true => Err(DomainError::BeyondShare { found, most }),
                false => Domain::parse(xml),
            },
            names_us: xml.contains(Metadata::NAMESPACE),
        }
    }

    /// Whether nothing else would come of it now, where each may have `most`.
    fn stands(&self, most: usize) -> bool {
        !matches!(self.domain, Err(DomainError::BeyondShare { found, .. }) if found <= most)
    }

    fn untold(error: &virt::error::Error) -> Self {
        Self {
            domain: Err(DomainError::Untold(error.message().to_owned())),
            names_us: false,
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

/// What is held of all of them together: who may define VMs writes as much as libvirt takes, and a daemon that runs out of memory locks every
/// provider.
const MAX_HELD: usize = 256 << 20;
/// What each may have, of however many.
const MIN_SHARE: usize = 64 << 10;

/// How many bytes each of `domains` may have.
fn share(domains: usize) -> usize {
    (MAX_HELD / domains.max(1)).max(MIN_SHARE)
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
            let domains = connection.list_all_domains(0)?;
            let most = share(domains.len());
            for domain in domains {
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
                let before = known.get(&entry.vm);
                let before = before.filter(|(before, xml)| Some(*before) == stamp && xml.stands(most));
                let xml = match before {
                    Some((_, xml)) => Arc::clone(xml),
                    None => {
                        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
                        // One that was undefined meanwhile is simply no longer there.
                        match absent_is(None, domain.xml_desc(flags).map(Some)) {
                            Ok(Some(xml)) => Arc::new(ReadXml::of(&xml, most)),
                            Ok(None) => continue,
                            // It is asked again the next time. The others are told of meanwhile.
                            Err(error) if connection.is_alive().unwrap_or(false) => {
                                found.push((entry, Arc::new(ReadXml::untold(&error))));
                                continue;
                            }
                            Err(error) => return Err(error),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_domain_has_a_share_of_what_is_held() {
        assert!(share(0) >= Domain::MAX_XML && share(60) >= Domain::MAX_XML);
        assert!(share(1000) * 1000 <= MAX_HELD);
        assert_eq!(share(usize::MAX), MIN_SHARE);
        let xml = "<domain type='kvm'><name>a</name></domain>";
        let held = ReadXml::of(xml, xml.len());
        assert!(!matches!(held.domain, Err(DomainError::BeyondShare { .. })));
        let beyond = ReadXml::of(xml, xml.len() - 1);
        assert!(matches!(beyond.domain, Err(DomainError::BeyondShare { .. })));
        assert!(beyond.stands(xml.len() - 1) && !beyond.stands(xml.len()));
        assert!(held.stands(1));
    }
}
