//! Whether what a daemon has left behind would survive a power cut.
//!
//! A process that is killed loses nothing of what it has written, so a crash test by SIGKILL passes without any fsync. What can
//! be seen is the order of the calls: a file is synced before it gets its name, its directory after that, and all that was
//! written is synced before the work counts as done.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::tracer::Step;

/// SQLite's own shared memory and the pid in a lock are made anew after a crash, and the database itself is written by checkpoints
/// only, from a log that stays until they are synced.
const MADE_ANEW: [&str; 3] = ["-shm", "keystore.lock", "keystore.db"];

/// Checks the calls of a command that is through.
///
/// # Errors
/// The first call that should have been followed, or preceded, by a sync.
pub fn expect_durable(steps: &[Step]) -> Result<()> {
    // Work that goes on behind the command may have been under way at the end: what is not followed by anything is left out.
    let is_write = |step: &Step| step.call.contains("write") || step.call == "ftruncate";
    let end = steps
        .iter()
        .rposition(|step| !is_write(step))
        .map_or(0, |last| last + 1);
    let steps = &steps[..end];
    let mut unsynced = BTreeSet::new();
    let mut named = BTreeSet::new();
    for (nth, step) in steps.iter().enumerate() {
        match step.call.as_str() {
            "fsync" | "fdatasync" => {
                unsynced.remove(step.file.as_str());
                named.remove(step.file.as_str());
            }
            "rename" | "link" => {
                ensure!(
                    !unsynced.contains(step.file.as_str()),
                    "{step} gives a name to what is not on disk yet: {:?}",
                    &steps[..=nth]
                );
                named.insert(step.directory.as_str());
            }
            // A log is cut when all that was in it is in the database, and synced there.
            "ftruncate" if step.file.ends_with("-wal") => {}
            "write" | "writev" | "pwrite64" | "pwritev" | "ftruncate" | "fallocate"
                if step.file != "socket" && !MADE_ANEW.iter().any(|end| step.file.ends_with(end)) =>
            {
                unsynced.insert(step.file.as_str());
            }
            _ => {}
        }
    }
    ensure!(unsynced.is_empty(), "never synced: {unsynced:?} in {steps:?}");
    ensure!(
        named.is_empty(),
        "names in {named:?} may be lost, the directory is not synced: {steps:?}"
    );
    Ok(())
}

/// Checks that the first call that `before` describes comes before the first that `after` does, and that both are there.
///
/// # Errors
/// What is missing, or the wrong order.
pub fn expect_order(steps: &[Step], before: &str, after: &str) -> Result<()> {
    let first = |words: &str| steps.iter().position(|step| step.to_string().contains(words));
    let (early, late) = (first(before), first(after));
    ensure!(
        early.is_some() && late.is_some() && early < late,
        "{before} (at {early:?}) should come before {after} (at {late:?}): {steps:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(calls: &[(&str, &str, &str)]) -> Vec<Step> {
        let step = |(call, file, directory): &(&str, &str, &str)| Step {
            call: (*call).into(),
            file: (*file).into(),
            directory: (*directory).into(),
        };
        calls.iter().map(step).collect()
    }

    const GOOD: [(&str, &str, &str); 7] = [
        ("write", "index.new", ""),
        ("fsync", "index.new", ""),
        ("rename", "index.new", "virtseal"),
        ("fsync", "virtseal", ""),
        ("pwrite64", "keystore.db-wal", ""),
        ("fdatasync", "keystore.db-wal", ""),
        ("sendmsg", "socket", ""),
    ];

    #[test]
    fn each_sync_that_is_left_out_is_noticed() {
        expect_durable(&steps(&GOOD)).unwrap();
        for sync in [1, 3, 5] {
            let mut calls = GOOD.to_vec();
            calls.remove(sync);
            expect_durable(&steps(&calls)).unwrap_err();
        }
        // Too early is as bad.
        let mut calls = GOOD.to_vec();
        calls.swap(0, 1);
        expect_durable(&steps(&calls)).unwrap_err();
    }

    #[test]
    fn an_order_needs_both_its_ends() {
        let steps = steps(&GOOD);
        expect_order(&steps, "fsync(index.new)", "rename(").unwrap();
        expect_order(&steps, "rename(", "fsync(index.new)").unwrap_err();
        expect_order(&steps, "rename(", "unlink(").unwrap_err();
    }
}
