//! Why domain XML can't be read or changed, and where in it.

use std::fmt;

use roxmltree::Node;
use thiserror::Error;
use xml_bounds::Beyond;

use super::Domain;
use crate::model::envelope::{EnvelopeError, EnvelopeId};

/// A place in the XML, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub line: u32,
    /// The column, in characters.
    pub column: u32,
}

impl Position {
    pub(super) fn of(node: Node<'_, '_>) -> Self {
        let at = node.document().text_pos_at(node.range().start);
        Self {
            line: at.row,
            column: at.col,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Why domain XML can't be read or changed.
#[derive(Debug, Error)]
pub(crate) enum DomainError {
    /// Longer than [`Domain::MAX_XML`].
    #[error("the domain XML has {found} bytes, more than the {} allowed", Domain::MAX_XML)]
    TooLong { found: usize },
    /// It may have more bytes than a call of libvirt can carry.
    #[error("libvirt does not tell it: {0}")]
    Untold(String),
    #[error("the domain XML has {found} bytes, more than the {most} that are held of each of so many VMs")]
    BeyondShare { found: usize, most: usize },
    #[error("the domain XML is beyond what is read")]
    Beyond(#[source] Beyond),
    #[error("the domain XML can't be read")]
    Xml(#[source] roxmltree::Error),
    #[error("{at}: <{found}> is not <domain>")]
    NotADomain { found: String, at: Position },
    #[error("{at}: {what} is missing")]
    Missing { what: &'static str, at: Position },
    /// An element that may be there once is there twice.
    #[error("{at}: a second {what}")]
    Twice { what: String, at: Position },
    #[error("{at}: {found:?} is not a {what}")]
    Value {
        what: &'static str,
        found: String,
        at: Position,
    },
    #[error("{at}: the envelope {which} in the metadata can't be read")]
    Envelope {
        /// Its id, or its number if it has none.
        which: String,
        at: Position,
        #[source]
        source: EnvelopeError,
    },
    /// An element's id and the envelope in it differ.
    #[error("{at}: the metadata calls an envelope {stated}, but it is {found}")]
    EnvelopeName {
        stated: String,
        found: EnvelopeId,
        at: Position,
    },
    /// The plan names an object that is not there.
    #[error("the domain has no {0}")]
    NoObject(String),
    /// The object is encrypted with another key already.
    #[error("{at}: {label} is encrypted already, with another secret")]
    AlreadyEncrypted { label: String, at: Position },
    /// The object's form can't be changed as planned.
    #[error("{at}: {label} can't be changed: {reason}")]
    Unsupported {
        label: String,
        reason: &'static str,
        at: Position,
    },
    #[error("the domain does not boot through UEFI, so it has no variable store")]
    NotUefi,
    #[error(
        "{at}: libvirt has not chosen the UEFI firmware yet: name the loader, or start the domain once before"
    )]
    FirmwareOpen { at: Position },
    #[error("the domain XML has a form in which the changes overlap")]
    Overlap,
    #[error("{0:?} can't be written in XML")]
    Unwritable(String),
}
