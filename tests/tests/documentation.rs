//! The documentation as it is printed: transcripts are run, line by line, and show what they say; commands of other programs exist.
//!
//! `VIRTSEAL_UPDATE_DOCS=1` writes what is shown now into pages that say otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::pages::{Block, BlockKind, Exchange, Page, pages, repository, simple_commands};
use virtseal_testkit::terminal::{at_terminal, is_as_printed, is_secret};
use virtseal_testkit::{Accelerator, Host, SealedHost, built_program, require_programs};

const TUTORIAL: &str = "docs/tutorial.md";
const IMAGE: &str = "debian-12-genericcloud-amd64.qcow2";
/// Where the commands of a page are run.
const DIRECTORY: &str = "/run/desk";
/// The VM of every page but the tutorial: sealed, off, and has run.
const VM: &str = "web01";

/// Programs that this machine need not have.
const ELSEWHERE: &[&str] = &[
    "bao",
    "vault",
    "dnf",
    "setsebool",
    "wget",
    "virtseal",
    "virtseald",
];

fn transcripts(page: &Page) -> Vec<Block> {
    let blocks = page.blocks().into_iter();
    blocks
        .filter(|block| block.kind == BlockKind::Transcript)
        .collect()
}

#[test]
fn the_tutorial_shows_what_is_printed() -> Result<()> {
    let page = pages()?.into_iter().find(|page| page.name == TUTORIAL);
    let page = page.context(TUTORIAL)?;
    let mut desk = Desk::bare()?;
    desk.set_out_image()?;
    desk.follow(&page)
}

