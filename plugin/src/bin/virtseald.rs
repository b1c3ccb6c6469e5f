//! The daemon of virtseal: hands VMs their keys when libvirt starts them.

use std::process::ExitCode;

#[global_allocator]
static HEAP: virtseal::WipingHeap = virtseal::WipingHeap;

fn main() -> ExitCode {
    virtseal::daemon()
}
