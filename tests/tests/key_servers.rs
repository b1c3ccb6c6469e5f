//! What virtseal tells to do at a key server or a token is done there, by its own tools, and then as it is printed: VMs start again.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::STATE;
use virtseal_testkit::servers::{Authority, OpenBao, PyKmip, SoftHsm};
use virtseal_testkit::{HostBuilder, SealedHost, Way, expect_names};

const FILE: &str = "/run/file.pem";

fn host() -> Result<SealedHost> {
    SealedHost::start_without_provider(HostBuilder::default())
}

/// As a request has it: a KMS knows the owner of a key by that.
fn host_name(sealed: &SealedHost) -> Result<String> {
    let name = sealed.host().run(&["cat", "/proc/sys/kernel/hostname"])?;
    Ok(name.succeeded()?.trim().to_owned())
}

fn refused(sealed: &SealedHost, command: &[&str]) -> Result<String> {
    sealed.virtseal(command)?.refused()
}

/// What its reader puts in the place of FILE.
fn file(sealed: &SealedHost, content: impl AsRef<[u8]>) -> Result<()> {
    Ok(fs::write(sealed.host().path(FILE), content)?)
}

#[test]
fn a_kms_and_this_host_trust_each_other_as_it_says() -> Result<()> {
    let (sealed, mut kms) = (host()?, PyKmip::start()?);
    let name = host_name(&sealed)?;
    let endpoint = format!("127.0.0.1:{}", kms.port());
    let add = ["provider", "add", "kmip", "kms", "--endpoint", &endpoint];
    let told = sealed.run(&add)?;
    Way::that_begins("virtseal provider trust", &told)?
        .typing(&["y"])
        .take(&sealed)?;
    // A certificate without its key.
    file(&sealed, kms.authority.client(&name, 90).certificate)?;
    let told = refused(&sealed, &["provider", "identity", "kms", "--cert", FILE])?;
    let request = Way::that_begins("virtseal provider csr", &told)?.take(&sealed)?;
    file(&sealed, kms.authority.sign(request.as_bytes(), 90))?;
    sealed.run(&["provider", "identity", "kms", "--cert", FILE])?;
    sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;

    // No certificate.
    file(&sealed, "nothing")?;
    let told = refused(&sealed, &["provider", "trust", "kms", "--ca", FILE, "--yes"])?;
    file(&sealed, kms.authority.pem())?;
    Way::that_begins("virtseal provider trust kms --ca", &told)?
        .with("FILE", FILE)
        .typing(&["y"])
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // The KMS gets a certificate of another authority, then lets in clients of another.
    let other = Authority::named("other");
    kms.kill();
    kms.certify(&other, 90)?;
    kms.run()?;
    let told = sealed.refused_start("web01")?;
    Way::that_begins("virtseal provider trust", &told)?
        .typing(&["y"])
        .take(&sealed)?;
    sealed.expect_start("web01")?;
    kms.kill();
    kms.accept(&other)?;
    kms.run()?;
    let told = sealed.refused_start("web01")?;
    file(&sealed, other.client(&name, 90).pem())?;
    Way::that_begins("virtseal provider identity", &told)?
        .with("FILE", FILE)
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // What encrypts the key on disk is not dropped in silence.
    let typed = [SealedHost::PASSPHRASE; 2];
    Way::that_begins("virtseal provider identity", &told)?
        .with("FILE", &format!("{FILE} --encrypt"))
        .typing(&typed)
        .take(&sealed)?;
    let told = refused(&sealed, &["provider", "identity", "kms", "--cert", FILE])?;
    Way::that_begins("virtseal provider identity kms --cert FILE --encrypt", &told)?
        .with("FILE", FILE)
        .typing(&typed)
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // A request that waits, damaged on this host's disk.
    sealed.run(&["provider", "csr", "kms", "--new"])?;
    let id = sealed.provider("kms")?["id"]
        .as_str()
        .context("no id")?
        .to_owned();
    let request = sealed.host().path(format!("{STATE}/providers/{id}/request.json"));
    ensure!(request.exists());
    fs::write(request, "{")?;
    let told = refused(&sealed, &["provider", "csr", "kms"])?;
    let request = Way::that_begins("virtseal provider csr kms --new", &told)?
        .after("virtseal provider identity")
        .take(&sealed)?;
    file(&sealed, other.sign(request.as_bytes(), 90))?;
    Way::named("virtseal provider identity kms --cert", &told)?
        .with("FILE", &format!("{FILE} --encrypt"))
        .typing(&typed)
        .take(&sealed)?;
    sealed.expect_start("web01")
}

