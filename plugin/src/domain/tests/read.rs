//! What is read, and how hostile XML is refused.

use std::path::Path;

use crate::domain::edit::{SealEdit, seal};
use crate::domain::{Domain, DomainError, Firmware, ObjectState, Source, objects};
use crate::object::vtpm::StateDir;
use uuid::Uuid;
use xml_bounds::Beyond;

use super::{fixture, fixtures, id, nvram_edit};

#[test]
fn every_fixture_is_read_and_says_what_it_has() {
    for (name, xml) in fixtures() {
        let domain = Domain::parse(&xml).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(domain.metadata.is_none(), "{name}");
    }
    let domain = Domain::parse(&fixture("libvirt11-running.xml")).unwrap();
    assert_eq!(domain.name, "büro-käse");
    assert_eq!(domain.disk("vda").unwrap().format.as_deref(), Some("qcow2"));
    let labels: Vec<_> = objects(&domain).into_iter().map(|object| object.label).collect();
    assert_eq!(labels, ["disk vda", "disk vdb", "vtpm", "nvram"]);
    let Firmware::Uefi(uefi) = domain.firmware else {
        panic!("no UEFI")
    };
    let nvram = uefi.nvram.unwrap();
    assert_eq!(
        nvram.source,
        Source::File("/var/lib/libvirt/qemu/nvram/büro-käse_VARS.fd".into())
    );
    assert_eq!(
        nvram.template.as_deref(),
        Some(Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd"))
    );
}

#[test]
fn firmware_that_libvirt_is_still_to_choose_is_shown_as_open() {
    let domain = Domain::parse(&fixture("hand-auto-efi.xml")).unwrap();
    let Firmware::Uefi(uefi) = &domain.firmware else {
        panic!("no UEFI")
    };
    assert!(uefi.loader.is_none() && uefi.nvram.is_none());
    let mut nvram = nvram_edit(&domain, id(1));
    nvram.loader = None;
    let edit = SealEdit {
        nvram: Some(nvram),
        ..SealEdit::default()
    };
    assert!(matches!(
        seal(&fixture("hand-auto-efi.xml"), &edit),
        Err(DomainError::FirmwareOpen { .. })
    ));
}

#[test]
fn sources_of_every_type_are_read() {
    let domain = Domain::parse(&fixture("sources.xml")).unwrap();
    let source = |target: &str| &domain.disk(target).unwrap().source;
    assert_eq!(source("vda"), &Source::Elsewhere);
    assert_eq!(source("vdb"), &Source::Block("/dev/vg/lv".into()));
    let (pool, volume) = ("default".to_owned(), "a.qcow2".to_owned());
    assert_eq!(source("vdc"), &Source::Volume { pool, volume });
    assert_eq!(source("fda"), &Source::Empty);
    let layers = &domain.disk("vdd").unwrap().backing;
    assert_eq!(
        layers
            .iter()
            .map(|layer| layer.source.path().unwrap())
            .collect::<Vec<_>>(),
        [Path::new("/srv/base.qcow2"), Path::new("/dev/vg/golden")]
    );
    assert!(domain.disk("vde").unwrap().readonly);
}

#[test]
fn hostile_xml_gives_an_error_with_its_place() {
    let bomb = "<!DOCTYPE d [<!ENTITY a 'xxxxxxxxxx'><!ENTITY b '&a;&a;&a;&a;'>]><domain>&b;</domain>";
    let deep = format!("{}{}", "<a>".repeat(100_000), "</a>".repeat(100_000));
    let deep_domain = format!(
        "<domain type='kvm'><name>a</name><uuid>{}</uuid>{deep}</domain>",
        Uuid::nil()
    );
    assert!(matches!(
        Domain::parse(bomb),
        Err(DomainError::Beyond(Beyond::Dtd))
    ));
    assert!(matches!(
        Domain::parse(&" ".repeat(Domain::MAX_XML + 1)),
        Err(DomainError::TooLong { .. })
    ));
    assert!(matches!(
        Domain::parse(&"<a/>".repeat(100)),
        Err(DomainError::Xml(_))
    ));
    assert!(matches!(
        Domain::parse(&deep_domain),
        Err(DomainError::Beyond(Beyond::Depth))
    ));
    let wide: String = (0..300).map(|number| format!(" a{number}=''")).collect();
    assert!(matches!(
        Domain::parse(&format!("<domain{wide}/>")),
        Err(DomainError::Beyond(Beyond::Attributes))
    ));
    assert!(matches!(
        Domain::parse(&format!("<d>{}</d>", "<a/>".repeat(300_000))),
        Err(DomainError::Xml(_))
    ));
    for (from, to, message) in [
        (
            "<uuid>6b2f",
            "<uuid>zz2f",
            "3:3: \"zz2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7\" is not a UUID",
        ),
        ("<name>web01</name>", "", "1:1: <name> is missing"),
        ("dev='sda'", "dev='vda'", "28:5: a second disk vda"),
        (
            "device='cdrom'",
            "device='drum'",
            "28:5: \"drum\" is not a kind of disk",
        ),
        (
            "<target dev='vda' bus='virtio'/>",
            "",
            "22:5: <target> is missing",
        ),
    ] {
        let xml = fixture("libvirt9-uefi.xml");
        assert!(xml.contains(from), "{from}");
        assert_eq!(
            Domain::parse(&xml.replacen(from, to, 1)).unwrap_err().to_string(),
            message
        );
    }
    assert!(matches!(
        Domain::parse("<domain xmlns='urn:a'/>"),
        Err(DomainError::NotADomain { .. })
    ));
    let malformed = Domain::parse("<domain>\n  <name></domain>").unwrap_err();
    assert!(
        std::error::Error::source(&malformed)
            .unwrap()
            .to_string()
            .contains("2:")
    );
}

#[test]
fn what_is_kept_elsewhere_is_seen_and_can_be_vouched_for_by_nobody() {
    let tpm = |source: &str| {
        format!(
            "<domain type='kvm'><name>a</name><uuid>{}</uuid><devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'>\
             <encryption secret='{}'/>{source}</backend></tpm></devices></domain>",
            Uuid::from_u128(1),
            Uuid::from_u128(2)
        )
    };
    let swtpm_dir = Path::new("/swtpm");
    let usual = Domain::parse(&tpm("")).unwrap();
    assert!(
        StateDir::of_domain(&usual, swtpm_dir)
            .unwrap()
            .path()
            .starts_with(swtpm_dir)
    );
    assert!(matches!(objects(&usual)[0].state, ObjectState::Sealed(_)));
    for source in [
        "<source type='dir' path='/elsewhere'/>",
        "<source type='file' path='/elsewhere/state'/>",
        "<source/>",
    ] {
        let elsewhere = Domain::parse(&tpm(source)).unwrap();
        assert!(StateDir::of_domain(&elsewhere, swtpm_dir).is_err(), "{source}");
        let state = objects(&elsewhere).remove(0).state;
        assert!(matches!(state, ObjectState::Unsupported(reason) if reason.contains("place of its own")));
    }

    let disk = |inside: &str| {
        format!(
            "<domain type='kvm'><name>a</name><uuid>{}</uuid><devices><disk type='file' device='disk'><source file='/d'>{inside}\
             <encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption></source><target dev='vda'/></disk>\
             </devices></domain>",
            Uuid::from_u128(1),
            Uuid::from_u128(2)
        )
    };
    for (inside, part) in [
        (
            "<slices><slice type='storage' offset='1' size='2'/></slices>",
            "<slices>",
        ),
        (
            "<dataStore type='file'><source file='/x'/></dataStore>",
            "<dataStore>",
        ),
    ] {
        let state = objects(&Domain::parse(&disk(inside)).unwrap()).remove(0).state;
        assert!(
            matches!(state, ObjectState::Unsupported(reason) if reason.contains(part)),
            "{part}"
        );
    }
    let whole = objects(&Domain::parse(&disk("")).unwrap()).remove(0).state;
    assert!(matches!(whole, ObjectState::Sealed(_)));
}
