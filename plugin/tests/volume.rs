//! Images against the programs that must understand them: qemu-img, qemu-io and cryptsetup.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use virtseal::envelope::{Binding, Envelope, EnvelopeId, KekId, ObjectKind, ProviderId, Stanza, VmId};
use virtseal::secret::{Dek, Passphrase};
use virtseal::volume::{
    self, Backing, BackingFormat, Bytes, ClusterSize, CreateRequest, Data, Format, Held, Step, VolumeError,
};

/// A directory, and a key for what is made in it.
struct Bench {
    directory: TempDir,
    passphrase: Passphrase,
    envelope: Envelope,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let passphrase = Dek::random().unwrap().passphrase().unwrap();
        fs::write(directory.path().join("key"), passphrase.expose()).unwrap();
        Self {
            directory,
            passphrase,
            envelope: envelope(1),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn request(&self, name: &str, size: u64) -> CreateRequest {
        CreateRequest::new(self.path(name), Bytes(size))
    }

    fn create(&self, request: &CreateRequest) -> Result<volume::Created, VolumeError> {
        volume::create(request, &self.envelope, &self.passphrase)
    }

    fn create_over(&self, held: &Held, request: &CreateRequest) -> Result<volume::Created, VolumeError> {
        volume::create_over(held, request, &self.envelope, &self.passphrase)
    }

    fn create_from(&self, request: &CreateRequest, source: &str) -> Result<volume::Created, VolumeError> {
        let source = self.path(source);
        volume::create_from(request, &source, &self.envelope, &self.passphrase, go_on)
    }

    fn verify(&self, name: &str) -> Result<(), VolumeError> {
        volume::verify(&self.path(name), &self.passphrase)
    }

    fn inspect(&self, name: &str) -> volume::VolumeInfo {
        volume::inspect(&self.path(name)).unwrap()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let package = match program {
            "cryptsetup" => "cryptsetup-bin",
            _ => "qemu-utils",
        };
        Command::new(program)
            .args(arguments)
            .current_dir(self.directory.path())
            .output()
            .unwrap_or_else(|error| panic!("can't run {program}, install {package}: {error}"))
    }

    fn must(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let shown = [&output.stdout[..], &output.stderr[..]].concat();
        let shown = String::from_utf8_lossy(&shown).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {shown}");
        shown
    }

    /// Runs a subcommand of qemu-img on an encrypted image; `{}` among the arguments is the image.
    fn qemu_img(&self, name: &str, arguments: &[&str]) -> String {
        let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}");
        let mut command = vec![arguments[0], "--object", "secret,id=s,file=key", "--image-opts"];
        command.extend(
            arguments[1..]
                .iter()
                .map(|word| if *word == "{}" { &image } else { *word }),
        );
        self.must("qemu-img", &command)
    }

    fn qemu_io(&self, name: &str, command: &str) {
        let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}");
        let secret = ["--object", "secret,id=s,file=key", "--image-opts", &image];
        let shown = self.must("qemu-io", &[&secret[..], &["-c", command]].concat());
        assert!(
            !shown.contains("failed") && !shown.contains("error"),
            "{command}: {shown}"
        );
    }

    fn info(&self, name: &str) -> Value {
        serde_json::from_str(&self.must("qemu-img", &["info", "--output=json", name])).unwrap()
    }

    fn check(&self, name: &str) {
        let shown = self.qemu_img(name, &["check", "{}"]);
        assert!(shown.contains("No errors were found"), "{shown}");
        assert!(!shown.contains("eaked"), "{shown}");
    }

    /// Cuts the LUKS1 area out of an image, and lets a payload follow it, as cryptsetup wants.
    fn cut_luks_area(&self, image: &str, area: &str) {
        let bytes = fs::read(self.path(image)).unwrap();
        let magic = b"LUKS\xba\xbe\x00\x01";
        let start = bytes.windows(8).position(|window| window == magic).unwrap();
        let mut cut = bytes[start..].to_vec();
        cut.resize(3 << 20, 0);
        fs::write(self.path(area), cut).unwrap();
    }

    fn leftovers(&self) -> Vec<String> {
        fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with(".virtseal-"))
            .collect()
    }
}

