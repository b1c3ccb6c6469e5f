//! VMs and their volumes.

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use crate::model::finding::{Finding, Severity};

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub enum VmPower {
    /// It runs.
    Running,
    /// It is defined, and does not run.
    Off,
    /// virtseal alone knows it.
    Undefined,
}

/// How a VM stands as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub enum VmState {
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
}

/// How an object of a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub enum ObjectStanding {
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
    /// No provider here opens it; the detail has why.
    Locked,
    /// Of a VM that is not defined: its object was made.
    Active,
    /// Of a VM that is not defined: its object may not have been made.
    Pending,
}

/// Something that the admin should know of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub struct FindingView {
    /// How much it matters.
    pub severity: Severity,
    /// `host`, `provider NAME`, `VM NAME`, or `VM NAME, OBJECT`.
    pub subject: String,
    /// What is wrong.
    pub what: String,
    /// The next command to run, if that is a step of its own.
    pub next: Option<String>,
}

/// One object of a VM, as `virtseal vm status` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ObjectView {
    /// `disk vda`, `vtpm`, `nvram`.
    pub object: String,
    /// Whether it is sealed, or what is wrong.
    pub state: ObjectStanding,
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
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The provider without which one of its objects does not open.
    pub depends_on: Option<String>,
    /// Whether it runs.
    pub power: VmPower,
    /// Whether it is sealed, or what is wrong.
    pub state: VmState,
    /// Its objects.
    pub objects: Vec<ObjectView>,
    /// What the admin should know besides, with what to run next.
    pub warnings: Vec<FindingView>,
}

impl VmPower {
    /// In words.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Off => "off",
            Self::Undefined => "undefined",
        }
    }
}

impl ObjectView {
    /// How it stands, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let detail = self.detail.as_deref().unwrap_or_default();
        match self.state {
            ObjectStanding::Sealed => "sealed",
            ObjectStanding::NotUsedYet => "sealed, not used yet",
            ObjectStanding::NotInXml => "sealed, but the XML does not say so",
            ObjectStanding::Detached => "sealed, not in the XML",
            ObjectStanding::Plain => "plain",
            ObjectStanding::OfAnotherVm => return format!("of another VM ({detail})"),
            ObjectStanding::StateGone => "state gone",
            ObjectStanding::NoState => "no state here, and not known whether there was one",
            ObjectStanding::FileMissing => "file missing",
            ObjectStanding::PlainInside => "not encrypted, though the XML says so",
            ObjectStanding::OtherEnvelope => {
                return format!("not the object that the XML names: it has envelope {detail}");
            }
            ObjectStanding::EnvelopeMissing => "envelope missing",
            ObjectStanding::NotOurs => "encrypted, but not by virtseal",
            ObjectStanding::Unsupported | ObjectStanding::Unreadable => detail,
            ObjectStanding::Locked => return format!("locked: {detail}"),
            ObjectStanding::Active => "active",
            ObjectStanding::Pending => "pending",
        }
        .to_owned()
    }
}

impl FindingView {
    /// Of each of these.
    #[must_use]
    pub fn all(findings: &[Finding]) -> Vec<Self> {
        findings.iter().map(Self::from).collect()
    }
}

impl From<&Finding> for FindingView {
    fn from(finding: &Finding) -> Self {
        Self {
            severity: finding.severity,
            subject: finding.subject.to_string(),
            what: finding.what.clone(),
            next: finding.advice.as_ref().map(ToString::to_string),
        }
    }
}

impl fmt::Display for FindingView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity.as_str(), self.what)?;
        match &self.next {
            Some(next) => write!(f, ". Next: {next}"),
            None => Ok(()),
        }
    }
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

#[cfg(test)]
impl VmView {
    /// A sealed VM that is off.
    pub(crate) fn fixture(name: &str, uuid: u128) -> Self {
        Self {
            name: name.to_owned(),
            uuid: uuid::Uuid::from_u128(uuid).to_string(),
            depends_on: None,
            power: VmPower::Off,
            state: VmState::Sealed,
            objects: Vec::new(),
            warnings: Vec::new(),
        }
    }
}
