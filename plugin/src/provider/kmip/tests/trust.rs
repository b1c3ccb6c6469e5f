//! Trust both ways: what is refused until it is there, and what ends it.

use std::fs;

use openssl::x509::X509Req;

use super::super::fixture::{Kmip, TlsServer, identity, secret, settings};
use super::Wrapped;
use crate::provider::conformance::Fixture;
use crate::provider::kind::Kind;
use crate::provider::kmip::{Fingerprint, KeyKind, KmipProvider, NewIdentity, ServerTrust, TrustError};
use crate::provider::{KeyProvider, ProviderError, ProviderStatus};
use crate::secret::SecretBytes;
use crate::store::{Change, Stores};
use virtseal_testkit::servers::{Authority, Certified, PyKmip, free_port};

fn not_trusted(provider: &KmipProvider) -> String {
    match provider.status() {
        ProviderStatus::NotTrusted(why) => why,
        other => panic!("{other:?}"),
    }
}

fn untrusting(port: u16) -> (KmipProvider, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let provider =
        KmipProvider::create(&stores.providers(), &"kms".parse().unwrap(), settings(&[port])).unwrap();
    (provider, dir)
}

fn shown(provider: &KmipProvider) -> Fingerprint {
    provider.presented()[0].chain.as_ref().unwrap()[0].fingerprint
}

#[test]
fn nothing_works_until_both_sides_trust() {
    let authority = Authority::new();
    let server = PyKmip::certified_by(&authority, 90).unwrap();
    let (provider, _dir) = untrusting(server.port());
    assert!(not_trusted(&provider).contains("has not been accepted yet"));
    assert!(matches!(
        provider.create_kek(&crate::provider::KekScope::Provider),
        Err(ProviderError::NotTrusted(_))
    ));
    provider.trust(ServerTrust::Pins(vec![shown(&provider)])).unwrap();
    assert!(not_trusted(&provider).starts_with("Connected, not trusted by KMS: "));
    assert!(matches!(
        provider.create_kek(&crate::provider::KekScope::Provider),
        Err(ProviderError::RefusesUs(_))
    ));
    let stranger = identity(&Authority::new(), false);
    provider.set_identity(&stranger).unwrap();
    assert!(not_trusted(&provider).starts_with("Connected, not trusted by KMS: "));
    provider.set_identity(&identity(&authority, false)).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    Wrapped::by(&provider).assert_opened_by(&provider);
}

#[test]
fn servers_are_shown_with_what_there_is_to_compare() {
    let kmip = Kmip::new();
    let presented = kmip.provider().presented();
    assert_eq!(presented.len(), 1);
    let chain = presented[0].chain.as_ref().unwrap();
    assert_eq!(chain[0].subject, "CN=kms");
    assert_eq!(chain[0].names, ["localhost", "127.0.0.1"]);
    assert!((89..=90).contains(&chain[0].days_left));
    let (provider, _dir) = untrusting(free_port().unwrap());
    assert!(
        provider.presented()[0]
            .chain
            .as_ref()
            .unwrap_err()
            .contains("connect")
    );
}

#[test]
fn changed_server_certificate_is_refused_with_both_fingerprints() {
    let mut kmip = Kmip::new();
    let provider = kmip.provider();
    let old = shown(provider);
    provider.trust(ServerTrust::Pins(vec![old])).unwrap();
    let wrapped = Wrapped::by(provider);
    kmip.server.kill();
    kmip.server.certify(&kmip.authority, 90).unwrap();
    kmip.server.run().unwrap();
    let provider = kmip.provider();
    let new = shown(provider);
    assert_ne!(old, new);
    let error = provider.unwrap_many(&[&wrapped.stanza]).unwrap_err();
    assert!(matches!(error, ProviderError::NotTrusted(_)), "{error:?}");
    for fingerprint in [old, new] {
        assert!(error.to_string().contains(&fingerprint.to_string()), "{error}");
    }
    assert!(!not_trusted(provider).starts_with("Connected"));
    provider.trust(ServerTrust::Pins(vec![old, new])).unwrap();
    wrapped.assert_opened_by(provider);
}

