//! What the examples have in common: how they end. Nothing here is about shared memory.
#![allow(dead_code, reason = "each example uses its own part")]
#![allow(clippy::print_stderr, reason = "the examples are programs for a terminal")]

use std::error::Error;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Whatever goes wrong in an example is told to the person in front of it, so one type for all errors will do.
pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What `main` returns: success, or 1 after an error, told in one line with its causes.
pub(crate) fn exit(result: Result) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some errors tell their cause themselves.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// Ctrl-C, or a polite `kill`. Made before there is anything to tidy up, so that neither ends the program untidily.
pub(crate) struct Interrupt {
    ctrl_c: Signal,
    terminate: Signal,
}

impl Interrupt {
    pub(crate) fn new() -> std::io::Result<Self> {
        let ctrl_c = signal(SignalKind::interrupt())?;
        Ok(Self { ctrl_c, terminate: signal(SignalKind::terminate())? })
    }

    pub(crate) async fn wait(&mut self) {
        tokio::select! {
            _ = self.ctrl_c.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
