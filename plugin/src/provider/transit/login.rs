//! Logging in, and staying logged in.
//!
//! A token is renewed after two thirds of its time. Where it can't be (its maximum is reached), AppRole and
//! certificate log in anew; a bare token ends, which `status` says beforehand.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::http::{Answer, Ask, Client, Data, Fault};
use super::settings::{Auth, TransitSettings};
use crate::model::deadlines::transit::{LEAST, LEAST_OF_SHORT};
use crate::secret::{SecretBytes, Transient};

/// A token, and the connection that it was made for.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) token: SecretBytes,
    lease: Lease,
}

/// How long a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    /// From when on; `time` counts from here.
    since: Instant,
    /// For ever without it.
    time: Option<Duration>,
    renewable: bool,
    /// Nothing makes it last longer.
    ends: bool,
}

impl Lease {
    fn new(seconds: u64, renewable: bool) -> Self {
        // More than any server grants, and what sums of time can hold.
        let seconds = seconds.min(100 * 365 * 86400);
        Self {
            since: Instant::now(),
            // A token without an end has 0 here.
            time: (seconds > 0).then(|| Duration::from_secs(seconds)),
            renewable,
            ends: false,
        }
    }

    /// When to do something about it, if there is anything to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let time = self.time.filter(|_| !self.ends)?;
        Some(self.since + time * 2 / 3)
    }

    pub(super) fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= Instant::now())
    }

    /// Until it has to be renewed. One that can't be, and comes to its end, is due all the time: that is tried seldom.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let least = match self.time {
            Some(time) if time < 4 * LEAST => LEAST_OF_SHORT.max(time / 8),
            _ => LEAST,
        };
        Some(self.due()?.saturating_duration_since(Instant::now()).max(least))
    }

    pub(super) fn left(&self) -> Option<Duration> {
        self.time
            .map(|time| (self.since + time).saturating_duration_since(Instant::now()))
    }
}

#[derive(Deserialize)]
struct Granted<'a> {
    #[serde(borrow)]
    auth: Option<Grant<'a>>,
}

#[derive(Deserialize)]
struct Grant<'a> {
    #[serde(borrow)]
    client_token: Cow<'a, str>,
    lease_duration: u64,
    renewable: bool,
}

impl<'a> Grant<'a> {
    fn of(answer: &'a Answer, otherwise: &str) -> Result<Self, Fault> {
        let granted: Granted<'a> = answer.json()?;
        granted.auth.ok_or_else(|| Fault::odd(otherwise))
    }
}

#[derive(Deserialize)]
struct Lookup {
    ttl: u64,
    #[serde(default)]
    renewable: bool,
}

impl Session {
    /// Logs in with `credential`.
    pub(super) fn login(
        settings: &TransitSettings,
        credential: &SecretBytes,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        match &settings.auth {
            Auth::Token {} => {
                let client = Client::new(settings, None)?;
                let token = copy(credential)?;
                let lease = look_up(&client, &token, deadline).map_err(wrong_if_denied)?;
                Ok(Self { client, token, lease })
            }
            Auth::AppRole { role_id, mount } => {
                let client = Client::new(settings, None)?;
                let secret_id =
                    std::str::from_utf8(credential.expose()).map_err(|_| Fault::WrongCredential)?;
                let body = json(&AppRoleLogin { role_id, secret_id })?;
                Self::granted(client, &format!("auth/{mount}/login"), &body, deadline)
            }
            Auth::Cert { role, mount } => {
                // What is wrong without it is not wrong with it.
                Client::new(settings, None)?;
                let client = Client::new(settings, Some(credential)).map_err(|fault| match fault {
                    Fault::NotTrusted(why) => Fault::Ended(why),
                    other => other,
                })?;
                let body = json(&CertLogin {
                    name: role.as_deref(),
                })?;
                Self::granted(client, &format!("auth/{mount}/login"), &body, deadline)
            }
        }
    }

    fn granted(client: Client, path: &str, body: &[u8], deadline: Instant) -> Result<Self, Fault> {
        let answer = client
            .ask(None, Ask::post(path, body), deadline)
            .map_err(|fault| match fault {
                // Which one it is only the words tell, and these differ.
                Fault::Refused(_) => Fault::WrongCredential,
                fault => fault,
            })?;
        let grant = Grant::of(&answer, "a login without a token")?;
        let token = SecretBytes::copy_of(grant.client_token.as_bytes()).map_err(Fault::memory)?;
        let lease = Lease::new(grant.lease_duration, grant.renewable);
        Ok(Self { client, token, lease })
    }

