//! What scripts get with `--json`: one document, whatever happens, that says what has changed.
//!
//! That each is as docs/reference/json-schema.json has it is checked wherever a story asks for one.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use virtseal_testkit::{SealedHost, codes, expect_names};

#[test]
fn who_has_what_was_asked_for_is_told_so_and_not_refused() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let spec = SealedHost::spec("plain01");
    sealed.host().define(&spec)?;
    let changes = |arguments: &[&str]| -> Result<bool> {
        let said = sealed.json(arguments)?;
        said["changed"]
            .as_bool()
            .with_context(|| format!("{arguments:?}: {said}"))
    };
    let file = sealed.passphrase_file()?.display().to_string();
    let unlock = ["provider", "unlock", "main", "--passphrase-file", &file];
    let disk = SealedHost::spec("web01").disk.display().to_string();
    let other = spec.uuid.to_string();
    for (arguments, first) in [
        (&["vm", "seal", "web01"][..], false),
        (&["vm", "unseal", "plain01"], false),
        (&["provider", "default", "main"], false),
        (&unlock, false),
        (&["provider", "unlock", "main"], false),
        (&["provider", "lock", "main"], true),
        (&["provider", "lock", "main"], false),
        (&unlock, true),
        (&["volume", "share", &disk, "--with", &other], true),
        (&["volume", "share", &disk, "--with", &other], false),
        (&["volume", "share", &disk, "--without", &other], true),
        (&["volume", "share", &disk, "--without", &other], false),
        (&["provider", "tpm", "main", "--remove"], false),
    ] {
        ensure!(changes(arguments)? == first, "{arguments:?}");
    }
    sealed.start_paused("web01")?;
    // What its start has noted may not be in its XML yet.
    changes(&["vm", "seal", "web01"])?;
    let said = sealed.json(&["vm", "seal", "web01"])?;
    ensure!(said["changed"] == false, "it is sealed, and runs: {said}");
    ensure!(!changes(&["vm", "seal", "web01", "--dry-run"])?);

    let rekeyed = sealed.json(&["vm", "rekey", "web01", "--watch"])?;
    ensure!(
        rekeyed["changed"] == true && rekeyed["job"]["changed"] == 3,
        "{rekeyed}"
    );
    let resumed = sealed.json(&["jobs", "resume", &rekeyed["job"]["id"].to_string()])?;
    ensure!(
        resumed["changed"] == false && resumed["job"]["state"] == "done",
        "{resumed}"
    );
    sealed.destroy("web01")?;
    for (arguments, first) in [
        (&["vm", "autostart", "web01"][..], true),
        (&["vm", "autostart", "web01"], false),
        (&["vm", "autostart", "web01", "--disable"], true),
        (&["vm", "autostart", "web01", "--disable"], false),
        (&["vm", "adopt", "web01"], false),
        (&["volume", "adopt", &disk], false),
        (&["volume", "resize", &disk, "96M"], true),
        (&["volume", "resize", &disk, "96M"], false),
        (&["provider", "set", "main", "description=cellar"], true),
        (&["provider", "set", "main", "description=cellar"], false),
    ] {
        ensure!(changes(arguments)? == first, "{arguments:?}");
    }

    // What is there already, and may be another's, is no goal that was reached.
    for taken in [
        &["provider", "add", "native", "main", "--passphrase-file", &file][..],
        &[
            "provider",
            "backup",
            "main",
            "-o",
            &file,
            "--passphrase-file",
            &file,
        ],
        &["volume", "create", &disk, "--vm", "web01", "--size", "1M"],
    ] {
        let error = &sealed.refused_json(10, taken)?["error"];
        ensure!(
            error["message"]
                .as_str()
                .is_some_and(|said| said.contains("already") || said.contains("exists")),
            "{error}"
        );
    }
    Ok(())
}

