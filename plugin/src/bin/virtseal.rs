//! The command line of virtseal.

use std::process::ExitCode;

use clap::Parser;
use virtseal::cli::Cli;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match Cli::parse().run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("virtseal: {failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}
