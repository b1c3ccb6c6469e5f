//! What every key provider must do, run against each for real: the matrix that `make test-providers` prints.
//!
//! A new kind implements [`Fixture`] and gets its lines of `conformance!` at the end. A case of [`CASES`] that makes no
//! sense for a kind is named with the reason.

mod cases;
pub(super) mod fixtures;

use std::time::Duration;

use virtseal_testkit::servers::Manner;

use super::{KeyProvider, pkcs11};
use crate::model::envelope::KekId;
use crate::secret::SecretBytes;

/// A provider of one kind with all that it needs around it, `Ready` when made.
pub(super) trait Fixture: Sync {
    /// How many stanzas the leak test unwraps with one call: more where a call is a round trip.
    const UNWRAPS_PER_CALL: usize = 4;

    /// How often each of eight threads uses a KEK before it makes the next. PyKMIP looks at all its keys to make one.
    const USES_PER_KEK: usize = 1;

    /// Runs `case`, in surroundings that a process can't give itself where the kind needs such.
    fn around(case: fn()) {
        case();
    }

    /// A new one, which has nothing in common with any other.
    fn new() -> Self;

    fn provider(&self) -> &dyn KeyProvider;

    /// What unlocks it.
    fn credential(&self) -> SecretBytes;

    /// What looks like [`Fixture::credential`] and does not unlock it.
    fn wrong_credential(&self) -> SecretBytes {
        SecretBytes::take(&mut b"not it".to_vec()).unwrap()
    }

    /// What a restart of the daemon does to it; it must be unlocked then.
    fn restart(&mut self);

    /// What an admin does before a rotation, where its KEKs do not change one by one.
    fn retire(&mut self) {}

    /// A well-formed name of a KEK that it never made.
    fn unknown_kek(&self) -> KekId;
}

/// What is behind a [`Faulty`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// It keeps its keys from one start to the next.
    Own,
    /// Cases may have one in common, and only cut the way to it.
    Shared,
}

/// A provider whose server can fail, `Ready` when made.
pub(super) trait Faulty {
    /// What one call of the provider may take.
    const TIMEOUT: Duration = Duration::from_millis(2_500);

    fn new(server: Server) -> Self;

    fn provider(&self) -> &dyn KeyProvider;

    /// What the background does now and then.
    fn probe(&self);

    /// Ends the server as a crash does.
    fn kill_server(&mut self);

    /// Starts it again, with the keys that it had.
    fn start_server(&mut self);

    /// Cuts all connections.
    fn cut(&self);

    /// What becomes from now on of what is sent to the server, and of its answers.
    fn be(&self, manner: Manner);
}

/// The cases that each kind must have, or say why it has not.
const CASES: [&str; 23] = [
    "wrap_and_unwrap",
    "has_one_kek_per_scope",
    "rotated_kek_takes_the_place_of_the_old",
    "batch_comes_back_in_order",
    "one_bad_stanza_fails_the_batch",
    "wrong_binding",
    "tampered_stanza",
    "stanza_put_under_another_kek_is_refused",
    "unknown_kek_and_mechanism",
    "stanza_of_another_provider_is_refused",
    "locked",
    "wrong_pin",
    "restart_locks_and_loses_nothing",
    "lock_during_use_is_clean",
    "destroy_receipt_is_true",
    "name_of_a_destroyed_kek_is_not_used_again",
    "kek_that_others_need_is_not_destroyed",
    "eight_threads",
    "ten_thousand_unwraps_without_a_leak",
    "restarted_server",
    "killed_connection",
    "slow_server",
    "expired_and_revoked_certificate",
];

/// What is run of a kind, and what is not and why.
struct Kind {
    name: &'static str,
    cases: &'static [&'static str],
    not_applicable: &'static [(&'static str, &'static str)],
}

/// The kind's cases that every kind has, then its own or those of [`Faulty`], then what makes no sense for it.
macro_rules! conformance {
    ($kind:ident, $fixture:ty;
     $($own:ident = $test:expr),* ;
     not applicable: $($not:ident = $why:expr),* $(,)?
    ) => {
        conformance! { @ $kind, $fixture:
            wrap_and_unwrap,
            has_one_kek_per_scope,
            rotated_kek_takes_the_place_of_the_old,
            batch_comes_back_in_order,
            one_bad_stanza_fails_the_batch,
            wrong_binding,
            tampered_stanza,
            stanza_put_under_another_kek_is_refused,
            unknown_kek_and_mechanism,
            stanza_of_another_provider_is_refused,
            locked,
            wrong_pin,
            restart_locks_and_loses_nothing,
            lock_during_use_is_clean,
            destroy_receipt_is_true,
            name_of_a_destroyed_kek_is_not_used_again,
            kek_that_others_need_is_not_destroyed,
            eight_threads,
            ten_thousand_unwraps_without_a_leak;
            $($own = $test),*;
            not applicable: $($not = $why),*
        }
    };
    (@ $kind:ident, $fixture:ty: $($case:ident),+;
     $($own:ident = $test:expr),* ;
     not applicable: $($not:ident = $why:expr),*
    ) => {
        mod $kind {
            #[allow(unused_imports, reason = "a kind may have no cases of its own")]
            use super::*;

            $(
                #[test]
                fn $case() {
                    <$fixture as Fixture>::around(cases::$case::<$fixture>);
                }
            )+
            $(
                #[test]
                fn $own() {
                    $test();
                }
            )*

            pub(super) const KIND: Kind = Kind {
                name: stringify!($kind),
                cases: &[$(stringify!($case),)+ $(stringify!($own),)*],
                not_applicable: &[$((stringify!($not), $why)),*],
            };
        }
    };
}

