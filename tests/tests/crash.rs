//! kill -9 of virtseald at every step of what it does leaves every object openable, and the same command goes on from there.
//!
//! Each story repeats one command on fresh objects and kills the daemon at its first, second, third … step, until the command
//! is through: see [`virtseal_testkit::Tracer`] for what counts as a step. After each kill the daemon starts again, the keystore's
//! envelopes and their objects are opened without virtseal's code, and the command is repeated.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::libc::O_NONBLOCK;
use nix::sys::signal::Signal;
use serde_json::Value;
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, LEAST_STEPS, MAX_STEPS, NVRAM, Rig, STATE, done_or, root_of, words};
use virtseal_testkit::{
    DomainSpec, DomainState, Tracer, Way, built_program, expect_durable, expect_names, expect_order,
    wait_until,
};

const END_DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn volume_create_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let vm_of = |nth: usize| Uuid::from_u128(0x1000 + nth as u128);
    let path_of = |nth: usize| format!("{IMAGES}/create-{nth}.qcow2");
    let steps = rig.at_each_step(
        |_, nth| {
            words(&[
                "volume",
                "create",
                &path_of(nth),
                "--size",
                "8M",
                "--vm",
                &vm_of(nth).to_string(),
            ])
        },
        |rig, nth, command| {
            rig.expect_openable(&vm_of(nth))?;
            rig.sealed.unlock()?;
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "exists")?;
            rig.expect_openable(&vm_of(nth))?;
            let envelopes = rig.envelopes(&vm_of(nth))?;
            ensure!(envelopes.len() == 1, "not one envelope: {envelopes:?}");
            ensure!(rig.host().path(path_of(nth)).exists(), "no image");
            rig.expect_no_temporaries()
        },
    )?;
    // An object whose envelope is nowhere would be lost.
    expect_order(&steps, "fdatasync(keystore.db-wal)", ", images)")
}

#[test]
fn volume_create_from_an_image_can_be_killed_at_every_step() -> Result<()> {
    let rig = Rig::start()?;
    filling_can_be_killed(rig, &[])
}

/// The same with a copy of its own, which has the sum.
#[test]
fn volume_create_from_a_checked_image_can_be_killed_at_every_step() -> Result<()> {
    let rig = Rig::start()?;
    let sum = sum_of_source(&rig)?;
    filling_can_be_killed(rig, &["--sha256", &sum])
}

