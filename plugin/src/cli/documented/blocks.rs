//! That each block of code in README and docs is what it looks like: commands that this program takes, settings that virtseald takes,
//! or text. What is shown as typed at a terminal is run by the stories of `tests/tests/documentation.rs`.

use std::path::Path;
use std::process::Command;

use clap::Parser;
use clap::error::ErrorKind;
use virtseal_testkit::pages::{Block, BlockKind, pages, repository, simple_commands};

use super::super::Cli;
use super::super::advised::filled;
use crate::config::Config;

/// Why this program would not take these words.
fn refused(words: &[String]) -> Option<String> {
    // "…" stands for what only the admin knows, and brackets are around what may be left out.
    let is_cut = words.iter().any(|word| word.contains('…'));
    let plain = words.iter().filter(|word| *word != "…" && !word.starts_with('['));
    let error = Cli::try_parse_from(plain.map(|word| filled(word))).err()?;
    let is_fine = match error.kind() {
        ErrorKind::MissingRequiredArgument | ErrorKind::ValueValidation => is_cut,
        kind => matches!(kind, ErrorKind::DisplayHelp | ErrorKind::DisplayVersion),
    };
    (!is_fine).then(|| error.to_string())
}

/// Why a shell would not take a block.
fn unshelled(block: &Block) -> Option<String> {
    let checked = Command::new("bash")
        .args(["-n", "-c", &block.lines.join("\n")])
        .output();
    let checked = checked.unwrap();
    (!checked.status.success()).then(|| String::from_utf8_lossy(&checked.stderr).into_owned())
}

/// Why a text is not of its language.
fn misspelt(language: &str, text: &str) -> Option<String> {
    match language {
        "yaml" => Config::parse(text, Path::new("virtseald.yaml"))
            .err()
            .map(|error| crate::model::problem::chain(&error)),
        "xml" => crate::domain::parse_document(text)
            .err()
            .map(|error| error.to_string()),
        "json" => serde_json::from_str::<serde_json::Value>(text)
            .err()
            .map(|error| error.to_string()),
        "ini" => text
            .lines()
            .find(|line| !line.is_empty() && !line.starts_with(['#', '[']) && !line.contains('='))
            .map(|line| format!("'{line}' has no =")),
        "hcl" => {
            let of = |c| text.matches(c).count();
            (of('{') != of('}') || of('"') % 2 != 0).then(|| "something is left open".to_owned())
        }
        // What is to be run is in a block of its own.
        "text" => text
            .lines()
            .find(|line| line.starts_with("virtseal ") || line.starts_with("# "))
            .map(|line| format!("'{line}' is a command, in a block of text")),
        other => Some(format!("no test knows the language '{other}'")),
    }
}

#[test]
fn every_block_of_the_docs_is_what_it_looks_like() {
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in pages().unwrap() {
        for block in page.blocks() {
            let at = format!("{}:{}", page.name, block.line);
            match &block.kind {
                BlockKind::Text(language) => {
                    let why = misspelt(language, &block.lines.join("\n"));
                    wrong.extend(why.map(|why| format!("{at}: {why}")));
                }
                BlockKind::Transcript => {}
                BlockKind::Commands => wrong.extend(unshelled(&block).map(|why| format!("{at}: {why}"))),
            }
            let lines = block.commands().unwrap_or_else(|error| panic!("{at}: {error}"));
            for words in lines.iter().flat_map(|line| simple_commands(line)) {
                if words[0] == "virtseal" {
                    seen += 1;
                    wrong.extend(refused(&words).map(|why| format!("{at}: {words:?}: {why}")));
                }
            }
        }
    }
    assert!(seen > 80, "only {seen} commands were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The names of a page's headings, as links have them.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_leads_to_a_page_and_its_heading() {
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for page in pages().unwrap() {
        let directory = repository().join(&page.name);
        let directory = directory.parent().unwrap();
        for link in page
            .text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            if link.contains("://") {
                continue;
            }
            seen += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                repository().join(&page.name)
            } else {
                directory.join(path)
            };
            let leads = match anchor {
                "" => target.exists(),
                anchor => std::fs::read_to_string(&target)
                    .is_ok_and(|text| anchors(&text).iter().any(|heading| heading == anchor)),
            };
            wrong.extend((!leads).then(|| format!("{}: {link}", page.name)));
        }
    }
    assert!(seen > 80, "only {seen} links were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