const NO_SERVER: &str = "the keys are in the process itself: there is no server";
const IN_PROCESS: &str = "a module is called in the process: there is no connection";
const NO_CERTIFICATE: &str = "nothing is trusted by certificate";
const NSS_IS_A_FILE: &str =
    "the token is a database in the process, which nothing outside can stop; softhsm shows it";
const OF_TRANSIT_CERT: &str = "the same TLS as that of transit_cert, without a certificate of the client";
const OF_TRANSIT: &str = "the same connection as that of transit_approle";
const OF_KMIP: &str = "the same TLS as that of kmip";

conformance! { native, fixtures::Native; ;
    not applicable:
        restarted_server = NO_SERVER,
        killed_connection = NO_SERVER,
        slow_server = NO_SERVER,
        expired_and_revoked_certificate = NO_CERTIFICATE,
}
conformance! { kmip, crate::provider::kmip::fixture::Kmip;
    restarted_server = cases::restarted_server::<fixtures::KmipFaulty>,
    killed_connection = cases::killed_connection::<fixtures::KmipFaulty>,
    slow_server = cases::slow_server::<fixtures::KmipFaulty>,
    expired_and_revoked_certificate = crate::provider::kmip::tests::trust::expired_and_revoked_certificates_end_trust;
    not applicable:
}
conformance! { kmip_server, fixtures::KmipServer;
    restarted_server = cases::restarted_server::<fixtures::KmipServerFaulty>,
    killed_connection = cases::killed_connection::<fixtures::KmipServerFaulty>,
    slow_server = cases::slow_server::<fixtures::KmipServerFaulty>;
    not applicable:
        expired_and_revoked_certificate = OF_KMIP,
}
conformance! { softhsm, fixtures::SoftHsm;
    restarted_server = || pkcs11::tests::token_taken_out_and_put_back("ALL"),
    slow_server = || pkcs11::tests::hanging_module("ALL");
    not applicable:
        killed_connection = IN_PROCESS,
        expired_and_revoked_certificate = NO_CERTIFICATE,
}
conformance! { softhsm_key_wrap, fixtures::SoftHsmKeyWrap;
    restarted_server = || pkcs11::tests::token_taken_out_and_put_back(pkcs11::stand::WITHOUT_GCM),
    slow_server = || pkcs11::tests::hanging_module(pkcs11::stand::WITHOUT_GCM);
    not applicable:
        killed_connection = IN_PROCESS,
        expired_and_revoked_certificate = NO_CERTIFICATE,
}
conformance! { softhsm_cbc, fixtures::SoftHsmCbc;
    restarted_server = || pkcs11::tests::token_taken_out_and_put_back(pkcs11::stand::CBC_ONLY),
    slow_server = || pkcs11::tests::hanging_module(pkcs11::stand::CBC_ONLY);
    not applicable:
        killed_connection = IN_PROCESS,
        expired_and_revoked_certificate = NO_CERTIFICATE,
}
conformance! { nss, fixtures::Nss; ;
    not applicable:
        restarted_server = NSS_IS_A_FILE,
        killed_connection = IN_PROCESS,
        slow_server = NSS_IS_A_FILE,
        expired_and_revoked_certificate = NO_CERTIFICATE,
}
conformance! { transit_token, fixtures::TransitToken;
    restarted_server = cases::restarted_server::<fixtures::TransitTokenFaulty>,
    killed_connection = cases::killed_connection::<fixtures::TransitTokenFaulty>,
    slow_server = cases::slow_server::<fixtures::TransitTokenFaulty>;
    not applicable:
        expired_and_revoked_certificate = OF_TRANSIT_CERT,
}
conformance! { transit_approle, fixtures::TransitAppRole;
    restarted_server = cases::restarted_server::<fixtures::TransitAppRoleFaulty>,
    killed_connection = cases::killed_connection::<fixtures::TransitAppRoleFaulty>,
    slow_server = cases::slow_server::<fixtures::TransitAppRoleFaulty>;
    not applicable:
        expired_and_revoked_certificate = OF_TRANSIT_CERT,
}
conformance! { transit_cert, fixtures::TransitCert;
    restarted_server = cases::restarted_server::<fixtures::TransitCertFaulty>,
    killed_connection = cases::killed_connection::<fixtures::TransitCertFaulty>,
    slow_server = cases::slow_server::<fixtures::TransitCertFaulty>,
    expired_and_revoked_certificate = crate::provider::transit::tls_tests::expired_and_revoked_certificates_end_trust;
    not applicable:
}
conformance! { transit_shared_key, fixtures::TransitShared; ;
    not applicable:
        restarted_server = OF_TRANSIT,
        killed_connection = OF_TRANSIT,
        slow_server = OF_TRANSIT,
        expired_and_revoked_certificate = OF_TRANSIT_CERT,
}

const KINDS: [Kind; 11] = [
    native::KIND,
    kmip::KIND,
    kmip_server::KIND,
    softhsm::KIND,
    softhsm_key_wrap::KIND,
    softhsm_cbc::KIND,
    nss::KIND,
    transit_token::KIND,
    transit_approle::KIND,
    transit_cert::KIND,
    transit_shared_key::KIND,
];

/// Prints what `make test-providers` adds to the tests' own lines.
#[test]
fn every_kind_has_every_case_or_says_why_not() {
    for kind in &KINDS {
        for case in CASES {
            let why = kind.not_applicable.iter().find(|(not, _)| *not == case);
            assert_ne!(kind.cases.contains(&case), why.is_some(), "{}: {case}", kind.name);
            if let Some((_, why)) = why {
                println!("not applicable: {} {case} {why}", kind.name);
            }
        }
        assert_eq!(
            kind.cases.len() + kind.not_applicable.len(),
            CASES.len(),
            "{}",
            kind.name
        );
    }
}
