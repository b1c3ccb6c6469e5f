//! The tmpfs for QEMU's master key, on real mounts. Each test runs the hook in a mount namespace of its own, so
//! nothing is left on the machine.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::UUID;
use crate::daemon::{Answer, Daemon};
use tempfile::TempDir;

const REFUSED: &str = r#"{"error":"io.virtseal.Lifecycle.Refused","parameters":{"message":"locked"}}"#;

struct Host {
    directory: TempDir,
    daemon: Daemon,
}

impl Host {
    fn new(reply: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests mount file systems: run them as root"
        );
        let directory = TempDir::new().unwrap();
        fs::create_dir(directory.path().join("qemu")).unwrap();
        let daemon = Daemon::start(&directory.path().join("sock"), Answer::reply(reply));
        let host = Self { directory, daemon };
        host.configure("");
        host
    }

    fn configure(&self, more: &str) {
        let path = self.directory.path().display();
        let conf =
            format!("socket = {path}/sock\nindex = {path}/hook.index\nruntime_dir = {path}/qemu\n{more}");
        fs::write(self.directory.path().join("hook.conf"), conf).unwrap();
    }

    fn runtime(&self, name: &str) -> PathBuf {
        self.directory.path().join("qemu").join(name)
    }

    /// Runs a shell script with `$D` (the runtime directory) and the functions `prepare` and `release`, which
    /// take the VM's id and name. Its output is the script's.
    fn script(&self, script: &str) -> Output {
        let functions = r#"
            set -eu
            xml() { printf "<domain type='kvm' id='%s'><name>%s</name><uuid>%s</uuid>%s</domain>" "$1" "$2" "$UUID" \
                "<metadata><v:vm xmlns:v='urn:virtseal:vm:1'/></metadata>"; }
            prepare() { xml "$1" "$2" | "$HOOK" "$2" prepare begin -; }
            release() { xml "$1" "$2" | "$HOOK" "$2" release end -; }
            mounted() { grep -c "^[^-]* $1 .* - tmpfs virtseal:" /proc/self/mountinfo || true; }
        "#;
        let mut shell = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh"])
            .env("HOOK", env!("CARGO_BIN_EXE_virtseal-hook"))
            .env("VIRTSEAL_HOOK_CONF", self.directory.path().join("hook.conf"))
            .env("D", self.runtime(""))
            .env("UUID", UUID)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("unshare is in the package util-linux");
        let script = format!("{functions}\nD=${{D%/}}\n{script}");
        shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        shell.wait_with_output().unwrap()
    }
}

#[track_caller]
fn prints(output: &Output, expected: &str) {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert!(output.status.success());
}

#[track_caller]
fn refuses(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in {stderr:?}");
    }
    assert_eq!(stderr.lines().count(), 1, "{stderr:?}");
    assert_eq!(output.status.code(), Some(1));
}

