use proptest::prelude::*;

use super::*;

fn kinds() -> impl Strategy<Value = ObjectKind> {
    prop_oneof![
        Just(ObjectKind::Disk),
        Just(ObjectKind::Vtpm),
        Just(ObjectKind::Nvram)
    ]
}

fn bindings() -> impl Strategy<Value = Binding> {
    (any::<u128>(), any::<u128>(), kinds()).prop_map(|(envelope, vm, kind)| Binding {
        envelope: EnvelopeId(Uuid::from_u128(envelope)),
        vm: VmId(Uuid::from_u128(vm)),
        kind,
    })
}

fn stanzas() -> impl Strategy<Value = Stanza> {
    (any::<u128>(), ".{0,20}", ".{0,20}", ".{0,20}", any::<[u8; 32]>()).prop_map(
        |(provider, provider_name, kek, mechanism, body)| Stanza {
            provider: ProviderId(Uuid::from_u128(provider)),
            provider_name,
            kek: KekId(kek),
            mechanism,
            body: body.to_vec(),
        },
    )
}

proptest! {
    #[test]
    fn json_round_trip(binding in bindings(), stanzas in prop::collection::vec(stanzas(), 1..4)) {
        let dek = Dek::random().unwrap();
        let made = Verified::new(&binding, stanzas, &dek).unwrap();
        let read = Envelope::from_json(&made.to_json()).unwrap();
        prop_assert_eq!(&read, &*made);
        prop_assert_eq!(read.verify(&dek).unwrap(), made.clone());
        let old = format_1(&made);
        prop_assert_eq!(Envelope::from_json(&old.to_json()).unwrap(), old);
    }

    /// Whatever changes, be it one bit, the MAC fails; so does another key's.
    #[test]
    fn the_mac_covers_every_field(
        binding in bindings(),
        stanzas in prop::collection::vec(stanzas(), 1..4),
        others in prop::collection::vec(any::<u128>(), 0..4),
        at in any::<prop::sample::Index>(),
    ) {
        let dek = Dek::random().unwrap();
        let mut made = Verified::new(&binding, stanzas, &dek).unwrap();
        for other in others {
            made = made.share_with(VmId(Uuid::from_u128(other)), &dek).unwrap();
        }
        prop_assert!(made.verify(&Dek::random().unwrap()).is_err());
        for change in CHANGES {
            let mut changed = made.clone().into_envelope();
            change(&mut changed, at);
            if changed == *made {
                continue;
            }
            prop_assert!(
                matches!(changed.verify(&dek), Err(EnvelopeError::Mac { .. })),
                "{:?}",
                changed
            );
        }
        for bit in 0..8 * Mac::LEN {
            let mut changed = made.clone().into_envelope();
            changed.mac = changed.mac.map(|mac| mac.with_flipped(bit));
            prop_assert!(changed.verify(&dek).is_err());
        }
    }

    /// No two fields can pass bytes to each other.
    #[test]
    fn neighbours_are_told_apart(binding in bindings(), stanza in stanzas(), kek in "[a-z]{1,9}") {
        let dek = Dek::random().unwrap();
        let with = |kek: &str, mechanism: &str| Stanza {
            kek: KekId(kek.to_owned()),
            mechanism: mechanism.to_owned(),
            ..stanza.clone()
        };
        let one = Verified::new(&binding, vec![with(&kek, "")], &dek).unwrap();
        let mut other = one.clone().into_envelope();
        other.stanzas = vec![with("", &kek)];
        prop_assert!(other.verify(&dek).is_err());
    }

    /// Exactly one of `Newer`, `Older`, and the two of the same rank holds, both ways, and across a third.
    #[test]
    fn versions_have_one_order(
        binding in bindings(),
        stanza in stanzas(),
        versions in prop::collection::vec((any::<bool>(), 0..4_u64, 0..2_u8), 3)
    ) {
        let dek = Dek::random().unwrap();
        let versions: Vec<Envelope> = versions
            .into_iter()
            .map(|(old, generation, body)| {
                let mut stanza = stanza.clone();
                stanza.body = vec![body];
                let mut made = Verified::new(&binding, vec![stanza], &dek).unwrap().into_envelope();
                made.generation = Generation::of_test(generation);
                if old { format_1(&made) } else { made }
            })
            .collect();
        for (a, b) in [(0, 1), (1, 2), (0, 2), (0, 0)] {
            let (a, b) = (&versions[a], &versions[b]);
            let expected = match a.supersedes(b) {
                Precedence::Newer => Precedence::Older,
                Precedence::Older => Precedence::Newer,
                equal => equal,
            };
            prop_assert_eq!(b.supersedes(a), expected);
            prop_assert_eq!(a.supersedes(b) == Precedence::Same, a == b);
            let one_place = (a.format(), a.generation) == (b.format(), b.generation);
            prop_assert_eq!(a.supersedes(b) == Precedence::Conflict, one_place && a != b);
        }
        let not_older = |a: &Envelope, b: &Envelope| a.supersedes(b) != Precedence::Older;
        let [a, b, c] = &versions[..] else { unreachable!() };
        if not_older(a, b) && not_older(b, c) {
            prop_assert!(not_older(a, c));
        }
    }

    #[test]
    fn garbage_is_an_error(text in ".{0,200}") {
        prop_assert!(Envelope::from_json(&text).is_err());
    }

    #[test]
    fn payload_opens_only_for_its_binding(a in bindings(), b in bindings()) {
        let dek = Dek::random().unwrap();
        let payload = Payload::bind(&dek, &a).unwrap();
        let opened = payload.dek(&a).unwrap();
        prop_assert_eq!(opened.expose(), dek.expose());
        prop_assert_eq!(payload.dek(&b).is_ok(), a == b);
    }
}

