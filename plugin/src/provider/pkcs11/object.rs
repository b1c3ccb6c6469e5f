//! Objects in a token, and what they say of themselves.
//!
//! A search template is a wish: some modules leave attributes of it out of account, and list keys of others. So what an object is,
//! it says itself ([`Object`]), and that is compared with what was looked for before anything is wrapped, opened or destroyed.

use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;

use super::error::TokenError;
use super::mechanism::Mechanism;

/// What an object says of itself.
pub(super) struct Object {
    pub(super) handle: ObjectHandle,
    pub(super) label: Vec<u8>,
    pub(super) id: Vec<u8>,
    /// How long the key is.
    pub(super) bytes: Option<usize>,
    all: Vec<Attribute>,
}

impl Object {
    pub(super) fn read(session: &Session, handle: ObjectHandle) -> Result<Self, TokenError> {
        let all = session.get_attributes(
            handle,
            &[
                AttributeType::Class,
                AttributeType::KeyType,
                AttributeType::Token,
                AttributeType::Label,
                AttributeType::Id,
                AttributeType::ValueLen,
                AttributeType::Sensitive,
                AttributeType::Extractable,
                AttributeType::Encrypt,
                AttributeType::Decrypt,
                AttributeType::Wrap,
                AttributeType::Unwrap,
                AttributeType::Sign,
                AttributeType::Verify,
            ],
        )?;
        let mut object = Self {
            handle,
            label: Vec::new(),
            id: Vec::new(),
            bytes: None,
            all: Vec::new(),
        };
        for attribute in all {
            match attribute {
                Attribute::Label(label) => object.label = label,
                Attribute::Id(id) => object.id = id,
                Attribute::ValueLen(bytes) => object.bytes = usize::try_from(*bytes).ok(),
                other => object.all.push(other),
            }
        }
        Ok(object)
    }

    /// Whether it has all of `attributes`.
    pub(super) fn may(&self, attributes: &[Attribute]) -> bool {
        attributes.iter().all(|wanted| self.all.contains(wanted))
    }

    pub(super) fn is_stored_key(&self) -> bool {
        self.may(&[Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true)])
    }

    pub(super) fn is_key(&self, kind: KeyType, id: &[u8]) -> bool {
        self.is_stored_key() && self.may(&[Attribute::KeyType(kind)]) && self.id == id
    }

    pub(super) fn is_kept(&self) -> bool {
        self.may(&[Attribute::Sensitive(true), Attribute::Extractable(false)])
    }

    /// Whether it is as long as an AES key and may do what `mechanism` needs; else why not.
    pub(super) fn check(&self, mechanism: Mechanism) -> Result<(), String> {
        if !matches!(self.bytes, Some(16 | 24 | 32)) {
            return Err(match self.bytes {
                Some(bytes) => format!("it has {bytes} bytes, which no AES key has"),
                None => "the token does not tell its length".to_owned(),
            });
        }
        let (needed, purpose) = match mechanism.wraps_objects() {
            true => (Attribute::Unwrap(true), "unwrap"),
            false => (Attribute::Decrypt(true), "decrypt"),
        };
        match self.may(&[needed]) {
            true => Ok(()),
            false => Err(format!("the token does not let it {purpose}")),
        }
    }
}

/// What `template` finds.
pub(super) fn objects(session: &Session, template: &[Attribute]) -> Result<Vec<Object>, TokenError> {
    let found = session.find_objects(template)?;
    found
        .into_iter()
        .map(|handle| Object::read(session, handle))
        .collect()
}

/// To look for keys of `kind`, with this CKA_ID.
pub(super) fn secret_key(kind: KeyType, id: &[u8]) -> [Attribute; 4] {
    [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(kind),
        Attribute::Token(true),
        Attribute::Id(id.to_vec()),
    ]
}

/// All keys of one KEK.
pub(super) fn objects_of(session: &Session, id: &[u8], label: &[u8]) -> Result<Vec<Object>, TokenError> {
    let mut found: Vec<Object> = Vec::new();
    for kind in [KeyType::AES, KeyType::GENERIC_SECRET] {
        for object in objects(session, &secret_key(kind, id))? {
            if object.is_key(kind, id) && object.label == label {
                found.push(object);
            }
        }
    }
    Ok(found)
}
