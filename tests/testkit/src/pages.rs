//! The pages of the documentation, and the blocks of code in them.
//!
//! What a block is shows in how it is written, so that none is left out by mistake:
//!
//! - an indented one has commands, as a shell takes them;
//! - one that is fenced as `console` is what somebody sees at a terminal: commands behind `# `, and what they print, where `…` stands for what
//!   differs, alone on a line for any number of lines;
//! - one that is fenced as anything else has that language.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Before each command of a transcript.
const PROMPT: &str = "# ";
const INDENT: &str = "    ";
const FENCE: &str = "```";

/// A page.
#[derive(Clone, Debug)]
pub struct Page {
    /// From the root of the repository on.
    pub name: String,
    /// All of it.
    pub text: String,
}

/// What a block is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// Commands to be run.
    Commands,
    /// Commands, and what they print.
    Transcript,
    /// Text in a language, which is empty where the fence names none.
    Text(String),
}

/// A block of code.
#[derive(Clone, Debug)]
pub struct Block {
    /// What it is.
    pub kind: BlockKind,
    /// The line of the page that it begins in, counted from 1: of a fenced one the line after the fence.
    pub line: usize,
    /// Its lines, without what indents them.
    pub lines: Vec<String>,
}

/// A command of a transcript, and what it prints.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// As it is typed.
    pub command: String,
    /// Where that is printed: the line of the page after the command, counted from 1.
    pub line: usize,
    /// The lines that are printed.
    pub printed: Vec<String>,
}

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All pages that are installed.
///
/// # Errors
/// One can't be read.
pub fn pages() -> Result<Vec<Page>> {
    let root = repository();
    let mut files = markdown_in(&root)?;
    files.extend(markdown_in(&root.join("packaging/doc"))?);
    let mut open = vec![root.join("docs")];
    while let Some(directory) = open.pop() {
        files.extend(markdown_in(&directory)?);
        let entries = fs::read_dir(&directory)?.collect::<Result<Vec<_>, _>>()?;
        open.extend(
            entries
                .iter()
                .map(fs::DirEntry::path)
                .filter(|path| path.is_dir()),
        );
    }
    files.sort();
    files.iter().map(|file| page(&root, file)).collect()
}

fn markdown_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    Ok(paths.into_iter().filter(is_page).collect())
}

fn page(root: &Path, file: &Path) -> Result<Page> {
    Ok(Page {
        name: file.strip_prefix(root)?.display().to_string(),
        text: fs::read_to_string(file).with_context(|| file.display().to_string())?,
    })
}

impl Page {
    /// Its blocks of code.
    #[must_use]
    pub fn blocks(&self) -> Vec<Block> {
        let lines: Vec<_> = self.text.lines().collect();
        let (mut blocks, mut at) = (Vec::new(), 0);
        while at < lines.len() {
            let (kind, end) = match lines[at].trim_start().strip_prefix(FENCE) {
                Some(language) => {
                    at += 1;
                    let is_end = |line: &&str| line.trim_start().starts_with(FENCE);
                    let length = lines[at..].iter().take_while(|line| !is_end(line)).count();
                    (of_fence(language.trim()), at + length)
                }
                None if lines[at].starts_with(INDENT) && (at == 0 || lines[at - 1].trim().is_empty()) => {
                    let is_in = |line: &&&str| line.starts_with(INDENT) || line.trim().is_empty();
                    (
                        BlockKind::Commands,
                        at + lines[at..].iter().take_while(is_in).count(),
                    )
                }
                None => {
                    at += 1;
                    continue;
                }
            };
            let of_block = lines[at..end].iter();
            let of_block = of_block.map(|line| line.strip_prefix(INDENT).unwrap_or(line).to_owned());
            let lines = match kind {
                BlockKind::Commands => of_block.collect(),
                _ => lines[at..end].iter().map(|line| (*line).to_owned()).collect(),
            };
            let line = at + 1;
            at = end + usize::from(kind != BlockKind::Commands);
            blocks.push(Block { kind, line, lines });
        }
        blocks
    }
}

fn of_fence(language: &str) -> BlockKind {
    match language {
        "console" => BlockKind::Transcript,
        language => BlockKind::Text(language.to_owned()),
    }
}

