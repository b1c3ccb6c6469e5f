//! The connection to virtseald.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use zlink::Connection;
use zlink::tokio::unix;

use crate::api::{HostError, HostProxy, ProviderView};
use crate::config::Config;
use crate::model::problem::{Code, Problem, chain};

/// A connection to one daemon.
pub(super) struct Client {
    socket: PathBuf,
    connection: Connection<unix::Stream>,
}

impl Client {
    pub(super) async fn connect(socket: &Path) -> Result<Self, Problem> {
        let connection = unix::connect(socket)
            .await
            .map_err(|error| unreachable(socket, &error))?;
        Ok(Self {
            socket: socket.into(),
            connection,
        })
    }

    /// Connects to the socket beside `socket` that only root reaches, where nobody else's calls are in the way; to `socket`
    /// where that one is not for us, or is elsewhere.
    pub(super) async fn connect_undisturbed(socket: &Path) -> Result<Self, Problem> {
        match Self::connect(&Config::hook_socket_beside(socket)).await {
            Ok(client) => Ok(client),
            Err(_) => Self::connect(socket).await,
        }
    }

    /// Makes one call: sorts a failure of the connection from one of the daemon's.
    pub(super) async fn call<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut Connection<unix::Stream>) -> zlink::Result<Result<T, HostError>>,
    ) -> Result<T, Problem> {
        match call(&mut self.connection).await {
            Ok(result) => result.map_err(Problem::from),
            Err(error) => Err(self
                .said_before(&error)
                .await
                .unwrap_or_else(|| self.broken(&error))),
        }
    }

    /// What virtseald has said before it closed the connection, where a call came too late.
    async fn said_before(&mut self, error: &zlink::Error) -> Option<Problem> {
        let zlink::Error::Io(error) = error else {
            return None;
        };
        if error.kind() != ErrorKind::BrokenPipe {
            return None;
        }
        let said = self.connection.receive_reply::<IgnoredAny, HostError>().await;
        Some(said.ok()?.0.err()?.into())
    }

    /// `None` if there is no provider of this name.
    pub(super) async fn provider(&mut self, name: &str) -> Result<Option<ProviderView>, Problem> {
        let all = self.call(async |host| host.list_providers().await).await?;
        Ok(all.providers.into_iter().find(|provider| provider.name == name))
    }

    pub(super) fn connection(&mut self) -> &mut Connection<unix::Stream> {
        &mut self.connection
    }

    /// The connection failed in the middle of a call.
    pub(super) fn broken(&self, error: &zlink::Error) -> Problem {
        Problem::from_error(
            Code::Unreachable,
            format!("virtseald on {} did not answer properly", self.socket.display()),
            error,
        )
        .next("see its log (journalctl -u virtseald), then try again: every command can be repeated")
    }
}

fn unreachable(socket: &Path, error: &zlink::Error) -> Problem {
    let reason = match error {
        zlink::Error::Io(io) => io.to_string(),
        other => chain(other),
    };
    let denied = reason.contains("ermission denied");
    let code = if denied { Code::Denied } else { Code::Unreachable };
    let next = if denied {
        "run it as root, with sudo"
    } else {
        "systemctl start virtseald"
    };
    Problem::new(
        code,
        format!("virtseald does not answer on {}: {reason}", socket.display()),
    )
    .next(next)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_refusal_is_heard_by_a_call_that_comes_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let refused = runtime.block_on(async {
            let mut client = Client::connect(&socket).await.unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let refusal = Problem::new(Code::Busy, "too many").next("end some");
            let error = serde_json::to_vec(&HostError::from(refusal)).unwrap();
            server.write_all(&[&error[..], &[0]].concat()).unwrap();
            drop(server);
            client
                .call(async |host| host.list_providers().await)
                .await
                .unwrap_err()
        });
        assert_eq!((refused.code, &*refused.message), (Code::Busy, "too many"));
    }
}
