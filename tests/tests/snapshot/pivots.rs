//! QEMU is asked to go over from the overlay to the sealed image, and the VM, libvirtd and virtseald end before anybody has seen whether
//! it did. Then either image may be the newer one, and what is printed leads to that which is.

use virtseal_testkit::{Process, Way, built_program, kept_pivots, pin_log};

use super::*;

/// Where the keystore has no room any more.
const SMALL: &str = "size=1m,mode=0700";

/// A VM whose QEMU stands still while libvirtd waits for its answer: the merge is ready, and virtseald has noted that it has asked.
struct Asked {
    spec: DomainSpec,
    overlays: [PathBuf; 2],
    /// The XML of its next start, before it was asked.
    next: String,
    qemu: String,
    /// The command that waits for the end of it.
    commit: Process,
}

impl Asked {
    fn stop_at(rig: &Rig, vm: &str) -> Result<Self> {
        let (spec, overlays) = overlaid(rig, vm)?;
        let next = rig.sealed.dumpxml(vm)?;
        virsh(rig, &["blockcommit", vm, "vda", "--active"])?;
        wait_until_ready(rig, vm)?;
        let pid = fs::read_to_string(rig.host().path(format!("/run/libvirt/qemu/{vm}.pid")))?;
        let qemu = pid.trim().to_owned();
        rig.host().run(&["kill", "-STOP", &qemu])?.succeeded()?;
        let program = built_program("virtseal")?;
        let program = program.to_str().context("a UTF-8 path")?;
        let commit = rig.host().spawn(
            &format!("commit-{vm}"),
            &[program, "vm", "snapshot", "commit", vm],
        )?;
        let state = rig.host().path("/var/lib/virtseal");
        wait_until(PATIENCE, "what QEMU is asked to be noted", || {
            // A copy of half a change is none.
            Ok((kept_pivots(&state).unwrap_or_default() == 1).then_some(()))
        })
        .with_context(|| commit.output())?;
        Ok(Self {
            spec,
            overlays,
            next,
            qemu,
            commit,
        })
    }

    fn signal(&self, rig: &Rig, signal: &str) -> Result<()> {
        rig.host()
            .run(&["kill", signal, &self.qemu])?
            .succeeded()
            .map(drop)
    }
}

/// As libvirtd would have it, whose request has got through: QEMU goes over, and its guest writes.
fn go_over(rig: &Rig, vm: &str, byte: u8) -> Result<()> {
    const QMP: &str = "import glob, json, socket, sys, time
vm, write = sys.argv[1:]
monitor = socket.socket(socket.AF_UNIX)
monitor.settimeout(30)
monitor.connect(glob.glob('/var/lib/libvirt/qemu/domain-*-' + vm + '/monitor.sock')[0])
lines = monitor.makefile()
def ask(command, **arguments):
    monitor.sendall(json.dumps({'execute': command, 'arguments': arguments}).encode() + b'\\n')
    for line in lines:
        answer = json.loads(line)
        if 'error' in answer: sys.exit(line)
        if 'return' in answer: return answer['return']
lines.readline()
ask('qmp_capabilities')
[job] = ask('query-jobs')
if job['status'] == 'ready': ask('job-complete', id=job['id'])
for _ in range(600):
    [job] = ask('query-jobs')
    if job['status'] == 'concluded': break
    time.sleep(0.1)
else: sys.exit('it does not go over: ' + str(job))
for command in ('write ' + write, 'flush'):
    said = ask('human-monitor-command', **{'command-line': 'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"' + command + '\"'})
    if said.strip() and 'wrote' not in said: sys.exit(said)";
    let write = format!("-P {byte} 0 {}", 2 * MIB);
    let asked = ["python3", "-c", QMP, vm, &write];
    rig.host().run(&asked)?.succeeded().map(drop)
}

fn kill_both_daemons(rig: &mut Rig) -> Result<()> {
    rig.sealed.stop_daemon(Signal::SIGKILL)?;
    rig.sealed.host_mut().kill_libvirtd()
}

/// The job went on by itself as far as it could.
fn wait_for_its_end(rig: &Rig) -> Result<serde_json::Value> {
    wait_until(PATIENCE, "the job to end", || {
        let job = rig.sealed.last_job()?;
        Ok((job["state"] != "running").then_some(job))
    })
}

