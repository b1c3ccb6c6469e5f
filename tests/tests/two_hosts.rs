//! A VM has moved, and both hosts reach the same key server: what the old host drops or shreds takes nothing from the new one,
//! unless somebody has typed for that, too. The receipt says what was seen, and no more.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtseal_testkit::servers::{OpenBao, PyKmip};
use virtseal_testkit::{DomainSpec, Host, SealedHost, expect_names, wait_until};

const STATE: &str = "/var/lib/virtseal";
const COPIES: std::time::Duration = std::time::Duration::from_secs(30);

/// The host that a VM has left, and the one where it is.
struct Hosts {
    old: SealedHost,
    new: SealedHost,
}

#[test]
fn a_shredding_here_takes_nothing_from_a_vm_elsewhere_without_a_second_word() -> Result<()> {
    let (kms, bao) = (PyKmip::start()?, OpenBao::start()?);
    let hosts = Hosts {
        old: SealedHost::start_without_provider(Host::builder())?,
        new: SealedHost::start_without_provider(Host::builder())?,
    };
    add_kms(&hosts, &kms)?;
    add_vault(&hosts, &bao)?;
    // A KEK that it has would open the VM after the end of the key, were the server unreachable.
    hosts.new.run(&["provider", "cache", "kms", "none"])?;
    hosts.leaves_by_words("my vm", "kms", "says that it has no such key now")?;
    hosts.another_client_proves_nothing("web02", &kms)?;
    hosts.leaves_by_words("web03", "vault", "destroyed")
}

fn add_kms(hosts: &Hosts, kms: &PyKmip) -> Result<()> {
    kms.add_to(&hosts.old, "kms", &[kms.port()], false)?;
    let id = id_of(&hosts.old, "kms")?;
    let (endpoint, ca) = (
        format!("127.0.0.1:{}", kms.port()),
        kms.ca().display().to_string(),
    );
    let new = &hosts.new;
    new.run(&[
        "provider",
        "add",
        "kmip",
        "kms",
        "--endpoint",
        &endpoint,
        "--id",
        &id,
    ])?;
    new.run(&["provider", "trust", "kms", "--ca", &ca, "--yes"])?;
    kms.identify(new, "kms", false)
}

fn add_vault(hosts: &Hosts, bao: &OpenBao) -> Result<()> {
    bao.add_to(&hosts.old, "vault", bao.port())?;
    let id = id_of(&hosts.old, "vault")?;
    let address = format!("http://127.0.0.1:{}", bao.port());
    let add = ["provider", "add", "transit", "vault", "--address", &address];
    let login = ["--auth", "approle", "--role-id", bao.role_id(), "--id", &id];
    hosts.new.run(&[&add[..], &login].concat())?;
    bao.unlock(&hosts.new, "vault")
}

fn id_of(sealed: &SealedHost, provider: &str) -> Result<String> {
    let id = sealed.provider(provider)?["id"].as_str().map(str::to_owned);
    id.context("a provider has an id")
}

impl Hosts {
    /// Forgotten, shredded with one word, with two typed at a terminal: only the last is felt where the VM is.
    fn leaves_by_words(&self, vm: &str, provider: &str, seen: &str) -> Result<()> {
        let file = self.move_away(vm, provider)?;
        self.new.expect_start(vm).context("after it was forgotten")?;

        self.come_back(&file)?;
        let receipt = self.old.json(&["vm", "shred", vm, "--yes-shred", vm])?;
        let kek = kek_line(&receipt, provider)?;
        ensure!(kek["destroyed"] == false, "{receipt}");
        expect_names(&kek.to_string(), &["may be on another host", "need it there"])?;
        self.new.expect_start(vm).context("after one word")?;

        // At a terminal: the second word is asked for, and nothing else than the name counts as one.
        self.come_back(&file)?;
        let output = self.old.virtseal_at_a_terminal(&["vm", "shred", vm], &[vm, ""])?;
        expect_names(
            &output.succeeded()?,
            &[
                "is not defined here",
                provider,
                "or nothing to leave it",
                "may be on another host",
            ],
        )?;
        self.come_back(&file)?;
        let output = self
            .old
            .virtseal_at_a_terminal(&["vm", "shred", vm], &[vm, "yes"])?;
        ensure!(output.code() == Some(8), "{output:?}");
        expect_names(&output.stdout, &["'yes' was typed"])?;
        self.new.expect_start(vm).context("after a word that was none")?;

        let output = self.old.virtseal_at_a_terminal(&["vm", "shred", vm], &[vm, vm])?;
        let said = output.succeeded()?;
        expect_names(
            &said,
            &[
                "destroyed",
                seen,
                "on other hosts need it too, and no longer open either",
            ],
        )?;
        expect_names(&self.new.refused_start(vm)?, &["stays off", provider])
    }

