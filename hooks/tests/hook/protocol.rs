//! What each operation prints and exits with, and how long it takes, with a daemon that answers well, badly, slowly
//! or not at all.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::UUID;
use crate::daemon::{Answer, Daemon};
use tempfile::TempDir;

pub(crate) const METADATA: &str = "<metadata><virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'/></metadata>";
/// Of the tests that wait for it; the others have one that no busy machine comes to.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
pub(crate) const SHORT: &str = "deadline = 2s\n";
/// A hook that hangs is far later than this; a busy machine is not.
pub(crate) const SLACK: Duration = Duration::from_secs(30);

/// A directory with a hook.conf and a place for the socket.
pub(crate) struct Host {
    directory: TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    /// Mounts have their own tests.
    pub(crate) fn with(more: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let host = Self { directory };
        host.configure(&format!("master_key_tmpfs = off\ndeadline = 300s\n{more}"));
        host
    }

    fn configure(&self, text: &str) {
        let socket = self.socket();
        let head = format!(
            "socket = {}\nindex = {}\n",
            socket.display(),
            self.index().display()
        );
        fs::write(self.conf(), head + text).unwrap();
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.directory.path().join("hook.index")
    }

    fn conf(&self) -> PathBuf {
        self.directory.path().join("hook.conf")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("sock")
    }

    pub(crate) fn daemon(&self, answer: Answer) -> Daemon {
        Daemon::start(&self.socket(), answer)
    }

    pub(crate) fn run(&self, operation: [&str; 2], xml: &[u8]) -> Output {
        finish(self.spawn(operation), xml)
    }

    pub(crate) fn prepare(&self, xml: &str) -> Output {
        self.run(["prepare", "begin"], xml.as_bytes())
    }

    pub(crate) fn spawn(&self, operation: [&str; 2]) -> Child {
        spawn(&self.conf(), operation)
    }
}

