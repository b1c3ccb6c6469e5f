//! Connections to the server: TCP, and TLS through the system's OpenSSL.
//!
//! Plain keys pass through here as base64, so what ureq reads from and writes to are buffers that are zeroed as soon
//! as they were used, and OpenSSL is told to cleanse its own. Every wait ends with the deadline of the request.

mod buffers;

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use openssl::x509::X509;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use self::buffers::WipedBuffers;
use crate::model::deadlines::IDLE;
use crate::model::deadlines::transit::CONNECT;
use crate::model::problem::chain;
use crate::provider::toolbox::address;
use crate::provider::toolbox::identity::{ClientIdentity, NoIdentity, private_key};
use crate::provider::toolbox::timed::Timed;
use crate::provider::toolbox::tls::{self, Tls, TlsFailure, TlsStream, Trust};
use crate::secret::SecretBytes;

/// Opens connections to one server.
pub(super) struct Wire {
    tls: Tls,
    /// What will be wrong soon.
    pub(super) warning: Option<String>,
    /// The name to ask for and to find in the certificate, where it is not the address's.
    server_name: Option<String>,
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
    ) -> Result<Self, String> {
        let trust = ca.map_or(Ok(Trust::Host), read_ca)?;
        let client = client.map(|pem| identity(pem.expose())).transpose();
        let client = client.map_err(|error| format!("what was given to log in with: {}", chain(&error)))?;
        let tls = Tls::new(trust, client.as_ref()).map_err(|error| match ca {
            Some(path) => format!("TLS can't be set up with the CA file {}: {error}", path.display()),
            None => format!("TLS can't be set up: {error}"),
        })?;
        Ok(Self {
            tls,
            warning: client.and_then(|client| client.warning()),
            server_name,
        })
    }

    fn open(&self, host: &str, port: u16, is_tls: bool, time: Duration) -> Result<Channel, TlsFailure> {
        let deadline = Instant::now() + time;
        let connected = Instant::now() + time.min(CONNECT);
        let addresses = address::of(host, port, None, connected)?;
        let mut stream = address::connect(addresses, connected, move |peer| {
            tls::connect_tcp(peer, connected)
        })?;
        stream.deadline = deadline;
        if !is_tls {
            return Ok(Channel::Plain(stream));
        }
        let name = self.server_name.as_deref().unwrap_or(host);
        let shaken = self.tls.handshake(name, stream);
        shaken.map(Channel::Tls).map_err(|failure| match failure {
            TlsFailure::NotTrusted(why) => TlsFailure::NotTrusted(format!(
                "the certificate of {name} is not trusted: {why} (see --ca and --server-name)"
            )),
            TlsFailure::Protocol(why) => TlsFailure::Protocol(format!("TLS failed: {why}")),
            failure => failure,
        })
    }
}

fn read_ca(path: &Path) -> Result<Trust, String> {
    let shown = path.display();
    let pem = std::fs::read(path).map_err(|error| format!("can't read the CA file {shown}: {error}"))?;
    match X509::stack_from_pem(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(Trust::Roots(pem)),
        _ => Err(format!("there is no PEM certificate in the CA file {shown}")),
    }
}

fn identity(pem: &[u8]) -> Result<ClientIdentity, NoIdentity> {
    ClientIdentity::of(pem, [private_key(pem)?])
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
    (*timeout.after).min(IDLE)
}

/// What ureq is to say: of a broken connection, so that it is tried again on a new one, or the failure itself.
fn told(failure: TlsFailure) -> ureq::Error {
    match failure {
        TlsFailure::Closed(why) => io::Error::new(io::ErrorKind::UnexpectedEof, why).into(),
        TlsFailure::Io(kind, why) => io::Error::new(kind, why).into(),
        failure => ureq::Error::Other(Box::new(failure)),
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

impl Connector<()> for Wire {
    type Out = Connection;

    fn connect(&self, details: &ConnectionDetails, _: Option<()>) -> Result<Option<Connection>, ureq::Error> {
        let host = details.uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let usual_port = if details.needs_tls() { 443 } else { 80 };
        let port = details.uri.port_u16().unwrap_or(usual_port);
        let opened = self.open(host, port, details.needs_tls(), limit(details.timeout));
        Ok(Some(Connection {
            channel: opened.map_err(told)?,
            buffers: WipedBuffers::new(),
        }))
    }
}

#[derive(Debug)]
enum Channel {
    Plain(Timed),
    Tls(TlsStream),
}

impl Channel {
    fn socket(&mut self) -> &mut Timed {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.socket(),
        }
    }

    /// 0 where the other side has closed the connection.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ureq::Error> {
        match self {
            Self::Plain(socket) => Ok(socket.read(buffer)?),
            Self::Tls(tls) => match tls.read(buffer) {
                Err(TlsFailure::Closed(_)) => Ok(0),
                read => read.map_err(told),
            },
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), ureq::Error> {
        match self {
            Self::Plain(socket) => Ok(socket.write_all(bytes)?),
            Self::Tls(tls) => tls.write_all(bytes).map_err(told),
        }
    }
}
#[derive(Debug)]
pub(super) struct Connection {
    channel: Channel,
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
        let Self { channel, buffers } = self;
        buffers.send_output(amount, |output| channel.write_all(output))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.until(timeout);
        let count = self.channel.read(self.buffers.input_append_buf())?;
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
