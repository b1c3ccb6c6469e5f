//! The connection to virtseald.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use zlink::Connection;
use zlink::tokio::unix;

use super::patience::{Patience, Silence, at_work};
use super::unit::Unit;
use crate::api::{HostError, HostProxy, ProviderView, of_another_version};
use crate::config::Config;
use crate::model::advice::Advice;
use crate::model::nearest::name_hint;
use crate::model::problem::{Code, Problem, chain};
use crate::model::subject::Subject;

/// A connection to one daemon.
pub(super) struct Client {
    socket: PathBuf,
    patience: Patience,
    connection: Connection<unix::Stream>,
}

impl Client {
    pub(super) async fn connect(socket: &Path, patience: Patience) -> Result<Self, Problem> {
        match unix::connect(socket).await {
            Ok(connection) => Ok(Self {
                socket: socket.into(),
                patience,
                connection,
            }),
            Err(error) => Err(unreachable(socket, &error, Unit::of(socket).await)),
        }
    }

    /// Connects to the socket beside `socket` that only root reaches, where nobody else's calls are in the way; to `socket`
    /// where that one is not for us, or is elsewhere.
    pub(super) async fn connect_undisturbed(socket: &Path, patience: Patience) -> Result<Self, Problem> {
        match Self::connect(&Config::hook_socket_beside(socket), patience).await {
            Ok(client) => Ok(client),
            Err(_) => Self::connect(socket, patience).await,
        }
    }

    /// Makes one call: sorts a failure of the connection from one of the daemon's.
    pub(super) async fn call<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut Connection<unix::Stream>) -> zlink::Result<Result<T, HostError>>,
    ) -> Result<T, Problem> {
        let answer = self.patience.wait(&self.socket, call(&mut self.connection));
        match at_work(answer).await {
            Ok(Ok(result)) => result.map_err(Problem::from),
            Ok(Err(error)) => match self.said_before(&error).await {
                Some(said) => Err(said),
                None => Err(self.broken(&error).await),
            },
            Err(silence) => Err(silent(&self.socket, silence).await),
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
        let said = self.connection.receive_reply::<IgnoredAny, HostError>();
        let said = self.patience.wait(&self.socket, said).await.ok()?;
        Some(said.ok()?.0.err()?.into())
    }

    /// `None` if there is no provider of this name.
    pub(super) async fn provider(&mut self, name: &str) -> Result<Option<ProviderView>, Problem> {
        let all = self.call(async |host| host.list_providers().await).await?;
        Ok(all.providers.into_iter().find(|provider| provider.name == name))
    }

    /// The provider of this name; if there is none, which may be meant.
    pub(super) async fn existing_provider(&mut self, name: &str) -> Result<ProviderView, Problem> {
        let mut all = self
            .call(async |host| host.list_providers().await)
            .await?
            .providers;
        let hint = name_hint(name, all.iter().map(|provider| provider.name.as_str()));
        all.retain(|provider| provider.name == name);
        let there_is_none = || {
            Problem::not_found(format!("there is no provider '{name}'{hint}"))
                .about(Subject::Provider(name.to_owned()))
                .next(Advice::ListProviders)
        };
        all.pop().ok_or_else(there_is_none)
    }

    /// For a call with several replies, and what each of them is waited for with.
    pub(super) fn connection(&mut self) -> (&mut Connection<unix::Stream>, &Path, Patience) {
        (&mut self.connection, &self.socket, self.patience)
    }

    /// The connection failed in the middle of a call, or what came is not an answer to it.
    pub(super) async fn broken(&self, error: &zlink::Error) -> Problem {
        if let Some(what) = not_understood(error) {
            return of_another_version(Code::Unreachable, format!("{what} ({})", self.socket.display()));
        }
        let said = format!(
            "virtseald on {} ended the connection before it had answered",
            self.socket.display()
        );
        let unit = Unit::of(&self.socket).await;
        let problem = Problem::from_error(Code::Unreachable, with_unit(said, unit.as_ref()), error);
        problem.next(look(unit.as_ref()).then("try again: every command can be repeated"))
    }
}

