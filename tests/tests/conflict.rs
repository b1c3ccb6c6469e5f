//! Copies of an envelope that are not what the keystore has, and damaged rows of the keystore itself: each is named with what
//! leads out, that does lead out, and everything else goes on.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtseal_testkit::{DomainSpec, SealedHost, Way, edit_keystore, edited, expect_names, wait_until};

const STATE: &str = "/var/lib/virtseal";
const WAIT: Duration = Duration::from_secs(30);

/// Two hosts that have each made a second generation of the same envelope; both have the key.
#[test]
fn of_two_true_versions_the_keystores_stays_and_a_rekey_ends_it() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.add_provider("breakglass")?;
    let specs = ["web01", "web02"].map(|name| sealed.seal_new(name));
    let [in_xml, in_image] = specs;
    let (in_xml, in_image) = (in_xml?, in_image?);
    let theirs = versions_of_another_host(&mut sealed, &[&in_xml, &in_image])?;
    for spec in [&in_xml, &in_image] {
        sealed.run(&["vm", "rekey", &spec.name, "--watch"])?;
    }
    sealed.wait_for_copies(0)?;
    let ours = sealed.dumpxml("web01")?;
    sealed.host().define_xml(&edited(
        &ours,
        &disk_envelope(&ours)?,
        &disk_envelope(&theirs[0].xml)?,
    )?)?;
    fs::write(sealed.host().path(&in_image.disk), &theirs[1].disk)?;

    let image = in_image.disk.display().to_string();
    let places = [("web01", "the XML of web01"), ("web02", image.as_str())];
    for (vm, place) in places {
        expect_rival(&sealed, vm, place)?;
        sealed.expect_start(vm)?;
        ensure!(
            recipients(&sealed, vm)? == ["main"],
            "{vm}: the keystore's did not stay"
        );
    }
    // A job decides nothing: both versions are there after it, and it says so.
    for job in [
        &["provider", "recipients", "add", "breakglass", "--watch"][..],
        &["provider", "move", "main", "breakglass", "--watch"],
    ] {
        let output = sealed.virtseal(job)?;
        ensure!(output.code() == Some(1), "{output:?}");
        let last = sealed.last_job()?;
        ensure!(last["state"] == "incomplete", "{last}");
        for (vm, place) in places {
            expect_names(
                &output.stderr,
                &[place, "which one counts must be decided: virtseal vm status"],
            )?;
            expect_rival(&sealed, vm, place)?;
        }
    }
    for (vm, _) in places {
        sealed.run(&["vm", "rekey", vm, "--watch"])?;
        sealed.wait_for_copies(0)?;
        expect_no_finding(&sealed, vm)?;
        sealed.expect_start(vm)?;
        expect_no_finding(&sealed, vm)?;
    }
    Ok(())
}

/// Somebody without the key writes the same generation.
#[test]
fn a_forged_version_of_the_same_generation_gives_way() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    let xml = sealed.dumpxml("web01")?;
    let disk = disk_envelope(&xml)?;
    let forged = forged(&disk)?;
    let image = sealed.host().path(&spec.disk);

    sealed.host().define_xml(&edited(&xml, &disk, &forged)?)?;
    // After the start it may be brought up to date by itself.
    let told = status(&sealed, "web01")?;
    expect_names(&told, &["the XML of web01", "vm rekey web01"])?;
    sealed.expect_start("web01")?;
    let printed = Way::that_begins("virtseal vm rekey", &told)?.take(&sealed)?;
    Way::named("virtseal jobs watch", &printed)?.take(&sealed)?;
    sealed.wait_for_copies(0)?;
    expect_no_finding(&sealed, "web01")?;

    let disk = disk_envelope(&sealed.dumpxml("web01")?)?;
    in_image(&image, &disk, &self::forged(&disk)?)?;
    let place = spec.disk.display().to_string();
    expect_names(&status(&sealed, "web01")?, &[&place, "vm rekey web01"])?;
    sealed.expect_start("web01")?;
    // A job of all takes it for what it is.
    sealed.run(&["provider", "rekey", "--watch"])?;
    ensure!(sealed.last_job()?["state"] == "done", "{}", sealed.last_job()?);
    sealed.wait_for_copies(0)?;
    expect_no_finding(&sealed, "web01")?;
    sealed.expect_start("web01")
}

