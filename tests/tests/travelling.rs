//! What others write into a domain's XML or an image replaces no key and stops nothing; what came from an earlier virtseal is
//! taken over when root says so.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtseal_testkit::{DomainSpec, HostBuilder, SealedHost, Way, edit_keystore, expect_names, wait_until};

const COPIES: Duration = Duration::from_secs(30);

#[test]
fn forged_copies_replace_nothing_and_stop_nobody() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.add_provider("breakglass")?;
    sealed.configure("recipients: [main, breakglass]\n")?;
    sealed.kill_and_restart()?;
    for provider in ["main", "breakglass"] {
        sealed.unlock_provider(provider)?;
    }
    sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    // One whose metadata nobody can read, all along.
    let whole = sealed.dumpxml("web02")?;
    sealed
        .host()
        .define_xml(&whole.replace("\"version\":2", "\"version\":"))?;

    let xml = sealed.dumpxml("web01")?;
    let disk = disk_envelope(&xml);
    for (what, forged) in forgeries(&disk)? {
        sealed.host().define_xml(&xml.replace(&disk, &forged))?;
        sealed.start_paused("web01").with_context(|| what.to_owned())?;
        sealed.destroy("web01")?;
        expect_recipients(&sealed, "web01", "disk vda", &["main", "breakglass"]).context(what)?;
        // Once its VM is off, the copy follows the keystore again.
        wait_until(COPIES, what, || {
            let now = disk_envelope(&sealed.dumpxml("web01")?);
            Ok((now == disk).then_some(()))
        })?;
    }
    sealed
        .start_paused("web02")
        .context("its keystore has its keys")?;
    sealed.destroy("web02")?;

    // A huge generation in one VM's XML, and garbage in another's: the job is through all the same.
    let [(_, huge), ..] = &forgeries(&disk)?[..] else {
        anyhow::bail!("no forgery");
    };
    sealed.host().define_xml(&xml.replace(&disk, huge))?;
    sealed
        .host()
        .define_xml(&whole.replace("\"version\":2", "\"version\":"))?;
    sealed.run(&["provider", "recipients", "remove", "breakglass", "--watch"])?;
    ensure!(sealed.last_job()?["state"] == "done", "{}", sealed.last_job()?);
    sealed.wait_for_copies(0)?;
    // A retired key does not come back by a number, nor by having been true once.
    let mut old: Value = serde_json::from_str(&disk)?;
    old["generation"] = 99.into();
    for replayed in [old.to_string(), disk.clone()] {
        let now = disk_envelope(&sealed.dumpxml("web01")?);
        sealed
            .host()
            .define_xml(&sealed.dumpxml("web01")?.replace(&now, &replayed))?;
        sealed.start_paused("web01")?;
        sealed.destroy("web01")?;
        expect_recipients(&sealed, "web01", "disk vda", &["main"])?;
    }
    sealed.start_paused("web02")
}

/// The first has a huge generation. All are valid in form but the last two.
fn forgeries(disk: &str) -> Result<Vec<(&'static str, String)>> {
    let envelope: Value = serde_json::from_str(disk)?;
    let forge = |change: &dyn Fn(&mut Value)| {
        let mut forged = envelope.clone();
        forged["generation"] = 7.into();
        change(&mut forged);
        forged.to_string()
    };
    Ok(vec![
        (
            "huge generation",
            forge(&|forged| forged["generation"] = i64::MAX.into()),
        ),
        (
            "a recipient taken out",
            forge(&|forged| drop(forged["stanzas"].as_array_mut().and_then(Vec::pop))),
        ),
        (
            "a recipient made garbage",
            forge(&|forged| forged["stanzas"][1]["body"] = "AAAA".into()),
        ),
        ("format 1 with a high number", format_1(disk, 99)?),
        (
            "a generation beyond all",
            forge(&|forged| forged["generation"] = u64::MAX.into()),
        ),
        ("no JSON", "{".to_owned()),
    ])
}

