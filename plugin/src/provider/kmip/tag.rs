//! KMIP's numbers (KMIP 1.4 section 9.1.3, KMIP 2.1 section 11), as far as this client says or reads them.
//!
//! All sets are open: a number that is not here is kept as it is and shown in hex.

use std::fmt;

/// The three bytes that name an item.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag(pub(super) u32);

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! tags {
    ($($name:ident = $value:literal,)*) => {
        impl Tag {
            $(pub(super) const $name: Self = Self($value);)*
        }
    };
}

tags! {
    APPLICATION_DATA = 0x42_0002,
    APPLICATION_NAMESPACE = 0x42_0003,
    APPLICATION_SPECIFIC_INFORMATION = 0x42_0004,
    ATTRIBUTE = 0x42_0008,
    ATTRIBUTE_NAME = 0x42_000A,
    ATTRIBUTE_VALUE = 0x42_000B,
    AUTHENTICATION = 0x42_000C,
    BATCH_COUNT = 0x42_000D,
    BATCH_ERROR_CONTINUATION_OPTION = 0x42_000E,
    BATCH_ITEM = 0x42_000F,
    BLOCK_CIPHER_MODE = 0x42_0011,
    CREDENTIAL = 0x42_0023,
    CREDENTIAL_TYPE = 0x42_0024,
    CREDENTIAL_VALUE = 0x42_0025,
    CRYPTOGRAPHIC_ALGORITHM = 0x42_0028,
    CRYPTOGRAPHIC_LENGTH = 0x42_002A,
    CRYPTOGRAPHIC_PARAMETERS = 0x42_002B,
    CRYPTOGRAPHIC_USAGE_MASK = 0x42_002C,
    IV_COUNTER_NONCE = 0x42_003D,
    KEY = 0x42_003F,
    KEY_BLOCK = 0x42_0040,
    KEY_FORMAT_TYPE = 0x42_0042,
    KEY_MATERIAL = 0x42_0043,
    KEY_VALUE = 0x42_0045,
    KEY_WRAPPING_DATA = 0x42_0046,
    MAXIMUM_ITEMS = 0x42_004F,
    MAXIMUM_RESPONSE_SIZE = 0x42_0050,
    NAME = 0x42_0053,
    NAME_TYPE = 0x42_0054,
    NAME_VALUE = 0x42_0055,
    OBJECT_TYPE = 0x42_0057,
    OPERATION = 0x42_005C,
    PROTOCOL_VERSION = 0x42_0069,
    PROTOCOL_VERSION_MAJOR = 0x42_006A,
    PROTOCOL_VERSION_MINOR = 0x42_006B,
    QUERY_FUNCTION = 0x42_0074,
    REQUEST_HEADER = 0x42_0077,
    REQUEST_MESSAGE = 0x42_0078,
    REQUEST_PAYLOAD = 0x42_0079,
    RESPONSE_HEADER = 0x42_007A,
    RESPONSE_MESSAGE = 0x42_007B,
    RESPONSE_PAYLOAD = 0x42_007C,
    RESULT_MESSAGE = 0x42_007D,
    RESULT_REASON = 0x42_007E,
    RESULT_STATUS = 0x42_007F,
    REVOCATION_MESSAGE = 0x42_0080,
    REVOCATION_REASON = 0x42_0081,
    REVOCATION_REASON_CODE = 0x42_0082,
    STATE = 0x42_008D,
    SYMMETRIC_KEY = 0x42_008F,
    TEMPLATE_ATTRIBUTE = 0x42_0091,
    UNIQUE_BATCH_ITEM_ID = 0x42_0093,
    UNIQUE_IDENTIFIER = 0x42_0094,
    USERNAME = 0x42_0099,
    PASSWORD = 0x42_00A1,
    DATA = 0x42_00C2,
    OFFSET_ITEMS = 0x42_00D4,
    TAG_LENGTH = 0x42_00CE,
    AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA = 0x42_00FE,
    AUTHENTICATED_ENCRYPTION_TAG = 0x42_00FF,
    ATTRIBUTES = 0x42_0125,
    ATTRIBUTE_REFERENCE = 0x42_013B,
}

/// What a server is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    Create = 1,
    Locate = 8,
    Get = 10,
    GetAttributes = 11,
    Activate = 18,
    Revoke = 19,
    Destroy = 20,
    Query = 24,
    DiscoverVersions = 30,
    Encrypt = 31,
    Decrypt = 32,
}

impl Operation {
    /// Whether doing it twice is the same as doing it once.
    pub(super) fn is_idempotent(self) -> bool {
        !matches!(self, Self::Create | Self::Activate | Self::Revoke | Self::Destroy)
    }
}