fn envelope(stanzas: usize) -> Envelope {
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Disk,
    };
    let stanza = Stanza {
        provider: ProviderId::random(),
        provider_name: "native".to_owned(),
        kek: KekId("vm/1".to_owned()),
        mechanism: "A256GCM".to_owned(),
        body: vec![0x5a; 92],
    };
    Envelope::new(&binding, vec![stanza; stanzas]).unwrap()
}

fn go_on(_: volume::Percent) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn qemu_reads_and_writes_images_of_every_cluster_size() {
    let mut bench = Bench::new();
    for (bits, stanzas) in (9..=21).flat_map(|bits| [(bits, 1), (bits, 16)]) {
        bench.envelope = envelope(stanzas);
        let mut request = bench.request("disk", 3 << 30);
        request.cluster_size = ClusterSize::from_bits(bits).unwrap();
        let created = bench.create(&request).unwrap();
        assert_eq!(created.size, Bytes(3 << 30));
        let digest = volume::header_digest(&created.path).unwrap();
        assert_eq!(created.header_digest, digest);

        bench.check("disk");
        let info = bench.info("disk");
        assert_eq!(info["virtual-size"], 3_u64 << 30);
        assert_eq!(info["cluster-size"], 1_u64 << bits);
        assert_eq!(
            info["format-specific"]["data"]["encrypt"]["slots"][0]["active"],
            true
        );
        bench.qemu_io("disk", "read -P 0 0 1M");
        bench.qemu_io("disk", "write -P 0x5a 2147483648 1M");
        bench.qemu_io("disk", "read -P 0x5a 2147483648 1M");
        bench.check("disk");
        bench.verify("disk").unwrap();
        let info = bench.inspect("disk");
        assert_eq!(info.envelope.as_ref(), Some(&bench.envelope), "2^{bits}");
        assert_eq!(info.data, Data::HasData);
        fs::remove_file(bench.path("disk")).unwrap();
    }
}

#[test]
fn sizes_reach_the_limits_of_qemu() {
    let bench = Bench::new();
    for (size, bits) in [(1, 16), (513, 16), (2 << 50, 16), (128 << 30, 9), (2 << 60, 21)] {
        let mut request = bench.request("disk", size);
        request.cluster_size = ClusterSize::from_bits(bits).unwrap();
        let created = bench.create(&request).unwrap();
        assert_eq!(created.size.0, size.next_multiple_of(512));
        assert_eq!(bench.info("disk")["virtual-size"], created.size.0);
        bench.check("disk");
        let stored = fs::metadata(bench.path("disk")).unwrap().blocks() * 512;
        assert!(stored < 1 << 20, "{stored} bytes on disk");
        fs::remove_file(bench.path("disk")).unwrap();
    }
    let refused = bench.create(&bench.request("disk", (2 << 50) + 1)).unwrap_err();
    assert!(refused.to_string().contains("2 PiB at the most"), "{refused}");
    assert!(bench.create(&bench.request("disk", 0)).is_err());
    assert!(bench.create(&bench.request("disk", u64::MAX)).is_err());
}

#[test]
fn cryptsetup_opens_the_header() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    bench.cut_luks_area("disk", "area");
    let dump = bench.must("cryptsetup", &["luksDump", "area"]);
    for line in [
        "xts-plain64",
        "sha256",
        "Key Slot 0: ENABLED",
        "Key Slot 1: DISABLED",
    ] {
        assert!(dump.contains(line), "{dump}");
    }
    let open = [
        "open",
        "--test-passphrase",
        "--type",
        "luks1",
        "area",
        "--key-file",
    ];
    bench.must("cryptsetup", &[&open[..], &["key"]].concat());
    fs::write(bench.path("wrong"), [b'a'; 64]).unwrap();
    let wrong = bench.run("cryptsetup", &[&open[..], &["wrong"]].concat());
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_wrong_key_opens_nothing() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let other = Dek::random().unwrap().passphrase().unwrap();
    let refused = volume::verify(&bench.path("disk"), &other).unwrap_err();
    assert!(matches!(refused, VolumeError::NoKeyslotOpens(_)), "{refused}");
    fs::write(bench.path("plain"), [0; 4096]).unwrap();
    assert!(matches!(bench.verify("plain"), Err(VolumeError::NotEncrypted(_))));
}