    /// What a server says to a client that may not see a key is no end of it.
    fn another_client_proves_nothing(&self, vm: &str, kms: &PyKmip) -> Result<()> {
        let file = self.move_away(vm, "kms")?;
        self.come_back(&file)?;
        let (pem, key) = kms.client("somebody-else")?;
        let (pem, key) = (pem.display().to_string(), key.display().to_string());
        self.old
            .virtseal(&["provider", "identity", "kms", "--cert", &pem, "--key", &key])?
            .succeeded()?;
        let shred = ["vm", "shred", vm, "--yes-shred", vm, "--yes-destroy-keks", vm];
        let output = self.old.virtseal(&shred)?;
        ensure!(!output.stdout.contains("destroyed"), "{output:?}");
        expect_names(
            &output.refused()?,
            &[
                "provider 'kms'",
                "Permission Denied",
                "virtseal provider show kms",
            ],
        )?;
        self.new.expect_start(vm).context("another client's word")?;
        kms.identify(&self.old, "kms", false)
    }

    /// Seals a VM by `provider`, runs it once, takes all of it to the other host and forgets it on this one. Where its records are
    /// now.
    fn move_away(&self, vm: &str, provider: &str) -> Result<String> {
        let old = &self.old;
        old.run(&["provider", "default", provider])?;
        let spec = old.seal_new(vm)?;
        old.expect_start(vm)?;
        wait_until(COPIES, "the copies", || {
            Ok((old.json(&["jobs"])?["stale_copies"] == 0).then_some(()))
        })?;
        let xml = old.dumpxml(vm)?;
        old.host().undefine(vm)?;
        self.carry(&spec)?;
        self.new.host().define_xml(&xml)?;
        self.new.run(&["vm", "adopt", vm])?;
        expect_names(&old.run(&["vm", "forget", vm])?, &["no key was destroyed"])?;
        let kept = fs::read_dir(old.host().path(STATE).join("forgotten"))?;
        let mut names: Vec<_> = kept
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort();
        let last = names.pop().context("nothing was kept")?;
        Ok(format!("{STATE}/forgotten/{last}"))
    }

    fn carry(&self, spec: &DomainSpec) -> Result<()> {
        for file in [&spec.disk, &spec.nvram(), &spec.tpm_state()] {
            let (from, to) = (self.old.host().path(file), self.new.host().path(file));
            fs::create_dir_all(parent(&to)?)?;
            fs::copy(&from, &to).with_context(|| format!("{}", file.display()))?;
            fs::remove_file(&from)?;
        }
        Ok(())
    }

    /// What was forgotten is known again where the VM is not.
    fn come_back(&self, file: &str) -> Result<()> {
        self.old.run(&["vm", "adopt", "--from", file]).map(drop)
    }
}

fn parent(path: &Path) -> Result<&Path> {
    path.parent().context("a file is in a directory")
}

fn kek_line(receipt: &Value, provider: &str) -> Result<Value> {
    let mut lines = receipt["lines"].as_array().into_iter().flatten();
    let of_provider = format!("provider '{provider}'");
    let found = lines.find(|line| {
        line["what"]
            .as_str()
            .is_some_and(|what| what.contains(&of_provider))
    });
    found
        .cloned()
        .with_context(|| format!("no line of {provider} in {receipt}"))
}
