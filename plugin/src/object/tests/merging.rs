//! What was laid over an image goes down into it.

use super::*;

/// A sealed image with 0x11 in its first MiB, and an overlay of `size` on it with 0x22 in half of that.
fn overlaid(bench: &Bench, size: &str) {
    bench.create(&bench.request("base", 8 << 20)).unwrap();
    bench.qemu_io("base", "write -P 0x11 0 1M");
    lay(bench, "overlay", "base", size);
    // What is allocated whole needs nothing of what is below.
    let overlay = "json:{\"driver\":\"qcow2\",\"backing\":null,\"file\":{\"driver\":\"file\",\"filename\":\"overlay\"}}";
    bench.must("qemu-io", &["-c", "write -P 0x22 0 512k", overlay]);
}

fn lay(bench: &Bench, name: &str, base: &str, size: &str) {
    let options = [
        "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, name, size,
    ];
    bench.must("qemu-img", &options);
}

fn hold(bench: &Bench, name: &str) -> ImageLock {
    ImageLock::open(&bench.place(name)).unwrap()
}

fn base<'a>(held: &'a ImageLock, passphrase: &'a Passphrase) -> disk::Base<'a> {
    disk::Base {
        held,
        passphrase,
        below: Vec::new(),
    }
}

#[test]
fn all_that_an_overlay_has_goes_down_and_the_overlay_stays_as_it_was() {
    let bench = Bench::new();
    overlaid(&bench, "16M");
    let before = fs::read(bench.path("overlay")).unwrap();
    let (held, overlay) = (hold(&bench, "base"), hold(&bench, "overlay"));
    let base = base(&held, &bench.passphrase);
    let differs = disk::verify_merged(&overlay, &base, go_on).unwrap_err();
    assert!(matches!(differs, VolumeError::Merge { .. }), "{differs}");
    // However often.
    for _ in 0..2 {
        disk::merge(&overlay, &base, go_on).unwrap();
        disk::verify_merged(&overlay, &base, go_on).unwrap();
    }
    drop(overlay);
    drop(held);
    assert!(
        fs::read(bench.path("overlay")).unwrap() == before,
        "the overlay was written to"
    );
    bench.check("base");
    for command in [
        "read -P 0x22 0 512k",
        "read -P 0x11 512k 512k",
        "read -P 0 1M 15M",
    ] {
        bench.qemu_io("base", command);
    }
    let info = bench.inspect("base");
    assert_eq!(info.envelope.as_ref(), Some(&bench.envelope));
    assert_eq!(info.virtual_size, Bytes(16 << 20));
    let stored = fs::read(bench.path("base")).unwrap();
    assert!(
        !stored.windows(64).any(|window| window == [0x22; 64]),
        "it was written in plaintext"
    );
}

#[test]
fn a_merge_that_is_stopped_or_has_another_key_is_none() {
    let bench = Bench::new();
    overlaid(&bench, "8M");
    let (held, overlay) = (hold(&bench, "base"), hold(&bench, "overlay"));
    let stopped = disk::merge(&overlay, &base(&held, &bench.passphrase), |_| {
        ControlFlow::Break(())
    });
    assert!(matches!(stopped, Err(VolumeError::Stopped(_))), "{stopped:?}");
    let other = Dek::random().unwrap().passphrase().unwrap();
    let refused = disk::merge(&overlay, &base(&held, &other), go_on).unwrap_err();
    assert!(matches!(refused, VolumeError::Merge { .. }), "{refused}");
    let said = refused.to_string();
    assert!(said.contains("overlay") && said.contains("base"), "{said}");
}

#[test]
fn an_overlay_opens_only_what_is_handed_to_it() {
    let bench = Bench::new();
    overlaid(&bench, "8M");
    // It names its data elsewhere by now.
    bench.must(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=secret.raw",
            "evil",
            "8M",
        ],
    );
    let (held, overlay) = (hold(&bench, "base"), hold(&bench, "evil"));
    let refused = disk::merge(&overlay, &base(&held, &bench.passphrase), go_on).unwrap_err();
    assert!(matches!(refused, VolumeError::Merge { .. }), "{refused}");
}

/// A header says how small the clusters are that a check counts, and a hole how many: a file of a few KiB, whoever can write to it.
#[test]
fn what_would_take_more_memory_than_a_child_may_have_fails_alone() {
    let bench = Bench::new();
    let hole = |name: &str| {
        let file = fs::File::options().write(true).open(bench.path(name)).unwrap();
        file.set_len(4 << 40).unwrap();
        file
    };
    let request = CreateRequest {
        cluster_size: ClusterSize::from_bits(12).unwrap(),
        ..bench.request("base", 1 << 20)
    };
    bench.create(&request).unwrap();
    hole("base");
    let failed = disk::check(&bench.place("base"), &bench.passphrase).unwrap_err();
    assert!(failed.to_string().contains("Cannot allocate memory"), "{failed}");

    // One that was not closed is checked when it is opened.
    bench.create(&bench.request("below", 1 << 20)).unwrap();
    let options = "cluster_size=4096,refcount_bits=64,lazy_refcounts=on";
    bench.must(
        "qemu-img",
        &[
            "create", "-q", "-u", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b", "below", "overlay", "1M",
        ],
    );
    hole("overlay").write_all_at(&[1], 79).unwrap();
    let (held, overlay) = (hold(&bench, "below"), hold(&bench, "overlay"));
    let failed = disk::merge(&overlay, &base(&held, &bench.passphrase), go_on).unwrap_err();
    assert!(failed.to_string().contains("Cannot allocate memory"), "{failed}");
}