#[test]
fn every_other_page_shows_what_is_printed() -> Result<()> {
    let mut seen = 0;
    let mut wrong = Vec::new();
    for page in pages()? {
        if page.name != TUTORIAL && !transcripts(&page).is_empty() {
            seen += 1;
            if let Err(error) = Desk::with_a_sealed_vm().and_then(|mut desk| desk.follow(&page)) {
                wrong.push(format!("{error:#}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    ensure!(seen > 3, "only {seen} pages have transcripts");
    Ok(())
}

/// A host, and somebody at its terminal.
struct Desk(SealedHost);

impl Desk {
    /// Without a provider.
    fn bare() -> Result<Self> {
        let mut sealed = SealedHost::start_without_provider(Host::builder())?;
        // Which this machine has, in place of the package's.
        sealed.configure("socket_group: root\n")?;
        sealed.kill_and_restart()?;
        Ok(Self(sealed))
    }

    /// With a provider `main`, and beside the VM the XML that it had before it was sealed.
    fn with_a_sealed_vm() -> Result<Self> {
        let desk = Self::bare()?;
        let (spec, sealed) = (SealedHost::spec(VM), &desk.0);
        let passphrase = sealed.passphrase_file()?.display().to_string();
        sealed.run(&[
            "provider",
            "add",
            "native",
            "main",
            "--passphrase-file",
            &passphrase,
        ])?;
        sealed.run(&[
            "provider",
            "backup",
            "main",
            "-o",
            "/run/main.age",
            "--no-passphrase",
        ])?;
        let (disk, uuid) = (spec.disk.display().to_string(), spec.uuid.to_string());
        sealed.run(&["volume", "create", &disk, "--size", "64M", "--vm", &uuid])?;
        // A console that a log is kept of is warned about.
        let xml = spec.xml();
        let (before, rest) = xml.split_once("<serial ").context("no serial port")?;
        let (_, after) = rest.split_once("</serial>").context("no end of it")?;
        let xml = [before, after].concat();
        sealed.host().define_xml(&xml)?;
        sealed.run(&["vm", "seal", VM])?;
        sealed.expect_start(VM)?;
        let directory = desk.0.host().path(DIRECTORY);
        fs::create_dir(&directory)?;
        fs::write(directory.join(format!("{VM}.xml")), xml)?;
        Ok(desk)
    }

    /// In place of what is downloaded.
    fn set_out_image(&self) -> Result<()> {
        let host = self.0.host();
        let guest = host.guest_disk("guest")?.display().to_string();
        let script = "mkdir $2; cd $2; qemu-img convert -f raw -O qcow2 $1 $3; sha512sum $3 >SHA512SUMS";
        let download = ["sh", "-ec", script, "sh", &guest, DIRECTORY, IMAGE];
        host.run(&download)?.succeeded().map(drop)
    }

    /// Runs all transcripts of a page.
    fn follow(&mut self, page: &Page) -> Result<()> {
        let mut lines: Vec<_> = page.text.lines().map(str::to_owned).collect();
        let (mut wrong, mut moved) = (Vec::new(), 0);
        for block in transcripts(page) {
            for exchange in block.exchanges()? {
                let shown = self.run(&exchange).with_context(|| page.name.clone())?;
                if is_as_printed(&exchange.printed, &shown) {
                    continue;
                }
                let from = (exchange.line - 1).saturating_add_signed(moved);
                let old = exchange.printed.len();
                let mut new: Vec<_> = shown.trim_end().lines().map(str::to_owned).collect();
                if !new.is_empty() && lines.get(from + old).is_some_and(|next| next.starts_with("# ")) {
                    new.push(String::new());
                }
                moved += new.len().cast_signed() - old.cast_signed();
                drop(lines.splice(from..from + old, new));
                wrong.push(format!(
                    "{}:{}: `{}` shows\n{shown}\nand not\n{}",
                    page.name,
                    exchange.line,
                    exchange.command,
                    exchange.printed.join("\n")
                ));
            }
        }
        if !wrong.is_empty() && std::env::var_os("VIRTSEAL_UPDATE_DOCS").is_some() {
            fs::write(repository().join(&page.name), lines.join("\n") + "\n")?;
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
        Ok(())
    }

    fn run(&mut self, exchange: &Exchange) -> Result<String> {
        // There is no systemd: what it would do is done here.
        if let Some(words) = exchange.command.strip_prefix("systemctl ") {
            let (verb, units) = words.split_once(' ').context("no unit")?;
            ensure!(units.contains("virtseald"), "{units}");
            match verb {
                "stop" => self.0.stop_daemon(Signal::SIGTERM)?,
                "start" => self.0.start_daemon()?,
                "restart" => {
                    self.0.stop_daemon(Signal::SIGTERM)?;
                    self.0.start_daemon()?;
                }
                "reload" => self.0.daemon()?.signal(Signal::SIGHUP)?,
                verb => bail!("nothing stands in for systemctl {verb}"),
            }
            return Ok(String::new());
        }
        let program = built_program("virtseal")?;
        let programs = program.parent().context("a file in a directory")?;
        let path = std::env::var("PATH").context("PATH")?;
        let mut script = self.0.host().command("script");
        script
            .env("PATH", format!("{}:{path}", programs.display()))
            .env("NO_COLOR", "1")
            .env("TERM", "xterm");
        // As virt-install chooses by itself, except where there is a /dev/kvm that does not work.
        let virtualization = Accelerator::of_this_machine().domain_type();
        let install = format!("virt-install --virt-type {virtualization} ");
        let command = exchange.command.replace("virt-install ", &install);
        let line = format!("cd {DIRECTORY}; {command}");
        at_terminal(script, &line, |prompt| match is_secret(prompt) {
            true => SealedHost::PASSPHRASE.to_owned(),
            false => typed(&exchange.printed, prompt),
        })
    }
}

/// What the page shows behind a prompt, by the end of which it is found.
fn typed(printed: &[String], prompt: &str) -> String {
    let words: Vec<_> = prompt.split_whitespace().collect();
    let end = words[words.len().saturating_sub(2)..].join(" ");
    let behind = printed.iter().find_map(|line| line.split_once(&end));
    behind.map(|(_, word)| word.trim().to_owned()).unwrap_or_default()
}

/// A virsh or virt-install that has no such command or option shows it on a page at the latest here.
#[test]
fn every_command_of_another_program_exists() -> Result<()> {
    require_programs(&[("virsh", "libvirt-clients"), ("virt-install", "virtinst")])?;
    let (mut wrong, mut elsewhere, mut seen) = (Vec::new(), BTreeSet::<&str>::new(), 0);
    let mut help = Help::default();
    for page in pages()? {
        for block in page.blocks() {
            for line in block.commands().with_context(|| page.name.clone())? {
                for words in simple_commands(&line) {
                    let words: Vec<_> = words.iter().map(String::as_str).collect();
                    seen += 1;
                    elsewhere.extend(ELSEWHERE.iter().copied().find(|program| *program == words[0]));
                    if let Some(why) = help.contradicts(&words)? {
                        wrong.push(format!("{}:{}: `{line}`: {why}", page.name, block.line));
                    }
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    ensure!(seen > 100, "only {seen} commands were found");
    ensure!(
        elsewhere.len() == ELSEWHERE.len(),
        "no page has all of {ELSEWHERE:?}"
    );
    Ok(())
}

/// What programs say of themselves.
#[derive(Default)]
struct Help(BTreeMap<Vec<String>, Option<String>>);

impl Help {
    fn of(&mut self, asked: &[&str]) -> Result<Option<&str>> {
        let key: Vec<_> = asked.iter().map(|word| (*word).to_owned()).collect();
        if !self.0.contains_key(&key) {
            let output = std::process::Command::new(asked[0]).args(&asked[1..]).output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            self.0
                .insert(key.clone(), output.status.success().then_some(text));
        }
        Ok(self.0[&key].as_deref())
    }

    /// Why there is no such command.
    fn contradicts(&mut self, words: &[&str]) -> Result<Option<String>> {
        let program = words[0];
        let help = match words {
            ["virsh", command, ..] => self.of(&["virsh", "help", command])?,
            [program, ..] if program.starts_with("virt-") => self.of(&[program, "--help"])?,
            [program, ..] if ELSEWHERE.contains(program) => return Ok(None),
            [program, ..] => {
                let found = self.of(&["sh", "-c", &format!("command -v -- '{program}'")])?;
                return Ok(found.is_none().then(|| format!("there is no {program} here")));
            }
            [] => return Ok(None),
        };
        let Some(help) = help else {
            return Ok(Some(format!("{program} knows no such command")));
        };
        let options = words.iter().filter(|word| word.starts_with("--"));
        let mut options = options.map(|option| option.split('=').next().unwrap_or_default());
        let known = |option: &str| {
            let mut words = help.split(|c: char| !c.is_alphanumeric() && c != '-');
            words.any(|word| word == option)
        };
        let unknown = options.find(|option| !known(option));
        Ok(unknown.map(|option| format!("{program} has no {option}")))
    }
}
