//! What reads bytes that others wrote, as targets: [`Target::read`] must come back from any bytes, soon, and what it asserts
//! must hold.
//!
//! The same targets are run by `make test` (a few thousand inputs each), by `make fuzz` (as many as asked for), and by
//! cargo-fuzz with coverage (`tests/fuzz`). The rooms hold their own targets; those of crates without one are here.

use std::sync::LazyLock;

use swtpm_state::{State, StateKey};

use crate::cli::sums;
use crate::daemon::listener;
use crate::domain::{self, Domain, Object, ObjectState, Policy};
use crate::model::envelope::Envelope;
use crate::object::disk;
use crate::provider::{kmip, native};
use crate::vm::forgotten::Forgotten;

pub use crate::fuzz_target::Target;

/// The targets, one for each format.
pub fn targets() -> Vec<Target> {
    let mut targets = vec![ENVELOPE, DOMAIN, SWTPM_STATE, FORGOTTEN];
    targets.extend(disk::fuzz::TARGETS);
    targets.extend([
        sums::fuzz::SUMS,
        kmip::fuzz::TTLV,
        native::fuzz::BACKUP,
        listener::fuzz::REQUEST,
    ]);
    targets
}

/// Gives `bytes` to the target `name`, for a fuzzer whose targets are programs.
///
/// # Panics
/// When there is no such target, or what it asserts does not hold.
pub fn read(name: &str, bytes: &[u8]) {
    static TARGETS: LazyLock<Vec<Target>> = LazyLock::new(targets);
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of this name").read)(bytes);
}

