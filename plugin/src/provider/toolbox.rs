//! What more than one kind of provider is built with.

pub(super) mod certificate_request;
pub(crate) mod deadline;
pub(super) mod gcm;
pub(super) mod kek_name;
pub(super) mod locks;
pub(super) mod revocation;
pub(super) mod timed;
pub(super) mod tpm_key;
