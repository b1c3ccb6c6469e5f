//! One token: how it is found, the session with it, and what its answers mean.

use std::collections::HashMap;

use cryptoki::context::{Function, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::object::ObjectHandle;
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::RawAuthPin;

use super::error::{self, TokenError};
use super::login::Login;
use super::mechanism::{Mechanism, Offered};
use super::settings::TokenChoice;
use crate::model::envelope::KekId;
use crate::provider::{PinRefusal, ProviderError};
use crate::secret::SecretBytes;

/// A KEK as a session sees it.
#[derive(Clone, Debug)]
pub(super) struct Kek {
    pub(super) mechanism: Mechanism,
    pub(super) key: ObjectHandle,
    pub(super) mac: Option<ObjectHandle>,
}

impl Kek {
    pub(super) fn mac(&self) -> Result<ObjectHandle, TokenError> {
        self.mac.ok_or(TokenError::NoValue)
    }
}

/// A session with a token.
pub(super) struct Token {
    context: Pkcs11,
    slot: Slot,
    /// Label and serial number, where the token tells them.
    name: Option<String>,
    /// Reads only; what writes opens a session of its own for as long as it takes. A login counts for both.
    pub(super) session: Session,
    /// Where the KEKs are, for this session.
    pub(super) keks: HashMap<KekId, Kek>,
}

impl Token {
    /// Opens a session with the token of `login`. Any other token is refused here, before it sees the PIN.
    pub(super) fn open(context: &Pkcs11, login: &Login) -> Result<Self, TokenError> {
        let (slot, info) = find(context, &login.token)?;
        let serial = info.as_ref().map(TokenInfo::serial_number);
        if let Some(found) = serial.filter(|serial| !serial.is_empty()) {
            let expected = login.serial.get_or_init(|| found.to_owned());
            if expected != found {
                return Err(TokenError::AnotherToken {
                    wanted: login.token.clone(),
                    expected: expected.clone(),
                    found: found.to_owned(),
                });
            }
        }
        login.state().described = info.as_ref().map(|info| {
            format!(
                "'{}' ({} by {}, serial {}, firmware {})",
                info.label(),
                info.model(),
                info.manufacturer_id(),
                info.serial_number(),
                info.firmware_version()
            )
        });
        Ok(Self {
            context: context.clone(),
            slot,
            name: info.map(|info| format!("{} {}", info.label(), info.serial_number())),
            session: context.open_ro_session(slot)?,
            keks: HashMap::new(),
        })
    }

    /// Tells it from the other tokens of its module, wherever it is put in.
    pub(super) fn name(&self) -> String {
        let slot = || format!("slot {}", self.slot.id());
        self.name.clone().unwrap_or_else(slot)
    }

    /// Tells it from the other tokens of its module, at this moment.
    pub(super) fn slot(&self) -> u64 {
        self.slot.id()
    }

    /// Presents `pin`, once, and not if it is the last try: a token that blocks itself takes every VM with it.
    pub(super) fn login(&self, pin: &SecretBytes) -> Result<(), TokenError> {
        match self.count().refusal() {
            Some(PinRefusal::LastTry) => return Err(refused(PinRefusal::NotTheLastTry)),
            Some(PinRefusal::Blocked) => return Err(refused(PinRefusal::Blocked)),
            _ => {}
        }
        let pin = RawAuthPin::new(Box::new(pin.expose().to_vec()));
        let login = || self.session.login_with_raw(UserType::User, &pin);
        let done = match login() {
            // Without a look at the PIN. The login before was ours, and this provider did not make it.
            Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                self.session.logout()?;
                login()
            }
            done => done,
        };
        done.map_err(|error| self.explain_login(error))
    }

    fn explain_login(&self, error: Error) -> TokenError {
        let Error::Pkcs11(rv, _) = error else {
            return error.into();
        };
        match rv {
            RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange => {
                TokenError::Pin(self.count().refusal().unwrap_or(PinRefusal::Wrong))
            }
            RvError::PinLocked => refused(PinRefusal::Blocked),
            RvError::PinExpired | RvError::PinTooWeak | RvError::UserPinNotInitialized => {
                refused(PinRefusal::NoneIsSet)
            }
            _ => error.into(),
        }
    }

    /// What the token says about its count of wrong PINs; nothing, if it does not describe itself.
    fn count(&self) -> WrongPins {
        let info = self.context.get_token_info(self.slot);
        info.map_or_else(
            |_| WrongPins::default(),
            |info| WrongPins {
                low: info.user_pin_count_low(),
                last_try: info.user_pin_final_try(),
                blocked: info.user_pin_locked(),
            },
        )
    }

    /// Ends the login of the process, and the session.
    pub(super) fn logout(self) {
        // Whatever the token says, the session ends here.
        let _ = self.session.logout();
    }

    /// A session that may write; the login counts for it too.
    pub(super) fn writable(&self) -> Result<Session, TokenError> {
        Ok(self.context.open_rw_session(self.slot)?)
    }

    /// Whether token and session are still there.
    pub(super) fn check(&self) -> Result<(), TokenError> {
        self.session.get_session_info()?;
        match (&self.name, self.context.get_token_info(self.slot)) {
            (Some(_), Err(error)) if error::is_lost(&error) => Err(error.into()),
            // Odd tokens have no information at all, and were found without it.
            (None, Err(_)) if !self.context.get_slots_with_token()?.contains(&self.slot) => {
                Err(Error::Pkcs11(RvError::TokenNotPresent, Function::GetSlotList).into())
            }
            _ => Ok(()),
        }
    }

    /// The mechanisms of the token, as far as they are known here.
    pub(super) fn offers(&self) -> Result<Vec<Offered>, TokenError> {
        let mut offers = Vec::new();
        for mechanism in self.context.get_mechanism_list(self.slot)? {
            // A mechanism may be listed and have no information; then it is not offered.
            if let Ok(info) = self.context.get_mechanism_info(self.slot, mechanism) {
                offers.push(Offered::new(mechanism, &info));
            }
        }
        Ok(offers)
    }
}