/// As virtseal wrote it before there was a MAC.
fn format_1(envelope: &Envelope) -> Envelope {
    Envelope {
        shared_with: Vec::new(),
        seen: false,
        mac: None,
        ..envelope.clone()
    }
}

type Change = fn(&mut Envelope, prop::sample::Index);

fn stanza_at(envelope: &mut Envelope, at: prop::sample::Index) -> &mut Stanza {
    let count = envelope.stanzas.len();
    &mut envelope.stanzas[at.index(count)]
}

/// Each of the fields, and each way to take something away or bring something in.
const CHANGES: [Change; 14] = [
    |envelope, _| envelope.id = EnvelopeId::random(),
    |envelope, _| envelope.vm = VmId::random(),
    |envelope, _| {
        envelope.kind = match envelope.kind {
            ObjectKind::Disk => ObjectKind::Vtpm,
            ObjectKind::Vtpm | ObjectKind::Nvram => ObjectKind::Disk,
        }
    },
    |envelope, at| {
        let changed = envelope.generation.stored().unwrap() ^ (1 << at.index(63));
        envelope.generation = Generation::of_test(changed as u64);
    },
    |envelope, _| envelope.generation = Generation::of_test(i64::MAX as u64),
    |envelope, _| envelope.shared_with.push(VmId::random()),
    |envelope, _| envelope.shared_with.clear(),
    |envelope, _| envelope.seen = !envelope.seen,
    |envelope, at| stanza_at(envelope, at).provider = ProviderId::random(),
    |envelope, at| stanza_at(envelope, at).provider_name.push('x'),
    |envelope, at| stanza_at(envelope, at).kek.0.push('x'),
    |envelope, at| stanza_at(envelope, at).mechanism.push('x'),
    |envelope, at| {
        let body = &mut stanza_at(envelope, at).body;
        let byte = at.index(body.len());
        body[byte] ^= 1;
    },
    |envelope, at| {
        let at = at.index(envelope.stanzas.len());
        let gone = envelope.stanzas.remove(at);
        if at > 0 {
            envelope.stanzas.insert(0, gone);
        }
    },
];

#[test]
fn another_format_is_named() {
    let json = r#"{"version":3,"id":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7","later":[]}"#;
    let refused = Envelope::from_json(json).unwrap_err();
    assert!(matches!(refused, EnvelopeError::Version { found: 3 }));
    assert!(refused.to_string().contains("upgrade virtseal"));
}

fn one() -> (Dek, Verified) {
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Disk,
    };
    let stanza = Stanza {
        provider: ProviderId::random(),
        provider_name: "main".to_owned(),
        kek: KekId("v1:provider".to_owned()),
        mechanism: "A256GCM".to_owned(),
        body: vec![7; 92],
    };
    let dek = Dek::random().unwrap();
    let made = Verified::new(&binding, vec![stanza], &dek).unwrap();
    (dek, made)
}

