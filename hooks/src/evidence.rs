//! What the bytes on stdin say before anything has parsed them, or where nothing can.
//!
//! Most VMs have neither virtseal's namespace nor a UUID of ours in their XML, and are done here. What can't be parsed, or
//! not in time, is judged by this alone, so it must not see less than libvirt would: bytes of UTF-16 and character
//! references count as the characters that they stand for.

use crate::index::{Id, Index};

/// What every namespace of virtseal starts with: metadata of a later version makes a sealed VM too.
pub(crate) const NAMESPACE: &str = "urn:virtseal:";

/// Looks at the bytes as they come, all of them: one pass, no memory of its own.
pub(crate) struct Evidence<'i> {
    index: &'i Index,
    reference: Reference,
    namespace: Word,
    secret: Word,
    entity: Word,
    run: Run,
    known: bool,
}

impl<'i> Evidence<'i> {
    pub(crate) fn against(index: &'i Index) -> Self {
        Self {
            index,
            reference: Reference::None,
            namespace: Word::new(NAMESPACE),
            secret: Word::new("secret"),
            entity: Word::new("<!ENTITY"),
            run: Run::default(),
            known: false,
        }
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            // The other half of an ASCII character in UTF-16.
            if *byte != 0 {
                self.take(*byte);
            }
        }
    }

    /// Ends what the last byte may have ended.
    pub(crate) fn finish(&mut self) {
        self.see(b'\n');
        self.look_up();
    }

    /// Whether virtseal's namespace is there, or may be: libvirt writes no entities, and they can spell anything.
    pub(crate) fn has_namespace(&self) -> bool {
        self.namespace.seen || self.entity.seen
    }

    /// Whether this may be the XML of a sealed VM, or of one that wants another's secrets.
    pub(crate) fn may_be_ours(&self) -> bool {
        self.has_namespace() || self.known || (self.secret.seen && self.index.problem().is_some())
    }

    /// Resolves character references, however many zeros they have.
    fn take(&mut self, byte: u8) {
        self.reference = match (self.reference, byte) {
            (Reference::None, b'&') => Reference::Ampersand,
            (Reference::None, _) => {
                self.see(byte);
                Reference::None
            }
            (Reference::Ampersand, b'#') => Reference::Number,
            (Reference::Number, b'x') => Reference::Hex(0),
            (Reference::Number, b'0'..=b'9') => Reference::Decimal(u32::from(byte - b'0')),
            (Reference::Decimal(code), b'0'..=b'9') => {
                Reference::Decimal(code.saturating_mul(10).saturating_add(u32::from(byte - b'0')))
            }
            (Reference::Hex(code), _) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Reference::Hex(code.saturating_mul(16).saturating_add(digit))
            }
            (Reference::Decimal(code) | Reference::Hex(code), b';') => {
                self.see(u8::try_from(code).ok().filter(u8::is_ascii).unwrap_or(0xff));
                Reference::None
            }
            (_, b'&') => {
                self.see(b'&');
                Reference::Ampersand
            }
            (_, _) => {
                self.see(b'&');
                self.see(byte);
                Reference::None
            }
        };
    }

    fn see(&mut self, byte: u8) {
        self.namespace.see(byte);
        self.secret.see(byte);
        self.entity.see(byte);
        if !self.run.see(byte) {
            self.look_up();
        }
    }

    fn look_up(&mut self) {
        if let Some(id) = self.run.take()
            && !self.known
        {
            self.known = self.index.knows(&id);
        }
    }
}

#[derive(Clone, Copy)]
enum Reference {
    None,
    Ampersand,
    Number,
    Decimal(u32),
    Hex(u32),
}

/// A word that is looked for; its first character is in it only once.
struct Word {
    word: &'static [u8],
    matched: usize,
    seen: bool,
}

impl Word {
    fn new(word: &'static str) -> Self {
        Self {
            word: word.as_bytes(),
            matched: 0,
            seen: false,
        }
    }

