//! Images filled from cloud images.

use super::*;

pub(crate) fn cloud_image(bench: &Bench, name: &str, format: &str) {
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
        let progress = |told| {
            if let disk::Heard::Done(percent) = told {
                heard.push(percent.0);
            }
            ControlFlow::Continue(())
        };
        let source = bench.path(&source);
        disk::create_from(&request, &source, &bench.envelope, &bench.passphrase, progress).unwrap();
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
    bench.create_from(&request, "odd").unwrap();
    assert_eq!(bench.inspect("disk").virtual_size, Bytes(196 * 512));
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
    let outcome = disk::create_from(&request, &source, &bench.envelope, &bench.passphrase, stop);
    assert!(matches!(outcome, Err(VolumeError::Stopped(_))));
    assert!(!bench.path("disk").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
}

/// What a guest or a user does to the source at the moment between its being judged and its being read.
fn meanwhile(bench: &Bench, deed: impl Fn()) -> VolumeError {
    cloud_image(bench, "source", "qcow2");
    let watch = |step| {
        if step == Step::Written {
            deed();
        }
    };
    let request = bench.request("disk", 1 << 30);
    let source = bench.path("source");
    let outcome = disk::create_from_watched(
        &request,
        &source,
        &bench.envelope,
        &bench.passphrase,
        go_on,
        watch,
    );
    assert!(!bench.path("disk").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
    outcome.unwrap_err()
}

#[test]
fn a_source_that_names_other_files_once_it_was_judged_reaches_none() {
    let bench = Bench::new();
    fs::write(bench.path("shadow"), vec![b'x'; 1 << 20]).unwrap();
    let secret = bench.path("shadow");
    let shadow = secret.to_str().unwrap();
    let backing = [
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", shadow, "evil", "64M",
    ];
    bench.must("qemu-img", &backing);
    let flip = || {
        fs::copy(bench.path("evil"), bench.path("source"))
            .map(drop)
            .unwrap();
    };
    let refused = meanwhile(&bench, flip);
    assert!(matches!(refused, VolumeError::SourceChanged(_)), "{refused}");

    let external = format!("data_file={shadow},data_file_raw=on");
    fs::remove_file(bench.path("evil")).unwrap();
    bench.must(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &external, "evil", "1M"],
    );
    let refused = meanwhile(&bench, flip).to_string();
    assert!(refused.contains("Permission denied"), "{refused}");
}

#[test]
fn a_source_that_changes_while_it_is_read_is_refused() {
    let bench = Bench::new();
    let source = bench.path("source");
    cloud_image(&bench, "other", "qcow2");
    let other = bench.path("other");
    let deeds: [&dyn Fn(); 3] = [
        &|| drop(bench.must("qemu-io", &["-f", "qcow2", "-c", "write -P 1 5M 64k", "source"])),
        &|| fs::rename(&other, &source).unwrap(),
        &|| {
            fs::File::open(&source)
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH)
                .unwrap();
        },
    ];
    for deed in deeds {
        let refused = meanwhile(&bench, deed);
        assert!(matches!(refused, VolumeError::SourceChanged(_)), "{refused}");
        fs::remove_file(&source).unwrap();
    }
}

#[test]
fn what_is_declared_decides_what_a_source_is() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "raw", "guest", "8M"]);
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "fake", "1M"]);
    bench.must("qemu-io", &["-f", "raw", "-c", "write -P 0x77 6M 64k", "guest"]);
    let fake = fs::read(bench.path("fake")).unwrap();
    let guest = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("guest"))
        .unwrap();
    guest.write_all_at(&fake, 0).unwrap();

    let mut request = bench.request("disk", 0);
    request.size = None;
    request.source_format = Some(DeclaredFormat::Raw);
    bench.create_from(&request, "guest").unwrap();
    assert_eq!(bench.inspect("disk").virtual_size, Bytes(8 << 20));
    bench.qemu_io("disk", "read -P 0x77 6M 64k");
    bench.qemu_io("disk", "read -P 0x51 0 1");

    fs::write(bench.path("zeros"), [0; 4096]).unwrap();
    request.path = bench.path("other");
    request.source_format = Some(DeclaredFormat::Qcow2);
    let refused = bench.create_from(&request, "zeros").unwrap_err().to_string();
    assert!(
        refused.contains("declared qcow2") && refused.contains("raw"),
        "{refused}"
    );
}

