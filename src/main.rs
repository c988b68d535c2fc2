//! The `pgstrata` program.

fn main() -> std::process::ExitCode {
    pgstrata::cli::main()
}
