//! What the user sees: tables for people, one JSON document for scripts.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration};
use serde::Serialize;

use super::out::{json, line, note, table, write};
use crate::api::{
    AuditVerified, CertificateView, HostStatus, JobView, Jobs, ObjectView, Orphans, Outcome, PersistView,
    ProviderView, Receipt, ServerView, Unit, VmView,
};
use crate::host::local_time::{parse_rfc3339, time_of_day};
use crate::model::problem::Problem;
use crate::terminal::visible_json;
use crate::terminal::word;

/// Prints to standard output, as tables or as JSON; hints and warnings go to standard error.
pub(super) struct Printer {
    json: bool,
}

impl Printer {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a progress bar would reach a person.
    pub(super) fn shows_progress(&self) -> bool {
        !self.json && std::io::stderr().is_terminal()
    }

    pub(super) fn status(&self, status: &HostStatus) -> Result<(), Problem> {
        if self.json {
            return json(status);
        }
        line(&format!("virtseald  {}", status.version))?;
        line(&format!("libvirt    {} ({})", status.libvirt, status.libvirt_uri))?;
        line(&format!("armed      {} secrets in libvirt", status.armed))?;
        if let Some(problem) = &status.audit {
            line(&format!("audit log  {problem}"))?;
        }
        line("")?;
        self.providers(&status.providers)?;
        line("")?;
        self.vms(&status.vms)?;
        let of_vms: Vec<_> = status.vms.iter().flat_map(|vm| &vm.warnings).collect();
        let others = status.warnings.iter().filter(|warning| !of_vms.contains(warning));
        others.for_each(|warning| note(&warning.to_string()));
        Ok(())
    }

    pub(super) fn providers(&self, providers: &[ProviderView]) -> Result<(), Problem> {
        if self.json {
            return json(&providers);
        }
        let rows = providers.iter().map(|provider| {
            vec![
                provider_name(provider),
                provider.kind.clone(),
                provider_state(provider),
                local(Some(&provider.since)),
                local(provider.last_answer.as_deref()),
                provider.envelopes.to_string(),
                provider.id.clone(),
            ]
        });
        let header = [
            "PROVIDER",
            "KIND",
            "STATE",
            "SINCE",
            "LAST ANSWER",
            "ENVELOPES",
            "ID",
        ];
        table(&header, rows)?;
        self.warnings(providers);
        Ok(())
    }

    /// The same, each with all there is to say of it.
    pub(super) fn provider(&self, providers: &[ProviderView]) -> Result<(), Problem> {
        if self.json {
            return json(&providers);
        }
        for provider in providers {
            line(&provider_name(provider))?;
            line(&format!("  kind         {}", provider.kind))?;
            line(&format!("  id           {}", provider.id))?;
            line(&format!("  state        {}", provider_state(provider)))?;
            line(&format!("  since        {}", local(Some(&provider.since))))?;
            line(&format!(
                "  last answer  {}",
                local(provider.last_answer.as_deref())
            ))?;
            line(&format!("  envelopes    {}", provider.envelopes))?;
            if !provider.unlocked_by.is_empty() {
                line(&format!("  unlocked by  {}", provider.unlocked_by.join("; ")))?;
            }
            if let Some(cache) = &provider.cache {
                line(&format!(
                    "  cache        {cache}, {} keys in it",
                    provider.cached_keks
                ))?;
            }
            if let Some(persist) = &provider.persist {
                line(&format!("  persist      {}", persistence(persist)))?;
            }
            self.provider_warnings(provider);
        }
        Ok(())
    }

    /// What is about to go wrong with a provider that this command did not ask about, but may need.
    pub(super) fn warnings(&self, providers: &[ProviderView]) {
        providers
            .iter()
            .for_each(|provider| self.provider_warnings(provider));
    }

    fn provider_warnings(&self, provider: &ProviderView) {
        for warning in &provider.warnings {
            self.warn(&format!("provider '{}': {warning}", provider.name));
        }
    }