impl Block {
    /// The commands of a transcript, each with what it prints.
    ///
    /// # Errors
    /// It begins with something else.
    pub fn exchanges(&self) -> Result<Vec<Exchange>> {
        let mut exchanges: Vec<Exchange> = Vec::new();
        for (at, line) in self.lines.iter().enumerate() {
            match (line.strip_prefix(PROMPT), exchanges.last_mut()) {
                (Some(command), _) => exchanges.push(Exchange {
                    command: command.to_owned(),
                    line: self.line + at + 1,
                    printed: Vec::new(),
                }),
                (None, Some(exchange)) => exchange.printed.push(line.clone()),
                (None, None) => anyhow::bail!("line {}: no command before {line:?}", self.line + at),
            }
        }
        Ok(exchanges)
    }

    /// What is given to the shell: lines with commands, each on one line.
    ///
    /// # Errors
    /// As [`Block::exchanges`].
    pub fn commands(&self) -> Result<Vec<String>> {
        Ok(match self.kind {
            BlockKind::Text(_) => Vec::new(),
            BlockKind::Transcript => self.exchanges()?.into_iter().map(|one| one.command).collect(),
            BlockKind::Commands => {
                let joined = self.lines.join("\n").replace("\\\n", " ");
                let lines = joined.lines().map(str::trim).filter(|line| !line.is_empty());
                lines.map(str::to_owned).collect()
            }
        })
    }
}

/// The simple commands of a line of shell, each as its words: without comments, variables before it, and where its input and output are.
#[must_use]
pub fn simple_commands(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let (mut word, mut quote, mut is_file) = (None::<String>, None, false);
    let mut chars = line.chars();
    let end = |word: &mut Option<String>, is_file: &mut bool, commands: &mut Vec<Vec<String>>| {
        if let Some(word) = word.take() {
            let command = commands.last_mut().expect("there is always one");
            let is_variable = command.is_empty() && word.contains('=') && !word.starts_with('-');
            if !std::mem::take(is_file) && !is_variable {
                command.push(word);
            }
        }
    };
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(chars.next()),
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() => end(&mut word, &mut is_file, &mut commands),
            (None, '|' | '&' | ';' | '(' | ')') => {
                end(&mut word, &mut is_file, &mut commands);
                commands.push(Vec::new());
            }
            (None, '<' | '>') => {
                // The number of a descriptor.
                if word.as_ref().is_some_and(|word| word.parse::<u8>().is_ok()) {
                    word = None;
                }
                end(&mut word, &mut is_file, &mut commands);
                is_file = true;
            }
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    end(&mut word, &mut is_file, &mut commands);
    commands.retain(|command| !command.is_empty());
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(text: &str) -> Page {
        Page {
            name: "page.md".into(),
            text: text.into(),
        }
    }

    #[test]
    fn every_block_is_found_as_what_it_is() {
        let text = "Words\n    that go on.\n\n    one \\\n      two\n\n    three   # why\n\n```console\n# first\nsays\n\n# second\n```\n```xml\n<a/>\n```\n```\nx\n```\n";
        let blocks = page(text).blocks();
        let kinds: Vec<_> = blocks.iter().map(|block| (&block.kind, block.line)).collect();
        let text = |language: &str| BlockKind::Text(language.to_owned());
        assert_eq!(
            kinds,
            [
                (&BlockKind::Commands, 4),
                (&BlockKind::Transcript, 10),
                (&text("xml"), 16),
                (&text(""), 19)
            ]
        );
        assert_eq!(blocks[0].commands().unwrap(), ["one    two", "three   # why"]);
        let exchanges = blocks[1].exchanges().unwrap();
        assert_eq!((&*exchanges[0].command, exchanges[0].line), ("first", 11));
        assert_eq!(exchanges[0].printed, ["says", ""]);
        assert!(exchanges[1].printed.is_empty());
    }

    #[test]
    fn lines_are_taken_apart_as_a_shell_does() {
        let commands = |line| simple_commands(line);
        assert_eq!(
            commands("A=1 make deb && apt install ./a_*.deb  # for all"),
            [vec!["make", "deb"], vec!["apt", "install", "./a_*.deb"]]
        );
        assert_eq!(
            commands("a 'b c' \"d # e\" f\\ g > out 2>&1 | h <in; i#j"),
            [vec!["a", "b c", "d # e", "f g"], vec!["h"], vec!["i#j"]]
        );
        assert!(commands("# nothing").is_empty());
    }
}
