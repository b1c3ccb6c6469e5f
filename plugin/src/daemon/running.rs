//! Listens to what libvirt tells of running VMs, and looks at them: [`crate::vm::running`] says what that comes to.
//!
//! libvirt's events say when to look, on a connection of their own; a round every now and then sees what has no event, such as
//! a plain overlay. What was found is in the audit log at once, and shown until this daemon ends (docs/adr/0019).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::{Daemon, hook_seen, lock, records};
use crate::host::libvirt::events::{self, Listener, Listening};
use crate::host::libvirt::{Background, LibvirtError};
use crate::host::permitted::PermittedPath;
use crate::host::storage;
use crate::model::deadlines::image::SEEN;
use crate::model::deadlines::libvirt::{CHECK, JOB_IN_XML, ROUND};
use crate::model::envelope::VmId;
use crate::model::finding::Finding;
use crate::model::problem::{Problem, chain};
use crate::object::disk::ImageCopy;
use crate::object::{Located, Present};
use crate::store::EnvelopeRecord;
use crate::vm::running::{Acquaintance, Look, NewFinding, News, Now, not_asked};
use crate::vm::{names, side_doors};

/// Looks at VMs whenever libvirt says that something was done to them, for ever. For a thread of its own.
pub(crate) fn watch(daemon: &Daemon) {
    let running = Arc::clone(&daemon.running);
    let listener: Listener = Arc::new(move |heard| running.hear(heard));
    while daemon.libvirt.reach(CHECK).is_err() || daemon.background.connect().is_err() {
        daemon.running.bell.wait(CHECK);
    }
    if let Err(error) = events::start_loop() {
        tracing::error!("can't see what is done to running VMs: libvirt's events: {error}");
        return;
    }
    let mut listening: Option<Listening> = None;
    let mut round = Instant::now();
    let mut again: BTreeMap<VmId, Instant> = BTreeMap::new();
    loop {
        if !listening.as_ref().is_some_and(Listening::is_alive) {
            drop(listening.take());
            listening = begin_to_listen(daemon, &listener);
        }
        if listening.is_some() && round <= Instant::now() {
            daemon.running.look_at(running_and_known(daemon));
            round = Instant::now() + ROUND;
        }
        let news = std::mem::take(&mut *lock(&daemon.running.news));
        for (vm, news) in news {
            again.insert(vm, Instant::now() + JOB_IN_XML);
            look_and_log(daemon, vm, news);
        }
        let now = Instant::now();
        let due: Vec<_> = again
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(vm, _)| *vm)
            .collect();
        for vm in due {
            again.remove(&vm);
            look_and_log(daemon, vm, News::default());
        }
        let next = again.values().min();
        let next = next.map(|at| at.saturating_duration_since(Instant::now()));
        daemon
            .running
            .bell
            .wait(next.map_or(CHECK, |next| next.min(CHECK)));
    }
}

fn begin_to_listen(daemon: &Daemon, listener: &Listener) -> Option<Listening> {
    let listening = daemon
        .events
        .listen(listener)
        // Who keeps the connections says so too, and louder.
        .inspect_err(|error| tracing::debug!("libvirt's events don't arrive: {}", chain(error)))
        .ok()?;
    if !listening.hears_beginnings() {
        tracing::warn!(
            "libvirt does not pass on QEMU's events: short copies and backups are seen only when they have ended"
        );
    }
    match daemon.events.running() {
        Ok(vms) => daemon.running.look_at(vms),
        Err(error) => tracing::warn!("what runs is not known: {}", chain(&error)),
    }
    Some(listening)
}

/// The VMs that are sealed here and run.
fn running_and_known(daemon: &Daemon) -> Vec<VmId> {
    let known = daemon.keystore.vms().map(|vms| vms.sound).unwrap_or_default();
    let known: BTreeSet<_> = known.into_iter().map(|record| record.vm).collect();
    let mut running = daemon.events.running().unwrap_or_default();
    running.retain(|vm| known.contains(vm));
    running
}

fn look_and_log(daemon: &Daemon, vm: VmId, news: News) {
    if let Err(problem) = look_at(daemon, vm, &daemon.events, news) {
        tracing::warn!(%vm, "what is done to it while it runs can't be seen: {problem}");
    }
}

