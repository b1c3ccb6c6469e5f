//! Keys that each kind of provider unwraps in a second, eight with one call: the disks of a VM.
//!
//! Warm is a call like the one before it, cold the first one after an unlock. Where the same work can be had without
//! virtseal, by its server's own protocol on an open connection, that is measured in turn.

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslStream};
use openssl::symm::{Cipher, decrypt_aead, encrypt_aead};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtseal::inside::{Kind, WrappedKeys};
use virtseal_testkit::SealedHost;
use virtseal_testkit::servers::{OpenBao, PyKmip, SoftHsm};

use crate::figure::{Figure, Target};
use crate::samples::Samples;

const KEYS: usize = 8;
const WARM: usize = 200;
const COLD: usize = 7;

#[derive(Serialize, Deserialize)]
pub(crate) struct Times {
    kind: String,
    warm: Samples,
    cold: Samples,
    peer: Option<(String, Samples, f64)>,
}

pub(crate) fn measure(_: &mut SealedHost) -> Result<Vec<Figure>> {
    let hsm = SoftHsm::new()?;
    hsm.make("bench")?;
    // The module reads its environment once, so it is another process that loads it.
    let [launcher, variable] = hsm.launcher();
    let output = Command::new(launcher)
        .arg(variable)
        .arg(env::current_exe()?)
        .args(["inside", "unwraps"])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "unwraps ended with {}", output.status);
    let times: Vec<Times> = serde_json::from_slice(&output.stdout)?;
    let mut figures = Vec::new();
    for one in times {
        figures.extend(one.figures()?);
    }
    Ok(figures)
}

impl Times {
    fn figures(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for (how, samples) in [("warm", &self.warm), ("first after an unlock", &self.cold)] {
            let median = samples.median()?;
            figures.push(Figure::new(
                &format!("unwrap, {}, {how}", self.kind),
                KEYS as f64 * 1000.0 / median,
                "keys/s",
                Target::Nothing,
                format!(
                    "{KEYS} keys with one call: median {median:.2} ms of {}",
                    samples.len()
                ),
            ));
        }
        if let Some((what, samples, most)) = &self.peer {
            let (ours, peers) = (self.warm.median()?, samples.median()?);
            figures.push(Figure::new(
                &format!("unwrap, {}, warm, against {what}", self.kind),
                ours / peers,
                "x",
                Target::AtMost(*most),
                format!(
                    "median {ours:.3} ms against {peers:.3} ms, {} each in turn",
                    samples.len()
                ),
            ));
        }
        Ok(figures)
    }
}

/// Something that does the same work without virtseal.
struct Peer<'a> {
    what: &'a str,
    most: f64,
    run: Box<dyn FnMut() -> Result<()> + 'a>,
}

pub(crate) fn inside() -> Result<Vec<Times>> {
    Ok(vec![native()?, softhsm()?, transit()?, kmip()?])
}

fn time(kind: &str, keys: &WrappedKeys, mut peer: Option<Peer<'_>>) -> Result<Times> {
    let [mut warm, mut cold, mut peers] = <[Samples; 3]>::default();
    for _ in 0..COLD {
        keys.unlock_again()?;
        cold.time(|| keys.unwrap())?;
    }
    for _ in 0..WARM {
        warm.time(|| keys.unwrap())?;
        if let Some(peer) = &mut peer {
            peers.time(|| (peer.run)())?;
        }
    }
    Ok(Times {
        kind: kind.to_owned(),
        warm,
        cold,
        peer: peer.map(|peer| (peer.what.to_owned(), peers, peer.most)),
    })
}

fn native() -> Result<Times> {
    let dir = tempfile::tempdir()?;
    let keys = WrappedKeys::new(dir.path(), Kind::Native, b"bench", KEYS)?;
    let (key, nonce, mut tag) = ([7; 32], [9; 12], [0; 16]);
    let cipher = Cipher::aes_256_gcm();
    let sealed = encrypt_aead(cipher, &key, Some(&nonce), b"kek", &[5; 64], &mut tag)?;
    let run = || {
        for _ in 0..KEYS {
            decrypt_aead(cipher, &key, Some(&nonce), b"kek", &sealed, &tag)?;
        }
        Ok(())
    };
    let peer = Peer {
        what: "OpenSSL's AES-256-GCM alone",
        // A KEK is derived for each, and every key comes in memory that is hidden and locked.
        most: 20.0,
        run: Box::new(run),
    };
    time("native", &keys, Some(peer))
}

fn softhsm() -> Result<Times> {
    let dir = tempfile::tempdir()?;
    let settings = json!({"module": SoftHsm::MODULE, "token": {"label": "bench"}});
    let keys = WrappedKeys::new(
        dir.path(),
        Kind::Pkcs11 { settings },
        SoftHsm::PIN.as_bytes(),
        KEYS,
    )?;
    time("pkcs11 (SoftHSM)", &keys, None)
}

fn transit() -> Result<Times> {
    let (bao, dir) = (OpenBao::start()?, tempfile::tempdir()?);
    let settings = json!({
        "address": format!("http://127.0.0.1:{}", bao.port()),
        "auth": {"method": "approle", "role_id": bao.role_id()}
    });
    let credential = std::fs::read_to_string(bao.secret_id())?;
    let keys = WrappedKeys::new(
        dir.path(),
        Kind::Transit { settings },
        credential.trim().as_bytes(),
        KEYS,
    )?;
    let mut bare = BareHttp::decrypting(&bao)?;
    let peer = Peer {
        what: "the same request on a bare socket",
        // The answer is read into memory that is hidden and locked, and each key is checked.
        most: 3.0,
        run: Box::new(move || bare.ask()),
    };
    time("transit (OpenBao)", &keys, Some(peer))
}