#[test]
fn wrong_fingerprint_or_ca_changes_nothing() {
    let kmip = Kmip::new();
    let wrong: Fingerprint = "AB".repeat(32).parse().unwrap();
    let error = kmip.provider().trust(ServerTrust::Pins(vec![wrong])).unwrap_err();
    let TrustError::Refused { why, .. } = &error else {
        panic!("{error:?}");
    };
    let actual = shown(kmip.provider());
    assert!(
        why.contains(&wrong.to_string()) && why.contains(&actual.to_string()),
        "{why}"
    );
    let other = ServerTrust::Ca(Authority::new().pem());
    assert!(matches!(
        kmip.provider().trust(other),
        Err(TrustError::Refused { .. })
    ));
    let nothing = ServerTrust::Pins(Vec::new());
    assert!(matches!(kmip.provider().trust(nothing), Err(TrustError::Empty)));
    let passwd = ServerTrust::Ca("root:x:0:0:root:/root:/bin/bash\n".to_owned());
    assert!(matches!(
        kmip.provider().trust(passwd),
        Err(TrustError::NoCertificate)
    ));
    assert_eq!(kmip.provider().status(), ProviderStatus::Ready);
}

/// What the conformance suite runs: certificates that end, by their time or by a revocation list, on both sides.
pub(in crate::provider) fn expired_and_revoked_certificates_end_trust() {
    expired_server();
    expired_client();
    revoked_server();
    for version in ["-tls1_2", "-tls1_3"] {
        revoked_client(version);
    }
}

fn expired_server() {
    let mut kmip = Kmip::new();
    let wrapped = Wrapped::by(kmip.provider());
    kmip.server.kill();
    kmip.server.certify(&kmip.authority, -2).unwrap();
    kmip.server.run().unwrap();
    let error = kmip.provider().unwrap_many(&[&wrapped.stanza]).unwrap_err();
    assert!(matches!(error, ProviderError::NotTrusted(_)), "{error:?}");
    assert!(error.to_string().contains("expired"), "{error}");
    let pin = ServerTrust::Pins(vec![shown(kmip.provider())]);
    let error = kmip.provider().trust(pin).unwrap_err();
    assert!(format!("{error}").contains("expired on"), "{error}");
}

/// It is not even shown to the server.
fn expired_client() {
    let kmip = Kmip::with(false, |_| {});
    let client = kmip.authority.client("vm-host", -2);
    let error = kmip.provider().set_identity(&identity_of(&client)).unwrap_err();
    assert!(
        crate::model::problem::chain(&error).contains("expired"),
        "{error:?}"
    );
    Wrapped::by(kmip.provider()).assert_opened_by(kmip.provider());
}

fn identity_of(client: &Certified) -> NewIdentity {
    NewIdentity {
        certificate: SecretBytes::take(&mut client.certificate.clone()).unwrap(),
        key: Some(SecretBytes::take(&mut client.key.clone()).unwrap()),
        login: None,
        passphrase: None,
        by_tpm: None,
        even_locked: false,
    }
}

fn revoked_server() {
    let kmip = Kmip::with(false, |_| {});
    let wrapped = Wrapped::by(kmip.provider());
    let ca = kmip.authority.pem();
    let other = kmip.authority.server(90).certificate;
    let with_list =
        |revoked: &[u8]| ServerTrust::Ca(ca.clone() + &kmip.authority.revocation_list(&[revoked]));
    // A list with others on it does no harm.
    kmip.provider().trust(with_list(&other)).unwrap();
    wrapped.assert_opened_by(kmip.provider());
    let error = kmip
        .provider()
        .trust(with_list(&kmip.server.certificate().unwrap()))
        .unwrap_err();
    let TrustError::Refused { why, .. } = &error else {
        panic!("{error:?}");
    };
    assert!(why.contains("revoked"), "{why}");
    // Nothing has changed by that.
    wrapped.assert_opened_by(kmip.provider());
    // A list by somebody else says nothing about this CA.
    let foreign = Authority::new().revocation_list(&[&other]);
    assert!(matches!(
        kmip.provider().trust(ServerTrust::Ca(ca.clone() + &foreign)),
        Err(TrustError::Refused { .. })
    ));
    let damaged = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    let damaged = ServerTrust::Ca(ca + damaged);
    assert!(matches!(kmip.provider().trust(damaged), Err(TrustError::Ca(_))));
}

