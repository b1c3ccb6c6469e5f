//! Messages: a batch of calls in, an outcome for each out (KMIP 1.4 section 7, KMIP 2.1 section 8).

use std::fmt;

use thiserror::Error;

use super::call::Call;
use super::identity::Login;
use super::tag::{BATCH_CONTINUE, CREDENTIAL_USERNAME_AND_PASSWORD, RESULT_SUCCESS, Reason, Tag};
use super::ttlv::{Item, MAX_BYTES, TtlvError};
use super::version::KmipVersion;
use crate::provider::toolbox::printable;
use crate::secret::Transient;

/// Why a server did not do what a call asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reason: Reason,
    message: String,
}

impl Refusal {
    #[cfg(test)]
    pub(super) fn of(reason: Reason) -> Self {
        Self {
            reason,
            message: String::new(),
        }
    }

    /// The server may not speak the version that it was asked in.
    pub(super) fn is_about_the_version(&self) -> bool {
        [Reason::INVALID_MESSAGE, Reason::UNSUPPORTED_PROTOCOL_VERSION].contains(&self.reason)
    }

    /// With the version that it was asked in, and what chooses another.
    pub(super) fn to(self, version: KmipVersion) -> Self {
        let message = format!(
            "{} (asked in KMIP {version}; another one is set by --kmip-version of provider add)",
            self.message
        );
        Self { message, ..self }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)?;
        match self.message.as_str() {
            "" => Ok(()),
            message => write!(f, ", {message}"),
        }
    }
}

/// What a call came to: the payload of its answer, or why there is none.
pub(super) type Outcome<'m, 'b> = Result<&'m Item<'b>, Refusal>;

/// The bytes of a request with all of `calls`.
pub(super) fn request(
    version: KmipVersion,
    login: Option<&Login>,
    calls: &[Call],
) -> Result<Transient, TtlvError> {
    let mut items = vec![header(version, login, calls.len())];
    for (nth, call) in calls.iter().enumerate() {
        let mut item = vec![Item::enumeration(Tag::OPERATION, call.operation() as u32)];
        if calls.len() > 1 {
            item.push(Item::bytes(Tag::UNIQUE_BATCH_ITEM_ID, batch_id(nth).to_vec()));
        }
        item.push(Item::structure(Tag::REQUEST_PAYLOAD, call.payload(version)));
        items.push(Item::structure(Tag::BATCH_ITEM, item));
    }
    let mut bytes = Transient::new(Vec::with_capacity(4096));
    Item::structure(Tag::REQUEST_MESSAGE, items).encode(&mut bytes)?;
    Ok(bytes)
}

fn batch_id(nth: usize) -> [u8; 8] {
    (nth as u64).to_be_bytes()
}

fn header(version: KmipVersion, login: Option<&Login>, calls: usize) -> Item<'_> {
    let limit = i32::try_from(MAX_BYTES).expect("the limit is below 2 GiB");
    let mut items = vec![version.item(), Item::integer(Tag::MAXIMUM_RESPONSE_SIZE, limit)];
    if let Some(login) = login {
        let value = [
            Item::text(Tag::USERNAME, login.user.as_str()),
            // Passwords are text to KMIP; what is not UTF-8 would not be accepted anyway.
            Item::text(Tag::PASSWORD, String::from_utf8_lossy(login.password.expose())),
        ];
        let credential = [
            Item::enumeration(Tag::CREDENTIAL_TYPE, CREDENTIAL_USERNAME_AND_PASSWORD),
            Item::structure(Tag::CREDENTIAL_VALUE, value),
        ];
        items.push(Item::structure(
            Tag::AUTHENTICATION,
            [Item::structure(Tag::CREDENTIAL, credential)],
        ));
    }
    if calls > 1 {
        // An unknown key must not hide what happened to the others.
        items.push(Item::enumeration(
            Tag::BATCH_ERROR_CONTINUATION_OPTION,
            BATCH_CONTINUE,
        ));
    }
    items.push(Item::integer(
        Tag::BATCH_COUNT,
        i32::try_from(calls).expect("batches are small"),
    ));
    Item::structure(Tag::REQUEST_HEADER, items)
}

/// What became of each of `calls` calls, in their order.
///
/// The version in the answer's header is not looked at: some servers refuse in 1.0 what they can't parse.
///
/// # Errors
/// When the answer does not fit the request. A server that refuses the request as a whole answers one item; that
/// refusal is then every call's.
pub(super) fn outcomes<'m, 'b>(
    message: &'m Item<'b>,
    calls: usize,
) -> Result<Vec<Outcome<'m, 'b>>, ProtocolError> {
    if message.tag != Tag::RESPONSE_MESSAGE {
        return Err(ProtocolError::Shape);
    }
    let items: Vec<_> = message.all(Tag::BATCH_ITEM).collect();
    if items.len() == 1
        && calls != 1
        && let Err(refusal) = outcome(items[0])?
    {
        return Ok(vec![Err(refusal); calls]);
    }
    if items.len() != calls {
        return Err(ProtocolError::Count {
            asked: calls,
            answered: items.len(),
        });
    }
    (0..calls)
        .map(|nth| outcome(item_of_call(&items, nth).ok_or(ProtocolError::Shape)?))
        .collect()
}

/// The version that an answer is in.
pub(super) fn version_of(message: &Item) -> Option<KmipVersion> {
    let header = message.find(Tag::RESPONSE_HEADER)?;
    KmipVersion::of_item(header.find(Tag::PROTOCOL_VERSION)?)
}

