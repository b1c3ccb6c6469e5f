//! TLS to a server: 1.2 or newer, the client's certificate, and only the server that is trusted.
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
use openssl::x509::store::{X509Store, X509StoreBuilder};
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509, X509StoreContextRef, X509VerifyResult};
use thiserror::Error;

use super::certificate::{CertificateFacts, Fingerprint};
use super::identity::ClientIdentity;
use super::timed::Timed;
use super::{certificate_request, printable, revocation};

/// By what a server is known to be the right one.
#[derive(Clone, PartialEq, Eq)]
pub(in crate::provider) enum Trust {
    /// Its certificate was signed by whom this host trusts, and bears its name.
    Host,
    /// Signed by one of these roots (PEM), and bears its name. Revocation lists among them are heeded.
    Roots(Vec<u8>),
    /// The same, and one of these that another has signed is enough.
    Authorities(Vec<u8>),
    /// Its certificate is one of these.
    Pins(Vec<Fingerprint>),
    /// Any: to see what it shows, never to send it anything.
    Anybody,
}

/// Both sides of the trust, ready to connect with.
#[derive(Clone)]
pub(in crate::provider) struct Tls {
    connector: SslConnector,
    trust: Arc<Trust>,
    has_identity: bool,
}

/// `SSL_OP_CLEANSE_PLAINTEXT` of OpenSSL 3: received keys do not stay in its buffers. The crate has no name for it.
const CLEANSE_PLAINTEXT: u64 = 1 << 1;

impl Tls {
    /// # Errors
    /// When a certificate or a list in `trust` can't be read, or certificate and key of `identity` do not fit.
    pub(in crate::provider) fn new(
        trust: Trust,
        identity: Option<&ClientIdentity>,
    ) -> Result<Self, ErrorStack> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        #[allow(
            clippy::useless_conversion,
            reason = "its width differs between versions of OpenSSL"
        )]
        builder.set_options(SslOptions::from_bits_retain(CLEANSE_PLAINTEXT.into()));
        if trust != Trust::Host {
            // The host's own CAs, which the builder has loaded, have no say here.
            builder.set_cert_store(trust.store()?);
        }
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
            trust: Arc::new(trust),
            has_identity: identity.is_some(),
        })
    }

    /// Over `stream`, with the server that is called `name`; an impostor gets neither a request nor a password.
    pub(in crate::provider) fn handshake(&self, name: &str, stream: Timed) -> Result<TlsStream, TlsFailure> {
        let judge = Judge::new(Arc::clone(&self.trust));
        let stream = self
            .shake(name, stream, &judge)
            .map_err(|failed| match judge.verdict() {
                Some(reason) => TlsFailure::NotTrusted(reason),
                None => failed.before_the_first_answer(self.has_identity),
            })?;
        let server = judge.leaf();
        if server.is_none() {
            return Err(TlsFailure::NotTrusted("the server showed no certificate".into()));
        }
        Ok(TlsStream {
            server,
            has_identity: self.has_identity,
            asked: certificate_request::came(stream.ssl()),
            answered: false,
            stream,
        })
    }

    fn shake(&self, name: &str, stream: Timed, judge: &Judge) -> Result<SslStream<Timed>, Failed> {
        let by_name = !matches!(*self.trust, Trust::Pins(_) | Trust::Anybody);
        let mut configuration = self.connector.configure().map_err(Failed::local)?;
        configuration.set_verify_hostname(by_name);
        configuration.set_verify_callback(SslVerifyMode::PEER, judge.callback());
        certificate_request::watch(&mut configuration).map_err(Failed::local)?;
        configuration.connect(name, stream).map_err(|error| match error {
            HandshakeError::SetupFailure(stack) => Failed::local(stack),
            HandshakeError::Failure(mid) | HandshakeError::WouldBlock(mid) => Failed {
                why: why(mid.error(), "TLS handshake"),
                asked: certificate_request::came(mid.ssl()),
            },
        })
    }
}

impl Trust {
    fn store(&self) -> Result<X509Store, ErrorStack> {
        let mut store = X509StoreBuilder::new()?;
        if let Self::Roots(pem) | Self::Authorities(pem) = self {
            for authority in X509::stack_from_pem(pem)? {
                store.add_cert(authority)?;
            }
            if matches!(self, Self::Authorities(_)) {
                store.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
            }
            revocation::add_lists(&mut store, pem)?;
        }
        Ok(store.build())
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tls(identity: {})", self.has_identity)
    }
}

/// The certificates that the server called `name` shows, its own first. Nothing is trusted and nothing is sent.
pub(in crate::provider) fn presented(name: &str, stream: Timed) -> Result<Vec<X509>, TlsFailure> {
    let tls = Tls::new(Trust::Anybody, None).map_err(|error| Failed::local(error).otherwise())?;
    let judge = Judge::new(Arc::clone(&tls.trust));
    // A server that wants our certificate first ends the handshake, after it has shown its own.
    match (tls.shake(name, stream, &judge), judge.chain()) {
        (_, chain) if !chain.is_empty() => Ok(chain),
        (Err(failed), _) => Err(failed.before_the_first_answer(true)),
        (Ok(_), _) => Err(TlsFailure::NotTrusted("the server showed no certificate".into())),
    }
}

/// A connection to `address`, which notices soon when the other side is gone.
pub(in crate::provider) fn connect_tcp(address: SocketAddr, deadline: Instant) -> Result<Timed, TlsFailure> {
    let left = deadline.saturating_duration_since(Instant::now());
    let connected = match left.is_zero() {
        true => Err(io::ErrorKind::TimedOut.into()),
        false => TcpStream::connect_timeout(&address, left),
    };
    connected
        .and_then(|stream| prepared(&stream).map(|()| Timed { stream, deadline }))
        .map_err(|error| {
            Failed {
                why: why_io(&error, "connect"),
                asked: false,
            }
            .otherwise()
        })
}

