//! Why domain XML can't be read or changed, and where in it.

use std::fmt;

use roxmltree::Node;
use thiserror::Error;
use xml_bounds::Beyond;

use super::Domain;
use crate::model::envelope::{EnvelopeError, EnvelopeId};

/// A place in the XML, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
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
pub enum DomainError {
    /// Longer than [`Domain::MAX_XML`].
    #[error("the domain XML has {found} bytes, more than the {} allowed", Domain::MAX_XML)]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// The parser would take too long.
    #[error("the domain XML is beyond what is read")]
    Beyond(#[source] Beyond),
    /// Not well-formed, or with too many nodes.
    #[error("the domain XML can't be read")]
    Xml(#[source] roxmltree::Error),
    /// The root element is another one.
    #[error("{at}: <{found}> is no <domain>")]
    NotADomain {
        /// Its name.
        found: String,
        /// Where.
        at: Position,
    },
    /// A needed element or attribute is missing.
    #[error("{at}: {what} is missing")]
    Missing {
        /// Which.
        what: &'static str,
        /// The element that lacks it.
        at: Position,
    },
    /// An element that may be there once is there twice.
    #[error("{at}: a second {what}")]
    Twice {
        /// Which.
        what: String,
        /// The second one.
        at: Position,
    },
    /// A value makes no sense.
    #[error("{at}: {found:?} is no {what}")]
    Value {
        /// What it should be.
        what: &'static str,
        /// What it is.
        found: String,
        /// Where.
        at: Position,
    },
    /// One of the envelopes in the metadata.
    #[error("{at}: the envelope {which} in the metadata can't be read")]
    Envelope {
        /// Its id, or its number if it has none.
        which: String,
        /// Where.
        at: Position,
        /// Why.
        #[source]
        source: EnvelopeError,
    },
    /// An element's id and the envelope in it differ.
    #[error("{at}: the metadata calls an envelope {stated}, but it is {found}")]
    EnvelopeName {
        /// The element's.
        stated: String,
        /// The envelope's.
        found: EnvelopeId,
        /// Where.
        at: Position,
    },
    /// The plan names an object that is not there.
    #[error("the domain has no {0}")]
    NoObject(String),
    /// The object is encrypted with another key already.
    #[error("{at}: {label} is encrypted already, with another secret")]
    AlreadyEncrypted {
        /// The object.
        label: String,
        /// Where.
        at: Position,
    },
    /// The object's form can't be changed as planned.
    #[error("{at}: {label} can't be changed: {reason}")]
    Unsupported {
        /// The object.
        label: String,
        /// Why.
        reason: &'static str,
        /// Where.
        at: Position,
    },
    /// The domain boots no UEFI.
    #[error("the domain does not boot through UEFI, so it has no variable store")]
    NotUefi,
    /// libvirt is still to choose the firmware.
    #[error(
        "{at}: libvirt has not chosen the UEFI firmware yet: name the loader, or start the domain once before"
    )]
    FirmwareOpen {
        /// The `<os>`.
        at: Position,
    },
    /// Two changes at one place.
    #[error("the domain XML has a form in which the changes overlap")]
    Overlap,
    /// XML can't hold this text.
    #[error("{0:?} can't be written in XML")]
    Unwritable(String),
}
