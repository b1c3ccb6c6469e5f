//! Trust, both ways, with a real OpenBao over TLS.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use openssl::pkey::PKey;
use openssl::ssl::{SslAcceptor, SslMethod, SslVerifyMode};
use openssl::x509::X509;
use serde_json::{Value, json};
use virtseal_testkit::servers::{Authority, free_port};

use super::bao::{Bao, Proxy, secret};
use super::tests::Tested;
use super::*;
use crate::model::envelope::VmId;
use crate::model::problem::Code;
use crate::provider::kind::Kind;

fn server(ca: &Authority, names: &[&str]) -> Bao {
    server_in(tempfile::tempdir().unwrap(), ca, names)
}

pub(super) fn server_in(directory: tempfile::TempDir, ca: &Authority, names: &[&str]) -> Bao {
    certify(directory.path(), ca, names, 50);
    std::fs::write(directory.path().join("ca.pem"), ca.pem()).unwrap();
    Bao::stored(directory)
}

/// Gives the server a new certificate, from its next start on.
fn certify(directory: &std::path::Path, ca: &Authority, names: &[&str], days: i64) -> Vec<u8> {
    let certified = ca.server_for(names, days);
    std::fs::write(directory.join("server.key"), certified.key).unwrap();
    std::fs::write(directory.join("server.pem"), &certified.certificate).unwrap();
    certified.certificate
}

fn provider(bao: &Bao, mount: &str, auth: Value, change: impl FnOnce(&mut Value)) -> Tested {
    let ca = bao.directory.path().join("ca.pem");
    let mut settings = json!({"address": bao.address, "mount": mount, "auth": auth, "ca": ca});
    change(&mut settings);
    let settings: TransitSettings = serde_json::from_value(settings).unwrap();
    Tested::new(settings.validated().unwrap())
}

#[test]
fn client_certificate_logs_in_and_stays_logged_in() {
    let ca = Authority::named("ca");
    let bao = server(&ca, &["127.0.0.1"]);
    let mount = bao.engine();
    let policy = bao.policy(&mount);
    bao.ask("POST", "sys/auth/cert", &json!({"type": "cert"}));
    let hosts = Authority::named("hosts");
    let role = json!({"certificate": hosts.pem(), "token_policies": [policy], "token_ttl": "1h"});
    bao.ask("POST", "auth/cert/certs/hosts", &role);
    let made = provider(&bao, &mount, json!({"method": "cert", "role": "hosts"}), |_| {});

    let stranger = ca.client("host1", 5);
    let error = made.unlock(&secret(&stranger.pem())).unwrap_err();
    assert!(matches!(error, ProviderError::WrongCredential), "{error:?}");
    let expired = hosts.client("host1", -1);
    for (garbage, wanted) in [
        ("not a key".to_owned(), "private key"),
        (hosts.pem(), "private key"),
        (expired.pem(), "expired on"),
        (String::from_utf8(stranger.key.clone()).unwrap(), "certificate"),
        (
            stranger.certificate_pem() + &expired.pem()[expired.certificate_pem().len()..],
            "does not belong to the certificate",
        ),
    ] {
        let error = made.unlock(&secret(&garbage)).unwrap_err();
        assert!(
            matches!(&error, ProviderError::CredentialRefused(why) if why.contains(wanted)),
            "{error:?}"
        );
    }
    assert_eq!(made.status(), ProviderStatus::Locked);

    let host = hosts.client("host1", 5);
    // Some CAs deliver theirs first.
    made.unlock(&secret(&(hosts.pem() + &host.pem()))).unwrap();
    made.lock();
    made.unlock(&secret(&host.pem())).unwrap();
    let status = made.status().to_string();
    assert!(
        status.starts_with("degraded (the client certificate expires in "),
        "{status}"
    );
    let host = hosts.client("host1", 50);
    made.unlock(&secret(&host.pem())).unwrap();
    let kek = made.create_kek(&KekScope::Vm(VmId::random())).unwrap();
    let token = made.link.get().state().session.clone().unwrap();
    let token = std::str::from_utf8(token.token.expose()).unwrap().to_owned();
    bao.ask("POST", "auth/token/revoke", &json!({"token": token}));
    assert!(made.rotate(&kek).is_ok());
    assert_eq!(made.status(), ProviderStatus::Ready);
}

