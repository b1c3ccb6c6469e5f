//! The small UEFI guest: how its image comes about, and the commands it obeys. `host/guest-init` is the other side.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::console::Console;
use crate::domain::console_socket;
use crate::host::Host;
use crate::programs::script;

/// From `virsh start` to the guest's READY. Under emulation it takes 15 s on an idle machine.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(120);
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// The raw image of the guest, built on first use and kept in `target/e2e-cache`. Copy it; don't write to it.
///
/// # Errors
/// The kernel was not unpacked (`make deps` does that) or a tool is missing.
pub fn guest_image() -> Result<PathBuf> {
    let output = Command::new(script("build-guest-image"))
        .output()
        .context("build-guest-image did not start")?;
    ensure!(
        output.status.success(),
        "no guest image: {}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// A guest on the other end of a VM's serial console.
pub struct Guest {
    console: Console,
}

impl Guest {
    /// Connects to the console of the started VM `name`.
    ///
    /// # Errors
    /// QEMU does not serve it.
    pub fn attach(host: &Host, name: &str) -> Result<Self> {
        let console = Console::connect(&host.path(console_socket(name)))?;
        Ok(Self { console })
    }

    /// Waits until the guest, started just before [`Guest::attach`], obeys commands.
    ///
    /// # Errors
    /// It did not get there within `limit`; the message holds the console's last lines.
    pub fn wait_for_boot(&mut self, limit: Duration) -> Result<()> {
        self.console
            .expect("READY\r\n", limit)
            .context("the guest did not boot")?;
        Ok(())
    }

    /// Checks that a guest that has booted before still answers, for instance after a restore.
    ///
    /// # Errors
    /// It does not.
    pub fn ping(&mut self) -> Result<()> {
        self.console.send("")?;
        self.wait_for_boot(COMMAND_DEADLINE)
    }

    /// Puts `marker` on the disk, flushed.
    ///
    /// # Errors
    /// The guest could not.
    pub fn write_disk(&mut self, marker: &str) -> Result<()> {
        self.command("write-disk", marker).map(drop)
    }

    /// The marker on the disk.
    ///
    /// # Errors
    /// The guest could not read it.
    pub fn read_disk(&mut self) -> Result<String> {
        self.command("read-disk", "")
    }

    /// Puts `marker` into an NV index of the TPM.
    ///
    /// # Errors
    /// The guest could not, for instance because the VM has no TPM.
    pub fn write_tpm(&mut self, marker: &str) -> Result<()> {
        self.command("nv-write", marker).map(drop)
    }

    /// The marker in the TPM's NV index.
    ///
    /// # Errors
    /// There is none.
    pub fn read_tpm(&mut self) -> Result<String> {
        self.command("nv-read", "")
    }

    /// Puts `marker` into a UEFI variable.
    ///
    /// # Errors
    /// The guest could not.
    pub fn write_variable(&mut self, marker: &str) -> Result<()> {
        self.command("efivar-write", marker).map(drop)
    }

    /// The marker in the UEFI variable.
    ///
    /// # Errors
    /// There is none.
    pub fn read_variable(&mut self) -> Result<String> {
        self.command("efivar-read", "")
    }

    /// SHA-256, in hex, of the first `length` bytes of the disk, as the guest sees them.
    ///
    /// # Errors
    /// The guest could not read them.
    pub fn checksum(&mut self, length: u64) -> Result<String> {
        self.command("checksum", &length.to_string())
    }

    /// Switches the VM off. libvirt needs a moment to notice.
    ///
    /// # Errors
    /// The guest did not obey.
    pub fn power_off(&mut self) -> Result<()> {
        self.command("poweroff", "").map(drop)
    }

    /// Reboots and waits until the guest is up again.
    ///
    /// # Errors
    /// It did not come back within `limit`.
    pub fn reboot(&mut self, limit: Duration) -> Result<()> {
        self.command("reboot", "")?;
        self.wait_for_boot(limit)
    }

    /// Sends any command of `host/guest-init` and returns the value of its answer.
    ///
    /// # Errors
    /// The guest's own reason, or it did not answer.
    pub fn command(&mut self, command: &str, argument: &str) -> Result<String> {
        self.console.send(format!("{command} {argument}").trim_end())?;
        loop {
            let line = self
                .console
                .line(COMMAND_DEADLINE)
                .with_context(|| format!("the guest does not answer {command}"))?;
            match parse_answer(command, &line) {
                Some(Ok(value)) => return Ok(value),
                Some(Err(reason)) => bail!("the guest could not {command}: {reason}"),
                // The kernel may write to the console, too.
                None => {}
            }
        }
    }

    /// The console itself, for what has no command.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }
}

/// The value or reason in the guest's answer to `command`; None for a line that is no answer to it.
fn parse_answer(command: &str, line: &str) -> Option<Result<String>> {
    let (verdict, rest) = line.split_once(' ')?;
    let text = rest
        .strip_prefix(command)
        .filter(|text| text.is_empty() || text.starts_with(' '))?
        .trim()
        .to_owned();
    match verdict {
        "OK" => Some(Ok(text)),
        "ERR" => Some(Err(anyhow!(text))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_belong_to_their_command() {
        assert_eq!(parse_answer("nv-read", "OK nv-read M1").unwrap().unwrap(), "M1");
        assert_eq!(parse_answer("poweroff", "OK poweroff").unwrap().unwrap(), "");
        assert_eq!(
            parse_answer("nv-read", "ERR nv-read no TPM")
                .unwrap()
                .unwrap_err()
                .to_string(),
            "no TPM"
        );
        assert!(parse_answer("nv-read", "OK nv-reads M1").is_none());
        assert!(parse_answer("nv-read", "[ 1.0] kernel: OK").is_none());
    }
}
