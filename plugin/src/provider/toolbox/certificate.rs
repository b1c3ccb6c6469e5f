//! What an admin has to know of an X.509 certificate: who it is, its fingerprint, how long it lasts.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::x509::{X509NameRef, X509Ref};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::printable;
use crate::host::local_time::rfc3339;
use crate::model::stored_as_text;

/// From this many days before its end on, a certificate is warned about.
const WARN_DAYS: i32 = 30;

/// SHA-256 of a certificate's DER form.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Fingerprint([u8; 32]);

impl Fingerprint {
    pub(crate) fn of(certificate: &X509Ref) -> Result<Self, ErrorStack> {
        let digest = certificate.digest(MessageDigest::sha256())?;
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&digest);
        Ok(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if nth == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}
#[derive(Debug, Error)]
#[error("{0:?} is not a SHA-256 fingerprint: 64 hex digits are needed, with or without colons")]
pub(crate) struct NotAFingerprint(String);

impl FromStr for Fingerprint {
    type Err = NotAFingerprint;

    fn from_str(text: &str) -> Result<Self, NotAFingerprint> {
        let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| NotAFingerprint(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

stored_as_text!(Fingerprint);

/// A certificate for an admin to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CertificateFacts {
    /// Distinguished name.
    pub subject: String,
    /// Distinguished name of who signed it.
    pub issuer: String,
    /// DNS names and IP addresses that it is for.
    pub names: Vec<String>,
    pub fingerprint: Fingerprint,
    /// RFC 3339, UTC.
    pub not_after: String,
    /// Negative once it has expired.
    pub days_left: i32,
}

impl fmt::Display for CertificateFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "certificate of {}, until {}", self.subject, self.not_after)
    }
}

impl CertificateFacts {
    pub(crate) fn of(certificate: &X509Ref) -> Result<Self, ErrorStack> {
        let now = Asn1Time::days_from_now(0)?;
        let left = now.diff(certificate.not_after())?;
        Ok(Self {
            subject: name(certificate.subject_name()),
            issuer: name(certificate.issuer_name()),
            names: alternative_names(certificate),
            fingerprint: Fingerprint::of(certificate)?,
            not_after: time(certificate.not_after())?,
            days_left: if left.days == 0 && left.secs < 0 {
                -1
            } else {
                left.days
            },
        })
    }

    pub(crate) fn has_expired(&self) -> bool {
        self.days_left < 0
    }

    /// What to tell about `whose` certificate as its end draws near.
    pub(crate) fn warning(&self, whose: &str) -> Option<String> {
        match self.days_left {
            ..0 => Some(format!("{whose} certificate expired on {}", self.not_after)),
            left @ 0..=WARN_DAYS => Some(format!(
                "{whose} certificate expires in {left} days, on {}",
                self.not_after
            )),
            _ => None,
        }
    }
}

/// As all times are told; as X.509 prints it, where that is in a year that RFC 3339 can't write.
fn time(at: &Asn1TimeRef) -> Result<String, ErrorStack> {
    let since = Asn1Time::from_unix(0)?.diff(at)?;
    let seconds = i64::from(since.days) * 24 * 60 * 60 + i64::from(since.secs);
    let found = u64::try_from(seconds)
        .ok()
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
    let text = found.map(rfc3339).unwrap_or_default();
    Ok(if text.is_empty() { at.to_string() } else { text })
}

fn name(name: &X509NameRef) -> String {
    let entry = |entry: &openssl::x509::X509NameEntryRef| {
        let key = entry.object().nid().short_name().unwrap_or("?");
        let value = String::from_utf8_lossy(entry.data().as_slice()).into_owned();
        printable(&format!("{key}={value}"))
    };
    name.entries().map(entry).collect::<Vec<_>>().join(", ")
}

fn alternative_names(certificate: &X509Ref) -> Vec<String> {
    let names = certificate.subject_alt_names();
    let text = |name: &openssl::x509::GeneralNameRef| {
        name.dnsname().map(printable).or_else(|| match name.ipaddress()? {
            v4 if v4.len() == 4 => Some(std::net::Ipv4Addr::from(<[u8; 4]>::try_from(v4).ok()?).to_string()),
            v6 => Some(std::net::Ipv6Addr::from(<[u8; 16]>::try_from(v6).ok()?).to_string()),
        })
    };
    names.iter().flatten().take(32).filter_map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lasting(days_left: i32) -> CertificateFacts {
        CertificateFacts {
            subject: String::new(),
            issuer: String::new(),
            names: Vec::new(),
            fingerprint: Fingerprint([0xAB; 32]),
            not_after: "2026-11-22T15:19:43Z".into(),
            days_left,
        }
    }

    #[test]
    fn warns_in_the_last_thirty_days_and_after() {
        assert_eq!(lasting(31).warning("the client"), None);
        assert_eq!(
            lasting(12).warning("the client").unwrap(),
            "the client certificate expires in 12 days, on 2026-11-22T15:19:43Z"
        );
        assert!(lasting(-3).warning("the client").unwrap().contains("expired on"));
        assert!(lasting(-3).has_expired() && !lasting(0).has_expired());
    }

    #[test]
    fn the_end_of_a_certificate_is_told_as_all_times_are() {
        for (text, told) in [
            ("20261122151943Z", "2026-11-22T15:19:43Z"),
            ("99991231235959Z", "9999-12-31T23:59:59Z"),
            ("19500101000000Z", "Jan  1 00:00:00 1950 GMT"),
        ] {
            assert_eq!(time(&Asn1Time::from_str(text).unwrap()).unwrap(), told);
        }
    }

    #[test]
    fn fingerprints_are_read_in_the_usual_spellings() {
        let fingerprint = Fingerprint([0xAB; 32]);
        for text in [
            fingerprint.to_string(),
            "ab".repeat(32),
            format!(" {fingerprint}\n"),
        ] {
            assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
        }
        for bad in ["", "AB", &"AB".repeat(31), &"AB".repeat(33), &"XY".repeat(32)] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