/// PyKMIP looks at no list, so this server is OpenSSL's own, which talks TLS and no KMIP.
fn revoked_client(version: &str) {
    let authority = Authority::new();
    let (good, revoked) = (authority.client("good", 90), authority.client("bad", 90));
    let server = TlsServer::start(
        &authority,
        &authority.revocation_list(&[&revoked.certificate]),
        version,
    );
    let (provider, _dir) = untrusting(server.port());
    provider.trust(ServerTrust::Ca(authority.pem())).unwrap();
    provider.set_identity(&identity_of(&revoked)).unwrap();
    let why = not_trusted(&provider);
    assert!(
        why.contains("the client certificate was revoked"),
        "{version}: {why}"
    );
    provider.set_identity(&identity_of(&good)).unwrap();
    let why = not_trusted(&provider);
    assert!(
        why.contains("it closed the connection before its first answer"),
        "{version}: it gets through TLS, to a server that says nothing: {why}"
    );
}

#[test]
fn certificate_for_another_name_or_use_is_refused() {
    let authority = Authority::new();
    let client = authority.client("127.0.0.1", 90);
    let list = authority.revocation_list(&[&authority.server(90).certificate]);
    for (certified, host, wanted) in [
        (&client, "127.0.0.1", "unsuitable certificate purpose"),
        (&authority.server(90), "127.0.0.2", "mismatch"),
    ] {
        let server = TlsServer::showing(certified, host, &authority, &list, "-tls1_2");
        let (provider, _dir) = {
            let dir = tempfile::tempdir().unwrap();
            let stores = Stores::open(dir.path()).unwrap();
            let mut settings = settings(&[server.port()]);
            settings.endpoints = vec![format!("{host}:{}", server.port()).parse().unwrap()];
            (
                KmipProvider::create(&stores.providers(), &"kms".parse().unwrap(), settings).unwrap(),
                dir,
            )
        };
        let error = provider.trust(ServerTrust::Ca(authority.pem())).unwrap_err();
        let TrustError::Refused { why, .. } = &error else {
            panic!("{error:?}");
        };
        assert!(why.contains(wanted), "{why}");
        // Whose fingerprint was compared needs no name.
        provider.trust(ServerTrust::Pins(vec![shown(&provider)])).unwrap();
    }
}

#[test]
fn end_of_a_certificate_is_announced() {
    let mut kmip = Kmip::with(false, |_| {});
    kmip.server.kill();
    kmip.server.certify(&kmip.authority, 12).unwrap();
    kmip.server.run().unwrap();
    let client = kmip.authority.client("vm-host", 20);
    kmip.provider().set_identity(&identity_of(&client)).unwrap();
    let ProviderStatus::Degraded(why) = kmip.provider().status() else {
        panic!("{:?}", kmip.provider().status());
    };
    for part in ["expires in 12 days", "the client certificate expires in 20 days"] {
        assert!(why.contains(part), "{why}");
    }
    Wrapped::by(kmip.provider()).assert_opened_by(kmip.provider());
    // Another trouble hides none of it.
    kmip.server.kill();
    kmip.provider().probe();
    assert!(matches!(kmip.provider().status(), ProviderStatus::Unreachable(_)));
    let warnings = kmip.provider().warnings();
    assert!(
        warnings.len() == 2 && warnings.iter().all(|warning| why.contains(&warning.what)),
        "{warnings:?}"
    );
}

