//! `--debug`: writes the messages of the user half, of aya, and of the kernel half to the standard error.

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        eprintln!("tcpclose: {}: {}: {}", record.level(), record.target(), record.args());
    }

    fn flush(&self) {}
}

/// Shows messages from now on.
pub fn to_stderr() {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
}