#[test]
fn images_made_by_qemu_img_open() {
    let bench = Bench::new();
    let luks = ["create", "-q", "--object", "secret,id=s,file=key", "-f"];
    let inside = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let alone = "key-secret=s,iter-time=10";
    bench.must(
        "qemu-img",
        &[&luks[..], &["qcow2", "-o", inside, "qcow2", "1G"]].concat(),
    );
    bench.must(
        "qemu-img",
        &[&luks[..], &["luks", "-o", alone, "luks", "8M"]].concat(),
    );
    for (name, format, size) in [
        ("qcow2", Format::Qcow2Luks1, 1 << 30),
        ("luks", Format::Luks1, 8 << 20),
    ] {
        bench.verify(name).unwrap();
        let info = bench.inspect(name);
        assert_eq!(info.format, format);
        assert_eq!(info.virtual_size, Bytes(size));
        assert!(info.envelope.is_none());
        let json = serde_json::to_value(&info).unwrap();
        assert_eq!(json["luks"]["keyslots"][0]["state"], "active");
        assert_eq!(json["luks"]["keyslots"][7]["state"], "dead");
    }
    assert_eq!(bench.inspect("qcow2").data, Data::Empty);
}

#[test]
fn images_made_by_cryptsetup_open() {
    let bench = Bench::new();
    fs::File::create(bench.path("luks"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let format = ["luksFormat", "-q", "--type", "luks1", "--hash", "sha256"];
    let rest = [
        "--key-size",
        "512",
        "--pbkdf-force-iterations",
        "2000",
        "luks",
        "key",
    ];
    bench.must("cryptsetup", &[&format[..], &rest].concat());
    bench.verify("luks").unwrap();
}

#[test]
fn the_envelope_survives_what_qemu_does_to_an_image() {
    let mut bench = Bench::new();
    for (stanzas, cluster_size) in [(1, "512"), (1, "4k"), (16, "4k"), (16, "64k")] {
        bench.envelope = envelope(stanzas);
        let mut request = bench.request("disk", 1 << 30);
        request.cluster_size = cluster_size.parse().unwrap();
        bench.create(&request).unwrap();
        let deeds: [&[&str]; 9] = [
            &["snapshot", "-c", "one", "{}"],
            &["snapshot", "-a", "one", "{}"],
            &["snapshot", "-d", "one", "{}"],
            &["resize", "{}", "2G"],
            &["amend", "-o", "lazy_refcounts=on", "{}"],
            &["bitmap", "--add", "{}", "map"],
            &["bitmap", "--remove", "{}", "map"],
            &["check", "-r", "all", "{}"],
            &[
                "amend",
                "-o",
                "encrypt.state=active,encrypt.new-secret=s,encrypt.iter-time=10",
                "{}",
            ],
        ];
        for deed in deeds {
            bench.qemu_img("disk", deed);
            let found = bench.inspect("disk").envelope;
            assert_eq!(found.as_ref(), Some(&bench.envelope), "{cluster_size}: {deed:?}");
            bench.verify("disk").unwrap();
        }
        bench.qemu_io("disk", "write -P 7 0 4M");
        bench.check("disk");
        let info = bench.inspect("disk");
        assert_eq!(info.envelope.as_ref(), Some(&bench.envelope));
        assert_eq!(info.virtual_size, Bytes(2 << 30));
        fs::remove_file(bench.path("disk")).unwrap();
    }
}

#[test]
fn an_overlay_reads_through_and_shows_its_chain() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "base", "2G"]);
    bench.must("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 64k", "base"]);
    let mut request = bench.request("overlay", 0);
    request.size = None;
    request.backing = Some(Backing {
        path: "base".into(),
        format: BackingFormat::Qcow2,
    });
    assert_eq!(bench.create(&request).unwrap().size, Bytes(2 << 30));
    bench.check("overlay");
    bench.qemu_io("overlay", "read -P 9 0 64k");
    bench.qemu_io("overlay", "write -P 8 0 64k");
    bench.qemu_io("overlay", "read -P 8 0 64k");
    bench.must("qemu-io", &["-f", "qcow2", "-c", "read -P 9 0 64k", "base"]);

    let chain = volume::backing_chain(&bench.path("overlay")).unwrap();
    let seen: Vec<_> = chain
        .iter()
        .map(|layer| (layer.format, layer.encrypted))
        .collect();
    assert_eq!(seen, [(Format::Qcow2Luks1, true), (Format::Qcow2, false)]);
    let info = bench.inspect("overlay");
    assert_eq!(info.data, Data::HasData);
    assert_eq!(info.backing.unwrap().format.as_deref(), Some("qcow2"));
}