/// Both ways are in it, and neither is gone without a word of force.
fn expect_both_ways(rig: &Rig, asked: &Asked) -> Result<String> {
    let (vm, base) = (&asked.spec.name, asked.spec.disk.display().to_string());
    expect_names(
        &rig.sealed.refused_start(vm)?,
        &[&format!("virtseal vm snapshot commit {vm}")],
    )?;
    let delete = format!("--yes-delete={vm}");
    let refused = rig
        .sealed
        .refused(8, &["vm", "snapshot", "delete", &delete, vm])?;
    expect_names(&refused, &["nobody has seen whether it did"])?;
    let refused = Way::that_begins("virtseal vm snapshot commit", &refused)?.refused(&rig.sealed)?;
    let told = [
        "nobody has seen whether it did, and they differ",
        &base,
        &format!("if it ran on {base} since"),
        "if it did not",
    ];
    expect_names(&refused, &told)?;
    ensure!(
        asked
            .overlays
            .iter()
            .all(|overlay| rig.host().path(overlay).exists())
    );
    Ok(refused)
}

fn expect_settled(rig: &Rig, asked: &Asked, byte: u8) -> Result<()> {
    expect_data(rig, &asked.spec, byte)?;
    expect_free(rig, &asked.spec, &asked.overlays)?;
    ensure!(kept_pivots(&rig.host().path("/var/lib/virtseal"))? == 0);
    Ok(())
}

#[test]
fn a_vm_that_ran_on_its_sealed_image_keeps_what_it_wrote_there() -> Result<()> {
    let mut rig = Rig::start()?;
    let asked = Asked::stop_at(&rig, "web01")?;
    kill_both_daemons(&mut rig)?;
    asked.signal(&rig, "-CONT")?;
    go_over(&rig, "web01", 0x43)?;
    asked.signal(&rig, "-KILL")?;
    rig.sealed.host_mut().restart_libvirtd()?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock()?;
    let job = wait_for_its_end(&rig)?;
    ensure!(job["state"] == "failed", "{job}");
    let refused = expect_both_ways(&rig, &asked)?;
    Way::that_begins("virtseal vm snapshot delete --force", &refused)?.take(&rig.sealed)?;
    expect_settled(&rig, &asked, 0x43)
}

#[test]
fn a_vm_that_ran_on_its_overlay_keeps_what_it_wrote_there() -> Result<()> {
    let mut rig = Rig::start()?;
    let asked = Asked::stop_at(&rig, "web01")?;
    kill_both_daemons(&mut rig)?;
    // What libvirtd had not asked yet, it does not ask any more.
    asked.signal(&rig, "-CONT")?;
    rig.sealed.host_mut().restart_libvirtd()?;
    virsh(&rig, &["blockjob", "web01", "vda", "--abort"])?;
    write(&rig, "web01", 0x43, 0, 2 * MIB)?;
    rig.sealed.destroy("web01")?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock()?;
    let job = wait_for_its_end(&rig)?;
    ensure!(job["state"] == "failed", "{job}");
    let refused = expect_both_ways(&rig, &asked)?;
    Way::that_begins("virtseal vm snapshot commit", &refused)?.take(&rig.sealed)?;
    expect_settled(&rig, &asked, 0x43)
}

#[test]
fn a_vm_that_ends_as_it_is_asked_is_settled_by_itself() -> Result<()> {
    let rig = Rig::start()?;
    let mut asked = Asked::stop_at(&rig, "web01")?;
    asked.signal(&rig, "-KILL")?;
    let ended = asked.commit.wait(PATIENCE)?;
    ensure!(ended.success(), "{}", asked.commit.output());
    expect_settled(&rig, &asked, 0x42)
}

/// The XML of its next start named the overlay still, and what the guest has written since is in the sealed image alone.
#[test]
fn a_merge_that_goes_on_frees_the_next_start_too() -> Result<()> {
    let mut rig = Rig::start()?;
    let asked = Asked::stop_at(&rig, "web01")?;
    rig.sealed.stop_daemon(Signal::SIGKILL)?;
    asked.signal(&rig, "-CONT")?;
    let top = asked.overlays[0].display().to_string();
    wait_until(PATIENCE, "libvirt to know of the merge", || {
        Ok((!virsh(&rig, &["dumpxml", "web01"])?.contains(&top)).then_some(()))
    })?;
    rig.host().define_xml(&asked.next)?;
    ensure!(rig.sealed.dumpxml("web01")?.contains(&top));
    write(&rig, "web01", 0x43, 0, 2 * MIB)?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock()?;
    let job = wait_for_its_end(&rig)?;
    ensure!(job["state"] == "done", "{job}");
    rig.sealed.destroy("web01")?;
    expect_settled(&rig, &asked, 0x43)
}