/// By its id, for a server may answer in another order; by its place, where a single item needs no id.
fn item_of_call<'m, 'b>(items: &[&'m Item<'b>], nth: usize) -> Option<&'m Item<'b>> {
    if items.len() == 1 {
        return items.first().copied();
    }
    let has_id = |item: &&&Item| {
        let id = item.find(Tag::UNIQUE_BATCH_ITEM_ID);
        id.and_then(Item::as_bytes) == Some(&batch_id(nth))
    };
    items.iter().find(has_id).copied()
}

fn outcome<'m, 'b>(item: &'m Item<'b>) -> Result<Outcome<'m, 'b>, ProtocolError> {
    let number = |tag| item.find(tag).and_then(Item::as_enumeration);
    if number(Tag::RESULT_STATUS).ok_or(ProtocolError::Shape)? == RESULT_SUCCESS {
        return item
            .find(Tag::RESPONSE_PAYLOAD)
            .map(Ok)
            .ok_or(ProtocolError::Shape);
    }
    let message = item.find(Tag::RESULT_MESSAGE).and_then(Item::as_text);
    Ok(Err(Refusal {
        // A server that gives none is not worth another kind of error.
        reason: Reason(number(Tag::RESULT_REASON).unwrap_or(0)),
        message: printable(message.unwrap_or_default()),
    }))
}

/// Why an answer can't be read.
#[derive(Debug, Error)]
pub(super) enum ProtocolError {
    #[error(transparent)]
    Ttlv(#[from] TtlvError),
    #[error("the answer lacks what the protocol asks for")]
    Shape,
    #[error("{asked} calls got {answered} answers")]
    Count { asked: usize, answered: usize },
    #[error("the answer is about another key than the question")]
    AnotherKey,
    #[error("the answer has no {0}")]
    Missing(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::KekId;

    fn success(nth: usize, uid: &'static str) -> Item<'static> {
        Item::structure(
            Tag::BATCH_ITEM,
            [
                Item::bytes(Tag::UNIQUE_BATCH_ITEM_ID, batch_id(nth).to_vec()),
                Item::enumeration(Tag::RESULT_STATUS, 0),
                Item::structure(Tag::RESPONSE_PAYLOAD, [Item::text(Tag::UNIQUE_IDENTIFIER, uid)]),
            ],
        )
    }

    fn failure(reason: u32, text: &'static str) -> Item<'static> {
        Item::structure(
            Tag::BATCH_ITEM,
            [
                Item::enumeration(Tag::RESULT_STATUS, 1),
                Item::enumeration(Tag::RESULT_REASON, reason),
                Item::text(Tag::RESULT_MESSAGE, text),
            ],
        )
    }

    fn message(items: impl Into<Vec<Item<'static>>>) -> Item<'static> {
        Item::structure(Tag::RESPONSE_MESSAGE, items)
    }

    #[test]
    fn outcomes_follow_the_calls_not_the_answer() {
        let message = message([success(1, "b"), success(0, "a")]);
        let uids: Vec<_> = outcomes(&message, 2)
            .unwrap()
            .iter()
            .map(|outcome| {
                let uid = outcome.as_ref().unwrap().find(Tag::UNIQUE_IDENTIFIER).unwrap();
                uid.as_text().unwrap().to_owned()
            })
            .collect();
        assert_eq!(uids, ["a", "b"]);
    }

    #[test]
    fn refusal_of_the_whole_request_is_every_calls() {
        let message = message([failure(4, "can't\u{1b}[2J\u{202e}parse\n")]);
        let outcomes = outcomes(&message, 3).unwrap();
        assert_eq!(outcomes.len(), 3);
        for outcome in outcomes {
            assert_eq!(
                outcome.unwrap_err().to_string(),
                "Invalid Message, can't [2J parse"
            );
        }
    }

    #[test]
    fn unknown_reasons_are_readable() {
        let message = message([failure(0x8000_0042, "HSM quorum lost")]);
        let refusal = outcomes(&message, 1).unwrap().remove(0).unwrap_err();
        assert_eq!(refusal.to_string(), "reason 0x80000042, HSM quorum lost");
    }

    #[test]
    fn answers_that_do_not_fit_are_errors() {
        for (items, calls) in [
            (vec![], 1),
            (vec![success(0, "a"), success(1, "b")], 3),
            (vec![success(0, "a"), success(0, "b")], 2),
            (vec![success(0, "a")], 2),
            (vec![Item::structure(Tag::BATCH_ITEM, [])], 1),
            (
                vec![Item::structure(
                    Tag::BATCH_ITEM,
                    [Item::enumeration(Tag::RESULT_STATUS, 0)],
                )],
                1,
            ),
        ] {
            assert!(outcomes(&message(items), calls).is_err());
        }
        assert!(outcomes(&Item::structure(Tag::REQUEST_MESSAGE, []), 0).is_err());
    }

    #[test]
    fn versions_are_those_that_are_spoken() {
        for version in KmipVersion::SPOKEN {
            assert_eq!(version.to_string().parse::<KmipVersion>().unwrap(), version);
            assert_eq!(KmipVersion::of_item(&version.item()), Some(version));
        }
        for bad in ["1.0", "3.0", "1", "1.4.0", " 1.4", ""] {
            assert!(bad.parse::<KmipVersion>().is_err(), "{bad}");
        }
    }

    #[test]
    fn single_calls_carry_no_batch_fields() {
        let get = || Call::Get(KekId("7".into()));
        let version = KmipVersion::WITH_GCM;
        let one = request(version, None, &[get()]).unwrap();
        let two = request(version, None, &[get(), get()]).unwrap();
        let has_id = |bytes: &[u8]| {
            let message = Item::decode(bytes).unwrap();
            let mut items = message.all(Tag::BATCH_ITEM);
            items.all(|item| item.find(Tag::UNIQUE_BATCH_ITEM_ID).is_some())
        };
        assert!(!has_id(&one) && has_id(&two));
    }
}