pub(super) const OBJECT_TYPE_SYMMETRIC_KEY: u32 = 2;
pub(super) const ALGORITHM_AES: u32 = 3;
pub(super) const BLOCK_CIPHER_MODE_GCM: u32 = 9;
pub(super) const KEY_FORMAT_RAW: u32 = 1;
pub(super) const NAME_TYPE_TEXT: u32 = 1;
pub(super) const CREDENTIAL_USERNAME_AND_PASSWORD: u32 = 1;
pub(super) const QUERY_OPERATIONS: u32 = 1;
pub(super) const REVOKE_CESSATION_OF_OPERATION: u32 = 6;
pub(super) const BATCH_CONTINUE: u32 = 1;
/// Encrypt and Decrypt.
pub(super) const USAGE_MASK: i32 = 0x4 | 0x8;
pub(super) const RESULT_SUCCESS: u32 = 0;

/// The state of a key at the server (KMIP 1.4 section 3.22).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyState {
    PreActive,
    Active,
    Deactivated,
    Compromised,
    Destroyed,
    Other(u32),
}

impl KeyState {
    pub(super) fn of(number: u32) -> Self {
        match number {
            1 => Self::PreActive,
            2 => Self::Active,
            3 => Self::Deactivated,
            4 => Self::Compromised,
            5 | 6 => Self::Destroyed,
            other => Self::Other(other),
        }
    }

    /// Only an active key protects anything new.
    pub(super) fn may_wrap(self) -> bool {
        self == Self::Active
    }

    /// What was once protected must stay readable, also to be moved to a better key.
    pub(super) fn may_unwrap(self) -> bool {
        matches!(self, Self::Active | Self::Deactivated | Self::Compromised)
    }
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreActive => "Pre-Active",
            Self::Active => "Active",
            Self::Deactivated => "Deactivated",
            Self::Compromised => "Compromised",
            Self::Destroyed => "Destroyed",
            Self::Other(number) => return write!(f, "in state {number:#x}"),
        })
    }
}

/// Why a server refuses (KMIP 2.1 section 11.48); an open set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reason(pub(super) u32);

impl Reason {
    pub(super) const INVALID_MESSAGE: Self = Self(0x4);
    pub(super) const INVALID_FIELD: Self = Self(0x7);
    pub(super) const CRYPTOGRAPHIC_FAILURE: Self = Self(0xA);
    pub(super) const UNSUPPORTED_PROTOCOL_VERSION: Self = Self(0x3F);

    fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0x01 => "Item Not Found",
            0x02 => "Response Too Large",
            0x03 => "Authentication Not Successful",
            0x04 => "Invalid Message",
            0x05 => "Operation Not Supported",
            0x06 => "Missing Data",
            0x07 => "Invalid Field",
            0x08 => "Feature Not Supported",
            0x09 => "Operation Canceled By Requester",
            0x0A => "Cryptographic Problem",
            0x0B => "Illegal Operation",
            0x0C => "Permission Denied",
            0x0D => "Object Archived",
            0x0E => "Index Out Of Bounds",
            0x0F => "Application Namespace Not Supported",
            0x10 => "Key Format Type Not Supported",
            0x11 => "Key Compression Type Not Supported",
            0x12 => "Encoding Option Error",
            0x13 => "Key Value Not Present",
            0x14 => "Attestation Required",
            0x15 => "Attestation Failed",
            0x16 => "Sensitive",
            0x17 => "Not Extractable",
            0x18 => "Object Already Exists",
            0x19 => "Invalid Ticket",
            0x1A => "Usage Limit Exceeded",
            0x1F => "Unsupported Attribute",
            0x2C => "Invalid Attribute",
            0x2D => "Invalid Attribute Value",
            0x35 => "Non Unique Name Attribute",
            0x25 => "Bad Password",
            0x29 => "Incompatible Cryptographic Usage Mask",
            0x2A => "Internal Server Error",
            0x36 => "Object Destroyed",
            0x37 => "Object Not Found",
            0x39 => "Not Authorised",
            0x3A => "Server Limit Exceeded",
            0x3F => "Unsupported Protocol Version",
            0x43 => "Wrong Key Lifecycle State",
            0x44 => "Protection Storage Unavailable",
            0x100 => "General Failure",
            _ => return None,
        })
    }
}

impl Reason {
    /// The server may do with fewer attributes: Invalid Field, Application Namespace Not Supported, Unsupported,
    /// Invalid Attribute or Invalid Attribute Value.
    pub(super) fn is_about_an_attribute(self) -> bool {
        [0x7, 0xF, 0x1F, 0x2C, 0x2D].contains(&self.0)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "reason {:#x}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_numbers_can_still_be_read() {
        assert_eq!(Reason(0x1).to_string(), "Item Not Found");
        assert_eq!(Reason(0x8000_0007).to_string(), "reason 0x80000007");
        assert_eq!(KeyState::of(0x8000_0001).to_string(), "in state 0x80000001");
        assert_eq!(Tag::KEY_MATERIAL.to_string(), "0x420043");
    }

    #[test]
    fn only_active_keys_wrap_and_dead_ones_do_nothing() {
        for number in 0..10 {
            let state = KeyState::of(number);
            assert_eq!(state.may_wrap(), number == 2, "{state}");
            assert_eq!(state.may_unwrap(), (2..=4).contains(&number), "{state}");
        }
    }
}
