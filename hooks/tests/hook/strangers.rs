//! What the hook refuses by its index alone, without any daemon, and what XML can't make it miss.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::UUID;
use crate::daemon::{Answer, Daemon};
use crate::protocol::{
    DEADLINE, Host, METADATA, SHORT, SLACK, assert_passes, assert_refused_with, domain, sealed,
};

/// A sealed VM on this host, and the secret of its disk.
const VICTIM: &str = "0a0a0a0a-58c3-4fd5-9aa1-0d1f44a3e9b7";
const SECRET: &str = "5ec2e7aa-0001-4fd5-9aa1-0d1f44a3e9b7";
/// A secret of somebody else, such as Nova's for its Ceph.
const FOREIGN: &str = "c0ffee00-0002-4fd5-9aa1-0d1f44a3e9b7";

/// An index as virtseald writes it.
fn index(envelopes: &[(&str, &str)], vms: &[&str]) -> String {
    let digits = |uuid: &str| uuid.replace('-', "");
    let mut text = format!(
        "virtseal hook index 1\n{:010} envelopes {:010} VMs\n",
        envelopes.len(),
        vms.len()
    );
    for (envelope, vm) in envelopes {
        text += &format!("{} {}\n", digits(envelope), digits(vm));
    }
    vms.iter().for_each(|vm| text += &format!("{}\n", digits(vm)));
    let sum = text.as_bytes().chunks(8).fold(text.len() as u64, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    });
    text + &format!("{sum:016x}\n")
}

fn host_with(more: &str, index: &str) -> Host {
    let host = Host::with(more);
    fs::write(host.index(), index).unwrap();
    fs::set_permissions(host.index(), fs::Permissions::from_mode(0o600)).unwrap();
    host
}

/// Where [`VICTIM`] is sealed.
fn host() -> Host {
    host_with("", &index(&[(SECRET, VICTIM)], &[VICTIM]))
}

fn disk(secret: &str) -> String {
    domain(&format!(
        "<devices><disk type='file'><source file='/images/copy.qcow2'><encryption format='luks'>{secret}</encryption>\
         </source></disk></devices>"
    ))
}

#[test]
fn who_names_a_secret_of_a_sealed_vm_is_refused_without_a_daemon() {
    let host = host();
    let bare = SECRET.replace('-', "");
    for xml in [
        disk(&format!("<secret type='passphrase' uuid='{SECRET}'/>")),
        disk(&format!(
            "<secret type='passphrase' uuid='{}'/>",
            bare.to_uppercase()
        )),
        disk(&format!(
            "<secret type='passphrase' uuid=' {}'/>",
            SECRET.replace('-', " ")
        )),
        disk(&format!("<secret type='passphrase' usage='virtseal:{SECRET}'/>")),
        domain(&format!(
            "<os><nvram type='file'><source file='/n'><encryption format='luks' engine='qemu'><secret uuid='{SECRET}'/>\
             </encryption></source></nvram></os>"
        )),
        domain(&format!(
            "<devices><tpm><backend type='emulator'><encryption secret='{SECRET}'/></backend></tpm></devices>"
        )),
        domain(&format!(
            "<devices><disk><backingStore type='file'><source file='/b'><encryption><secret uuid='{SECRET}'/>\
             </encryption></source></backingStore></disk></devices>"
        )),
    ] {
        assert_refused_with(
            &host.prepare(&xml),
            &[
                "web01 stays off",
                SECRET,
                &format!("of sealed VM {VICTIM}"),
                ". Next: virsh edit web01",
            ],
        );
    }
}

#[test]
fn vms_with_secrets_of_others_start() {
    for host in [host(), Host::new()] {
        for xml in [
            disk(&format!("<secret type='passphrase' uuid='{FOREIGN}'/>")),
            disk("<secret type='passphrase' usage='/images/copy.qcow2'/>"),
            disk("<secret type='passphrase' usage='virtseal:'/>"),
            domain(&format!("<description>{SECRET} {VICTIM}</description>")),
            domain(&format!(
                "<metadata><a:b xmlns:a='urn:other' of='{SECRET}'>{VICTIM}</a:b></metadata>"
            )),
            domain(""),
        ] {
            assert_passes(&host.prepare(&xml));
        }
    }
    // Without an index nothing is sealed here.
    assert_passes(&Host::new().prepare(&disk(&format!("<secret uuid='{SECRET}'/>"))));
}

