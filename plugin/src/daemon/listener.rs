//! The asynchronous edge: accepts connections, and has a conversation on each, so one that waits never holds up another.
//!
//! Who calls is known from the kernel (SO_PEERCRED): root may change things, the group may read. What is asked for is done
//! by a [`Service`].

mod channel;
mod closer;
mod conversation;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod understood;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;

use nix::unistd::{Gid, Uid};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::spawn_local;

use super::caller::{self, Caller};
use super::gate::{Gate, Pass};
use super::pools::Pools;
use super::service::Service;
use super::state::Daemon;
use crate::audit::Actor;
use crate::model::deadlines::daemon::NOT_ACCEPTED;
use crate::model::problem::{Problem, chain};
use channel::{Channel, Sender};
use closer::Closer;

/// What every connection is served with.
#[derive(Clone)]
pub(crate) struct Server {
    daemon: Arc<Daemon>,
    pools: Pools,
    gate: Arc<Gate>,
    closer: Closer,
}

/// A connection of somebody who is not root, on its way to the thread that serves readers.
pub(crate) struct Visitor {
    stream: std::os::unix::net::UnixStream,
    uid: Uid,
    gid: Gid,
    pass: Arc<Pass>,
    /// What its first call is told, if there are too many.
    refusal: Option<Problem>,
}

impl Server {
    /// Serves connections with the workers of these pools.
    pub(crate) fn new(daemon: Arc<Daemon>, pools: Pools) -> io::Result<Self> {
        Ok(Self {
            daemon,
            pools,
            gate: Arc::default(),
            closer: Closer::start()?,
        })
    }

    /// Accepts root's connections at the hook's socket for ever. Must run inside a `LocalSet`.
    pub(crate) async fn serve_hook(self, listener: StdListener) {
        let turn_away = |_, uid: Uid, _| tracing::warn!(%uid, "turned away from the hook's socket");
        self.accept(listener, turn_away).await;
    }

    /// Accepts connections at the other socket for ever, and sends those that are not root's to `visitors`. Must run inside
    /// a `LocalSet`.
    pub(crate) async fn serve_main(self, listener: StdListener, visitors: mpsc::UnboundedSender<Visitor>) {
        let server = self.clone();
        let receive = move |stream: UnixStream, uid, gid| {
            let Ok(stream) = stream.into_std() else { return };
            let (pass, refusal) = server.gate.enter(uid);
            let Some(pass) = pass else {
                return server.turn_away(stream, refusal);
            };
            let visitor = Visitor {
                stream,
                uid,
                gid,
                pass: Arc::new(pass),
                refusal,
            };
            // Nobody is served any more when this fails.
            let _ = visitors.send(visitor);
        };
        self.accept(listener, receive).await;
    }

    /// Serves those who are not root for ever. Must run inside a `LocalSet`.
    pub(crate) async fn serve_visitors(self, mut visitors: mpsc::UnboundedReceiver<Visitor>) {
        while let Some(visitor) = visitors.recv().await {
            spawn_local(self.clone().serve_visitor(visitor));
        }
    }

    async fn accept(&self, listener: StdListener, others: impl Fn(UnixStream, Uid, Gid)) {
        let listener = listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener));
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "a socket can't be used"),
        };
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match caller::peer(&stream) {
                    Ok((uid, _)) if caller::is_admin(uid) => {
                        spawn_local(self.clone().serve_admin(stream, uid));
                    }
                    Ok((uid, gid)) => others(stream, uid, gid),
                    Err(error) => tracing::debug!(%error, "can't tell who connected"),
                },
                Err(error) => {
                    // Out of descriptors, most likely: give the others time to end.
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(NOT_ACCEPTED).await;
                }
            }
        }
    }

    async fn serve_admin(self, stream: UnixStream, uid: Uid) {
        let Ok(peer) = stream.as_fd().try_clone_to_owned() else {
            return;
        };
        let mut service = Service {
            daemon: self.daemon,
            pools: self.pools,
            caller: Caller::Admin,
            actor: Actor::User(uid.as_raw()),
            peer: Some(Arc::new(peer)),
            pass: None,
        };
        serve_one(Channel::new(stream, Sender::Admin), &mut service).await;
    }

    async fn serve_visitor(self, visitor: Visitor) {
        let Visitor { stream, uid, gid, .. } = visitor;
        let groups = caller::peer_groups(&stream).unwrap_or_default();
        let Ok(stream) = UnixStream::from_std(stream) else {
            return;
        };
        let sender = Sender::Reader(self.closer, Some(Arc::clone(&visitor.pass)));
        let mut channel = Channel::new(stream, sender);
        if let Some(failure) = visitor.refusal {
            // It may not ask, or not listen.
            let _ = conversation::refuse(&mut channel, failure).await;
            return;
        }
        let daemon = Arc::clone(&self.daemon);
        let group = self.pools.watch.spawn_blocking(move || daemon.reader_group());
        let group = group.await.unwrap_or_default();
        let mut service = Service {
            daemon: self.daemon,
            pools: self.pools,
            caller: Caller::of(uid, std::iter::once(gid).chain(groups), || group),
            actor: Actor::User(uid.as_raw()),
            peer: None,
            pass: Some(visitor.pass),
        };
        serve_one(channel, &mut service).await;
    }

    /// Says why, if that can be said at once.
    fn turn_away(&self, stream: std::os::unix::net::UnixStream, refusal: Option<Problem>) {
        if let Some(bytes) = refusal.and_then(|failure| conversation::failure(failure).ok()) {
            let _ = nix::sys::socket::send(
                std::os::fd::AsRawFd::as_raw_fd(&stream),
                &bytes,
                nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
            );
        }
        self.closer.close(stream.into(), None);
    }
}

async fn serve_one(mut channel: Channel, service: &mut Service) {
    if let Err(fault) = conversation::converse(&mut channel, service).await {
        tracing::debug!(by = ?service.actor, "connection ended: {}", chain(&fault));
        conversation::explain(&mut channel, &fault).await;
    }
}
