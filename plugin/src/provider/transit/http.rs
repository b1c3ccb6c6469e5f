//! Requests to the server's HTTP API, and what its answers mean.
//!
//! A request that a broken connection swallowed is sent once more on a new one: none that this provider makes does
//! harm when it is done twice. Proxies from the environment and redirects are not followed: they would take the keys
//! elsewhere.

use std::io;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::IgnoredAny;
use ureq::Agent;
use ureq::http::{HeaderValue, Method, Request, Response};

use super::settings::TransitSettings;
use super::wire::{LaterResolver, Wire, is_broken};
use crate::model::deadlines::transit::UNUSED;
use crate::model::envelope::KekId;
use crate::provider::ProviderError;
use crate::provider::toolbox::printable;
use crate::provider::toolbox::tls::TlsFailure;
use crate::secret::SecretBytes;

/// The most bytes of an answer, without those for each item of a batch.
const MAX_ANSWER: usize = 16 * 1024;
/// The most connections to keep open: many VMs may start at once.
const IDLE: usize = 16;

/// Why the server did not do as asked.
#[derive(Debug)]
pub(super) enum Fault {
    /// No answer, or none of a working server.
    Unreachable(String),
    /// Its certificate, or ours, is not accepted.
    NotTrusted(String),
    /// It, or what stands before it, does not accept the client's certificate, or may not: the connection just ended.
    TurnedAway(String),
    /// The same where none was shown.
    WantsCertificate(String),
    /// It must be unsealed first.
    Sealed,
    /// The token may not do this, or is none.
    Denied(String),
    /// There is no such path; the text is empty where only the object is missing.
    NotFound(String),
    /// It does not like the request.
    Refused(String),
    /// It answers another question.
    Beside(String),
    /// It answers, and can't serve now.
    Trouble(String),
    /// The secret is not accepted.
    WrongCredential,
    /// The token has ended, or another is needed.
    Ended(String),
    /// Something that is known by now.
    Provider(ProviderError),
}

impl Fault {
    pub(super) fn unknown(kek: &KekId) -> Self {
        Self::Provider(ProviderError::UnknownKek(kek.clone()))
    }

    /// An answer that this version can't read.
    pub(super) fn odd(what: &str) -> Self {
        Self::Unreachable(format!("it does not answer as a transit engine does ({what})"))
    }

    pub(super) fn memory(error: io::Error) -> Self {
        Self::Provider(ProviderError::internal("getting memory for a secret")(error))
    }
}

impl From<Fault> for ProviderError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Unreachable(why) => Self::Unreachable(why),
            Fault::NotTrusted(why) => Self::NotSignedByOurs(why),
            Fault::Sealed => Self::ServerSealed,
            Fault::Denied(why) | Fault::Ended(why) => Self::CredentialRefused(why),
            Fault::TurnedAway(why) => Self::CertificateRefused(why),
            Fault::WantsCertificate(why) => Self::CertificateWanted(why),
            Fault::NotFound(why) if why.is_empty() => {
                Self::Unusable("the server does not know what it was asked for".into())
            }
            Fault::NotFound(why) => Self::Unusable(why),
            Fault::Refused(why) => Self::Refused(why),
            Fault::Beside(why) => Self::BesideTheQuestion(why),
            Fault::Trouble(why) => Self::Trouble(why),
            Fault::WrongCredential => Self::WrongCredential,
            Fault::Provider(error) => error,
        }
    }
}

/// A request: its path below `/v1/`, its body in JSON.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) method: &'a Method,
    pub(super) path: &'a str,
    pub(super) body: &'a [u8],
    /// How many items the answer may have.
    pub(super) items: usize,
}

impl<'a> Ask<'a> {
    pub(super) fn get(path: &'a str) -> Self {
        Self {
            method: &Method::GET,
            path,
            body: &[],
            items: 0,
        }
    }

    pub(super) fn delete(path: &'a str) -> Self {
        Self {
            method: &Method::DELETE,
            ..Self::get(path)
        }
    }

    pub(super) fn post(path: &'a str, body: &'a [u8]) -> Self {
        Self {
            method: &Method::POST,
            body,
            ..Self::get(path)
        }
    }

