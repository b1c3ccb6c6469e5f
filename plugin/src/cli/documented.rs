//! That README, docs and man pages name every command and setting, and that neither they nor any message name one that is not there.

mod blocks;
mod followed;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};

use super::Cli;

const PROGRAM: &str = "virtseal";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files below `dir` that end like this.
fn files(dir: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false if path.extension().is_some_and(|found| found == extension) => found.push(path),
                false => {}
            }
        }
    }
    found
}

/// With the global options in every command.
fn built() -> Command {
    let mut command = Cli::command();
    command.build();
    command
}

/// What is wrong with `words`, which follow `command`; checked as far as they are plain words.
fn unknown_in(mut command: &Command, words: &[&str]) -> Option<String> {
    for word in words {
        let plain = word.trim_end_matches(['.', ',', ';', ':', ')', '\'', '…', ']']);
        let option = plain.trim_start_matches(['[', '(']).strip_prefix("--");
        if let Some(long) = option.map(|long| long.split('=').next().unwrap_or_default()) {
            let is_known = long.is_empty()
                || long.contains('{')
                || ["help", "version"].contains(&long)
                || command.get_arguments().any(|argument| {
                    let aliases = argument.get_visible_aliases().unwrap_or_default();
                    argument.get_long() == Some(long) || aliases.contains(&long)
                });
            if !is_known {
                return Some(format!("'{}' has no --{long}", command.get_name()));
            }
        } else if command.has_subcommands() {
            let is_a_word = plain.chars().all(|letter| letter.is_ascii_lowercase()) && !plain.is_empty();
            match command.find_subcommand(plain) {
                Some(next) => command = next,
                None if is_a_word => return Some(format!("'{}' has no '{plain}'", command.get_name())),
                None => return None,
            }
        }
        if plain != *word && !word.ends_with('…') {
            return None;
        }
    }
    None
}

/// The code in a text of Markdown: indented lines, fenced ones, and what is between backticks.
fn code_in(text: &str) -> Vec<String> {
    let mut code = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        fenced ^= line.starts_with("```");
        if fenced || line.starts_with("    ") {
            code.push(line.split(" # ").next().unwrap_or_default().trim().to_owned());
        }
    }
    // A span may go over the end of a line.
    let text = text.replace("```", "").replace('\n', " ");
    code.extend(
        text.split('`')
            .skip(1)
            .step_by(2)
            .map(|span| span.replace('\\', "")),
    );
    code
}

/// The words after each `virtseal` that begins a command.
fn commands_in(code: &str) -> Vec<Vec<&str>> {
    let code = code.trim_start_matches("# ");
    code.split("&& ")
        .filter_map(|part| part.trim().strip_prefix(PROGRAM)?.strip_prefix(' '))
        .map(|rest| {
            let rest = rest.split("  #").next().unwrap_or_default();
            rest.split_whitespace().collect()
        })
        .collect()
}