/// As [`watch`] does, for who asks now.
pub(super) fn look_now(daemon: &Daemon, vm: VmId) -> Result<(), Problem> {
    look_at(daemon, vm, &daemon.background, News::default())
}

fn look_at(daemon: &Daemon, vm: VmId, libvirt: &Background, news: News) -> Result<(), Problem> {
    let running = match libvirt.as_it_runs(vm) {
        // Who may change it may have seen to that.
        Err(error @ LibvirtError::Untold { .. }) => Err(chain(&error)),
        running => Ok(running.map_err(|error| names::unreachable(&error))?),
    };
    // Keys are kept of one that was made plain again, too.
    let record = match daemon.keystore.is_sealed(vm)? {
        true => daemon.keystore.vm(vm)?,
        false => None,
    };
    let now = running.and_then(|running| {
        let now = running.as_ref().map(Now::of).transpose();
        now.map_err(|error| chain(&error))
    });
    let runs = now.as_ref().ok().and_then(Option::as_ref);
    let acquaintance = Acquaintance::of(record.as_ref(), runs);
    let mut found = runs
        .map(|now| found_now(daemon, now, acquaintance))
        .unwrap_or_default();
    if let Some(record) = record.filter(|_| news.started && hook_seen::was_passed_by(daemon, vm)) {
        found.push(not_asked(&record.name, hook_seen::libvirtd()));
    }
    let look = Look {
        vm,
        acquaintance,
        news,
        found,
        now,
    };
    let new = lock(&daemon.running.seen).take_in(look, SystemTime::now());
    for NewFinding { name, words } in &new {
        tracing::warn!(domain = name, "{words}");
        records::note_finding(daemon, vm, name, words);
    }
    if !new.is_empty() {
        daemon.glances.expire();
    }
    Ok(())
}

fn found_now(daemon: &Daemon, now: &Now, acquaintance: Acquaintance) -> Vec<Finding> {
    let mut found = sealed_as_raw(daemon, now);
    if acquaintance != Acquaintance::Stranger {
        let policy = daemon.config().policy.of(&now.live);
        let backup = now.backup.as_deref().unwrap_or_default();
        found.extend(side_doors::while_it_runs(
            &now.live,
            now.next.as_ref(),
            backup,
            policy,
        ));
    }
    found
}

/// Disks that are sealed images, of whomever, opened without a key. What is on storage that does not answer is not seen, and keeps nobody
/// from being looked at.
fn sealed_as_raw(daemon: &Daemon, now: &Now) -> Vec<Finding> {
    let plain = side_doors::plain_disks(&now.live);
    if plain.is_empty() {
        return Vec::new();
    }
    let records = daemon.keystore.envelopes();
    let records = records.map_or_else(|_| Vec::new(), |rows| rows.sound);
    let paths: BTreeSet<_> = plain.iter().filter_map(|disk| disk.path.clone()).collect();
    let kept = records.into_iter().rev().filter_map(|record| {
        let path = paths.get(Path::new(&record.location))?;
        Some((path.clone(), record))
    });
    let kept: BTreeMap<_, _> = kept.collect();
    let rule = daemon.path_rule();
    let look = move |path: &Path| {
        let kept = kept.get(path);
        let place = rule.permit_known(path, kept.map(|record| &record.location).into_iter());
        sealed_image(place.ok()?, kept)
    };
    let owners: BTreeMap<_, _> = storage::in_time(paths, SEEN, look)
        .into_iter()
        .filter_map(|(path, owner)| Some((path, owner??)))
        .collect();
    let found = plain.into_iter().filter_map(|disk| {
        let path = disk.path?;
        let owner = *owners.get(&path)?;
        let known = daemon.keystore.vm(owner).ok().flatten();
        let owner = known.map_or_else(|| owner.to_string(), |record| record.name);
        Some(side_doors::sealed_as_raw(&now.live, &disk.label, &path, &owner))
    });
    found.collect()
}

/// Whose it is, by what it carries or by what is kept for its place. A guest's own LUKS is nobody's here.
fn sealed_image(place: PermittedPath, kept: Option<&EnvelopeRecord>) -> Option<VmId> {
    match Located::Image(place).inspect().ok()? {
        Present::Encrypted(ImageCopy::Envelope(envelope)) => Some(envelope.vm),
        Present::Encrypted(_) => kept.map(|record| record.envelope.vm),
        Present::Plain | Present::Absent => None,
    }
}
