//! Encrypted variable stores.

use crate::object::nvram;

use super::*;

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
        let (from, to) = (bench.place(source), bench.place(&target));
        let make = || nvram::create(&from, &to, None, &bench.passphrase);
        make().unwrap().publish().unwrap();
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
        assert!(matches!(make(), Err(VolumeError::Exists(_))));
    }
}

#[test]
fn a_template_that_is_none_is_refused() {
    let bench = Bench::new();
    fs::write(bench.path("odd"), [1; 1000]).unwrap();
    let huge = fs::File::create(bench.path("huge")).unwrap();
    huge.set_len(1 << 30).unwrap();
    for name in ["odd", "huge"] {
        let refused = nvram::create(&bench.place(name), &bench.place("x"), None, &bench.passphrase);
        assert!(matches!(refused, Err(VolumeError::Unsupported { .. })));
        assert!(!bench.path("x").exists());
    }
}