#[test]
fn killed_connections_are_not_noticed_over_tls_either() {
    let ca = Authority::named("ca");
    let bao = server(&ca, &["127.0.0.1"]);
    let proxy = Proxy::before(&bao);
    let mount = bao.engine();
    let made = provider(&bao, &mount, json!({"method": "token"}), |settings| {
        settings["address"] = json!(proxy.address);
    });
    made.unlock(&secret(&bao.token(&bao.policy(&mount), json!({}))))
        .unwrap();
    let kek = made.create_kek(&KekScope::Vm(VmId::random())).unwrap();
    for _ in 0..10 {
        proxy.cut();
        assert!(made.rotate(&kek).is_ok());
    }
    // What is left of a server that is gone is no matter of trust.
    bao.kill();
    let error = made.rotate(&kek).unwrap_err();
    assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
}

#[test]
fn server_is_trusted_by_its_ca_and_its_name_only() {
    let ca = Authority::named("ca");
    // Admins reach this server by its name alone, so the test does by `server_name`.
    let bao = server(&ca, &["127.0.0.1", "kms.example"]);
    let token = || secret(&bao.token("root", json!({})));
    let with = |change: fn(&mut Value)| provider(&bao, "transit", json!({"method": "token"}), change);
    with(|_| {}).unlock(&token()).unwrap();
    with(|settings| settings["server_name"] = json!("kms.example"))
        .unlock(&token())
        .unwrap();
    let refusal = |made: Tested| {
        let error = made.unlock(&token()).unwrap_err();
        assert_eq!(made.status(), ProviderStatus::Locked);
        match error {
            ProviderError::NotSignedByOurs(why) => why,
            error => panic!("{error:?}"),
        }
    };
    let why = refusal(with(|settings| settings["server_name"] = json!("other.example")));
    assert!(why.contains("other.example") && why.contains("mismatch"), "{why}");
    let why = refusal(with(|settings| {
        settings.as_object_mut().unwrap().remove("ca");
    }));
    assert!(why.contains("not trusted"), "{why}");
    let why = refusal(with(|settings| settings["ca"] = json!("/nonexistent/ca.pem")));
    assert!(why.contains("/nonexistent/ca.pem"), "{why}");
    // A server that does not speak TLS at all.
    let plain = Bao::shared();
    let address = plain.address.replace("http://", "https://");
    let made = provider(&bao, "transit", json!({"method": "token"}), |settings| {
        settings["address"] = json!(address);
    });
    assert!(refusal(made).contains("TLS failed"));
}

/// What the conformance suite runs: certificates that end, by their time or by a revocation list, on both sides.
pub(in crate::provider) fn expired_and_revoked_certificates_end_trust() {
    let ca = Authority::named("ca");
    let bao = server(&ca, &["127.0.0.1"]);
    let mount = bao.engine();
    let policy = bao.policy(&mount);
    let hosts = Authority::named("hosts");
    let role = bao.certificate_role(&policy, &hosts.pem());
    let made = provider(&bao, &mount, json!({"method": "cert", "role": role}), |_| {});

    // Ours, by its time: it is not even shown.
    let error = made
        .unlock(&secret(&hosts.client("host1", -1).pem()))
        .unwrap_err();
    assert!(error.to_string().contains("expired on"), "{error}");
    // Ours, by the server's list.
    let host = hosts.client("host1", 50);
    made.unlock(&secret(&host.pem())).unwrap();
    let list = json!({"crl": hosts.revocation_list(&[&host.certificate])});
    bao.ask("POST", "auth/cert/crls/hosts", &list);
    let error = made.unlock(&secret(&host.pem())).unwrap_err();
    assert!(matches!(error, ProviderError::WrongCredential), "{error:?}");
    made.unlock(&secret(&hosts.client("host1", 50).pem())).unwrap();

    // The server's, by our list: another certificate on it does no harm.
    let shown = std::fs::read(bao.directory.path().join("server.pem")).unwrap();
    let other = ca.server_for(&["127.0.0.1"], 10);
    let client = hosts.client("host1", 50).pem();
    for (revoked, wanted) in [(&other.certificate, None), (&shown, Some("revoked"))] {
        let trusted = ca.pem() + &ca.revocation_list(&[revoked]);
        let file = bao.directory.path().join("ca-and-list.pem");
        std::fs::write(&file, trusted).unwrap();
        let made = provider(
            &bao,
            &mount,
            json!({"method": "cert", "role": role}),
            |settings| {
                settings["ca"] = json!(file);
            },
        );
        let unlocked = made.unlock(&secret(&client));
        match (wanted, unlocked) {
            (None, unlocked) => unlocked.unwrap(),
            (Some(wanted), Err(ProviderError::NotSignedByOurs(why))) => {
                assert!(why.contains(wanted), "{why}");
            }
            (Some(_), unlocked) => panic!("{unlocked:?}"),
        }
    }
    // The server's, by its time.
    bao.kill();
    certify(bao.directory.path(), &ca, &["127.0.0.1"], -1);
    bao.start();
    let error = made.unlock(&secret(&client)).unwrap_err();
    assert!(
        matches!(&error, ProviderError::NotSignedByOurs(why) if why.contains("expired")),
        "{error:?}"
    );
}