    pub(super) fn lease(&self) -> Lease {
        self.lease
    }

    /// Whether the server still takes the token.
    pub(super) fn probe(&self, deadline: Instant) -> Result<(), Fault> {
        look_up(&self.client, &self.token, deadline).map(drop)
    }

    /// The session as one whose token comes to its end: to ask again and again would be of no use.
    pub(super) fn ending(&self) -> Result<Self, Fault> {
        Ok(Self {
            client: self.client.clone(),
            token: copy(&self.token)?,
            lease: Lease {
                ends: true,
                ..self.lease
            },
        })
    }

    /// The session with its token renewed; the faults of a token that can't be are [`Fault::Denied`] and
    /// [`Fault::Refused`].
    pub(super) fn renewed(&self, deadline: Instant) -> Result<Self, Fault> {
        if !self.lease.renewable {
            return Err(Fault::Refused("its token can't be renewed".to_owned()));
        }
        let ask = Ask::post("auth/token/renew-self", b"{}");
        let answer = self.client.ask(Some(&self.token), ask, deadline)?;
        let grant = Grant::of(&answer, "a renewal without a token")?;
        let lease = Lease::new(grant.lease_duration, grant.renewable);
        let times = self.lease.time.zip(lease.time);
        if times.is_some_and(|(then, now)| now < then / 2) {
            return Err(Fault::Refused(
                "its token is near the end of its maximum lifetime".to_owned(),
            ));
        }
        Ok(Self {
            client: self.client.clone(),
            token: copy(&self.token)?,
            lease,
        })
    }
}

#[derive(Serialize)]
struct AppRoleLogin<'a> {
    role_id: &'a str,
    secret_id: &'a str,
}

#[derive(Serialize)]
struct CertLogin<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
}

fn look_up(client: &Client, token: &SecretBytes, deadline: Instant) -> Result<Lease, Fault> {
    let answer = client.ask(Some(token), Ask::get("auth/token/lookup-self"), deadline)?;
    let Data::<Lookup> { data } = answer.json()?;
    Ok(Lease::new(data.ttl, data.renewable))
}

fn wrong_if_denied(fault: Fault) -> Fault {
    match fault {
        Fault::Denied(_) => Fault::WrongCredential,
        fault => fault,
    }
}

/// JSON in memory that is wiped, and that does not move while it is written.
pub(super) fn json(value: &impl Serialize) -> Result<Transient, Fault> {
    let mut text = Zeroizing::new(Vec::with_capacity(4096));
    serde_json::to_writer(&mut *text, value)
        .map_err(|error| Fault::odd(&format!("a request that is no JSON: {error}")))?;
    Ok(text)
}

pub(super) fn copy(secret: &SecretBytes) -> Result<SecretBytes, Fault> {
    SecretBytes::copy_of(secret.expose()).map_err(Fault::memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_renewed_before_its_end() {
        let lease = Lease::new(90, true);
        let due = lease.due().unwrap() - lease.since;
        assert_eq!(due, Duration::from_secs(60));
        assert!(Lease::new(u64::MAX, true).due().is_some());
        assert!(lease.left().unwrap() > Duration::from_secs(60));
        assert_eq!(
            (Lease::new(0, false).due(), Lease::new(0, false).left()),
            (None, None)
        );
    }

    /// Seen before: one that can't be renewed, and is due, cost 2 to 4 requests a second.
    #[test]
    fn a_token_that_stays_due_is_looked_at_seldom() {
        let begun = |seconds, ago| Lease {
            since: Instant::now() - Duration::from_secs(ago),
            ..Lease::new(seconds, false)
        };
        assert_eq!(begun(3600, 3000).next_look(), Some(LEAST));
        assert_eq!(begun(20, 19).next_look(), Some(LEAST));
        for seconds in 1..20 {
            assert!(begun(seconds, seconds).next_look() >= Some(LEAST_OF_SHORT));
        }
        let early = begun(3600, 0).next_look().unwrap();
        assert!(early > Duration::from_secs(2390) && early <= Duration::from_secs(2400));
        assert_eq!(begun(0, 0).next_look(), None, "it lasts for ever");
    }
}
