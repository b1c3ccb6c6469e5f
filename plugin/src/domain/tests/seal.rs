//! What sealing and unsealing write.

use std::io::Write;
use std::process::Command;

use crate::domain::edit::{DiskEdit, DiskFile, SealEdit, name_files, seal, set_envelopes, unseal};
use crate::domain::{Domain, DomainError, Encryption, ObjectState, SecretRef, Source, objects};

use super::{Plan, fixture, fixtures, id, nvram_edit, seal_all, sealed_objects};

#[test]
fn sealing_seals_everything_and_nothing_else_changes() {
    let changed = [
        "<source",
        "<driver",
        "/>\r\n",
        "<nvram",
        "<backend type",
        "<metadata/>",
        "<os firmware",
        "firmware>",
        "<feature ",
        "<loader secure",
        "<features>",
    ];
    let added = [
        "encryption",
        "<driver",
        "<secret type='passphrase'",
        "source",
        "nvram",
        "backend",
        "tpm",
        "metadata>",
        "virtseal:",
        "<os>",
        "<loader readonly='yes' secure='yes'",
        "<features>",
        "file=\"/srv/ünï >.img\">",
    ];
    for (name, xml) in fixtures() {
        let sealed = seal_all(&xml);
        let domain = Domain::parse(&sealed).unwrap();
        let plain: Vec<_> = objects(&domain)
            .into_iter()
            .filter(|o| !matches!(o.state, ObjectState::Sealed(_)))
            .collect();
        assert_eq!(plain, [], "{name}");
        assert_eq!(
            domain.metadata.as_ref().unwrap().envelopes,
            Plan::of(&Domain::parse(&xml).unwrap()).envelopes
        );
        assert_eq!(
            sealed_objects(&domain).unwrap().len(),
            objects(&domain).len(),
            "{name}"
        );
        if name == "one-line-bios.xml" {
            assert_eq!(sealed.lines().count(), 1);
            continue;
        }
        let (gone, came) = difference(&xml, &sealed);
        for line in gone {
            assert!(
                changed.iter().any(|part| line.contains(part)),
                "{name} lost {line:?}"
            );
        }
        for line in came {
            assert!(
                added.iter().any(|part| line.contains(part)),
                "{name} got {line:?}"
            );
            assert_eq!(line.ends_with("\r\n"), xml.contains("\r\n"), "{name}: {line:?}");
            assert!(!xml.contains('\t') || line.starts_with('\t'), "{name}: {line:?}");
        }
    }
}

#[test]
fn sealing_twice_changes_nothing() {
    for (name, xml) in fixtures() {
        let plan = Plan::of(&Domain::parse(&xml).unwrap());
        let sealed = seal(&xml, &plan.edit()).unwrap();
        assert_eq!(seal(&sealed, &plan.edit()).unwrap(), sealed, "{name}");
        assert_eq!(set_envelopes(&sealed, &plan.envelopes).unwrap(), sealed, "{name}");
    }
}

#[test]
fn unsealing_gives_every_byte_back() {
    for (name, xml) in fixtures() {
        let domain = Domain::parse(&xml).unwrap();
        let mut plan = Plan::of(&domain);
        // A <tpm> or another <nvram> stays where it was put, and libvirt goes on keeping the TPM's state.
        plan.nvram = None;
        plan.vtpm = plan.vtpm.filter(|_| domain.tpm.is_some());
        let unsealed = unseal(&seal(&xml, &plan.edit()).unwrap()).unwrap();
        let unsealed = without_drivers(&unsealed.replace(" persistent_state='yes'", ""));
        let plain = without_drivers(&xml);
        match name.as_str() {
            // An empty <metadata/>, and a space in front of "/>".
            "tabs-crlf-arm.xml" => assert_eq!(unsealed, plain.replace("\t<metadata/>\r\n", "")),
            "hand-auto-efi.xml" => assert_eq!(unsealed, plain.replace("'  />", "'/>")),
            _ => assert_eq!(unsealed, plain, "{name}"),
        }
        assert_eq!(unseal(&xml).unwrap(), xml);
    }
}

/// The formats of the images stay what they have become.
fn without_drivers(xml: &str) -> String {
    let mut rest = xml;
    let mut kept = String::new();
    while let Some((before, driver)) = rest.split_once("<driver") {
        kept.push_str(before.trim_end());
        rest = driver.split_once("/>").unwrap().1;
    }
    kept + rest
}