/// The fields of one format under the number of the other, and limits that a MAC does not lift.
#[test]
fn formats_are_not_mixed() {
    let (dek, made) = one();
    let json = made.to_json();
    for (from, to) in [
        (r#""version":2"#, r#""version":1"#),
        (r#""seen":false,"#, ""),
        (r#""shared_with":[],"#, ""),
        (r#""generation":1"#, r#""generation":9223372036854775808"#),
        (r#""generation":1"#, r#""generation":1,"generation":2"#),
        (r#""seen":false"#, r#""seen":false,"later":1"#),
    ] {
        assert!(json.contains(from));
        assert!(Envelope::from_json(&json.replacen(from, to, 1)).is_err(), "{to}");
    }
    let own = format!(r#""shared_with":["{}"]"#, made.vm);
    assert!(Envelope::from_json(&json.replace(r#""shared_with":[]"#, &own)).is_err());
    let stripped = format_1(&made);
    assert!(matches!(stripped.verify(&dek), Err(EnvelopeError::Format1)));
}

#[test]
fn format_1_is_upgraded_to_the_same_everywhere() {
    let (dek, made) = one();
    let mut old = format_1(&made);
    old.generation = Generation::of_test(7);
    let next = old.upgrade(&dek, Format1::OfKeystore).unwrap();
    assert_eq!((next.format(), next.generation), (2, Generation::of_test(8)));
    assert_eq!(next, old.upgrade(&dek, Format1::AdoptedByRoot).unwrap());
    assert_eq!(next, next.upgrade(&dek, Format1::OfKeystore).unwrap());
    // What a format 1 claims does not keep a format 2 from rising.
    for claimed in [u64::MAX, i64::MAX as u64, u64::from(u32::MAX)] {
        old.generation = Generation::of_test(claimed);
        assert_eq!(next.supersedes(&old), Precedence::Newer);
        let healed = old.upgrade(&dek, Format1::OfKeystore).unwrap();
        assert!(healed.mark_seen(&dek).unwrap().generation.stored().unwrap() <= i64::from(u32::MAX) + 2);
    }
}

#[test]
fn each_change_is_the_next_generation_and_needs_the_key() {
    let (dek, made) = one();
    let (web, db) = (VmId::random(), VmId::random());
    let shared = made.share_with(web, &dek).unwrap().share_with(db, &dek).unwrap();
    assert!(shared.serves(web) && shared.serves(db) && shared.serves(made.vm));
    assert_eq!(shared.generation, Generation::of_test(3));
    assert_eq!(shared.share_with(web, &dek).unwrap(), shared);
    assert_eq!(shared.share_with(made.vm, &dek).unwrap(), shared);
    let taken = shared.unshare(web, &dek).unwrap();
    assert!(!taken.serves(web) && taken.serves(db));
    let seen = taken.mark_seen(&dek).unwrap();
    assert!(seen.seen && seen.mark_seen(&dek).unwrap() == seen);
    let fewer = seen.with_stanzas(Vec::new(), &dek);
    assert!(matches!(fewer, Err(EnvelopeError::StanzaCount { found: 0 })));
    let other = seen.with_stanzas(vec![seen.stanzas[0].clone(); 2], &dek).unwrap();
    assert_eq!(other.verify(&dek).unwrap(), other);
    assert!(matches!(
        seen.mark_seen(&Dek::random().unwrap()),
        Err(EnvelopeError::Mac { .. })
    ));
    let mut full = made.clone();
    for _ in 0..Envelope::MAX_SHARED {
        full = full.share_with(VmId::random(), &dek).unwrap();
    }
    assert!(matches!(
        full.share_with(VmId::random(), &dek),
        Err(EnvelopeError::SharedWith)
    ));
}

/// Worked out with another implementation: a field that moves would close every envelope there is.
#[test]
fn the_mac_never_changes() {
    let json = r#"{"version":2,"id":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7","vm":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8","kind":"nvram","generation":258,"shared_with":["7b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8"],"seen":true,"stanzas":[{"provider":"8b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8","provider_name":"main","kek":"v1:provider","mechanism":"A256GCM","body":"AQID/w=="}],"mac":"D/R4b4JgCEsJuyeyMInomYlmfUqI+gw2Js13w/xeSxk="}"#;
    let dek = Dek::from_bytes(&[7; 32]).unwrap();
    assert!(Envelope::from_json(json).unwrap().verify(&dek).is_ok());
}

#[test]
fn every_flipped_payload_byte_is_noticed_in_the_binding() {
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Vtpm,
    };
    let payload = Payload::bind(&Dek::random().unwrap(), &binding).unwrap();
    for at in Dek::LEN..Payload::LEN {
        let mut bytes = payload.expose().to_vec();
        bytes[at] ^= 1;
        let tampered = Payload::from_unwrapped(SecretBytes::take(&mut bytes).unwrap()).unwrap();
        assert!(matches!(
            tampered.dek(&binding),
            Err(EnvelopeError::BindingMismatch(_))
        ));
    }
}
