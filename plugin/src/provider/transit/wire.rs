//! Connections to the server: TCP, and TLS through the system's OpenSSL.
//!
//! Plain keys pass through here as base64, so what ureq reads from and writes to are buffers that are zeroed as soon
//! as they were used, and OpenSSL is told to cleanse its own. Every wait ends with the deadline of the request.

mod buffers;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use openssl::asn1::Asn1Time;
use openssl::pkey::PKey;
use openssl::ssl::{
    ErrorCode, HandshakeError, SslConnector, SslMethod, SslOptions, SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::{X509, X509VerifyResult};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use self::buffers::WipedBuffers;
use crate::provider::toolbox::timed::Timed;
use crate::provider::toolbox::{certificate_request, revocation};
use crate::secret::SecretBytes;

/// `SSL_OP_CLEANSE_PLAINTEXT` of OpenSSL 3 (SSL_CTX_set_options(3)), which the binding has no name for.
const CLEANSE_PLAINTEXT: u64 = 1 << 1;
/// `SSL_R_UNEXPECTED_EOF_WHILE_READING` of OpenSSL 3 (sslerr.h): the peer, or what is between, is gone.
const UNEXPECTED_EOF: i32 = 294;
/// From how long before its end on a client's certificate is warned of.
const SOON_DAYS: u32 = 30;

/// Why the server and this host do not trust each other.
#[derive(Debug)]
pub(super) struct NoTrust(pub(super) String);

impl fmt::Display for NoTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoTrust {}

/// The server asked for a certificate, and went before its first answer: in TLS 1.3 that is how a refusal looks when no alert comes through.
#[derive(Debug)]
pub(super) struct TurnedAway;

impl fmt::Display for TurnedAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "it asked for a client certificate and closed the connection without an answer, as servers do that do not accept it",
        )
    }
}

impl std::error::Error for TurnedAway {}

/// Opens connections to one server.
pub(super) struct Wire {
    connector: SslConnector,
    /// What will be wrong soon.
    pub(super) warning: Option<String>,
    /// The name to ask for and to find in the certificate, where it is not the address's.
    server_name: Option<String>,
    connect_timeout: Duration,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wire({:?})", self.server_name)
    }
}

impl Wire {
    /// Trusts the certificates in `ca`, the system's without it; shows the one in `client`.
    pub(super) fn new(
        ca: Option<&Path>,
        server_name: Option<String>,
        client: Option<&SecretBytes>,
        connect_timeout: Duration,
    ) -> Result<Self, NoTrust> {
        let openssl = |error| NoTrust(format!("OpenSSL can't be set up: {error}"));
        let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(openssl)?;
        builder.set_options(SslOptions::from_bits_retain(CLEANSE_PLAINTEXT));
        builder
            .set_min_proto_version(Some(SslVersion::TLS1_2))
            .map_err(openssl)?;
        builder.set_verify(SslVerifyMode::PEER);
        if let Some(path) = ca {
            let mut store = X509StoreBuilder::new().map_err(openssl)?;
            let pem = read_ca(path)?;
            for certificate in certificates_in(path, &pem)? {
                store.add_cert(certificate).map_err(openssl)?;
            }
            revocation::add_lists(&mut store, &pem).map_err(|error| {
                NoTrust(format!(
                    "can't read the revocation list in {}: {error}",
                    path.display()
                ))
            })?;
            builder.set_cert_store(store.build());
        }
        let mut warning = None;
        if let Some(pem) = client {
            let identity = Identity::read(pem)?;
            builder.set_certificate(&identity.certificate).map_err(openssl)?;
            for above in identity.chain {
                builder.add_extra_chain_cert(above).map_err(openssl)?;
            }
            builder.set_private_key(&identity.key).map_err(|_| {
                NoTrust("private key and certificate of the client do not belong together".into())
            })?;
            warning = identity.warning;
        }
        Ok(Self {
            connector: builder.build(),
            warning,
            server_name,
            connect_timeout,
        })
    }