    pub(super) fn items(mut self, items: usize) -> Self {
        self.items = items;
        self
    }
}

/// What most answers have their content in.
#[derive(Deserialize)]
pub(super) struct Data<T> {
    pub(super) data: T,
}

/// An answer: its body may hold a key or a token.
pub(super) struct Answer {
    pub(super) status: u16,
    body: SecretBytes,
}

impl Answer {
    pub(super) fn json<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Fault> {
        serde_json::from_slice(self.body.expose()).map_err(|error| Fault::odd(&error.to_string()))
    }

    /// What the server complains of, in the form of its API; else it is something else that answers.
    fn errors(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<String>,
        }
        let found: Errors = serde_json::from_slice(self.body.expose()).ok()?;
        Some(printable(&found.errors.join("; ")))
    }

    /// Whether it has results, whatever its status says.
    fn has_data(&self) -> bool {
        self.json::<Data<Option<IgnoredAny>>>()
            .is_ok_and(|found| found.data.is_some())
    }

    /// Itself, unless its status says that nothing was done.
    fn checked(self, ask: Ask) -> Result<Self, Fault> {
        if let 200..=299 = self.status {
            return Ok(self);
        }
        let errors = match self.errors() {
            Some(errors) if !(300..=399).contains(&self.status) => errors,
            _ => return Err(self.of_another(ask)),
        };
        let what = format!(
            "{} {}: {}",
            ask.method,
            ask.path,
            if errors.is_empty() {
                "no reason given"
            } else {
                &errors
            }
        );
        match self.status {
            401 | 403 => Err(Fault::Denied(format!("the server denies {what}"))),
            404 if errors.is_empty() => Err(Fault::NotFound(String::new())),
            404 => Err(Fault::NotFound(format!("the server does not know {what}"))),
            // OpenBao kept the words of Vault.
            503 if errors.contains("sealed") => Err(Fault::Sealed),
            // The API's documentation lists these: a standby that sends its clients elsewhere, a node that has not caught up,
            // a quota, and the kinds of standby that serve nothing.
            412 => Err(Fault::Trouble(format!(
                "this node has not caught up with the cluster yet (status 412 for {what})"
            ))),
            429 => Err(Fault::Trouble(format!(
                "it limits how often it may be asked, or is a standby (status 429 for {what})"
            ))),
            472 | 473 => Err(Fault::Trouble(format!(
                "this node is a standby for another cluster (status {} for {what})",
                self.status
            ))),
            500..=599 => Err(Fault::Trouble(format!("status {} for {what}", self.status))),
            _ => Err(Fault::Refused(format!("the server refuses {what}"))),
        }
    }

    /// What a no means that is not in the form of the API: a standby's redirect, or the page of a proxy, which says nothing of
    /// any key.
    fn of_another(&self, ask: Ask) -> Fault {
        let title = title(self.body.expose());
        let what = format!(
            "what answers {} {} with status {}{} is not the server",
            ask.method, ask.path, self.status, title
        );
        match self.status {
            300..=399 => Fault::Trouble(format!(
                "this node is a standby that sends its clients to another one (status {}), and redirects are not followed: name \
                 the active node or a load balancer in its address",
                self.status
            )),
            // What nginx calls an error of the client's certificate, and shows as 400; denied by whom it lets pass.
            401 | 403 | 495 | 496 => Fault::TurnedAway(what),
            400 if title.to_lowercase().contains("certificate") => Fault::TurnedAway(what),
            _ => Fault::Trouble(what),
        }
    }
}

/// Speaks to one server; clones share their connections.
#[derive(Clone)]
pub(super) struct Client {
    agent: Agent,
    base: String,
    namespace: Option<HeaderValue>,
    shows_certificate: bool,
    /// What will be wrong soon.
    pub(super) warning: Option<String>,
}