#[test]
fn an_image_with_another_sum_leaves_nothing_wherever_virtseald_is_killed() -> Result<()> {
    let mut rig = Rig::start()?;
    let source = source(&rig)?;
    let wrong = "0f".repeat(32);
    let mut steps = (1..MAX_STEPS).step_by(2);
    let mut kills = 0;
    loop {
        let nth = steps.next().context("it does not get through")?;
        let (path, vm) = (
            format!("{IMAGES}/wrong-{nth}.qcow2"),
            Uuid::from_u128(0x2800 + nth as u128),
        );
        let uuid = vm.to_string();
        let create = [
            "volume", "create", &path, "--from", &source, "--vm", &uuid, "--sha256", &wrong,
        ];
        let (output, trace) = rig.kill_at(nth, |sealed| sealed.virtseal(&create))?;
        let what = || format!("killed at step {nth}, {:?}", trace.steps.last());
        if trace.killed {
            kills += 1;
            rig.sealed.start_daemon().with_context(what)?;
            rig.sealed.unlock()?;
            wait_until(END_DEADLINE, "the job to end", || {
                let jobs = rig.sealed.json(&["jobs"])?;
                Ok((!jobs.to_string().contains(r#""state":"running""#)).then_some(()))
            })
            .with_context(what)?;
            let said = rig.sealed.refused(1, &create).with_context(what)?;
            expect_names(&said, &[&wrong, &source])?;
        } else {
            ensure!(output.code() == Some(1), "{output:?}");
        }
        ensure!(!rig.host().path(&path).exists(), "there is an image, {}", what());
        ensure!(rig.envelopes(&vm)?.is_empty(), "there is an envelope, {}", what());
        rig.expect_no_temporaries().with_context(what)?;
        if !trace.killed {
            ensure!(kills >= LEAST_STEPS, "{kills} kills");
            return Ok(());
        }
    }
}

fn source(rig: &Rig) -> Result<String> {
    let source = format!("{IMAGES}/source.raw");
    fs::write(rig.host().path(&source), vec![0x5a; 2 << 20])?;
    Ok(source)
}

fn sum_of_source(rig: &Rig) -> Result<String> {
    let sums = rig.host().run(&["sha256sum", &source(rig)?])?.succeeded()?;
    Ok(sums.split(' ').next().unwrap_or_default().to_owned())
}

fn filling_can_be_killed(mut rig: Rig, options: &[&str]) -> Result<()> {
    let source = source(&rig)?;
    let vm_of = |nth: usize| Uuid::from_u128(0x2000 + nth as u128);
    let path_of = |nth: usize| format!("{IMAGES}/from-{nth}.qcow2");
    let steps = rig.at_each_step(
        |_, nth| {
            let (path, vm) = (path_of(nth), vm_of(nth).to_string());
            words(
                &[
                    &["volume", "create", &path, "--from", &source, "--vm", &vm],
                    options,
                ]
                .concat(),
            )
        },
        |rig, nth, command| {
            rig.expect_openable(&vm_of(nth))?;
            rig.sealed.unlock()?;
            // What was a job by then is done without being asked again.
            let jobs = rig.sealed.json(&["jobs"])?["jobs"].clone();
            let is_this = |job: &&Value| job["path"] == path_of(nth);
            let job = jobs.as_array().and_then(|jobs| jobs.iter().find(is_this));
            if let Some(job) = job {
                done_or(
                    rig.sealed.virtseal(&["jobs", "watch", &job["id"].to_string()])?,
                    "is done",
                )?;
                ensure!(
                    rig.host().path(path_of(nth)).exists(),
                    "the job ended without it: {job}"
                );
            }
            println!(
                "step {nth}: {}",
                if job.is_some() { "resumed" } else { "repeated" }
            );
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "exists")?;
            let envelopes = rig.envelopes(&vm_of(nth))?;
            ensure!(envelopes.len() == 1, "not one envelope: {envelopes:?}");
            rig.root.open_object(rig.host(), &envelopes[0])?;
            rig.root
                .expect_pattern(rig.host(), &envelopes[0], 0x5a, 2 << 20)?;
            rig.expect_no_temporaries()
        },
    )?;
    // An object whose envelope is nowhere would be lost.
    expect_order(&steps, "fdatasync(keystore.db-wal)", ", images)")
}

#[test]
fn vm_seal_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let define = |rig: &mut Rig, nth: usize| {
        let spec = spec(nth);
        let disk = spec.disk.to_str().context("a UTF-8 path")?;
        rig.host()
            .run(&["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"])?
            .succeeded()?;
        fs::create_dir_all(rig.host().path(NVRAM))?;
        // As libvirt leaves it when a start has failed, or as a guest has left it: to be replaced.
        match nth % 4 {
            1 => fs::write(rig.host().path(spec.nvram()), variables(&spec, 0)?)?,
            3 => fs::write(rig.host().path(spec.nvram()), variables(&spec, 1)?)?,
            _ => {}
        }
        rig.host().define(&spec)?;
        words(&["vm", "seal", &spec.name])
    };
    let steps = rig.at_each_change(define, |rig, nth, command| {
        let spec = spec(nth);
        rig.expect_openable(&spec.uuid)?;
        if nth % 10 == 0 {
            // Half sealed, it starts as it was, or not at all; nothing is lost by trying.
            rig.sealed.unlock()?;
            let started = rig.host().virsh(&["start", "--paused", &spec.name])?;
            if started.status.success() {
                ensure!(rig.host().state(&spec.name)? == DomainState::Paused);
                rig.host().virsh(&["destroy", &spec.name])?.succeeded()?;
            } else {
                // By the hook, or by QEMU, which has no key for a file that is sealed already.
                let why = &started.stderr;
                let known = ["virtseal", "is in use", "encrypt", "secret", "LUKS"];
                ensure!(known.iter().any(|word| why.contains(word)), "{why}");
            }
            rig.expect_openable(&spec.uuid)?;
            return Ok(());
        }
        rig.sealed.unlock()?;
        rig.sealed.virtseal(command)?.succeeded()?;
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
        rig.expect_no_temporaries()?;
        if nth % 8 == 1 {
            rig.sealed.expect_start(&spec.name)?;
        }
        if nth % 4 == 3 {
            rig.sealed.run(&["vm", "unseal", &spec.name])?;
            ensure!(fs::read(rig.host().path(spec.nvram()))? == variables(&spec, 1)?);
        }
        Ok(())
    })?;
    // An object whose envelope is nowhere would be lost.
    expect_order(&steps, "fdatasync(keystore.db-wal)", ", images)")
}

/// The template of its UEFI variables, changed by this.
fn variables(spec: &DomainSpec, change: u8) -> Result<Vec<u8>> {
    let mut variables = fs::read(&spec.firmware.variables)?;
    variables[4096] ^= change;
    Ok(variables)
}

#[test]
fn vm_unseal_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let sealed = |rig: &mut Rig, nth: usize| {
        rig.sealed.seal_empty(&spec(nth))?;
        words(&["vm", "unseal", &spec(nth).name])
    };
    let mut told = 0;
    rig.at_each_change(sealed, |rig, nth, command| {
        let name = spec(nth).name;
        rig.sealed.unlock()?;
        // Who seals it again is told that half of it is plain, or has it sealed.
        if told < 2 {
            let sealed_again = rig.sealed.virtseal(&["vm", "seal", &name])?;
            if !sealed_again.status.success() {
                Way::that_begins("virtseal vm unseal", &sealed_again.refused()?)?.take(&rig.sealed)?;
                told += 1;
            }
        }
        let again = rig.sealed.virtseal(command)?;
        done_or(again, "is not sealed")?;
        let xml = rig.sealed.dumpxml(&name)?;
        ensure!(!xml.contains("encryption") && !xml.contains("virtseal"), "{xml}");
        rig.expect_no_temporaries()?;
        if nth % 4 == 1 {
            rig.sealed.expect_start(&name)?;
        }
        Ok(())
    })?;
    ensure!(told > 0, "no kill left it half sealed");
    Ok(())
}