    /// For people who compare fingerprints, on standard error: what follows may be asked for as JSON.
    pub(super) fn servers(&self, servers: &[ServerView]) {
        for server in servers {
            note(&server.endpoint);
            if let Some(problem) = &server.problem {
                note(&format!("    shows no certificate: {problem}"));
            }
            for (nth, certificate) in server.chain.iter().enumerate() {
                self.certificate(if nth == 0 { "server " } else { "signer " }, certificate);
            }
        }
    }

    fn certificate(&self, role: &str, certificate: &CertificateView) {
        note(&format!("    {role}  {}", certificate.subject));
        note(&format!("      issuer   {}", certificate.issuer));
        if !certificate.names.is_empty() {
            note(&format!("      names    {}", certificate.names.join(", ")));
        }
        note(&format!("      SHA-256  {}", certificate.sha256));
        note(&format!(
            "      expires  {} ({} days)",
            certificate.not_after, certificate.days_left
        ));
    }

    pub(super) fn vms(&self, vms: &[VmView]) -> Result<(), Problem> {
        if self.json {
            return json(&vms);
        }
        let rows = vms
            .iter()
            .flat_map(|vm| vm.objects.iter().map(move |object| object_row(vm, object)));
        table(
            &[
                "VM",
                "POWER",
                "OBJECT",
                "STATE",
                "GENERATION",
                "PROVIDERS",
                "PATH",
            ],
            rows,
        )?;
        hanging(vms).iter().try_for_each(|text| line(text))?;
        vms.iter()
            .flat_map(|vm| &vm.warnings)
            .for_each(|warning| note(&warning.to_string()));
        Ok(())
    }

    pub(super) fn jobs(&self, jobs: &Jobs) -> Result<(), Problem> {
        if self.json {
            return json(jobs);
        }
        let rows = jobs.jobs.iter().map(|job| {
            vec![
                job.id.to_string(),
                job.task.clone(),
                job.state.as_str().to_owned(),
                progress(job),
                job.changed.to_string(),
                job.left.to_string(),
            ]
        });
        table(&["JOB", "TASK", "STATE", "DONE", "CHANGED", "LEFT"], rows)?;
        for job in &jobs.jobs {
            if let Some(waiting) = &job.waiting {
                line(&format!("job {} waits: {waiting}", job.id))?;
            }
        }
        if jobs.stale_copies == 0 {
            return Ok(());
        }
        line("")?;
        line(&format!("{} copies of envelopes are behind:", jobs.stale_copies))?;
        let rows = jobs.copies.iter().map(|copy| {
            let reason = if copy.reason.is_empty() { "-" } else { &copy.reason };
            vec![
                copy.vm.clone(),
                copy.place.clone(),
                copy.envelope.clone(),
                reason.to_owned(),
            ]
        });
        table(&["VM", "COPY IN", "ENVELOPE", "WHY"], rows)
    }

    pub(super) fn job(&self, job: &JobView) -> Result<(), Problem> {
        if self.json {
            return json(job);
        }
        let changed = match job.unit {
            Unit::Envelopes => format!(" envelopes seen, {} changed, {} left", job.changed, job.left),
            Unit::Bytes => String::new(),
        };
        line(&format!(
            "Job {} ({}): {}, {}{changed}",
            job.id,
            job.task,
            job.state.as_str(),
            progress(job)
        ))
    }