fn entries(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

#[test]
fn the_master_key_lands_on_a_tmpfs_until_release() {
    let host = Host::new("{}");
    let output = host.script(
        r#"prepare 7 web01
           stat -f -c %T "$D/domain-7-web01"
           stat -c "%a %u" "$D/domain-7-web01"
           grep -o "nosuid,nodev,noexec" /proc/self/mountinfo | tail -n 1
           echo key > "$D/domain-7-web01/master-key.aes"
           release 7 web01
           ls "$D""#,
    );
    prints(&output, "tmpfs\n750 0\nnosuid,nodev,noexec\n");
    assert_eq!(entries(&host.runtime("")), 0);
}

#[test]
fn a_release_without_the_id_finds_the_mount() {
    let host = Host::new("{}");
    prints(&host.script("prepare 7 web01; release -1 web01; ls $D"), "");
}

#[test]
fn a_refusal_leaves_nothing_behind() {
    let host = Host::new(REFUSED);
    refuses(&host.script("prepare 7 web01"), &["locked"]);
    assert_eq!(entries(&host.runtime("")), 0);
}

#[test]
fn left_overs_of_a_crash_are_replaced() {
    let host = Host::new("{}");
    let output = host.script(
        r#"prepare 3 web01
           prepare 3 web01; mounted "$D/domain-3-web01"
           prepare 4 web01; ls "$D"
           UUID=00000000-0000-4000-8000-000000000000
           prepare 4 web01; mounted "$D/domain-4-web01"
           release 4 web01; ls "$D""#,
    );
    prints(&output, "1\ndomain-4-web01\n1\n");
}

#[test]
fn a_directory_that_is_there_is_covered() {
    let host = Host::new("{}");
    fs::create_dir(host.runtime("domain-7-web01")).unwrap();
    fs::write(host.runtime("domain-7-web01/old"), "").unwrap();
    prints(
        &host.script("prepare 7 web01; ls $D/domain-7-web01; release 7 web01"),
        "",
    );
    assert!(host.runtime("domain-7-web01/old").exists());
}

#[test]
fn a_symbolic_link_is_never_followed() {
    let host = Host::new("{}");
    let target = host.directory.path().join("target");
    fs::create_dir(&target).unwrap();
    symlink(&target, host.runtime("domain-7-web01")).unwrap();
    let before = fs::metadata(&target).unwrap().ino();
    refuses(
        &host.script("prepare 7 web01"),
        &[
            "domain-7-web01: it is there, but is not a directory",
            "web01 stays off",
        ],
    );
    assert_eq!(fs::metadata(&target).unwrap().ino(), before);
}

#[test]
fn a_hostile_name_stays_in_the_directory() {
    let host = Host::new("{}");
    refuses(&host.script("prepare 7 ../../../etc"), &["no file name"]);
    refuses(&host.script("prepare 7 a/b"), &["no file name"]);
    prints(&host.script("prepare 7 ..; ls $D; release 7 .."), "domain-7-..\n");
    prints(
        &host.script(r#"prepare 7 'a b\040;$x'; ls "$D"; release 7 'a b\040;$x'; ls "$D""#),
        "domain-7-a b\\040;$x\n",
    );
}

#[test]
fn long_names_are_cut_as_libvirt_cuts_them() {
    let host = Host::new("{}");
    let output = host.script(
        "prepare 7 a-name-of-more-than-twenty; ls $D; release 7 a-name-of-more-than-twenty
         prepare 7 ääääääääääääääääääääääää; ls $D; release 7 ääääääääääääääääääääääää; ls $D",
    );
    prints(
        &output,
        "domain-7-a-name-of-more-than-\ndomain-7-ääääääääää\ndomain-7-ääääääääääääääääääää\n",
    );
}

#[test]
fn without_the_tmpfs_the_policy_decides() {
    let host = Host::new("{}");
    let missing = format!("runtime_dir = {}/nowhere\n", host.directory.path().display());
    host.configure(&missing);
    let parts = [
        "no tmpfs for QEMU's master key",
        "nowhere: No such file",
        "master_key_tmpfs = preferred",
    ];
    refuses(&host.script("prepare 7 web01"), &parts);
    let journal = host.directory.path().join("journal");
    let heard = UnixDatagram::bind(&journal).unwrap();
    heard.set_nonblocking(true).unwrap();
    host.configure(&format!("{missing}master_key_tmpfs = preferred\n"));
    let with_journal = format!(
        "mount -t tmpfs none /run; mkdir -p /run/systemd/journal; : >/run/systemd/journal/socket\n\
         mount --bind {} /run/systemd/journal/socket; prepare 7 web01",
        journal.display()
    );
    prints(&host.script(&with_journal), "");
    let mut entry = [0; 4096];
    let length = heard.recv(&mut entry).expect("a warning in the journal");
    let entry = std::str::from_utf8(&entry[..length]).unwrap();
    for part in [
        "PRIORITY=4\n",
        "SYSLOG_IDENTIFIER=virtseal-hook\n",
        "web01",
        "nowhere: No such file",
    ] {
        assert!(entry.contains(part), "{part:?} is not in {entry:?}");
    }
    assert!(heard.recv(&mut [0]).is_err(), "a second warning");
    let told = host.daemon.request()["parameters"]["master_key_on_disk"].to_string();
    assert!(told.contains("nowhere: No such file"), "{told}");
    prints(&host.script("prepare 7 web01"), "");
    host.configure("master_key_tmpfs = off\n");
    prints(&host.script("prepare 7 web01; ls $D"), "");
}

#[test]
fn an_xml_without_an_id_is_refused() {
    let host = Host::new("{}");
    refuses(&host.script("prepare -1 web01"), &["has no id"]);
}
