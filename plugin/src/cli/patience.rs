//! How long a command waits for virtseald: for as long as it gives signs of life, or for as long as `--timeout` says.
//!
//! A call may take as long as the work that it asks for. That virtseald is there is asked on another connection meanwhile, which the
//! thread answers that only listens; so a daemon that is stopped, or stuck as a whole, is told from one that works.

use std::future::pending;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::model::deadlines::cli::{ASK_AFTER, SILENCE, SPIN};

/// When a command gives up.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// When virtseald has given no sign of life for [`SILENCE`].
    WhileItLives,
    /// After this time without an answer, whatever virtseald does.
    AtMost(Duration),
}

/// Nothing has come for this long.
#[derive(Debug, PartialEq)]
pub(super) struct Silence(pub(super) Duration);

impl Patience {
    pub(super) fn of(given: Option<Duration>) -> Self {
        given.map_or(Self::WhileItLives, Self::AtMost)
    }

    /// For what gives no signs of life.
    pub(super) fn limit(self) -> Duration {
        match self {
            Self::WhileItLives => SILENCE,
            Self::AtMost(limit) => limit,
        }
    }

    /// Waits for an answer of the virtseald at `socket`.
    pub(super) async fn wait<T>(self, socket: &Path, answer: impl Future<Output = T>) -> Result<T, Silence> {
        match self {
            Self::AtMost(limit) => timeout(limit, answer).await.map_err(|_| Silence(limit)),
            Self::WhileItLives => tokio::select! {
                biased;
                answer = answer => Ok(answer),
                () = silence(socket) => Err(Silence(SILENCE)),
            },
        }
    }
}

/// Comes when there was no sign of life for [`SILENCE`].
async fn silence(socket: &Path) {
    loop {
        let end = Instant::now() + SILENCE;
        sleep(ASK_AFTER).await;
        let sign = timeout_at(end, sign_of_life(socket)).await;
        sleep_until(end).await;
        if sign.is_err() {
            return;
        }
    }
}

/// Waits, and shows on a terminal that something is done when it takes longer.
pub(super) async fn at_work<T>(answer: impl Future<Output = T>) -> T {
    let mut answer = pin!(answer);
    if let Ok(answer) = timeout(ASK_AFTER, &mut answer).await {
        return answer;
    }
    let spinner = match std::io::stderr().is_terminal() {
        true => ProgressBar::new_spinner(),
        false => ProgressBar::hidden(),
    };
    spinner.set_message("waiting for virtseald. Ctrl-C ends only the wait");
    spinner.enable_steady_tick(SPIN);
    let answer = answer.await;
    spinner.finish_and_clear();
    answer
}

/// Any answer is one, also that there are too many connections.
async fn sign_of_life(socket: &Path) {
    match ask(socket).await {
        Ok(answered) if answered > 0 => {}
        Ok(_) | Err(_) => pending().await,
    }
}

/// What every Varlink service answers, without a worker: how many bytes of that came first.
async fn ask(socket: &Path) -> io::Result<usize> {
    let mut stream = UnixStream::connect(socket).await?;
    stream
        .write_all(b"{\"method\":\"org.varlink.service.GetInfo\"}\0")
        .await?;
    stream.read(&mut [0]).await
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// For a call that takes longer than a silence may.
    async fn waited(socket: &Path) -> Result<(), Silence> {
        let soon = sleep(SILENCE + ASK_AFTER * 2);
        Patience::WhileItLives.wait(socket, soon).await
    }

    #[tokio::test]
    async fn an_answer_that_is_there_counts_and_a_limit_is_kept() {
        let nowhere = Path::new("/nonexistent");
        let at_once = Patience::WhileItLives.wait(nowhere, async { 7 });
        assert_eq!(at_once.await, Ok(7));
        let limit = Duration::from_millis(20);
        let never = Patience::AtMost(limit).wait(nowhere, pending::<()>());
        assert_eq!(never.await, Err(Silence(limit)));
    }

    #[tokio::test]
    async fn who_answers_is_waited_for_and_who_only_listens_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (lives, silent) = (directory.path().join("lives"), directory.path().join("silent"));
        let _listening = UnixListener::bind(&silent).unwrap();
        let answering = tokio::net::UnixListener::bind(&lives).unwrap();
        let answers = async {
            loop {
                let (mut stream, _) = answering.accept().await.unwrap();
                assert_ne!(stream.read(&mut [0; 256]).await.unwrap(), 0);
                stream.write_all(b"{}\0").await.unwrap();
            }
        };
        tokio::select! {
            _ = answers => {}
            (one, other) = async { tokio::join!(waited(&lives), waited(&silent)) } => {
                assert_eq!((one, other), (Ok(()), Err(Silence(SILENCE))));
            }
        }
    }
}