#[test]
fn the_old_xml_of_a_sealed_vm_is_refused() {
    let host = host();
    let old = domain("<devices><disk><source file='/images/web01.raw'/></disk></devices>");
    assert_passes(&host.prepare(&old));
    for uuid in [VICTIM.to_owned(), VICTIM.to_uppercase(), VICTIM.replace('-', "")] {
        assert_refused_with(
            &host.prepare(&old.replace(UUID, &uuid)),
            &[
                "web01 stays off",
                "sealed",
                "an older one",
                "virtseal vm seal web01",
            ],
        );
    }
    // Its volume was made before the VM is sealed, and somebody wrote its secret into the XML by hand.
    let host = host_with("", &index(&[(SECRET, UUID)], &[]));
    assert_passes(&host.prepare(&old));
    assert_refused_with(
        &host.prepare(&disk(&format!("<secret uuid='{SECRET}'/>"))),
        &["its secret", SECRET, "virtseal vm seal web01"],
    );
}

#[test]
fn a_damaged_index_refuses_what_may_be_ours() {
    let good = index(&[(SECRET, VICTIM)], &[VICTIM]);
    for (damaged, names) in [
        (good[..good.len() - 5].to_owned(), true),
        (good.replace("0000000001 VMs", "0000000002 VMs"), true),
        ("music\n".into(), false),
        (String::new(), false),
    ] {
        let host = host_with("", &damaged);
        assert_passes(&host.prepare(&domain("")));
        assert_refused_with(
            &host.prepare(&disk(&format!("<secret uuid='{FOREIGN}'/>"))),
            &["hook.index is damaged", ". Next: systemctl restart virtseald"],
        );
        let stranger = host.prepare(&disk(&format!("<secret uuid='{SECRET}'/>")));
        assert_refused_with(&stranger, &["web01 stays off"]);
        let old = host.prepare(&domain("").replace(UUID, VICTIM));
        if names {
            assert_refused_with(&stranger, &[SECRET, "that of a sealed VM"]);
            assert_refused_with(&old, &["virtseal vm seal web01"]);
        }
        // The daemon knows by itself.
        let _daemon = Daemon::start(&host.socket(), Answer::reply("{}"));
        assert_passes(&host.prepare(&sealed()));
    }
    let open = host();
    fs::set_permissions(open.index(), fs::Permissions::from_mode(0o666)).unwrap();
    assert_refused_with(
        &open.prepare(&disk(&format!("<secret uuid='{FOREIGN}'/>"))),
        &["others than root may write there"],
    );
    assert_passes(&open.prepare(&domain("")));
}

fn many_attributes() -> String {
    let attributes: String = (0..40_000).map(|number| format!(" a{number}=''")).collect();
    format!("<metadata><x:y xmlns:x='urn:other'{attributes}/></metadata>")
}

#[test]
fn xml_beyond_the_bounds_is_judged_by_its_bytes_at_once() {
    let host = host();
    let nested = "<a>".repeat(1000) + &"</a>".repeat(1000);
    let namespaces: String = (0..2000)
        .map(|number| format!("<a xmlns:p{number}='u'/>"))
        .collect();
    let long = format!("<a b='{}'/>", "x".repeat(70_000));
    for part in [many_attributes(), nested, namespaces, long] {
        let begin = Instant::now();
        assert_passes(&host.prepare(&domain(&part)));
        for ours in [
            METADATA.to_owned(),
            format!("<devices><tpm><backend><encryption secret='{SECRET}'/></backend></tpm></devices>"),
            format!("<disk><secret usage='virtseal:{SECRET}'/></disk>"),
            "<metadata><v:vm xmlns:v='urn&#58;virtseal&#x03a;vm:1'/></metadata>".into(),
        ] {
            let output = host.prepare(&domain(&format!("{part}{ours}")));
            assert_refused_with(
                &output,
                &["web01 stays off", "beyond what is read", ". Next: virsh dumpxml"],
            );
        }
        assert_refused_with(
            &host.prepare(&domain(&part).replace(UUID, VICTIM)),
            &["web01 stays off"],
        );
        // Each took as long as its parsing would have.
        assert!(begin.elapsed() < SLACK, "{:?}", begin.elapsed());
    }
    let notices = [["started", "begin"], ["release", "end"]];
    for operation in notices {
        let xml = domain(&(many_attributes() + METADATA));
        assert_passes(&host.run(operation, xml.as_bytes()));
    }
}

#[test]
fn what_is_behind_the_limit_counts() {
    let host = host();
    let padding = format!("<description>{}</description>", "x".repeat(5_000_000));
    assert_passes(&host.prepare(&domain(&padding)));
    for ours in [
        METADATA.to_owned(),
        format!("<secret uuid='{SECRET}'/>"),
        "urn&#x3A;virtseal:".into(),
    ] {
        let output = host.prepare(&domain(&format!("{padding}{ours}")));
        assert_refused_with(&output, &["web01 stays off", "more than 4194304 bytes"]);
    }
}

