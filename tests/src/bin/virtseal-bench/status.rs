//! How long `virtseal status` takes on a host with 1,000 sealed VMs, each with a disk, UEFI variables and a vTPM that are there: right
//! after virtseald has started, after a pause, and again and again.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rusqlite::params;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtseal_testkit::{DomainSpec, Host, SealedHost, built_program, edit_keystore};

use crate::figure::{Figure, Target};
use crate::inside::{ask, succeed};
use crate::samples::Samples;

const VMS: usize = 1000;
const ASKED: usize = 20;
const PAUSES: usize = 3;
/// By then the daemon looks no more at what somebody has asked for.
const FORGOTTEN: Duration = Duration::from_secs(25);
/// What a header is in: no key is needed, and nothing behind it is read.
const HEADER: usize = 64 * 1024;

/// In milliseconds.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Times {
    first: f64,
    paused: Samples,
    asked: Samples,
    json: Samples,
}

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    sealed.unlock()?;
    let spec = sealed.seal_new("many")?;
    sealed.expect_start(&spec.name)?;
    let copies: Vec<_> = (0..VMS).map(|number| Copy::new(&spec, number)).collect();
    let envelopes = envelopes_of(sealed, &spec)?;
    for copy in &copies {
        copy.make_files(sealed.host(), &spec, &envelopes)?;
    }
    virsh_each(sealed.host(), &copies, |copy| {
        format!("define /run/many/{}", copy.spec.name)
    })?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        let transaction = keystore.transaction()?;
        for copy in &copies {
            copy.keep(&transaction, &spec, &envelopes)?;
        }
        Ok(transaction.commit()?)
    })?;
    // The files were written long ago, as on any host.
    thread::sleep(Duration::from_secs(3));
    sealed.start_daemon()?;
    sealed.unlock()?;
    let program = built_program("virtseal")?.display().to_string();
    let times: Times = ask(sealed.host(), &["status", &program])?;
    let status = sealed.json(&["status"])?;
    let vms = status["vms"].as_array().context("no VMs")?;
    let start = vms.iter().filter(|vm| vm["starts"]["outlook"] == "yes").count();
    ensure!(
        start > VMS,
        "{start} of {} VMs would start: {}",
        vms.len(),
        vms[0]
    );
    virsh_each(sealed.host(), &copies, |copy| {
        format!("undefine --keep-nvram --keep-tpm {}", copy.spec.name)
    })?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        for copy in &copies {
            let vm = copy.spec.uuid.to_string();
            keystore.execute("DELETE FROM envelopes WHERE vm = ?1", [&vm])?;
            keystore.execute("DELETE FROM vms WHERE uuid = ?1", [&vm])?;
        }
        Ok(())
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    let asked = format!(
        "the median of {ASKED}, p99 {:.0} ms; with --json {:.0} ms",
        times.asked.p99()?,
        times.json.median()?
    );
    let paused = format!(
        "the median of {PAUSES} after {} s without a question; the first of this virtseald {:.0} ms",
        FORGOTTEN.as_secs(),
        times.first
    );
    let at_most = Target::AtMost(100.0);
    Ok(vec![
        Figure::new(
            "virtseal status with 1,000 VMs",
            times.asked.median()?,
            "ms",
            at_most,
            asked,
        ),
        Figure::new(
            "virtseal status with 1,000 VMs, after a pause",
            times.paused.median()?,
            "ms",
            at_most,
            paused,
        ),
    ])
}

pub(crate) fn inside(program: &str) -> Result<Times> {
    let began = Instant::now();
    succeed(program, &["status"])?;
    let mut times = Times {
        first: began.elapsed().as_secs_f64() * 1000.0,
        paused: Samples::default(),
        asked: Samples::default(),
        json: Samples::default(),
    };
    for _ in 0..PAUSES {
        thread::sleep(FORGOTTEN);
        times.paused.time(|| succeed(program, &["status"]))?;
    }
    for _ in 0..ASKED {
        times.asked.time(|| succeed(program, &["status"]))?;
        times.json.time(|| succeed(program, &["status", "--json"]))?;
    }
    Ok(times)
}

/// The id, kind and text of each.
type Envelopes = Vec<(String, String)>;

