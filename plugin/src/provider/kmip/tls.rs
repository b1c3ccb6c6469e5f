//! TLS to a KMS: 1.2 or newer, the client's certificate, and only the server that is trusted.
//!
//! The server's certificate is judged inside the handshake: an impostor gets neither a request nor a password.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::sys::socket::{setsockopt, sockopt};
use openssl::error::ErrorStack;
use openssl::ssl::{
    ErrorCode, HandshakeError, SslConnector, SslMethod, SslOptions, SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509, X509StoreContextRef, X509VerifyResult};

use super::address;
use super::certificate::{CertificateFacts, Fingerprint};
use super::endpoint::Endpoint;
use super::error::KmipError;
use super::identity::Identity;
use super::message::printable;
use super::store::ServerTrust;
use crate::provider::toolbox::timed::Timed;
use crate::provider::toolbox::{certificate_request, revocation};

/// Both sides of the trust, ready to connect with.
#[derive(Clone)]
pub(super) struct Tls {
    connector: SslConnector,
    trust: Arc<ServerTrust>,
    has_identity: bool,
}

/// `SSL_OP_CLEANSE_PLAINTEXT` of OpenSSL 3: received keys do not stay in its buffers. The crate has no name for it.
const CLEANSE_PLAINTEXT: u64 = 1 << 1;

impl Tls {
    pub(super) fn new(trust: &ServerTrust, identity: Option<&Identity>) -> Result<Self, ErrorStack> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        #[allow(
            clippy::useless_conversion,
            reason = "its width differs between versions of OpenSSL"
        )]
        builder.set_options(SslOptions::from_bits_retain(CLEANSE_PLAINTEXT.into()));
        // The host's own CAs, which the builder has loaded, have no say here.
        let mut store = X509StoreBuilder::new()?;
        if let ServerTrust::Ca(pem) = trust {
            for authority in X509::stack_from_pem(pem.as_bytes())? {
                store.add_cert(authority)?;
            }
            store.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
            revocation::add_lists(&mut store, pem.as_bytes())?;
        }
        builder.set_cert_store(store.build());
        if let Some(identity) = identity {
            let mut certificates = identity.certificates.iter();
            if let Some(leaf) = certificates.next() {
                builder.set_certificate(leaf)?;
            }
            for authority in certificates {
                builder.add_extra_chain_cert(authority.clone())?;
            }
            builder.set_private_key(&identity.key)?;
            builder.check_private_key()?;
        }
        Ok(Self {
            connector: builder.build(),
            trust: Arc::new(trust.clone()),
            has_identity: identity.is_some(),
        })
    }

    /// A connection to the trusted server at `endpoint`, whose addresses are raced, `good` first.
    pub(super) fn connect(
        &self,
        endpoint: &Endpoint,
        good: Option<SocketAddr>,
        deadline: Instant,
    ) -> Result<TlsStream, KmipError> {
        let addresses = address::of(endpoint, good, deadline)?;
        let (tls, endpoint) = (self.clone(), endpoint.clone());
        address::race(addresses, deadline, move |address| {
            tls.connect_to(&endpoint, address, deadline)
        })
    }

    fn connect_to(
        &self,
        endpoint: &Endpoint,
        address: SocketAddr,
        deadline: Instant,
    ) -> Result<TlsStream, KmipError> {
        let judge = Judge::new(Some(Arc::clone(&self.trust)));
        let by_name = matches!(*self.trust, ServerTrust::Ca(_));
        let stream = handshake(&self.connector, endpoint, address, deadline, &judge, by_name)
            .map_err(|failure| self.explain(failure, &judge))?;
        let server = judge.leaf();
        if server.is_none() {
            return Err(KmipError::NotTrusted("the server showed no certificate".into()));
        }
        Ok(TlsStream {
            server,
            peer: address,
            has_identity: self.has_identity,
            asked: certificate_request::came(stream.ssl()),
            answered: false,
            stream,
        })
    }

    fn explain(&self, failure: Failed, judge: &Judge) -> KmipError {
        if let Some(reason) = judge.verdict() {
            return KmipError::NotTrusted(reason);
        }
        failure.before_the_first_answer(self.has_identity, KmipError::NoConnection)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls(identity: {}, {:?})", self.has_identity, self.trust)
    }
}

