//! Text that others wrote, on its way to a terminal.
//!
//! Names of VMs and providers, paths, answers of servers and hints in envelopes may hold escape sequences, line breaks
//! and marks that turn the direction of text, which would let their author write anything on an administrator's screen.
//! [`visible`] shows such characters instead of sending them, [`word`] and [`quoted`] make a text one word of a command
//! that can be pasted into a shell. All that is printed goes through the first one, at the place where it is printed. What a message
//! quotes may also say `Next: `, and that is for us to say: [`unadvised`] takes it from all that comes before the advice.

use std::borrow::Cow;
use std::fmt::{Display, Write};

/// `text` with every character that a terminal would obey, or that nobody could see, as its escape: `\n`, `\u{1b}`.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    escaped(text, is_visible, |out, found| out.extend(found.escape_debug()))
}

/// The same in a JSON document: such characters stand inside its strings only, but for the line breaks between them.
pub(crate) fn visible_json(json: &str) -> Cow<'_, str> {
    let may_stand = |found| found == '\n' || is_visible(found);
    escaped(json, may_stand, |out, found| {
        for unit in found.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    })
}

/// What happened, in which others may have written a part, without advice of theirs: `Next:` is shown as an escape.
pub(crate) fn unadvised(text: &str) -> Cow<'_, str> {
    match text.contains("Next:") {
        true => Cow::Owned(text.replace("Next:", "Next\\u{3a}")),
        false => Cow::Borrowed(text),
    }
}

fn escaped(text: &str, may_stand: impl Fn(char) -> bool, escape: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if text.chars().all(&may_stand) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for found in text.chars() {
        if may_stand(found) {
            out.push(found);
        } else {
            escape(&mut out, found);
        }
    }
    Cow::Owned(out)
}

/// As the standard library's tables have it. A mark that combines with the character before it is visible.
fn is_visible(found: char) -> bool {
    match found {
        ' '..='~' => true,
        _ if found.is_ascii() => false,
        _ => {
            let after_a_letter: String = ['a', found].iter().collect();
            after_a_letter.escape_debug().count() == 2
        }
    }
}

/// A text as one word of a shell command, such as the value in `--vm=…`: quoted where a shell would take it for something
/// else, as bash and zsh read it.
pub(crate) fn quoted(text: impl Display) -> String {
    let text = text.to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "_./:@%+=,-".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text;
    }
    if text.chars().all(is_visible) {
        return format!("'{}'", text.replace('\'', "'\\''"));
    }
    let mut out = String::from("$'");
    for found in text.chars() {
        match found {
            '\'' | '\\' => out.extend(['\\', found]),
            _ if is_visible(found) => out.push(found),
            _ if found.is_ascii() => {
                let _ = write!(out, "\\x{:02x}", u32::from(found));
            }
            _ => {
                let _ = write!(out, "\\U{:08x}", u32::from(found));
            }
        }
    }
    out.push('\'');
    out
}

/// A name or a path as the operand of a command of virsh or virtseal, behind all its options: one that begins with a dash is
/// kept from being read as an option.
pub(crate) fn word(text: impl Display) -> String {
    let word = quoted(text);
    let is_option = word.trim_start_matches(['$', '\'']).starts_with('-');
    if is_option { format!("-- {word}") } else { word }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_shown() {
        for (text, shown) in [
            (
                "web01 käse 例 e\u{301} 'a' \"b\" \\",
                "web01 käse 例 e\u{301} 'a' \"b\" \\",
            ),
            ("\u{1b}]0;owned\u{7}", "\\u{1b}]0;owned\\u{7}"),
            ("a\nb\tc\r", "a\\nb\\tc\\r"),
            ("\u{9b}2J\u{7f}", "\\u{9b}2J\\u{7f}"),
            (
                "\u{202e}\u{2066}\u{200b}\u{feff}\u{2028}",
                "\\u{202e}\\u{2066}\\u{200b}\\u{feff}\\u{2028}",
            ),
            ("\u{e0041}", "\\u{e0041}"),
        ] {
            assert_eq!(visible(text), shown);
        }
    }

    #[test]
    fn json_stays_the_same_document() {
        let value = serde_json::json!({ "name": "\u{1b}[2J\u{9b}x\u{202e}\u{e0041}\n", "ok": "käse" });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = visible_json(&text);
        assert!(shown.chars().all(|c| c == '\n' || is_visible(c)), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    /// What bash makes of it, one argument a NUL.
    fn arguments(command: &str) -> Vec<String> {
        let script = format!("printf '%s\\0' {command}");
        let output = Command::new("bash")
            .args(["-c", &script])
            .env("LC_ALL", "C.UTF-8")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    #[test]
    fn a_name_that_looks_like_an_option_is_none() {
        assert_eq!(word("-rf"), "-- -rf");
        assert_eq!(word("--all x"), "-- '--all x'");
        assert_eq!(word("-\u{1b}"), "-- $'-\\x1b'");
        assert_eq!(word("web01"), "web01");
        assert_eq!(word(""), "''");
    }

    /// A name or a path inside of a command goes through [`word`] or [`quoted`], so it can't be captured by the format string.
    #[test]
    fn no_command_holds_a_name_as_it_is() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut directories = vec![root.join("src"), root.join("../hooks/src")];
        let (mut files, mut found) = (0, Vec::new());
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|ending| ending == "rs") {
                    files += 1;
                    let text = std::fs::read_to_string(&path).unwrap();
                    let lines = text
                        .lines()
                        .zip(1..)
                        .filter(|(line, _)| captures_in_a_command(line));
                    found.extend(lines.map(|(line, number)| format!("{}:{number}: {line}", path.display())));
                }
            }
        }
        assert!(files > 100, "{files} files");
        assert!(found.is_empty(), "{}", found.join("\n"));
    }

    fn captures_in_a_command(line: &str) -> bool {
        let is_name = |name: &str| {
            !["id", "verb"].contains(&name) && name.starts_with(|c: char| c.is_ascii_lowercase())
        };
        ["virsh ", "virtseal vm ", "virtseal volume "]
            .iter()
            .any(|start| {
                let commands = line.split(start).skip(1);
                // What comes behind is prose again.
                let words = commands.filter_map(|rest| rest.split([',', ';', ':', ')', '(']).next());
                words
                    .flat_map(|command| command.split('{').skip(1))
                    .filter_map(|rest| rest.split_once('}'))
                    .any(|(name, _)| is_name(name))
            })
    }

    #[test]
    fn the_search_for_captured_names_finds_one() {
        assert!(captures_in_a_command(
            &["\"next: virsh start {", "name}\""].concat()
        ));
        assert!(captures_in_a_command(
            &["\"virtseal vm seal {", "vm}: it goes on\""].concat()
        ));
        assert!(!captures_in_a_command("\"next: virsh start {}\", word(name)"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_shell_reads_back_what_was_quoted(text in "([a-z$`'\"\\\\ ;&|<>(){}*?!#~-]|[^\0]){0,20}") {
            let bare = quoted(&text);
            prop_assert!(bare.chars().all(is_visible), "{}", bare);
            prop_assert_eq!(arguments(&bare), [text.clone()]);
            let given = arguments(&word(&text));
            prop_assert_eq!(given.last(), Some(&text));
        }
    }
}
