//! Writes what the package has of every command of virtseal: a man page, and completions for three shells.
//!
//! `make install` runs it: `virtseal-manual DIRECTORY`. It is not installed. Pages that no program can write
//! (virtseald(8) and the two files of settings) stand beside it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, Command};
use clap_complete::Shell;
use clap_mangen::Man;

const PROGRAM: &str = "virtseal";
/// What virtseal(1) says that no command's help does.
const OF_THE_PROGRAM: &str = include_str!("../virtseal.1.end");

fn main() -> anyhow::Result<()> {
    let directory: PathBuf = std::env::args_os()
        .nth(1)
        .context("usage: virtseal-manual DIRECTORY")?
        .into();
    fs::create_dir_all(&directory).with_context(|| format!("can't make {}", directory.display()))?;
    write_all(&directory).with_context(|| format!("can't write to {}", directory.display()))
}

fn write_all(directory: &Path) -> anyhow::Result<()> {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut virtseal::commands(), PROGRAM, directory)?;
    }
    let mut fish = OpenOptions::new()
        .append(true)
        .open(directory.join("virtseal.fish"))?;
    for (path, command) in all_commands() {
        fs::write(
            directory.join(format!("{}.1", path.replace(' ', "-"))),
            page(&path, &command)?,
        )?;
        // clap_complete leaves these out for fish.
        if let [_, first, second, third] = path.split(' ').collect::<Vec<_>>()[..] {
            let condition = format!(
                "__fish_virtseal_using_subcommand {first}; and __fish_seen_subcommand_from {second}; \
                 and __fish_seen_subcommand_from {third}"
            );
            fish.write_all(options_in_fish(&condition, &command).as_bytes())?;
        }
    }
    Ok(())
}

/// Every command with its path, such as `virtseal provider add`. `virtseal help …` is none.
fn all_commands() -> Vec<(String, Command)> {
    fn add(command: &Command, path: String, found: &mut Vec<(String, Command)>) {
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            add(sub, format!("{path} {}", sub.get_name()), found);
        }
        found.push((path, command.clone()));
    }
    let mut program = virtseal::commands().disable_help_subcommand(true);
    program.build();
    let mut found = Vec::new();
    add(&program, PROGRAM.to_owned(), &mut found);
    found
}

fn page(path: &str, command: &Command) -> anyhow::Result<Vec<u8>> {
    let page = Man::new(command.clone())
        .source(concat!("virtseal ", env!("CARGO_PKG_VERSION")))
        .manual(PROGRAM);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    if command
        .get_after_help()
        .or(command.get_after_long_help())
        .is_some()
    {
        let mut examples = Vec::new();
        page.render_extra_section(&mut examples)?;
        text.extend(
            String::from_utf8(examples)?
                .replace("EXTRA", "EXAMPLES")
                .replace("Examples:\n", "")
                .bytes(),
        );
    }
    if path == PROGRAM {
        text.extend(OF_THE_PROGRAM.bytes());
    } else {
        text.extend(see_also(path).bytes());
    }
    Ok(text)
}

/// From `virtseal provider add` to the pages above it.
fn see_also(path: &str) -> String {
    let above: String = path
        .match_indices(' ')
        .map(|(end, _)| format!("\\fB{}\\fR(1),\n", path[..end].replace(' ', "-")))
        .collect();
    format!(".SH \"SEE ALSO\"\n{above}\\fBvirtseald\\fR(8)\n")
}

fn options_in_fish(condition: &str, command: &Command) -> String {
    let quoted = |text: &str| text.replace('\n', " ").replace('\\', "\\\\").replace('\'', "\\'");
    let line = |option: &Arg| {
        let help = option.get_help().map(ToString::to_string).unwrap_or_default();
        let values: Vec<_> = option
            .get_possible_values()
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect();
        let value = match option.get_action().takes_values() {
            true if values.is_empty() => " -r".to_owned(),
            true => format!(" -r -f -a '{}'", values.join(" ")),
            false => String::new(),
        };
        let long = option.get_long()?;
        Some(format!(
            "complete -c virtseal -n \"{condition}\" -l {long} -d '{}'{value}\n",
            quoted(&help)
        ))
    };
    command
        .get_arguments()
        .filter(|option| !option.is_hide_set())
        .filter_map(line)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_options() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        assert!(all_commands().len() > 40);
        for (path, command) in all_commands() {
            let page = directory.path().join(format!("{}.1", path.replace(' ', "-")));
            let text = fs::read_to_string(&page)
                .unwrap()
                .replace("\\*(Aq", "'")
                .replace('\\', "");
            assert!(
                text.contains(&format!("fB{path}fR")),
                "{path}: no synopsis\n{text}"
            );
            let about = command.get_about().unwrap().to_string();
            assert!(text.contains(&about), "{path}: {about}");
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let shown = match argument.get_long() {
                    Some(long) => format!("fB--{long}fR"),
                    None => argument.get_value_names().unwrap()[0].to_string(),
                };
                assert!(text.contains(&shown), "{path}: {shown}\n{text}");
            }
            for sub in command.get_subcommands() {
                let name = format!("{}-{}", path.replace(' ', "-"), sub.get_name());
                assert!(text.contains(&format!("{name}(1)")), "{path}: {name}");
                assert!(directory.path().join(format!("{name}.1")).exists(), "{name}");
            }
        }
    }

    /// What they offer where is for each shell to say: test-deb asks.
    #[test]
    fn every_shell_completes_every_command_and_option() {
        let directory = tempfile::tempdir().unwrap();
        write_all(directory.path()).unwrap();
        for file in ["virtseal.bash", "_virtseal", "virtseal.fish"] {
            let text = fs::read_to_string(directory.path().join(file)).unwrap();
            for (path, command) in all_commands() {
                assert!(text.contains(command.get_name()), "{file}: {path}");
                let shown = command.get_arguments().filter(|argument| !argument.is_hide_set());
                for long in shown.filter_map(|argument| argument.get_long()) {
                    let is_there =
                        text.contains(&format!("--{long}")) || text.contains(&format!("-l {long}"));
                    assert!(is_there, "{file}: {path} --{long}");
                }
            }
        }
    }
}