/// The certificates that the server at `endpoint` shows, its own first. Nothing is trusted and nothing is sent.
pub(super) fn presented(endpoint: &Endpoint, deadline: Instant) -> Result<Vec<X509>, KmipError> {
    let addresses = address::of(endpoint, None, deadline)?;
    let endpoint = endpoint.clone();
    address::race(addresses, deadline, move |address| {
        presented_at(&endpoint, address, deadline)
    })
}

fn presented_at(endpoint: &Endpoint, address: SocketAddr, deadline: Instant) -> Result<Vec<X509>, KmipError> {
    let failed = |error: ErrorStack| KmipError::NoConnection(format!("TLS: {error}"));
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(failed)?;
    builder
        .set_min_proto_version(Some(SslVersion::TLS1_2))
        .map_err(failed)?;
    builder.set_cert_store(X509StoreBuilder::new().map_err(failed)?.build());
    let judge = Judge::new(None);
    let outcome = handshake(&builder.build(), endpoint, address, deadline, &judge, false);
    // A server that wants our certificate first ends the handshake, after it has shown its own.
    match (judge.chain(), outcome) {
        (chain, _) if !chain.is_empty() => Ok(chain),
        (_, Err(failure)) => Err(failure.before_the_first_answer(true, KmipError::NoConnection)),
        (_, Ok(_)) => Err(KmipError::NotTrusted("the server showed no certificate".into())),
    }
}

/// Decides on the server's certificate while the handshake runs, and remembers what it saw.
struct Judge {
    trust: Option<Arc<ServerTrust>>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    chain: Vec<X509>,
    verdict: Option<String>,
}

impl Judge {
    fn new(trust: Option<Arc<ServerTrust>>) -> Self {
        Self {
            trust,
            seen: Arc::default(),
        }
    }

    /// OpenSSL calls this for each certificate of the chain, and for each thing that is wrong with it.
    fn callback(&self) -> impl Fn(bool, &mut X509StoreContextRef) -> bool + Send + Sync + 'static {
        let (trust, seen) = (self.trust.clone(), Arc::clone(&self.seen));
        move |verified, context| {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(chain) = context.chain() {
                seen.chain = chain.iter().map(ToOwned::to_owned).collect();
            }
            let verdict = match trust.as_deref() {
                None => None,
                Some(ServerTrust::Pins(pins)) => judge_pins(pins, seen.chain.first()),
                Some(ServerTrust::Ca(_)) if verified => None,
                Some(ServerTrust::Ca(_)) => Some(judge_error(context.error(), seen.chain.first())),
            };
            let accepted = verdict.is_none();
            if !accepted {
                seen.verdict = verdict;
            }
            accepted
        }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn verdict(&self) -> Option<String> {
        self.seen().verdict.clone()
    }

    fn chain(&self) -> Vec<X509> {
        self.seen().chain.clone()
    }

    fn leaf(&self) -> Option<CertificateFacts> {
        let seen = self.seen();
        CertificateFacts::of(seen.chain.first()?).ok()
    }
}

/// Why a certificate is not the pinned one; `None` if it is.
fn judge_pins(pins: &[Fingerprint], leaf: Option<&X509>) -> Option<String> {
    let Some(facts) = leaf.and_then(|leaf| CertificateFacts::of(leaf).ok()) else {
        return Some("the server showed no readable certificate".into());
    };
    if !pins.contains(&facts.fingerprint) {
        let pinned: Vec<_> = pins.iter().map(Fingerprint::to_string).collect();
        return Some(format!(
            "the server shows another certificate than the trusted one: {} is trusted, {} is shown",
            pinned.join(" or "),
            facts.fingerprint
        ));
    }
    facts
        .has_expired()
        .then(|| format!("the server's certificate expired on {}", facts.not_after))
}

fn judge_error(error: X509VerifyResult, leaf: Option<&X509>) -> String {
    let facts = leaf.and_then(|leaf| CertificateFacts::of(leaf).ok());
    let shown = facts.map_or(String::new(), |facts| {
        format!(" (it shows {}, {})", facts.subject, facts.fingerprint)
    });
    format!(
        "the server's certificate does not verify: {}{shown}",
        error.error_string()
    )
}