impl Client {
    /// A client that shows the certificate in `identity`; nothing is sent yet.
    pub(super) fn new(settings: &TransitSettings, identity: Option<&SecretBytes>) -> Result<Self, Fault> {
        let server_name = settings.server_name.as_ref().map(|name| name.as_str().to_owned());
        let wire = Wire::new(settings.ca.as_deref(), server_name, identity).map_err(Fault::NotTrusted)?;
        let config = Agent::config_builder()
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_response_header_size(MAX_ANSWER)
            .max_idle_connections_per_host(IDLE)
            .max_idle_connections(IDLE)
            .max_idle_age(UNUSED)
            .user_agent(concat!("virtseal/", env!("CARGO_PKG_VERSION")))
            .build();
        let namespace = settings
            .namespace
            .as_ref()
            .map(|namespace| HeaderValue::from_str(namespace.as_str()))
            .transpose()
            .map_err(|_| Fault::odd("a namespace that no header holds"))?;
        Ok(Self {
            warning: wire.warning.clone(),
            agent: Agent::with_parts(config, wire, LaterResolver),
            base: format!("{}/v1/", settings.address),
            namespace,
            shows_certificate: identity.is_some(),
        })
    }

    /// Asks until `deadline`; an answer whose status says that nothing was done is a fault.
    pub(super) fn ask(
        &self,
        token: Option<&SecretBytes>,
        ask: Ask,
        deadline: Instant,
    ) -> Result<Answer, Fault> {
        let answer = self.ask_raw(token, ask, deadline)?;
        self.judged(answer, ask)
    }

    fn judged(&self, answer: Answer, ask: Ask) -> Result<Answer, Fault> {
        answer.checked(ask).map_err(|fault| match fault {
            Fault::TurnedAway(why) => self.turned_away(why),
            fault => fault,
        })
    }

    fn turned_away(&self, why: String) -> Fault {
        match self.shows_certificate {
            true => Fault::TurnedAway(why),
            false => Fault::WantsCertificate(why),
        }
    }

    /// As [`Client::ask`], but hands out also what a batch answers with status 400.
    pub(super) fn ask_batch(
        &self,
        token: &SecretBytes,
        ask: Ask,
        deadline: Instant,
    ) -> Result<Answer, Fault> {
        let answer = self.ask_raw(Some(token), ask, deadline)?;
        if answer.status == 400 && answer.has_data() {
            return Ok(answer);
        }
        self.judged(answer, ask)
    }

    fn ask_raw(&self, token: Option<&SecretBytes>, ask: Ask, deadline: Instant) -> Result<Answer, Fault> {
        let first = self.send(token, ask, deadline);
        let again = match &first {
            Err(ureq::Error::Io(error)) => is_broken(error.kind()) && Instant::now() < deadline,
            _ => false,
        };
        let answer = if again {
            self.send(token, ask, deadline)
        } else {
            first
        };
        answer.map_err(|error| self.fault(error, deadline))
    }

    fn send(&self, token: Option<&SecretBytes>, ask: Ask, deadline: Instant) -> Result<Answer, ureq::Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut request = Request::builder()
            .method(ask.method)
            .uri(format!("{}{}", self.base, ask.path))
            .header("X-Vault-Request", "true");
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = token {
            let mut value = HeaderValue::from_bytes(token.expose()).map_err(ureq::http::Error::from)?;
            value.set_sensitive(true);
            request = request.header("X-Vault-Token", value);
        }
        let response = if ask.method == Method::POST {
            self.run(
                request
                    .header("Content-Type", "application/json")
                    .body(ask.body)?,
                left,
            )?
        } else {
            self.run(request.body(())?, left)?
        };
        let status = response.status().as_u16();
        let body = response.into_body();
        let most = MAX_ANSWER + 512 * ask.items;
        // Each page of secret memory takes its time.
        let told = body.content_length().and_then(|told| usize::try_from(told).ok());
        let limit = told.map_or(most, |told| told.min(most));
        let body = SecretBytes::read_from(body.into_reader(), limit)?;
        Ok(Answer { status, body })
    }

    fn run(
        &self,
        request: Request<impl ureq::AsSendBody>,
        left: Duration,
    ) -> Result<Response<ureq::Body>, ureq::Error> {
        let request = self
            .agent
            .configure_request(request)
            .timeout_global(Some(left))
            .build();
        self.agent.run(request)
    }

    fn fault(&self, error: ureq::Error, deadline: Instant) -> Fault {
        let address = self.base.trim_end_matches("/v1/");
        let why = match error {
            ureq::Error::Other(error) => match error.downcast::<TlsFailure>() {
                Ok(error) => match *error {
                    TlsFailure::NotTrusted(why) | TlsFailure::Protocol(why) => return Fault::NotTrusted(why),
                    error @ (TlsFailure::TurnedAway(_) | TlsFailure::RefusesUs(_)) => {
                        return self.turned_away(format!("{address}: {error}"));
                    }
                    error => error.to_string(),
                },
                Err(error) => error.to_string(),
            },
            ureq::Error::Http(_) => return Fault::WrongCredential,
            ureq::Error::Timeout(_) => "no answer in time".to_owned(),
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                "no answer in time".to_owned()
            }
            ureq::Error::Io(error) => error.to_string(),
            ureq::Error::HostNotFound => "no such host".to_owned(),
            error => error.to_string(),
        };
        let late = if Instant::now() >= deadline {
            ", the time is up"
        } else {
            ""
        };
        Fault::Unreachable(printable(&format!("{address}: {why}{late}")))
    }
}

