//! What the user sees: tables for people, one JSON document for scripts.

mod alike;
mod audit;
mod job;
mod one_provider;
mod provider;
mod status;
mod trouble;

use std::cell::RefCell;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use super::document::{self, Answer, Deed, Done, Preview, Shredded, VolumeMade};
use super::out::{line, note};
use crate::api::{FindingView, LossPreview, Outcome, Receipt, SubjectView};
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::model::subject::Subject;
use crate::terminal::unadvised;

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

/// Prints to standard output: tables as they come, or one JSON document at the end. Hints and warnings go to standard error.
pub(super) struct Printer {
    json: bool,
    answer: RefCell<Option<Answer>>,
    warned: RefCell<Vec<FindingView>>,
}

impl Printer {
    pub(super) fn new(json: bool) -> Self {
        Self {
            json,
            answer: RefCell::default(),
            warned: RefCell::default(),
        }
    }

    /// The end of the command: says what went wrong, and prints the document.
    pub(super) fn end(self, ended: Result<ExitCode, Problem>) -> ExitCode {
        if let Err(problem) = &ended {
            note(&format!("virtseal: {problem}"));
        }
        if self.json {
            let (answer, warned) = (self.answer.into_inner(), self.warned.into_inner());
            if let Err(problem) = document::print(answer, warned, ended.as_ref().err()) {
                note(&format!("virtseal: {problem}"));
                return ExitCode::from(problem.code as u8);
            }
        }
        ended.unwrap_or_else(|problem| ExitCode::from(problem.code as u8))
    }

    /// For the document at the end.
    fn tell(&self, answer: Answer) -> Result<(), Problem> {
        self.answer.replace(Some(answer));
        Ok(())
    }

    /// Whether a script reads it.
    pub(super) fn is_for_scripts(&self) -> bool {
        self.json
    }

    /// A document for scripts, and lines for people.
    pub(super) fn show<'t>(
        &self,
        answer: Answer,
        mut lines: impl Iterator<Item = &'t str>,
    ) -> Result<(), Problem> {
        match self.json {
            true => self.tell(answer),
            false => lines.try_for_each(line),
        }
    }

    /// Whether a person can be asked.
    pub(super) fn asks(&self) -> bool {
        !self.json && std::io::stdin().is_terminal()
    }

    /// Whether a progress bar would reach a person.
    pub(super) fn shows_progress(&self) -> bool {
        !self.json && std::io::stderr().is_terminal()
    }

    pub(super) fn receipt(&self, receipt: Receipt) -> Result<(), Problem> {
        if self.json {
            let changed = receipt.lines.iter().any(|line| line.destroyed);
            return self.tell(Answer::Shredded(Shredded { changed, receipt }));
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
            .try_for_each(|finding| line(&format!("  {}", finding.what)))
    }

    pub(super) fn outcome(&self, outcome: Outcome) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Outcome(outcome));
        }
        if outcome.steps.is_empty() && outcome.obstacles.is_empty() {
            line("Nothing to do")?;
        }
        for step in outcome.steps.iter().chain(&outcome.notes) {
            line(&unadvised(&step.text))?;
        }
        match (outcome.result.as_deref().map(unadvised), &outcome.next) {
            (Some(result), Some(next)) => line(&format!("{result}. Next: {next}"))?,
            (Some(result), None) => line(&result)?,
            (None, _) => {}
        }
        self.warn_all(&outcome.warnings);
        Ok(())
    }

    /// What would be done, and what would be lost by it.
    pub(super) fn loss(&self, loss: LossPreview) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Preview(Preview { changed: false, loss }));
        }
        for step in &loss.steps {
            line(&unadvised(&step.text))?;
        }
        for lost in &loss.lost {
            line(&format!("would lose {}", unadvised(&lost.what)))?;
        }
        Ok(())
    }

    pub(super) fn volume_created(&self, made: VolumeMade) -> Result<(), Problem> {
        let text = format!("{} is ready, envelope {}", made.path, made.envelope);
        self.show(Answer::VolumeCreated(made), std::iter::once(text.as_str()))
    }

    /// What a command about a provider has come to.
    pub(super) fn done(&self, done: Deed, provider: &str, changed: bool, text: &str) -> Result<(), Problem> {
        self.done_with(done, &Subject::Provider(provider.to_owned()), changed, None, text)
    }

    /// The same, of anything, with the file that was written.
    pub(super) fn done_with(
        &self,
        done: Deed,
        object: &Subject,
        changed: bool,
        path: Option<PathBuf>,
        text: &str,
    ) -> Result<(), Problem> {
        let told = Done {
            changed,
            done,
            object: SubjectView::from(object),
            path,
            text: text.to_owned(),
            warnings: Vec::new(),
        };
        self.show(Answer::Done(told), std::iter::once(text))
    }

    pub(super) fn advise(&self, what: &str) -> Result<(), Problem> {
        if self.json { Ok(()) } else { line(what) }
    }

    /// What to do now.
    pub(super) fn next(&self, advice: &Advice) -> Result<(), Problem> {
        self.advise(&format!("Next: {advice}"))
    }

    /// For the document, too.
    pub(super) fn warn(&self, finding: impl Into<FindingView>) {
        let finding = finding.into();
        self.caution(&finding.told());
        self.warned.borrow_mut().push(finding);
    }

    pub(super) fn warn_all(&self, findings: &[FindingView]) {
        findings.iter().for_each(|finding| self.warn(finding.clone()));
    }

    /// For people alone: what the document has elsewhere, or nobody but them is asked.
    pub(super) fn caution(&self, what: &str) {
        note(&format!("warning: {what}"));
    }
}
