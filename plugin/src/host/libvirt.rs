//! The only module that talks to libvirt.
//!
//! While a hook waits, only the *secret* driver is called, and pools are listed at most: the domain API would wait for the very VM whose start
//! waits for us. Everything blocks, and runs on a worker thread with a deadline. The connection is opened when it
//! is first needed and again after libvirtd was restarted.

pub mod events;
mod probe;
pub mod qemu_conf;
mod running;
mod saved;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use roxmltree::Node;
use thiserror::Error;
use virt::connect::Connect;
use virt::domain::{Domain, DomainState};
use virt::error::ErrorNumber;
use virt::sys;

use crate::domain::parse_document;
use crate::model::envelope::{EnvelopeId, ObjectKind, VmId};
use crate::secret::Passphrase;
use probe::Probe;

pub use running::RunningVm;

/// A DEK on its way to libvirt.
#[derive(Debug)]
pub struct Arming {
    /// The envelope; its UUID becomes the secret's.
    pub envelope: EnvelopeId,
    /// Decides the usage type that libvirt expects of the secret.
    pub kind: ObjectKind,
    /// For people who run `virsh secret-list` in the wrong millisecond.
    pub description: String,
    /// The secret's value.
    pub passphrase: Passphrase,
}

/// A defined domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefinedDomain {
    /// Its UUID.
    pub vm: VmId,
    /// Its name.
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

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
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

/// What became of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// It runs.
    Running,
    /// It is off.
    Off,
    /// It is off, and `virsh save` has written its state somewhere; this is the XML of its definition.
    SavedToAFile(String),
}

/// An XML that libvirt keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptXml {
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: String,
    /// Where it is kept besides the VM itself: `snapshot NAME`, `managed save`. Nobody changes it there.
    pub snapshot: Option<String>,
    /// The text; that of a snapshot has the domain inside.
    pub xml: String,
}

/// A storage pool, as one of libvirt's users has defined it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoragePool {
    /// `dir`, `logical`, …
    pub kind: String,
    /// Where its volumes are.
    pub path: PathBuf,
}

/// A connection to one libvirt, reopened as needed.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    connection: Mutex<Option<Connect>>,
    probe: Probe,
}

impl Libvirt {
    /// For the libvirt at `uri`; does not connect yet.
    #[must_use]
    pub fn new(uri: &str) -> Self {
        virt::error::clear_error_callback();
        Self {
            uri: uri.into(),
            connection: Mutex::new(None),
            probe: Probe::default(),
        }
    }

