//! A PyKMIP server: KMIP 1.0 to 1.4 and 2.0 over TLS 1.2, client certificates required.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use tempfile::TempDir;

use super::{Authority, Running, directory, free_port, test_tool, text};
use crate::SealedHost;

/// The server, with an authority that issued its certificate and those of its clients.
pub struct PyKmip {
    /// Issues certificates that both sides trust.
    pub authority: Authority,
    port: u16,
    running: Option<Running>,
    dir: TempDir,
}

impl PyKmip {
    /// Starts it without any keys.
    ///
    /// # Errors
    /// It is not installed, or ends instead.
    pub fn start() -> Result<Self> {
        Self::certified_by(&Authority::new(), 90)
    }

    /// The same with a certificate by `authority` that ends in `days` days; it accepts clients of the same authority.
    ///
    /// # Errors
    /// It is not installed, or ends instead.
    pub fn certified_by(authority: &Authority, days: i64) -> Result<Self> {
        let mut server = Self {
            authority: authority.clone(),
            port: free_port()?,
            running: None,
            dir: directory()?,
        };
        fs::create_dir(server.path("policy"))?;
        server.accept(authority)?;
        server.certify(authority, days)?;
        fs::write(server.path("server.conf"), server.configuration())?;
        server.run()?;
        Ok(server)
    }

    /// Gives it another certificate, from its next start on.
    ///
    /// # Errors
    /// It can't be written.
    pub fn certify(&self, authority: &Authority, days: i64) -> Result<()> {
        let certified = authority.server(days);
        fs::write(self.path("server.pem"), certified.certificate)?;
        Ok(fs::write(self.path("server.key"), certified.key)?)
    }

    /// Lets it accept clients of another authority instead, from its next start on.
    ///
    /// # Errors
    /// It can't be written.
    pub fn accept(&self, authority: &Authority) -> Result<()> {
        Ok(fs::write(self.ca(), authority.pem())?)
    }

    /// The certificate that it shows.
    ///
    /// # Errors
    /// It can't be read.
    pub fn certificate(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.path("server.pem"))?)
    }

    /// Its database: for what no client can ask for.
    ///
    /// # Errors
    /// SQLite's.
    pub fn database(&self) -> Result<rusqlite::Connection> {
        let database = rusqlite::Connection::open(self.path("keys.db"))?;
        database.busy_timeout(Duration::from_secs(30))?;
        Ok(database)
    }

    fn configuration(&self) -> String {
        let path = |file: &str| self.path(file).display().to_string();
        format!(
            "[server]\nhostname=127.0.0.1\nport={}\ncertificate_path={}\nkey_path={}\nca_path={}\n\
             logging_level=ERROR\nauth_suite=TLS1.2\npolicy_path={}\nenable_tls_client_auth=True\ndatabase_path={}\n\
             tls_cipher_suites=\n    TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384\n    \
             TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256\n",
            self.port,
            path("server.pem"),
            path("server.key"),
            path("ca.pem"),
            path("policy"),
            path("keys.db"),
        )
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Starts it again, with the keys that it had.
    ///
    /// # Errors
    /// It ends instead.
    pub fn run(&mut self) -> Result<()> {
        let program = test_tool("pykmip/bin/pykmip-server", "PyKMIP")?;
        let (conf, log) = (self.path("server.conf"), self.path("server.log"));
        let arguments = ["-f", text(&conf)?, "-l", text(&log)?];
        self.running = Some(Running::start(&program, arguments, self.dir.path(), self.port)?);
        Ok(())
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Where it listens, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The file with the certificate of its authority.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// Files with a new client's certificate and key.
    ///
    /// # Errors
    /// They can't be written.
    pub fn client(&self, cn: &str) -> Result<(PathBuf, PathBuf)> {
        let (pem, key) = (self.path(&format!("{cn}.pem")), self.path(&format!("{cn}.key")));
        let certified = self.authority.client(cn, 90);
        fs::write(&pem, certified.certificate)?;
        fs::write(&key, certified.key)?;
        Ok((pem, key))
    }

    /// Adds a provider that asks it at each of `ports` on 127.0.0.1, with trust both ways. Its key on disk is sealed by
    /// [`SealedHost::PASSPHRASE`] where `sealed_key`, and it is unlocked.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn add_to(&self, sealed: &SealedHost, name: &str, ports: &[u16], sealed_key: bool) -> Result<()> {
        let endpoints: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let mut add = vec!["provider", "add", "kmip", name];
        endpoints
            .iter()
            .for_each(|endpoint| add.extend(["--endpoint", endpoint]));
        sealed.virtseal(&add)?.succeeded()?;
        let ca = self.ca();
        sealed
            .virtseal(&["provider", "trust", name, "--ca", text(&ca)?, "--yes"])?
            .succeeded()?;
        self.identify(sealed, name, sealed_key)
    }

    /// Gives the provider a new client certificate.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn identify(&self, sealed: &SealedHost, name: &str, sealed_key: bool) -> Result<()> {
        let (pem, key) = self.client("kvm-host")?;
        let passphrase = sealed.passphrase_file()?;
        let mut identity = vec!["provider", "identity", name];
        identity.extend(["--cert", text(&pem)?, "--key", text(&key)?]);
        if sealed_key {
            identity.extend(["--encrypt", "--passphrase-file", text(&passphrase)?]);
        }
        sealed.virtseal(&identity)?.succeeded().map(drop)
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.dir.path()
    }
}
