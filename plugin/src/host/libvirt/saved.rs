//! VMs that were saved to a file with their memory: libvirt has the XML of its own such files, and only the reason for others.

use std::ffi::CStr;

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

/// The XML in the managed save of a domain that has one.
pub(super) fn managed_xml(domain: &Domain) -> Result<Option<String>, Error> {
    if !domain.has_managed_save(0)? {
        return Ok(None);
    }
    // SAFETY: the pointer is that of a domain which lives until the call is over; libvirt takes only numbers besides.
    let text = unsafe { sys::virDomainManagedSaveGetXMLDesc(domain.as_ptr(), 0) };
    if text.is_null() {
        // It may have been started meanwhile: then it has none.
        let error = Error::last_error();
        return if domain.has_managed_save(0)? {
            Err(error)
        } else {
            Ok(None)
        };
    }
    // SAFETY: libvirt returns text that ends with a zero, and whose only owner is the caller.
    let xml = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: it was allocated by malloc, is not used after this, and freed once.
    unsafe { libc::free(text.cast()) };
    Ok(Some(xml))
}

/// Whether the domain is off because it was saved to a file that is not libvirt's own: as long as libvirt remembers.
pub(super) fn is_in_a_file(domain: &Domain) -> Result<bool, Error> {
    let (mut state, mut reason) = (-1, -1);
    // SAFETY: both numbers outlive the call, which writes them.
    let got = unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) };
    if got < 0 {
        return Err(Error::last_error());
    }
    let is = |number: i32, named: u32| u32::try_from(number) == Ok(named);
    Ok(is(state, sys::VIR_DOMAIN_SHUTOFF)
        && is(reason, sys::VIR_DOMAIN_SHUTOFF_SAVED)
        && !domain.has_managed_save(0)?)
}