#[test]
fn start_can_go_on_whenever_virtseald_is_killed() -> Result<()> {
    let mut rig = Rig::start()?;
    let spec = DomainSpec { tpm: true, ..spec(1) };
    rig.sealed.seal_empty(&spec)?;
    let (mut ran, mut refused) = (0, 0);
    for nth in 1..MAX_STEPS {
        let (started, trace) = rig.kill_at(nth, |sealed| {
            sealed.host().virsh(&["start", "--paused", &spec.name])
        })?;
        let what = || format!("killed at {:?}, step {nth} of a start", trace.steps.last());
        if !trace.killed {
            started.succeeded()?;
            println!(
                "{} steps: {:?}; {ran} ran, {refused} were refused",
                trace.steps.len(),
                trace.steps
            );
            expect_durable(&trace.steps)?;
            ensure!(
                trace.steps.len() >= LEAST_STEPS && ran > 0 && refused > 0,
                "too few of something"
            );
            return rig.sealed.expect_no_secrets();
        }
        let runs = started.status.success();
        if runs {
            ran += 1;
        } else {
            refused += 1;
            ensure!(started.stderr.contains(&spec.name), "{}", started.stderr);
        }
        // The next daemon takes away what is left in libvirt, even when somebody else uses its connection first.
        rig.sealed.start_daemon().with_context(what)?;
        let _ = rig.sealed.virtseal(&["vm", "status"])?;
        wait_until(END_DEADLINE, "the end of the secrets", || {
            Ok(rig.sealed.secrets()?.is_empty().then_some(()))
        })
        .with_context(what)?;
        let expected = if runs {
            DomainState::Paused
        } else {
            DomainState::ShutOff
        };
        ensure!(
            rig.host().state(&spec.name)? == expected,
            "{}: it is not {expected:?}",
            what()
        );
        if runs {
            rig.host().virsh(&["destroy", &spec.name])?.succeeded()?;
        }
        rig.sealed.unlock()?;
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])
            .with_context(what)?;
    }
    bail!("the start does not get through in {MAX_STEPS} steps")
}

