//! What a server can be asked, and how each version of the protocol says it.

use std::borrow::Cow;

use super::tag::{
    ALGORITHM_AES, BLOCK_CIPHER_MODE_GCM, KEY_FORMAT_RAW, NAME_TYPE_TEXT, OBJECT_TYPE_SYMMETRIC_KEY,
    Operation, QUERY_OPERATIONS, REVOKE_CESSATION_OF_OPERATION, Tag, USAGE_MASK,
};
use super::ttlv::Item;
use super::version::KmipVersion;
use crate::crypto::aead;
use crate::model::envelope::KekId;
use crate::secret::SecretBytes;

/// How many keys [`Call::Locate`] asks for in one page.
pub(super) const LOCATED_PAGE: i32 = 32;

/// One call of a batch.
#[derive(Debug)]
pub(super) enum Call {
    /// A new AES-256 key.
    Create(Label),
    /// Makes a key usable.
    Activate(KekId),
    /// The key's bytes.
    Get(KekId),
    /// State, algorithm and length of a key.
    GetAttributes(KekId),
    /// The same, what it is for, and what it is called.
    GetAttributesAndName(KekId),
    /// The keys with exactly that name, from a place in their list on.
    Locate { name: String, offset: i32 },
    /// The operations that the server has.
    Query,
    /// Which versions the server speaks.
    DiscoverVersions,
    /// Takes a key out of use.
    Revoke(KekId),
    /// Destroys a key that was taken out of use.
    Destroy(KekId),
    /// AES-256-GCM at the server.
    Encrypt(Cryption),
    /// The reverse.
    Decrypt(Cryption),
}

/// What an admin sees of a key in the server's own interface.
#[derive(Clone, Debug)]
pub(super) struct Label {
    /// What [`Call::Locate`] finds it by.
    pub(super) name: String,
    /// For whom and from where: `vm=…; host=…; purpose=…`; some servers know no such attribute.
    pub(super) tag: Option<String>,
}

impl Label {
    /// Who put the tag there.
    const NAMESPACE: &str = "virtseal";
}

/// The input of an encryption or a decryption.
#[derive(Debug)]
pub(super) struct Cryption {
    pub(super) kek: KekId,
    pub(super) nonce: [u8; aead::NONCE],
    pub(super) additional_data: Vec<u8>,
    /// Plaintext, or ciphertext.
    pub(super) data: SecretBytes,
    /// Of a ciphertext.
    pub(super) tag: Option<[u8; aead::TAG]>,
}

impl Call {
    pub(super) fn operation(&self) -> Operation {
        match self {
            Self::Create(_) => Operation::Create,
            Self::Activate(_) => Operation::Activate,
            Self::Get(_) => Operation::Get,
            Self::GetAttributes(_) | Self::GetAttributesAndName(_) => Operation::GetAttributes,
            Self::Locate { .. } => Operation::Locate,
            Self::Query => Operation::Query,
            Self::DiscoverVersions => Operation::DiscoverVersions,
            Self::Revoke(_) => Operation::Revoke,
            Self::Destroy(_) => Operation::Destroy,
            Self::Encrypt(_) => Operation::Encrypt,
            Self::Decrypt(_) => Operation::Decrypt,
        }
    }

