//! Which keys a start needs, and which sealed VM must not start.

use std::path::Path;

use crate::domain::{Domain, Refusal};
use crate::model::envelope::ObjectKind;

use super::{fixture, id, seal_all, sealed_objects};

/// Sealed XML in which one thing was changed, and how its start is refused.
#[test]
fn a_sealed_vm_with_a_plain_part_must_not_start() {
    let xml = seal_all(&fixture("libvirt9-uefi.xml"));
    let refusal = |from: &str, to: &str| {
        assert!(xml.contains(from), "{from}");
        sealed_objects(&Domain::parse(&xml.replacen(from, to, 1)).unwrap()).unwrap_err()
    };
    let plain = |kind, label: &str, path: Option<&str>| Refusal::Plain {
        vm: "web01".into(),
        kind,
        label: label.into(),
        path: path.map(Into::into),
    };
    let cd = "<disk type='file' device='cdrom'>";
    let disk = "<disk type='file' device='disk'><source file='/a'/><target dev='vdx'/></disk>";
    let overlay = refusal(cd, &format!("{disk}{cd}"));
    assert_eq!(overlay, plain(ObjectKind::Disk, "disk vdx", Some("/a")));
    assert_eq!(
        overlay.to_string(),
        "disk vdx (/a) of sealed VM web01 is not encrypted"
    );
    assert_eq!(
        refusal(&format!("<encryption secret='{}'/>", id(100)), ""),
        plain(ObjectKind::Vtpm, "vtpm", None)
    );
    let nvram = xml[xml.find("<encryption format='luks' engine='qemu'>").unwrap()..]
        .split_inclusive("</encryption>")
        .next()
        .unwrap();
    assert_eq!(refusal(nvram, ""), plain(ObjectKind::Nvram, "nvram", None));
    let cases = [
        (" engine='qemu'", "", "nvram"),
        ("<target dev='vda'", "<transient/><target dev='vda'", "disk vda"),
        (
            "<encryption format='luks'>",
            "<encryption format='qcow'>",
            "disk vda",
        ),
    ];
    for (from, to, label) in cases {
        let found = refusal(from, to);
        assert!(
            matches!(&found, Refusal::Unsupported { label: found, .. } if found == label),
            "{found}"
        );
    }
    let unsealed = Domain::parse(&fixture("libvirt9-uefi.xml")).unwrap();
    assert_eq!(
        sealed_objects(&unsealed),
        Err(Refusal::NotSealed { vm: "web01".into() })
    );
}

#[test]
fn encrypted_layers_need_their_keys_too() {
    let xml = fixture("sources.xml");
    let encryption = format!(
        "<encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>",
        id(60)
    );
    let based = xml.replace(
        "<source file='/srv/base.qcow2'/>",
        &format!("<source file='/srv/base.qcow2'>{encryption}</source>"),
    );
    let sealed = seal_all(&based);
    let needed = sealed_objects(&Domain::parse(&sealed).unwrap()).unwrap();
    let layer = needed.iter().find(|object| object.secret == id(60)).unwrap();
    assert_eq!(layer.label, "disk vdd (backing layer 1)");
    assert_eq!(layer.path.as_deref(), Some(Path::new("/srv/base.qcow2")));
}