/// As the last version wrote its XML, its images and its keystore.
#[test]
fn a_vm_of_format_1_is_adopted_where_root_says_so() -> Result<()> {
    let old = SealedHost::start()?;
    let spec = old.seal_new("web01")?;
    old.start_paused("web01")?;
    old.destroy("web01")?;
    let dumped = with_format_1(&old.dumpxml("web01")?, 1)?;

    let mut new = SealedHost::start_without_provider(HostBuilder::default())?;
    for file in [&spec.disk, &spec.nvram(), &spec.tpm_state()] {
        carry(&old, &new, file)?;
    }
    format_1_in_image(&new.host().path(&spec.disk))?;
    restore(&old, &new)?;
    new.host().define_xml(&dumped)?;
    let refusal = new.refused_start("web01")?;
    let advice = "virtseal vm adopt --format-1 web01";
    expect_names(&refusal, &["web01 stays off", "disk vda", "format 1", advice])?;
    expect_names(&new.refused(1, &["vm", "adopt", "web01"])?, &["format 1", advice])?;
    ensure!(new.json(&["provider", "show", "main"])?["provider"]["envelopes"] == 0);

    let said = Way::that_begins("virtseal vm adopt --format-1", &refusal)?.take(&new)?;
    expect_names(&said, &["disk vda", "nvram", "vtpm", "main"])?;
    new.start_paused("web01")?;
    new.destroy("web01")?;
    // What travels is of format 2 from now on.
    let copies_are_new = |new: &SealedHost| {
        wait_until(COPIES, "the copies to be of format 2", || {
            let xml_is_new = !new.dumpxml("web01")?.contains("\"version\":1");
            Ok((xml_is_new && image_format(new, &spec)? == 2).then_some(()))
        })
    };
    copies_are_new(&new)?;
    let again = new.json(&["vm", "adopt", "--format-1", "web01"])?;
    ensure!(again["changed"] == false, "{again}");
    // Nobody's format 1 counts where a format 2 is known.
    new.host().define_xml(&with_format_1(&dumped, 99)?)?;
    let again = new.json(&["vm", "adopt", "--format-1", "web01"])?;
    ensure!(again["changed"] == false, "{again}");
    new.start_paused("web01")?;
    new.destroy("web01")?;

    // The keystore's own rows are root's: they need no word, and the copies follow them.
    new.stop_daemon(nix::sys::signal::Signal::SIGTERM)?;
    edit_keystore(&new, |keystore| {
        for json in envelopes_of(&dumped) {
            let envelope: Value = serde_json::from_str(&json)?;
            let id = envelope["id"].as_str().context("an envelope has an id")?;
            keystore.execute(
                "UPDATE envelopes SET json = ?1, generation = 1 WHERE id = ?2",
                [&json, id],
            )?;
        }
        Ok(())
    })?;
    new.start_daemon()?;
    new.unlock()?;
    new.start_paused("web01")?;
    new.destroy("web01")?;
    copies_are_new(&new)?;
    a_lone_image_of_format_1_is_sealed_again(&mut new)
}