#[test]
fn garbage_in_one_vms_copies_stops_no_other() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    let (xml, others) = (sealed.dumpxml("web01")?, sealed.dumpxml("web02")?);
    let (disk, others) = (disk_envelope(&xml)?, disk_envelope(&others)?);
    let huge = format!("{{\"version\":2,\"note\":\"{}\"}}", "x".repeat(1 << 20));
    let twice = format!("{disk}</virtseal:envelope><virtseal:envelope>{disk}");
    for (nth, (what, bad)) in [
        ("garbage", "no envelope"),
        ("oversized", huge.as_str()),
        ("twice", twice.as_str()),
        ("another VM's", others.as_str()),
    ]
    .into_iter()
    .enumerate()
    {
        sealed.host().define_xml(&edited(&xml, &disk, bad)?)?;
        others_go_on(&sealed, &format!("new{nth}")).context(what)?;
        expect_names(&status(&sealed, "web01")?, &["web01"]).context(what)?;
        ensure!(
            !findings(&sealed, "web01")?.is_empty(),
            "{what} in the XML is not told"
        );
        sealed.expect_start("web01").context(what)?;
        sealed.host().define_xml(&sealed.dumpxml("web01")?)?;
    }
    sealed.host().define_xml(&xml)?;

    let image = sealed.host().path(&spec.disk);
    let whole = fs::read(&image)?;
    let place = spec.disk.display().to_string();
    for (what, harm) in HARMS {
        fs::write(&image, &whole)?;
        harm(&image, &disk, &others).context(what)?;
        let told = findings(&sealed, "web01")?.join("\n");
        expect_names(&told, &["web01", &place]).context(what)?;
        others_go_on(&sealed, &format!("img-{}", &what[..3])).context(what)?;
        sealed.expect_start("web01").context(what)?;
        sealed.run(&["vm", "seal", "web01"]).context(what)?;
        expect_no_finding(&sealed, "web01").context(what)?;
        ensure!(find(&image, &disk).is_ok(), "{what}: the image has no copy again");
    }
    Ok(())
}

type Harm = fn(&Path, &str, &str) -> Result<()>;

const HARMS: [(&str, Harm); 3] = [
    ("garbage", |image, disk, _| {
        in_image(image, disk, &"x".repeat(disk.len()))
    }),
    ("oversized", |image, disk, _| {
        let at = find(image, disk)?;
        write(image, at - 4, &u32::MAX.to_be_bytes())
    }),
    ("another VM's", |image, disk, others| {
        in_image(image, disk, others)
    }),
];

/// One that seals, one that starts, and a job about all.
fn others_go_on(sealed: &SealedHost, name: &str) -> Result<()> {
    sealed.seal_new(name)?;
    sealed.expect_start(name)?;
    sealed.expect_start("web02")?;
    sealed.run(&["vm", "rekey", "web02", "--watch"])?;
    ensure!(sealed.last_job()?["state"] == "done", "{}", sealed.last_job()?);
    expect_no_finding(sealed, "web02")
}

/// What was made where the VM of a host was brought to, after the host's last backup.
struct Version {
    xml: String,
    disk: Vec<u8>,
}

/// The host goes back afterwards to where it was, as if it had never been done there.
fn versions_of_another_host(sealed: &mut SealedHost, specs: &[&DomainSpec]) -> Result<Vec<Version>> {
    let version = |sealed: &SealedHost, spec: &DomainSpec| -> Result<Version> {
        Ok(Version {
            xml: sealed.dumpxml(&spec.name)?,
            disk: fs::read(sealed.host().path(&spec.disk))?,
        })
    };
    sealed.wait_for_copies(0)?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    let kept = "/run/state-before";
    sealed.host().run(&["cp", "-a", STATE, kept])?.succeeded()?;
    let before: Vec<_> = specs
        .iter()
        .map(|spec| version(sealed, spec))
        .collect::<Result<_>>()?;
    start_and_unlock(sealed)?;
    sealed.run(&["provider", "recipients", "add", "breakglass", "--watch"])?;
    sealed.wait_for_copies(0)?;
    let theirs = specs
        .iter()
        .map(|spec| version(sealed, spec))
        .collect::<Result<_>>()?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.host().run(&["rm", "-rf", STATE])?.succeeded()?;
    sealed.host().run(&["cp", "-a", kept, STATE])?.succeeded()?;
    for (spec, before) in specs.iter().zip(&before) {
        sealed.host().define_xml(&before.xml)?;
        fs::write(sealed.host().path(&spec.disk), &before.disk)?;
    }
    start_and_unlock(sealed)?;
    Ok(theirs)
}

