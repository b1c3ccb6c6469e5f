//! What a command does: a word for programs, and words for people, who are told the same before it and after.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::envelope::EnvelopeId;

/// What a step comes to, as a word for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum StepCode {
    // What is sealed.
    /// An envelope is taken over, with the image that carries it if there is one.
    Adopt,
    /// Something encrypted is made where there was nothing, or a template.
    Create,
    /// Something encrypted is made in the place of what was lost.
    Renew,
    /// What it has stays, and is encrypted.
    Encrypt,
    /// An empty image gives way to an encrypted one.
    ReplaceByEncrypted,
    /// An encrypted one gives way to a plain one.
    ReplaceByPlain,
    /// The XML names again what was sealed.
    TakeBack,
    /// libvirt keeps the state of the vTPM from now on.
    PersistState,
    /// The XML says the format that the file has.
    SetFormat,
    /// The XML names the file of a pool's volume.
    NameFile,
    /// The XML names the loader that libvirt would choose.
    PinLoader,
    /// New keys are for these providers.
    WrapFor,
    /// Nothing is written to it.
    LeaveAsIs,
    /// What gives way stays under another name.
    KeepOld,
    Grow,
    Shrink,
    /// The keystore learns where it is now.
    NotePath,

    // Overlays and snapshots.
    /// What overlays have goes down into the sealed image.
    MergeOverlays,
    /// What overlays have is lost.
    DropOverlays,
    /// The files of overlays stay, in plaintext.
    LeaveOverlayFiles,
    RemoveOverlayFiles,
    /// libvirt forgets what it can't revert to.
    ForgetSnapshots,

    // VMs and their volumes.
    /// libvirt gets the new XML.
    Redefine,
    /// A VM of which nothing is encrypted may start.
    Unmark,
    /// The keystore's records of a VM can be read again.
    RepairRecords,
    /// What this host knows of it goes into a file.
    Forget,
    /// Another VM gets the volume too.
    Share,
    /// It does not get it any more.
    Unshare,
    /// virtseald starts the VM with this host.
    AutostartByVirtseald,
    /// libvirt starts it with this host.
    AutostartByLibvirt,
    /// virtseald does not start it with this host any more.
    NoAutostartByVirtseald,
    /// libvirt does not start it with this host any more.
    NoAutostartByLibvirt,

    // The host.
    DeleteProvider,
    BackUpState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Adopt,
    Create,
    Encrypt,
    Grow,
    Have,
    Keep,
    Leave,
    Let,
    Merge,
    Name,
    Note,
    Redefine,
    Remove,
    Replace,
    Shrink,
    Take,
    Write,
}

/// Whether it is still to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tense {
    Planned,
    Done,
}

/// One step of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Act {
    pub code: StepCode,
    /// None where `what` is a sentence, which is told only once it is true.
    verb: Option<Verb>,
    what: String,
    /// The object of the VM that it is about: `disk vda`, `vtpm`, `nvram`.
    pub object: Option<String>,
    /// The files that it is about.
    pub paths: Vec<String>,
    pub envelope: Option<EnvelopeId>,
}

impl StepCode {
    /// A step that is told by a sentence of its own, once it is done.
    pub(crate) fn told(self, sentence: impl Into<String>) -> Act {
        Act::new(self, None, sentence.into())
    }
}

impl Verb {
    /// `what` follows the verb.
    pub(crate) fn act(self, code: StepCode, what: impl Into<String>) -> Act {
        Act::new(code, Some(self), what.into())
    }

    /// In the infinitive, and in the past.
    fn forms(self) -> (&'static str, &'static str) {
        match self {
            Self::Add => ("add", "added"),
            Self::Adopt => ("adopt", "adopted"),
            Self::Create => ("create", "created"),
            Self::Encrypt => ("encrypt", "encrypted"),
            Self::Grow => ("grow", "grew"),
            Self::Have => ("have", "had"),
            Self::Keep => ("keep", "kept"),
            Self::Leave => ("leave", "left"),
            Self::Let => ("let", "let"),
            Self::Merge => ("merge", "merged"),
            Self::Name => ("name", "named"),
            Self::Note => ("note", "noted"),
            Self::Redefine => ("redefine", "redefined"),
            Self::Remove => ("remove", "removed"),
            Self::Replace => ("replace", "replaced"),
            Self::Shrink => ("shrink", "shrank"),
            Self::Take => ("take", "took"),
            Self::Write => ("write", "wrote"),
        }
    }
}

impl Act {
    fn new(code: StepCode, verb: Option<Verb>, what: String) -> Self {
        Self {
            code,
            verb,
            what,
            object: None,
            paths: Vec::new(),
            envelope: None,
        }
    }

    /// About this object of the VM.
    pub(crate) fn on(self, object: impl Into<String>) -> Self {
        Self {
            object: Some(object.into()),
            ..self
        }
    }

    /// About this file, too.
    pub(crate) fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.paths.push(path.as_ref().display().to_string());
        self
    }

    pub(crate) fn with(self, envelope: EnvelopeId) -> Self {
        Self {
            envelope: Some(envelope),
            ..self
        }
    }

    pub(crate) fn told(&self, tense: Tense) -> String {
        match (self.verb.map(Verb::forms), tense) {
            (Some((infinitive, _)), Tense::Planned) => format!("would {infinitive} {}", self.what),
            (Some((_, past)), Tense::Done) => format!("{past} {}", self.what),
            (None, _) => self.what.clone(),
        }
    }
}

/// In the infinitive, as after "can't".
impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.verb {
            Some(verb) => write!(f, "{} {}", verb.forms().0, self.what),
            None => f.write_str(&self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_will_be_done_is_not_told_as_done() {
        let act = Verb::Take.act(StepCode::TakeBack, "the encrypted TPM back");
        assert_eq!(act.told(Tense::Planned), "would take the encrypted TPM back");
        assert_eq!(act.told(Tense::Done), "took the encrypted TPM back");
        assert_eq!(format!("can't {act}"), "can't take the encrypted TPM back");
    }
}
