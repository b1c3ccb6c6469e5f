//! VMs and their volumes.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

/// One object of a VM, as `virtseal vm status` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ObjectView {
    /// `disk vda`, `vtpm`, `nvram`.
    pub object: String,
    /// sealed, plain, or what is wrong.
    pub state: String,
    /// The image or state file.
    pub path: Option<String>,
    /// The envelope's UUID.
    pub envelope: Option<String>,
    /// The envelope's generation.
    pub generation: Option<i64>,
    /// Whether the keystore has it, or only a copy that anyone may have written.
    pub generation_verified: bool,
    /// The providers that can open it.
    pub providers: Vec<String>,
    /// The other VMs that root has let have it too.
    pub shared_with: Vec<String>,
}

/// A VM, as `virtseal vm status` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The provider without which one of its objects does not open.
    pub depends_on: Option<String>,
    /// running, off, or undefined (known to virtseal only).
    pub power: String,
    /// sealed, plain, mixed, undefined, or what is wrong.
    pub state: String,
    /// Its objects.
    pub objects: Vec<ObjectView>,
    /// What the admin should know besides, with what to run next.
    pub warnings: Vec<String>,
}

/// Reply with VMs.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Vms {
    /// In the order of their names.
    pub vms: Vec<VmView>,
    /// What to ask for those after these, if there are more.
    pub next: Option<String>,
}

/// Reply of `vm seal` and `vm unseal`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Outcome {
    /// What was done, or would be.
    pub steps: Vec<String>,
    /// What the admin should know besides.
    pub warnings: Vec<String>,
    /// Whether anything changed.
    pub changed: bool,
}

/// One thing that `vm shred` came to.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ReceiptLine {
    /// The KEK, image, XML or record.
    pub what: String,
    /// Whether it is gone.
    pub destroyed: bool,
    /// What was seen.
    pub observed: String,
}

/// What `vm shred` of a VM would come to.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct ShredPreview {
    /// Its UUID: what is called so when the name was typed may be another VM.
    pub vm: String,
    /// Its name, which is to be typed.
    pub name: String,
    /// What would stay, because the VM is not defined here and may need it elsewhere, unless the name is typed for it too.
    pub kept_for_others: Vec<String>,
}

/// Reply of `vm shred`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Receipt {
    /// The VM.
    pub vm: String,
    /// What was destroyed, and what was not.
    pub lines: Vec<ReceiptLine>,
    /// What may survive elsewhere.
    pub survives: Vec<String>,
}

/// What a new volume should be.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct VolumeRequest {
    /// Where; absolute.
    pub path: String,
    /// Its virtual size in bytes; may be left out where `from` or `backing` has one.
    pub size: Option<u64>,
    /// The VM that it is for: name or UUID.
    pub vm: String,
    /// qcow2 cluster size in bytes.
    pub cluster_size: Option<u64>,
    /// The image below it; absolute.
    pub backing: Option<String>,
    /// That image's format.
    pub backing_format: Option<String>,
    /// The image to fill it from; absolute.
    pub from: Option<String>,
    /// That image's format: what libvirt has for it, else what it shows, if left out.
    pub from_format: Option<String>,
    /// Another provider than the default one.
    pub provider: Option<String>,
}

/// A step towards a volume; the last one has the envelope.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct VolumeProgress {
    /// 0 to 100.
    pub percent: f64,
    /// The envelope's UUID, once it is active.
    pub envelope: Option<String>,
    /// The virtual size in bytes.
    pub size: Option<u64>,
}