#[test]
fn signed_request_makes_the_identity() {
    let kmip = Kmip::with(false, |_| {});
    let provider = kmip.provider();
    let first = provider.signing_request(Some((KeyKind::EcP256, None))).unwrap().0;
    // It waits for its certificate.
    assert_eq!(
        provider.signing_request(None).unwrap(),
        (first.clone(), Change::Unchanged)
    );
    let second = provider
        .signing_request(Some((KeyKind::EcP256, Some("kvm7"))))
        .unwrap()
        .0;
    assert_ne!(first, second);
    let signed = kmip.authority.sign(second.as_bytes(), 90);
    let new = |certificate: &[u8]| NewIdentity {
        certificate: SecretBytes::take(&mut certificate.to_vec()).unwrap(),
        key: None,
        login: None,
        passphrase: None,
        by_tpm: None,
        even_locked: false,
    };
    // Either may be the one that was signed.
    let old = kmip.authority.sign(first.as_bytes(), 90);
    provider.set_identity(&new(&old)).unwrap();
    assert_eq!(provider.signing_request(None).unwrap().0, second);
    assert_eq!(provider.set_identity(&new(&signed)).unwrap().subject, "CN=kvm7");
    assert_eq!(keys_on_disk(&kmip), 1, "the identity's alone");
    assert_eq!(provider.status(), ProviderStatus::Ready);
    // Renewed for the key in use, whose request is asked for anew.
    let again = provider.signing_request(None).unwrap().0;
    assert_eq!(public_key(&again), public_key(&second));
    let renewed = kmip.authority.sign(again.as_bytes(), 200);
    let renewed = provider.set_identity(&new(&renewed)).unwrap();
    assert_eq!(
        (renewed.days_left / 10, renewed.subject.as_str()),
        (20, "CN=kvm7")
    );
}

fn keys_on_disk(kmip: &Kmip) -> usize {
    let texts = walk(kmip.state_dir())
        .into_iter()
        .map(|file| fs::read(file).unwrap());
    texts
        .map(|text| {
            String::from_utf8_lossy(&text)
                .matches("BEGIN PRIVATE KEY")
                .count()
        })
        .sum()
}

/// As a virtseald leaves it that is killed before a file has its name, or once the identity has its.
#[test]
fn what_a_killed_virtseald_has_left_is_cleared_away() {
    let mut kmip = Kmip::new();
    let before = keys_on_disk(&kmip);
    let provider = kmip.provider();
    let request = provider.signing_request(Some((KeyKind::EcP256, None))).unwrap().0;
    let later = provider.signing_request(Some((KeyKind::EcP256, None))).unwrap().0;
    let files = walk(kmip.state_dir());
    let file = files.iter().find(|file| file.ends_with("request.json")).unwrap();
    let waiting = fs::read(file).unwrap();
    fs::write(file.with_extension("new"), &waiting[..waiting.len() - 9]).unwrap();
    kmip.restart();
    assert!(!file.with_extension("new").exists());
    assert_eq!(fs::read(file).unwrap(), waiting, "nobody has answered it");

    let provider = kmip.provider();
    provider.unlock(&secret(Kmip::CREDENTIAL)).unwrap();
    let mut signed = identity(&kmip.authority, true);
    signed.certificate = SecretBytes::take(&mut kmip.authority.sign(request.as_bytes(), 90)).unwrap();
    signed.key = None;
    provider.set_identity(&signed).unwrap();
    assert_eq!(provider.signing_request(None).unwrap().0, later);
    // Killed in between, all would wait still.
    fs::write(file, &waiting).unwrap();
    kmip.restart();
    assert_eq!(
        keys_on_disk(&kmip),
        before + 1,
        "the later one waits, the answered one is sealed"
    );
    let provider = kmip.provider();
    provider.unlock(&secret(Kmip::CREDENTIAL)).unwrap();
    assert_eq!(provider.signing_request(None).unwrap().0, later);
}

fn public_key(request: &str) -> Vec<u8> {
    let request = X509Req::from_pem(request.as_bytes()).unwrap();
    request.public_key().unwrap().public_key_to_pem().unwrap()
}