/// As `sha256sum` has it.
fn sum_of(bench: &Bench, program: &str, name: &str) -> Option<Digest> {
    let said = bench.must(program, &[name]);
    Digest::from_hex(said.split_whitespace().next().unwrap())
}

#[test]
fn what_has_the_sum_is_what_is_copied_and_nothing_else_is_made() {
    let bench = Bench::new();
    for format in ["raw", "qcow2"] {
        cloud_image(&bench, "cloud", format);
        for program in ["sha256sum", "sha512sum"] {
            let mut request = bench.request("disk", 1 << 30);
            request.source_digest = sum_of(&bench, program, "cloud");
            bench.create_from(&request, "cloud").unwrap();
            for command in ["read -P 0x11 0 1M", "read -P 0 1M 32M", "read -P 0x33 65535k 1k"] {
                bench.qemu_io("disk", command);
            }
            fs::remove_file(bench.path("disk")).unwrap();

            let expected = request.source_digest.clone().unwrap();
            let image = fs::OpenOptions::new()
                .write(true)
                .open(bench.path("cloud"))
                .unwrap();
            image.write_all_at(b"x", (64 << 10) - 1).unwrap();
            let found = sum_of(&bench, program, "cloud").unwrap();
            let refused = bench.create_from(&request, "cloud").unwrap_err().to_string();
            for part in ["/cloud", &expected.to_string(), &found.to_string()] {
                assert!(refused.contains(part), "{refused}");
            }
            assert!(!bench.path("disk").exists());
            assert_eq!(bench.leftovers(), [""; 0]);
            fs::remove_file(bench.path("cloud")).unwrap();
            cloud_image(&bench, "cloud", format);
        }
        fs::remove_file(bench.path("cloud")).unwrap();
    }
}

/// A write through a mapping leaves the file's times as they are: nothing but the copy is a guard against it.
#[test]
fn who_writes_to_a_source_whose_sum_was_right_reaches_nothing_of_the_volume() {
    let bench = Bench::new();
    cloud_image(&bench, "cloud", "qcow2");
    let mut request = bench.request("disk", 1 << 30);
    request.source_digest = sum_of(&bench, "sha256sum", "cloud");
    let source = bench.path("cloud");
    let spoil = |step| {
        if step == Step::Written {
            fs::write(&source, vec![0xee; 1 << 20]).unwrap();
        }
    };
    disk::create_from_watched(
        &request,
        &source,
        &bench.envelope,
        &bench.passphrase,
        go_on,
        spoil,
    )
    .unwrap();
    bench.qemu_io("disk", "read -P 0x22 33M 64k");
    bench.qemu_io("disk", "read -P 0 64M 64M");
}

#[test]
fn what_is_checked_is_judged_too_and_can_be_stopped() {
    let bench = Bench::new();
    fs::write(bench.path("packed"), b"\xfd7zXZ\0and so on").unwrap();
    let mut request = bench.request("disk", 1 << 30);
    request.source_digest = sum_of(&bench, "sha256sum", "packed");
    let refused = bench.create_from(&request, "packed").unwrap_err().to_string();
    assert!(refused.contains("xz"), "{refused}");

    cloud_image(&bench, "cloud", "raw");
    let (source, mut parts) = (bench.path("cloud"), 0);
    let stop = |_| {
        parts += 1;
        match parts {
            10 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let outcome = disk::create_from(&request, &source, &bench.envelope, &bench.passphrase, stop);
    assert!(matches!(outcome, Err(VolumeError::Stopped(_))), "{outcome:?}");
    assert!(!bench.path("disk").exists());
    assert_eq!(bench.leftovers(), [""; 0]);
}