/// Why a handshake, a read or a write failed.
struct Failed {
    why: Why,
    /// Whether the server had asked for the client's certificate by then.
    asked: bool,
}

enum Why {
    /// The other side closed or reset the connection.
    Closed(String),
    Io(String),
    Tls(ErrorStack),
}

impl Failed {
    fn local(stack: ErrorStack) -> Self {
        Self {
            why: Why::Tls(stack),
            asked: false,
        }
    }

    /// A server that has said nothing yet and goes may have turned us away; else it is as `otherwise` says.
    fn before_the_first_answer(
        self,
        has_identity: bool,
        otherwise: impl FnOnce(String) -> KmipError,
    ) -> KmipError {
        match self.why {
            Why::Closed(reason) if self.asked => KmipError::TurnedAway(reason),
            Why::Closed(reason) | Why::Io(reason) => otherwise(reason),
            Why::Tls(stack) => refusal(&stack, has_identity, self.asked, otherwise),
        }
    }

    fn after_an_answer(self, has_identity: bool) -> KmipError {
        match self.why {
            Why::Closed(reason) | Why::Io(reason) => KmipError::NoAnswer(reason),
            Why::Tls(stack) => refusal(&stack, has_identity, false, KmipError::NoAnswer),
        }
    }
}

fn handshake(
    connector: &SslConnector,
    endpoint: &Endpoint,
    address: SocketAddr,
    deadline: Instant,
    judge: &Judge,
    by_name: bool,
) -> Result<SslStream<Timed>, Failed> {
    let stream = connect_tcp(address, deadline)?;
    let mut configuration = connector.configure().map_err(Failed::local)?;
    configuration.set_verify_hostname(by_name);
    configuration.set_verify_callback(SslVerifyMode::PEER, judge.callback());
    certificate_request::watch(&mut configuration).map_err(Failed::local)?;
    configuration
        .connect(endpoint.host(), Timed { stream, deadline })
        .map_err(|error| match error {
            HandshakeError::SetupFailure(stack) => Failed::local(stack),
            HandshakeError::Failure(mid) | HandshakeError::WouldBlock(mid) => Failed {
                why: why(mid.error(), "TLS handshake"),
                asked: certificate_request::came(mid.ssl()),
            },
        })
}

fn why(error: &openssl::ssl::Error, doing: &str) -> Why {
    let closed = || Why::Closed(format!("{doing}: the server closed the connection"));
    if error.code() == ErrorCode::ZERO_RETURN {
        return closed();
    }
    match (error.ssl_error(), error.io_error()) {
        (Some(stack), _) if is_end_of_file(stack) => closed(),
        (Some(stack), _) if !stack.errors().is_empty() => Why::Tls(stack.clone()),
        (_, Some(error)) => why_io(error, doing),
        _ => closed(),
    }
}

/// OpenSSL 3 calls an end without a farewell an error of the protocol (SSL_R_UNEXPECTED_EOF_WHILE_READING).
fn is_end_of_file(stack: &ErrorStack) -> bool {
    stack.errors().iter().any(|error| error.reason_code() == 294)
}

fn why_io(error: &io::Error, doing: &str) -> Why {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Why::Io(format!("{doing} timed out")),
        io::ErrorKind::ConnectionRefused => Why::Io("connection refused".to_owned()),
        io::ErrorKind::UnexpectedEof => Why::Closed(format!("{doing}: the server closed the connection")),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            Why::Closed(format!("{doing}: {error}"))
        }
        _ => Why::Io(format!("{doing}: {error}")),
    }
}

/// `internal_error`: the server's own trouble.
const ALERT_INTERNAL_ERROR: i32 = 80;

