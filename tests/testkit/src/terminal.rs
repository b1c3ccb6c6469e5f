//! A command at a terminal of 80 columns, with somebody who answers what it asks; and whether what is shown is what a page says.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// For one command.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing more comes behind a prompt.
const SILENCE: u16 = 150;
/// Stands for what differs.
const ANYTHING: &str = "…";
/// What a machine without polkit, or a slow one, shows as well.
const NOISE: [&str; 2] = ["Authorization not available.", "virtseald is at work on it."];

/// All that a terminal shows of a line of shell. `answer` gets each prompt, and tells what is typed; a passphrase is not shown.
///
/// # Errors
/// It can't be run, or does not end.
pub fn at_terminal(mut script: Command, line: &str, answer: impl Fn(&str) -> String) -> Result<String> {
    let line = format!("stty -echo cols 80 rows 24; {line}");
    let mut child = script
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("script did not start")?;
    let mut typed = child.stdin.take().context("no standard input")?;
    let mut output = child.stdout.take().context("no standard output")?;
    let (mut shown, mut answered) = (Vec::new(), 0);
    let deadline = Instant::now() + PATIENCE;
    loop {
        ensure!(
            Instant::now() < deadline,
            "`{line}` does not end: {}",
            plain(&String::from_utf8_lossy(&shown))
        );
        let mut ready = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::from(SILENCE))? == 0 {
            let text = plain(&String::from_utf8_lossy(&shown));
            let prompt = text.rsplit('\n').next().unwrap_or_default();
            if shown.len() > answered && prompt.ends_with(": ") {
                let word = answer(prompt);
                writeln!(typed, "{word}")?;
                // As nothing is echoed; but the end of a line that is hidden is.
                if !is_secret(prompt) {
                    shown.extend(format!("{word}\n").as_bytes());
                }
                answered = shown.len();
            }
            continue;
        }
        let mut buffer = [0; 4096];
        match output.read(&mut buffer)? {
            0 => break,
            length => shown.extend(&buffer[..length]),
        }
    }
    drop(typed);
    child.wait()?;
    let text = plain(&String::from_utf8_lossy(&shown));
    let lines = text
        .lines()
        .filter(|line| !NOISE.iter().any(|noise| line.starts_with(noise)));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Whether what is typed there is not shown.
#[must_use]
pub fn is_secret(prompt: &str) -> bool {
    ["assphrase", "PIN", "Once more"]
        .iter()
        .any(|word| prompt.contains(word))
}

/// What is to be seen in the end: without colours, and without lines that were written over.
fn plain(raw: &str) -> String {
    let (mut text, mut chars) = (String::new(), raw.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => while chars.next().is_some_and(|c| !c.is_ascii_alphabetic()) {},
            '\r' if chars.peek() == Some(&'\n') => {}
            '\r' => text.truncate(text.rfind('\n').map_or(0, |at| at + 1)),
            c => text.push(c),
        }
    }
    text
}

/// Whether `shown` is what the lines of a page say it is.
#[must_use]
pub fn is_as_printed(page: &[String], shown: &str) -> bool {
    let text = page.join("\n");
    let [page, shown] = [&text, shown].map(|text| {
        let lines = text.trim_end().lines();
        lines
            .map(|line| without_examples(line.trim_end()))
            .collect::<Vec<_>>()
    });
    lines_fit(&page, &shown)
}

/// With zeroes in the place of times and UUIDs.
fn without_examples(line: &str) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-:".contains(c);
    let (mut text, mut rest) = (String::new(), line);
    while let Some(first) = rest.chars().next() {
        let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        let (word, more) = rest.split_at(length.max(first.len_utf8()));
        let zeroes = word.replace(|c: char| c.is_ascii_digit(), "0");
        let is_time = ["00:00", "0000-00-00T00:00:00Z", "0000-00-00T00-00-00Z"].contains(&zeroes.as_str());
        match uuid::Uuid::try_parse(word) {
            Ok(_) => text.push_str("UUID"),
            Err(_) if is_time => text.push_str(&zeroes),
            Err(_) => text.push_str(word),
        }
        rest = more;
    }
    text
}

fn lines_fit(page: &[String], shown: &[String]) -> bool {
    match page.split_first() {
        None => shown.is_empty(),
        Some((first, rest)) if first.trim() == ANYTHING => {
            (0..=shown.len()).any(|skipped| lines_fit(rest, &shown[skipped..]))
        }
        Some((first, rest)) => shown
            .split_first()
            .is_some_and(|(line, more)| fits(first, line) && lines_fit(rest, more)),
    }
}

fn fits(pattern: &str, line: &str) -> bool {
    let mut parts = pattern.split(ANYTHING);
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let parts: Vec<_> = parts.collect();
    let Some((last, between)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in between {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_held_against_what_is_shown() {
        let says = |page: &str, shown| {
            let page: Vec<_> = page.lines().map(str::to_owned).collect();
            is_as_printed(&page, shown)
        };
        assert!(says("a\nb …, d\n", "a\nb c, d\n\n"));
        assert!(says("a\n…\nd", "a\nb\nc\nd\n"));
        assert!(says("…\nd", "d\n"));
        assert!(!says("a", "a b"));
        assert!(!says("a …", "b a c"));
        assert!(!says("a\n…\nd", "a\nb\n"));
        assert!(!says("", "a"));
        assert!(says(
            "at 14:02 (2026-11-29T15:22:02Z)",
            "at 00:00 (2027-01-01T00:00:00Z)"
        ));
        assert!(!says("in 3 s", "in 4 s"));
        let [one, other] = [
            "…/2bb4fb9d-6840-45ec-bc30-3fd76e74a9de.",
            "1/e1d09a8e-952e-49fb-93d1-94d52047e5cd.",
        ];
        assert!(says(one, other));
    }

    #[test]
    fn what_a_terminal_shows_in_the_end() {
        assert_eq!(
            plain("10 %\r20 %\r\u{1b}[2Kdone\r\n\u{1b}[1;31mred\u{1b}[0m"),
            "done\nred"
        );
    }

    #[test]
    fn prompts_are_answered() {
        let line = "printf 'Name: '; read name; printf 'Passphrase: '; read word; echo; echo \"$name $word\"";
        let shown = at_terminal(Command::new("script"), line, |prompt| {
            (if is_secret(prompt) { "secret" } else { "web01" }).to_owned()
        });
        assert_eq!(shown.unwrap(), "Name: web01\nPassphrase: \nweb01 secret");
    }
}
