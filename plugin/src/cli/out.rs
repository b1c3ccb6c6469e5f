//! What reaches the terminal: lines, tables and documents, with nothing in them that a terminal would obey.

use std::io::Write;

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::model::problem::{Code, Problem};
use crate::terminal::{visible, visible_json};

pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Result<(), Problem> {
    let mut table = Table::new();
    // Before the table does: a line break in a cell would make a row of its own.
    let cells = |row: Vec<String>| {
        row.iter()
            .map(|cell| visible(cell).into_owned())
            .collect::<Vec<_>>()
    };
    table
        .load_style(presets::NOTHING)
        .set_header(header)
        .add_rows(rows.map(cells));
    table.lines().try_for_each(|text| line(text.trim()))
}

pub(super) fn json(value: &impl Serialize) -> Result<(), Problem> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Problem::from_error(Code::Failed, "can't print JSON", &error))?;
    write(&visible_json(&text))
}

/// To standard output, as one line.
pub(super) fn line(text: &str) -> Result<(), Problem> {
    write(&visible(text))
}

/// A question to whoever sits at the terminal.
///
/// # Errors
/// When standard error can't be written.
pub(super) fn question(text: &str) -> std::io::Result<()> {
    write!(std::io::stderr(), "{} ", visible(text.trim_end()))?;
    std::io::stderr().flush()
}

/// To standard error, as one line.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", visible(text));
}

/// A reader that went away (`| head`) is no failure.
pub(super) fn write(text: &str) -> Result<(), Problem> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Problem::from_error(Code::Failed, "can't print", &error))
        }
        _ => Ok(()),
    }
}
