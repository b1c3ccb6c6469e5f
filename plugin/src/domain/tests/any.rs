//! Properties of any XML.

use crate::domain::edit::{seal, set_envelopes, unseal};
use crate::domain::{Domain, Object, ObjectState, objects};
use proptest::prelude::*;

use super::{Plan, fixtures, sealed_objects};

fn space() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "",
        " ",
        "\n",
        "\n  ",
        "\n\t\t",
        "\r\n    ",
        " <!-- <disk> '\" -->\n  ",
    ])
    .prop_map(str::to_owned)
}

fn quoted() -> impl Strategy<Value = String> {
    let value = "[a-zä0-9/ .;]{1,12}(&amp;|&lt;|&#x41;|>)?[a-z]{0,3}";
    (value, any::<bool>(), "[\"']?").prop_map(|(value, double, other)| match (double, other.as_str()) {
        (true, "'") => format!("\"/{value}'\""),
        (true, _) => format!("\"/{value}\""),
        (false, "\"") => format!("'/{value}\"'"),
        (false, _) => format!("'/{value}'"),
    })
}

/// A disk whose parts come in any order.
fn disk(number: usize) -> impl Strategy<Value = String> {
    let parts = vec![
        "<driver name='qemu' type='qcow2'/>".to_owned(),
        format!("<target dev='vd{number}'/>"),
        "<boot order='1'/>".to_owned(),
    ];
    (
        quoted(),
        Just(parts).prop_shuffle(),
        prop::collection::vec(space(), 5),
        0..4usize,
        any::<bool>(),
    )
        .prop_map(|(path, mut parts, space, at, closed)| {
            let source = if closed {
                format!("<source file={path}/>")
            } else {
                format!(
                    "<source\n file = {path}><seclabel model='dac' relabel='no'/>{}</source>",
                    space[4]
                )
            };
            parts.insert(at, source);
            let body: String = parts
                .iter()
                .zip(&space)
                .map(|(part, space)| format!("{space}{part}"))
                .collect();
            format!("<disk type='file'>{body}\n</disk>")
        })
}

fn domains() -> impl Strategy<Value = String> {
    let fixed = [
        "<name>prop</name>",
        "<uuid>6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7</uuid>",
        "<description><![CDATA[</domain>]]></description>",
        "<vcpu>1</vcpu>",
    ];
    let fixed = fixed.map(str::to_owned).to_vec();
    let metadata = prop::option::of(prop::sample::select(vec![
        "<metadata><a:b xmlns:a='urn:a'>text</a:b></metadata>",
        "<metadata>\n    <b xmlns='urn:a'/>\n  </metadata>",
    ]));
    (disk(0), disk(1), metadata, prop::collection::vec(space(), 8)).prop_flat_map(
        move |(first, second, metadata, space)| {
            let mut parts = fixed.clone();
            parts.push(format!(
                "<devices>{}{first}{}{second}{}</devices>",
                space[5], space[6], space[7]
            ));
            parts.extend(metadata.map(str::to_owned));
            Just(parts).prop_shuffle().prop_map(move |parts| {
                let body: String = parts
                    .iter()
                    .zip(&space)
                    .map(|(part, space)| format!("{space}{part}"))
                    .collect();
                format!("<domain type='kvm'>{body}</domain>\n")
            })
        },
    )
}

proptest! {
    #[test]
    fn any_order_and_layout_survives_sealing_and_unsealing(xml in domains()) {
        let domain = Domain::parse(&xml).unwrap();
        let mut plan = Plan::of(&domain);
        plan.vtpm = None;
        let sealed = seal(&xml, &plan.edit()).unwrap();
        let read = Domain::parse(&sealed).unwrap();
        for (object, disk) in objects(&read).iter().zip(&plan.disks) {
            prop_assert_eq!(&object.state, &ObjectState::Sealed(disk.envelope));
        }
        prop_assert_eq!(seal(&sealed, &plan.edit()).unwrap(), &*sealed);
        prop_assert_eq!(unseal(&sealed).unwrap(), xml);
        let paths = |domain: &Domain| objects(domain).into_iter().map(|Object { path, .. }| path).collect::<Vec<_>>();
        prop_assert_eq!(paths(&read), paths(&domain));
    }

    #[test]
    fn broken_xml_never_panics(which in 0..7usize, at in any::<prop::sample::Index>(), cut in 0..40usize, with in "[<>/='\"&;a \n!\\[\\]-]{0,6}") {
        let (_, xml) = fixtures().swap_remove(which);
        let plan = Plan::of(&Domain::parse(&xml).unwrap());
        for xml in [seal(&xml, &plan.edit()).unwrap(), xml] {
            let boundary = |mut at: usize| { while !xml.is_char_boundary(at) { at += 1; } at };
            let start = boundary(at.index(xml.len()));
            let end = boundary((start + cut).min(xml.len()));
            let broken = format!("{}{with}{}", &xml[..start], &xml[end..]);
            if let Ok(domain) = Domain::parse(&broken) {
                let _ = sealed_objects(&domain);
            }
            let _ = seal(&broken, &plan.edit()).map(|sealed| assert!(Domain::parse(&sealed).is_ok()));
            let _ = unseal(&broken);
            let _ = set_envelopes(&broken, &plan.envelopes);
        }
    }
}
