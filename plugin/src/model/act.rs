//! What a command does, in words: the same is said of it before, and after.

use std::fmt;

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
    verb: Verb,
    what: String,
}

impl Verb {
    /// `what` follows the verb.
    pub(crate) fn act(self, what: impl Into<String>) -> Act {
        Act {
            verb: self,
            what: what.into(),
        }
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
    pub(crate) fn told(&self, tense: Tense) -> String {
        let (infinitive, past) = self.verb.forms();
        match tense {
            Tense::Planned => format!("would {infinitive} {}", self.what),
            Tense::Done => format!("{past} {}", self.what),
        }
    }
}

/// In the infinitive, as after "can't".
impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb.forms().0, self.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_will_be_done_is_not_told_as_done() {
        let act = Verb::Take.act("the encrypted TPM back");
        assert_eq!(act.told(Tense::Planned), "would take the encrypted TPM back");
        assert_eq!(act.told(Tense::Done), "took the encrypted TPM back");
        assert_eq!(format!("can't {act}"), "can't take the encrypted TPM back");
    }
}