/// The title of a page in HTML, in parentheses; nothing where there is none.
fn title(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let (_, rest) = text.split_once("<title>").unwrap_or_default();
    match rest.split_once("</title>") {
        Some((title, _)) => format!(" ({})", printable(title)),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::ErrorClass;

    fn fault(status: u16, body: &str) -> Fault {
        let body = SecretBytes::take(&mut body.as_bytes().to_vec()).unwrap();
        let checked = Answer { status, body }.checked(Ask::get("transit/keys/x"));
        checked
            .err()
            .unwrap_or_else(|| panic!("{status} says that it was done"))
    }

    #[test]
    fn every_status_of_the_api_has_one_meaning() {
        let reason = r#"{"errors":["why"]}"#;
        for (status, body, wanted) in [
            (307, "", ErrorClass::Trouble),
            (302, reason, ErrorClass::Trouble),
            (400, reason, ErrorClass::ForGood),
            (401, reason, ErrorClass::Client),
            (403, reason, ErrorClass::Client),
            (412, reason, ErrorClass::Trouble),
            (429, reason, ErrorClass::Trouble),
            (429, "", ErrorClass::Trouble),
            (472, "", ErrorClass::Trouble),
            (473, reason, ErrorClass::Trouble),
            (500, reason, ErrorClass::Trouble),
            (502, "<html>", ErrorClass::Trouble),
            (503, r#"{"errors":["Vault is sealed"]}"#, ErrorClass::Trouble),
        ] {
            let fault = fault(status, body);
            let shown = format!("{fault:?}");
            let error = ProviderError::from(fault);
            assert_eq!(error.class(), wanted, "{status}: {shown}");
            assert!(!error.to_string().ends_with(": "), "{status}: {error}");
        }
        assert!(matches!(
            fault(503, r#"{"errors":["Vault is sealed"]}"#),
            Fault::Sealed
        ));
        assert!(matches!(fault(404, r#"{"errors":[]}"#), Fault::NotFound(why) if why.is_empty()));
        assert!(matches!(fault(404, reason), Fault::NotFound(why) if why.contains("why")));
        assert!(
            matches!(fault(403, r#"{"errors":[]}"#), Fault::Denied(why) if why.contains("no reason given"))
        );
    }

    #[test]
    fn no_page_of_a_proxy_speaks_for_the_server() {
        let page = |title: &str| format!("<html><head><title>{title}</title></head></html>");
        for (status, body) in [
            (404, page("404 Not Found")),
            (404, String::new()),
            (404, r#"{"error":"no such route"}"#.to_owned()),
            (400, page("400 Bad Request")),
            (400, "Client sent an HTTP request to an HTTPS server.".to_owned()),
            (405, String::new()),
            (504, page("504 Gateway Time-out")),
        ] {
            assert!(
                matches!(fault(status, &body), Fault::Trouble(_)),
                "{status} {body}"
            );
        }
        for (status, body) in [
            (400, page("400 No required SSL certificate was sent")),
            (400, page("400 The SSL certificate error")),
            (401, page("401 Authorization Required")),
            (403, page("403 Forbidden")),
            (495, String::new()),
            (496, String::new()),
        ] {
            assert!(
                matches!(fault(status, &body), Fault::TurnedAway(_)),
                "{status} {body}"
            );
        }
    }
}