#[test]
fn request_for_a_sealed_key_waits_for_its_passphrase() {
    let kmip = Kmip::new();
    let provider = kmip.provider();
    let unlocked = provider.signing_request(None).unwrap().0;
    provider.lock();
    assert!(matches!(provider.signing_request(None), Err(TrustError::Locked)));
    provider.unlock(&Fixture::credential(&kmip)).unwrap();
    let again = provider.signing_request(None).unwrap().0;
    assert_eq!(public_key(&again), public_key(&unlocked));
}

#[test]
fn identity_in_use_stays_until_the_kms_has_accepted_the_new_one() {
    let mut kmip = Kmip::with(false, |_| {});
    let wrapped = Wrapped::by(kmip.provider());
    let file = |kmip: &Kmip| {
        let files = walk(kmip.state_dir());
        let file = files.iter().find(|file| file.ends_with("identity.json")).unwrap();
        fs::read(file).unwrap()
    };
    let before = file(&kmip);
    let stranger = identity(&Authority::new(), false);
    let refused = kmip.provider().set_identity(&stranger);
    assert!(matches!(refused, Err(TrustError::NotAccepted(_))), "{refused:?}");
    wrapped.assert_opened_by(kmip.provider());
    // Nor is it replaced while nobody can say.
    kmip.server.kill();
    let another = identity(&kmip.authority, false);
    let refused = kmip.provider().set_identity(&another);
    assert!(matches!(refused, Err(TrustError::NotAccepted(_))), "{refused:?}");
    assert_eq!(file(&kmip), before);
    kmip.server.run().unwrap();
    kmip.provider().set_identity(&another).unwrap();
    assert_ne!(file(&kmip), before);
    let provider = kmip.provider();
    assert!(
        provider
            .keys_that_stay_shut(vec![wrapped.stanza.clone()])
            .is_empty()
    );
    let mut lost = wrapped.stanza.clone();
    lost.kek.0 = "4711".to_owned();
    let shut = provider.keys_that_stay_shut(vec![wrapped.stanza.clone(), lost]);
    assert!(shut.len() == 1 && shut[0].what.contains("4711"), "{shut:?}");
    // One that is refused itself holds nobody up: the KMS may need minutes to let the new one in.
    kmip.server.kill();
    kmip.server.accept(&Authority::new()).unwrap();
    kmip.server.run().unwrap();
    kmip.provider().set_identity(&another).unwrap();
}

#[test]
fn sealed_key_is_never_replaced_by_one_in_the_clear() {
    let kmip = Kmip::new();
    let plain = identity(&kmip.authority, false);
    assert!(matches!(
        kmip.provider().set_identity(&plain),
        Err(TrustError::WouldUnseal)
    ));
    kmip.provider().lock();
    let sealed = identity(&kmip.authority, true);
    assert!(matches!(
        kmip.provider().set_identity(&sealed),
        Err(TrustError::Locked)
    ));
    for entry in walk(kmip.state_dir()) {
        let text = String::from_utf8_lossy(&fs::read(entry).unwrap()).into_owned();
        assert!(!text.contains("PRIVATE KEY") && !text.contains("\"password\""));
    }
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] })
        .collect()
}

#[test]
fn trust_is_read_again_by_an_unlock() {
    let mut kmip = Kmip::new();
    let wrapped = Wrapped::by(kmip.provider());
    let files = walk(kmip.state_dir());
    let file = files.iter().find(|file| file.ends_with("trust.json")).unwrap();
    let good = fs::read(file).unwrap();
    // What the start could not read is no reason to trust nobody for ever, nor is it a reason to trust anybody.
    fs::write(file, "{").unwrap();
    kmip.restart();
    let unlock = || kmip.provider().unlock(&secret(Kmip::CREDENTIAL));
    let error = unlock().unwrap_err();
    assert!(
        matches!(&error, ProviderError::Unusable(why) if why.contains("trust.json")),
        "{error:?}"
    );
    assert_eq!(kmip.provider().status(), ProviderStatus::Locked);
    fs::write(file, &good).unwrap();
    unlock().unwrap();
    assert_eq!(kmip.provider().status(), ProviderStatus::Ready);
    wrapped.assert_opened_by(kmip.provider());
    // Another trust than the one in memory, from a restored state directory.
    let other = serde_json::json!({"pins": ["AB".repeat(32)]}).to_string();
    fs::write(file, other).unwrap();
    kmip.provider().lock();
    unlock().unwrap();
    assert!(!not_trusted(kmip.provider()).starts_with("Connected"));
    assert!(kmip.provider().unwrap_many(&[&wrapped.stanza]).is_err());
}

