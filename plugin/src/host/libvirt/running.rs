//! A running VM as it is now: what no hook was asked about shows in this XML only.

use std::ffi::CStr;

use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::{Background, LibvirtError, Part, find, told};
use crate::host::libvirt::events::{Listener, Listening};
use crate::model::envelope::VmId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunningVm {
    /// Its XML of now.
    pub live: String,
    /// That of its next start; none of a VM that libvirt forgets when it ends.
    pub next: Option<String>,
    /// `<domainbackup>`, while a backup is being made.
    pub backup: Option<String>,
}

impl Background {
    /// Tells `listener` from now on, until what is returned is dropped.
    pub(crate) fn listen(&self, listener: &Listener) -> Result<Listening, LibvirtError> {
        self.link.with("tell what happens", |connection| {
            Listening::begin(connection.clone(), listener)
        })
    }

    pub(crate) fn running(&self) -> Result<Vec<VmId>, LibvirtError> {
        self.link.with("list the domains", |connection| {
            let running = connection.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)?;
            running.iter().map(|domain| domain.uuid().map(VmId)).collect()
        })
    }

    /// The VM as it is now, if it runs.
    ///
    /// # Errors
    /// [`LibvirtError::Untold`] where libvirt does not tell its XML.
    pub(crate) fn as_it_runs(&self, vm: VmId) -> Result<Option<RunningVm>, LibvirtError> {
        self.link.with_each("read the domain", |connection| {
            let Some(domain) = find(connection, vm)? else {
                return Ok(Ok(None));
            };
            // One that was undefined meanwhile does not run.
            let read = read(&domain).map_err(|error| (Part::Xml, error));
            Ok(told(connection, &domain, read)?.map(Option::flatten))
        })
    }
}

fn read(domain: &Domain) -> Result<Option<RunningVm>, Error> {
    if !domain.is_active()? {
        return Ok(None);
    }
    let inactive = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
    Ok(Some(RunningVm {
        // First: it may be over soon.
        backup: backup(domain)?,
        live: domain.xml_desc(sys::VIR_DOMAIN_XML_SECURE)?,
        next: domain
            .is_persistent()?
            .then(|| domain.xml_desc(inactive))
            .transpose()?,
    }))
}

fn backup(domain: &Domain) -> Result<Option<String>, Error> {
    // SAFETY: the pointer is that of a domain which lives until the call is over; libvirt takes only numbers besides.
    let text = unsafe { sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0) };
    if text.is_null() {
        let error = Error::last_error();
        let none = [
            ErrorNumber::NoDomainBackup,
            ErrorNumber::NoSupport,
            ErrorNumber::OperationInvalid,
        ];
        return if none.into_iter().any(|number| error.code() == number.into()) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    // SAFETY: libvirt returns text that ends with a zero, and whose only owner is the caller.
    let xml = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: it was allocated by malloc, is not used after this, and freed once.
    unsafe { libc::free(text.cast()) };
    Ok(Some(xml))
}