/// A server that ends each connection after the handshake; by `verify` it asks for a certificate in it.
fn closing_server(ca: &Authority, verify: SslVerifyMode) -> String {
    let identity = ca.server_for(&["127.0.0.1"], 50);
    let mut acceptor = SslAcceptor::mozilla_modern_v5(SslMethod::tls_server()).unwrap();
    let key = PKey::private_key_from_pem(&identity.key).unwrap();
    acceptor.set_private_key(&key).unwrap();
    let certificate = X509::from_pem(&identity.certificate).unwrap();
    acceptor.set_certificate(&certificate).unwrap();
    acceptor.set_verify_callback(verify, |_, _| true);
    let acceptor = acceptor.build();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(acceptor.accept(stream.unwrap()));
        }
    });
    address
}

#[test]
fn server_that_goes_after_it_asked_for_a_certificate_has_turned_us_away() {
    let ca = Authority::named("ca");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    std::fs::write(&file, ca.pem()).unwrap();
    let client = secret(&ca.client("host1", 50).pem());
    let made = |verify, auth: Value| {
        let address = closing_server(&ca, verify);
        let settings = json!({"address": address, "mount": "transit", "auth": auth, "ca": file});
        let settings: TransitSettings = serde_json::from_value(settings).unwrap();
        Tested::new(settings.validated().unwrap())
    };
    let by_certificate = json!({"method": "cert", "role": "hosts"});
    let error = made(SslVerifyMode::PEER, by_certificate.clone())
        .unlock(&client)
        .unwrap_err();
    assert!(
        matches!(&error, ProviderError::CertificateRefused(why) if why.contains("client certificate")),
        "{error:?}"
    );
    assert_leads_out(&error, "virtseal provider unlock vault --passphrase-file FILE");
    // With a token there is no certificate to give.
    let error = made(SslVerifyMode::PEER, json!({"method": "token"}))
        .unlock(&secret("token"))
        .unwrap_err();
    assert!(matches!(error, ProviderError::CertificateWanted(_)), "{error:?}");
    assert_leads_out(&error, "ask this host for no client certificate");
    let error = made(SslVerifyMode::NONE, by_certificate)
        .unlock(&client)
        .unwrap_err();
    assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
}

/// Exit code 5, and this to do next.
fn assert_leads_out(error: &ProviderError, next: &str) {
    let (code, advice) = error.advice("vault", Kind::named("transit"));
    assert_eq!((code, code as i64), (Code::NotTrusted, 5), "{error:?}");
    let advice = advice.unwrap().to_string();
    assert!(advice.contains(next), "{advice}");
}

/// nginx, which ends TLS before a server; killed when dropped.
struct Nginx(Child);

