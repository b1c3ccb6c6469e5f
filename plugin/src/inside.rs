//! What the benchmark measures without the programs, and stories compare with libvirt. No interface for anybody else.

use std::path::{Path, PathBuf};

use anyhow::bail;
use serde_json::Value;

use crate::domain::{Domain, Firmware};
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, Payload, Stanza, VmId};
use crate::provider::kmip::{KmipProvider, NewIdentity, ServerTrust};
use crate::provider::native::NativeProvider;
use crate::provider::pkcs11::Pkcs11Provider;
use crate::provider::transit::TransitProvider;
use crate::provider::{KekScope, KeyProvider};
use crate::secret::{Dek, SecretBytes};
use crate::store::Stores;
use crate::vm::seal;

/// A kind of provider, with the settings that it takes as JSON.
#[derive(Debug)]
#[expect(missing_docs, reason = "the names of the settings say it")]
pub enum Kind {
    Native,
    Pkcs11 {
        settings: Value,
    },
    Transit {
        settings: Value,
    },
    Kmip {
        settings: Value,
        certificate: Vec<u8>,
        key: Vec<u8>,
        authority: String,
    },
}

/// DEKs of one VM, wrapped by an unlocked provider.
pub struct WrappedKeys {
    provider: Box<dyn KeyProvider>,
    credential: SecretBytes,
    stanzas: Vec<Stanza>,
}

impl WrappedKeys {
    /// Makes a provider with its store in `directory`, unlocks it with `credential`, and wraps `count` keys.
    pub fn new(directory: &Path, kind: Kind, credential: &[u8], count: usize) -> anyhow::Result<Self> {
        let table = Stores::open(directory)?.providers();
        let name = "bench".parse()?;
        let credential = secret(credential)?;
        let provider: Box<dyn KeyProvider> = match kind {
            Kind::Native => {
                let provider = NativeProvider::create(&table, &name, &credential)?;
                provider.confirm_backup(provider.backup(None)?.generation)?;
                Box::new(provider)
            }
            Kind::Pkcs11 { settings } => {
                let settings = serde_json::from_value(settings)?;
                Box::new(Pkcs11Provider::create(&table, &name, settings, &credential, &[])?)
            }
            Kind::Transit { settings } => {
                let provider = TransitProvider::create(&table, &name, serde_json::from_value(settings)?)?;
                provider.unlock(&credential)?;
                Box::new(provider)
            }
            Kind::Kmip {
                settings,
                certificate,
                key,
                authority,
            } => {
                let provider = KmipProvider::create(&table, &name, serde_json::from_value(settings)?)?;
                provider.set_identity(&NewIdentity {
                    certificate: secret(&certificate)?,
                    key: Some(secret(&key)?),
                    login: None,
                    passphrase: None,
                    by_tpm: None,
                    even_locked: false,
                })?;
                provider.trust(ServerTrust::Ca(authority))?;
                Box::new(provider)
            }
        };
        let vm = VmId::random();
        let kek = provider.create_kek(&KekScope::Vm(vm))?;
        let wrap = |_| {
            let binding = Binding {
                envelope: EnvelopeId::random(),
                vm,
                kind: ObjectKind::Disk,
            };
            Ok(provider.wrap(&kek, &Payload::bind(&Dek::random()?, &binding)?)?)
        };
        let stanzas = (0..count).map(wrap).collect::<anyhow::Result<_>>()?;
        Ok(Self {
            provider,
            credential,
            stanzas,
        })
    }

    /// The KEK's name at the provider.
    pub fn kek(&self) -> Option<&str> {
        self.stanzas.first().map(|stanza| stanza.kek.0.as_str())
    }

    /// Locks the provider and unlocks it again.
    pub fn unlock_again(&self) -> anyhow::Result<()> {
        self.provider.lock();
        Ok(self.provider.unlock(&self.credential)?)
    }

    /// Unwraps all keys with one call.
    pub fn unwrap(&self) -> anyhow::Result<()> {
        self.provider
            .unwrap_many(&self.stanzas.iter().collect::<Vec<_>>())?;
        Ok(())
    }
}

fn secret(text: &[u8]) -> anyhow::Result<SecretBytes> {
    Ok(SecretBytes::take(&mut text.to_vec())?)
}

/// A loader and the template of a variable store.
pub type LoaderAndTemplate = (Option<PathBuf>, Option<PathBuf>);

/// What the XML of a domain has of both.
pub fn declared_firmware(xml: &str) -> anyhow::Result<LoaderAndTemplate> {
    let Firmware::Uefi(uefi) = Domain::parse(xml)?.firmware else {
        bail!("not a UEFI VM: {xml}");
    };
    Ok((uefi.loader, uefi.nvram.and_then(|nvram| nvram.template)))
}

/// What sealing writes into the XML of a domain that leaves libvirt the choice.
///
/// # Errors
/// Where nothing fits for certain.
pub fn chosen_firmware(xml: &str) -> anyhow::Result<LoaderAndTemplate> {
    let (loader, template) = seal::firmware_of(&Domain::parse(xml)?)?;
    Ok((loader, Some(template)))
}
