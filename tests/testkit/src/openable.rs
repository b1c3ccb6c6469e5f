//! Whether objects open with the keys that they should, asked of QEMU's tools and not of virtseal.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{Host, KeptEnvelope, RootKey};

/// Where a passphrase lies for QEMU's tools, in the namespace.
const PASSPHRASE: &str = "/run/openable-passphrase";
/// `qemu-img check` and `qemu-io` of a plain command line.
const SECRET: &str = "secret,id=key,file=/run/openable-passphrase";

impl RootKey {
    /// Opens the object of `envelope`, where it has a file, with the DEK in it: the image is sound, and its first and last
    /// sectors can be read.
    ///
    /// # Errors
    /// The first thing that is not so, or the file is missing.
    pub fn open_object(&self, host: &Host, envelope: &KeptEnvelope) -> Result<()> {
        let dek = self.dek(envelope)?;
        if envelope.location.is_empty() {
            return Ok(());
        }
        fs::write(host.path(PASSPHRASE), hex::encode(dek))?;
        let image = &envelope.location;
        let options = match envelope.kind.as_str() {
            "disk" => format!("driver=qcow2,encrypt.key-secret=key,file.filename={image}"),
            _ => format!("driver=luks,key-secret=key,file.filename={image}"),
        };
        let what = || format!("{} {image} with envelope {}", envelope.kind, envelope.id);
        if envelope.kind == "disk" {
            host.run(&["qemu-img", "check", "--object", SECRET, "--image-opts", &options])?
                .succeeded()
                .with_context(what)?;
        }
        read(host, &options, "read 0 512").with_context(what)?;
        fs::remove_file(host.path(PASSPHRASE))?;
        Ok(())
    }

    /// Whether the `length` bytes from the start of the disk of `envelope` are all `byte`.
    ///
    /// # Errors
    /// They are not, or it does not open.
    pub fn expect_pattern(&self, host: &Host, envelope: &KeptEnvelope, byte: u8, length: u64) -> Result<()> {
        fs::write(host.path(PASSPHRASE), hex::encode(self.dek(envelope)?))?;
        let image = &envelope.location;
        let options = format!("driver=qcow2,encrypt.key-secret=key,file.filename={image}");
        read(host, &options, &format!("read -P {byte} 0 {length}"))
    }
}

fn read(host: &Host, options: &str, command: &str) -> Result<()> {
    let arguments = [
        "qemu-io",
        "-r",
        "--object",
        SECRET,
        "--image-opts",
        options,
        "-c",
        command,
    ];
    let said = host.run(&arguments)?.succeeded()?;
    // Of a failed pattern it says so, and ends well.
    ensure!(
        said.contains(" bytes at offset ") && !said.contains("fail"),
        "{said}"
    );
    Ok(())
}

/// The names in `directory` that virtseal gives to files in the making.
///
/// # Errors
/// It can't be read.
pub fn temporaries(directory: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names = names.collect::<std::io::Result<Vec<_>>>()?;
    Ok(names
        .into_iter()
        .filter(|name| name.starts_with(".virtseal-"))
        .collect())
}
