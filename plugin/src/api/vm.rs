//! VMs and their volumes.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use super::{FindingView, OrNewer, words};
use crate::domain::DeclaredFormat;
use crate::model::advice::Advice;

/// What an admin says that a disk is.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub(crate) struct DiskFormat {
    /// `vda`.
    pub target: String,
    pub format: DeclaredFormat,
}

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum VmPower {
    /// It runs.
    Running,
    /// It is defined, and does not run.
    Off,
    /// It does not run, and its next start goes on from a managed save.
    Saved,
    /// virtseal alone knows it.
    Undefined,
    /// libvirt can't be asked.
    Unknown,
}

/// Who starts a VM with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum VmAutostart {
    /// Nobody.
    No,
    /// virtseald, once its providers are ready.
    Virtseald,
    /// libvirt.
    Libvirt,
}

/// How a VM stands as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum VmState {
    /// All of it.
    Sealed,
    /// Nothing of it.
    Plain,
    /// Its XML has objects that are sealed, and others.
    Mixed,
    /// virtseal alone knows it.
    Undefined,
    /// Something of it is sealed, and its XML does not say so.
    NotInXml,
    /// Its XML can't be read.
    Unreadable,
    /// libvirt can't be asked for its XML.
    Unknown,
}

/// Whether a VM would start now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum StartOutlook {
    /// As far as that shows before its objects are opened.
    Yes,
    No,
    /// It can't be told; the reason says why.
    Unknown,
}

/// Whether a VM would start now, by what a start decides before it asks for a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct StartView {
    /// What would come of it.
    pub outlook: OrNewer<StartOutlook>,
    /// Why not, or why that is not known.
    pub why: Option<String>,
    /// The next command to run.
    pub next: Option<String>,
}

impl StartView {
    pub(crate) fn yes() -> Self {
        Self {
            outlook: StartOutlook::Yes.into(),
            why: None,
            next: None,
        }
    }

    pub(crate) fn no(why: impl Into<String>, next: Option<&Advice>) -> Self {
        Self {
            outlook: StartOutlook::No.into(),
            why: Some(why.into()),
            next: next.map(ToString::to_string),
        }
    }

    pub(crate) fn unknown(why: impl Into<String>) -> Self {
        Self {
            outlook: StartOutlook::Unknown.into(),
            ..Self::no(why, None)
        }
    }
}

/// How an object of a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum ObjectStanding {
    /// Encrypted with a key that this VM gets.
    Sealed,
    /// The same, and swtpm will make the state at the first start.
    NotUsedYet,
    /// The same, and the XML does not say so.
    NotInXml,
    /// Sealed, and the XML does not name it in any way.
    Detached,
    /// Not encrypted.
    Plain,
    /// The detail has the VM's UUID.
    OfAnotherVm,
    /// The vTPM was used, and has no state.
    StateGone,
    /// The vTPM has no state, and nobody here knows whether it had one.
    NoState,
    /// There is no such file.
    FileMissing,
    /// The XML says that it is encrypted, and it is not.
    PlainInside,
    /// It was made with another envelope than the XML names; the detail has its UUID.
    OtherEnvelope,
    /// Neither the keystore nor the XML has its envelope.
    EnvelopeMissing,
    /// Encrypted, with a key that nobody here knows.
    NotOurs,
    /// The detail has why it can't be sealed.
    Unsupported,
    /// The detail has why it can't be told.
    Unreadable,
    /// The detail has why root does not look there.
    NotLookedAt,
    /// No provider here opens it; the detail has why.
    Locked,
    /// Of a VM that is not defined: its object was made.
    Active,
    /// Of a VM that is not defined: its object may not have been made.
    Pending,
}

/// One object of a VM, as `virtseal vm status` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct ObjectView {
    /// `disk vda`, `vtpm`, `nvram`.
    pub object: String,
    /// Whether it is sealed, or what is wrong.
    pub state: OrNewer<ObjectStanding>,
    /// What there is to say of that.
    pub detail: Option<String>,
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct VmView {
    pub name: String,
    pub uuid: String,
    /// The provider without which one of its objects does not open.
    pub depends_on: Option<String>,
    /// Whether it runs.
    pub power: OrNewer<VmPower>,
    /// Who starts it with the host.
    pub autostart: OrNewer<VmAutostart>,
    /// Whether it would start now; of one that runs, whether it would start again.
    pub starts: StartView,
    /// Whether it is sealed, or what is wrong.
    pub state: OrNewer<VmState>,
    pub objects: Vec<ObjectView>,
    /// What the admin should know besides, with what to run next.
    pub warnings: Vec<FindingView>,
}

impl ObjectView {
    /// How it stands, in words.
    pub(crate) fn words(&self) -> String {
        let detail = self.detail.as_deref().unwrap_or_default();
        let Some(state) = self.state.known() else {
            return self.state.to_string();
        };
        match state {
            ObjectStanding::NotUsedYet => "sealed, not used yet",
            ObjectStanding::NotInXml => "sealed, but the XML does not say so",
            ObjectStanding::Detached => "sealed, not in the XML",
            ObjectStanding::OfAnotherVm => return format!("of another VM ({detail})"),
            ObjectStanding::NoState => "no state here, and not known whether there was one",
            ObjectStanding::PlainInside => "not encrypted, though the XML says so",
            ObjectStanding::OtherEnvelope => {
                return format!("not the object that the XML names: it has envelope {detail}");
            }
            ObjectStanding::NotOurs => "encrypted, but not by virtseal",
            ObjectStanding::Unsupported | ObjectStanding::Unreadable => detail,
            ObjectStanding::NotLookedAt => return format!("not looked at: {detail}"),
            ObjectStanding::Locked => return format!("locked: {detail}"),
            ObjectStanding::Sealed
            | ObjectStanding::Plain
            | ObjectStanding::StateGone
            | ObjectStanding::FileMissing
            | ObjectStanding::EnvelopeMissing
            | ObjectStanding::Active
            | ObjectStanding::Pending => return words(&state),
        }
        .to_owned()
    }
}

/// Reply with VMs.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Vms {
    /// In the order of their names.
    pub vms: Vec<VmView>,
    /// What to ask for those after these, if there are more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(skip))]
    pub next: Option<String>,
}

/// One thing that `vm shred` came to.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct ReceiptLine {
    /// The KEK, image, XML or record.
    pub what: String,
    /// Whether it is gone.
    pub destroyed: bool,
    /// What was seen.
    pub observed: String,
}

/// What `vm shred` of a VM would come to.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct ShredPreview {
    /// Its UUID: what is called so when the name was typed may be another VM.
    pub vm: String,
    /// Its name, which is to be typed.
    pub name: String,
    /// What would stay, because the VM is not defined here and may need it elsewhere, unless the name is typed for it too.
    pub kept_for_others: Vec<String>,
}

/// Reply of `vm shred`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Receipt {
    pub vm: String,
    /// What was destroyed, and what was not.
    pub lines: Vec<ReceiptLine>,
    /// What may survive elsewhere.
    pub survives: Vec<FindingView>,
}

#[cfg(test)]
impl VmView {
    /// A sealed VM that is off.
    pub(crate) fn fixture(name: &str, uuid: u128) -> Self {
        Self {
            name: name.to_owned(),
            uuid: uuid::Uuid::from_u128(uuid).to_string(),
            depends_on: None,
            power: VmPower::Off.into(),
            autostart: VmAutostart::No.into(),
            starts: StartView::yes(),
            state: VmState::Sealed.into(),
            objects: Vec::new(),
            warnings: Vec::new(),
        }
    }
}