impl Nginx {
    /// Before `bao`, on three ports: it verifies clients by `hosts`, does not, or knows no such page.
    fn before(bao: &Bao, ca: &Authority, hosts: &Authority) -> (Self, [String; 3]) {
        let directory = bao.directory.path();
        std::fs::write(directory.join("hosts.pem"), hosts.pem()).unwrap();
        certify(directory, ca, &["127.0.0.1"], 50);
        let ports = [(); 3].map(|()| free_port().unwrap());
        let server = |port: u16, what: &str| format!("server {{ listen 127.0.0.1:{port} ssl; {what} }}");
        let pass = format!("location / {{ proxy_pass {}; }}", bao.address);
        let verify = format!("ssl_client_certificate hosts.pem; ssl_verify_client on; {pass}");
        let servers = [
            server(ports[0], &verify),
            server(ports[1], &pass),
            server(ports[2], ""),
        ];
        let configuration = format!(
            "daemon off; master_process off; pid nginx.pid; error_log nginx.log; events {{}} http {{ access_log off; \
             client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s; \
             ssl_certificate server.pem; ssl_certificate_key server.key; {} }}",
            servers.join(" ")
        );
        std::fs::write(directory.join("nginx.conf"), configuration).unwrap();
        let child = Command::new("/usr/sbin/nginx")
            .arg("-p")
            .arg(directory)
            .args(["-c", "nginx.conf", "-e", "nginx.log"])
            .spawn()
            .unwrap_or_else(|error| panic!("nginx: {error}: install nginx-light"));
        for port in ports {
            let began = Instant::now();
            while TcpStream::connect(("127.0.0.1", port)).is_err() {
                assert!(began.elapsed() < Duration::from_secs(60), "nginx does not start");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        (Self(child), ports.map(|port| format!("https://127.0.0.1:{port}")))
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The pages of what ends TLS before a server are not the server's word: neither on a token, nor on a key.
#[test]
fn a_proxy_that_verifies_clients_turns_away_and_knows_no_key() {
    let ca = Authority::named("ca");
    let hosts = Authority::named("hosts");
    let bao = Bao::dev();
    std::fs::write(bao.directory.path().join("ca.pem"), ca.pem()).unwrap();
    let mount = bao.engine();
    let (_nginx, [verifying, passing, lost]) = Nginx::before(&bao, &ca, &hosts);
    let at = |address: &str, auth: Value| {
        provider(&bao, &mount, auth, |settings| {
            settings["address"] = json!(address);
        })
    };
    let token = secret(&bao.token(&bao.policy(&mount), json!({})));

    let made = at(&verifying, json!({"method": "token"}));
    let error = made.unlock(&token).unwrap_err();
    assert!(
        matches!(&error, ProviderError::CertificateWanted(why) if why.contains("No required SSL certificate was sent")),
        "{error:?}"
    );
    assert_leads_out(&error, "ask this host for no client certificate");
    let stranger = Authority::named("strangers").client("host1", 50);
    let made = at(&verifying, json!({"method": "cert", "role": "hosts"}));
    let error = made.unlock(&secret(&stranger.pem())).unwrap_err();
    assert!(
        matches!(&error, ProviderError::CertificateRefused(why) if why.contains("SSL certificate error")),
        "{error:?}"
    );
    assert_leads_out(&error, "virtseal provider unlock vault --passphrase-file FILE");

    // Through one that lets everybody pass it works, until it turns this host away, or has lost the server.
    let made = at(&passing, json!({"method": "token"}));
    made.unlock(&token).unwrap();
    let kek = made.create_kek(&KekScope::Vm(VmId::random())).unwrap();
    let forward = Forward::to(&passing);
    let through = at(&forward.address, json!({"method": "token"}));
    through.unlock(&token).unwrap();
    assert!(through.rotate(&kek).is_ok());
    forward.now_to(&verifying);
    let error = through.rotate(&kek).unwrap_err();
    assert!(matches!(error, ProviderError::CertificateWanted(_)), "{error:?}");
    assert!(
        matches!(through.status(), ProviderStatus::NotTrusted(_)),
        "{}",
        through.status()
    );
    assert!(matches!(
        through.refuses(),
        Some(ProviderError::CertificateWanted(_))
    ));
    forward.now_to(&lost);
    let error = through.rotate(&kek).unwrap_err();
    assert!(
        matches!(&error, ProviderError::Trouble(why) if why.contains("404 Not Found")),
        "{error:?}"
    );
    // It has ended neither session nor credential.
    forward.now_to(&passing);
    assert!(through.rotate(&kek).is_ok());
    assert_eq!(through.status(), ProviderStatus::Ready);
}

/// A port whose connections go to another one, which may change; then those that are open end.
struct Forward {
    address: String,
    to: Arc<Mutex<(String, Vec<TcpStream>)>>,
}

impl Forward {
    fn to(address: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = format!("https://{}", listener.local_addr().unwrap());
        let to = Arc::new(Mutex::new((host_and_port(address), Vec::new())));
        let shared = Arc::clone(&to);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let mut to = shared.lock().unwrap();
                let server = TcpStream::connect(&to.0).unwrap();
                for (mut from, mut into) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server.try_clone().unwrap(), client.try_clone().unwrap()),
                ] {
                    std::thread::spawn(move || {
                        // Either side may go at any time.
                        let _ = std::io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
                to.1.extend([client, server]);
            }
        });
        Self { address: own, to }
    }

    fn now_to(&self, address: &str) {
        let mut to = self.to.lock().unwrap();
        to.0 = host_and_port(address);
        for stream in to.1.drain(..) {
            // Closed by the other side already when this fails.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn host_and_port(address: &str) -> String {
    address.strip_prefix("https://").unwrap().to_owned()
}
