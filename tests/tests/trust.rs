//! The trust between this host and a KMS, and the end of a provider, when virtseald is killed on the way or the disk is full: the
//! old identity works or the new one does, and no private key stays that nothing needs any more.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, Rig, STATE, done_or, words};
use virtseal_testkit::servers::PyKmip;
use virtseal_testkit::{Output, SealedHost, expect_names, expect_order, pin_log, sealed_root};

const KMS: &str = "kms";

/// A rig with the provider [`KMS`], its key in the clear, and a volume under it.
fn rig_with(kms: &PyKmip) -> Result<Rig> {
    let rig = Rig::start()?;
    kms.add_to(&rig.sealed, KMS, &[kms.port()], false)?;
    volume_under(&rig, KMS, 1)?;
    Ok(rig)
}

fn volume_under(rig: &Rig, provider: &str, nth: usize) -> Result<()> {
    let (path, vm) = (
        format!("{IMAGES}/{provider}-{nth}.qcow2"),
        Uuid::from_u128(0x5000 + nth as u128).to_string(),
    );
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &vm];
    rig.sealed
        .run(&[&create[..], &["--provider", provider]].concat())
        .map(drop)
}

/// A new key's request in a file, as a path in the namespace, and the certificate that the KMS's admin makes of it.
fn requested(rig: &Rig, kms: &PyKmip, provider: &str, file: &str) -> Result<(String, String)> {
    let request = format!("/run/{file}.csr");
    rig.sealed
        .run(&[&new_request(provider), &["-o", &request][..]].concat())?;
    let signed = sign(rig, kms, &request)?;
    Ok((request, signed))
}

fn new_request(provider: &str) -> [&str; 6] {
    ["provider", "csr", provider, "--new", "--common-name", "kvm-host"]
}

fn sign(rig: &Rig, kms: &PyKmip, request: &str) -> Result<String> {
    let signed = request.replace(".csr", ".pem");
    let request = fs::read(rig.host().path(request))?;
    fs::write(rig.host().path(&signed), kms.authority.sign(&request, 90))?;
    Ok(signed)
}

/// The identity is set, the KMS lets it in, and it opens what was wrapped before.
fn identified(output: Output) -> Result<()> {
    let said = format!("{}{}", output.stdout, output.stderr);
    output.succeeded()?;
    ensure!(!said.contains("Warning"), "{said}");
    expect_names(&said, &[" ready "])
}

/// The files of a provider, with their texts.
fn files_of(rig: &Rig, id: &str) -> Result<Vec<(PathBuf, String)>> {
    let directory = rig.host().path(STATE).join("providers").join(id);
    let mode = |path: &PathBuf| Ok::<_, std::io::Error>(fs::metadata(path)?.permissions().mode() & 0o777);
    ensure!(mode(&directory)? == 0o700, "{}", directory.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        ensure!(mode(&path)? == 0o600, "{}", path.display());
        let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
        let known = ["identity.json", "request.json", "trust.json"];
        ensure!(known.contains(&name.as_str()), "{name} is left");
        let text = fs::read_to_string(&path)?;
        serde_json::from_str::<serde_json::Value>(&text).with_context(|| format!("half of {name}"))?;
        files.push((path, text));
    }
    Ok(files)
}

fn keys_in_the_clear(rig: &Rig, id: &str) -> Result<usize> {
    let files = files_of(rig, id)?;
    let found = files
        .iter()
        .map(|(_, text)| text.matches("BEGIN PRIVATE KEY").count());
    Ok(found.sum())
}

fn run(rig: &Rig, script: &str) -> Result<()> {
    rig.host().run(&["sh", "-c", script])?.succeeded().map(drop)
}

fn id_of(rig: &Rig, provider: &str) -> Result<String> {
    let shown = rig.sealed.provider(provider)?;
    Ok(shown["id"].as_str().context("no id")?.to_owned())
}