    /// The items of its request payload, in the order that the specification lists them.
    pub(super) fn payload(&self, version: KmipVersion) -> Vec<Item<'_>> {
        match self {
            Self::Create(label) => vec![
                Item::enumeration(Tag::OBJECT_TYPE, OBJECT_TYPE_SYMMETRIC_KEY),
                attributes_of_key(label, version),
            ],
            Self::Activate(kek) | Self::Destroy(kek) => vec![uid(kek)],
            Self::Get(kek) => vec![uid(kek), Item::enumeration(Tag::KEY_FORMAT_TYPE, KEY_FORMAT_RAW)],
            Self::GetAttributes(kek) => attributes_of(kek, &[], version),
            Self::GetAttributesAndName(kek) => {
                let more = [
                    Attribute::CRYPTOGRAPHIC_USAGE_MASK,
                    Attribute::OBJECT_TYPE,
                    Attribute::NAME,
                ];
                attributes_of(kek, &more, version)
            }
            Self::Locate { name, offset } => {
                let name = named(name);
                let filter = match version.has_attributes() {
                    true => Item::structure(Tag::ATTRIBUTES, [name]),
                    false => Attribute::NAME.pair(name),
                };
                // Without a way to ask for the rest, a page would hide keys.
                let page = match version.has_offsets() {
                    true => vec![
                        Item::integer(Tag::MAXIMUM_ITEMS, LOCATED_PAGE),
                        Item::integer(Tag::OFFSET_ITEMS, *offset),
                    ],
                    false => Vec::new(),
                };
                page.into_iter().chain([filter]).collect()
            }
            Self::Query => vec![Item::enumeration(Tag::QUERY_FUNCTION, QUERY_OPERATIONS)],
            Self::DiscoverVersions => KmipVersion::SPOKEN.iter().map(|version| version.item()).collect(),
            Self::Revoke(kek) => {
                let reason = [
                    Item::enumeration(Tag::REVOCATION_REASON_CODE, REVOKE_CESSATION_OF_OPERATION),
                    Item::text(Tag::REVOCATION_MESSAGE, "destroyed by virtseal"),
                ];
                vec![uid(kek), Item::structure(Tag::REVOCATION_REASON, reason)]
            }
            Self::Encrypt(cryption) | Self::Decrypt(cryption) => cryption.payload(),
        }
    }
}

impl Cryption {
    fn payload(&self) -> Vec<Item<'_>> {
        let tag_length = i32::try_from(aead::TAG).expect("a tag has 16 bytes");
        let parameters = [
            Item::enumeration(Tag::BLOCK_CIPHER_MODE, BLOCK_CIPHER_MODE_GCM),
            Item::enumeration(Tag::CRYPTOGRAPHIC_ALGORITHM, ALGORITHM_AES),
            Item::integer(Tag::TAG_LENGTH, tag_length),
        ];
        let mut items = vec![
            uid(&self.kek),
            Item::structure(Tag::CRYPTOGRAPHIC_PARAMETERS, parameters),
            Item::bytes(Tag::DATA, self.data.expose()),
            Item::bytes(Tag::IV_COUNTER_NONCE, self.nonce.as_slice()),
            Item::bytes(
                Tag::AUTHENTICATED_ENCRYPTION_ADDITIONAL_DATA,
                self.additional_data.as_slice(),
            ),
        ];
        if let Some(tag) = &self.tag {
            items.push(Item::bytes(Tag::AUTHENTICATED_ENCRYPTION_TAG, tag.as_slice()));
        }
        items
    }
}

fn uid(kek: &KekId) -> Item<'_> {
    Item::text(Tag::UNIQUE_IDENTIFIER, kek.0.as_str())
}

fn attributes_of<'a>(kek: &'a KekId, more: &[Attribute], version: KmipVersion) -> Vec<Item<'a>> {
    let facts = [
        Attribute::STATE,
        Attribute::CRYPTOGRAPHIC_ALGORITHM,
        Attribute::CRYPTOGRAPHIC_LENGTH,
    ];
    let wanted = facts
        .iter()
        .chain(more)
        .map(|attribute| attribute.reference(version));
    std::iter::once(uid(kek)).chain(wanted).collect()
}

fn named(name: &str) -> Item<'_> {
    Item::structure(
        Tag::NAME,
        [
            Item::text(Tag::NAME_VALUE, name),
            Item::enumeration(Tag::NAME_TYPE, NAME_TYPE_TEXT),
        ],
    )
}

