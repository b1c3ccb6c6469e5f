//! What the person before the terminal sees: one line a step, with its time, and quotes below it.

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const LABEL_WIDTH: usize = 10;
const TEXT_WIDTH: usize = 84;

/// What a step has to say once it is done.
#[derive(Default)]
pub(crate) struct Said {
    line: String,
    quotes: Vec<String>,
}

impl Said {
    /// A line.
    pub(crate) fn line(line: impl Into<String>) -> Self {
        Self {
            line: line.into(),
            quotes: Vec::new(),
        }
    }

    /// Adds what a program said, word for word.
    pub(crate) fn quote(mut self, command: &str, text: &str) -> Self {
        self.quotes.push(format!("# {command}"));
        self.quotes.extend(text.lines().map(str::to_owned));
        self
    }
}

/// The numbered steps of the demo.
pub(crate) struct Screen {
    begin: Instant,
    number: usize,
}

impl Screen {
    pub(crate) fn new() -> Self {
        Self {
            begin: Instant::now(),
            number: 0,
        }
    }

    /// Since the beginning.
    pub(crate) fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Runs a step and prints what it says.
    ///
    /// # Errors
    /// The step's own, with its number and label.
    pub(crate) fn step<T>(&mut self, label: &str, run: impl FnOnce() -> Result<(Said, T)>) -> Result<T> {
        self.number += 1;
        let head = format!("{:>3}  {label:<LABEL_WIDTH$}", self.number);
        show_meanwhile(&head);
        let begin = Instant::now();
        let outcome = run();
        forget_meanwhile();
        let (said, value) = outcome.with_context(|| {
            let seconds = begin.elapsed().as_secs_f64();
            format!("step {} ({label}) failed after {seconds:.1} s", self.number)
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        println!("{head}{:<TEXT_WIDTH$}{seconds:>6.1} s", said.line);
        for quote in &said.quotes {
            println!("     {quote}");
        }
        Ok(value)
    }
}

/// On a terminal a step that takes long is seen to have begun.
fn show_meanwhile(head: &str) {
    if stdout().is_terminal() {
        print!("{head}…");
        let _ = stdout().flush();
    }
}

fn forget_meanwhile() {
    if stdout().is_terminal() {
        print!("\r\x1b[K");
    }
}

/// `bytes` for people.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..=1_023 => format!("{bytes} B"),
        1_024..=1_048_575 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}
