//! What reaches the terminal: lines, tables and documents, with nothing in them that a terminal would obey but our own colours.

use std::io::{IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::colour::{self, coloured};
use crate::model::problem::{Code, Problem};
use crate::terminal::{visible, visible_json};

/// What every terminal has.
const COLUMNS: usize = 80;

/// How wide a line may be. What is no terminal, such as grep, gets each line whole.
pub(super) fn columns() -> Option<usize> {
    std::io::stdout().is_terminal().then_some(COLUMNS)
}

/// As wide as it has to be.
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Result<(), Problem> {
    print_table(Table::new(), header, rows)
}

/// That fits: long cells get more lines.
pub(super) fn fitting_table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Result<(), Problem> {
    let mut table = Table::new();
    if let Some(columns) = columns() {
        table
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_width(columns.try_into().unwrap_or(u16::MAX));
    }
    print_table(table, header, rows)
}

fn print_table(
    mut table: Table,
    header: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> Result<(), Problem> {
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
    // Its cells begin with a space.
    let lines = table.lines().map(|text| text.trim_end().to_owned());
    let lines: Vec<_> = lines
        .map(|text| text.strip_prefix(' ').map_or(text.clone(), str::to_owned))
        .collect();
    let state = lines.first().and_then(|header| colour::column_of_state(header));
    lines.iter().try_for_each(|text| match state {
        Some(column) => line_with_state(text, column),
        None => line(text),
    })
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

/// The same, with the state that begins at this column in its colour.
pub(super) fn line_with_state(text: &str, column: usize) -> Result<(), Problem> {
    let text = visible(text);
    match colour::is_wanted(&std::io::stdout()) {
        true => write(&coloured(&text, column)),
        false => write(&text),
    }
}

/// A text behind `label`, on lines that fit where it can be broken behind `at` and a space: a command between commas stays whole.
pub(super) fn wrapped(label: &str, text: &str, at: char) -> Result<(), Problem> {
    match columns() {
        Some(columns) => lines_of(label, text, at, columns)
            .iter()
            .try_for_each(|text| line_with_state(text, state_in(text, label))),
        None => line(&format!("{label}{text}")),
    }
}

/// The label itself is one (`critical: `), or what stands behind it (`starts: no`).
fn state_in(text: &str, label: &str) -> usize {
    match colour::of(text).is_none() && text.starts_with(label) {
        true => label.chars().count(),
        false => 0,
    }
}

fn lines_of(label: &str, text: &str, at: char, columns: usize) -> Vec<String> {
    let indent = label.chars().count().min(8);
    let (mut lines, mut open) = (Vec::new(), label.to_owned());
    let mut is_empty = true;
    let ends = |pair: &[char]| pair[1] == ' ' && (at == ' ' || [at, ';', ':'].contains(&pair[0]));
    let chars: Vec<_> = text.chars().collect();
    let mut breaks: Vec<_> = chars
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| ends(pair))
        .map(|(nth, _)| nth + 2)
        .collect();
    breaks.push(chars.len());
    let mut begin = 0;
    for end in breaks {
        let part: String = chars[begin..end].iter().collect();
        begin = end;
        let is_full = open.chars().count() + part.trim_end().chars().count() > columns;
        if is_full && !is_empty {
            lines.push(open.trim_end().to_owned());
            open = " ".repeat(indent);
        }
        open.push_str(&part);
        is_empty = false;
    }
    lines.push(open.trim_end().to_owned());
    lines
}

/// A question to whoever sits at the terminal.
pub(super) fn question(text: &str) -> std::io::Result<()> {
    write!(std::io::stderr(), "{} ", visible(text.trim_end()))?;
    std::io::stderr().flush()
}

/// To standard error, as one line; a word such as `warning` at its beginning is coloured.
pub(super) fn note(text: &str) {
    let text = visible(text);
    let _ = match colour::is_wanted(&std::io::stderr()) {
        true => writeln!(std::io::stderr(), "{}", coloured(&text, 0)),
        false => writeln!(std::io::stderr(), "{text}"),
    };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_between_words_and_advice_between_commands() {
        let words = "word ".repeat(40);
        let lines = lines_of("critical: ", &words, ' ', COLUMNS);
        assert!(
            lines.len() > 2 && lines.iter().all(|line| line.len() <= COLUMNS),
            "{lines:?}"
        );
        assert!(lines[0].starts_with("critical: word") && lines[1].starts_with("        word"));
        let long = format!("virtseal volume create {} --from /image", "/a".repeat(40));
        let next = format!("virsh edit web01: remove it, then {long}; or leave it");
        let lines = lines_of("  Next: ", &next, ',', COLUMNS);
        assert_eq!(
            lines,
            [
                "  Next: virsh edit web01: remove it,".to_owned(),
                format!("        then {long};"),
                "        or leave it".to_owned()
            ]
        );
        assert_eq!(lines_of("a: ", "", ' ', COLUMNS), ["a:"]);
    }
}
