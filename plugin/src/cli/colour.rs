//! Colours for states, on a terminal that shows them: green is as it should be, yellow needs a look, red keeps something from working.

use std::io::IsTerminal;

const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const RED: &str = "\x1b[31m";
const RESET: &str = "\x1b[0m";

/// The words of states, longer ones before what they begin with.
const STATES: [(&str, &str); 23] = [
    ("ready", GREEN),
    ("done", GREEN),
    ("sealed", GREEN),
    ("active", GREEN),
    ("yes", GREEN),
    ("not backed up", YELLOW),
    ("degraded", YELLOW),
    ("incomplete", YELLOW),
    ("aborted", YELLOW),
    ("running", YELLOW),
    ("pending", YELLOW),
    ("warning", YELLOW),
    ("unknown", YELLOW),
    ("not looked at", YELLOW),
    ("not trusted", RED),
    ("not encrypted", RED),
    ("locked", RED),
    ("unreachable", RED),
    ("failed", RED),
    ("critical", RED),
    ("plain", RED),
    ("file missing", RED),
    ("no", RED),
];

/// Whether to colour what goes to this stream: see <https://no-color.org>.
pub(super) fn is_wanted(stream: &impl IsTerminal) -> bool {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    stream.is_terminal()
        && variable("NO_COLOR").is_none()
        && variable("TERM").is_some_and(|term| term != "dumb")
}

/// The colour of the state that `text` begins with, and that state.
pub(super) fn of(text: &str) -> Option<(&'static str, &'static str)> {
    let begins = |state: &str| {
        let rest = text.strip_prefix(state);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '-'))
    };
    STATES.into_iter().find(|(state, _)| begins(state))
}

/// `text` with the state that begins at the character `column` in its colour, if there is one.
pub(super) fn coloured(text: &str, column: usize) -> String {
    let Some((at, _)) = text.char_indices().nth(column) else {
        return text.to_owned();
    };
    let (before, rest) = text.split_at(at);
    match of(rest) {
        Some((state, colour)) => format!("{before}{colour}{state}{RESET}{}", &rest[state.len()..]),
        None => text.to_owned(),
    }
}

/// Where the states of a table are, by its header.
pub(super) fn column_of_state(header: &str) -> Option<usize> {
    let at = header.find("STATE").or_else(|| header.find("STARTS"))?;
    Some(header[..at].chars().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_coloured_where_it_stands_and_nowhere_else() {
        let column = column_of_state("PROVIDER  KIND    STATE   SINCE").unwrap();
        for (row, painted) in [
            (
                "main      native  locked  14:02",
                "main      native  \x1b[31mlocked\x1b[0m  14:02",
            ),
            (
                "ready     native  ready (it answers)",
                "ready     native  \x1b[32mready\x1b[0m (it answers)",
            ),
            (
                "käse      native  not backed up",
                "käse      native  \x1b[33mnot backed up\x1b[0m",
            ),
            ("main      native  notable", "main      native  notable"),
            ("short", "short"),
        ] {
            assert_eq!(coloured(row, column), painted);
        }
        assert_eq!(coloured("no: it is locked", 0), "\x1b[31mno\x1b[0m: it is locked");
        assert_eq!(column_of_state("PROVIDER  KEK"), None);
    }

    #[test]
    fn what_is_no_terminal_gets_no_colours() {
        assert!(!is_wanted(&std::fs::File::open("/dev/null").unwrap()));
    }
}