/// A token's count of wrong PINs, as far as it tells.
#[derive(Clone, Copy, Debug, Default)]
struct WrongPins {
    low: bool,
    last_try: bool,
    blocked: bool,
}

impl WrongPins {
    fn refusal(self) -> Option<PinRefusal> {
        match self {
            Self { blocked: true, .. } => Some(PinRefusal::Blocked),
            Self { last_try: true, .. } => Some(PinRefusal::LastTry),
            Self { low: true, .. } => Some(PinRefusal::FewTries),
            _ => None,
        }
    }
}

/// Without a look at the PIN.
fn refused(why: PinRefusal) -> TokenError {
    ProviderError::WrongPin(why).into()
}

fn find(context: &Pkcs11, wanted: &TokenChoice) -> Result<(Slot, Option<TokenInfo>), TokenError> {
    let slots = context.get_slots_with_token()?;
    if let TokenChoice::Slot(number) = wanted {
        let slot = slots.iter().find(|slot| slot.id() == *number).copied();
        // Odd tokens fail to describe themselves, and work.
        return match slot {
            Some(slot) => Ok((slot, context.get_token_info(slot).ok())),
            None => Err(not_found(wanted, &slots, &described(context, &slots))),
        };
    }
    let tokens = described(context, &slots);
    let matches = |info: &TokenInfo| match wanted {
        TokenChoice::Label(label) => info.token_initialized() && info.label() == label,
        TokenChoice::Serial(serial) => info.serial_number() == serial,
        TokenChoice::Slot(_) => false,
    };
    let mut found = tokens.iter().filter(|(_, info)| matches(info));
    match (found.next(), found.count()) {
        (Some((slot, info)), 0) => Ok((*slot, Some(info.clone()))),
        (Some(_), others) => Err(TokenError::Ambiguous {
            wanted: wanted.clone(),
            count: others + 1,
        }),
        (None, _) => Err(not_found(wanted, &slots, &tokens)),
    }
}

fn described(context: &Pkcs11, slots: &[Slot]) -> Vec<(Slot, TokenInfo)> {
    let info = |slot: &Slot| context.get_token_info(*slot).ok().map(|info| (*slot, info));
    slots.iter().filter_map(info).collect()
}

fn not_found(wanted: &TokenChoice, slots: &[Slot], tokens: &[(Slot, TokenInfo)]) -> TokenError {
    let initialized = tokens.iter().filter(|(_, info)| info.token_initialized());
    let describe = |(slot, info): &(Slot, TokenInfo)| {
        format!(
            "'{}' (serial {}, slot {})",
            info.label(),
            info.serial_number(),
            slot.id()
        )
    };
    let mut found: Vec<_> = initialized.map(describe).collect();
    // The one that is looked for may be among these.
    let silent = slots
        .iter()
        .filter(|slot| !tokens.iter().any(|(known, _)| known == *slot));
    found.extend(silent.map(|slot| {
        format!(
            "a token that does not describe itself (choose it by --slot {})",
            slot.id()
        )
    }));
    TokenError::NoToken {
        wanted: wanted.clone(),
        found: if found.is_empty() {
            "none".to_owned()
        } else {
            found.join(", ")
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worst_news_of_a_token_comes_first() {
        let all = WrongPins {
            low: true,
            last_try: true,
            blocked: true,
        };
        assert_eq!(all.refusal(), Some(PinRefusal::Blocked));
        let last = WrongPins {
            blocked: false,
            ..all
        };
        assert_eq!(last.refusal(), Some(PinRefusal::LastTry));
        let few = WrongPins {
            last_try: false,
            ..last
        };
        assert_eq!(few.refusal(), Some(PinRefusal::FewTries));
        assert_eq!(WrongPins::default().refusal(), None);
    }
}
