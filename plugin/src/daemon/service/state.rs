//! What `state backup` asks for.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::descriptors::{passphrase_from, take};
use crate::api::{Outcome, StepView};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::model::act::{StepCode, Tense};
use crate::model::problem::{Code, Problem};
use crate::model::subject::Subject;
use crate::state_backup;

pub(crate) fn backup(daemon: &Daemon, by: Actor, fds: Vec<OwnedFd>) -> Result<Outcome, Problem> {
    let [output, passphrase] = take(fds)?;
    let passphrase = passphrase_from(passphrase)?;
    let made = write_state(daemon, output, &passphrase);
    records::note_command(
        daemon,
        by,
        "state-backup",
        &daemon.config().state_dir.display().to_string(),
        &made,
    );
    crate::host::process::trim();
    made
}

fn write_state(
    daemon: &Daemon,
    output: OwnedFd,
    passphrase: &crate::secret::SecretBytes,
) -> Result<Outcome, Problem> {
    // As of one moment, as a crash would leave it then: whatever is under way can be repeated from there.
    let files = state_backup::write(&mut File::from(output), &daemon.host_store, passphrase)
        .map_err(|error| Problem::from_error(Code::Failed, "there is no backup of the state", &error))?;
    let act = StepCode::BackUpState.told(format!("backed up {files} files, and read them back"));
    Ok(Outcome {
        steps: StepView::all(&[act], Tense::Done, &Subject::Host),
        ..Outcome::default()
    })
}
