//! What stories tell virtseal to do, and ask it.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::SealedHost;
use crate::{Output, built_program, contract, wait_until};

const COPIES_DEADLINE: Duration = Duration::from_secs(60);

impl SealedHost {
    /// Runs the command line.
    ///
    /// # Errors
    /// When it can't be started, or prints another document than scripts are promised; what it answers is in the output.
    pub fn virtseal(&self, arguments: &[&str]) -> Result<Output> {
        let program = built_program("virtseal")?;
        let program = program.to_str().context("a UTF-8 path")?;
        let output = self.host.run(&[&[program], arguments].concat())?;
        if contract::is_promised(arguments) {
            contract::check(arguments, output.code(), &output.stdout)?;
        }
        Ok(output)
    }

    /// Runs the command line, which must succeed, and returns what it prints.
    ///
    /// # Errors
    /// When it fails; the message has all that it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.virtseal(arguments)?.succeeded()
    }

    /// Runs the command line, which must end with the exit code `code`, and returns what it says.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub fn refused(&self, code: i32, arguments: &[&str]) -> Result<String> {
        let output = self.virtseal(arguments)?;
        ensure!(output.code() == Some(code), "expected {code}: {output:?}");
        Ok(output.stderr)
    }

    /// Runs the command line with `input` on its standard input, such as a passphrase.
    ///
    /// # Errors
    /// When it can't be started; what it answers is in the output.
    pub fn virtseal_reading(&self, input: &str, arguments: &[&str]) -> Result<Output> {
        let mut child = self
            .host
            .command(built_program("virtseal")?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("virtseal did not start")?;
        let mut stdin = child.stdin.take().context("virtseal has no standard input")?;
        // One that ends without reading says why.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output()?;
        Ok(Output::new(format!("virtseal {}", arguments.join(" ")), &output))
    }

    /// Runs the command line at a terminal where these lines are typed. All that is shown is in `stdout`.
    ///
    /// # Errors
    /// When it can't be started; what it answers is in the output.
    pub fn virtseal_at_a_terminal(&self, arguments: &[&str], typed: &[&str]) -> Result<Output> {
        let quoted = |word: &&str| format!("'{word}'");
        let words: Vec<_> = [&["virtseal"], arguments].concat().iter().map(quoted).collect();
        self.at_a_terminal(&words.join(" "), typed)
    }

    /// Runs a line of shell at a terminal where these lines are typed, with the programs of virtseal in its path.
    ///
    /// # Errors
    /// As [`SealedHost::virtseal_at_a_terminal`].
    pub fn at_a_terminal(&self, line: &str, typed: &[&str]) -> Result<Output> {
        let program = built_program("virtseal")?;
        let programs = program.parent().context("a file in a directory")?;
        let path = std::env::var("PATH").context("PATH")?;
        let file = self.host.path("/run/typed");
        let lines: String = typed.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&file, lines)?;
        let output = self
            .host
            .command("script")
            .args(["--quiet", "--return", "--command", line, "/dev/null"])
            .env("PATH", format!("{}:{path}", programs.display()))
            .env("TERM", "dumb")
            .stdin(Stdio::from(std::fs::File::open(&file)?))
            .output()
            .context("script did not start")?;
        Ok(Output::new(line.to_owned(), &output))
    }

    /// What a command that must be refused with the exit code `code` answers with `--json`.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub fn refused_json(&self, code: i32, arguments: &[&str]) -> Result<Value> {
        let output = self.virtseal(&[arguments, &["--json"]].concat())?;
        ensure!(output.code() == Some(code), "expected {code}: {output:?}");
        serde_json::from_str(&output.stdout).with_context(|| format!("no JSON: {output:?}"))
    }

    /// What a command answers with `--json`.
    ///
    /// # Errors
    /// When it fails, or prints anything else.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let answer = self.run(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&answer).with_context(|| format!("no JSON: {answer}"))
    }

    /// Unlocks the provider `main`.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn unlock(&self) -> Result<()> {
        self.unlock_provider("main")
    }

    /// Unlocks a provider that takes [`SealedHost::PASSPHRASE`].
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn unlock_provider(&self, name: &str) -> Result<()> {
        let file = self.passphrase_file()?;
        let file = file.to_str().context("a UTF-8 path")?;
        self.run(&["provider", "unlock", name, "--passphrase-file", file])
            .map(drop)
    }

    /// Locks the provider `main`.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn lock(&self) -> Result<()> {
        self.run(&["provider", "lock", "main"]).map(drop)
    }

    /// What virtseal shows of a provider.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn provider(&self, name: &str) -> Result<Value> {
        Ok(self.json(&["provider", "show", name])?["provider"].take())
    }

    /// The job that was begun last.
    ///
    /// # Errors
    /// When there is none.
    pub fn last_job(&self) -> Result<Value> {
        let jobs = self.json(&["jobs"])?;
        let jobs = jobs["jobs"].as_array();
        jobs.and_then(|jobs| jobs.last()).cloned().context("no job")
    }

    /// Waits until only `left` copies of envelopes are behind.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn wait_for_copies(&self, left: u64) -> Result<()> {
        wait_until(COPIES_DEADLINE, "the copies to follow", || {
            let behind = &self.json(&["jobs"])?["stale_copies"];
            Ok((behind.as_u64().context("no stale_copies")? == left).then_some(()))
        })
    }
}

/// The codes of a list of a document, such as its steps.
#[must_use]
pub fn codes(list: &Value) -> Vec<&str> {
    let said = list.as_array().into_iter().flatten();
    said.filter_map(|said| said["code"].as_str()).collect()
}

/// Checks that a message has each of `parts`.
///
/// # Errors
/// It lacks one.
pub fn expect_names(message: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(message.contains(part), "{part:?} is not in {message:?}");
    }
    Ok(())
}