#[test]
fn every_command_and_option_of_the_docs_exists() {
    let command = built();
    let mut pages = files("docs", "md");
    pages.extend(
        ["README.md", "SECURITY.md", "ARCHITECTURE.md", "CHANGELOG.md"].map(|name| root().join(name)),
    );
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for code in code_in(&text) {
            for words in commands_in(&code) {
                seen += 1;
                wrong.extend(
                    unknown_in(&command, &words).map(|why| format!("{}: `{code}`: {why}", page.display())),
                );
            }
        }
    }
    assert!(seen > 150, "only {seen} commands were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_command_of_a_message_exists() {
    let command = built();
    let groups: Vec<_> = command
        .get_subcommands()
        .filter(|group| group.has_subcommands())
        .collect();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for file in [files("plugin/src", "rs"), files("hooks/src", "rs")].concat() {
        let text = fs::read_to_string(&file).unwrap();
        let joined = text
            .split("\\\n")
            .enumerate()
            .map(|(nth, part)| if nth == 0 { part } else { part.trim_start() })
            .collect::<String>();
        for (at, _) in joined.match_indices("virtseal ") {
            let rest = joined[at + PROGRAM.len()..]
                .split(['"', '`', '\n'])
                .next()
                .unwrap_or_default();
            let words: Vec<_> = rest.split_whitespace().collect();
            let before = joined[..at].to_ascii_lowercase();
            // Elsewhere it may be the beginning of a sentence.
            let is_advice = ["next: ", "then ", ".next(\"", ".next(format!(\""]
                .iter()
                .any(|lead| before.ends_with(lead));
            let in_group = words
                .first()
                .is_some_and(|first| groups.iter().any(|group| group.get_name() == *first));
            if is_advice || (in_group && words.len() > 1) {
                seen += 1;
                wrong.extend(
                    unknown_in(&command, &words)
                        .map(|why| format!("{}: virtseal{rest}: {why}", file.display())),
                );
            }
        }
    }
    assert!(seen > 100, "only {seen} commands were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The first cell of each row of docs/messages.md has a message in backticks, with … for what differs.
#[test]
fn every_message_that_is_explained_can_be_given() {
    let sources: Vec<_> = [files("plugin/src", "rs"), files("hooks/src", "rs")]
        .concat()
        .into_iter()
        .filter(|file| !file.ends_with("documented.rs"))
        .map(|file| as_printed(&fs::read_to_string(file).unwrap()))
        .collect();
    let page = fs::read_to_string(root().join("docs/messages.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let (mut seen, mut unknown) = (0, Vec::new());
    for message in rows.filter_map(|row| row.split('`').next()) {
        seen += 1;
        let parts = message.replace("NAME", "…").replace(['(', ')'], "…");
        let mut parts = parts.split('…').map(str::trim).filter(|part| part.len() > 3);
        if !parts.all(|part| sources.iter().any(|source| source.contains(part))) {
            unknown.push(message.to_owned());
        }
    }
    assert!(seen > 25, "only {seen} messages were found");
    assert!(unknown.is_empty(), "{unknown:#?}");
}

/// Source text with the lines of a string joined, and without escapes.
fn as_printed(source: &str) -> String {
    let mut lines = source.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines.fold(first, |text, line| text + line.trim_start())
}

/// The paths of all commands without commands of their own, such as `provider add kmip`.
fn leaves(command: &Command, path: &str, found: &mut BTreeSet<String>) {
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let path = format!("{path} {}", sub.get_name());
        match sub.has_subcommands() {
            true => leaves(sub, &path, found),
            false => drop(found.insert(path.trim().to_owned())),
        }
    }
}

/// In a row of the table, `identity NAME` after `virtseal provider trust NAME` is `provider identity`.
fn named_in_row(row: &str, leaves: &BTreeSet<String>) -> BTreeSet<String> {
    let spans: Vec<_> = row.split('`').skip(1).step_by(2).collect();
    let of = |text: &str| {
        leaves
            .iter()
            .filter(|leaf| format!("{text} ").starts_with(&format!("{leaf} ")))
            .cloned()
            .max()
    };
    let Some(first) = spans.first().and_then(|span| span.strip_prefix("virtseal ")) else {
        return BTreeSet::new();
    };
    // `virtseal jobs` is a group, and has words of its own all the same.
    let mut group = first;
    let mut named: BTreeSet<_> = of(first).into_iter().collect();
    named.extend(
        spans
            .iter()
            .filter_map(|span| of(&format!("{first} {}", span.trim_start_matches("virtseal ")))),
    );
    while let Some((outer, _)) = group.rsplit_once(' ') {
        group = outer;
        named.extend(spans.iter().filter_map(|span| of(&format!("{group} {span}"))));
    }
    named.extend(spans.iter().filter_map(|span| of(span)));
    named
}

#[test]
fn the_reference_names_every_command() {
    let page = fs::read_to_string(root().join("docs/reference/commands.md")).unwrap();
    let mut all = BTreeSet::new();
    leaves(&built(), "", &mut all);
    let named: BTreeSet<_> = page
        .lines()
        .filter(|line| line.starts_with("| `virtseal "))
        .flat_map(|row| named_in_row(row, &all))
        .collect();
    // `virtseal jobs` alone lists them.
    let absent: Vec<_> = all
        .difference(&named)
        .filter(|leaf| *leaf != "jobs list")
        .collect();
    assert!(absent.is_empty(), "the table of commands lacks {absent:?}");
}

#[test]
fn the_reference_has_every_setting_with_its_default() {
    let page = fs::read_to_string(root().join("docs/reference/settings.md")).unwrap();
    for (file, assigned) in SETTINGS {
        let (_, section) = page.split_once(&format!("\n## {file}\n")).unwrap();
        let section = section.split("\n## ").next().unwrap_or_default();
        for (key, default) in settings_in(file, assigned) {
            let row = section
                .lines()
                .find(|line| line.starts_with(&format!("| `{}`", key.trim())))
                .unwrap_or_else(|| panic!("settings.md, {file}, lacks {key}"));
            let cell = row.split('|').nth(2).unwrap_or_default();
            assert_eq!(cell.trim_matches(['`', ' ']), default, "{file}: {row}");
        }
    }
}

/// The files of settings, and what stands between a key and its value.
const SETTINGS: [(&str, char); 2] = [("virtseald.yaml", ':'), ("hook.conf", '=')];

/// Keys and defaults of a file as installed, where each is a comment. Those of a section are indented by two.
fn settings_in(file: &str, assigned: char) -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("packaging/config").join(file)).unwrap();
    let is_key = |key: &str| {
        let word = key.strip_prefix("  ").unwrap_or(key);
        !word.is_empty()
            && word
                .chars()
                .all(|letter| letter.is_ascii_lowercase() || letter == '_')
    };
    let found: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix('#')?.split_once(assigned))
        .map(|(key, value)| (key.trim_end().to_owned(), value.trim().to_owned()))
        .filter(|(key, _)| is_key(key))
        .collect();
    assert!(found.len() > 4, "{file}: {found:?}");
    found
}

#[test]
fn the_man_pages_have_every_setting_with_its_default() {
    for (file, assigned) in SETTINGS {
        let path = root().join("packaging/manual").join(format!("{file}.5"));
        let page = fs::read_to_string(path).unwrap().replace("\\-", "-");
        let headings: Vec<_> = page.lines().filter(|line| line.starts_with("\\fB")).collect();
        for (key, default) in settings_in(file, assigned) {
            let heading = headings
                .iter()
                .find(|line| line.starts_with(&format!("\\fB{}\\fR", key.trim_start())));
            let heading = heading.unwrap_or_else(|| panic!("{file}(5) lacks {key}"));
            assert!(
                default.is_empty() || heading.ends_with(&format!("({default})")),
                "{file}(5): {heading}, but the default is {default}"
            );
        }
    }
}