/// Neither the keystore nor the XML has its envelope.
fn a_lone_image_of_format_1_is_sealed_again(sealed: &mut SealedHost) -> Result<()> {
    let spec = SealedHost::spec("lone01");
    let (disk, vm) = (spec.disk.display().to_string(), spec.uuid.to_string());
    sealed.run(&["volume", "create", &disk, "--size", "64M", "--vm", &vm])?;
    format_1_in_image(&sealed.host().path(&spec.disk))?;
    sealed.stop_daemon(nix::sys::signal::Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        let removed = keystore.execute("DELETE FROM envelopes WHERE vm = ?1", [&vm])?;
        ensure!(removed == 1, "{removed} envelopes of lone01");
        Ok(())
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    sealed.host().define(&spec)?;
    expect_names(
        &sealed.refused(1, &["vm", "seal", "lone01"])?,
        &["disk vda", "format 1", "virtseal vm adopt --format-1 lone01"],
    )?;
    sealed.run(&["vm", "adopt", "--format-1", "lone01"])?;
    sealed.run(&["vm", "seal", "lone01"])?;
    sealed.start_paused("lone01")
}

/// The JSON of each, as it is in the XML.
fn envelopes_of(xml: &str) -> Vec<String> {
    let mut parts: Vec<_> = xml.split("</virtseal:envelope>").collect();
    parts.pop();
    let json = |part: &str| part.rsplit('>').next().unwrap_or_default().to_owned();
    parts.into_iter().map(json).collect()
}

fn disk_envelope(xml: &str) -> String {
    let mut envelopes = envelopes_of(xml).into_iter();
    let disk = envelopes.find(|json| json.contains("\"kind\":\"disk\""));
    disk.unwrap_or_default()
}

/// In the order of the fields that virtseal wrote.
fn format_1(json: &str, generation: u64) -> Result<String> {
    let envelope: Value = serde_json::from_str(json)?;
    let fields = |value: &Value, names: &[&str]| -> String {
        let fields: Vec<_> = names
            .iter()
            .map(|name| format!("\"{name}\":{}", value[*name]))
            .collect();
        fields.join(",")
    };
    let stanzas: Vec<_> = envelope["stanzas"]
        .as_array()
        .context("no stanzas")?
        .iter()
        .map(|stanza| fields(stanza, &["provider", "provider_name", "kek", "mechanism", "body"]))
        .collect();
    Ok(format!(
        "{{\"version\":1,{},\"generation\":{generation},\"stanzas\":[{{{}}}]}}",
        fields(&envelope, &["id", "vm", "kind"]),
        stanzas.join("},{")
    ))
}

fn with_format_1(xml: &str, generation: u64) -> Result<String> {
    envelopes_of(xml).iter().try_fold(xml.to_owned(), |xml, json| {
        Ok(xml.replace(json.as_str(), &format_1(json, generation)?))
    })
}

/// In the place of the envelope that the image carries, filled up with blanks.
fn format_1_in_image(image: &Path) -> Result<()> {
    let start = fs::read(image)?;
    let from = find(&start, b"{\"version\":2").context("no envelope in the image")?;
    let end = find(&start[from..], b"\"mac\":\"").context("no MAC")? + from;
    let end = find(&start[end..], b"\"}").context("no end")? + end + 2;
    let mut json = format_1(std::str::from_utf8(&start[from..end])?, 1)?.into_bytes();
    ensure!(json.len() <= end - from, "it is longer");
    json.resize(end - from, b' ');
    fs::OpenOptions::new()
        .write(true)
        .open(image)?
        .write_all_at(&json, from as u64)?;
    Ok(())
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn image_format(sealed: &SealedHost, spec: &DomainSpec) -> Result<i64> {
    let path = spec.disk.display().to_string();
    let info = sealed.json(&["volume", "info", &path])?;
    info["envelope"]["version"].as_i64().context("no envelope")
}

fn expect_recipients(sealed: &SealedHost, vm: &str, object: &str, expected: &[&str]) -> Result<()> {
    let status = sealed.json(&["vm", "status", vm])?;
    let mut objects = status["vms"][0]["objects"].as_array().into_iter().flatten();
    let found = objects
        .find(|found| found["object"] == object)
        .context("no such object")?;
    let providers: Vec<_> = found["providers"].as_array().into_iter().flatten().collect();
    ensure!(providers == expected, "{found}");
    Ok(())
}

fn carry(old: &SealedHost, new: &SealedHost, file: &Path) -> Result<()> {
    let to = new.host().path(file);
    fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
    fs::copy(old.host().path(file), to).with_context(|| format!("{}", file.display()))?;
    Ok(())
}

fn restore(old: &SealedHost, new: &SealedHost) -> Result<()> {
    let backup = PathBuf::from("/var/lib/virtseal/main.age");
    carry(old, new, &backup)?;
    let passphrase = new.passphrase_file()?.display().to_string();
    let input = backup.display().to_string();
    new.run(&[
        "provider",
        "restore",
        "main",
        "--input",
        &input,
        "--backup-passphrase-file",
        &passphrase,
        "--passphrase-file",
        &passphrase,
    ])
    .map(drop)
}
