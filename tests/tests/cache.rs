//! A VM whose key was fetched starts while its KMS is down, and only then: not after a lock, not after a restart. Whoever
//! is refused is told of every way in, and what to run.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::{IMAGES, STATE};
use virtseal_testkit::servers::PyKmip;
use virtseal_testkit::{Host, SealedHost, expect_names, kept_envelopes, temporaries, wait_until};

const KMS: &str = "kmip-prod";
const SPARE: &str = "breakglass";
const PATIENCE: Duration = Duration::from_secs(60);

/// web01, sealed for both providers; the spare one is locked.
fn host_with(kms: &PyKmip) -> Result<SealedHost> {
    let sealed = SealedHost::start_without_provider(Host::builder())?;
    kms.add_to(&sealed, KMS, &[kms.port()], false)?;
    sealed.add_provider(SPARE)?;
    sealed.seal_new("web01")?;
    sealed.run(&["provider", "recipients", "add", SPARE, "--watch"])?;
    sealed.run(&["provider", "lock", SPARE])?;
    Ok(sealed)
}

#[test]
fn vm_starts_without_its_kms_until_the_cache_is_gone() -> Result<()> {
    let mut kms = PyKmip::start()?;
    let mut sealed = host_with(&kms)?;
    sealed.expect_start("web01")?;
    let shown = sealed.provider(KMS)?;
    ensure!(shown["state"] == "ready" && shown["cache"] == "24h", "{shown}");
    ensure!(
        shown["cached_keks"] == 1 && shown["last_answer"].is_string(),
        "{shown}"
    );

    kms.kill();
    sealed.expect_start("web01").context("from the cache")?;
    let shown = sealed.provider(KMS)?;
    ensure!(
        shown["state"] == "unreachable" && shown["cached_keks"] == 1,
        "{shown}"
    );
    nothing_new_is_sealed(&sealed)?;

    sealed.run(&["provider", "lock", KMS])?;
    sealed.unlock_provider(KMS)?;
    let refused = sealed.refused_start("web01")?;
    let (unreachable, rest) = refused
        .split_once(", last answer ")
        .with_context(|| refused.clone())?;
    let port = kms.port();
    ensure!(
        unreachable
            == format!(
                "web01 stays off: disk vda: provider '{KMS}' unreachable (127.0.0.1:{port}: connection refused)"
            ),
        "{refused}"
    );
    let (clock, rest) = rest.split_once(", ").with_context(|| refused.clone())?;
    // At midnight it has its date.
    ensure!(
        clock.rsplit(' ').next().is_some_and(|time| time.len() == 5),
        "{refused}"
    );
    ensure!(
        rest == format!("recipient '{SPARE}' is locked. Next: virtseal provider unlock {SPARE}"),
        "{refused}"
    );
    sealed.unlock_provider(SPARE)?;
    sealed
        .expect_start("web01")
        .context("what was said to run next helps")?;
    sealed.run(&["provider", "lock", SPARE])?;

    kms.run()?;
    sealed.expect_start("web01").context("with the KMS again")?;
    kms.kill();
    sealed.expect_start("web01").context("from the cache again")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon()?;
    expect_names(
        &sealed.refused_start("web01")?,
        &[
            "web01 stays off",
            "unreachable",
            "recipient 'breakglass' is locked",
        ],
    )?;
    kms.run()?;
    wait_until(PATIENCE, "the KMS is found again", || {
        Ok(sealed.expect_start("web01").ok())
    })
}

/// Neither an image nor a VM is sealed without the KMS, and nothing is left of the try.
fn nothing_new_is_sealed(sealed: &SealedHost) -> Result<()> {
    let state = sealed.host().path(STATE);
    let before = kept_envelopes(&state)?.len();
    let spec = SealedHost::spec("web02");
    let (disk, vm) = (spec.disk.display().to_string(), spec.uuid.to_string());
    let made = sealed.virtseal(&["volume", "create", &disk, "--size", "64M", "--vm", &vm])?;
    ensure!(made.code() == Some(4), "{made:?}");
    expect_names(&made.stderr, &[KMS, "unreachable", "connection refused"])?;
    ensure!(!sealed.host().path(&disk).exists(), "{disk} is there");

    // A VM with a plain disk.
    sealed
        .host()
        .run(&["qemu-img", "create", "-q", "-f", "qcow2", &disk, "64M"])?
        .succeeded()?;
    sealed.host().define(&spec)?;
    let plain = sealed.dumpxml("web02")?;
    let refused = sealed.virtseal(&["vm", "seal", "web02"])?;
    ensure!(!refused.status.success(), "sealed without its KMS");
    ensure!(sealed.dumpxml("web02")? == plain, "its XML has changed");
    let left = temporaries(&sealed.host().path(IMAGES))?;
    ensure!(left.is_empty(), "left: {left:?}");
    let envelopes = kept_envelopes(&state)?.len();
    ensure!(envelopes == before, "{envelopes} envelopes, there were {before}");
    Ok(())
}

#[test]
fn cache_is_refused_where_no_key_ever_comes() -> Result<()> {
    let sealed = SealedHost::start_without_provider(Host::builder())?;
    sealed.add_provider("main")?;
    let transit = [
        "provider",
        "add",
        "transit",
        "v",
        "--address",
        "https://127.0.0.1:1",
        "--cache",
        "4h",
    ];
    let pkcs11 = [
        "provider",
        "add",
        "pkcs11",
        "h",
        "--module",
        "/x.so",
        "--slot",
        "1",
        "--cache",
        "until-lock",
    ];
    let native = ["provider", "add", "native", "n", "--cache", "4h"];
    let server = [
        "provider",
        "add",
        "kmip",
        "k",
        "--endpoint",
        "127.0.0.1:1",
        "--mode",
        "server",
        "--cache",
        "4h",
    ];
    let later = ["provider", "cache", "main", "4h"];
    for refused in [&transit[..], &pkcs11, &native, &server, &later] {
        let output = sealed.virtseal(refused)?;
        ensure!(output.code() == Some(2), "{refused:?}: {output:?}");
        expect_names(&output.stderr, &["nothing to cache"])?;
    }
    ensure!(sealed.virtseal(&["provider", "cache", "main", "soon"])?.code() == Some(2));
    let listed = sealed.json(&["provider", "list"])?;
    ensure!(
        listed["providers"].as_array().is_some_and(|all| all.len() == 1),
        "{listed}"
    );
    ensure!(listed["providers"][0]["cache"].is_null(), "{listed}");

    sealed.run(&[
        "provider",
        "add",
        "kmip",
        "k",
        "--endpoint",
        "127.0.0.1:1",
        "--cache",
        "4h",
    ])?;
    sealed.run(&["provider", "cache", "k", "until-lock"])?;
    let shown = sealed.run(&["provider", "show", "k"])?;
    expect_names(
        &shown,
        &["kmip", "not trusted", "last answer", "until-lock, 0 keys"],
    )
}
