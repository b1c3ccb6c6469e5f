//! Images against the programs that must understand them: qemu-img, qemu-io and cryptsetup.

mod damage;
mod filling;
mod killed;
mod merging;
mod nvram;
mod replacing;

use std::fs;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::domain::DeclaredFormat;
use crate::host::permitted::PermittedPath;
use crate::model::digest::Digest;
use crate::model::envelope::{
    Binding, Envelope, EnvelopeId, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId,
};
use crate::object::disk::{
    self, Backing, Bytes, ClusterSize, CreateRequest, Data, Declaration, Format, ImageLock, Step, VolumeError,
};
use crate::secret::{Dek, Passphrase};
use serde_json::Value;
use tempfile::TempDir;

fn place(path: &Path) -> PermittedPath {
    PermittedPath::named_by_root(path).unwrap()
}

fn chain_of(path: &Path) -> Result<Vec<disk::Layer>, VolumeError> {
    match disk::known_layers(&place(path), |layer| Ok(place(layer))) {
        (layers, None) => Ok(layers),
        (_, Some(error)) => Err(error),
    }
}

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

    fn place(&self, name: &str) -> PermittedPath {
        place(&self.path(name))
    }

    fn request(&self, name: &str, size: u64) -> CreateRequest {
        CreateRequest::new(self.path(name), Bytes(size))
    }

    fn create(&self, request: &CreateRequest) -> Result<Bytes, VolumeError> {
        disk::create(request, &self.envelope, &self.passphrase)
    }

    /// What was replaced, still held.
    fn create_over(&self, held: ImageLock, request: &CreateRequest) -> Result<ImageLock, VolumeError> {
        let prepared = disk::prepare_over(held, request, &self.envelope, &self.passphrase)?;
        Ok(prepared.publish()?.expect("one was replaced"))
    }

    fn create_from(&self, request: &CreateRequest, source: &str) -> Result<(), VolumeError> {
        let source = self.path(source);
        disk::create_from(request, &source, &self.envelope, &self.passphrase, go_on)
    }

    fn verify(&self, name: &str) -> Result<(), VolumeError> {
        disk::open(&self.place(name), &self.passphrase)
    }

    fn inspect(&self, name: &str) -> disk::VolumeInfo {
        disk::inspect(&self.place(name)).unwrap()
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
    let dek = Dek::random().unwrap();
    Verified::new(&binding, vec![stanza; stanzas], &dek)
        .unwrap()
        .into_envelope()
}

fn go_on(_: disk::Heard) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn qemu_reads_and_writes_images_of_every_cluster_size() {
    let mut bench = Bench::new();
    for (bits, stanzas) in (9..=21).flat_map(|bits| [(bits, 1), (bits, 16)]) {
        bench.envelope = envelope(stanzas);
        let mut request = bench.request("disk", 3 << 30);
        request.cluster_size = ClusterSize::from_bits(bits).unwrap();
        assert_eq!(bench.create(&request).unwrap(), Bytes(3 << 30));

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
        assert_eq!(created.0, size.next_multiple_of(512));
        assert_eq!(bench.info("disk")["virtual-size"], created.0);
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
    let refused = disk::open(&bench.place("disk"), &other).unwrap_err();
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

/// A volume of ours whose LUKS1 header was changed by whoever can write to the file; `edit` gets the header.
fn with_header(bench: &Bench, edit: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(bench.path("disk")).unwrap();
    let magic = b"LUKS\xba\xbe\x00\x01";
    let start = bytes.windows(8).position(|window| window == magic).unwrap();
    edit(&mut bytes[start..start + 592]);
    fs::write(bench.path("disk"), bytes).unwrap();
}

#[test]
fn a_header_that_asks_for_much_work_is_refused_at_once() {
    let bench = Bench::new();
    fn slot(number: usize) -> usize {
        208 + 48 * number
    }
    fn set(header: &mut [u8], at: usize, value: u32) {
        header[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    let refused = |edit: fn(&mut [u8])| {
        bench.create(&bench.request("disk", 1 << 20)).unwrap();
        with_header(&bench, edit);
        let refused = bench.verify("disk").unwrap_err();
        assert!(
            matches!(refused, VolumeError::TooManyIterations { .. }),
            "{refused}"
        );
        // Nothing is derived to say what it is.
        assert!(bench.inspect("disk").luks.is_some());
        fs::remove_file(bench.path("disk")).unwrap();
    };
    refused(|header| set(header, slot(0) + 4, 100_001));
    refused(|header| set(header, 164, 100_001));
    refused(|header| {
        for number in 1..8 {
            set(header, slot(number), 0x00ac_71f3);
            set(header, slot(number) + 4, 100_000);
        }
    });
    bench.create(&bench.request("disk", 1 << 20)).unwrap();
    with_header(&bench, |header| set(header, slot(0) + 4, 100_000));
    let other = bench.verify("disk").unwrap_err();
    assert!(matches!(other, VolumeError::NoKeyslotOpens(_)), "{other}");
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
        format: DeclaredFormat::Qcow2,
    });
    assert_eq!(bench.create(&request).unwrap(), Bytes(2 << 30));
    bench.check("overlay");
    bench.qemu_io("overlay", "read -P 9 0 64k");
    bench.qemu_io("overlay", "write -P 8 0 64k");
    bench.qemu_io("overlay", "read -P 8 0 64k");
    bench.must("qemu-io", &["-f", "qcow2", "-c", "read -P 9 0 64k", "base"]);

    let chain = chain_of(&bench.path("overlay")).unwrap();
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
        ("base", DeclaredFormat::Raw),
        ("nbd:base", DeclaredFormat::Raw),
        ("gone", DeclaredFormat::Raw),
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
        ("d", "not a local file"),
    ] {
        let error = chain_of(&bench.path(image)).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_layer_that_is_declared_raw_is_not_looked_into() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "guest", "1G"]);
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "guest", "top"];
    bench.must("qemu-img", &options);
    let chain = chain_of(&bench.path("top")).unwrap();
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