fn start_and_unlock(sealed: &mut SealedHost) -> Result<()> {
    sealed.start_daemon()?;
    for provider in ["main", "breakglass"] {
        sealed.unlock_provider(provider)?;
    }
    Ok(())
}

fn expect_rival(sealed: &SealedHost, vm: &str, place: &str) -> Result<()> {
    let parts = [
        "the keystore and ",
        place,
        "different versions of generation 2",
        "'main'",
        "'breakglass'",
        &format!("Next: virtseal vm rekey {vm}"),
    ];
    expect_names(&status(sealed, vm)?, &parts)?;
    expect_names(&findings(sealed, vm)?.join("\n"), &parts)
}

/// As text, with what goes to standard error.
fn status(sealed: &SealedHost, vm: &str) -> Result<String> {
    let output = sealed.virtseal(&["vm", "status", vm])?;
    ensure!(output.code() == Some(0), "{output:?}");
    Ok(output.stdout + &output.stderr)
}

fn findings(sealed: &SealedHost, vm: &str) -> Result<Vec<String>> {
    let status = sealed.json(&["vm", "status", vm])?;
    let warnings = status["vms"][0]["warnings"].as_array().context("no warnings")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let lines = warnings
        .iter()
        .map(|found| format!("{}. Next: {}", text(&found["what"]), text(&found["next"])));
    // Of the console of every such VM.
    Ok(lines.filter(|line| !line.contains("serial port")).collect())
}

fn expect_no_finding(sealed: &SealedHost, vm: &str) -> Result<()> {
    wait_until(WAIT, &format!("{vm} to have no finding"), || {
        Ok(findings(sealed, vm)?.is_empty().then_some(()))
    })
    .with_context(|| format!("{:?}", findings(sealed, vm)))
}

/// Who opens its disk, by what the keystore has.
fn recipients(sealed: &SealedHost, vm: &str) -> Result<Vec<String>> {
    let status = sealed.json(&["vm", "status", vm])?;
    let mut objects = status["vms"][0]["objects"].as_array().into_iter().flatten();
    let disk = objects
        .find(|found| found["object"] == "disk vda")
        .context("no disk vda")?;
    let providers = disk["providers"].as_array().into_iter().flatten();
    Ok(providers
        .map(|name| name.as_str().unwrap_or_default().to_owned())
        .collect())
}

fn disk_envelope(xml: &str) -> Result<String> {
    let mut parts: Vec<_> = xml.split("</virtseal:envelope>").collect();
    parts.pop();
    let mut envelopes = parts
        .iter()
        .map(|part| part.rsplit('>').next().unwrap_or_default());
    let disk = envelopes.find(|json| json.contains("\"kind\":\"disk\""));
    Ok(disk.context("no envelope of a disk in the XML")?.to_owned())
}

/// Its first stanza is another, as long as it was.
fn forged(json: &str) -> Result<String> {
    let envelope: Value = serde_json::from_str(json)?;
    let body = envelope["stanzas"][0]["body"].as_str().context("no body")?;
    let other = format!("AAAA{}", &body[4..]);
    ensure!(other != body, "it is no forgery");
    Ok(json.replace(body, &other))
}

fn in_image(image: &Path, json: &str, other: &str) -> Result<()> {
    ensure!(
        json.len() == other.len(),
        "{} bytes for {}",
        other.len(),
        json.len()
    );
    write(image, find(image, json)?, other.as_bytes())
}

fn find(image: &Path, json: &str) -> Result<u64> {
    let bytes = fs::read(image)?;
    let at = bytes
        .windows(json.len())
        .position(|window| window == json.as_bytes());
    Ok(at.context("the image has no such envelope")? as u64)
}

