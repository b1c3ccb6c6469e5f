//! The stage for stories against a real libvirt, QEMU, OVMF and swtpm, on a machine that needs no systemd.
//!
//! A [`Host`] is a libvirtd in its own mount and pid namespace: it touches nothing of the machine's own libvirt,
//! several of them run side by side, and when it is dropped (or the test is killed) all it started is gone. A
//! [`DomainSpec`] describes a VM of it, [`guest_image`] builds the small UEFI guest that VMs boot, and a [`Guest`] talks to
//! that guest over its serial console:
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use virtseal_testkit::{BOOT_DEADLINE, DomainSpec, Guest, Host};
//!
//! let host = Host::start()?;
//! let disk = host.guest_disk("web01")?;
//! host.define(&DomainSpec::bootable("web01", &disk))?;
//! host.virsh(&["start", "web01"])?.succeeded()?;
//! let mut guest = Guest::attach(&host, "web01")?;
//! guest.wait_for_boot(BOOT_DEADLINE)?;
//! guest.write_disk("marker")?;
//! # Ok(())
//! # }
//! ```
//!
//! virtseald goes on the same stage: write its configuration under `host.path("/etc/virtseal")`, then
//! `host.spawn("virtseald", …)` with [`built_program`]; the hook goes in by [`HostBuilder::hook`], the command line
//! tool runs through [`Host::run`]. All of them see the same mounts and pids, the test reads their files through
//! [`Host::path`].
//!
//! Everything here needs root and the packages that `make deps` installs; a program that is missing is an error
//! that names its package.

mod accelerator;
mod attacker;
mod console;
mod contract;
mod deadline;
mod domain;
mod durable;
mod guest;
mod hanging;
mod host;
mod keys;
pub mod mutate;
mod namespace;
mod observed;
mod openable;
pub mod pages;
mod process;
mod programs;
pub mod rig;
mod sealed;
mod search;
pub mod servers;
pub mod terminal;
mod tpm;
mod tracer;
mod virsh;

pub use accelerator::Accelerator;
pub use attacker::Attacker;
pub use console::Console;
pub use deadline::wait_until;
pub use domain::{DomainSpec, Firmware};
pub use durable::{expect_durable, expect_order};
pub use guest::{BOOT_DEADLINE, Guest, guest_image};
pub use hanging::{HangingStorage, Hangs};
pub use host::{Host, HostBuilder};
pub use keys::{
    KeptEnvelope, RootKey, edit_keystore, kept_envelopes, kept_pivots, kept_sealed_vms, newest_root, pin_log,
    sealed_root,
};
pub use namespace::Namespace;
pub use observed::{Strace, core_image};
pub use openable::temporaries;
pub use process::Process;
pub use programs::{built_program, require_programs};
pub use sealed::{Readiness, SealedHost, Way, codes, edited, expect_names};
pub use search::{Needles, Place};
pub use tpm::{HostTpm, KernelKey, Swtpm};
pub use tracer::{Step, Trace, Tracer};
pub use virsh::{DomainState, Output};