/// What a guest can write to its own raw disk: the header and tables of an empty qcow2 image, and its data behind them.
#[test]
fn an_empty_header_before_data_is_no_empty_image() {
    let bench = Bench::new();
    for options in [
        "preallocation=off",
        "preallocation=metadata",
        "cluster_size=512",
        "compat=0.10",
    ] {
        bench.must(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, "guest", "64M"],
        );
        assert_eq!(bench.inspect("guest").data, Data::Empty, "{options}");
        let guest = fs::OpenOptions::new()
            .write(true)
            .open(bench.path("guest"))
            .unwrap();
        let end = guest.metadata().unwrap().len();
        guest.set_len(96 << 20).unwrap();
        assert_eq!(bench.inspect("guest").data, Data::Empty, "{options}: longer");
        for at in [end.max(1 << 20), 50 << 20, (96 << 20) - 1] {
            guest.write_all_at(b"d", at).unwrap();
            assert_eq!(bench.inspect("guest").data, Data::HasData, "{options}: {at}");
            guest.write_all_at(&[0], at).unwrap();
        }
        fs::remove_file(bench.path("guest")).unwrap();
    }
}

#[test]
fn a_contradicted_declaration_is_refused_and_a_confirmed_one_taken() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "qcow2", "1M"]);
    fs::write(bench.path("raw"), vec![0; 1 << 20]).unwrap();
    fs::write(bench.path("vmdk"), b"KDMV and the rest").unwrap();
    fs::write(bench.path("luks"), b"LUKS\xba\xbe\x00\x02 and the rest").unwrap();
    fs::write(bench.path("torn"), b"QFI\xfb\x00\x00\x00\x09 and the rest").unwrap();
    let (raw, qcow2) = (DeclaredFormat::Raw, DeclaredFormat::Qcow2);
    let look = |name: &str, declaration| disk::inspect_declared(&bench.place(name), declaration);
    for (name, declared, found) in [
        ("qcow2", raw, "qcow2"),
        ("vmdk", raw, "VMDK"),
        ("luks", raw, "LUKS2"),
        ("torn", raw, "qcow2"),
        ("raw", qcow2, "raw"),
        ("vmdk", qcow2, "VMDK"),
    ] {
        let refused = look(name, Declaration::Stated(declared)).unwrap_err();
        assert!(matches!(refused, VolumeError::Contradiction { .. }), "{refused}");
        let said = refused.to_string();
        assert!(said.contains(declared.as_str()) && said.contains(found), "{said}");
        if declared == raw {
            let info = look(name, Declaration::Confirmed(raw)).unwrap();
            assert_eq!((info.format, info.data), (Format::Raw, Data::HasData), "{name}");
        } else {
            assert!(look(name, Declaration::Confirmed(qcow2)).is_err(), "{name}");
        }
    }
    assert_eq!(
        look("qcow2", Declaration::Stated(qcow2)).unwrap().data,
        Data::Empty
    );
    assert_eq!(look("raw", Declaration::Stated(raw)).unwrap().data, Data::Empty);
}
