//! Images that are cut short, changed or hostile.

use super::*;

#[test]
fn a_truncated_image_is_an_error_that_names_it() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let whole = fs::read(bench.path("disk")).unwrap();
    for len in [
        0, 3, 4, 20, 103, 500, 4096, 65_536, 196_608, 200_000, 2_000_000, 2_260_000,
    ] {
        fs::write(bench.path("cut"), &whole[..len]).unwrap();
        match disk::inspect(&bench.place("cut")) {
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
    for (at, place, part) in [(luks + 9, luks + 8, "LUKS1 header"), (36, 36, "qcow2 header")] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        fs::write(bench.path("bad"), &damaged).unwrap();
        let error = disk::inspect(&bench.place("bad")).unwrap_err().to_string();
        let place = format!("byte {place} of the {part}");
        assert!(error.contains(&place) && error.contains("/bad"), "{error}");
    }
    // A copy of the envelope says nothing of the image: it is told, and the image is read.
    let mut damaged = whole;
    damaged[envelope] ^= 0xff;
    fs::write(bench.path("bad"), &damaged).unwrap();
    let info = disk::inspect(&bench.place("bad")).unwrap();
    assert!(info.envelope.is_none(), "{info:?}");
    let told = info.unreadable_envelope.unwrap();
    assert!(
        told.contains(&format!("byte {envelope} of the envelope")),
        "{told}"
    );
}

#[test]
fn a_name_that_would_break_the_line_is_an_error() {
    let bench = Bench::new();
    let options = [
        "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "a\nb", "disk",
    ];
    bench.must("qemu-img", &[&options[..], &["1G"]].concat());
    let error = disk::inspect(&bench.place("disk")).unwrap_err().to_string();
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
        if let Err(error) = disk::inspect(&bench.place("disk")) {
            assert!(error.to_string().contains("/disk"), "byte {at}: {error}");
        }
        // What can't be read may end, but never in the wrong hands: any answer but a panic will do.
        let _ = chain_of(&bench.path("disk"));
        std::os::unix::fs::FileExt::write_all_at(&image, &[whole[at]], at as u64).unwrap();
    }
    bench.verify("disk").unwrap();
}