    pub(super) fn orphans(&self, orphans: &Orphans) -> Result<(), Problem> {
        if self.json {
            return json(orphans);
        }
        let rows = orphans.envelopes.iter().map(|orphan| {
            vec![
                orphan.vm.clone(),
                orphan.kind.clone(),
                orphan.envelope.clone(),
                orphan.providers.join(", "),
                match (&orphan.path, orphan.present) {
                    (Some(path), true) => path.clone(),
                    (Some(path), false) => format!("{path} (missing)"),
                    (None, _) => "-".to_owned(),
                },
            ]
        });
        table(&["VM", "KIND", "ENVELOPE", "PROVIDERS", "PATH"], rows)?;
        if let Some(first) = orphans.envelopes.first() {
            line(&format!(
                "That a VM is not defined here does not mean that it is gone. If it is on another host: virtseal vm forget {}",
                word(&first.vm)
            ))?;
        }
        line("")?;
        let rows = orphans.keks.iter().map(|kek| {
            vec![
                kek.provider.clone(),
                kek.kek.clone(),
                kek.envelopes.to_string(),
                kek.copies.to_string(),
                kek.origin.replace('-', " "),
            ]
        });
        table(&["PROVIDER", "KEK", "ENVELOPES", "COPIES", "ORIGIN"], rows)?;
        orphans.damaged.iter().for_each(|damaged| self.warn(damaged));
        match orphans.keks.is_empty() {
            true => Ok(()),
            false => line("They stay: backups, and VMs on other hosts, may need them."),
        }
    }

    pub(super) fn receipt(&self, receipt: &Receipt) -> Result<(), Problem> {
        if self.json {
            return json(receipt);
        }
        line(&format!("The keys of {}:", receipt.vm))?;
        for seen in &receipt.lines {
            let mark = if seen.destroyed { "destroyed" } else { "left" };
            line(&format!("  {mark:<10}{}: {}", seen.what, seen.observed))?;
        }
        line("What may survive, and virtseal can't see:")?;
        receipt
            .survives
            .iter()
            .try_for_each(|what| line(&format!("  {what}")))
    }

    pub(super) fn outcome(&self, outcome: &Outcome, dry_run: bool) -> Result<(), Problem> {
        if self.json {
            return json(outcome);
        }
        if outcome.steps.is_empty() {
            line("Nothing to do")?;
        }
        for step in &outcome.steps {
            line(&format!("{}{step}", if dry_run { "would " } else { "" }))?;
        }
        for warning in &outcome.warnings {
            self.warn(warning);
        }
        Ok(())
    }

    pub(super) fn volume_created(
        &self,
        path: &str,
        envelope: &str,
        size: Option<u64>,
    ) -> Result<(), Problem> {
        if self.json {
            return json(&serde_json::json!({ "path": path, "envelope": envelope, "size": size }));
        }
        line(&format!("{path} is ready, envelope {envelope}"))
    }

    pub(super) fn audit(&self, lines: &[String]) -> Result<(), Problem> {
        if self.json {
            return lines.iter().try_for_each(|record| write(&visible_json(record)));
        }
        let rows = lines.iter().map(|record| audit_row(record));
        table(&["TIME", "UID", "OPERATION", "OUTCOME", "OF", "DETAIL"], rows)
    }

    pub(super) fn audit_verified(&self, verified: &AuditVerified) -> Result<(), Problem> {
        if self.json {
            return json(verified);
        }
        line(&format!(
            "{} records, the chain is whole, head {}",
            verified.records, verified.head
        ))
    }

    /// Anything that is printable as JSON; `lines` for people.
    pub(super) fn show<'t>(
        &self,
        value: &impl Serialize,
        mut lines: impl Iterator<Item = &'t str>,
    ) -> Result<(), Problem> {
        if self.json {
            json(value)
        } else {
            lines.try_for_each(line)
        }
    }

    pub(super) fn done(&self, what: &str) -> Result<(), Problem> {
        if self.json {
            json(&serde_json::json!({ "done": what }))
        } else {
            line(what)
        }
    }

    pub(super) fn advise(&self, what: &str) -> Result<(), Problem> {
        if self.json { Ok(()) } else { line(what) }
    }

    pub(super) fn warn(&self, what: &str) {
        note(&format!("warning: {what}"));
    }
}