#[test]
fn a_merge_by_hand_is_no_riddle() -> Result<()> {
    let rig = Rig::start()?;
    let (spec, _) = overlaid(&rig, "web01")?;
    virsh(
        &rig,
        &["blockcommit", "web01", "vda", "--active", "--wait", "--pivot"],
    )?;
    write(&rig, "web01", 0x43, 0, 2 * MIB)?;
    rig.sealed.destroy("web01")?;
    rig.sealed.expect_start("web01")?;
    expect_data(&rig, &spec, 0x43)?;
    let again = rig.sealed.json(&["vm", "snapshot", "commit", "web01"])?;
    ensure!(again["changed"] == false, "{again}");
    Ok(())
}

/// libvirtd died in it, and the VM has run on its sealed image ever since: its XML names an overlay that is days old. A commit that was
/// begun before, and aborted, has not written what is there now.
#[test]
fn a_merge_by_hand_that_libvirtd_died_in_loses_nothing() -> Result<()> {
    let mut rig = Rig::start()?;
    for (vm, is_begun_before) in [("web01", false), ("web02", true)] {
        let (spec, overlays) = overlaid(&rig, vm)?;
        if is_begun_before {
            abort_a_commit(&rig, vm)?;
        }
        virsh(&rig, &["blockcommit", vm, "vda", "--active"])?;
        wait_until_ready(&rig, vm)?;
        rig.sealed.host_mut().kill_libvirtd()?;
        go_over(&rig, vm, 0x43)?;
        let pid = fs::read_to_string(rig.host().path(format!("/run/libvirt/qemu/{vm}.pid")))?;
        rig.host().run(&["kill", "-KILL", pid.trim()])?.succeeded()?;
        let set_modified = |image: &PathBuf, time| -> Result<()> {
            let file = fs::File::options().write(true).open(rig.host().path(image))?;
            Ok(file.set_modified(time)?)
        };
        let (now, minute) = (std::time::SystemTime::now(), std::time::Duration::from_secs(60));
        for overlay in &overlays {
            set_modified(overlay, now - 60 * minute)?;
        }
        set_modified(&spec.disk, now + minute)?;
        rig.sealed.host_mut().restart_libvirtd()?;
        let told = rig.sealed.refused_start(vm)?;
        let refused = Way::that_begins("virtseal vm snapshot commit", &told)?.refused(&rig.sealed)?;
        let base = spec.disk.display().to_string();
        expect_names(&refused, &["is newer", &format!("if it ran on {base} since")])?;
        Way::that_begins("virtseal vm snapshot delete", &refused)?.take(&rig.sealed)?;
        expect_data(&rig, &spec, 0x43)?;
        expect_free(&rig, &spec, &overlays)?;
    }
    Ok(())
}

fn wait_until_ready(rig: &Rig, vm: &str) -> Result<()> {
    wait_until(PATIENCE, "the merge to be ready", || {
        let live = virsh(rig, &["dumpxml", vm])?;
        Ok(live.contains("ready='yes'").then_some(()))
    })
}

/// Begins a commit that is not ready before something is done about it.
fn begin_slowly(rig: &Rig, vm: &str) -> Result<Process> {
    let begin = [
        "blockcommit",
        vm,
        "vda",
        "--active",
        "--bytes",
        "--bandwidth",
        "65536",
    ];
    virsh(rig, &begin)?;
    let program = built_program("virtseal")?;
    let program = program.to_str().context("a UTF-8 path")?;
    let commit = [program, "vm", "snapshot", "commit", vm];
    let commit = rig.host().spawn(&format!("commit-{vm}"), &commit)?;
    wait_until(PATIENCE, "the job to begin", || {
        let job = rig.sealed.last_job();
        Ok(job.is_ok_and(|job| job["state"] == "running").then_some(()))
    })
    .with_context(|| commit.output())?;
    Ok(commit)
}