    /// Whether the connection stands, without waiting for anything.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let guard = match self.connection.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        guard
            .as_ref()
            .is_some_and(|connection| connection.is_alive().unwrap_or(false))
    }

    /// Connects unless the connection stands. Says whether it is a new one.
    pub fn connect(&self) -> Result<bool, LibvirtError> {
        let mut guard = self.lock();
        if guard
            .as_ref()
            .is_some_and(|connection| connection.is_alive().unwrap_or(false))
        {
            return Ok(false);
        }
        *guard = None;
        *guard = Some(Connect::open(Some(&self.uri)).map_err(|source| self.error("connect", source))?);
        Ok(true)
    }

    /// Makes sure that libvirt answers at all, within `limit`. A libvirtd that is autostarting VMs accepts a connection
    /// and then says nothing until it is done, and nothing can interrupt a call that waits for it.
    pub fn reach(self: &Arc<Self>, limit: Duration) -> Result<(), LibvirtError> {
        let libvirt = Arc::clone(self);
        let answered = self.probe.within(limit, move || {
            let asked = || libvirt.with("answer", Connect::lib_version).map(drop);
            libvirt.probe.run(asked);
        });
        answered.unwrap_or_else(|| {
            Err(LibvirtError::Silent {
                uri: self.uri.clone(),
                waited: limit,
            })
        })
    }

    /// Defines each secret as ephemeral and private and sets its value. All or none: what was defined is taken
    /// back when a later one fails.
    pub fn arm(&self, secrets: &[Arming]) -> Result<(), LibvirtError> {
        for (done, secret) in secrets.iter().enumerate() {
            if let Err(error) = self.arm_one(secret) {
                let defined: Vec<_> = secrets[..=done].iter().map(|secret| secret.envelope).collect();
                return match self.disarm(&defined) {
                    Ok(()) => Err(error),
                    Err(rollback) => Err(LibvirtError::Rollback {
                        source: Box::new(error),
                        rollback: rollback.to_string(),
                    }),
                };
            }
        }
        Ok(())
    }

    /// libvirt has no call that defines a secret with its value, so another client can put a secret of its own in between, and
    /// read what comes. That can't be prevented here, so it is looked for.
    fn arm_one(&self, secret: &Arming) -> Result<(), LibvirtError> {
        self.with("define a secret", |connection| define(connection, secret))?;
        let xml = self.with("read a secret back", |connection| {
            absent_is(
                None,
                connection.lookup_secret_by_uuid(secret.envelope.0).map(Some),
            )?
            .map_or(Ok(None), |found| absent_is(None, found.xml_desc(0).map(Some)))
        })?;
        if xml.is_some_and(|xml| is_as_defined(&xml, secret.envelope)) {
            return Ok(());
        }
        Err(LibvirtError::Usurped {
            envelope: secret.envelope,
        })
    }

    /// Undefines the secrets of `envelopes`; one that is not there is no error.
    pub fn disarm(&self, envelopes: &[EnvelopeId]) -> Result<(), LibvirtError> {
        for envelope in envelopes {
            self.with("undefine a secret", |connection| {
                absent_is(None, connection.lookup_secret_by_uuid(envelope.0).map(Some))?
                    .map_or(Ok(()), |secret| absent_is((), secret.undefine()))
            })?;
        }
        Ok(())
    }

    /// The envelopes whose secrets libvirt holds now.
    pub fn armed(&self) -> Result<Vec<EnvelopeId>, LibvirtError> {
        // Of any kind: others can have made one of ours persistent meanwhile.
        let secrets = self.with("list the secrets", |connection| connection.list_all_secrets(0))?;
        // One that is gone meanwhile is no longer armed.
        let found = secrets
            .iter()
            .filter_map(|secret| armed_by(&secret.xml_desc(0).ok()?));
        Ok(found.collect())
    }

    /// The domain with this name or UUID, or `None`.
    pub fn domain(&self, name_or_uuid: &str) -> Result<Option<DefinedDomain>, LibvirtError> {
        self.with("read the domain", |connection| {
            let found = match name_or_uuid.parse::<VmId>() {
                Ok(vm) => absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))?,
                Err(_) => None,
            };
            let found = match found {
                Some(domain) => Some(domain),
                None => absent_is(None, connection.lookup_domain_by_name(name_or_uuid).map(Some))?,
            };
            found.as_ref().map(read).transpose()
        })
    }

    /// Whether the VM runs. Waits for libvirt to have done what it does with that VM.
    pub fn power(&self, vm: VmId) -> Result<Power, LibvirtError> {
        self.with("see whether the domain runs", |connection| {
            let found = absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))?;
            found.map_or(Ok(Power::Off), |domain| absent_is(Power::Off, power_of(&domain)))
        })
    }

    /// All domains, those too that libvirt forgets when they end.
    pub fn domains(&self) -> Result<Vec<DefinedDomain>, LibvirtError> {
        self.with("list the domains", |connection| {
            let domains = connection.list_all_domains(0)?;
            // One that was undefined meanwhile is simply no longer there.
            domains
                .iter()
                .filter_map(|domain| absent_is(None, read(domain).map(Some)).transpose())
                .collect()
        })
    }

    /// The same, with one call for each domain and a few for all: a host may have thousands.
    pub fn domains_at_a_glance(&self) -> Result<Vec<DefinedDomain>, LibvirtError> {
        self.with("list the domains", |connection| {
            let persistent = sys::VIR_CONNECT_LIST_DOMAINS_PERSISTENT;
            let those = |flag| -> Result<BTreeSet<uuid::Uuid>, virt::error::Error> {
                let found = connection.list_all_domains(persistent | flag)?;
                found.iter().map(Domain::uuid).collect()
            };
            let active = those(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)?;
            let autostart = those(sys::VIR_CONNECT_LIST_DOMAINS_AUTOSTART)?;
            let managed_save = those(sys::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)?;
            let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
            let read = |domain: &Domain| {
                let vm = domain.uuid()?;
                Ok(DefinedDomain {
                    vm: VmId(vm),
                    name: domain.name()?,
                    active: active.contains(&vm),
                    autostart: autostart.contains(&vm),
                    managed_save: managed_save.contains(&vm),
                    xml: domain.xml_desc(flags)?,
                })
            };
            let domains = connection.list_all_domains(persistent)?;
            domains
                .iter()
                .filter_map(|domain| absent_is(None, read(domain).map(Some)).transpose())
                .collect()
        })
    }

    /// Every XML with which libvirt could start or revert a VM: of the next start and of now, and of its snapshots.
    pub fn every_xml(&self) -> Result<Vec<KeptXml>, LibvirtError> {
        self.with("read every domain", |connection| {
            let mut found = Vec::new();
            for domain in connection.list_all_domains(0)? {
                // One that was undefined meanwhile has none.
                found.extend(absent_is(Vec::new(), xml_of(&domain))?);
            }
            Ok(found)
        })
    }

    /// The active storage pools that are at a path; none where libvirt has no storage driver.
    pub fn active_pools(&self) -> Result<Vec<StoragePool>, LibvirtError> {
        self.with("list the storage pools", |connection| {
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

    /// What became of a VM that has ended or started; `None` if it is not defined.
    pub fn whereabouts(&self, vm: VmId) -> Result<Option<Whereabouts>, LibvirtError> {
        self.with("look at the domain", |connection| {
            let Some(domain) = absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))? else {
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

    /// Redefines a domain.
    pub fn define(&self, xml: &str) -> Result<(), LibvirtError> {
        self.with("define the domain", |connection| {
            connection.define_domain_xml(xml).map(drop)
        })
    }

    /// Changes the metadata element of a domain in the namespace `uri`, in the XML of its next start and, while it runs, in
    /// that of now; nothing else in the XML is touched. `edit` gets the element without its namespace and returns the new
    /// one, or `None` to leave it. Says whether the domain is defined.
    pub fn edit_metadata(
        &self,
        vm: VmId,
        (prefix, uri): (&str, &str),
        edit: impl Fn(&str) -> Option<String>,
    ) -> Result<bool, LibvirtError> {
        self.with("change the metadata of the domain", |connection| {
            let Some(domain) = absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))? else {
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

    /// Removes the metadata element of a domain in the namespace `uri`. Says whether there was one.
    pub fn remove_metadata(&self, vm: VmId, uri: &str) -> Result<bool, LibvirtError> {
        self.with("change the metadata of the domain", |connection| {
            let Some(domain) = absent_is(None, connection.lookup_domain_by_uuid(vm.0).map(Some))? else {
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

    /// Runs `call`, once more on a new connection when the old one turns out to be dead. All calls made through
    /// here may be repeated.
    fn with<T>(
        &self,
        what: &'static str,
        call: impl Fn(&Connect) -> Result<T, virt::error::Error>,
    ) -> Result<T, LibvirtError> {
        self.connect()?;
        let connection = self.lock().clone();
        let first = match connection.as_ref().map(&call) {
            Some(Ok(value)) => return Ok(value),
            Some(Err(error)) => error,
            None => virt::error::Error::last_error(),
        };
        if connection.is_some_and(|connection| connection.is_alive().unwrap_or(false)) {
            return Err(self.error(what, first));
        }
        self.connect()?;
        let connection = self.lock().clone();
        connection
            .as_ref()
            .map_or(Err(first), &call)
            .map_err(|source| self.error(what, source))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Connect>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: &'static str, source: virt::error::Error) -> LibvirtError {
        LibvirtError::Call {
            what,
            uri: self.uri.clone(),
            message: source.message().to_owned(),
        }
    }
}

/// Why libvirt did not do as asked.
#[derive(Clone, Debug, Error)]
pub enum LibvirtError {
    /// A call failed.
    #[error("libvirt ({uri}) could not {what}: {message}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// Of which libvirt.
        uri: String,
        /// Its message.
        message: String,
    },
    /// Nothing was heard.
    #[error("libvirt ({uri}) did not answer within {:.1} s; while a libvirtd autostarts VMs it can't", waited.as_secs_f64())]
    Silent {
        /// Which libvirt.
        uri: String,
        /// For how long.
        waited: Duration,
    },
    /// Another client of libvirt has defined a secret while it was getting its value.
    #[error(
        "somebody else has replaced secret {envelope} in libvirt while it was getting its value: who did may have read the key"
    )]
    Usurped {
        /// Whose secret it is.
        envelope: EnvelopeId,
    },
    /// A call failed, and so did taking back what had been done before it.
    #[error("secrets may be left in libvirt, because undoing failed as well ({rollback})")]
    Rollback {
        /// The first failure.
        #[source]
        source: Box<LibvirtError>,
        /// The failure of the undoing.
        rollback: String,
    },
}

const ELEMENT: i32 = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;

/// Which of a domain's XMLs there are to change.
fn impacts(domain: &Domain) -> Result<Vec<u32>, virt::error::Error> {
    let mut impacts = Vec::new();
    if domain.is_persistent()? {
        impacts.push(sys::VIR_DOMAIN_AFFECT_CONFIG);
    }
    if domain.is_active()? {
        impacts.push(sys::VIR_DOMAIN_AFFECT_LIVE);
    }
    Ok(impacts)
}

/// Marks the usage id of our secrets.
const USAGE_PREFIX: &str = "virtseal:";

fn define(connection: &Connect, secret: &Arming) -> Result<(), virt::error::Error> {
    connection
        .define_secret_xml(&secret_xml(secret), 0)?
        .set_value(secret.passphrase.expose(), 0)
}

fn secret_xml(secret: &Arming) -> String {
    let usage = format!("{USAGE_PREFIX}{}", secret.envelope);
    let usage = match secret.kind {
        ObjectKind::Disk | ObjectKind::Nvram => {
            format!("<usage type='volume'><volume>{usage}</volume></usage>")
        }
        ObjectKind::Vtpm => format!("<usage type='vtpm'><name>{usage}</name></usage>"),
    };
    format!(
        "<secret ephemeral='yes' private='yes'><uuid>{}</uuid><description>{}</description>{usage}</secret>",
        secret.envelope,
        escape(&secret.description),
    )
}

/// The envelope of a secret of ours. Read from its XML, because `virt` 0.5 frees the usage id that libvirt owns.
fn armed_by(xml: &str) -> Option<EnvelopeId> {
    let document = parse_document(xml).ok()?;
    let secret = document.root_element();
    let child = |name| secret.children().find(|node| node.has_tag_name(name));
    let id = child("uuid")?.text()?.parse().ok()?;
    let usage = child("usage")?.children().find(Node::is_element)?.text()?;
    (usage == format!("{USAGE_PREFIX}{id}")).then_some(id)
}

/// Whether this is the secret that was defined, of which libvirt tells nobody the value, and keeps it in memory only.
fn is_as_defined(xml: &str, envelope: EnvelopeId) -> bool {
    let says_yes = |name: &str| {
        parse_document(xml).is_ok_and(|document| document.root_element().attribute(name) == Some("yes"))
    };
    armed_by(xml) == Some(envelope) && says_yes("ephemeral") && says_yes("private")
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn read(domain: &Domain) -> Result<DefinedDomain, virt::error::Error> {
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
fn power_of(domain: &Domain) -> Result<Power, virt::error::Error> {
    if !domain.is_active()? {
        return Ok(Power::Off);
    }
    let (state, _) = domain.state()?;
    let is_without_qemu = [DomainState::Shutoff, DomainState::NoState]
        .into_iter()
        .any(|known| state == virt::enumutil::Enum::Known(known));
    Ok(if is_without_qemu {
        Power::Starting
    } else {
        Power::On
    })
}

fn xml_of(domain: &Domain) -> Result<Vec<KeptXml>, virt::error::Error> {
    let (vm, name) = (VmId(domain.uuid()?), domain.name()?);
    let kept = |snapshot, xml| KeptXml {
        vm,
        name: name.clone(),
        snapshot,
        xml,
    };
    let mut found = vec![kept(None, domain.xml_desc(sys::VIR_DOMAIN_XML_SECURE)?)];
    if domain.is_persistent()? && domain.is_active()? {
        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
        found.push(kept(None, domain.xml_desc(flags)?));
    }
    for snapshot in domain.list_all_snapshots(0)? {
        let name = format!("snapshot {}", snapshot.name()?);
        found.push(kept(Some(name), snapshot.xml_desc(0)?));
    }
    let managed = saved::managed_xml(domain)?;
    found.extend(managed.map(|xml| kept(Some("managed save".to_owned()), xml)));
    Ok(found)
}

/// `default` where libvirt says that there is no such domain or secret.
fn absent_is<T>(default: T, result: Result<T, virt::error::Error>) -> Result<T, virt::error::Error> {
    match result {
        Err(error) if is_absence(&error) => Ok(default),
        other => other,
    }
}

fn is_absence(error: &virt::error::Error) -> bool {
    [
        ErrorNumber::NoSecret,
        ErrorNumber::NoDomain,
        ErrorNumber::NoDomainMetadata,
    ]
    .into_iter()
    .any(|number| error.code() == number.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Dek;

    #[test]
    fn secret_xml_is_private_ephemeral_and_escaped() {
        let envelope = EnvelopeId::random();
        let xml = secret_xml(&Arming {
            envelope,
            kind: ObjectKind::Vtpm,
            description: "virtseal: vtpm of <&>".into(),
            passphrase: Dek::random().unwrap().passphrase().unwrap(),
        });
        let document = parse_document(&xml).unwrap();
        let root = document.root_element();
        assert_eq!(
            (root.attribute("ephemeral"), root.attribute("private")),
            (Some("yes"), Some("yes"))
        );
        assert!(xml.contains(&format!(
            "<usage type='vtpm'><name>virtseal:{envelope}</name></usage>"
        )));
        assert!(
            root.children()
                .any(|node| node.text() == Some("virtseal: vtpm of <&>"))
        );
    }

    #[test]
    fn secrets_of_others_are_not_ours() {
        for kind in [ObjectKind::Disk, ObjectKind::Nvram, ObjectKind::Vtpm] {
            let arming = Arming {
                envelope: EnvelopeId::random(),
                kind,
                description: "virtseal:".into(),
                passphrase: Dek::random().unwrap().passphrase().unwrap(),
            };
            let xml = secret_xml(&arming);
            assert_eq!(armed_by(&xml), Some(arming.envelope), "{xml}");
            let others = xml.replace(USAGE_PREFIX, "/var/lib/libvirt/images/");
            assert_eq!(armed_by(&others), None, "{others}");
        }
    }

    #[test]
    fn a_secret_that_others_have_put_in_the_place_of_ours_is_told_from_it() {
        let envelope = EnvelopeId::random();
        let xml = secret_xml(&Arming {
            envelope,
            kind: ObjectKind::Disk,
            description: "virtseal: disk vda of web01".into(),
            passphrase: Dek::random().unwrap().passphrase().unwrap(),
        });
        assert!(is_as_defined(&xml, envelope));
        assert!(!is_as_defined(&xml, EnvelopeId::random()));
        for (from, to) in [
            ("private='yes'", "private='no'"),
            ("private='yes'", ""),
            ("ephemeral='yes'", "ephemeral='no'"),
            (USAGE_PREFIX, "/images/"),
        ] {
            assert!(!is_as_defined(&xml.replace(from, to), envelope), "{from} {to}");
        }
    }

    #[test]
    fn a_libvirt_that_is_not_there_is_named() {
        let libvirt = Libvirt::new("qemu+unix:///system?socket=/nonexistent/libvirt-sock");
        let error = libvirt.armed().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/libvirt-sock"), "{error}");
        assert!(!libvirt.is_connected());
    }
}