#[test]
fn what_is_refused_is_one_document_too_and_words_go_elsewhere() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let named = |kind: &str, name: &str| json!({ "kind": kind, "name": name, "vm": null });
    for (arguments, object, next) in [
        (
            &["provider", "lock", "nobody"][..],
            named("provider", "nobody"),
            "virtseal provider list",
        ),
        (
            &["vm", "status", "nobody"],
            named("vm", "nobody"),
            "virsh list --all",
        ),
        (
            &["provider", "show", "nobody"],
            named("provider", "nobody"),
            "virtseal provider list",
        ),
    ] {
        let told = sealed.refused_json(7, arguments)?;
        let error = &told["error"];
        ensure!(
            told["schema"] == 1 && error["code"] == 7 && error["next"] == next && error["object"] == object,
            "{told}"
        );
    }
    let usage = sealed.refused_json(2, &["provider", "show"])?;
    ensure!(
        usage["error"]["object"].is_null() && usage["error"]["message"].to_string().contains("<NAME>"),
        "{usage}"
    );
    let missing = sealed.refused_json(7, &["volume", "info", "/nonexistent"])?;
    ensure!(
        missing["error"]["object"]["kind"] == "image" && missing["error"]["object"]["name"] == "/nonexistent",
        "{missing}"
    );
    let nowhere = sealed.refused_json(4, &["--socket", "/nonexistent", "status"])?;
    ensure!(
        nowhere["error"]["next"]
            .to_string()
            .contains("systemctl start virtseald"),
        "{nowhere}"
    );

    // What was found stands beside the reason for which the command fails; words for people are no part of it.
    let disk = SealedHost::spec("web01").disk.display().to_string();
    sealed.start_paused("web01")?;
    let busy = sealed.virtseal(&["volume", "check", &disk, "--json"])?;
    let told: Value = serde_json::from_str(&busy.stdout)?;
    ensure!(
        busy.code() == Some(9) && told["error"]["code"] == 9 && told["structure"] == "in_use",
        "{busy:?}"
    );
    expect_names(&busy.stderr, &["virtseal: ", "Next: virtseal volume check"])?;
    sealed.destroy("web01")?;
    sealed.lock()?;
    sealed.host().define(&SealedHost::spec("plain01"))?;
    let planned = sealed.refused_json(7, &["vm", "seal", "plain01", "--dry-run"])?;
    let obstacles = planned["obstacles"].as_array().context("no obstacles")?;
    let exits: Vec<_> = obstacles
        .iter()
        .map(|found| found["problem"]["code"].clone())
        .collect();
    ensure!(
        exits == [7, 3] && planned["error"]["object"] == named("vm", "plain01"),
        "{planned}"
    );

    // A warning stands in the document as well.
    let file = sealed.passphrase_file()?.display().to_string();
    sealed.json(&["provider", "unlock", "main", "--passphrase-file", &file])?;
    let clear = sealed.json(&[
        "provider",
        "backup",
        "main",
        "-o",
        "/run/clear",
        "--no-passphrase",
    ])?;
    ensure!(
        clear["done"] == "provider_backed_up"
            && clear["path"] == "/run/clear"
            && clear["object"] == named("provider", "main")
            && codes(&clear["warnings"]) == ["backup_unencrypted"]
            && clear["warnings"][0]["object"] == clear["object"],
        "{clear}"
    );
    Ok(())
}

#[test]
fn every_command_answers_in_json() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = SealedHost::spec("web01");
    let disk = spec.disk.display().to_string();
    let vm = spec.uuid.to_string();
    let created = sealed.json(&["volume", "create", &disk, "--size", "64M", "--vm", &vm])?;
    ensure!(
        created["path"] == *disk && created["size"] == 64 << 20,
        "{created}"
    );
    let info = sealed.json(&["volume", "info", &disk])?;
    ensure!(
        info["envelope"]["id"] == created["envelope"] && info["envelope"]["vm"] == *vm,
        "{info}"
    );

    sealed.host().define(&spec)?;
    let outcome = sealed.json(&["vm", "seal", "web01"])?;
    let adopted = &outcome["steps"][0];
    ensure!(
        outcome["changed"] == true
            && codes(&outcome["steps"]).ends_with(&["redefine"])
            && adopted["code"] == "adopt"
            && adopted["object"] == json!({ "kind": "object", "name": "disk vda", "vm": "web01" })
            && adopted["paths"] == json!([disk])
            && adopted["envelope"] == created["envelope"],
        "{outcome}"
    );
    let vms = sealed.json(&["vm", "status"])?["vms"].take();
    ensure!(
        vms[0]["name"] == "web01" && vms[0]["state"] == "sealed" && vms[0]["power"] == "off",
        "{vms}"
    );
    let status = sealed.json(&["status"])?;
    ensure!(
        status["libvirt"] == "connected" && status["armed"] == 0,
        "{status}"
    );
    ensure!(status["vms"] == vms, "{status}");
    let providers = sealed.json(&["provider", "list"])?["providers"].take();
    ensure!(providers == status["providers"] && providers[0] == sealed.provider("main")?);
    ensure!(
        providers[0]["state"] == "ready" && providers[0]["is_default"] == true,
        "{providers}"
    );
    ensure!(providers[0]["envelopes"] == 3, "{providers}");
    for (verb, done) in [("default", "provider_is_default"), ("lock", "provider_locked")] {
        let told = sealed.json(&["provider", verb, "main"])?;
        ensure!(told["done"] == done && told["text"].is_string(), "{told}");
    }
    let verified = sealed.json(&["audit", "verify"])?;
    ensure!(verified["records"].as_i64() >= Some(4), "{verified}");
    let log = sealed.virtseal(&["audit", "show", "--json"])?.succeeded()?;
    let records: Vec<serde_json::Value> = log
        .lines()
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    for record in &records {
        ensure!(record["actor"] == 0, "all of it was asked for by root: {record}");
        ensure!(
            record["time"].as_str().is_some_and(|time| time.ends_with('Z')),
            "{record}"
        );
    }
    let operations: Vec<_> = records.iter().map(|record| &record["op"]).collect();
    let table = sealed.virtseal(&["audit", "show"])?.succeeded()?;
    ensure!(
        table.contains("UID") && table.contains("provider-backup"),
        "{table}"
    );
    for operation in [
        "provider-add",
        "provider-backup",
        "volume-create",
        "seal",
        "provider-lock",
    ] {
        ensure!(
            operations.iter().any(|found| *found == operation),
            "{operation} is not in {log}"
        );
    }
    Ok(())
}