#[test]
fn backing_files_that_can_not_work_are_refused() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "base", "2G"]);
    for (path, format) in [
        ("base", BackingFormat::Raw),
        ("nbd:base", BackingFormat::Raw),
        ("gone", BackingFormat::Raw),
    ] {
        let mut request = bench.request("overlay", 1 << 30);
        request.backing = Some(Backing {
            path: path.into(),
            format,
        });
        let error = bench.create(&request).unwrap_err();
        assert!(
            matches!(error, VolumeError::BackingName { .. } | VolumeError::NotFound(_)),
            "{error}"
        );
        assert!(error.to_string().contains(path), "{error}");
        assert!(!bench.path("overlay").exists());
    }
}

#[test]
fn a_chain_that_loops_or_breaks_is_an_error() {
    let bench = Bench::new();
    for (image, backing) in [("a", "b"), ("b", "a"), ("c", "gone"), ("d", "nbd://host/x")] {
        let options = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
        bench.must("qemu-img", &[&options[..], &[backing, image, "1G"]].concat());
    }
    for (image, reason) in [
        ("a", "form a loop"),
        ("c", "which does not exist"),
        ("d", "no local file"),
    ] {
        let error = volume::backing_chain(&bench.path(image)).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_layer_that_is_declared_raw_is_not_looked_into() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "guest", "1G"]);
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "guest", "top"];
    bench.must("qemu-img", &options);
    let chain = volume::backing_chain(&bench.path("top")).unwrap();
    assert_eq!(chain[1].format, Format::Raw);
}

#[test]
fn only_an_empty_image_is_called_empty() {
    let bench = Bench::new();
    let fresh: [(&str, &[&str]); 6] = [
        ("plain", &["-f", "qcow2"]),
        ("preallocated", &["-f", "qcow2", "-o", "preallocation=metadata"]),
        ("allocated", &["-f", "qcow2", "-o", "preallocation=falloc"]),
        ("old", &["-f", "qcow2", "-o", "compat=0.10"]),
        ("extended", &["-f", "qcow2", "-o", "extended_l2=on"]),
        ("raw", &["-f", "raw"]),
    ];
    for (name, options) in fresh {
        bench.must(
            "qemu-img",
            &[&["create", "-q"], options, &[name, "100M"]].concat(),
        );
        assert_eq!(bench.inspect(name).data, Data::Empty, "{name}");
        bench.must("qemu-io", &["-f", options[1], "-c", "write -P 1 99M 512", name]);
        assert_eq!(bench.inspect(name).data, Data::HasData, "{name}");
    }
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "snapshot", "100M"]);
    bench.must("qemu-img", &["snapshot", "-c", "s", "snapshot"]);
    assert_eq!(bench.inspect("snapshot").data, Data::HasData);
}

#[test]
fn a_truncated_image_is_an_error_that_names_it() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let whole = fs::read(bench.path("disk")).unwrap();
    for len in [
        0, 3, 4, 20, 103, 500, 4096, 65_536, 196_608, 200_000, 2_000_000, 2_260_000,
    ] {
        fs::write(bench.path("cut"), &whole[..len]).unwrap();
        match volume::inspect(&bench.path("cut")) {
            Ok(info) => assert!(len < 4 && info.format == Format::Raw, "{len} bytes"),
            Err(error) => assert!(error.to_string().contains("/cut"), "{error}"),
        }
        assert!(bench.verify("cut").is_err(), "{len} bytes");
    }
}

#[test]
fn damage_is_an_error_that_says_where() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let whole = fs::read(bench.path("disk")).unwrap();
    let luks = whole.windows(4).position(|window| window == b"LUKS").unwrap();
    let envelope = whole
        .windows(9)
        .position(|window| window == b"{\"version")
        .unwrap();
    for (at, place, part) in [
        (luks + 9, luks + 8, "LUKS1 header"),
        (envelope, envelope, "envelope"),
        (36, 36, "qcow2 header"),
    ] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        fs::write(bench.path("bad"), &damaged).unwrap();
        let error = volume::inspect(&bench.path("bad")).unwrap_err().to_string();
        let place = format!("byte {place} of the {part}");
        assert!(error.contains(&place) && error.contains("/bad"), "{error}");
    }
}

