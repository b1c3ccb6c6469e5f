//! Images that are what they claim: a volume is filled from what its maker has signed, or not made.

use std::fs;

use anyhow::{Result, ensure};
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, Rig};
use virtseal_testkit::{expect_names, require_programs};

const NAME: &str = "debian-13-generic-amd64.raw";

/// What `program` says of the image.
fn sum(rig: &Rig, program: &str) -> Result<String> {
    let said = rig
        .host()
        .run(&[program, &format!("{IMAGES}/{NAME}")])?
        .succeeded()?;
    Ok(said.split(' ').next().unwrap_or_default().to_owned())
}

fn gpg(rig: &Rig, arguments: &[&str]) -> Result<String> {
    let gpg = ["gpg", "--batch", "--yes", "--quiet", "--homedir", "/run/maker"];
    rig.host().run(&[&gpg, arguments].concat())?.succeeded()
}

#[test]
fn a_volume_is_made_of_what_its_maker_has_signed_and_of_nothing_else() -> Result<()> {
    require_programs(&[("gpg", "gnupg"), ("gpgv", "gpgv")])?;
    let rig = Rig::start()?;
    let source = format!("{IMAGES}/{NAME}");
    fs::write(rig.host().path(&source), vec![0x5a; 3 << 20])?;
    let (right, wrong) = (sum(&rig, "sha256sum")?, "0f".repeat(32));
    let vm = Uuid::from_u128(0x7301);
    let create = |image: &str, options: &[&str]| {
        let path = format!("{IMAGES}/{image}.qcow2");
        let words = format!("volume create {path} --from {source} --vm {vm}");
        let words: Vec<_> = words.split(' ').chain(options.iter().copied()).collect();
        rig.sealed.virtseal(&words)
    };
    let nothing_of = |image: &str| -> Result<()> {
        ensure!(!rig.host().path(format!("{IMAGES}/{image}.qcow2")).exists());
        ensure!(rig.envelopes(&vm)?.is_empty(), "there is an envelope");
        rig.expect_no_temporaries()
    };

    let refused = create("wrong", &["--sha256", &wrong])?;
    ensure!(refused.code() == Some(1), "{refused:?}");
    expect_names(
        &refused.stderr,
        &[
            &source,
            &right,
            &wrong,
            "nothing was created",
            "Next: download it",
        ],
    )?;
    nothing_of("wrong")?;

    // What the maker has signed: a detached signature, then one around the sums.
    let sums = format!("{IMAGES}/SHA512SUMS");
    let line = format!("{}  {NAME}\n", sum(&rig, "sha512sum")?);
    fs::write(rig.host().path(&sums), &line)?;
    rig.host()
        .run(&["mkdir", "-m", "700", "/run/maker"])?
        .succeeded()?;
    gpg(
        &rig,
        &[
            "--passphrase",
            "",
            "--quick-gen-key",
            "maker",
            "ed25519",
            "sign",
            "never",
        ],
    )?;
    gpg(&rig, &["-o", "/run/maker.gpg", "--export"])?;
    let signed = ["--sums", &sums, "--keyring", "/run/maker.gpg"];
    let refused = create("unsigned", &signed)?;
    ensure!(refused.code() == Some(7), "{refused:?}");
    expect_names(&refused.stderr, &[&sums, "no signature"])?;
    gpg(&rig, &["-o", &format!("{sums}.sign"), "--detach-sign", &sums])?;
    fs::write(rig.host().path(&sums), line.replace(NAME, "other.raw") + &line)?;
    let refused = create("forged", &signed)?;
    ensure!(refused.code() == Some(5), "{refused:?}");
    expect_names(&refused.stderr, &[&sums, "BAD signature", "/run/maker.gpg"])?;
    nothing_of("forged")?;
    ensure!(rig.sealed.json(&["jobs"])?["jobs"].as_array().map(Vec::len) == Some(1));

    fs::write(rig.host().path(&sums), &line)?;
    create("detached", &signed)?.succeeded()?;
    let inline = format!("{IMAGES}/CHECKSUM");
    fs::write(
        rig.host().path("/run/plain"),
        format!("SHA256 ({NAME}) = {right}\n"),
    )?;
    gpg(&rig, &["-o", &inline, "--clearsign", "/run/plain"])?;
    create("inline", &["--sums", &inline, "--keyring", "/run/maker.gpg"])?.succeeded()?;
    let envelopes = rig.envelopes(&vm)?;
    ensure!(envelopes.len() == 2, "{envelopes:?}");
    for envelope in &envelopes {
        rig.root.expect_pattern(rig.host(), envelope, 0x5a, 3 << 20)?;
    }
    rig.expect_active(&vm, &["disk", "disk"])?;
    rig.expect_no_temporaries()
}