fn abort_a_commit(rig: &Rig, vm: &str) -> Result<()> {
    let mut commit = begin_slowly(rig, vm)?;
    rig.sealed.run(&["jobs", "abort"])?;
    commit.wait(PATIENCE)?;
    wait_until(PATIENCE, "the merge to be ended", || {
        Ok((!virsh(rig, &["dumpxml", vm])?.contains("<mirror")).then_some(()))
    })
}

#[test]
fn what_can_not_be_noted_is_not_asked() -> Result<()> {
    let mut rig = Rig::start()?;
    let state = "/var/lib/virtseal";
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let small = format!(
        "cp -a {state} /run/state && mount -t tmpfs -o {SMALL} small {state} && cp -a /run/state/. {state}/"
    );
    rig.host().run(&["sh", "-c", &small])?.succeeded()?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock()?;
    let (spec, overlays) = overlaid(&rig, "web01")?;
    let mut commit = begin_slowly(&rig, "web01")?;
    let pinned = pin_log(&rig.sealed)?;
    let ballast = rig.host().path(state).join("ballast");
    ensure!(
        fs::write(&ballast, vec![0; 2 << 20]).is_err(),
        "{state} is not full"
    );
    virsh(&rig, &["blockjob", "web01", "vda", "--bytes", "--bandwidth", "0"])?;
    wait_until(PATIENCE, "the merge to be ended", || {
        Ok((!virsh(&rig, &["dumpxml", "web01"])?.contains("<mirror")).then_some(()))
    })?;
    ensure!(
        virsh(&rig, &["dumpxml", "web01"])?.contains(&overlays[0].display().to_string()),
        "it has gone over"
    );
    fs::remove_file(ballast)?;
    drop(pinned);
    // It goes on by itself.
    let ended = commit.wait(PATIENCE)?;
    ensure!(ended.success(), "{}", commit.output());
    rig.sealed.destroy("web01")?;
    expect_data(&rig, &spec, 0x42)?;
    expect_free(&rig, &spec, &overlays)
}

/// A job was begun, an admin merged by hand, and defined an older XML again: whether the overlay has what the sealed image lacks nobody
/// knows.
#[test]
fn a_vm_that_runs_without_an_overlay_of_its_next_start_keeps_what_it_has() -> Result<()> {
    let mut rig = Rig::start()?;
    for (vm, written) in [("web01", None), ("web02", Some(0x43))] {
        let (spec, overlays) = overlaid(&rig, vm)?;
        let next = rig.sealed.dumpxml(vm)?;
        let _commit = begin_slowly(&rig, vm)?;
        rig.sealed.stop_daemon(Signal::SIGKILL)?;
        virsh(&rig, &["blockjob", vm, "vda", "--bytes", "--bandwidth", "0"])?;
        wait_until_ready(&rig, vm)?;
        virsh(&rig, &["blockjob", vm, "vda", "--pivot"])?;
        rig.host().define_xml(&next)?;
        if let Some(byte) = written {
            write(&rig, vm, byte, 0, 2 * MIB)?;
        }
        rig.sealed.start_daemon()?;
        rig.sealed.unlock()?;
        let job = wait_for_its_end(&rig)?;
        ensure!(job["state"] == "failed", "{job}");
        let told = job["problem"].to_string();
        expect_names(
            &told,
            &[
                &spec.disk.display().to_string(),
                "has not merged",
                "virsh shutdown",
            ],
        )?;
        // Asked again it says the same.
        let refused = rig.sealed.refused(9, &["vm", "snapshot", "commit", vm])?;
        let commit = Way::that_begins("virsh shutdown", &refused)?.after("virsh shutdown");
        // No guest is there that would shut down.
        rig.sealed.destroy(vm)?;
        let delete = ["vm", "snapshot", "delete", &format!("--yes-delete={vm}"), vm];
        expect_names(
            &rig.sealed.refused(8, &delete)?,
            &["ran on its sealed image alone"],
        )?;
        match written {
            // Both are the same.
            None => drop(commit.take(&rig.sealed)?),
            Some(_) => {
                let refused = commit.refused(&rig.sealed)?;
                expect_names(&refused, &["ran on", "alone at", "and they differ"])?;
                Way::that_begins("virtseal vm snapshot delete --force", &refused)?.take(&rig.sealed)?;
            }
        }
        ensure!(kept_pivots(&rig.host().path("/var/lib/virtseal"))? == 0);
        expect_data(&rig, &spec, written.unwrap_or(0x42))?;
        expect_free(&rig, &spec, &overlays)?;
    }
    Ok(())
}