#[test]
fn provider_add_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let name_of = |nth: usize| format!("added-{nth}");
    rig.at_each_step(
        |_, nth| {
            words(&[
                "provider",
                "add",
                "native",
                &name_of(nth),
                "--passphrase-file",
                &passphrase,
            ])
        },
        |rig, nth, command| {
            let name = name_of(nth);
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "already")?;
            // Whichever of the two runs made it, its passphrase opens it, and it wraps nothing yet.
            rig.restart()?;
            rig.sealed.unlock_provider(&name)?;
            ensure!(rig.state_of(&name)?.as_deref() == Some("not_backed_up"));
            Ok(())
        },
    )?;
    Ok(())
}

#[test]
fn provider_backup_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let name_of = |nth: usize| format!("saved-{nth}");
    let file_of = |nth: usize| format!("/run/saved-{nth}.json");
    rig.at_each_step(
        |rig, nth| {
            let name = name_of(nth);
            rig.sealed
                .virtseal(&[
                    "provider",
                    "add",
                    "native",
                    &name,
                    "--passphrase-file",
                    &passphrase,
                ])?
                .succeeded()?;
            words(&[
                "provider",
                "backup",
                &name,
                "--output",
                &file_of(nth),
                "--no-passphrase",
            ])
        },
        |rig, nth, command| {
            let (name, file) = (name_of(nth), file_of(nth));
            rig.sealed.unlock_provider(&name)?;
            if rig.state_of(&name)?.as_deref() == Some("ready") {
                // It wraps from now on, and relies on this file.
                rig.root_in(&file)?;
            }
            let again = rig.sealed.virtseal(command)?;
            if !again.status.success() {
                done_or(again, "never overwritten")?;
                let other = format!("{file}.2");
                let elsewhere = ["provider", "backup", &name, "--output", &other, "--no-passphrase"];
                rig.sealed.virtseal(&elsewhere)?.succeeded()?;
                ensure!(
                    rig.root_in(&file)?.key == rig.root_in(&other)?.key,
                    "two root keys"
                );
            }
            rig.root_in(&file)?;
            ensure!(rig.state_of(&name)?.as_deref() == Some("ready"));
            Ok(())
        },
    )?;
    Ok(())
}

#[test]
fn provider_unlock_and_lock_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let vm = Uuid::from_u128(0x4000);
    let image = format!("{IMAGES}/locked.qcow2");
    rig.sealed
        .virtseal(&[
            "volume",
            "create",
            &image,
            "--size",
            "8M",
            "--vm",
            &vm.to_string(),
        ])?
        .succeeded()?;
    for verb in ["unlock", "lock"] {
        rig.at_each_step(
            |rig, _| match verb {
                "unlock" => {
                    rig.sealed.lock()?;
                    words(&["provider", "unlock", "main", "--passphrase-file", &passphrase])
                }
                _ => words(&["provider", "lock", "main"]),
            },
            |rig, _, command| {
                // A new daemon holds no key, whatever the old one was about.
                ensure!(rig.state_of("main")?.as_deref() == Some("locked"));
                rig.expect_active(&vm, &["disk"])?;
                rig.sealed.virtseal(command)?.succeeded()?;
                rig.sealed.unlock_provider("main")?;
                ensure!(rig.state_of("main")?.as_deref() == Some("ready"));
                Ok(())
            },
        )?;
    }
    Ok(())
}

