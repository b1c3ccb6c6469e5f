//! TLS to a server: 1.2 or newer, the client's certificate, and only the server that is trusted.
//!
//! The server's certificate is judged inside the handshake: an impostor gets neither a request nor a password.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
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
use super::{certificate_request, lock, printable, revocation};

/// By what a server is known to be the right one.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Trust {
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
pub(crate) struct Tls {
    connector: SslConnector,
    trust: Arc<Trust>,
    has_identity: bool,
}

/// `SSL_OP_CLEANSE_PLAINTEXT` of OpenSSL 3: received keys do not stay in its buffers. The crate has no name for it.
const CLEANSE_PLAINTEXT: u64 = 1 << 1;

impl Tls {
    /// # Errors
    /// When a certificate or a list in `trust` can't be read, or certificate and key of `identity` do not fit.
    pub(crate) fn new(trust: Trust, identity: Option<&ClientIdentity>) -> Result<Self, ErrorStack> {
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
    pub(crate) fn handshake(&self, name: &str, stream: Timed) -> Result<TlsStream, TlsFailure> {
        let (shaken, seen) = self.shake(name, stream)?;
        let stream = shaken.map_err(|failure| seen.verdict.map_or(failure, TlsFailure::NotTrusted))?;
        let leaf = seen.chain.first();
        let Some(server) = leaf.and_then(|leaf| CertificateFacts::of(leaf).ok()) else {
            return Err(no_certificate());
        };
        Ok(TlsStream {
            server,
            ours: OurCertificate {
                is_there: self.has_identity,
                was_asked_for: certificate_request::came(stream.ssl()),
            },
            stream,
        })
    }

    /// What the handshake came to, and what was seen of the server's certificate meanwhile.
    fn shake(&self, name: &str, stream: Timed) -> Result<(Shaken, Seen), TlsFailure> {
        let seen = Arc::default();
        let by_name = !matches!(*self.trust, Trust::Pins(_) | Trust::Anybody);
        let mut configuration = self.connector.configure().map_err(no_tls)?;
        configuration.set_verify_hostname(by_name);
        configuration.set_verify_callback(
            SslVerifyMode::PEER,
            judge(Arc::clone(&self.trust), Arc::clone(&seen)),
        );
        certificate_request::watch(&mut configuration).map_err(no_tls)?;
        let shaken = configuration.connect(name, stream).map_err(|error| match error {
            HandshakeError::SetupFailure(stack) => no_tls(stack),
            HandshakeError::Failure(mid) | HandshakeError::WouldBlock(mid) => {
                let ours = OurCertificate {
                    is_there: self.has_identity,
                    was_asked_for: certificate_request::came(mid.ssl()),
                };
                failure(mid.error(), "TLS handshake", ours)
            }
        });
        let seen = std::mem::take(&mut *lock(&seen));
        Ok((shaken, seen))
    }
}

type Shaken = Result<SslStream<Timed>, TlsFailure>;

fn no_tls(stack: ErrorStack) -> TlsFailure {
    TlsFailure::Protocol(format!("TLS: {stack}"))
}

fn no_certificate() -> TlsFailure {
    TlsFailure::NotTrusted("the server showed no certificate".into())
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

/// The certificates that the server called `name` shows, its own first. Nothing is trusted and nothing is sent.
pub(crate) fn presented(name: &str, stream: Timed) -> Result<Vec<X509>, TlsFailure> {
    let mut tls = Tls::new(Trust::Anybody, None).map_err(no_tls)?;
    // That no certificate is shown to it explains nothing here.
    tls.has_identity = true;
    // A server that wants our certificate first ends the handshake, after it has shown its own.
    match tls.shake(name, stream)? {
        (_, seen) if !seen.chain.is_empty() => Ok(seen.chain),
        (shaken, _) => Err(shaken.err().unwrap_or_else(no_certificate)),
    }
}

/// A connection to `address`, which notices soon when the other side is gone.
pub(crate) fn connect_tcp(address: SocketAddr, deadline: Instant) -> Result<Timed, TlsFailure> {
    let left = deadline.saturating_duration_since(Instant::now());
    let connected = match left.is_zero() {
        true => Err(io::ErrorKind::TimedOut.into()),
        false => TcpStream::connect_timeout(&address, left),
    };
    connected
        .and_then(|stream| prepared(&stream).map(|()| Timed { stream, deadline }))
        .map_err(|error| io_failure(&error, "connect"))
}

/// Why there is no connection, or none any more.
#[derive(Clone, Debug, Error)]
pub(crate) enum TlsFailure {
    /// The server is not the one that is trusted.
    #[error("{0}")]
    NotTrusted(String),
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
    #[error("{1}")]
    Io(io::ErrorKind, String),
    /// What is there does not speak TLS as it has to.
    #[error("{0}")]
    Protocol(String),
}

/// What a handshake has shown of the server.
#[derive(Default)]
struct Seen {
    /// Its own certificate first.
    chain: Vec<X509>,
    /// Why it is not trusted.
    verdict: Option<String>,
}

/// Decides on the server's certificate while the handshake runs: OpenSSL calls it for each certificate of the chain, and for each
/// thing that is wrong with it.
fn judge(
    trust: Arc<Trust>,
    seen: Arc<Mutex<Seen>>,
) -> impl Fn(bool, &mut X509StoreContextRef) -> bool + Send + Sync + 'static {
    move |verified, context| {
        let mut seen = lock(&seen);
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

/// What may be the reason that a server goes.
#[derive(Clone, Copy, Debug)]
struct OurCertificate {
    is_there: bool,
    /// And nothing has come from the server since.
    was_asked_for: bool,
}

/// Why a handshake, a read or a write failed. A server that has asked for the client's certificate, has said nothing since and
/// goes may have turned us away.
fn failure(error: &openssl::ssl::Error, doing: &str, ours: OurCertificate) -> TlsFailure {
    let closed = || TlsFailure::Closed(format!("{doing}: the server closed the connection"));
    let failure = match (error.ssl_error(), error.io_error()) {
        _ if error.code() == ErrorCode::ZERO_RETURN => closed(),
        (Some(stack), _) if is_end_of_file(stack) => closed(),
        (Some(stack), _) if !stack.errors().is_empty() => refusal(stack, ours),
        (_, Some(error)) => io_failure(error, doing),
        _ => closed(),
    };
    match failure {
        TlsFailure::Closed(why) if ours.was_asked_for => TlsFailure::TurnedAway(why),
        failure => failure,
    }
}

/// OpenSSL 3 calls an end without a farewell an error of the protocol (SSL_R_UNEXPECTED_EOF_WHILE_READING).
fn is_end_of_file(stack: &ErrorStack) -> bool {
    stack.errors().iter().any(|error| error.reason_code() == 294)
}

fn io_failure(error: &io::Error, doing: &str) -> TlsFailure {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            TlsFailure::Io(io::ErrorKind::TimedOut, format!("{doing} timed out"))
        }
        io::ErrorKind::ConnectionRefused => TlsFailure::Io(error.kind(), "connection refused".to_owned()),
        io::ErrorKind::UnexpectedEof => {
            TlsFailure::Closed(format!("{doing}: the server closed the connection"))
        }
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            TlsFailure::Closed(format!("{doing}: {error}"))
        }
        kind => TlsFailure::Io(kind, format!("{doing}: {error}")),
    }
}

