//! Connections to a KMS: its addresses are raced, and nobody but the trusted server gets a request.

use std::net::SocketAddr;
use std::time::Instant;

use openssl::x509::X509;

use super::endpoint::Endpoint;
use super::error::KmipError;
use crate::provider::toolbox::address;
use crate::provider::toolbox::certificate::CertificateFacts;
use crate::provider::toolbox::tls::{self, Tls, TlsFailure, TlsStream};
pub(super) struct Connection {
    tls: TlsStream,
    /// Where the server is.
    pub(super) peer: SocketAddr,
}

impl Connection {
    /// To the trusted server at `endpoint`, `good` first.
    pub(super) fn open(
        tls: &Tls,
        endpoint: &Endpoint,
        good: Option<SocketAddr>,
        deadline: Instant,
    ) -> Result<Self, KmipError> {
        let tls = tls.clone();
        raced(endpoint, good, deadline, move |host, peer| {
            let tls = tls.handshake(host, tls::connect_tcp(peer, deadline)?)?;
            Ok(Self { tls, peer })
        })
    }

    /// What the server showed.
    pub(super) fn server(&self) -> &CertificateFacts {
        &self.tls.server
    }

    /// From now on, reads and writes end at `deadline`.
    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.tls.socket().deadline = deadline;
    }

    pub(super) fn write_all(&mut self, bytes: &[u8]) -> Result<(), KmipError> {
        self.tls.write_all(bytes).map_err(failed(KmipError::NoAnswer))
    }

    pub(super) fn read_exact(&mut self, mut buffer: &mut [u8]) -> Result<(), KmipError> {
        while !buffer.is_empty() {
            let read = self.tls.read(buffer).map_err(failed(KmipError::NoAnswer))?;
            buffer = &mut buffer[read..];
        }
        Ok(())
    }
}

/// The certificates that the server at `endpoint` shows, its own first. Nothing is trusted and nothing is sent.
pub(super) fn presented(endpoint: &Endpoint, deadline: Instant) -> Result<Vec<X509>, KmipError> {
    raced(endpoint, None, deadline, move |host, peer| {
        tls::presented(host, tls::connect_tcp(peer, deadline)?)
    })
}

fn raced<T: Send + 'static>(
    endpoint: &Endpoint,
    good: Option<SocketAddr>,
    deadline: Instant,
    connect: impl Fn(&str, SocketAddr) -> Result<T, TlsFailure> + Clone + Send + 'static,
) -> Result<T, KmipError> {
    let host = endpoint.host().to_owned();
    let addresses =
        address::of(&host, endpoint.port(), good, deadline).map_err(failed(KmipError::NoConnection))?;
    address::connect(addresses, deadline, move |peer| connect(&host, peer))
        .map_err(failed(KmipError::NoConnection))
}

/// `otherwise` where nobody distrusts anybody.
fn failed(otherwise: fn(String) -> KmipError) -> impl Fn(TlsFailure) -> KmipError {
    move |failure| match failure {
        TlsFailure::NotTrusted(why) => KmipError::NotTrusted(why),
        TlsFailure::RefusesUs(why) => KmipError::RefusesUs(why),
        TlsFailure::TurnedAway(why) => KmipError::TurnedAway(why),
        TlsFailure::Closed(why) | TlsFailure::Io(_, why) | TlsFailure::Protocol(why) => otherwise(why),
    }
}