fn spawn(conf: &Path, [operation, suboperation]: [&str; 2]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_virtseal-hook"))
        .args(["web01", operation, suboperation, "-"])
        .current_dir("/")
        .env_clear()
        .envs([
            ("LC_ALL", "C"),
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
        ])
        .env("VIRTSEAL_HOOK_CONF", conf)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(mut child: Child, xml: &[u8]) -> Output {
    // The operations that need no XML do not read it: a closed pipe is theirs to choose.
    let _ = child.stdin.take().unwrap().write_all(xml);
    child.wait_with_output().unwrap()
}

pub(crate) fn domain(metadata: &str) -> String {
    format!(
        "<domain type='kvm' id='7'>\n  <name>web01</name>\n  <uuid>{UUID}</uuid>\n  {metadata}\n</domain>\n"
    )
}

pub(crate) fn sealed() -> String {
    domain(METADATA)
}

#[track_caller]
pub(crate) fn assert_passes(output: &Output) {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert_eq!(output.status.code(), Some(0));
}

#[track_caller]
fn assert_refused(output: &Output, line: &str) {
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("{line}\n"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert_eq!(output.status.code(), Some(1));
}

#[track_caller]
pub(crate) fn assert_refused_with(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in {stderr:?}");
    }
    assert_refused(output, stderr.trim_end_matches('\n'));
}

#[test]
fn unsealed_passes_without_any_daemon() {
    let host = Host::new();
    assert_passes(&host.prepare(&domain("")));
    assert_passes(&host.prepare(&domain("<metadata><a:b xmlns:a='urn:other'/></metadata>")));
    assert_passes(&host.prepare(&domain("<description>urn:virtseal:vm:1</description>")));
    for unreadable in ["", "<domain>", "no XML", "\u{0}"] {
        assert_passes(&host.prepare(unreadable));
    }
    assert_passes(&host.run(["prepare", "begin"], b"\xff\xfe"));
}

#[test]
fn unsealed_passes_with_any_mistake_in_the_configuration() {
    let host = Host::with("colour = blue\nrequire_sealed = false\nruntime_dir = here\n");
    assert_passes(&host.prepare(&domain("")));
}

#[test]
fn sealed_starts_when_the_daemon_agrees() {
    for agreement in ["{}", r#"{"parameters":{}}"#] {
        let host = Host::new();
        let daemon = host.daemon(Answer::reply(agreement));
        assert_passes(&host.prepare(&sealed()));
        let request = daemon.request();
        assert_eq!(request["method"], "io.virtseal.Lifecycle.Prepare");
        assert_eq!(request["parameters"], serde_json::json!({ "xml": sealed() }));
    }
}

#[test]
fn a_large_domain_reaches_the_daemon_whole() {
    let host = Host::new();
    let daemon = host.daemon(Answer::reply("{}"));
    let xml = domain(&format!(
        "{METADATA}<description>{}</description>",
        "ä\"".repeat(600_000)
    ));
    assert_passes(&host.prepare(&xml));
    assert_eq!(daemon.request()["parameters"]["xml"], xml);
}

#[test]
fn the_daemons_refusal_is_shown_as_one_line_that_names_the_vm() {
    for (message, line) in [
        (
            r"web01 stays off: disk vda: provider main is locked.\nNext:\u001b virtseal provider unlock main\n",
            r"web01 stays off: disk vda: provider main is locked. Next:\u{1b} virtseal provider unlock main",
        ),
        (
            "no decision within 9 s",
            "web01 stays off: no decision within 9 s",
        ),
    ] {
        let reply =
            format!(r#"{{"error":"io.virtseal.Lifecycle.Refused","parameters":{{"message":"{message}"}}}}"#);
        let host = Host::new();
        let _daemon = host.daemon(Answer::reply(&reply));
        assert_refused(&host.prepare(&sealed()), line);
    }
}

#[test]
fn daemon_down_refuses_sealed_and_names_the_next_command() {
    let host = Host::new();
    let line = format!(
        "web01 stays off: virtseald does not listen at {} \
         (No such file or directory (os error 2)). Next: systemctl start virtseald",
        host.socket().display()
    );
    assert_refused(&host.prepare(&sealed()), &line);
    drop(std::os::unix::net::UnixListener::bind(host.socket()).unwrap());
    assert_refused_with(
        &host.prepare(&sealed()),
        &["web01", "Connection refused", "systemctl start virtseald"],
    );
}

#[test]
fn whatever_is_no_agreement_refuses() {
    let huge = "x".repeat(100_000);
    for (answer, expected) in [
        (Answer::reply("garbage"), "not a Varlink message"),
        (Answer::reply(""), "not a Varlink message"),
        (Answer::reply("[]"), "not a Varlink message"),
        (
            Answer::reply(r#"{"error":"org.varlink.service.MethodNotFound"}"#),
            "MethodNotFound",
        ),
        (Answer::reply(&huge), "does not end"),
        (Answer::HalfReply, "hung up"),
        (Answer::Close, "hung up"),
        (Answer::CloseUnread, "hung up"),
    ] {
        let host = Host::new();
        let _daemon = host.daemon(answer);
        assert_refused_with(
            &host.prepare(&sealed()),
            &["web01 stays off", expected, ". Next: systemctl"],
        );
    }
}

#[test]
fn a_daemon_that_takes_too_long_refuses_at_the_deadline() {
    for (answer, stage) in [
        (Answer::Silent, "answer"),
        (Answer::Trickle, "answer"),
        (Answer::NeverReads, "read the request"),
        (Answer::NeverAccepts, "accept a connection"),
    ] {
        let host = Host::with(SHORT);
        let _daemon = host.daemon(answer.clone());
        let xml = domain(&format!(
            "{METADATA}<description>{}</description>",
            "x".repeat(500_000)
        ));
        let start = Instant::now();
        let output = host.prepare(&xml);
        let took = start.elapsed();
        let parts = [
            &*format!("virtseald did not {stage} within {DEADLINE:?}"),
            ". Next: systemctl status virtseald",
        ];
        assert_refused_with(&output, &parts);
        assert!(
            took >= DEADLINE - Duration::from_millis(10),
            "{answer:?} took only {took:?}"
        );
        assert!(took < DEADLINE + SLACK, "{answer:?} took {took:?}");
    }
}

#[test]
fn a_slow_agreement_before_the_deadline_counts() {
    let host = Host::new();
    let _daemon = host.daemon(Answer::Late(Duration::from_millis(300)));
    assert_passes(&host.prepare(&sealed()));
}

#[test]
fn a_stdin_that_never_ends_meets_the_deadline() {
    for (xml, code) in [
        ("<domain>", 0),
        ("<domain><metadata><vm xmlns='urn:virtseal:vm:1'/>", 1),
    ] {
        let host = Host::with(SHORT);
        let mut child = host.spawn(["prepare", "begin"]);
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(xml.as_bytes()).unwrap();
        let start = Instant::now();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(start.elapsed() < DEADLINE + SLACK);
        drop(stdin);
    }
}

#[test]
fn broken_xml_of_a_sealed_vm_refuses() {
    let host = Host::new();
    let _daemon = host.daemon(Answer::reply("{}"));
    for broken in [
        sealed().replace("</domain>", ""),
        sealed().replace(UUID, "nobody"),
        sealed().replace("<name>web01</name>", ""),
        format!("<!DOCTYPE d [<!ENTITY a 'b'>]>{}", sealed()),
    ] {
        assert_refused_with(
            &host.prepare(&broken),
            &["web01 stays off: its XML ", ". Next: virsh"],
        );
    }
    let mut latin = sealed().into_bytes();
    latin.push(0xe4);
    assert_refused_with(&host.run(["prepare", "begin"], &latin), &["not UTF-8"]);
}

#[test]
fn a_mistake_in_the_configuration_refuses_sealed() {
    let host = Host::with("dead_line = 5s\n");
    let _daemon = host.daemon(Answer::reply("{}"));
    let line = format!(
        "web01 stays off: {}:5: unknown key \"dead_line\", perhaps deadline is meant. \
         Next: correct that line",
        host.conf().display()
    );
    assert_refused(&host.prepare(&sealed()), &line);
}

#[test]
fn require_sealed_refuses_every_other_vm() {
    let host = Host::with("require_sealed = true\n");
    let line = format!(
        "web01 stays off: it is not sealed, and {} has require_sealed = true. Next: systemctl start virtseald, then virtseal vm seal \
         web01",
        host.conf().display()
    );
    for os in [
        "<os firmware='efi'/>",
        "<os><loader type='pflash'>/c</loader></os>",
        "<os><nvram>/v</nvram></os>",
    ] {
        assert_refused(&host.prepare(&domain(os)), &line);
    }
    // That one can't be sealed.
    for os in ["", "<os><loader type='rom'>/c</loader></os>"] {
        let refused = host.prepare(&domain(os));
        assert_refused_with(
            &refused,
            &["boots by BIOS", "virsh edit web01: <os firmware='efi'>"],
        );
    }
    assert_refused_with(&host.prepare("<domain>"), &["web01"]);
    let unclear = Host::with("require_sealed = ja\n");
    assert_refused_with(
        &unclear.prepare(&domain("")),
        &["unclear", "hook.conf:5", "\"ja\""],
    );
}

#[test]
fn the_environment_names_another_socket() {
    let host = Host::new();
    let elsewhere = host.directory.path().join("elsewhere");
    let daemon = Daemon::start(&elsewhere, Answer::reply("{}"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_virtseal-hook"))
        .args(["web01", "prepare", "begin", "-"])
        .env("VIRTSEAL_HOOK_CONF", host.conf())
        .env("VIRTSEAL_SOCKET", &elsewhere)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(sealed().as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(daemon.request()["method"], "io.virtseal.Lifecycle.Prepare");
}

#[test]
fn the_daemon_learns_of_start_and_end() {
    for (operation, method) in [
        (["started", "begin"], "Started"),
        (["release", "end"], "Released"),
    ] {
        let host = Host::new();
        let daemon = host.daemon(Answer::reply("{}"));
        assert_passes(&host.run(operation, sealed().as_bytes()));
        let request = daemon.request();
        assert_eq!(request["method"], format!("io.virtseal.Lifecycle.{method}"));
        assert_eq!(
            request["parameters"],
            serde_json::json!({ "vm": UUID, "name": "web01" })
        );
        assert_passes(&host.run(operation, domain("").as_bytes()));
        assert_passes(&host.run(operation, b"<domain>"));
    }
}

#[test]
fn no_other_operation_ever_fails() {
    let error = r#"{"error":"io.virtseal.Lifecycle.Refused","parameters":{"message":"no"}}"#;
    for answer in [
        None,
        Some(Answer::Close),
        Some(Answer::reply(error)),
        Some(Answer::reply("garbage")),
    ] {
        let host = Host::with("unknown = key\n");
        let _daemon = answer.map(|answer| host.daemon(answer));
        for operation in [
            ["start", "begin"],
            ["started", "begin"],
            ["stopped", "end"],
            ["release", "end"],
            ["migrate", "begin"],
            ["restore", "begin"],
            ["reconnect", "begin"],
            ["attach", "begin"],
            ["prepare", "end"],
            ["a later one", "begin"],
            ["", ""],
        ] {
            for xml in [
                sealed(),
                domain(""),
                "<domain>urn:virtseal:vm:1".into(),
                String::new(),
            ] {
                assert_passes(&host.run(operation, xml.as_bytes()));
            }
        }
    }
}

#[test]
fn a_silent_daemon_holds_notices_up_for_two_seconds_at_most() {
    for operation in [["started", "begin"], ["release", "end"]] {
        let host = Host::new();
        let _daemon = host.daemon(Answer::Silent);
        let start = Instant::now();
        assert_passes(&host.run(operation, sealed().as_bytes()));
        assert!(
            start.elapsed() < Duration::from_secs(2) + SLACK,
            "{:?}",
            start.elapsed()
        );
    }
}

#[test]
fn without_arguments_it_does_nothing() {
    let output = Command::new(env!("CARGO_BIN_EXE_virtseal-hook"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_passes(&output);
}