    fn see(&mut self, byte: u8) {
        self.matched = match byte {
            _ if byte == self.word[self.matched] => self.matched + 1,
            _ if byte == self.word[0] => 1,
            _ => 0,
        };
        if self.matched == self.word.len() {
            self.seen = true;
            self.matched = 0;
        }
    }
}

/// Hexadecimal digits with dashes and white space between them, as libvirt takes a UUID.
#[derive(Default)]
struct Run {
    digits: [u8; 32],
    /// Also of more than fit.
    count: usize,
}

impl Run {
    /// Whether the run goes on.
    fn see(&mut self, byte: u8) -> bool {
        if byte.is_ascii_hexdigit() {
            if let Some(place) = self.digits.get_mut(self.count) {
                *place = byte.to_ascii_lowercase();
            }
            self.count = self.count.saturating_add(1);
            return true;
        }
        byte == b'-' || byte.is_ascii_whitespace()
    }

    /// The UUID that the run was, if it was one.
    fn take(&mut self) -> Option<Id> {
        let fits = self.count == self.digits.len();
        self.count = 0;
        fits.then_some(Id(self.digits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::tests::index;

    const OURS: &str = "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7";
    const OTHER: &str = "7b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7";

    fn of(bytes: &[u8]) -> (bool, bool) {
        let index = index(&[(OURS, OTHER)], &[]);
        // However the bytes come.
        let whole = fed(&index, bytes.chunks(bytes.len().max(1)));
        assert_eq!(whole, fed(&index, bytes.chunks(1)));
        whole
    }

    fn fed<'b>(index: &Index, chunks: impl Iterator<Item = &'b [u8]>) -> (bool, bool) {
        let mut evidence = Evidence::against(index);
        chunks.for_each(|chunk| evidence.feed(chunk));
        evidence.finish();
        (evidence.has_namespace(), evidence.known)
    }

    fn utf16(text: &str) -> [Vec<u8>; 2] {
        let units = || text.encode_utf16();
        [
            units().flat_map(u16::to_le_bytes).collect(),
            units().flat_map(u16::to_be_bytes).collect(),
        ]
    }

    #[test]
    fn the_namespace_is_seen_in_every_spelling() {
        for text in [
            "urn:virtseal:vm:1",
            "uuurn:virtsurn:virtseal:",
            "urn&#58;virtseal&#x3a;vm:1",
            "&#117;rn:virt&#x0000073;eal:",
            "&&#117;rn:virtseal:",
            "<!DOCTYPE d [<!ENTITY c ':'>]><d xmlns='urn&c;virtseal&c;vm:1'/>",
        ] {
            assert!(of(text.as_bytes()).0, "{text}");
            for bytes in utf16(text) {
                assert!(of(&bytes).0, "{text} in UTF-16");
            }
        }
        for text in [
            "",
            "urn:virtsea",
            "urn:virt seal:",
            "urn&58;virtseal:",
            "&#;urn:virt",
            "ENTITY",
        ] {
            assert!(!of(text.as_bytes()).0, "{text}");
        }
    }

    #[test]
    fn our_uuids_are_seen_in_every_spelling() {
        let bare = OURS.replace('-', "");
        for text in [
            OURS.to_owned(),
            OURS.to_uppercase(),
            format!("<secret uuid='{bare}'/>"),
            format!("usage=\"virtseal:{OURS}\""),
            format!("<uuid>\n {}\t</uuid>", OURS.replace('-', " ")),
            format!("'&#54;{}'", &OURS[1..]),
            format!("'{OTHER}' '{OURS}'"),
        ] {
            assert!(of(text.as_bytes()).1, "{text}");
            for bytes in utf16(&text) {
                assert!(of(&bytes).1, "{text} in UTF-16");
            }
        }
        for text in [OTHER.to_owned(), format!("0{bare}"), bare[1..].to_owned()] {
            assert!(!of(format!("'{text}'").as_bytes()).1, "{text}");
        }
    }

    #[test]
    fn each_word_can_be_looked_for_as_it_is() {
        for word in [NAMESPACE, "secret", "<!ENTITY"] {
            assert!(!word[1..].contains(&word[..1]), "{word}");
        }
    }
}