#[test]
fn a_kms_that_was_given_up_comes_back_as_it_says() -> Result<()> {
    let (sealed, kms) = (host()?, PyKmip::start()?);
    kms.add_to(&sealed, "kms", &[kms.port()], false)?;
    sealed.run(&["provider", "cache", "kms", "none"])?;
    sealed.seal_new("web01")?;
    let nobody = format!("endpoints=127.0.0.1:{}", virtseal_testkit::servers::free_port()?);
    let told = refused(&sealed, &["provider", "set", "kms", &nobody])?;
    Way::that_begins("virtseal provider set kms KEY=VALUE --no-probe", &told)?
        .with("KEY=VALUE", &nobody)
        .take(&sealed)?;
    let told = sealed.refused_start("web01")?;
    let shown = Way::that_begins("virtseal provider show", &told)?.take(&sealed)?;
    expect_names(&shown, &["unreachable"])?;

    sealed.run(&["provider", "delete", "kms", "--force", "--yes-delete", "kms"])?;
    let told = sealed.refused_start("web01")?;
    let endpoint = format!("--endpoint 127.0.0.1:{}", kms.port());
    let added = Way::that_begins("virtseal provider add kmip kms", &told)?
        .with("…", &endpoint)
        .take(&sealed)?;
    Way::that_begins("virtseal provider trust", &added)?
        .typing(&["y"])
        .take(&sealed)?;
    kms.identify(&sealed, "kms", false)?;
    sealed.expect_start("web01")
}

#[test]
fn a_vault_lets_in_and_is_trusted_as_it_says() -> Result<()> {
    let (ca, clients) = (Authority::named("ca"), Authority::named("clients"));
    let (sealed, mut bao) = (host()?, OpenBao::certified_by(&ca)?);
    let by_ca = "/run/ca.pem";
    let trusts = |ca: &Authority| fs::write(sealed.host().path(by_ca), ca.pem());
    trusts(&ca)?;
    let told = refused(
        &sealed,
        &["provider", "add", "transit", "vault", "--address", "vault"],
    )?;
    Way::that_begins("virtseal provider add transit --help", &told)?.take(&sealed)?;
    let address = format!("https://127.0.0.1:{}", bao.port());
    let add = [
        "provider",
        "add",
        "transit",
        "vault",
        "--address",
        &address,
        "--ca",
        by_ca,
    ];
    let told = sealed.run(&[&add[..], &["--auth", "approle", "--role-id", bao.role_id()]].concat())?;
    let secret = fs::read_to_string(bao.secret_id())?;
    Way::that_begins("virtseal provider unlock", &told)?
        .typing(&[&secret])
        .take(&sealed)?;
    sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    // That is no way for this kind.
    let told = refused(&sealed, &["provider", "trust", "vault", "--ca", by_ca, "--yes"])?;
    file(&sealed, &secret)?;
    Way::that_begins("virtseal provider unlock vault --passphrase-file", &told)?
        .with("FILE", FILE)
        .take(&sealed)?;

    // After a restart it is sealed; after another one its certificate is of another authority.
    bao.restart()?;
    let told = sealed.refused_start("web01")?;
    Way::that_begins("unseal the server", &told)?;
    expect_names(&told, &["bao operator unseal"])?;
    bao.unseal()?;
    sealed.expect_start("web01")?;
    let other = Authority::named("other");
    bao.certify(&other)?;
    bao.restart()?;
    bao.unseal()?;
    let told = sealed.refused_start("web01")?;
    trusts(&other)?;
    Way::that_begins("put the certificate", &told)?
        .after("put the certificate")
        .typing(&[&secret])
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // It wants certificates of clients: it may do without, or get one.
    let restart = |bao: &mut OpenBao, clients: Option<&Authority>| {
        bao.ask_for_clients_of(clients)?;
        bao.restart()?;
        bao.unseal()
    };
    restart(&mut bao, Some(&clients))?;
    let told = sealed.refused_start("web01")?;
    restart(&mut bao, None)?;
    Way::that_begins("let the server ask", &told)?
        .after("let the server ask")
        .take(&sealed)?;
    sealed.expect_start("web01")?;
    restart(&mut bao, Some(&clients))?;
    bao.let_in(&clients)?;
    let told = sealed.refused_start("web01")?;
    file(&sealed, clients.client("host", 90).pem())?;
    Way::named("virtseal provider set vault auth=cert", &told)?
        .with("FILE", FILE)
        .take(&sealed)?;
    sealed.expect_start("web01")?;

    // Nobody types that.
    sealed.run(&["provider", "lock", "vault"])?;
    let told = sealed
        .at_a_terminal("virtseal provider unlock vault", &[])?
        .stdout;
    Way::that_begins("virtseal provider unlock vault --passphrase-file", &told)?
        .with("FILE", FILE)
        .take(&sealed)?;
    sealed.expect_start("web01")?;
    let others = Authority::named("others");
    restart(&mut bao, Some(&others))?;
    bao.let_in(&others)?;
    let told = sealed.refused_start("web01")?;
    file(&sealed, others.client("host", 90).pem())?;
    Way::that_begins("virtseal provider unlock vault --passphrase-file", &told)?
        .with("FILE", FILE)
        .take(&sealed)?;
    sealed.expect_start("web01")
}

