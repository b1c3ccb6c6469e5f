//! The command line of virtseal.

use std::process::ExitCode;

use clap::Parser;
use virtseal::cli::{Cli, problem_document};
use virtseal::secret::heap::WipingHeap;
use virtseal::terminal::{visible, visible_json};

#[global_allocator]
static HEAP: WipingHeap = WipingHeap;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let as_json = cli.prints_json();
    match cli.run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            match as_json {
                true => eprintln!("{}", visible_json(&problem_document(&problem))),
                false => eprintln!("virtseal: {}", visible(&problem.to_string())),
            }
            ExitCode::from(problem.code as u8)
        }
    }
}
