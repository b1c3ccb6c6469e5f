//! Domain XML of many makers, read, sealed and unsealed: what is not ours keeps its bytes.

mod any;
mod metadata;
mod read;
mod seal;
mod start;

use std::fs;
use std::path::Path;

use crate::domain::edit::{DiskEdit, LoaderPin, NvramEdit, SealEdit, VtpmEdit, seal};
use crate::domain::{Domain, ObjectRef, Policy, Refusal, objects, sealed_objects_under};
use crate::model::envelope::{
    Binding, Envelope, EnvelopeId, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId,
};
use crate::secret::Dek;
use uuid::Uuid;

/// What a start needs a DEK for where the policy allows nothing more.
fn sealed_objects(domain: &Domain) -> Result<Vec<ObjectRef>, Refusal> {
    sealed_objects_under(domain, Policy::default())
}

/// Every file in `tests/domains`, with its name.
fn fixtures() -> Vec<(String, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/domains");
    let mut files: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|path| path.is_file());
    files.sort();
    assert!(files.len() >= 7, "fixtures are missing");
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    files
        .iter()
        .map(|path| (name(path), fs::read_to_string(path).unwrap()))
        .collect()
}

fn fixture(name: &str) -> String {
    let found = fixtures().into_iter().find(|(found, _)| found == name);
    found.unwrap().1
}

/// The same id for the same number, so that a plan can be made again.
fn id(number: u128) -> EnvelopeId {
    EnvelopeId(Uuid::from_u128(
        0xe000_0000_0000_4000_8000_0000_0000_0000 + number,
    ))
}

fn envelope(vm: VmId, id: EnvelopeId, kind: ObjectKind) -> Envelope {
    let stanza = Stanza {
        provider: ProviderId(Uuid::from_u128(9)),
        provider_name: "main <\"'&]]>\u{1}ä\u{1F600}\u{fffe}".into(),
        kek: KekId("kek/1".into()),
        mechanism: "A256GCM".into(),
        body: vec![7; 92],
    };
    let binding = Binding {
        envelope: id,
        vm,
        kind,
    };
    let dek = Dek::from_bytes(&[7; Dek::LEN]).unwrap();
    Verified::new(&binding, vec![stanza], &dek)
        .unwrap()
        .into_envelope()
}

/// What sealing everything that can be sealed takes.
struct Plan {
    disks: Vec<DiskEdit>,
    nvram: Option<NvramEdit>,
    vtpm: Option<VtpmEdit>,
    envelopes: Vec<Envelope>,
}

impl Plan {
    fn of(domain: &Domain) -> Self {
        let mut plan = Self {
            disks: Vec::new(),
            nvram: None,
            vtpm: Some(VtpmEdit {
                envelope: id(100),
                instead_of: None,
            }),
            envelopes: vec![envelope(domain.uuid, id(100), ObjectKind::Vtpm)],
        };
        for (object, number) in objects(domain).iter().zip(1..) {
            if object.kind != ObjectKind::Vtpm {
                plan.envelopes
                    .push(envelope(domain.uuid, id(number), object.kind));
            }
            match object.kind {
                ObjectKind::Disk => plan.disks.push(DiskEdit {
                    target: object.label.strip_prefix("disk ").unwrap().to_owned(),
                    envelope: id(number),
                    instead_of: None,
                }),
                ObjectKind::Nvram => plan.nvram = Some(nvram_edit(domain, id(number))),
                ObjectKind::Vtpm => {}
            }
        }
        plan
    }

    fn edit(&self) -> SealEdit<'_> {
        SealEdit {
            disks: self.disks.clone(),
            nvram: self.nvram.clone(),
            vtpm: self.vtpm,
            envelopes: &self.envelopes,
        }
    }
}

fn nvram_edit(domain: &Domain, envelope: EnvelopeId) -> NvramEdit {
    NvramEdit {
        path: format!("/var/lib/libvirt/qemu/nvram/{}_VARS.luks", domain.name).into(),
        template: Some("/usr/share/OVMF/OVMF_VARS_4M.fd".into()),
        format: None,
        envelope,
        instead_of: None,
        loader: Some(LoaderPin {
            path: "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into(),
            secure: true,
        }),
    }
}

fn seal_all(xml: &str) -> String {
    seal(xml, &Plan::of(&Domain::parse(xml).unwrap()).edit()).unwrap()
}