#[test]
fn other_encodings_hide_nothing() {
    let host = host();
    let plain = domain("");
    for (text, passes) in [
        (plain.clone(), true),
        (sealed(), false),
        (plain.replace(UUID, VICTIM), false),
        (disk(&format!("<secret uuid='{SECRET}'/>")), false),
    ] {
        let little: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let big: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
        for bytes in [little, big] {
            let output = host.run(["prepare", "begin"], &bytes);
            if passes {
                assert_passes(&output);
            } else {
                assert_refused_with(&output, &["web01 stays off: its XML"]);
            }
        }
    }
}

#[test]
fn an_input_that_never_ends_is_refused_where_anything_is_sealed() {
    for (index, code) in [(index(&[], &[]), 0), (index(&[(SECRET, VICTIM)], &[]), 1)] {
        let host = host_with(SHORT, &index);
        let mut child = host.spawn(["prepare", "begin"]);
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"<domain>").unwrap();
        let start = Instant::now();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(start.elapsed() < DEADLINE + SLACK);
        drop(stdin);
    }
}

/// Reading this, looking at it and parsing it are each longer than the deadline.
#[test]
fn the_deadline_covers_what_the_hook_does_itself() {
    let attributes: String = (0..250).map(|number| format!(" attribute{number}=''")).collect();
    let tag = format!("<x{attributes}/>");
    let xml = domain(&(METADATA.to_owned() + &tag.repeat(4_000_000 / tag.len())));
    let host = host_with("deadline = 10ms\n", &index(&[], &[]));
    let output = host.prepare(&xml);
    assert_refused_with(&output, &["web01 stays off", "within 10ms", ". Next: "]);
    // Who came as far as virtseald has read and parsed it all.
    assert!(!String::from_utf8_lossy(&output.stderr).contains("virtseald"));
}

#[test]
fn the_policy_goes_to_who_can_judge_what_is_sealed() {
    let host = host_with("require_sealed = true\n", &index(&[], &[]));
    let daemon = Daemon::start(&host.socket(), Answer::reply("{}"));
    assert_passes(&host.prepare(&sealed()));
    let expected = json!({ "xml": sealed(), "require_sealed": true });
    assert_eq!(daemon.request()["parameters"], expected);
}

#[test]
fn what_the_hook_refuses_is_reported_and_waits_for_nobody() {
    let stranger = disk(&format!("<secret type='passphrase' uuid='{SECRET}'/>"));
    let reports = [
        (stranger.clone(), json!(UUID), "that of sealed VM"),
        (
            stranger.replace("<devices>", "<devices"),
            json!(null),
            "stays off",
        ),
    ];
    for (xml, vm, reason) in reports {
        let host = host();
        let daemon = Daemon::start(&host.socket(), Answer::reply("{}"));
        assert_refused_with(&host.prepare(&xml), &[reason]);
        let report = daemon.request();
        assert_eq!(report["method"], "io.virtseal.Lifecycle.Refused");
        let (parameters, name) = (&report["parameters"], json!("web01"));
        assert_eq!((&parameters["vm"], &parameters["name"]), (&vm, &name));
        assert!(
            parameters["reason"].as_str().unwrap().contains(reason),
            "{report}"
        );
    }
    for answer in [
        Answer::Silent,
        Answer::NeverReads,
        Answer::NeverAccepts,
        Answer::CloseUnread,
    ] {
        let host = host();
        let _daemon = Daemon::start(&host.socket(), answer.clone());
        let started = Instant::now();
        assert_refused_with(&host.prepare(&stranger), &["that of sealed VM"]);
        let took = started.elapsed();
        assert!(took < Duration::from_millis(500) + SLACK, "{answer:?}: {took:?}");
    }
}

#[test]
fn only_root_is_believed_on_the_socket() {
    let host = Host::new();
    let _listener = Listener::start_as(65534, &host);
    assert_refused_with(
        &host.prepare(&sealed()),
        &[
            "web01 stays off",
            "not root's, but of user id 65534",
            ". Next: systemctl restart",
        ],
    );
}

/// Agrees to everything, as another user: the kernel names who began to listen.
struct Listener(Child);

impl Listener {
    const AGREES: &str = r#"use IO::Socket::UNIX; $SIG{PIPE} = "IGNORE"; $l = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 5) or die;
        while ($c = $l->accept) { print $c "{}\0"; }"#;

    fn start_as(user: u32, host: &Host) -> Self {
        let directory = host.socket().parent().unwrap().to_owned();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
        let perl = Command::new("perl")
            .args(["-e", Self::AGREES])
            .arg(host.socket())
            .current_dir("/")
            .uid(user)
            .spawn();
        let listener = Self(perl.expect("perl of the package perl-base"));
        let begin = Instant::now();
        while UnixStream::connect(host.socket()).is_err() {
            assert!(begin.elapsed() < SLACK, "nobody listens");
            thread::sleep(Duration::from_millis(5));
        }
        listener
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