#[test]
fn libvirts_schema_accepts_what_is_written() {
    for (name, xml) in fixtures() {
        for (what, text) in [
            ("as it is", xml.clone()),
            ("sealed", seal_all(&xml)),
            ("unsealed", unseal(&seal_all(&xml)).unwrap()),
        ] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            let output = Command::new("virt-xml-validate")
                .arg(file.path())
                .arg("domain")
                .output();
            let output = output.expect("virt-xml-validate is in the package libvirt-clients");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name} {what}: {errors}\n{text}");
        }
    }
}

#[test]
fn a_sealed_domain_looks_as_libvirt_writes_it() {
    let xml = fixture("libvirt9-uefi.xml");
    let mut plan = Plan::of(&Domain::parse(&xml).unwrap());
    plan.nvram.as_mut().unwrap().path = "/var/lib/libvirt/qemu/nvram/a'b\" & <c>.luks".into();
    plan.envelopes.clear();
    let sealed = seal(&xml, &plan.edit()).unwrap();
    let (gone, came) = difference(&xml, &sealed);
    assert_eq!(
        gone.concat(),
        "    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/web01_VARS.fd</nvram>
      <source file='/var/lib/libvirt/images/web01.qcow2'/>
"
    );
    assert_eq!(
        came.concat(),
        "  <metadata>
    <virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'/>
  </metadata>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd' type='file'>
      <source file='/var/lib/libvirt/qemu/nvram/a&apos;b&quot; &amp; &lt;c&gt;.luks'>
        <encryption format='luks' engine='qemu'>
          <secret type='passphrase' uuid='e0000000-0000-4000-8000-000000000002'/>
        </encryption>
      </source>
    </nvram>
      <source file='/var/lib/libvirt/images/web01.qcow2'>
        <encryption format='luks'>
          <secret type='passphrase' uuid='e0000000-0000-4000-8000-000000000001'/>
        </encryption>
      </source>
    <tpm model='tpm-crb'>
      <backend type='emulator' version='2.0' persistent_state='yes'>
        <encryption secret='e0000000-0000-4000-8000-000000000064'/>
      </backend>
    </tpm>
"
    );
}

/// What libvirt 11.3 made of a sealed fixture: it moves attributes about, adds some and changes all quotes.
#[test]
fn sealed_xml_comes_back_from_libvirt() {
    let xml = include_str!("../../../tests/domains/sealed/libvirt11.xml");
    let domain = Domain::parse(xml).unwrap();
    let needed = sealed_objects(&domain).unwrap();
    assert_eq!(needed.len(), 4);
    let envelopes = &domain.metadata.as_ref().unwrap().envelopes;
    assert!(
        needed
            .iter()
            .all(|object| envelopes.iter().any(|found| found.id == object.secret))
    );
    assert_eq!(set_envelopes(xml, envelopes).unwrap(), xml);
    let unsealed = unseal(xml).unwrap();
    assert!(!unsealed.contains("<encryption") && !unsealed.contains("virtseal:"));
    assert!(unsealed.contains("<libosinfo:os ") && unsealed.contains("<backup:note>keep &amp; rotate<"));
}

#[test]
fn a_loader_is_written_where_libvirt_had_the_choice() {
    let sealed = seal_all(&fixture("hand-auto-efi.xml"));
    assert!(sealed.contains("<os>"));
    assert!(!sealed.contains("<firmware>"));
    assert!(sealed.contains(
        "        <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.secboot.fd</loader>\n"
    ));
    assert!(sealed.contains("<features><acpi/><apic/><smm state='on'/></features>"));
    let given = seal_all(&fixture("libvirt11-inactive.xml"));
    assert!(
        given.contains("<os firmware='efi'>") && given.contains(">/usr/share/OVMF/OVMF_CODE_4M.fd</loader>")
    );
}

#[test]
fn the_tpm_model_follows_the_architecture() {
    assert!(seal_all(&fixture("tabs-crlf-arm.xml")).contains("<tpm model='tpm-tis'>"));
    assert!(seal_all(&fixture("one-line-bios.xml")).contains("<tpm model='tpm-crb'>"));
}