#[test]
fn a_name_that_would_break_the_line_is_an_error() {
    let bench = Bench::new();
    let options = [
        "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "a\nb", "disk",
    ];
    bench.must("qemu-img", &[&options[..], &["1G"]].concat());
    let error = volume::inspect(&bench.path("disk")).unwrap_err().to_string();
    assert!(error.contains("not text") && !error.contains('\n'), "{error}");
}

#[test]
fn every_changed_byte_of_the_headers_is_survived() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let whole = fs::read(bench.path("disk")).unwrap();
    let luks = whole.windows(4).position(|window| window == b"LUKS").unwrap();
    let image = fs::File::options().write(true).open(bench.path("disk")).unwrap();
    for at in (0..1200).chain(luks..luks + 592) {
        std::os::unix::fs::FileExt::write_all_at(&image, &[whole[at] ^ 0x81], at as u64).unwrap();
        if let Err(error) = volume::inspect(&bench.path("disk")) {
            assert!(error.to_string().contains("/disk"), "byte {at}: {error}");
        }
        // What can't be read may end, but never in the wrong hands: any answer but a panic will do.
        let _ = volume::backing_chain(&bench.path("disk"));
        std::os::unix::fs::FileExt::write_all_at(&image, &[whole[at]], at as u64).unwrap();
    }
    bench.verify("disk").unwrap();
}

#[test]
fn an_empty_image_is_replaced_and_keeps_its_owner_and_mode() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "1G"]);
    fs::set_permissions(bench.path("disk"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(bench.path("disk"), Some(12), Some(34)).unwrap();
    let request = bench.request("disk", 1 << 30);
    assert!(matches!(bench.create(&request), Err(VolumeError::Exists(_))));

    let inspected = bench.inspect("disk").file_id;
    let held = Held::unchanged(&bench.path("disk"), inspected).unwrap();
    bench.create_over(&held, &request).unwrap();
    bench.verify("disk").unwrap();
    let found = fs::metadata(bench.path("disk")).unwrap();
    assert_eq!((found.mode() & 0o777, found.uid(), found.gid()), (0o640, 12, 34));
    assert!(matches!(
        bench.create_over(&held, &request),
        Err(VolumeError::Changed(_))
    ));
    assert!(matches!(
        Held::unchanged(&bench.path("disk"), inspected),
        Err(VolumeError::Changed(_))
    ));
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_held_image_gives_way_to_a_plain_one() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let held = Held::open(&bench.path("disk")).unwrap();
    volume::empty_over(&held, Bytes(1 << 30)).unwrap();
    let found = bench.inspect("disk");
    assert_eq!(
        (found.format, found.virtual_size),
        (Format::Qcow2, Bytes(1 << 30))
    );

    fs::write(bench.path("variables"), [7; 1024]).unwrap();
    let held = Held::open(&bench.path("disk")).unwrap();
    volume::copy_over(&held, &bench.path("variables")).unwrap();
    assert_eq!(fs::read(bench.path("disk")).unwrap(), [7; 1024]);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_qemu_that_opened_the_old_image_before_gets_no_lock_on_it_after() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "1G"]);
    // As a start that is a moment late: the file is open, its locks are not yet taken.
    let opened = fs::File::open(bench.path("disk")).unwrap();
    let held = Held::open(&bench.path("disk")).unwrap();
    bench.create_over(&held, &bench.request("disk", 1 << 30)).unwrap();
    let late = || {
        use std::os::fd::AsRawFd;
        let link = format!("/proc/{}/fd/{}", std::process::id(), opened.as_raw_fd());
        let output = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "length"])
            .arg(link)
            .output();
        String::from_utf8(output.unwrap().stderr).unwrap()
    };
    let said = late();
    assert!(said.contains("lock"), "{said}");
    drop(held);
    assert_eq!(late(), "");
}

