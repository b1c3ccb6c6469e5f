//! A UEFI VM whose keys are at a real key server or token starts as ever, stays off with the reason while they can't be
//! had, and starts again when they can.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::STATE;
use virtseal_testkit::servers::{Manner, OpenBao, PyKmip, Relay, SoftHsm};
use virtseal_testkit::{Host, KeptEnvelope, SealedHost, expect_names, kept_envelopes, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

/// The host that these stories take turns on, with tokens that its virtseald can see.
struct Stage {
    sealed: Mutex<SealedHost>,
    hsm: SoftHsm,
}

impl Stage {
    /// One for all stories that run or wait.
    fn shared() -> Result<Arc<Self>> {
        static SHARED: Mutex<Weak<Stage>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stage) = shared.upgrade() {
            return Ok(stage);
        }
        let hsm = SoftHsm::new()?;
        let mut sealed = SealedHost::start_without_provider(Host::builder())?;
        sealed.stop_daemon(Signal::SIGTERM)?;
        hsm.start_daemon(&mut sealed)?;
        let stage = Arc::new(Self {
            sealed: Mutex::new(sealed),
            hsm,
        });
        *shared = Arc::downgrade(&stage);
        Ok(stage)
    }

    fn take_turn(&self) -> MutexGuard<'_, SealedHost> {
        self.sealed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seals a VM with a disk, UEFI variables and a vTPM under `provider`.
fn seal_under(sealed: &SealedHost, provider: &str, vm: &str) -> Result<()> {
    let mut spec = SealedHost::spec(vm);
    spec.tpm = true;
    let (disk, uuid) = (spec.disk.display().to_string(), spec.uuid.to_string());
    let create = ["volume", "create", &disk, "--size", "64M", "--vm", &uuid];
    sealed
        .virtseal(&[&create[..], &["--provider", provider]].concat())?
        .succeeded()?;
    sealed.host().define(&spec)?;
    sealed
        .virtseal(&["vm", "seal", vm, "--provider", provider])?
        .succeeded()
        .map(drop)
}

fn starts(sealed: &SealedHost, vm: &str) -> Result<Duration> {
    let began = Instant::now();
    sealed.start_paused(vm)?;
    let took = began.elapsed();
    sealed.destroy(vm)?;
    Ok(took)
}

/// Starts, is refused while the provider is locked, and starts once it is unlocked.
fn starts_unless_locked(
    sealed: &SealedHost,
    provider: &str,
    vm: &str,
    unlock: impl FnOnce() -> Result<()>,
) -> Result<()> {
    seal_under(sealed, provider, vm)?;
    starts(sealed, vm)?;
    sealed.virtseal(&["provider", "lock", provider])?.succeeded()?;
    let next = format!("virtseal provider unlock {provider}");
    let quoted = format!("'{provider}'");
    expect_names(
        &sealed.refused_start(vm)?,
        &[&format!("{vm} stays off"), &quoted, "is locked", &next],
    )?;
    unlock()?;
    starts(sealed, vm).map(drop)
}

fn state(sealed: &SealedHost, provider: &str) -> Result<String> {
    sealed.virtseal(&["provider", "show", provider])?.succeeded()
}

#[test]
fn transit_vm_starts_unless_locked() -> Result<()> {
    let (stage, bao) = (Stage::shared()?, OpenBao::start()?);
    let sealed = stage.take_turn();
    bao.add_to(&sealed, "vault", bao.port())?;
    starts_unless_locked(&sealed, "vault", "onvault", || bao.unlock(&sealed, "vault"))?;

    // The server's admin takes the keys away from this host, at once.
    bao.bao(&["token", "revoke", "-mode", "path", "auth/approle"])?;
    bao.bao(&["delete", "auth/approle/role/virtseal"])?;
    let message = sealed.refused_start("onvault")?;
    expect_names(
        &message,
        &["onvault stays off", "'vault'", "virtseal provider unlock vault"],
    )
}

#[test]
fn pkcs11_vm_starts_unless_locked_or_its_token_is_gone() -> Result<()> {
    let stage = Stage::shared()?;
    let sealed = stage.take_turn();
    stage.hsm.make("kek")?;
    stage.hsm.add_to(&sealed, "hsm", "kek")?;
    expect_names(
        &state(&sealed, "hsm")?,
        &["token        'kek' (SoftHSM", "firmware"],
    )?;
    starts_unless_locked(&sealed, "hsm", "onhsm", || stage.hsm.unlock(&sealed, "hsm"))?;

    sealed.start_paused("onhsm")?;
    let removed = stage.hsm.remove("kek")?;
    sealed.destroy("onhsm")?;
    let message = sealed.refused_start("onhsm")?;
    expect_names(&message, &["onhsm stays off", "'hsm'", "unreachable", "'kek'"])?;
    removed.put_back()?;
    // Nobody types the PIN again.
    wait_until(PATIENCE, "the token is found again", || {
        Ok(sealed
            .host()
            .virsh(&["start", "--paused", "onhsm"])?
            .succeeded()
            .ok())
    })?;
    sealed.destroy("onhsm")
}

#[test]
fn kmip_vm_starts_unless_locked_or_all_nodes_are_dead() -> Result<()> {
    let (stage, kms) = (Stage::shared()?, PyKmip::start()?);
    let nodes = [Relay::to(kms.port())?, Relay::to(kms.port())?];
    let sealed = stage.take_turn();
    kms.add_to(&sealed, "kms", &nodes.each_ref().map(Relay::port), true)?;
    // What a cache does is another story.
    sealed
        .virtseal(&["provider", "cache", "kms", "none"])?
        .succeeded()?;
    let unlock = || sealed.unlock_provider("kms");
    starts_unless_locked(&sealed, "kms", "onkms", unlock)?;

    for manner in [Manner::Dead, Manner::Silent] {
        nodes[0].be(manner)?;
        let (first, second) = (starts(&sealed, "onkms")?, starts(&sealed, "onkms")?);
        println!("with a first node that is {manner:?}: {first:?}, then {second:?}");
        wait_until(PATIENCE, "the dead node is shown", || {
            Ok(expect_names(&state(&sealed, "kms")?, &["degraded", "1 of 2 nodes"]).ok())
        })?;
        nodes[0].be(Manner::Forward)?;
        // As if it had never been away.
        unlock()?;
    }

    nodes.iter().try_for_each(|node| node.be(Manner::Dead))?;
    let began = Instant::now();
    let message = sealed.refused_start("onkms")?;
    ensure!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    expect_names(
        &message,
        &[
            "onkms stays off",
            "'kms'",
            "unreachable",
            "2 of 2 nodes",
            "last answer",
        ],
    )?;
    nodes[1].be(Manner::Forward)?;
    starts(&sealed, "onkms").map(drop)
}

/// As docs/providers/kmip.md has it, step by step.
#[test]
fn kmip_trust_comes_about_by_the_manuals_commands() -> Result<()> {
    let (stage, kms) = (Stage::shared()?, PyKmip::start()?);
    let sealed = stage.take_turn();
    let file = |name: &str| kms.directory().join(name).display().to_string();
    let virtseal = |arguments: &str| {
        let arguments: Vec<_> = arguments.split(' ').collect();
        sealed.virtseal(&arguments)
    };
    let shown = |wanted: &str| expect_names(&state(&sealed, "manual")?, &[wanted]);
    virtseal(&format!(
        "provider add kmip manual --endpoint 127.0.0.1:{}",
        kms.port()
    ))?
    .succeeded()?;

    let fingerprint = openssl_prints(&[
        "x509",
        "-in",
        &file("server.pem"),
        "-noout",
        "-fingerprint",
        "-sha256",
    ])?;
    let (_, fingerprint) = fingerprint.trim().split_once('=').context("no fingerprint")?;
    let wrong = format!("00{}", fingerprint.get(2..).context("a short fingerprint")?);
    let refused = virtseal(&format!("provider trust manual --fingerprint {wrong} --yes"))?.refused()?;
    expect_names(&refused, &[&wrong, fingerprint])?;
    virtseal(&format!(
        "provider trust manual --fingerprint {fingerprint} --yes"
    ))?
    .succeeded()?;

    let server = std::fs::read(file("server.pem"))?;
    let other = kms.authority.server(90).certificate;
    let (ca, list) = (file("ca.pem"), file("ca.crl"));
    let by_ca = format!("provider trust manual --ca {ca} --crl {list} --yes");
    std::fs::write(&list, kms.authority.revocation_list(&[&server]))?;
    expect_names(&virtseal(&by_ca)?.refused()?, &["revoked"])?;
    std::fs::write(&list, kms.authority.revocation_list(&[&other]))?;
    virtseal(&by_ca)?.succeeded()?;
    shown("not trusted by KMS")?;

    let (request, signed) = (file("host.csr"), file("host.pem"));
    virtseal(&format!("provider csr manual -o {request}"))?.succeeded()?;
    std::fs::write(&signed, kms.authority.sign(&std::fs::read(&request)?, 90))?;
    virtseal(&format!("provider identity manual --cert {signed}"))?.succeeded()?;
    shown("  ready")
}

/// `provider show` lists what `provider set` changes: the VM goes on starting through the new node, a node without its keys changes nothing, and
/// what is refused says how to go on.
#[test]
fn settings_are_seen_and_changed_once_they_work() -> Result<()> {
    let (stage, kms, empty) = (Stage::shared()?, PyKmip::start()?, PyKmip::start()?);
    let sealed = stage.take_turn();
    kms.add_to(&sealed, "set", &[kms.port()], false)?;
    seal_under(&sealed, "set", "onset")?;
    let value = |key: &str| -> Result<Option<String>> {
        let provider = sealed.provider("set")?;
        let settings = provider["settings"].as_array().context("no settings")?.clone();
        let found = settings.into_iter().find(|setting| setting["key"] == key);
        Ok(found.context("no such setting")?["value"]
            .as_str()
            .map(str::to_owned))
    };
    let endpoint = |port: u16| format!("127.0.0.1:{port}");
    let set = |assigned: &[&str]| sealed.virtseal(&[&["provider", "set", "set"], assigned].concat());

    let relay = Relay::to(kms.port())?;
    let endpoints = format!("endpoints={}", endpoint(relay.port()));
    set(&[&endpoints, "timeout-ms=4321", "description=rack 7"])?.succeeded()?;
    starts(&sealed, "onset")?;
    ensure!(value("endpoints")? == Some(endpoint(relay.port())));
    expect_names(
        &state(&sealed, "set")?,
        &[
            "rack 7",
            "timeout_ms    4321",
            "KMIP 2.0",
            "trusts",
            "identity",
            "settings",
            "default",
        ],
    )?;

    // Another server of another CA, one that is not there, and a value that makes no sense.
    let before = value("endpoints")?;
    let nobody = virtseal_testkit::servers::free_port()?;
    for (assigned, said) in [
        (format!("endpoints={}", endpoint(empty.port())), "stays as it was"),
        (format!("endpoints={}", endpoint(nobody)), "stays as it was"),
        ("endpoints=https://kms".to_owned(), "is not an endpoint"),
        ("mode=cloud".to_owned(), "provider show set"),
        ("colour=red".to_owned(), "there is no setting 'colour'"),
        ("tpm=7".to_owned(), "nothing that the TPM could keep"),
        ("recipient=yes".to_owned(), "is not set by this command"),
    ] {
        expect_names(&set(&[&assigned])?.refused()?, &[said])?;
        ensure!(value("endpoints")? == before, "{assigned}");
    }
    starts(&sealed, "onset")?;

    // As the advice has it, and back.
    set(&[&format!("endpoints={}", endpoint(nobody)), "--no-probe"])?.succeeded()?;
    expect_names(&state(&sealed, "set")?, &["unreachable"])?;
    let providers = sealed.json(&["provider", "list"])?;
    let default = providers["providers"]
        .as_array()
        .context("no list")?
        .iter()
        .find(|one| one["is_default"] == true);
    let default = default
        .and_then(|one| one["name"].as_str())
        .context("no default provider")?
        .to_owned();
    let warned = sealed.virtseal(&["provider", "default", "set"])?;
    expect_names(&warned.stderr, &["nothing can be sealed", "unreachable"])?;
    sealed.virtseal(&["provider", "default", &default])?.succeeded()?;
    set(&[&format!("endpoints={}", endpoint(kms.port()))])?.succeeded()?;
    starts(&sealed, "onset")?;

    // Its key on disk is in the clear: nobody is asked for anything.
    sealed.virtseal(&["provider", "lock", "set"])?.succeeded()?;
    expect_names(
        &set(&["timeout-ms=4000"])?.refused()?,
        &["is locked", "virtseal provider unlock set"],
    )?;
    sealed.virtseal(&["provider", "unlock", "set"])?.succeeded()?;
    starts(&sealed, "onset")?;
    ensure!(sealed.json(&["provider", "set", "set", "timeout-ms=4321"])?["changed"] == false);
    Ok(())
}

fn openssl_prints(arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new("openssl")
        .args(arguments)
        .output()
        .context("openssl did not start: install openssl")?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// As docs/providers/transit.md has it: a shared key, a token, and the way to the key of a disk without virtseal.
#[test]
fn transit_keys_are_found_by_the_manuals_commands() -> Result<()> {
    let (stage, bao) = (Stage::shared()?, OpenBao::start()?);
    let sealed = stage.take_turn();
    bao.bao(&["write", "-f", "transit/keys/virtseal-hosts", "derived=true"])?;
    let token = bao.bao(&[
        "token",
        "create",
        "-policy=virtseal",
        "-period=24h",
        "-orphan",
        "-field=token",
    ])?;
    let address = format!("http://127.0.0.1:{}", bao.port());
    let add = ["provider", "add", "transit", "shared", "--address", &address];
    let shared = ["--kek-scope", "provider", "--key", "virtseal-hosts"];
    sealed.virtseal(&[&add[..], &shared].concat())?.succeeded()?;
    let unlock = ["provider", "unlock", "shared", "--passphrase-file", "-"];
    sealed.virtseal_reading(&token, &unlock)?.succeeded()?;
    seal_under(&sealed, "shared", "onshared")?;
    starts(&sealed, "onshared")?;

    let envelopes = kept_envelopes(&sealed.host().path(STATE))?;
    let of_shared = |envelope: &&KeptEnvelope| {
        envelope
            .stanza("kek")
            .is_ok_and(|kek| kek.starts_with("virtseal-hosts/"))
    };
    let envelope = envelopes
        .iter()
        .find(of_shared)
        .context("no envelope of the shared key")?;
    let (name, rest) = envelope.stanza("kek")?.split_once('/').context("no context")?;
    let (uuid, version) = rest.split_once(":v").context("no version")?;
    let plain = bao.bao(&[
        "write",
        "-field=plaintext",
        &format!("transit/decrypt/{name}"),
        &format!("ciphertext=vault:v{version}:{}", envelope.stanza("body")?),
        &format!("context={}", openssl::base64::encode_block(uuid.as_bytes())),
    ])?;
    // 64 bytes.
    ensure!(plain.len() == 88, "{} characters", plain.len());
    Ok(())
}