/// The client's certificate is offered only to who asks; who does not ask has not refused it.
#[test]
fn server_that_asks_for_no_client_certificate_has_not_refused_it() {
    let authority = Authority::new();
    for version in ["-tls1_2", "-tls1_3"] {
        let server = TlsServer::asking_nothing(&authority, version);
        let (provider, _dir) = untrusting(server.port());
        provider.trust(ServerTrust::Ca(authority.pem())).unwrap();
        let is_unreachable = || matches!(provider.status(), ProviderStatus::Unreachable(_));
        assert!(is_unreachable(), "{version}: {}", provider.status());
        // With one that the server's CA does not know.
        provider
            .set_identity(&identity(&Authority::new(), false))
            .unwrap();
        assert!(is_unreachable(), "{version}: {}", provider.status());
    }
}

/// A bad sector is no reason to delete the provider.
#[test]
fn what_is_damaged_on_disk_is_replaced_by_a_new_identity() {
    let authority = Authority::new();
    let (provider, dir) = untrusting(free_port().unwrap());
    provider.signing_request(None).unwrap();
    provider.set_identity(&identity(&authority, false)).unwrap();
    let files = walk(dir.path());
    let file = |name: &str| files.iter().find(|file| file.ends_with(name)).unwrap().clone();
    let paths = [file("identity.json"), file("request.json")];
    for path in &paths {
        fs::write(path, "{\"certificates\":\"").unwrap();
    }
    assert!(matches!(
        provider.signing_request(None),
        Err(TrustError::Store(_))
    ));
    // It may have been sealed.
    let refused = provider.set_identity(&identity(&authority, false));
    assert!(matches!(refused, Err(TrustError::WouldUnseal)), "{refused:?}");
    // Nor is a lock in the way, which no unlock ends.
    provider.lock();
    assert!(matches!(
        provider.unlock(&secret(Kmip::CREDENTIAL)),
        Err(ProviderError::Unusable(_))
    ));
    provider.set_identity(&identity(&authority, true)).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Locked);
    provider.unlock(&secret(Kmip::CREDENTIAL)).unwrap();
    provider.signing_request(Some((KeyKind::EcP256, None))).unwrap();
    assert!(!fs::read_to_string(&paths[0]).unwrap().contains("PRIVATE KEY"));
}

/// The certificate is whole, and what the passphrase is to open is not: an unlock says so, and another identity is the way out.
#[test]
fn an_identity_that_no_passphrase_opens_is_replaced() {
    let authority = Authority::new();
    let (provider, dir) = untrusting(free_port().unwrap());
    provider.set_identity(&identity(&authority, true)).unwrap();
    let files = walk(dir.path());
    let path = files.iter().find(|file| file.ends_with("identity.json")).unwrap();
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, text.replace("-----BEGIN AGE ENCRYPTED FILE-----\\n", "")).unwrap();
    provider.lock();
    let refused = provider.set_identity(&identity(&authority, true));
    assert!(matches!(refused, Err(TrustError::Locked)), "{refused:?}");
    let error = provider.unlock(&secret(Kmip::CREDENTIAL)).unwrap_err();
    assert!(matches!(error, ProviderError::IdentityDamaged(_)), "{error:?}");
    let (_, next) = error.advice("kms", Kind::named("kmip"));
    assert!(next.unwrap().to_string().contains("provider identity kms"));
    provider.set_identity(&identity(&authority, true)).unwrap();
    provider.unlock(&secret(Kmip::CREDENTIAL)).unwrap();
}
