//! What the user sees: tables for people, one JSON document for scripts.

mod audit;
mod job;
mod one_provider;
mod provider;
mod status;
mod trouble;

use std::io::IsTerminal;

use clap::ValueEnum;
use serde::Serialize;

use super::out::{json, line, note};
use crate::api::{LossPreview, Outcome, Receipt};
use crate::model::advice::Advice;
use crate::model::problem::Problem;

pub(super) use job::progress;

/// How much is shown of each line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Width {
    /// What fits a terminal of 80 columns.
    #[default]
    Narrow,
    /// All there is: paths, UUIDs, reasons in full.
    Wide,
}

/// Prints to standard output, as tables or as JSON; hints and warnings go to standard error.
pub(super) struct Printer {
    json: bool,
}

impl Printer {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a person can be asked.
    pub(super) fn asks(&self) -> bool {
        !self.json && std::io::stdin().is_terminal()
    }

    /// Whether a progress bar would reach a person.
    pub(super) fn shows_progress(&self) -> bool {
        !self.json && std::io::stderr().is_terminal()
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

    pub(super) fn outcome(&self, outcome: &Outcome) -> Result<(), Problem> {
        if self.json {
            return json(outcome);
        }
        if outcome.steps.is_empty() && outcome.obstacles.is_empty() {
            line("Nothing to do")?;
        }
        for said in outcome.steps.iter().chain(&outcome.notes) {
            line(said)?;
        }
        match (&outcome.result, &outcome.next) {
            (Some(result), Some(next)) => line(&format!("{result}. Next: {next}"))?,
            (Some(result), None) => line(result)?,
            (None, _) => {}
        }
        for warning in &outcome.warnings {
            self.warn(warning);
        }
        Ok(())
    }

    /// What would be done, and what would be lost by it.
    pub(super) fn loss(&self, preview: &LossPreview) -> Result<(), Problem> {
        if self.json {
            return json(preview);
        }
        for step in &preview.steps {
            line(&format!("would {step}"))?;
        }
        for lost in &preview.lost {
            line(&format!("would lose {lost}"))?;
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

    pub(super) fn done(&self, changed: bool, what: &str) -> Result<(), Problem> {
        self.done_but(changed, what, &[])
    }

    /// The same, with what to mind.
    pub(super) fn done_but(&self, changed: bool, what: &str, warnings: &[String]) -> Result<(), Problem> {
        if self.json {
            return json(&serde_json::json!({ "changed": changed, "done": what, "warnings": warnings }));
        }
        for warning in warnings {
            self.warn(warning);
        }
        line(what)
    }

    pub(super) fn advise(&self, what: &str) -> Result<(), Problem> {
        if self.json { Ok(()) } else { line(what) }
    }

    /// What to do now.
    pub(super) fn next(&self, advice: &Advice) -> Result<(), Problem> {
        self.advise(&format!("Next: {advice}"))
    }

    pub(super) fn warn(&self, what: &str) {
        note(&format!("warning: {what}"));
    }
}
