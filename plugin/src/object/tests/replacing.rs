//! An encrypted image in the place of an empty one.

use crate::object::nvram;

use super::*;

#[test]
fn an_empty_image_is_replaced_and_keeps_its_owner_and_mode() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "1G"]);
    fs::set_permissions(bench.path("disk"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(bench.path("disk"), Some(12), Some(34)).unwrap();
    let request = bench.request("disk", 1 << 30);
    assert!(matches!(bench.create(&request), Err(VolumeError::Exists(_))));

    let inspected = bench.inspect("disk").file_id;
    let held = ImageLock::unchanged(&bench.place("disk"), inspected).unwrap();
    let held = bench.create_over(held, &request).unwrap();
    bench.verify("disk").unwrap();
    let found = fs::metadata(bench.path("disk")).unwrap();
    assert_eq!((found.mode() & 0o777, found.uid(), found.gid()), (0o640, 12, 34));
    assert!(matches!(
        bench.create_over(held, &request),
        Err(VolumeError::Changed(_))
    ));
    assert!(matches!(
        ImageLock::unchanged(&bench.place("disk"), inspected),
        Err(VolumeError::Changed(_))
    ));
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_held_image_gives_way_to_a_plain_one() {
    let bench = Bench::new();
    bench.create(&bench.request("disk", 1 << 30)).unwrap();
    let held = ImageLock::open(&bench.place("disk")).unwrap();
    let plain = disk::prepare_empty(held, Bytes(1 << 30)).unwrap();
    plain.publish().unwrap();
    let found = bench.inspect("disk");
    assert_eq!(
        (found.format, found.virtual_size),
        (Format::Qcow2, Bytes(1 << 30))
    );

    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_store_of_variables_is_encrypted_in_its_place_and_decrypted_again() {
    let bench = Bench::new();
    let variables: Vec<u8> = (0..4096_u32).map(|n| (n / 3 % 251) as u8).collect();
    fs::write(bench.path("store"), &variables).unwrap();
    fs::set_permissions(bench.path("store"), fs::Permissions::from_mode(0o640)).unwrap();
    let held = || ImageLock::open(&bench.place("store")).unwrap();
    nvram::encrypt(held(), &bench.passphrase)
        .unwrap()
        .publish()
        .unwrap();
    bench.verify("store").unwrap();
    assert_eq!(bench.info("store")["format"], "luks");
    let found = fs::metadata(bench.path("store")).unwrap();
    assert_eq!(found.mode() & 0o777, 0o640);
    // One that is encrypted is none to be encrypted.
    let again = nvram::encrypt(held(), &bench.passphrase);
    assert!(matches!(again, Err(VolumeError::Unsupported { .. })));

    nvram::decrypt(held(), &bench.passphrase)
        .unwrap()
        .publish()
        .unwrap();
    assert!(fs::read(bench.path("store")).unwrap() == variables);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_qemu_that_opened_the_old_image_before_gets_no_lock_on_it_after() {
    let bench = Bench::new();
    bench.must("qemu-img", &["create", "-q", "-f", "qcow2", "disk", "1G"]);
    // As a start that is a moment late: the file is open, its locks are not yet taken.
    let opened = fs::File::open(bench.path("disk")).unwrap();
    let held = ImageLock::open(&bench.place("disk")).unwrap();
    let held = bench.create_over(held, &bench.request("disk", 1 << 30)).unwrap();
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
    let held = ImageLock::open(&bench.place("disk")).unwrap();
    let outcome = bench.create_over(held, &bench.request("disk", 1 << 30));
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
        ImageLock::open(&bench.place("disk")),
        Err(VolumeError::InUse(_))
    ));
    drop(commands);
    user.wait().unwrap();
}