#[test]
fn a_key_that_is_gone_at_its_server_comes_back_as_it_says() -> Result<()> {
    let (sealed, bao) = (host()?, OpenBao::start()?);
    bao.add_to(&sealed, "vault", bao.port())?;
    sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    let listed = bao.bao(&["list", "transit/keys"])?;
    let key = listed.lines().last().context("no key")?;
    let (of_key, backup) = (format!("transit/keys/{key}"), format!("transit/backup/{key}"));
    let configuration = format!("{of_key}/config");
    let may = [
        "exportable=true",
        "allow_plaintext_backup=true",
        "deletion_allowed=true",
    ];
    bao.bao(&[&["write", &configuration], &may[..]].concat())?;
    let kept = format!("backup={}", bao.bao(&["read", "-field=backup", &backup])?);
    bao.bao(&["delete", &of_key])?;
    let told = sealed.refused_start("web01")?;
    Way::that_begins("restore that key", &told)?;
    bao.bao(&["write", "transit/restore", &kept])?;
    Way::that_begins("virtseal provider show", &told)?.take(&sealed)?;
    sealed.expect_start("web01")
}

#[test]
fn a_token_gets_its_pin_as_it_says() -> Result<()> {
    let (mut sealed, hsm) = (host()?, SoftHsm::new()?);
    let restart = |sealed: &mut SealedHost| {
        sealed.stop_daemon(Signal::SIGTERM)?;
        hsm.start_daemon(sealed)
    };
    restart(&mut sealed)?;
    hsm.make("kek")?;
    hsm.add_to(&sealed, "hsm", "kek")?;
    // Another PIN than the one that unlocked it.
    let told = refused(
        &sealed,
        &["provider", "unlock", "hsm", "--pin-file", "/etc/hostname"],
    )?;
    Way::that_begins("virtseal provider lock", &told)?.take(&sealed)?;
    // Its owner has it made anew, and gives it no PIN. SoftHSM tells no program that runs of what another one has changed.
    hsm.tool("kek", &["--init-token", "--label", "kek"])?;
    restart(&mut sealed)?;
    let pin = hsm.pin_file().display().to_string();
    let told = refused(&sealed, &["provider", "unlock", "hsm", "--pin-file", &pin])?;
    let way = Way::that_begins("let the token's security officer", &told)?;
    expect_names(&told, &["pkcs11-tool --login --login-type so --init-pin"])?;
    hsm.tool(
        "kek",
        &[
            "--login",
            "--login-type",
            "so",
            "--init-pin",
            "--pin",
            SoftHsm::PIN,
        ],
    )?;
    restart(&mut sealed)?;
    way.after("let the token's security officer")
        .typing(&[SoftHsm::PIN])
        .take(&sealed)?;
    sealed.seal_new("web01")?;
    sealed.expect_start("web01")
}
