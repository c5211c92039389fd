//! The program: runs the command line and turns errors into messages and exit codes.

use std::process::ExitCode;

use rft_engine::EngineError;
use rft_kernels::HugePages;

#[global_allocator]
static ALLOCATOR: HugePages = HugePages;

fn main() -> ExitCode {
    match rft_engine::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(EngineError::Interrupted) => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