/// The key in use is in the clear, and so is the one that waits; the new identity is sealed.
#[test]
fn provider_identity_can_be_killed_at_every_step() -> Result<()> {
    let kms = PyKmip::start()?;
    let mut rig = rig_with(&kms)?;
    let passphrase = rig.passphrase()?;
    let id = id_of(&rig, KMS)?;
    let (_, signed) = requested(&rig, &kms, KMS, "host")?;
    let files = format!("{STATE}/providers/{id}");
    run(&rig, &format!("cp -a {files} /run/before"))?;
    let (mut old, mut new) = (0, 0);
    let steps = rig.at_each_change(
        |rig, _| {
            rig.sealed.stop_daemon(Signal::SIGKILL)?;
            run(rig, &format!("rm -r {files} && cp -a /run/before {files}"))?;
            rig.sealed.start_daemon()?;
            ensure!(rig.state_of(KMS)?.is_some());
            let identity = ["provider", "identity", KMS, "--cert", &signed];
            let seal = ["--encrypt", "--passphrase-file", &passphrase];
            words(&[&identity[..], &seal].concat())
        },
        |rig, nth, command| {
            let is_new = rig.state_of(KMS)?.as_deref() == Some("locked");
            let clear = keys_in_the_clear(rig, &id)?;
            let expected = if is_new { 0 } else { 2 };
            ensure!(clear == expected, "{clear} keys are in the clear, new: {is_new}");
            *(if is_new { &mut new } else { &mut old }) += 1;
            // Asks the server; a key in the clear needs no passphrase.
            rig.sealed.unlock_provider(KMS)?;
            ensure!(rig.state_of(KMS)?.as_deref() == Some("ready"));
            // It opens what was wrapped before, or warns. Sealing takes its second, so not once for each kill that was too late.
            if !is_new || nth % 3 == 0 {
                identified(rig.sealed.virtseal(command)?)?;
                ensure!(keys_in_the_clear(rig, &id)? == 0);
            }
            Ok(())
        },
    )?;
    println!("{old} times the old identity, {new} times the new one");
    ensure!(old > 0 && new > 0, "{old} and {new}");
    // The copy that waits goes once the other is there.
    expect_order(&steps, "fsync(identity.new)", "rename(identity.new")?;
    expect_order(&steps, "rename(identity.new", "unlink(request.json")
}

#[test]
fn provider_csr_can_be_killed_at_every_step() -> Result<()> {
    let kms = PyKmip::start()?;
    let mut rig = rig_with(&kms)?;
    let id = id_of(&rig, KMS)?;
    let file_of = |nth: usize| format!("/run/second-{nth}.csr");
    let steps = rig.at_each_change(
        |rig, nth| {
            // One is with the KMS's admin already.
            requested(rig, &kms, KMS, &format!("first-{nth}"))?;
            let file = file_of(nth);
            words(&[&new_request(KMS)[..], &["-o", &file]].concat())
        },
        |rig, nth, command| {
            // It answers, so it has cleared up.
            ensure!(rig.state_of(KMS)?.is_some());
            files_of(rig, &id)?;
            let first = format!("/run/first-{nth}.pem");
            let given = rig.host().path(file_of(nth)).exists();
            rig.sealed.run(command)?;
            let second = sign(rig, &kms, &file_of(nth))?;
            ensure!(!given, "it was handed out, and made anew");
            // Whichever of them comes back.
            for signed in [first, second] {
                let identity = ["provider", "identity", KMS, "--cert", &signed];
                identified(rig.sealed.virtseal(&identity)?)?;
            }
            ensure!(
                keys_in_the_clear(rig, &id)? == 1,
                "a request was answered, and its key is left"
            );
            Ok(())
        },
    )?;
    expect_order(&steps, "fsync(request.new)", "rename(request.new")
}

#[test]
fn provider_trust_can_be_killed_at_every_step() -> Result<()> {
    let kms = PyKmip::start()?;
    let mut rig = rig_with(&kms)?;
    let id = id_of(&rig, KMS)?;
    let ca = kms.ca().display().to_string();
    let pin = fingerprint(&kms)?;
    let steps = rig.at_each_change(
        |_, nth| match nth % 2 {
            0 => words(&["provider", "trust", KMS, "--ca", &ca, "--yes"]),
            _ => words(&["provider", "trust", KMS, "--fingerprint", &pin, "--yes"]),
        },
        |rig, nth, command| {
            // By the CA or by the fingerprint, it is the same server.
            rig.sealed.unlock_provider(KMS)?;
            files_of(rig, &id)?;
            ensure!(rig.state_of(KMS)?.as_deref() == Some("ready"));
            rig.sealed.run(command)?;
            let trust = files_of(rig, &id)?;
            let (_, trust) = trust
                .iter()
                .find(|(path, _)| path.ends_with("trust.json"))
                .context("no trust")?;
            ensure!(trust.contains("pins") == (nth % 2 == 1), "{trust}");
            Ok(())
        },
    )?;
    expect_order(&steps, "fsync(trust.new)", "rename(trust.new")
}

fn fingerprint(kms: &PyKmip) -> Result<String> {
    let pem = fs::read(kms.directory().join("server.pem"))?;
    let certificate = openssl::x509::X509::from_pem(&pem)?;
    Ok(hex::encode_upper(
        certificate.digest(openssl::hash::MessageDigest::sha256())?,
    ))
}