#[test]
fn an_image_with_data_is_not_replaced() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "1G"]);
    bench.must("qemu-io", &["-f", "qcow2", "-c", "write 0 512", "disk"]);
    let held = Held::open(&bench.path("disk")).unwrap();
    let outcome = bench.create_over(&held, &bench.request("disk", 1 << 30));
    assert!(matches!(outcome, Err(VolumeError::HoldsData(_))));
}

#[test]
fn an_image_in_use_is_not_replaced() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "1G"]);
    let mut user = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(bench.path("disk"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut commands = user.stdin.take().unwrap();
    commands.write_all(b"length\n").unwrap();
    let mut said = Vec::new();
    let mut answers = user.stdout.take().unwrap();
    while !said.ends_with(b"GiB\n") {
        let mut byte = [0];
        answers.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    assert!(matches!(
        Held::open(&bench.path("disk")),
        Err(VolumeError::InUse(_))
    ));
    drop(commands);
    user.wait().unwrap();
}

fn cloud_image(bench: &Bench, name: &str, format: &str) {
    bench.must("qemu-img", &["create", "-q", "-f", format, name, "64M"]);
    for command in [
        "write -P 0x11 0 1M",
        "write -P 0x22 33M 64k",
        "write -P 0x33 65535k 1k",
    ] {
        bench.must("qemu-io", &["-f", format, "-c", command, name]);
    }
}

#[test]
fn a_cloud_image_fills_a_larger_volume() {
    let bench = Bench::new();
    for (format, cluster_size) in [("raw", "64k"), ("qcow2", "512"), ("qcow2", "2M")] {
        let source = format!("cloud,image:{cluster_size}");
        cloud_image(&bench, &format!("./{source}"), format);
        let mut request = bench.request("disk", 1 << 30);
        request.cluster_size = cluster_size.parse().unwrap();
        let mut heard = Vec::new();
        let progress = |percent: volume::Percent| {
            heard.push(percent.0);
            ControlFlow::Continue(())
        };
        let source = bench.path(&source);
        volume::create_from(&request, &source, &bench.envelope, &bench.passphrase, progress).unwrap();
        assert_eq!(heard.last(), Some(&100.0));
        assert!(heard.is_sorted());

        bench.check("disk");
        for command in [
            "read -P 0x11 0 1M",
            "read -P 0 1M 32M",
            "read -P 0x22 33M 64k",
            "read -P 0x33 65535k 1k",
            "read -P 0 64M 64M",
        ] {
            bench.qemu_io("disk", command);
        }
        let info = bench.inspect("disk");
        assert_eq!(info.envelope.as_ref(), Some(&bench.envelope));
        assert_eq!(info.virtual_size, Bytes(1 << 30));
        let stored = fs::read(bench.path("disk")).unwrap();
        assert!(!stored.windows(64).any(|window| window == [0x11; 64]));
        fs::remove_file(bench.path("disk")).unwrap();
    }
}

#[test]
fn a_source_says_the_size_when_nobody_else_does() {
    let bench = Bench::new();
    fs::write(bench.path("odd"), vec![0x44; 100_001]).unwrap();
    let mut request = bench.request("disk", 0);
    request.size = None;
    assert_eq!(bench.create_from(&request, "odd").unwrap().size, Bytes(196 * 512));
    bench.qemu_io("disk", "read -P 0x44 0 99840");
}

#[test]
fn unsafe_or_unfit_sources_are_refused() {
    let bench = Bench::new();
    cloud_image(&bench, "good", "qcow2");
    let overlay = [
        "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "good", "overlay",
    ];
    bench.must("qemu-img", &overlay);
    let external = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=data",
        "external",
        "1M",
    ];
    bench.must("qemu-img", &external);
    bench.create(&bench.request("sealed", 1 << 20)).unwrap();
    fs::write(bench.path("packed"), b"\xfd7zXZ\0and so on").unwrap();
    for (name, size, reason) in [
        ("overlay", 1 << 30, "backing file"),
        ("external", 1 << 30, "external data file"),
        ("sealed", 1 << 30, "encrypted"),
        ("packed", 1 << 30, "xz"),
        ("gone", 1 << 30, "does not exist"),
        ("good", 1 << 20, "64 MiB"),
    ] {
        let error = bench.create_from(&bench.request("disk", size), name).unwrap_err();
        let said = error.to_string();
        assert!(said.contains(reason) && said.contains(name), "{said}");
    }
    assert!(!bench.path("disk").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn what_qemu_img_says_reaches_the_user() {
    let bench = Bench::new();
    cloud_image(&bench, "bad", "qcow2");
    let mut bytes = fs::read(bench.path("bad")).unwrap();
    // The L1 table's first entry points far past the end.
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[l1..l1 + 8].copy_from_slice(&(0x8000_0000_0000_0000_u64 | (1 << 50)).to_be_bytes());
    bytes[l1 + 6] = 2;
    fs::write(bench.path("bad"), bytes).unwrap();
    let error = bench
        .create_from(&bench.request("disk", 1 << 30), "bad")
        .unwrap_err();
    assert!(matches!(error, VolumeError::Copy { .. }), "{error}");
    assert!(error.to_string().contains("/bad"), "{error}");
    assert!(!bench.path("disk").exists());
}

#[test]
fn stopping_a_fill_leaves_nothing() {
    let bench = Bench::new();
    cloud_image(&bench, "cloud", "raw");
    let request = bench.request("disk", 64 << 20);
    let stop = |_| ControlFlow::Break(());
    let source = bench.path("cloud");
    let outcome = volume::create_from(&request, &source, &bench.envelope, &bench.passphrase, stop);
    assert!(matches!(outcome, Err(VolumeError::Stopped(_))));
    assert!(!bench.path("disk").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
}

const STEPS: [Step; 7] = [
    Step::Staged,
    Step::Written,
    Step::Filled,
    Step::Synced,
    Step::Verified,
    Step::Published,
    Step::Durable,
];

/// Set for the process that the test below starts, to be killed: job, number of the step, directory.
const ORDER: &str = "VIRTSEAL_TEST_CRASH";
const KILLED: &str = "killed_at_any_step_leaves_nothing_or_an_image_that_opens";

#[test]
fn killed_at_any_step_leaves_nothing_or_an_image_that_opens() {
    if let Ok(order) = std::env::var(ORDER) {
        carry_out(&order);
    }
    for job in ["new", "from", "replace", "nvram"] {
        for (number, step) in STEPS.iter().enumerate() {
            if job == "nvram" && *step == Step::Filled {
                continue;
            }
            let bench = Bench::new();
            fs::write(bench.path("envelope"), bench.envelope.to_json()).unwrap();
            fs::write(bench.path("source"), vec![0x77; 1 << 20]).unwrap();
            if job == "replace" {
                let empty = fs::File::create(bench.path("target")).unwrap();
                empty.set_len(64 << 20).unwrap();
            }
            let directory = bench.directory.path().display();
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", KILLED])
                .env(ORDER, format!("{job} {number} {directory}"))
                .stdout(Stdio::null())
                .status()
                .unwrap();
            assert_eq!(status.signal(), Some(9), "{job} {step:?}");
            examine(&bench, job, *step);
        }
    }
}

/// The part of the process that is killed.
fn carry_out(order: &str) -> ! {
    let (job, rest) = order.split_once(' ').unwrap();
    let (step, directory) = rest.split_once(' ').unwrap();
    let step = STEPS[step.parse::<usize>().unwrap()];
    let directory = Path::new(directory);
    let key = hex::decode(fs::read(directory.join("key")).unwrap()).unwrap();
    let passphrase = Dek::from_bytes(&key).unwrap().passphrase().unwrap();
    let envelope = Envelope::from_json(&fs::read_to_string(directory.join("envelope")).unwrap()).unwrap();
    let die_there = |done: Step| {
        if done == step {
            let me = nix::unistd::getpid();
            nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    };
    let (source, target) = (directory.join("source"), directory.join("target"));
    let request = CreateRequest::new(&target, Bytes(64 << 20));
    let failed = match job {
        "nvram" => volume::create_nvram_watched(&source, &target, &passphrase, die_there).err(),
        "converting" => volume::create_from(&request, &source, &envelope, &passphrase, die_converting).err(),
        "from" => {
            volume::create_from_watched(&request, &source, &envelope, &passphrase, go_on, die_there).err()
        }
        _ => {
            let held = target.exists().then(|| Held::open(&target).unwrap());
            volume::create_over_watched(held.as_ref(), &request, &envelope, &passphrase, die_there).err()
        }
    };
    panic!("still alive: {failed:?}");
}

/// Stops the child for good, so that only its parent's death can end it, and dies.
fn die_converting(_: volume::Percent) -> ControlFlow<()> {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    for thread in fs::read_dir("/proc/self/task").unwrap() {
        let children = fs::read_to_string(thread.unwrap().path().join("children")).unwrap();
        for child in children.split_whitespace() {
            kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGSTOP).unwrap();
            fs::write("child", child).unwrap();
        }
    }
    kill(Pid::this(), Signal::SIGKILL).unwrap();
    ControlFlow::Break(())
}

#[test]
fn killed_while_converting_leaves_neither_a_file_nor_a_process() {
    let bench = Bench::new();
    fs::write(bench.path("envelope"), bench.envelope.to_json()).unwrap();
    cloud_image(&bench, "source", "raw");
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", KILLED])
        .env(
            ORDER,
            format!("converting 0 {}", bench.directory.path().display()),
        )
        .current_dir(bench.directory.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9));
    let child = fs::read_to_string(bench.path("child")).unwrap();
    // A zombie that nobody has reaped yet has no executable any more.
    let gone = || fs::read_link(format!("/proc/{child}/exe")).is_err();
    for _ in 0..100 {
        if gone() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(gone(), "qemu-img {child} is still there");
    assert!(!bench.path("target").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
}

fn examine(bench: &Bench, job: &str, step: Step) {
    let published = step >= Step::Published;
    if published {
        bench.verify("target").unwrap();
    } else if job == "replace" {
        assert_eq!(bench.inspect("target").data, Data::Empty);
        assert_eq!(bench.inspect("target").format, Format::Raw);
    } else {
        assert!(!bench.path("target").exists(), "{job} {step:?}");
    }
    volume::sweep_temporaries(bench.directory.path()).unwrap();
    assert_eq!(bench.leftovers(), [""; 0], "{job} {step:?}");
    if !published && job != "replace" {
        bench.create(&bench.request("target", 64 << 20)).unwrap();
    }
}

#[test]
fn a_variable_store_holds_its_template() {
    let bench = Bench::new();
    let template: Vec<u8> = (0..540_672_u32).map(|n| (n / 3 % 251) as u8).collect();
    fs::write(bench.path("VARS.fd"), &template).unwrap();
    let convert = [
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "VARS.fd",
        "VARS.qcow2",
    ];
    bench.must("qemu-img", &convert);
    for source in ["VARS.fd", "VARS.qcow2"] {
        let target = format!("{source}.nvram");
        let (from, to) = (bench.path(source), bench.path(&target));
        let digest = volume::create_nvram(&from, &to, &bench.passphrase).unwrap();
        assert_eq!(digest, volume::header_digest(&to).unwrap());
        bench.verify(&target).unwrap();
        assert_eq!(bench.info(&target)["format"], "luks");
        bench.must("cryptsetup", &["luksDump", &target]);
        let open = [
            "open",
            "--test-passphrase",
            "--type",
            "luks1",
            "--key-file",
            "key",
        ];
        bench.must("cryptsetup", &[&open[..], &[&target]].concat());
        let image = format!("driver=luks,key-secret=s,file.filename={target}");
        let secret = ["convert", "--object", "secret,id=s,file=key", "--image-opts"];
        bench.must(
            "qemu-img",
            &[&secret[..], &[&image, "-O", "raw", "opened"]].concat(),
        );
        assert!(fs::read(bench.path("opened")).unwrap() == template, "{source}");
        let again = volume::create_nvram(&from, &to, &bench.passphrase);
        assert!(matches!(again, Err(VolumeError::Exists(_))));
    }
}

#[test]
fn a_template_that_is_none_is_refused() {
    let bench = Bench::new();
    fs::write(bench.path("odd"), [1; 1000]).unwrap();
    let huge = fs::File::create(bench.path("huge")).unwrap();
    huge.set_len(1 << 30).unwrap();
    for name in ["odd", "huge"] {
        let refused = volume::create_nvram(&bench.path(name), &bench.path("x"), &bench.passphrase);
        assert!(matches!(refused, Err(VolumeError::Unsupported { .. })));
        assert!(!bench.path("x").exists());
    }
}
