//! The records of a VM as the text of a file.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::envelope::{Envelope, EnvelopeError, KekId, ProviderId, VmId};
use crate::store::{EnvelopeRecord, EnvelopeState, Mark, RetiredKek, SavedState, VmRecord};

const FORMAT: &str = "virtseal-forgotten";
const VERSION: u32 = 1;

/// What was said of the objects when their records were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// They may be elsewhere, or come back.
    Elsewhere,
    /// They are deleted.
    Deleted,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Forgotten {
    pub vm: VmRecord,
    pub said: Said,
    /// What it counted as.
    pub mark: Mark,
    pub objects: Vec<EnvelopeRecord>,
    /// KEKs that wrapped something of it before.
    pub retired: Vec<RetiredKek>,
    /// The file that it was saved to, which needs older copies of its envelopes.
    pub saved: Option<SavedState>,
    /// Its rows that could not be read, as they were. They are for whoever mends them by hand.
    pub damaged: Vec<serde_json::Value>,
}

/// Why a text does not say what was forgotten.
#[derive(Debug, Error)]
pub(crate) enum DocumentError {
    #[error("it is not a file of forgotten records")]
    Format(#[source] serde_json::Error),
    #[error("it has version {0}, this virtseal reads {VERSION}: upgrade virtseal")]
    Version(u32),
    #[error("envelope {0} in it is damaged")]
    Envelope(String, #[source] EnvelopeError),
    #[error("it has records of VM {found} among those of VM {expected}")]
    OtherVm { expected: VmId, found: VmId },
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: String,
    version: u32,
    vm: VmId,
    name: String,
    sealed_at: i64,
    vtpm_seen: bool,
    /// A file without it is of a sealed VM, as far as anybody knows.
    #[serde(default)]
    plain: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    deleted: bool,
    objects: Vec<Object>,
    #[serde(default)]
    retired_keks: Vec<Retired>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    saved: Option<Saved>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    damaged: Vec<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    since: i64,
    envelopes: Vec<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
struct Object {
    /// For the reader; the text is what counts.
    id: String,
    envelope: serde_json::Value,
    pending: bool,
    location: String,
    created: i64,
    updated: i64,
}

#[derive(Serialize, Deserialize)]
struct Retired {
    provider: ProviderId,
    kek: KekId,
}

impl Forgotten {
    pub(crate) fn to_json(&self) -> String {
        let objects = self.objects.iter().map(|record| Object {
            id: record.envelope.id.to_string(),
            envelope: json_of(&record.envelope),
            pending: record.state == EnvelopeState::Pending,
            location: record.location.clone(),
            created: record.created,
            updated: record.updated,
        });
        let document = Document {
            format: FORMAT.to_owned(),
            version: VERSION,
            vm: self.vm.vm,
            name: self.vm.name.clone(),
            sealed_at: self.vm.sealed_at,
            vtpm_seen: self.vm.vtpm_seen,
            plain: self.mark == Mark::Plain,
            deleted: self.said == Said::Deleted,
            objects: objects.collect(),
            damaged: self.damaged.clone(),
            saved: self.saved.as_ref().map(|saved| Saved {
                since: saved.since,
                envelopes: saved.envelopes.iter().map(json_of).collect(),
            }),
            retired_keks: self
                .retired
                .iter()
                .map(|retired| Retired {
                    provider: retired.provider,
                    kek: retired.kek.clone(),
                })
                .collect(),
        };
        serde_json::to_string_pretty(&document).expect("it holds only texts and numbers") + "\n"
    }

    /// Reads what [`Forgotten::to_json`] wrote. Whether its envelopes open is the caller's to find out.
    pub(crate) fn from_json(text: &[u8]) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(text).map_err(DocumentError::Format)?;
        if head.format != FORMAT {
            let other = serde::de::Error::custom(format!("its format is {:?}", head.format));
            return Err(DocumentError::Format(other));
        }
        if head.version != VERSION {
            return Err(DocumentError::Version(head.version));
        }
        let document: Document = serde_json::from_slice(text).map_err(DocumentError::Format)?;
        let vm = document.vm;
        let objects = document.objects.into_iter().map(|object| object.read(vm));
        let saved = document.saved.map(|saved| saved.read(vm)).transpose()?;
        Ok(Self {
            mark: match document.plain {
                true => Mark::Plain,
                false => Mark::Sealed,
            },
            said: match document.deleted {
                true => Said::Deleted,
                false => Said::Elsewhere,
            },
            saved,
            objects: objects.collect::<Result<_, _>>()?,
            damaged: document.damaged,
            retired: document
                .retired_keks
                .into_iter()
                .map(|retired| RetiredKek {
                    vm,
                    provider: retired.provider,
                    kek: retired.kek,
                })
                .collect(),
            vm: VmRecord {
                vm,
                name: document.name,
                sealed_at: document.sealed_at,
                vtpm_seen: document.vtpm_seen,
            },
        })
    }
}

fn json_of(envelope: &Envelope) -> serde_json::Value {
    serde_json::to_value(envelope).expect("an envelope holds only strings, numbers and lists")
}

fn envelope_of(json: &serde_json::Value, which: &str) -> Result<Envelope, DocumentError> {
    Envelope::from_json(&json.to_string()).map_err(|source| DocumentError::Envelope(which.to_owned(), source))
}

impl Saved {
    /// Its envelopes are of any VM whose disks it had.
    fn read(self, vm: VmId) -> Result<SavedState, DocumentError> {
        let envelopes = self.envelopes.iter();
        let envelopes = envelopes.map(|envelope| envelope_of(envelope, "of a saved state"));
        Ok(SavedState {
            vm,
            since: self.since,
            envelopes: envelopes.collect::<Result<_, _>>()?,
        })
    }
}

impl Object {
    fn read(self, vm: VmId) -> Result<EnvelopeRecord, DocumentError> {
        let envelope = envelope_of(&self.envelope, &self.id)?;
        if envelope.vm != vm {
            return Err(DocumentError::OtherVm {
                expected: vm,
                found: envelope.vm,
            });
        }
        Ok(EnvelopeRecord {
            envelope,
            state: match self.pending {
                true => EnvelopeState::Pending,
                false => EnvelopeState::Active,
            },
            location: self.location,
            created: self.created,
            updated: self.updated,
        })
    }
}
