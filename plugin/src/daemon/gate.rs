//! How much of virtseald one user may occupy. Root is not bound by this.
//!
//! A pass is held until its connection is closed, so what a user has open is counted, whatever it does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::Uid;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::model::deadlines::daemon::TURN;
use crate::model::problem::Problem;

/// Counts the connections and the calls of each user.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<Users>);

type Users = HashMap<Uid, User>;

#[derive(Debug)]
struct User {
    connections: usize,
    calls: Arc<Semaphore>,
}

impl Gate {
    /// How many connections a user has at the most: more than anybody needs who watches every job in a window of its own.
    pub(super) const OF_A_USER: usize = 96;
    /// How many there are besides for being told that there are too many.
    const TO_BE_TOLD: usize = 8;
    /// How many connections all users have.
    pub(super) const OF_ALL: usize = 512;
    /// How many calls of a user are answered at the same time; more wait for their turn.
    const CALLS: usize = 2;

    /// Lets a connection of this user in. If there are too many, its first call is told so, or nothing is: there may be no
    /// pass for that either.
    pub(super) fn enter(self: &Arc<Self>, uid: Uid) -> (Option<Pass>, Option<Problem>) {
        let mut users = self.users();
        let of_all: usize = users.values().map(|user| user.connections).sum();
        let user = users.entry(uid).or_insert_with(|| User {
            connections: 0,
            calls: Arc::new(Semaphore::new(Self::CALLS)),
        });
        let refusal = if user.connections >= Self::OF_A_USER {
            Some(too_many_of_user(uid))
        } else if of_all >= Self::OF_ALL {
            Some(too_many_of_all())
        } else {
            None
        };
        let is_full = user.connections >= Self::OF_A_USER + Self::TO_BE_TOLD
            || of_all >= Self::OF_ALL + Self::TO_BE_TOLD;
        if is_full {
            if user.connections == 0 {
                users.remove(&uid);
            }
            return (None, refusal);
        }
        user.connections += 1;
        let pass = Pass {
            gate: Arc::clone(self),
            uid,
            calls: Arc::clone(&user.calls),
        };
        (Some(pass), refusal)
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn too_many_of_user(uid: Uid) -> Problem {
    Problem::busy(format!(
        "user {uid} has {} connections to virtseald already, and may have no more",
        Gate::OF_A_USER
    ))
    .next("end programs of this user that are connected, as ss -xp shows them")
}

fn too_many_of_all() -> Problem {
    Problem::busy(format!(
            "the members of the group that may read have {} connections to virtseald already, and may have no more",
            Gate::OF_ALL
        ),
    )
    .next("try again later, or run it as root, which has no such limit")
}

/// One connection of a user.
#[derive(Debug)]
pub(super) struct Pass {
    gate: Arc<Gate>,
    uid: Uid,
    calls: Arc<Semaphore>,
}

impl Pass {
    /// Waits until this user may have one more call answered.
    pub(super) async fn turn(&self) -> Result<OwnedSemaphorePermit, Problem> {
        let turn = Arc::clone(&self.calls).acquire_owned();
        match tokio::time::timeout(TURN, turn).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => Err(Problem::busy(format!(
                "{} calls of user {} are being answered, and others wait already",
                Gate::CALLS,
                self.uid
            ))
            .next("try again when the other programs of this user are done")),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut users = self.gate.users();
        if let Some(user) = users.get_mut(&self.uid) {
            user.connections -= 1;
            if user.connections == 0 {
                users.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn user(uid: u32) -> Uid {
        Uid::from_raw(uid)
    }

    #[test]
    fn a_user_who_has_too_many_is_told_so_and_others_come_in() {
        let gate = Arc::new(Gate::default());
        let mut passes: Vec<_> = (0..Gate::OF_A_USER).map(|_| gate.enter(user(1000))).collect();
        assert!(passes.iter().all(|(pass, told)| pass.is_some() && told.is_none()));
        let told = gate.enter(user(1000));
        let failure = told.1.clone().unwrap();
        assert!(
            told.0.is_some() && failure.message.contains("user 1000"),
            "{failure}"
        );
        passes.push(told);
        passes.extend((1..Gate::TO_BE_TOLD).map(|_| gate.enter(user(1000))));
        assert!(gate.enter(user(1000)).0.is_none());
        assert!(gate.enter(user(1001)).1.is_none());
        passes.clear();
        assert!(gate.enter(user(1000)).1.is_none());
        assert!(gate.users().is_empty(), "what is gone is not counted");
    }

    #[test]
    fn many_users_are_bounded_together() {
        let gate = Arc::new(Gate::default());
        let uids = (0..).flat_map(|uid| std::iter::repeat_n(uid, Gate::OF_A_USER));
        let _passes: Vec<_> = uids.take(Gate::OF_ALL).map(|uid| gate.enter(user(uid))).collect();
        let (pass, told) = gate.enter(user(77));
        assert!(pass.is_some() && told.unwrap().message.contains("group that may read"));
    }

    #[tokio::test]
    async fn calls_of_a_user_take_turns() {
        let gate = Arc::new(Gate::default());
        let (first, second) = (gate.enter(user(7)).0.unwrap(), gate.enter(user(7)).0.unwrap());
        let turns = (first.turn().await.unwrap(), second.turn().await.unwrap());
        let waits = tokio::time::timeout(Duration::from_millis(50), first.turn());
        assert!(waits.await.is_err());
        // Another user does not wait for them.
        drop(gate.enter(user(8)).0.unwrap().turn().await.unwrap());
        drop(turns);
        drop(first.turn().await.unwrap());
    }
}
