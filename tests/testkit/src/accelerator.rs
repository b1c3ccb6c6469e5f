//! KVM or emulation, decided by really booting something: `/dev/kvm` may be there and be useless.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::domain::Firmware;
use crate::guest::guest_image;

/// With working KVM the guest is up after 3 s.
const PROBE_DEADLINE: Duration = Duration::from_secs(12);

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The kernel's KVM.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accelerator {
    /// Boots the test guest with KVM if there is a `/dev/kvm`, once per machine start; the answer is kept in the cache.
    /// `VIRTSEAL_E2E_ACCELERATOR=kvm|tcg` overrides it.
    pub fn of_this_machine() -> Self {
        static ANSWER: OnceLock<Accelerator> = OnceLock::new();
        *ANSWER.get_or_init(|| match std::env::var("VIRTSEAL_E2E_ACCELERATOR").as_deref() {
            Ok("kvm") => Self::Kvm,
            Ok("tcg") => Self::Tcg,
            // A probe that can't run is no proof of KVM.
            _ => probe_once_per_boot().unwrap_or(Self::Tcg),
        })
    }

    /// The `type` of the domain element.
    pub fn domain_type(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "qemu",
        }
    }
}

fn probe_once_per_boot() -> Result<Accelerator> {
    if !fs::exists("/dev/kvm")? {
        return Ok(Accelerator::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let image = guest_image()?;
    let cached = image.with_file_name("kvm-works");
    let answer = |works| format!("{} {}\n", boot.trim(), if works { "yes" } else { "no" });
    let known = fs::read_to_string(&cached).unwrap_or_default();
    let works = match known {
        _ if known == answer(true) => true,
        _ if known == answer(false) => false,
        _ => guest_boots_with_kvm(&image)?,
    };
    fs::write(&cached, answer(works))?;
    Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
}

fn guest_boots_with_kvm(image: &Path) -> Result<bool> {
    let directory = tempfile::tempdir()?;
    let console = directory.path().join("console");
    let firmware = Firmware::default();
    let variables = directory.path().join("vars.fd");
    fs::copy(&firmware.variables, &variables).context("OVMF is missing (package ovmf)")?;
    let qemu = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "q35,accel=kvm",
            "-cpu",
            "max",
            "-m",
            "256",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args([
            "-drive",
            &format!(
                "if=pflash,format=raw,readonly=on,file={}",
                firmware.code.display()
            ),
        ])
        .args([
            "-drive",
            &format!("if=pflash,format=raw,file={}", variables.display()),
        ])
        .args([
            "-drive",
            &format!("if=none,id=d,format=raw,snapshot=on,file={}", image.display()),
        ])
        .args(["-device", "virtio-blk-pci,drive=d,bootindex=1"])
        .args(["-serial", &format!("file:{}", console.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("qemu-system-x86_64 did not start (package qemu-system-x86)")?;
    let mut qemu = KilledOnDrop(qemu);
    let deadline = Instant::now() + PROBE_DEADLINE;
    while Instant::now() < deadline {
        if fs::read(&console).is_ok_and(|text| String::from_utf8_lossy(&text).contains("READY")) {
            return Ok(true);
        }
        if qemu.0.try_wait()?.is_some() {
            return Ok(false);
        }
        sleep(Duration::from_millis(100));
    }
    Ok(false)
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