/// What one end does not know of what the other says.
fn not_understood(error: &zlink::Error) -> Option<String> {
    match error {
        zlink::Error::VarlinkService(error) => {
            Some(format!("virtseald does not know what was asked: {error}"))
        }
        zlink::Error::Json(_) | zlink::Error::MissingParameters | zlink::Error::UnknownErrorReply(_) => {
            Some(format!("the answer of virtseald can't be read: {error}"))
        }
        _ => None,
    }
}

/// What the message says, and what systemd does.
fn with_unit(said: String, unit: Option<&Unit>) -> String {
    match unit {
        Some(unit) => format!("{said}; {}", unit.told()),
        None => said,
    }
}

fn look(unit: Option<&Unit>) -> Advice {
    let unit = unit.and_then(Unit::advice);
    unit.unwrap_or_else(|| Advice::ShowDaemon.also(Advice::Journal))
}

/// Somebody has the socket, and says nothing.
pub(super) async fn silent(socket: &Path, Silence(time): Silence) -> Problem {
    let said = format!(
        "virtseald does not answer on {}: nothing came for {time:?}",
        socket.display()
    );
    let unit = Unit::of(socket).await;
    let hangs = unit.as_ref().is_some_and(|unit| unit.advice().is_none());
    let problem = Problem::unreachable(with_unit(said, unit.as_ref()));
    let next = look(unit.as_ref());
    match hangs {
        true => problem.next(next.then(Advice::RestartDaemon.note("if it hangs"))),
        false => problem.next(next),
    }
}

fn unreachable(socket: &Path, error: &zlink::Error, unit: Option<Unit>) -> Problem {
    let (kind, reason) = match error {
        zlink::Error::Io(io) => (Some(io.kind()), io.to_string()),
        other => (None, chain(other)),
    };
    let said = format!("virtseald does not answer on {}: {reason}", socket.display());
    if kind == Some(ErrorKind::PermissionDenied) {
        return Problem::denied(said).next(Advice::RunAsRoot);
    }
    let next = match (&unit, kind) {
        (Some(unit), _) if unit.advice().is_some() => look(Some(unit)),
        // Somebody listens, and more wait for it than the kernel lets.
        (_, Some(ErrorKind::WouldBlock)) => look(None),
        _ => Advice::StartDaemon.also(look(None).note("if that fails")),
    };
    Problem::unreachable(with_unit(said, unit.as_ref())).next(next)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// What a call comes to that gets this answer, from an end that does `then` with its connection before it is asked.
    fn answered(answer: &[u8], then: fn(UnixStream)) -> Problem {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut client = Client::connect(&socket, Patience::WhileItLives).await.unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(&[answer, &[0]].concat()).unwrap();
            then(server);
            let called = client.call(async |host| host.list_providers().await).await;
            called.unwrap_err()
        })
    }

    #[test]
    fn a_refusal_is_heard_by_a_call_that_comes_after_it() {
        let refusal = Problem::busy("too many").next("end some");
        let refused = answered(&serde_json::to_vec(&HostError::from(refusal)).unwrap(), drop);
        assert_eq!((refused.code, &*refused.message), (Code::Busy, "too many"));
    }

    #[test]
    fn who_is_of_another_version_is_told_so() {
        for answer in [
            r#"{"error":"org.varlink.service.MethodNotFound","parameters":{"method":"unknown"}}"#,
            r#"{"error":"io.virtseal.Host.Gone","parameters":{"since":1}}"#,
            r#"{"parameters":{"all":[]}}"#,
            r#"{"parameters":{"providers":[{"name":"main"}]}}"#,
            "{}",
        ] {
            let told = answered(answer.as_bytes(), std::mem::forget).to_string();
            assert!(told.contains("of different versions"), "{answer}: {told}");
            assert!(
                told.contains("Next: systemctl restart virtseald, if it was upgraded"),
                "{told}"
            );
        }
    }
}
