//! What the things that are done to a VM work with: gathered once, so that all of one command sees the same.

use std::path::{Path, PathBuf};

use crate::config::Policies;
use crate::host::libvirt::{Background, KeptXml};
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::{Envelope, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, Layer, VolumeError};
use crate::object::{Located, OpenedHeaders, Opening};
use crate::recipients::Recipients;
use crate::secret::{Dek, Passphrase};
use crate::store::{EnvelopeRecord, EnvelopeStore, HostStore, StoreError};
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::confirmed_formats::ConfirmedFormats;

/// This host, as one command finds it.
pub(crate) struct Host<'a> {
    pub keystore: &'a dyn EnvelopeStore,
    /// What is of this host alone.
    pub host_store: &'a HostStore,
    /// What wraps them.
    pub recipients: &'a Recipients,
    /// The connection that no start needs.
    pub libvirt: &'a Background,
    /// Which headers need not be opened again.
    pub opened_headers: &'a OpenedHeaders,
    pub swtpm_dir: PathBuf,
    /// Where libvirt keeps variable stores.
    pub nvram_dir: PathBuf,
    /// What an admin says of the formats of the disks.
    pub confirmed: ConfirmedFormats,
    /// What an admin lets a seal make anew.
    pub accepted: AcceptedLosses,
    /// What the host lets VMs do beside their sealed objects.
    pub policies: Policies,
    /// Where files may be that the XML names.
    pub paths: PathRule,
    /// What libvirt has of all VMs.
    pub kept: Vec<KeptXml>,
}

impl Host<'_> {
    /// A path that the XML of `vm` names, and that the keystore may know.
    pub(crate) fn permit_known(&self, vm: VmId, path: &Path) -> Result<PermittedPath, Problem> {
        Ok(self.place_of(vm, path)??)
    }

    /// The same, for who has something else to say of a path that is not permitted.
    pub(crate) fn place_of(
        &self,
        vm: VmId,
        path: &Path,
    ) -> Result<Result<PermittedPath, PathError>, StoreError> {
        let records = self.keystore.envelopes_of(vm)?.sound;
        let known = records.iter().map(|record| &record.location);
        Ok(self.paths.permit_known(path, known))
    }

    /// The layers of an image of `vm` from the top, as far as they are where it may have some, and why there are no more.
    pub(crate) fn layers_of(
        &self,
        vm: VmId,
        top: &PermittedPath,
    ) -> Result<(Vec<Layer>, Option<VolumeError>), StoreError> {
        let records = self.keystore.envelopes_of(vm)?.sound;
        let known = || records.iter().map(|record| &record.location);
        Ok(disk::known_layers(top, |path| {
            Ok(self.paths.permit_known(path, known())?)
        }))
    }

    /// The place of an object that the keystore has, as long as no link of others leads elsewhere.
    pub(crate) fn known_place(&self, path: &Path) -> Result<PermittedPath, PathError> {
        self.paths.permit_known(path, std::iter::once(path))
    }

    /// The object of an envelope, by where the keystore or its VM has it; none for an image that has no path on this host.
    pub(crate) fn located(&self, envelope: &Envelope, path: &Path) -> Result<Option<Located>, Problem> {
        let path = Some(path).filter(|path| !path.as_os_str().is_empty());
        let records = self.keystore.envelopes_of(envelope.vm)?.sound;
        let known = records.iter().map(|record| &record.location);
        let permit = |path: &Path| self.paths.permit_known(path, known);
        Ok(Located::of(
            envelope.kind,
            envelope.vm,
            path,
            &self.swtpm_dir,
            permit,
        )?)
    }

    /// Really opens what is at `path`, or a vTPM's state if there is any, with the key of its envelope.
    pub(crate) fn open_object(
        &self,
        envelope: &Envelope,
        path: &Path,
        dek: &Dek,
    ) -> Result<Opening, Problem> {
        let passphrase = passphrase(dek)?;
        Ok(match self.located(envelope, path)? {
            Some(object) => self.opened_headers.open(&object, envelope, &passphrase)?,
            None => Opening::Opened,
        })
    }

    /// What opens the object of `record`, or why nobody has it now.
    pub(crate) fn passphrase_of(&self, record: &EnvelopeRecord) -> Result<Passphrase, String> {
        let opened = self.recipients.open_envelope(&record.envelope);
        let dek = opened.map_err(|error| error.reasons())?;
        dek.passphrase().map_err(|error| chain(&error))
    }

    /// Where libvirt has the variable store of the VM `name`, unless its XML says otherwise.
    pub(super) fn own_store(&self, name: &str) -> PathBuf {
        self.nvram_dir.join(format!("{name}_VARS.fd"))
    }
}

/// What QEMU and swtpm open an object with.
pub(crate) fn passphrase(dek: &Dek) -> Result<Passphrase, Problem> {
    dek.passphrase()
        .map_err(|error| Problem::from_error(Code::Failed, "no memory for a key", &error))
}