/// How far a job is, how fast it goes and how long it will take, as far as that can be told.
pub(super) fn progress(job: &JobView) -> String {
    let amount = |count: i64| match job.unit {
        Unit::Envelopes => count.to_string(),
        Unit::Bytes => HumanBytes(count.unsigned_abs()).to_string(),
    };
    let pace = job.per_second.map(|rate| format!(", {}/s", amount(rate)));
    let time = |seconds: i64| HumanDuration(Duration::from_secs(seconds.unsigned_abs()));
    let left = job
        .seconds_left
        .map(|seconds| format!(", {} left", time(seconds)));
    format!(
        "{} of {}{}{}",
        amount(job.seen),
        amount(job.total),
        pace.unwrap_or_default(),
        left.unwrap_or_default()
    )
}

/// Which VMs a single provider can stop.
fn hanging(vms: &[VmView]) -> Vec<String> {
    let mut by_provider: std::collections::BTreeMap<&str, Vec<&str>> = std::collections::BTreeMap::new();
    for vm in vms {
        if let Some(provider) = &vm.depends_on {
            by_provider.entry(provider).or_default().push(&vm.name);
        }
    }
    let text = |(provider, names): (&str, Vec<&str>)| {
        let more = if names.len() > 8 { ", …" } else { "" };
        format!(
            "{} on provider '{provider}' alone: {}{more}",
            if names.len() == 1 {
                "1 VM depends".to_owned()
            } else {
                format!("{} VMs depend", names.len())
            },
            names[..names.len().min(8)].join(", ")
        )
    };
    by_provider.into_iter().map(text).collect()
}

/// `24h, 4 keys on disk, by the TPM (PCR 7, since 14:02)`.
fn persistence(persist: &PersistView) -> String {
    let pcrs = persist
        .pcrs
        .as_ref()
        .map_or("damaged".to_owned(), |pcrs| format!("PCR {pcrs}"));
    format!(
        "{}, {} keys on disk, by the TPM ({pcrs}, since {})",
        persist.keep,
        persist.keks,
        local(Some(&persist.since))
    )
}

fn provider_name(provider: &ProviderView) -> String {
    let default = if provider.is_default { " (default)" } else { "" };
    format!("{}{default}", provider.name)
}

fn provider_state(provider: &ProviderView) -> String {
    match &provider.reason {
        Some(reason) => format!("{} ({reason})", provider.state),
        None => provider.state.clone(),
    }
}

/// A time from the daemon, as a person here would write it.
fn local(time: Option<&str>) -> String {
    time.and_then(parse_rfc3339)
        .map_or_else(|| "-".to_owned(), time_of_day)
}

fn object_row(vm: &VmView, object: &ObjectView) -> Vec<String> {
    vec![
        vm.name.clone(),
        vm.power.as_str().to_owned(),
        object.object.clone(),
        state(object),
        generation(object),
        object.providers.join(", "),
        object.path.clone().unwrap_or_else(|| "-".into()),
    ]
}

fn state(object: &ObjectView) -> String {
    match &object.shared_with[..] {
        [] => object.words(),
        others => format!("{}, shared with {}", object.words(), others.join(", ")),
    }
}

/// One that only a copy says is not taken for a fact.
fn generation(object: &ObjectView) -> String {
    match object.generation {
        Some(generation) if object.generation_verified => generation.to_string(),
        Some(generation) => format!("{generation} (not verified)"),
        None => "-".into(),
    }
}

/// A record for people. A line that is no record is shown as it is: `audit verify` says what is wrong with it.
fn audit_row(record: &str) -> Vec<String> {
    let Ok(fields) = serde_json::from_str::<BTreeMap<String, serde_json::Value>>(record) else {
        return vec![record.to_owned()];
    };
    let text = |name: &str| match fields.get(name) {
        None => String::new(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let subject = ["provider", "vm_name", "object"].map(text);
    let subject: Vec<_> = subject.into_iter().filter(|name| !name.is_empty()).collect();
    // Times are kept to the nanosecond.
    let time = text("time");
    let seconds = time
        .split_once('.')
        .map_or(time.clone(), |(seconds, _)| format!("{seconds}Z"));
    vec![
        seconds,
        text("actor"),
        text("op"),
        text("outcome"),
        subject.join(" "),
        text("detail"),
    ]
}
