//! The command line of virtseal.

use std::process::ExitCode;

use clap::Parser;
use virtseal::cli::Cli;
use virtseal::terminal::visible;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match Cli::parse().run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("virtseal: {}", visible(&failure.to_string()));
            ExitCode::from(failure.code as u8)
        }
    }
}
