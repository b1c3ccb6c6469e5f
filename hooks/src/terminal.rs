//! Text that others wrote, on its way to a terminal: libvirt shows the hook's line to whoever started the VM.

/// What a line may have, in characters.
const MAX_LINE: usize = 2000;

/// `text` as one line without a character that a terminal would obey: such a one is shown as its escape.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for found in text.trim().chars().take(MAX_LINE) {
        match found {
            '\n' => line.push(' '),
            _ if is_visible(found) => line.push(found),
            _ => line.extend(found.escape_debug()),
        }
    }
    line
}

/// A VM's name in what is said of it: `Next:`, which the hook alone says, is shown as an escape.
pub(crate) fn unadvised(name: &str) -> String {
    name.replace("Next:", "Next\\u{3a}")
}

/// As the standard library's tables have it. A mark that combines with the character before it is visible.
fn is_visible(found: char) -> bool {
    match found {
        ' '..='~' => true,
        _ if found.is_ascii() => false,
        _ => ['a', found].iter().collect::<String>().escape_debug().count() == 2,
    }
}

/// A VM's name as the operand of a command of virsh or virtseal: quoted where a shell would take it for something else, and
/// kept from being read as an option. What a terminal would obey in it is shown by [`one_line`].
pub(crate) fn word(name: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "_./:@%+=,-".contains(c);
    let quoted = if !name.is_empty() && name.chars().all(is_plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', "'\\''"))
    };
    if name.starts_with('-') {
        format!("-- {quoted}")
    } else {
        quoted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_and_commands_no_terminal() {
        assert_eq!(
            one_line(" a\nb\u{1b}[2J\u{9b}\u{202e}käse "),
            "a b\\u{1b}[2J\\u{9b}\\u{202e}käse"
        );
        assert_eq!(one_line(&"x".repeat(3000)).len(), MAX_LINE);
    }

    #[test]
    fn a_name_is_one_word() {
        for (name, shown) in [
            ("web01", "web01"),
            ("my vm", "'my vm'"),
            ("$(id)", "'$(id)'"),
            ("it's", "'it'\\''s'"),
            ("--all", "-- --all"),
            ("", "''"),
        ] {
            assert_eq!(word(name), shown);
        }
    }
}
