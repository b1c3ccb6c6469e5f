//! The command line of virtseal.

use std::process::ExitCode;

#[global_allocator]
static HEAP: virtseal::WipingHeap = virtseal::WipingHeap;

fn main() -> ExitCode {
    virtseal::command_line()
}
