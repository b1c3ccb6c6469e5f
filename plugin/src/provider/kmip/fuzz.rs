//! A target: what a server answers.

use super::message;
use super::tag::Tag;
use super::ttlv::{self, Item};
use crate::fuzz_target::Target;

pub(crate) const TTLV: Target = Target {
    name: "ttlv",
    seeds: || {
        let answer = |ids: &[&'static str]| {
            let version = Item::structure(
                Tag::PROTOCOL_VERSION,
                [
                    Item::integer(Tag::PROTOCOL_VERSION_MAJOR, 1),
                    Item::integer(Tag::PROTOCOL_VERSION_MINOR, 4),
                ],
            );
            let mut items = vec![Item::structure(Tag::RESPONSE_HEADER, [version])];
            for id in ids {
                let payload =
                    Item::structure(Tag::RESPONSE_PAYLOAD, [Item::text(Tag::UNIQUE_IDENTIFIER, *id)]);
                items.push(Item::structure(
                    Tag::BATCH_ITEM,
                    [Item::enumeration(Tag::RESULT_STATUS, 0), payload],
                ));
            }
            let mut bytes = Vec::new();
            let message = Item::structure(Tag::RESPONSE_MESSAGE, items);
            message.encode(&mut bytes).expect("a short message");
            bytes
        };
        vec![answer(&["1"]), answer(&[]), answer(&["1", "2"])]
    },
    read: |bytes| {
        if let Some(Ok(length)) = bytes.first_chunk().map(|header| ttlv::body_length(*header)) {
            assert!(length <= ttlv::MAX_BYTES);
        }
        let Ok(item) = Item::decode(bytes) else {
            return false;
        };
        for calls in 0..3 {
            if let Ok(outcomes) = message::outcomes(&item, calls) {
                assert_eq!(outcomes.len(), calls, "an answer for each call");
            }
        }
        let _ = message::version_of(&item);
        let mut encoded = Vec::new();
        item.encode(&mut encoded).expect("what was read can be written");
        assert_eq!(Item::decode(&encoded).ok(), Some(item));
        true
    },
};