#[test]
fn provider_restore_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    let backup = "/run/main.json";
    rig.sealed
        .virtseal(&[
            "provider",
            "backup",
            "main",
            "--output",
            backup,
            "--no-passphrase",
        ])?
        .succeeded()?;
    rig.at_each_step(
        |rig, _| {
            // A host that has never seen the provider.
            rig.sealed.stop_daemon(Signal::SIGTERM)?;
            fs::remove_dir_all(rig.host().path(STATE))?;
            rig.sealed.start_daemon()?;
            words(&[
                "provider",
                "restore",
                "main",
                "--input",
                backup,
                "--no-backup-passphrase",
                "--passphrase-file",
                &passphrase,
            ])
        },
        |rig, _, command| {
            let again = rig.sealed.virtseal(command)?;
            done_or(again, "already")?;
            rig.restart()?;
            rig.sealed.unlock_provider("main")?;
            ensure!(rig.state_of("main")?.as_deref() == Some("ready"));
            let again = root_of(&rig.sealed, "main", "/run/again.json")?;
            ensure!(again.key == rig.root.key, "another root key");
            Ok(())
        },
    )?;
    Ok(())
}

#[test]
fn first_start_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let daemon = built_program("virtseald")?;
    let daemon = daemon.to_str().context("a UTF-8 path")?;
    for nth in 1..MAX_STEPS {
        rig.sealed.stop_daemon(Signal::SIGKILL)?;
        fs::remove_dir_all(rig.host().path(STATE))?;
        // Held before its first step, so that the tracer sees them all.
        let held = ["sh", "-c", "read go </run/go; exec \"$0\"", daemon];
        rig.host()
            .run(&["sh", "-c", "rm -f /run/go; mkfifo /run/go"])?
            .succeeded()?;
        let mut process = rig.host().spawn("held", &held)?;
        let tracer = Tracer::kill_at(process.outside_pid()?, nth)?;
        wait_until(END_DEADLINE, "the shell to wait for its word", || {
            ensure!(
                !tracer.process_is_gone(),
                "killed before there was anything to do"
            );
            // Without a reader this is an error, and does not wait for one.
            let word = fs::File::options()
                .write(true)
                .custom_flags(O_NONBLOCK)
                .open(rig.host().path("/run/go"));
            Ok(word.ok().map(|mut file| file.write_all(b"go\n")))
        })??;
        wait_until(END_DEADLINE, "the first start", || {
            let answers =
                || Ok::<_, anyhow::Error>(rig.sealed.virtseal(&["provider", "list"])?.status.success());
            Ok((tracer.process_is_gone() || answers()?).then_some(()))
        })?;
        let trace = tracer.finish()?;
        if !trace.killed {
            process.signal(Signal::SIGKILL)?;
        }
        process.wait(END_DEADLINE)?;
        rig.sealed
            .start_daemon()
            .with_context(|| format!("after {:?}", trace.steps.last()))?;
        ensure!(rig.state_of("main")?.is_none());
        if !trace.killed {
            println!("{} steps: {:?}", trace.steps.len(), trace.steps);
            expect_durable(&trace.steps)?;
            ensure!(
                trace.steps.len() > LEAST_STEPS,
                "too few steps: {:?}",
                trace.steps
            );
            return Ok(());
        }
    }
    bail!("the daemon does not start in {MAX_STEPS} steps")
}

fn spec(nth: usize) -> DomainSpec {
    let name = format!("seal{nth}");
    let disk = PathBuf::from(format!("{IMAGES}/{name}.qcow2"));
    DomainSpec {
        uuid: Uuid::from_u128(0x3000 + nth as u128),
        disk_format: "qcow2",
        tpm: !nth.is_multiple_of(3),
        ..DomainSpec::minimal(&name, &disk)
    }
}