    fn tcp(&self, host: &str, port: u16, time: Duration) -> Result<TcpStream, ureq::Error> {
        let addresses = look_up(host, port, time)?;
        // A dead first address leaves time for the others.
        let share = time / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
        let mut last = ureq::Error::HostNotFound;
        for address in addresses {
            match TcpStream::connect_timeout(&address, share.max(Duration::from_millis(1))) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    fn tls(&self, host: &str, stream: Timed) -> Result<SslStream<Timed>, ureq::Error> {
        let name = self.server_name.as_deref().unwrap_or(host);
        let setup = |stack| no_trust(format!("TLS can't be set up: {stack}"));
        let mut configuration = self.connector.configure().map_err(setup)?;
        certificate_request::watch(&mut configuration).map_err(setup)?;
        configuration.connect(name, stream).map_err(|error| match error {
            HandshakeError::SetupFailure(stack) => setup(stack),
            HandshakeError::Failure(failed) | HandshakeError::WouldBlock(failed) => {
                let verified = failed.ssl().verify_result();
                let asked = certificate_request::came(failed.ssl());
                let cause = failed.into_error();
                if verified != X509VerifyResult::OK {
                    return no_trust(format!(
                        "the certificate of {name} is not trusted: {} (see --ca and --server-name)",
                        verified.error_string()
                    ));
                }
                let error = tls_error(cause);
                if asked {
                    turned_away_if_closed(error)
                } else {
                    error
                }
            }
        })
    }
}

/// The resolver can hang, and nothing interrupts it: its thread is left behind then.
fn look_up(host: &str, port: u16, time: Duration) -> Result<Vec<SocketAddr>, ureq::Error> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![(address, port).into()]);
    }
    let (sender, receiver) = sync_channel(1);
    let name = host.to_owned();
    std::thread::Builder::new()
        .name("transit-dns".to_owned())
        .spawn(move || {
            let found = (name.as_str(), port).to_socket_addrs();
            // Nobody waits any more when this fails.
            let _ = sender.send(found.map(Iterator::collect));
        })?;
    match receiver.recv_timeout(time) {
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(_)) => Err(ureq::Error::HostNotFound),
        Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
    }
}

/// Looks nothing up: ureq asks before each request, also when it goes to a connection that is open.
#[derive(Debug)]
pub(super) struct LaterResolver;

