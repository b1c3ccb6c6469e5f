//! Where a KMS listens: `HOST[:PORT]`.

use std::fmt;
use std::str::FromStr;

use crate::model::stored_as_text;
use serde::{Deserialize, Serialize};
use thiserror::Error;
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Endpoint {
    host: String,
    port: u16,
}

impl Endpoint {
    /// What IANA has for KMIP.
    const PORT: u16 = 5696;

    /// A name or an address, an IPv6 one without brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }
    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}
#[derive(Debug, Error)]
#[error("{0:?} is not an endpoint: HOST, HOST:PORT or [IPV6]:PORT is expected, without https://")]
pub(crate) struct NotAnEndpoint(String);

impl FromStr for Endpoint {
    type Err = NotAnEndpoint;

    fn from_str(text: &str) -> Result<Self, NotAnEndpoint> {
        let wrong = || NotAnEndpoint(text.to_owned());
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(wrong)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?;
                match rest {
                    "" => (host, None),
                    rest => (host, Some(rest.strip_prefix(':').ok_or_else(wrong)?)),
                }
            }
            None if text.parse::<std::net::Ipv6Addr>().is_ok() => (text, None),
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let in_host = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        if host.is_empty() || host.len() > 253 || !host.chars().all(in_host) {
            return Err(wrong());
        }
        let port = match port {
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?,
            None => Self::PORT,
        };
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

stored_as_text!(Endpoint);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_ports_and_addresses() {
        for (text, shown) in [
            ("kms.example", "kms.example:5696"),
            ("kms.example:1234", "kms.example:1234"),
            ("10.0.0.7", "10.0.0.7:5696"),
            ("::1", "[::1]:5696"),
            ("[fd00::7]:99", "[fd00::7]:99"),
            ("[fd00::7]", "[fd00::7]:5696"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(shown.parse::<Endpoint>().unwrap(), endpoint);
        }
        for bad in [
            "",
            ":5696",
            "a:",
            "a:0",
            "a:70000",
            "a:b:c",
            "https://a",
            "a b",
            "[::1",
            "[kms]:1",
            "[::1]5696",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }
}