/// What a failed handshake or read means: an alert about our certificate is the server's distrust, and so, perhaps, is any
/// other after it has `asked` for it.
fn refusal(
    stack: &ErrorStack,
    has_identity: bool,
    asked: bool,
    otherwise: impl FnOnce(String) -> KmipError,
) -> KmipError {
    // OpenSSL counts received alerts from 1000 on; RFC 8446 section 6.2 has their numbers.
    let alert = stack.errors().iter().find_map(|error| match error.reason_code() {
        code @ 1000..1256 => Some(code - 1000),
        _ => None,
    });
    let reason = match alert {
        Some(41 | 116) => "it asks for a client certificate",
        Some(42 | 43) => "it does not accept the client certificate",
        Some(44) => "the client certificate was revoked",
        Some(45) => "the client certificate has expired",
        Some(46) => "it has a problem with the client certificate",
        Some(48) => "it does not know the CA of the client certificate",
        Some(51) => "it can't verify the client certificate",
        Some(49) => "it denies access to the client certificate",
        Some(40) if !has_identity => "it refuses the handshake without a client certificate",
        _ => {
            let text: Vec<_> = stack
                .errors()
                .iter()
                .filter_map(openssl::error::Error::reason)
                .collect();
            let text = format!("TLS: {}", printable(&text.join(", ")));
            return match alert {
                Some(alert) if asked && alert != ALERT_INTERNAL_ERROR => KmipError::TurnedAway(text),
                _ => otherwise(text),
            };
        }
    };
    KmipError::RefusesUs(reason.into())
}

fn connect_tcp(address: SocketAddr, deadline: Instant) -> Result<TcpStream, Failed> {
    let left = deadline.saturating_duration_since(Instant::now());
    let connected = match left.is_zero() {
        true => Err(io::ErrorKind::TimedOut.into()),
        false => TcpStream::connect_timeout(&address, left),
    };
    connected
        .and_then(|stream| prepared(&stream).map(|()| stream))
        .map_err(|error| Failed {
            why: why_io(&error, "connect"),
            asked: false,
        })
}

/// In seconds: how long a connection is quiet before the other side is asked whether it is still there, and how often.
/// By default Linux would ask after two hours.
const KEEP_ALIVE_IDLE: u32 = 20;
const KEEP_ALIVE_EVERY: u32 = 5;
const KEEP_ALIVE_TRIES: u32 = 3;

fn prepared(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A firewall that forgets a quiet connection, or a host that is gone, shows between two calls rather than in one.
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &KEEP_ALIVE_IDLE)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &KEEP_ALIVE_EVERY)?;
    setsockopt(stream, sockopt::TcpKeepCount, &KEEP_ALIVE_TRIES)?;
    Ok(())
}

/// An open connection to a trusted server.
pub(super) struct TlsStream {
    stream: SslStream<Timed>,
    has_identity: bool,
    /// Whether the server asked for a certificate.
    asked: bool,
    /// Whether anything has come from it since the handshake.
    answered: bool,
    /// What the server showed.
    pub(super) server: Option<CertificateFacts>,
    /// Where it is.
    pub(super) peer: SocketAddr,
}

impl TlsStream {
    /// From now on, reads and writes end at `deadline`.
    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.stream.get_mut().deadline = deadline;
    }

    pub(super) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), KmipError> {
        while !bytes.is_empty() {
            match self.stream.ssl_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) => return Err(self.explain(&error, "sending")),
            }
        }
        Ok(())
    }

    pub(super) fn read_exact(&mut self, mut buffer: &mut [u8]) -> Result<(), KmipError> {
        while !buffer.is_empty() {
            match self.stream.ssl_read(buffer) {
                Ok(0) => return Err(self.fail(Why::Closed("the server closed the connection".into()))),
                Ok(read) => {
                    self.answered = true;
                    buffer = &mut buffer[read..];
                }
                Err(error) => return Err(self.explain(&error, "answer")),
            }
        }
        Ok(())
    }

    fn explain(&self, error: &openssl::ssl::Error, doing: &str) -> KmipError {
        self.fail(why(error, doing))
    }

    fn fail(&self, why: Why) -> KmipError {
        let failed = Failed {
            why,
            asked: self.asked,
        };
        match self.answered {
            true => failed.after_an_answer(self.has_identity),
            false => failed.before_the_first_answer(self.has_identity, KmipError::NoAnswer),
        }
    }
}