/// Why there is no connection, or none any more.
#[derive(Clone, Debug, Error)]
pub(in crate::provider) enum TlsFailure {
    /// The server is not the one that is trusted.
    #[error("{0}")]
    NotTrusted(String),
    /// The server does not trust us.
    #[error("{0}")]
    RefusesUs(String),
    /// It went before its first answer, after it had asked for our certificate: so a refusal looks in TLS 1.3 where no alert
    /// comes through.
    #[error(
        "it closed the connection before its first answer, after it had asked for the client certificate ({0})"
    )]
    TurnedAway(String),
    /// The other side closed or reset the connection.
    #[error("{0}")]
    Closed(String),
    /// The socket, or the resolver.
    #[error("{1}")]
    Io(io::ErrorKind, String),
    /// What is there does not speak TLS as it has to.
    #[error("{0}")]
    Protocol(String),
}

/// Decides on the server's certificate while the handshake runs, and remembers what it saw.
struct Judge {
    trust: Arc<Trust>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    chain: Vec<X509>,
    verdict: Option<String>,
}

impl Judge {
    fn new(trust: Arc<Trust>) -> Self {
        Self {
            trust,
            seen: Arc::default(),
        }
    }

    /// OpenSSL calls this for each certificate of the chain, and for each thing that is wrong with it.
    fn callback(&self) -> impl Fn(bool, &mut X509StoreContextRef) -> bool + Send + Sync + 'static {
        let (trust, seen) = (Arc::clone(&self.trust), Arc::clone(&self.seen));
        move |verified, context| {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(chain) = context.chain() {
                seen.chain = chain.iter().map(ToOwned::to_owned).collect();
            }
            let verdict = match &*trust {
                Trust::Anybody => None,
                Trust::Pins(pins) => judge_pins(pins, seen.chain.first()),
                _ if verified => None,
                _ => Some(judge_error(context.error(), seen.chain.first())),
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
    Io(io::ErrorKind, String),
    Tls(ErrorStack),
}

impl Failed {
    fn local(stack: ErrorStack) -> Self {
        Self {
            why: Why::Tls(stack),
            asked: false,
        }
    }

    /// A server that has said nothing yet and goes may have turned us away.
    fn before_the_first_answer(self, has_identity: bool) -> TlsFailure {
        match self.why {
            Why::Closed(reason) if self.asked => TlsFailure::TurnedAway(reason),
            Why::Tls(stack) => refusal(&stack, has_identity, self.asked),
            _ => self.otherwise(),
        }
    }

    fn after_an_answer(self, has_identity: bool) -> TlsFailure {
        match self.why {
            Why::Tls(stack) => refusal(&stack, has_identity, false),
            _ => self.otherwise(),
        }
    }

    fn otherwise(self) -> TlsFailure {
        match self.why {
            Why::Closed(reason) => TlsFailure::Closed(reason),
            Why::Io(kind, reason) => TlsFailure::Io(kind, reason),
            Why::Tls(stack) => TlsFailure::Protocol(format!("TLS: {stack}")),
        }
    }
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
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            Why::Io(io::ErrorKind::TimedOut, format!("{doing} timed out"))
        }
        io::ErrorKind::ConnectionRefused => Why::Io(error.kind(), "connection refused".to_owned()),
        io::ErrorKind::UnexpectedEof => Why::Closed(format!("{doing}: the server closed the connection")),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            Why::Closed(format!("{doing}: {error}"))
        }
        kind => Why::Io(kind, format!("{doing}: {error}")),
    }
}

/// `internal_error`: the server's own trouble.
const ALERT_INTERNAL_ERROR: i32 = 80;

/// What a failed handshake or read means: an alert about our certificate is the server's distrust, and so, perhaps, is any
/// other after it has `asked` for it.
fn refusal(stack: &ErrorStack, has_identity: bool, asked: bool) -> TlsFailure {
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
                Some(alert) if asked && alert != ALERT_INTERNAL_ERROR => TlsFailure::TurnedAway(text),
                _ => TlsFailure::Protocol(text),
            };
        }
    };
    TlsFailure::RefusesUs(reason.into())
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
#[derive(Debug)]
pub(in crate::provider) struct TlsStream {
    stream: SslStream<Timed>,
    has_identity: bool,
    /// Whether the server asked for a certificate.
    asked: bool,
    /// Whether anything has come from it since the handshake.
    answered: bool,
    /// What the server showed.
    pub(in crate::provider) server: Option<CertificateFacts>,
}

impl TlsStream {
    pub(in crate::provider) fn socket(&mut self) -> &mut Timed {
        self.stream.get_mut()
    }

    pub(in crate::provider) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), TlsFailure> {
        while !bytes.is_empty() {
            match self.stream.ssl_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) => return Err(self.fail(why(&error, "sending"))),
            }
        }
        Ok(())
    }

    /// What has come, at least one byte; where the other side has closed the connection, that is an error.
    pub(in crate::provider) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, TlsFailure> {
        match self.stream.ssl_read(buffer) {
            Ok(0) => Err(self.fail(Why::Closed("the server closed the connection".into()))),
            Ok(read) => {
                self.answered = true;
                Ok(read)
            }
            Err(error) => Err(self.fail(why(&error, "answer"))),
        }
    }

    fn fail(&self, why: Why) -> TlsFailure {
        let failed = Failed {
            why,
            asked: self.asked,
        };
        match self.answered {
            true => failed.after_an_answer(self.has_identity),
            false => failed.before_the_first_answer(self.has_identity),
        }
    }
}