/// Whatever the bytes: texts come as bytes too.
fn lossy(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

const ENVELOPE_2: &str = r#"{"version":2,"id":"00000000-0000-4000-8000-000000000001",
"vm":"00000000-0000-4000-8000-000000000002","kind":"disk","generation":1,
"shared_with":["00000000-0000-4000-8000-000000000004"],"seen":true,"stanzas":[
{"provider":"00000000-0000-4000-8000-000000000003","provider_name":"main","kek":"vm/1","mechanism":"A256GCM","body":"AAAA"}],
"mac":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#;

const ENVELOPE: Target = Target {
    name: "envelope_json",
    seeds: || {
        let two = ENVELOPE_2.replace('\n', "");
        let one = two.replace(r#""version":2"#, r#""version":1"#).replace(
            r#","shared_with":["00000000-0000-4000-8000-000000000004"],"seen":true"#,
            "",
        );
        let one = format!("{}}}", one.split_once(r#","mac""#).expect("it has a MAC").0);
        vec![one.into_bytes(), two.into_bytes()]
    },
    read: |bytes| {
        let Ok(envelope) = Envelope::from_json(&lossy(bytes)) else {
            return false;
        };
        let again = Envelope::from_json(&envelope.to_json());
        assert_eq!(
            again.ok().as_ref(),
            Some(&envelope),
            "what was read is written as it was"
        );
        true
    },
};

const DOMAIN: Target = Target {
    name: "domain_xml",
    seeds: || {
        vec![
            include_bytes!("../tests/domains/libvirt9-uefi.xml").to_vec(),
            include_bytes!("../tests/domains/libvirt11-running.xml").to_vec(),
            include_bytes!("../tests/domains/sources.xml").to_vec(),
            include_bytes!("../tests/domains/sealed/libvirt11.xml").to_vec(),
            include_bytes!("../tests/domains/tabs-crlf-arm.xml").to_vec(),
        ]
    },
    read: |bytes| {
        let xml = lossy(bytes);
        let Ok(domain) = Domain::parse(&xml) else {
            return false;
        };
        let sealed = |object: &Object| matches!(object.state, ObjectState::Sealed(_));
        if let Ok(needed) = domain::sealed_objects_under(&domain, Policy::default()) {
            let objects = domain::objects(&domain);
            assert!(objects.iter().all(sealed), "a start with something plain");
            assert!(objects.len() <= needed.len(), "a start without one of its keys");
        }
        if let Ok(plain) = domain::edit::unseal(&xml) {
            let plain = Domain::parse(&plain).expect("an edit keeps what is read");
            assert!(plain.metadata.is_none());
        }
        true
    },
};

const SWTPM_STATE: Target = Target {
    name: "swtpm_state",
    seeds: || {
        // Version, lowest reader, header length, flags, length, then records: tag, length, value.
        let file = |flags: u8, records: &[(u8, &[u8])]| {
            let mut body = Vec::new();
            for (tag, value) in records {
                body.extend([0, *tag, 0, 0, 0, u8::try_from(value.len()).expect("short")]);
                body.extend(*value);
            }
            let length = u8::try_from(10 + body.len()).expect("short");
            [&[2, 1, 0, 10, 0, flags, 0, 0, 0, length][..], &body].concat()
        };
        vec![
            file(0, &[(1, b"state")]),
            file(9, &[(2, &[0; 48]), (3, &[1; 32]), (6, &[2; 32])]),
        ]
    },
    read: |bytes| match State::parse(bytes) {
        Ok(State::Encrypted(state)) => {
            static KEY: LazyLock<StateKey> = LazyLock::new(|| StateKey::derive(b"any").expect("a key"));
            assert!(state.open(&KEY).is_err(), "it opens only by its own key");
            true
        }
        Ok(_) => true,
        Err(_) => false,
    },
};

const FORGOTTEN: Target = Target {
    name: "forgotten_vm",
    seeds: || {
        let text = format!(
            r#"{{"format":"virtseal-forgotten","version":1,"vm":"00000000-0000-4000-8000-000000000002","name":"web01",
            "sealed_at":1,"vtpm_seen":true,"plain":false,"objects":[{{"id":"","envelope":{ENVELOPE_2},"pending":false,
            "location":"/a","created":1,"updated":2}}],"retired_keks":[{{"provider":"00000000-0000-4000-8000-000000000003",
            "kek":"vm/0"}}],"saved":{{"since":3,"envelopes":[{ENVELOPE_2}]}}}}"#
        );
        vec![text.into_bytes()]
    },
    read: |bytes| {
        let Ok(forgotten) = Forgotten::from_json(bytes) else {
            return false;
        };
        assert!(Forgotten::from_json(forgotten.to_json().as_bytes()).is_ok());
        true
    },
};

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use virtseal_testkit::mutate::fuzz;

    use super::targets;

    /// `FUZZ_RUNS` says how many inputs; `FUZZ_SEED` which.
    fn number(variable: &str, default: u64) -> u64 {
        std::env::var(variable).map_or(default, |text| text.parse().expect(variable))
    }

    fn run(name: &str) {
        let target = targets().into_iter().find(|target| target.name == name).unwrap();
        let (runs, seed) = (number("FUZZ_RUNS", 2_000), number("FUZZ_SEED", 1));
        let seeds = (target.seeds)();
        for seed in &seeds {
            assert!(
                (target.read)(seed),
                "{name} takes its own seed {}",
                seed.escape_ascii()
            );
        }
        let began = Instant::now();
        let fuzzed = fuzz(&seeds, runs, seed, target.read)
            .unwrap_or_else(|failing| panic!("{name}, seed {seed}: {failing:?}"));
        let took = began.elapsed().as_secs_f64();
        println!(
            "{name}: {} inputs, {} taken, {took:.1} s, seed {seed}",
            fuzzed.runs, fuzzed.taken
        );
    }

    macro_rules! targets {
        ($($name:ident)*) => {
            $(#[test]
            fn $name() {
                run(stringify!($name));
            })*

            #[test]
            fn each_target_is_run() {
                let names: Vec<_> = targets().iter().map(|target| target.name).collect();
                assert_eq!(names, [$(stringify!($name)),*]);
            }
        };
    }

    targets! {
        envelope_json domain_xml swtpm_state forgotten_vm qcow2_header luks1_header sums_file ttlv backup_document varlink_request
    }
}