impl Resolver for LaterResolver {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

/// A wait without an end is an hour.
fn limit(timeout: NextTimeout) -> Duration {
    (*timeout.after).min(Duration::from_secs(3600))
}

fn no_trust(why: String) -> ureq::Error {
    ureq::Error::Other(Box::new(NoTrust(why)))
}

/// A failure of the protocol is a matter of trust, one of the socket is not.
fn tls_error(error: openssl::ssl::Error) -> ureq::Error {
    match error.code() {
        ErrorCode::SSL if is_end_of_stream(&error) => io::Error::from(io::ErrorKind::UnexpectedEof).into(),
        ErrorCode::SSL => no_trust(format!("TLS failed: {error}")),
        _ => match error.into_io_error() {
            Ok(io) => io.into(),
            Err(_) => io::Error::from(io::ErrorKind::UnexpectedEof).into(),
        },
    }
}

/// What an end of the connection means where a certificate was asked for and nothing was answered yet.
fn turned_away_if_closed(error: ureq::Error) -> ureq::Error {
    match error {
        ureq::Error::Io(error) if is_broken(error.kind()) => ureq::Error::Other(Box::new(TurnedAway)),
        error => error,
    }
}

/// Whether the connection, perhaps an idle one that the server had closed, was to blame.
pub(super) fn is_broken(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(
        kind,
        BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof
    )
}

fn is_end_of_stream(error: &openssl::ssl::Error) -> bool {
    let stack = error.ssl_error().map_or(&[][..], |stack| stack.errors());
    stack.iter().any(|one| one.reason_code() == UNEXPECTED_EOF)
}

fn read_ca(path: &Path) -> Result<Vec<u8>, NoTrust> {
    let shown = path.display();
    std::fs::read(path).map_err(|error| NoTrust(format!("can't read the CA file {shown}: {error}")))
}

fn certificates_in(path: &Path, pem: &[u8]) -> Result<Vec<X509>, NoTrust> {
    let shown = path.display();
    match X509::stack_from_pem(pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(NoTrust(format!(
            "there is no PEM certificate in the CA file {shown}"
        ))),
    }
}

/// A client's private key, its certificate, and those above it.
struct Identity {
    key: PKey<openssl::pkey::Private>,
    certificate: X509,
    chain: std::vec::IntoIter<X509>,
    warning: Option<String>,
}

impl Identity {
    fn read(pem: &SecretBytes) -> Result<Self, NoTrust> {
        // Without this callback OpenSSL would ask on the terminal.
        let key = PKey::private_key_from_pem_callback(pem.expose(), |_| Ok(0)).map_err(|_| {
            NoTrust("there is no unencrypted PEM private key in what was given to log in with".into())
        })?;
        let mut certificates = X509::stack_from_pem(pem.expose()).unwrap_or_default();
        if certificates.is_empty() {
            return Err(NoTrust(
                "there is no PEM certificate beside the client's private key".into(),
            ));
        }
        // Its own, wherever it stands among those above it.
        let is_of_key = |certificate: &X509| {
            certificate
                .public_key()
                .is_ok_and(|public| public.public_eq(&key))
        };
        let own = certificates.iter().position(is_of_key).ok_or_else(|| {
            NoTrust("private key and certificate of the client do not belong together".into())
        })?;
        let certificate = certificates.remove(own);
        let certificates = certificates.into_iter();
        // A server tells of this in words of its own, and OpenBao with the status of a fault of its own.
        let ended = Asn1Time::days_from_now(0).is_ok_and(|now| *certificate.not_after() < *now);
        let end = certificate.not_after();
        if ended {
            return Err(NoTrust(format!("the client's certificate has expired ({end})")));
        }
        let ends_soon = Asn1Time::days_from_now(SOON_DAYS).is_ok_and(|soon| *end < *soon);
        let warning = ends_soon.then(|| format!("the client's certificate ends soon ({end})"));
        Ok(Self {
            warning,
            key,
            certificate,
            chain: certificates,
        })
    }
}

impl Connector<()> for Wire {
    type Out = Connection;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Connection>, ureq::Error> {
        let time = limit(details.timeout);
        let deadline = Instant::now() + time;
        let host = details.uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let usual_port = if details.needs_tls() { 443 } else { 80 };
        let port = details.uri.port_u16().unwrap_or(usual_port);
        let stream = Timed {
            stream: self.tcp(host, port, time.min(self.connect_timeout))?,
            deadline,
        };
        let channel = match details.needs_tls() {
            true => Channel::Tls(self.tls(host, stream)?),
            false => Channel::Plain(stream),
        };
        let silence = match &channel {
            Channel::Tls(tls) if certificate_request::came(tls.ssl()) => Silence::MayBeARefusal,
            _ => Silence::IsNoRefusal,
        };
        Ok(Some(Connection {
            channel,
            silence,
            buffers: WipedBuffers::new(),
        }))
    }
}

#[derive(Debug)]
enum Channel {
    Plain(Timed),
    Tls(SslStream<Timed>),
}

impl Channel {
    fn socket(&mut self) -> &mut Timed {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.get_mut(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ureq::Error> {
        match self {
            Self::Plain(socket) => Ok(socket.read(buffer)?),
            Self::Tls(tls) => match tls.ssl_read(buffer) {
                Ok(count) => Ok(count),
                Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(0),
                Err(error) => Err(tls_error(error)),
            },
        }
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), ureq::Error> {
        while !bytes.is_empty() {
            let count = match self {
                Self::Plain(socket) => socket.write(bytes)?,
                Self::Tls(tls) => tls.ssl_write(bytes).map_err(tls_error)?,
            };
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

/// What it means when the server goes without a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// It has asked for a certificate, and not answered anything yet.
    MayBeARefusal,
    IsNoRefusal,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    channel: Channel,
    silence: Silence,
    buffers: WipedBuffers,
}

impl Connection {
    fn until(&mut self, timeout: NextTimeout) {
        self.channel.socket().deadline = Instant::now() + limit(timeout);
    }
}

impl Transport for Connection {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.until(timeout);
        let Self {
            channel,
            buffers,
            silence,
        } = self;
        let sent = buffers.send_output(amount, |output| channel.write_all(output));
        match silence {
            Silence::MayBeARefusal => sent.map_err(turned_away_if_closed),
            Silence::IsNoRefusal => sent,
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.until(timeout);
        let read = self.channel.read(self.buffers.input_append_buf());
        let count = match (self.silence, read) {
            (Silence::MayBeARefusal, Ok(0)) => return Err(ureq::Error::Other(Box::new(TurnedAway))),
            (Silence::MayBeARefusal, read) => read.map_err(turned_away_if_closed)?,
            (Silence::IsNoRefusal, read) => read?,
        };
        self.silence = Silence::IsNoRefusal;
        self.buffers.input_appended(count);
        Ok(count > 0)
    }

    /// Whatever has arrived unasked, the connection is of no more use.
    fn is_open(&mut self) -> bool {
        let socket = &self.channel.socket().stream;
        let quiet = socket
            .set_nonblocking(true)
            .and_then(|()| socket.peek(&mut [0]))
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        quiet && socket.set_nonblocking(false).is_ok()
    }

    fn is_tls(&self) -> bool {
        matches!(self.channel, Channel::Tls(_))
    }
}