/// `internal_error`: the server's own trouble.
const ALERT_INTERNAL_ERROR: i32 = 80;

/// What a failed handshake or read means: an alert about our certificate is the server's distrust, and so, perhaps, is any
/// other after it has asked for it.
fn refusal(stack: &ErrorStack, ours: OurCertificate) -> TlsFailure {
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
        Some(40) if !ours.is_there => "it refuses the handshake without a client certificate",
        _ => {
            let text: Vec<_> = stack
                .errors()
                .iter()
                .filter_map(openssl::error::Error::reason)
                .collect();
            let text = format!("TLS: {}", printable(&text.join(", ")));
            return match alert {
                Some(alert) if ours.was_asked_for && alert != ALERT_INTERNAL_ERROR => {
                    TlsFailure::TurnedAway(text)
                }
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
pub(crate) struct TlsStream {
    stream: SslStream<Timed>,
    ours: OurCertificate,
    /// What it showed.
    pub(crate) server: CertificateFacts,
}

impl TlsStream {
    pub(crate) fn socket(&mut self) -> &mut Timed {
        self.stream.get_mut()
    }

    pub(crate) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), TlsFailure> {
        while !bytes.is_empty() {
            let written = self.stream.ssl_write(bytes);
            bytes = &bytes[written.map_err(|error| self.failure(&error, "sending"))?..];
        }
        Ok(())
    }

    /// What has come, at least one byte; where the other side has closed the connection, that is an error.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, TlsFailure> {
        let read = self.stream.ssl_read(buffer);
        let read = read.map_err(|error| self.failure(&error, "answer"))?;
        self.ours.was_asked_for = false;
        Ok(read)
    }

    fn failure(&self, error: &openssl::ssl::Error, doing: &str) -> TlsFailure {
        failure(error, doing, self.ours)
    }
}