#[test]
fn what_must_not_be_sealed_is_refused() {
    let xml = fixture("sources.xml");
    let disk = |target: &str| DiskEdit {
        target: target.into(),
        envelope: id(1),
        instead_of: None,
    };
    let with = |disk: DiskEdit| {
        seal(
            &xml,
            &SealEdit {
                disks: vec![disk],
                ..SealEdit::default()
            },
        )
    };
    assert!(matches!(with(disk("vdz")), Err(DomainError::NoObject(label)) if label == "disk vdz"));
    assert!(matches!(with(disk("sda")), Err(DomainError::Unsupported { .. })));
    let uefi = fixture("libvirt9-uefi.xml");
    for path in ["/srv/a\nb", "", " /srv/a", "/srv/\u{ffff}"] {
        let mut nvram = nvram_edit(&Domain::parse(&uefi).unwrap(), id(1));
        nvram.path = path.into();
        let edit = SealEdit {
            nvram: Some(nvram),
            ..SealEdit::default()
        };
        assert!(
            matches!(seal(&uefi, &edit), Err(DomainError::Unwritable(_))),
            "{path:?}"
        );
    }
    let sealed = seal_all(&xml);
    let other = DiskEdit {
        envelope: id(77),
        ..disk("vdd")
    };
    let edit = SealEdit {
        disks: vec![other],
        ..SealEdit::default()
    };
    let error = seal(&sealed, &edit).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("disk vdd is encrypted already, with another secret"),
        "{error}"
    );
    // Where the caller knows of it, that one goes.
    let stated = Domain::parse(&sealed)
        .unwrap()
        .disk("vdd")
        .unwrap()
        .encryption
        .clone();
    let Some(Encryption {
        secret: SecretRef::Uuid(stated),
        ..
    }) = stated
    else {
        panic!("vdd is sealed");
    };
    let mut edit = edit;
    edit.disks[0].instead_of = Some(stated);
    let healed = seal(&sealed, &edit).unwrap();
    assert!(healed.contains(&id(77).to_string()) && !healed.contains(&format!("uuid='{stated}'")));
    let bios = fixture("one-line-bios.xml");
    let nvram = Some(nvram_edit(&Domain::parse(&bios).unwrap(), id(1)));
    assert!(matches!(
        seal(
            &bios,
            &SealEdit {
                nvram,
                ..SealEdit::default()
            }
        ),
        Err(DomainError::NotUefi)
    ));
}

/// Lines that went and lines that came, by the longest common subsequence.
fn difference<'x>(old: &'x str, new: &'x str) -> (Vec<&'x str>, Vec<&'x str>) {
    let old: Vec<_> = old.split_inclusive('\n').collect();
    let new: Vec<_> = new.split_inclusive('\n').collect();
    let mut common = vec![vec![0; new.len() + 1]; old.len() + 1];
    for (row, left) in old.iter().enumerate().rev() {
        for (column, right) in new.iter().enumerate().rev() {
            common[row][column] = if left == right {
                common[row + 1][column + 1] + 1
            } else {
                common[row + 1][column].max(common[row][column + 1])
            };
        }
    }
    let (mut row, mut column, mut gone, mut came) = (0, 0, Vec::new(), Vec::new());
    while row < old.len() || column < new.len() {
        if row < old.len() && column < new.len() && old[row] == new[column] {
            (row, column) = (row + 1, column + 1);
        } else if column == new.len()
            || (row < old.len() && common[row + 1][column] >= common[row][column + 1])
        {
            gone.push(old[row]);
            row += 1;
        } else {
            came.push(new[column]);
            column += 1;
        }
    }
    (gone, came)
}

#[test]
fn a_volume_of_a_pool_becomes_its_file_and_nothing_else_changes() {
    let xml = fixture("sources.xml");
    let file = |is_device| DiskFile {
        target: "vdc".to_owned(),
        path: "/images/a'b.qcow2".into(),
        is_device,
    };
    let named = name_files(&xml, &[file(false)]).unwrap();
    let (old, new) = (
        "<disk type='volume' device='disk'>\n      <driver name='qemu' type='qcow2'/>\n      <source pool='default' volume='a.qcow2'/>",
        "<disk type='file' device='disk'>\n      <driver name='qemu' type='qcow2'/>\n      <source file='/images/a&apos;b.qcow2'/>",
    );
    assert_eq!(named, xml.replace(old, new));
    let source = |xml: &str| Domain::parse(xml).unwrap().disk("vdc").unwrap().source.clone();
    assert_eq!(source(&named), Source::File("/images/a'b.qcow2".into()));
    let device = name_files(&xml, &[file(true)]).unwrap();
    assert_eq!(source(&device), Source::Block("/images/a'b.qcow2".into()));
    assert_eq!(name_files(&xml, &[]).unwrap(), xml);
}