fn write(image: &Path, at: u64, bytes: &[u8]) -> Result<()> {
    Ok(fs::OpenOptions::new()
        .write(true)
        .open(image)?
        .write_all_at(bytes, at)?)
}

/// A row that somebody has damaged is named with its way out, which heals the VM; others start and seal, and what destroys keys
/// says which row it can't read.
#[test]
fn a_damaged_row_is_named_and_its_way_out_heals() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    sealed.wait_for_copies(0)?;
    let status_of = sealed.json(&["vm", "status", "web01"])?;
    let objects = status_of["vms"][0]["objects"].as_array().context("no objects")?;
    let ids: Vec<_> = objects
        .iter()
        .map(|object| {
            object["envelope"]
                .as_str()
                .context("no envelope")
                .map(str::to_owned)
        })
        .collect::<Result<_>>()?;
    let vm = status_of["vms"][0]["uuid"]
        .as_str()
        .context("no UUID")?
        .to_owned();
    for (nth, damage) in ["json = '{'", "generation = 7", "kind = 'tape'"]
        .iter()
        .enumerate()
    {
        damage_rows(
            &mut sealed,
            &format!("UPDATE envelopes SET {damage} WHERE vm = '{vm}'"),
        )?;
        for shown in [status(&sealed, "web01")?, findings(&sealed, "web01")?.join("\n")] {
            expect_names(&shown, &[&ids[0], "is damaged", "virtseal vm adopt web01"]).context(*damage)?;
        }
        wait_until(WAIT, "the host's status to name it", || {
            let host = sealed.virtseal(&["status"])?;
            let told = host.stdout + &host.stderr;
            Ok((told.contains(&ids[0]) && told.contains("virtseal vm adopt web01")).then_some(()))
        })?;
        let other = format!("new{nth}");
        sealed.seal_new(&other)?;
        sealed.expect_start(&other)?;
        sealed.expect_start("web02")?;
        // A record that can't be read may need any KEK, so that stays; the rest of the other VM's keys goes.
        let receipt = sealed.run(&["vm", "shred", &other, "--yes-shred", &other])?;
        expect_names(&receipt, &["keyslots made dead"]).context(*damage)?;
        let stays = receipt.contains("not destroyed: a record of the keystore is damaged");
        ensure!(stays == (nth == 0), "{damage}: {receipt}");
        let guard = sealed.refused(1, &["provider", "delete", "main"])?;
        expect_names(
            &guard,
            &[
                "the keystore's record of envelope",
                "is damaged",
                "virtseal status",
            ],
        )
        .context(*damage)?;
        Way::that_begins("virtseal status", &guard)?.take(&sealed)?;

        let adopt = Way::that_begins("virtseal vm adopt", &status(&sealed, "web01")?)?;
        adopt.take(&sealed).context(*damage)?;
        expect_no_finding(&sealed, "web01").context(*damage)?;
        sealed.expect_start("web01").context(*damage)?;
        sealed.host().undefine(&other)?;
    }
    // By its start alone, which verifies what the XML has.
    damage_rows(
        &mut sealed,
        &format!("UPDATE envelopes SET json = x'00' WHERE vm = '{vm}'"),
    )?;
    sealed.expect_start("web01")?;
    expect_no_finding(&sealed, "web01")?;
    damage_rows(
        &mut sealed,
        &format!("UPDATE vms SET sealed_at = 'never' WHERE uuid = '{vm}'"),
    )?;
    expect_names(
        &status(&sealed, "web01")?,
        &["of VM", "is damaged", "virtseal vm adopt"],
    )?;
    sealed.run(&["vm", "adopt", "web01"])?;
    expect_no_finding(&sealed, "web01")?;
    sealed.expect_start("web01")
}

/// While virtseald is off.
fn damage_rows(sealed: &mut SealedHost, sql: &str) -> Result<()> {
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        keystore.execute_batch("PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF")?;
        let changed = keystore.execute(sql, [])?;
        ensure!(changed > 0, "nothing was damaged: {sql}");
        Ok(())
    })?;
    sealed.start_daemon()?;
    sealed.unlock()
}
