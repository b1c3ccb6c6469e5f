//! The Varlink services: `io.virtseal.Lifecycle` for the hook, `io.virtseal.Host` for the CLI.
//!
//! A method checks who calls, and has a worker thread of [`Pools`] do what it is for: a function in the file of its group. So
//! readers never have the threads of a start, and `provider lock` waits for nobody. What each does is told by
//! [`HostProxy`](crate::api::HostProxy).

mod autostart;
pub(crate) mod cache;
pub(super) mod descriptors;
pub(super) mod job;
mod methods;
pub(crate) mod provider;
pub(super) mod provider_view;
mod refused;
mod rotate;
mod setting_views;
mod settings;
mod snapshot;
mod state;
mod status;
pub(crate) mod tpm;
pub(crate) mod tpm_credential;
mod tpm_identity;
mod tpm_policy;
mod trust;
mod vm;
pub(super) mod volume;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::runtime::Handle;
use tokio::task::JoinError;

use super::caller::Caller;
use super::gate::Pass;
use super::glance::Age;
use super::lock;
use super::pools::Pools;
use super::state::Daemon;
use crate::api::pages;
use crate::api::{HostError, LifecycleError};
use crate::audit::Actor;
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::model::subject::Subject;
use crate::vm::start::Deadline;

pub(super) use methods::host_interface;

/// The other end of one connection, and what serves it.
pub(crate) struct Service {
    pub(super) daemon: Arc<Daemon>,
    pub(super) pools: Pools,
    pub(super) caller: Caller,
    pub(super) actor: Actor,
    /// Root's connection, to be asked whether anybody is still there.
    pub(super) peer: Option<Arc<OwnedFd>>,
    /// What bounds the calls of others.
    pub(super) pass: Option<Arc<Pass>>,
}

impl Service {
    /// Shows something, to root and to those who may read.
    async fn show<T: Send + 'static>(
        &self,
        about: Option<Subject>,
        work: impl FnOnce(&Daemon) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        let workers = match self.caller {
            Caller::Admin => &self.pools.admin,
            Caller::Reader | Caller::Stranger => &self.pools.watch,
        };
        self.run(workers, Caller::Reader, about, work).await
    }

    /// Changes something, for root alone. A refusal that names nothing nearer is `about` this.
    async fn change<T: Send + 'static>(
        &self,
        about: Option<Subject>,
        work: impl FnOnce(&Daemon, Actor) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        self.change_on(&self.pools.admin, about, work).await
    }

    async fn change_on<T: Send + 'static>(
        &self,
        workers: &Handle,
        about: Option<Subject>,
        work: impl FnOnce(&Daemon, Actor) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        let by = self.actor;
        let work = move |daemon: &Daemon| {
            let done = work(daemon, by);
            daemon.glances.expire();
            done
        };
        self.run(workers, Caller::Admin, about, work).await
    }

    async fn run<T: Send + 'static>(
        &self,
        workers: &Handle,
        needed: Caller,
        about: Option<Subject>,
        work: impl FnOnce(&Daemon) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        self.caller.may(needed)?;
        let _turn = match &self.pass {
            Some(pass) => Some(pass.turn().await?),
            None => None,
        };
        self.daemon.note_call();
        let daemon = Arc::clone(&self.daemon);
        let done = workers.spawn_blocking(move || work(&daemon)).await;
        let done = done.unwrap_or_else(|error| Err(broken(&error)));
        Ok(done.map_err(|failure| match about {
            Some(subject) => failure.about(subject),
            None => failure,
        })?)
    }

    /// How old what it is shown may be: further pages are those of the first one.
    fn age(&self, after: Option<&str>) -> Age {
        match (self.caller, after) {
            (Caller::Admin, None) => Age::Now,
            _ => Age::Lately,
        }
    }

    /// For a page of a list.
    fn room(&self) -> usize {
        match self.caller {
            Caller::Admin => pages::PAGE_OF_ROOT,
            Caller::Reader | Caller::Stranger => pages::PAGE,
        }
    }

    /// Runs `work` for a hook, with its deadline; `subject` names the VM if that passes.
    async fn hook<T: Send + 'static>(
        &self,
        subject: impl FnOnce() -> String,
        work: impl FnOnce(&Daemon, Actor, &Deadline) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, LifecycleError> {
        *lock(&self.daemon.hook_heard) = Some(SystemTime::now());
        let time = self.daemon.hook_deadline();
        let deadline = match &self.peer {
            Some(peer) => Deadline::after(time).or_hangup_of(Arc::clone(peer)),
            None => Deadline::after(time),
        };
        let run = self.change_on(&self.pools.hook, None, move |daemon, by| {
            work(daemon, by, &deadline)
        });
        let outcome = match tokio::time::timeout(time, run).await {
            Ok(outcome) => outcome.map_err(Problem::from),
            Err(_) => Err(self.daemon.deadline_passed(time).of(subject())),
        };
        outcome.map_err(|failure| LifecycleError::Refused {
            message: failure.to_string(),
        })
    }
}

fn broken(error: &JoinError) -> Problem {
    Problem::failed(format!("virtseald failed: {error}"))
        .next(Advice::from("see its log").within(Advice::Journal))
}
