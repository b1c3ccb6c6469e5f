//! The domain XML of the stage's VMs: q35, UEFI with its variables in a file, one virtio disk, a serial console on a
//! unix socket, neither network nor graphics.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::accelerator::Accelerator;

/// Where OVMF lies on Debian.
#[derive(Clone, Debug)]
pub struct Firmware {
    /// The code, mapped read-only.
    pub code: PathBuf,
    /// The pristine variable store that each VM gets a copy of.
    pub variables: PathBuf,
}

impl Default for Firmware {
    fn default() -> Self {
        let directory = Path::new("/usr/share/OVMF");
        Self {
            code: directory.join("OVMF_CODE_4M.fd"),
            variables: directory.join("OVMF_VARS_4M.fd"),
        }
    }
}

/// A VM to be defined. Change the fields as a story needs it.
#[derive(Clone, Debug)]
pub struct DomainSpec {
    /// The VM's name.
    pub name: String,
    /// The VM's UUID.
    pub uuid: Uuid,
    /// Its only disk, as a path in the namespace.
    pub disk: PathBuf,
    /// The disk's format as libvirt names it: `raw`, `qcow2`.
    pub disk_format: &'static str,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Whether it has a TPM 2.0 (CRB, emulated by swtpm).
    pub tpm: bool,
    /// Its UEFI firmware.
    pub firmware: Firmware,
    /// XML put before `</domain>`, such as `<metadata>`.
    pub extra: String,
}

impl DomainSpec {
    /// A VM that boots the guest image on `disk` and has a TPM.
    pub fn bootable(name: &str, disk: &Path) -> Self {
        Self {
            name: name.to_owned(),
            uuid: Uuid::new_v4(),
            disk: disk.to_owned(),
            disk_format: "raw",
            memory_mib: 256,
            tpm: true,
            firmware: Firmware::default(),
            extra: String::new(),
        }
    }

    /// A VM for stories about starting, not about running: as small as QEMU takes it, without a TPM. Start it with
    /// `virsh start --paused`, which makes libvirt do all its work and the host none afterwards.
    pub fn minimal(name: &str, disk: &Path) -> Self {
        Self {
            memory_mib: 64,
            tpm: false,
            ..Self::bootable(name, disk)
        }
    }

    /// Where libvirt keeps this VM's UEFI variables.
    pub fn nvram(&self) -> PathBuf {
        PathBuf::from(format!("/var/lib/libvirt/qemu/nvram/{}_VARS.fd", self.name))
    }

    /// Where libvirt keeps this VM's TPM state.
    pub fn tpm_state(&self) -> PathBuf {
        PathBuf::from(format!(
            "/var/lib/libvirt/swtpm/{}/tpm2/tpm2-00.permall",
            self.uuid
        ))
    }

    /// The domain XML for this machine.
    pub fn xml(&self) -> String {
        self.xml_for(Accelerator::of_this_machine())
    }

    fn xml_for(&self, accelerator: Accelerator) -> String {
        let Self {
            name,
            uuid,
            disk_format,
            memory_mib,
            extra,
            ..
        } = self;
        let (disk, nvram) = (self.disk.display(), self.nvram());
        let (code, variables, nvram) = (
            self.firmware.code.display(),
            self.firmware.variables.display(),
            nvram.display(),
        );
        let (domain_type, console) = (accelerator.domain_type(), console_socket(name));
        let console = console.display();
        let tpm = if self.tpm {
            "\n    <tpm model='tpm-crb'>\n      <backend type='emulator' version='2.0'/>\n    </tpm>"
        } else {
            ""
        };
        format!(
            "\
<domain type='{domain_type}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='pflash'>{code}</loader>
    <nvram template='{variables}'>{nvram}</nvram>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{disk_format}'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='unix'>
      <source mode='bind' path='{console}'/>
      <log file='{console}.log' append='on'/>
    </serial>{tpm}
    <memballoon model='none'/>
  </devices>{extra}
</domain>
"
        )
    }
}

/// The unix socket of a VM's serial console, as a path in the namespace.
pub(crate) fn console_socket(name: &str) -> PathBuf {
    Path::new("/run/console").join(format!("{name}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xml_says_what_the_spec_says() {
        let spec = DomainSpec::bootable("web01", Path::new("/d.raw"));
        let xml = spec.xml_for(Accelerator::Tcg);
        assert!(xml.starts_with("<domain type='qemu'>"), "{xml}");
        for part in [
            "<name>web01</name>",
            "file='/d.raw'",
            "<tpm model='tpm-crb'>",
            "web01_VARS.fd",
        ] {
            assert!(xml.contains(part), "{part} is missing in {xml}");
        }
    }

    #[test]
    fn a_minimal_domain_has_no_tpm() {
        let xml = DomainSpec::minimal("m1", Path::new("/d.raw")).xml_for(Accelerator::Kvm);
        assert!(
            xml.starts_with("<domain type='kvm'>") && !xml.contains("<tpm"),
            "{xml}"
        );
    }
}
