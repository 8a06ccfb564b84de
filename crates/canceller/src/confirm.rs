//! Asking before many jobs are cancelled that nobody has named.

use std::io::{BufRead, IsTerminal, Write};

use console::Failure;

/// Asks on the terminal; without one nobody can say yes.
pub fn many(count: usize) -> Result<(), Failure> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::usage(format!("{count} jobs are selected; without a terminal this needs --yes")));
    }
    let mut stderr = std::io::stderr().lock();
    let _ = write!(stderr, "Cancel {count} jobs? [y/N] ").and_then(|()| stderr.flush());
    drop(stderr);
    let mut answer = String::new();
    let read = stdin.lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes" | "Yes") {
        return Ok(());
    }
    Err(Failure::usage("nothing was cancelled"))
}