fn attributes_of_key(label: &Label, version: KmipVersion) -> Item<'_> {
    let mut items = vec![
        Attribute::CRYPTOGRAPHIC_ALGORITHM.item(
            Item::enumeration(Tag::CRYPTOGRAPHIC_ALGORITHM, ALGORITHM_AES),
            version,
        ),
        Attribute::CRYPTOGRAPHIC_LENGTH.item(Item::integer(Tag::CRYPTOGRAPHIC_LENGTH, 256), version),
        Attribute::CRYPTOGRAPHIC_USAGE_MASK
            .item(Item::integer(Tag::CRYPTOGRAPHIC_USAGE_MASK, USAGE_MASK), version),
        Attribute::NAME.item(named(&label.name), version),
    ];
    if let Some(tag) = &label.tag {
        let tag = Item::structure(
            Tag::APPLICATION_SPECIFIC_INFORMATION,
            [
                Item::text(Tag::APPLICATION_NAMESPACE, Label::NAMESPACE),
                Item::text(Tag::APPLICATION_DATA, tag.as_str()),
            ],
        );
        items.push(Attribute::APPLICATION_SPECIFIC_INFORMATION.item(tag, version));
    }
    let whole = match version.has_attributes() {
        true => Tag::ATTRIBUTES,
        false => Tag::TEMPLATE_ATTRIBUTE,
    };
    Item::structure(whole, items)
}

/// An attribute's name in 1.x and its tag, which is its name in 2.x.
pub(super) struct Attribute {
    name: &'static str,
    tag: Tag,
}

impl Attribute {
    pub(super) const STATE: Self = Self::new("State", Tag::STATE);
    pub(super) const CRYPTOGRAPHIC_ALGORITHM: Self =
        Self::new("Cryptographic Algorithm", Tag::CRYPTOGRAPHIC_ALGORITHM);
    pub(super) const CRYPTOGRAPHIC_LENGTH: Self =
        Self::new("Cryptographic Length", Tag::CRYPTOGRAPHIC_LENGTH);
    pub(super) const CRYPTOGRAPHIC_USAGE_MASK: Self =
        Self::new("Cryptographic Usage Mask", Tag::CRYPTOGRAPHIC_USAGE_MASK);
    pub(super) const OBJECT_TYPE: Self = Self::new("Object Type", Tag::OBJECT_TYPE);
    pub(super) const NAME: Self = Self::new("Name", Tag::NAME);
    const APPLICATION_SPECIFIC_INFORMATION: Self = Self::new(
        "Application Specific Information",
        Tag::APPLICATION_SPECIFIC_INFORMATION,
    );

    const fn new(name: &'static str, tag: Tag) -> Self {
        Self { name, tag }
    }

    fn reference(&self, version: KmipVersion) -> Item<'static> {
        match version.has_attributes() {
            true => Item::enumeration(Tag::ATTRIBUTE_REFERENCE, self.tag.0),
            false => Item::text(Tag::ATTRIBUTE_NAME, self.name),
        }
    }

    /// With its value, in the form of `version`.
    fn item<'a>(&self, value: Item<'a>, version: KmipVersion) -> Item<'a> {
        match version.has_attributes() {
            true => value,
            false => self.pair(value),
        }
    }

    /// The form of 1.x.
    pub(super) fn pair<'a>(&self, value: Item<'a>) -> Item<'a> {
        let value = Item {
            tag: Tag::ATTRIBUTE_VALUE,
            value: value.value,
        };
        Item::structure(
            Tag::ATTRIBUTE,
            [Item::text(Tag::ATTRIBUTE_NAME, Cow::Borrowed(self.name)), value],
        )
    }

    /// Its value in a payload of either form; the tag of the item that is returned differs.
    pub(super) fn of<'m, 'b>(&self, payload: &'m Item<'b>) -> Option<&'m Item<'b>> {
        self.all_of(payload).into_iter().next()
    }

    /// All its values, as [`Attribute::of`].
    pub(super) fn all_of<'m, 'b>(&self, payload: &'m Item<'b>) -> Vec<&'m Item<'b>> {
        let is_it = |pair: &&Item| pair.find(Tag::ATTRIBUTE_NAME).and_then(Item::as_text) == Some(self.name);
        let of_2x = payload.find(Tag::ATTRIBUTES).into_iter();
        let of_1x = payload.all(Tag::ATTRIBUTE).filter(is_it);
        of_2x
            .flat_map(|attributes| attributes.all(self.tag))
            .chain(of_1x.filter_map(|pair| pair.find(Tag::ATTRIBUTE_VALUE)))
            .collect()
    }
}
