//! The ways out that messages print, taken as an admin who reads them would: step after step, as printed.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

use super::SealedHost;
use crate::{Output, built_program};

/// What an admin is told to run.
const PROGRAMS: [&str; 5] = ["virtseal ", "virsh ", "mv ", "truncate ", "qemu-img "];

/// One of the ways behind a `Next: `, and what only its reader knows.
pub struct Way {
    steps: Vec<String>,
    filled: BTreeMap<String, String>,
    edit: Option<Edit>,
    typed: Vec<String>,
}

type Edit = Box<dyn Fn(&str) -> Result<String>>;

impl Way {
    /// The first way in what was said that begins so.
    ///
    /// # Errors
    /// There is none.
    pub fn that_begins(begin: &str, said: &str) -> Result<Self> {
        let ways = said.lines().flat_map(ways_of_line);
        let found = ways.into_iter().find(|way| way.starts_with(begin));
        let way = found.with_context(|| format!("no way begins with '{begin}' in: {said}"))?;
        Ok(Self::of(&way))
    }

    /// The command that begins so where it stands in a sentence, without a `Next: `.
    ///
    /// # Errors
    /// There is none.
    pub fn named(begin: &str, said: &str) -> Result<Self> {
        let mut lines = said.lines().filter_map(|line| Some(&line[line.find(begin)?..]));
        let rest = lines.next();
        let rest = rest.with_context(|| format!("nothing is called '{begin}' in: {said}"))?;
        Ok(Self::of(rest.split("; ").next().unwrap_or(rest)))
    }

    fn of(way: &str) -> Self {
        Self {
            steps: way.split(", then ").map(str::to_owned).collect(),
            filled: BTreeMap::new(),
            edit: None,
            typed: Vec::new(),
        }
    }

    /// Types these lines wherever a command asks, at a terminal.
    #[must_use]
    pub fn typing(mut self, lines: &[&str]) -> Self {
        self.typed = lines.iter().map(|line| (*line).to_owned()).collect();
        self
    }

    /// With `value` in the place of a word such as SIZE.
    #[must_use]
    pub fn with(mut self, word: &str, value: &str) -> Self {
        self.filled.insert(word.to_owned(), value.to_owned());
        self
    }

    /// Does this to the XML wherever it says `virsh edit`.
    #[must_use]
    pub fn editing(mut self, edit: impl Fn(&str) -> Result<String> + 'static) -> Self {
        self.edit = Some(Box::new(edit));
        self
    }

    /// Without the step that begins so: the story has taken it.
    #[must_use]
    pub fn after(mut self, begin: &str) -> Self {
        self.steps.retain(|step| !step.starts_with(begin));
        self
    }

    /// Makes sure that one of its steps is this command.
    ///
    /// # Errors
    /// None is.
    pub fn through(self, command: &str) -> Result<Self> {
        let mut commands = self.steps.iter().filter_map(|step| command_in(step).ok());
        let is_there = commands.any(|step| step.starts_with(command));
        ensure!(is_there, "no '{command}' in {:?}", self.steps);
        Ok(self)
    }

    /// Takes all its steps, and returns what they print.
    ///
    /// # Errors
    /// A step that is no command, or that fails.
    pub fn take(&self, sealed: &SealedHost) -> Result<String> {
        self.take_steps(sealed, self.steps.len())
    }

    /// The same, up to a last step that leads to another refusal, which is returned.
    ///
    /// # Errors
    /// Another step fails, or that one succeeds.
    pub fn refused(&self, sealed: &SealedHost) -> Result<String> {
        let (last, others) = self.steps.split_last().context("no step")?;
        self.take_steps(sealed, others.len())?;
        self.take_step(sealed, last)?.refused()
    }

    fn take_steps(&self, sealed: &SealedHost, count: usize) -> Result<String> {
        let mut printed = String::new();
        for step in &self.steps[..count] {
            let taken = self.take_step(sealed, step).and_then(Output::succeeded);
            printed += &taken.with_context(|| format!("'{step}' in {:?}", self.steps))?;
            printed.push('\n');
        }
        Ok(printed)
    }

    fn take_step(&self, sealed: &SealedHost, step: &str) -> Result<Output> {
        let command = command_in(step)?;
        let words = command.split(' ').map(|word| match self.filled.get(word) {
            Some(value) => value.as_str(),
            None => word,
        });
        let command = words.collect::<Vec<_>>().join(" ");
        let editor = match command.strip_prefix("virsh edit ") {
            None => String::new(),
            Some(vm) => self.editor(sealed, vm)?,
        };
        if !self.typed.is_empty() && command.starts_with("virtseal ") {
            let typed: Vec<_> = self.typed.iter().map(String::as_str).collect();
            return sealed.at_a_terminal(&command, &typed);
        }
        let program = built_program("virtseal")?;
        let directory = program.parent().context("a directory")?.display().to_string();
        let script = format!("PATH={directory}:$PATH; {editor} {command}");
        sealed.host().run(&["sh", "-c", &script])
    }

    /// One that leaves the XML as the reader of the message would.
    fn editor(&self, sealed: &SealedHost, vm: &str) -> Result<String> {
        let edit = self.edit.as_ref().context("nobody knows what is to be edited")?;
        let edited = edit(&sealed.dumpxml(vm)?)?;
        fs::write(sealed.host().path("/run/edited.xml"), edited)?;
        Ok("EDITOR='cp /run/edited.xml'".to_owned())
    }
}

fn ways_of_line(line: &str) -> Vec<String> {
    let Some((_, next)) = line.split_once("Next: ") else {
        return Vec::new();
    };
    let ways = next.split("; or ").flat_map(|way| way.split("; "));
    ways.flat_map(|way| way.split(", or "))
        .map(|way| way.trim().to_owned())
        .collect()
}

/// Without what is said of it, before a colon or after.
fn command_in(step: &str) -> Result<&str> {
    let is_command = |text: &str| PROGRAMS.iter().any(|program| text.starts_with(program));
    let command = match step.split_once(": ") {
        Some((_, command)) if !is_command(step) => command,
        _ => step,
    };
    ensure!(is_command(command), "that is no command");
    let end = [", ", ": ", " (", ")"]
        .iter()
        .filter_map(|end| command.find(end))
        .min();
    Ok(command[..end.unwrap_or(command.len())].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_ways_and_a_way_has_steps() {
        let said = "virtseal: web01: disk vda: it is lost. Next: put it back, then virtseal vm seal web01; or virsh edit web01: name \
                    another, then virtseal vm seal web01, which adopts it\nand more";
        let way = Way::that_begins("virsh edit", said).unwrap();
        assert_eq!(way.steps.len(), 2, "{:?}", way.steps);
        assert_eq!(command_in(&way.steps[0]).unwrap(), "virsh edit web01");
        assert_eq!(command_in(&way.steps[1]).unwrap(), "virtseal vm seal web01");
        let back = Way::that_begins("put", said).unwrap();
        assert!(command_in(&back.steps[0]).is_err());
        assert_eq!(command_in("if it may be lost: mv a b, then").unwrap(), "mv a b");
        assert!(Way::that_begins("virsh start", said).is_err());
    }
}