/// One request for eight keys, again and again on one connection.
struct BareHttp {
    stream: BufReader<TcpStream>,
    request: String,
}

impl BareHttp {
    fn decrypting(bao: &OpenBao) -> Result<Self> {
        bao.bao(&["write", "-f", "transit/keys/bare"])?;
        let plain = format!("plaintext={}", "QUFB".repeat(21));
        let cipher = bao.bao(&["write", "-field=ciphertext", "transit/encrypt/bare", &plain])?;
        let body = json!({"batch_input": vec![json!({"ciphertext": cipher}); KEYS]}).to_string();
        let request = format!(
            "POST /v1/transit/decrypt/bare HTTP/1.1\r\nHost: bao\r\nX-Vault-Token: root\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let stream = TcpStream::connect(("127.0.0.1", bao.port()))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
            request,
        })
    }

    fn ask(&mut self) -> Result<()> {
        self.stream.get_mut().write_all(self.request.as_bytes())?;
        let (mut line, mut length) = (String::new(), 0);
        while line != "\r\n" {
            line.clear();
            self.stream.read_line(&mut line)?;
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        let answer: Value = serde_json::from_slice(&body)?;
        let keys = answer["data"]["batch_results"].as_array().map(Vec::len);
        ensure!(keys == Some(KEYS), "{answer}");
        Ok(())
    }
}

fn kmip() -> Result<Times> {
    let (kms, dir) = (PyKmip::start()?, tempfile::tempdir()?);
    let settings = json!({"endpoints": [format!("127.0.0.1:{}", kms.port())]});
    let (pem, key) = kms.client("bench")?;
    let kind = Kind::Kmip {
        settings,
        certificate: std::fs::read(&pem)?,
        key: std::fs::read(&key)?,
        authority: kms.authority.pem(),
    };
    let keys = WrappedKeys::new(dir.path(), kind, b"any", KEYS)?;
    let uid = keys.kek().context("no key")?.to_owned();
    let mut bare = BareKmip::getting(&kms, &pem, &key, &uid)?;
    let peer = Peer {
        what: "the same request on a bare TLS connection",
        most: 2.0,
        run: Box::new(move || bare.ask()),
    };
    time("kmip (PyKMIP)", &keys, Some(peer))
}

/// GetAttributes and Get of one key in one request, again and again on one connection.
struct BareKmip {
    stream: SslStream<TcpStream>,
    request: Vec<u8>,
}

impl BareKmip {
    fn getting(kms: &PyKmip, pem: &Path, key: &Path, uid: &str) -> Result<Self> {
        let mut connector = SslConnector::builder(SslMethod::tls_client())?;
        connector.set_ca_file(kms.ca())?;
        connector.set_certificate_file(pem, SslFiletype::PEM)?;
        connector.set_private_key_file(key, SslFiletype::PEM)?;
        let stream = TcpStream::connect(("127.0.0.1", kms.port()))?;
        stream.set_nodelay(true)?;
        let stream = connector.build().connect("127.0.0.1", stream)?;
        let number = |tag, value: u32| item(tag, 2, &value.to_be_bytes());
        let named = |name: &str| item(0x42_000A, 7, name.as_bytes());
        let call = |nth: u8, operation: u32, rest: &[Vec<u8>]| {
            let payload = [&[item(0x42_0094, 7, uid.as_bytes())], rest].concat().concat();
            let parts = [
                item(0x42_005C, 5, &operation.to_be_bytes()),
                item(0x42_0093, 8, &[nth]),
                item(0x42_0079, 1, &payload),
            ];
            item(0x42_000F, 1, &parts.concat())
        };
        let version = [number(0x42_006A, 1), number(0x42_006B, 4)].concat();
        let header = [item(0x42_0069, 1, &version), number(0x42_000D, 2)].concat();
        let attributes = ["State", "Cryptographic Algorithm", "Cryptographic Length"].map(named);
        let message = [
            item(0x42_0077, 1, &header),
            call(1, 11, &attributes),
            call(2, 10, &[]),
        ];
        Ok(Self {
            stream,
            request: item(0x42_0078, 1, &message.concat()),
        })
    }

    fn ask(&mut self) -> Result<()> {
        self.stream.write_all(&self.request)?;
        let mut header = [0; 8];
        self.stream.read_exact(&mut header)?;
        let [.., a, b, c, d] = header;
        let mut body = vec![0; usize::try_from(u32::from_be_bytes([a, b, c, d]))?];
        self.stream.read_exact(&mut body)?;
        // A key block, which a refusal has not.
        let found = body.windows(4).any(|tag| tag == [0x42, 0x00, 0x40, 1]);
        ensure!(found, "the server gives no key");
        Ok(())
    }
}

/// An item of TTLV: tag, type, length, value, padding.
fn item(tag: u32, kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = (tag << 8 | u32::from(kind)).to_be_bytes().to_vec();
    bytes.extend(u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}