#[test]
fn forced_delete_can_be_killed_at_every_step() -> Result<()> {
    const NATIVE: &str = "spare";
    let kms = PyKmip::start()?;
    let mut rig = rig_with(&kms)?;
    rig.sealed.add_provider(NATIVE)?;
    volume_under(&rig, NATIVE, 2)?;
    fs::write(rig.host().path("/run/id"), id_of(&rig, KMS)?)?;
    let sealed = sealed_root(&rig.host().path(STATE), NATIVE)?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    run(&rig, &format!("cp -a {STATE} /run/before"))?;
    rig.sealed.start_daemon()?;
    for name in [KMS, NATIVE] {
        let (mut stayed, mut went) = (0, 0);
        rig.at_each_change(
            |rig, _| {
                rig.sealed.stop_daemon(Signal::SIGKILL)?;
                run(rig, &format!("rm -r {STATE} && cp -a /run/before {STATE}"))?;
                rig.sealed.start_daemon()?;
                // It answers, so it has cleared up.
                ensure!(rig.state_of(name)?.is_some());
                words(&["provider", "delete", name, "--force", "--yes-delete", name])
            },
            |rig, _, command| {
                if rig.state_of(name)?.is_some() {
                    stayed += 1;
                    rig.sealed.unlock_provider(name)?;
                    ensure!(rig.state_of(name)?.as_deref() == Some("ready"));
                    rig.sealed.run(command)?;
                } else {
                    went += 1;
                }
                match name {
                    NATIVE => nothing_left_of(rig, &sealed, NATIVE)?,
                    _ => no_files_left(rig)?,
                }
                done_or(rig.sealed.virtseal(command)?, "no key provider")
            },
        )?;
        println!("{name}: {stayed} times it stayed, {went} times it went");
        ensure!(stayed > 0 && went > 0, "{stayed} and {went}");
    }
    Ok(())
}

fn no_files_left(rig: &Rig) -> Result<()> {
    let id = fs::read_to_string(rig.host().path("/run/id"))?;
    let directory = rig.host().path(STATE).join("providers").join(id);
    ensure!(!directory.exists(), "{} is left", directory.display());
    Ok(())
}

/// Its backup is the only place left, which an admin has put there.
fn nothing_left_of(rig: &Rig, sealed: &[u8], name: &str) -> Result<()> {
    // One page of a database holds a part of it.
    let needle = &sealed[sealed.len() / 2..][..64];
    for entry in fs::read_dir(rig.host().path(STATE))? {
        let path = entry?.path();
        if !path.is_file() || path.ends_with(format!("{name}.age")) {
            continue;
        }
        let found = fs::read(&path)?
            .windows(needle.len())
            .any(|window| window == needle);
        ensure!(!found, "the sealed root key of {name} is in {}", path.display());
    }
    Ok(())
}

#[test]
fn full_state_directory_leaves_trust_and_providers_as_they_are() -> Result<()> {
    let kms = PyKmip::start()?;
    let mut rig = rig_with(&kms)?;
    rig.sealed.add_provider("spare")?;
    volume_under(&rig, "spare", 2)?;
    // The same state, on a small disk of its own.
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let small = "cp -a /var/lib/virtseal /run/state && mount -t tmpfs -o size=2m,mode=0700 small /var/lib/virtseal && \
                 cp -a /run/state/. /var/lib/virtseal/";
    run(&rig, small)?;
    rig.sealed.start_daemon()?;
    unlock_all(&rig)?;
    let id = id_of(&rig, KMS)?;
    let (_, signed) = requested(&rig, &kms, KMS, "first")?;
    let pinned = pin_log(&rig.sealed)?;
    let ballast = rig.host().path(STATE).join("ballast");
    ensure!(
        fs::write(&ballast, vec![0; 4 << 20]).is_err(),
        "the disk is not full"
    );
    let before = files_of(&rig, &id)?;

    let pin = fingerprint(&kms)?;
    let identity = ["provider", "identity", KMS, "--cert", &signed];
    let trust = ["provider", "trust", KMS, "--fingerprint", &pin, "--yes"];
    let request = [&new_request(KMS)[..], &["-o", "/run/second.csr"]].concat();
    let delete = |name: &'static str| ["provider", "delete", name, "--force", "--yes-delete", name];
    let (of_kms, of_spare) = (delete(KMS), delete("spare"));
    for command in [&identity[..], &trust, &request, &of_kms, &of_spare] {
        let said = rig.sealed.virtseal(command)?.refused()?;
        let is_full = said.contains("full") || said.to_lowercase().contains("no space left");
        ensure!(is_full && said.contains(STATE), "{command:?}: {said}");
        ensure!(files_of(&rig, &id)? == before, "{command:?}: {said}");
        for provider in [KMS, "spare"] {
            // Nobody has to unlock it again.
            ensure!(
                rig.state_of(provider)?.as_deref() == Some("ready"),
                "{provider} after {command:?}"
            );
        }
    }
    ensure!(
        !rig.host().path("/run/second.csr").exists(),
        "a request without a key"
    );

    fs::remove_file(ballast)?;
    drop(pinned);
    rig.restart()?;
    unlock_all(&rig)?;
    identified(rig.sealed.virtseal(&identity)?)?;
    rig.sealed.run(&trust)?;
    rig.sealed.run(&request)?;
    rig.sealed.run(&of_kms)?;
    rig.sealed.run(&of_spare)?;
    ensure!(!rig.host().path(STATE).join("providers").join(id).exists());
    Ok(())
}

fn unlock_all(rig: &Rig) -> Result<()> {
    ["main", "spare", KMS]
        .iter()
        .try_for_each(|provider| SealedHost::unlock_provider(&rig.sealed, provider))
}