fn envelopes_of(sealed: &mut SealedHost, spec: &DomainSpec) -> Result<Envelopes> {
    sealed.stop_daemon(Signal::SIGTERM)?;
    let vm = spec.uuid.to_string();
    let found = edit_keystore(sealed, |keystore| {
        let mut rows = keystore.prepare("SELECT id, kind FROM envelopes WHERE vm = ?1")?;
        let rows = rows.query_map([&vm], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<Vec<_>, _>>()?)
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    Ok(found)
}

/// A VM like another, with ids of its own everywhere.
struct Copy {
    spec: DomainSpec,
    envelopes: [String; 3],
}

impl Copy {
    fn new(of: &DomainSpec, number: usize) -> Self {
        let spec = DomainSpec {
            uuid: Uuid::new_v4(),
            ..SealedHost::spec(&format!("{}{number:04}", of.name))
        };
        Self {
            spec,
            envelopes: [(); 3].map(|()| Uuid::new_v4().to_string()),
        }
    }

    fn renamed(&self, text: &str, of: &DomainSpec, envelopes: &Envelopes) -> String {
        let ids = envelopes.iter().zip(&self.envelopes);
        let text = ids.fold(text.to_owned(), |text, ((old, _), new)| text.replace(old, new));
        text.replace(&of.uuid.to_string(), &self.spec.uuid.to_string())
    }

    /// The domain XML and the beginning of each file; what is behind that is a hole.
    fn make_files(&self, host: &Host, of: &DomainSpec, envelopes: &Envelopes) -> Result<()> {
        let xml = host
            .virsh(&["dumpxml", "--inactive", "--security-info", &of.name])?
            .succeeded()?;
        let xml = self.renamed(&xml, of, envelopes);
        let xml = xml.replace(
            &format!("<name>{}</name>", of.name),
            &format!("<name>{}</name>", self.spec.name),
        );
        let xml = xml.replace(
            &of.disk.display().to_string(),
            &self.spec.disk.display().to_string(),
        );
        let xml = xml.replace(
            &of.nvram().display().to_string(),
            &self.spec.nvram().display().to_string(),
        );
        fs::create_dir_all(host.path("/run/many"))?;
        fs::write(host.path(Path::new("/run/many").join(&self.spec.name)), xml)?;
        let files = [
            (of.disk.clone(), self.spec.disk.clone()),
            (of.nvram(), self.spec.nvram()),
            (of.tpm_state(), self.spec.tpm_state()),
        ];
        for (from, to) in files {
            let bytes = fs::read(host.path(&from))?;
            let header = &bytes[..bytes.len().min(HEADER)];
            // The envelope is text, as long as before.
            let text = String::from_utf8_lossy(header);
            let is_text = text.contains(&of.uuid.to_string());
            let header = match is_text {
                true => replace_ids(header, of, envelopes, self),
                false => header.to_vec(),
            };
            let to = host.path(&to);
            fs::create_dir_all(to.parent().context("no directory")?)?;
            let file = fs::File::create(&to)?;
            std::os::unix::fs::FileExt::write_all_at(&file, &header, 0)?;
            file.set_len(bytes.len() as u64)?;
        }
        Ok(())
    }

    fn keep(&self, keystore: &rusqlite::Connection, of: &DomainSpec, envelopes: &Envelopes) -> Result<()> {
        let (old, new) = (of.uuid.to_string(), self.spec.uuid.to_string());
        keystore.execute(
            "INSERT INTO vms (uuid, name, sealed_at, vtpm_seen) SELECT ?1, ?2, sealed_at, vtpm_seen FROM vms WHERE uuid = ?3",
            params![new, self.spec.name, old],
        )?;
        for ((id, _), copy) in envelopes.iter().zip(&self.envelopes) {
            keystore.execute(
                "INSERT INTO envelopes (id, vm, kind, generation, json, state, location, created, updated)
                 SELECT ?1, ?2, kind, generation, replace(replace(json, id, ?1), vm, ?2), state,
                        replace(replace(location, ?3, ?4), ?5, ?6), created, updated
                 FROM envelopes WHERE id = ?7",
                params![
                    copy,
                    new,
                    of.disk.display().to_string(),
                    self.spec.disk.display().to_string(),
                    of.nvram().display().to_string(),
                    self.spec.nvram().display().to_string(),
                    id
                ],
            )?;
        }
        Ok(())
    }
}

/// Each has as many bytes as before.
fn replace_ids(bytes: &[u8], of: &DomainSpec, envelopes: &Envelopes, copy: &Copy) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut replace = |old: &str, new: &str| {
        let places: Vec<_> = bytes
            .windows(old.len())
            .enumerate()
            .filter(|(_, window)| *window == old.as_bytes())
            .map(|(at, _)| at)
            .collect();
        for at in places {
            bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
        }
    };
    replace(&of.uuid.to_string(), &copy.spec.uuid.to_string());
    for ((old, _), new) in envelopes.iter().zip(&copy.envelopes) {
        replace(old, new);
    }
    bytes
}

fn virsh_each(host: &Host, copies: &[Copy], command: impl Fn(&Copy) -> String) -> Result<()> {
    let mut script = String::new();
    for copy in copies {
        writeln!(script, "{}", command(copy))?;
    }
    fs::write(host.path("/run/script"), script)?;
    let script = "virsh -q -c qemu:///system </run/script >/dev/null";
    host.run(&["sh", "-c", script])?.succeeded().map(drop)
}
