//! SIGINT and SIGTERM: the first stops the work where it can be resumed, the second ends the process at once.

use std::io;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// How long the work may take to stop; a disk that doesn't answer must not keep the process.
const PATIENCE: Duration = Duration::from_millis(900);

static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Set once a signal has come.
pub fn flag() -> &'static AtomicBool {
    &INTERRUPTED
}

/// 128 and the signal's number, as shells have it, if one has come.
pub fn exit_code() -> Option<ExitCode> {
    let signal = SIGNAL.load(Ordering::Relaxed);
    (signal > 0).then(|| ExitCode::from(128 + signal as u8))
}

/// Starts to listen.
pub fn listen() -> io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag unset, the second one ends the process.
        flag::register_conditional_shutdown(signal, 128 + signal, INTERRUPTED.clone())?;
        flag::register_usize(signal, SIGNAL.clone(), signal as usize)?;
        flag::register(signal, INTERRUPTED.clone())?;
    }
    thread::Builder::new().name("interrupt".to_owned()).spawn(|| {
        while !INTERRUPTED.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
        thread::sleep(PATIENCE);
        eprintln!("error: interrupted; run the same command again to resume");
        std::process::exit(128 + SIGNAL.load(Ordering::Relaxed) as i32);
    })?;
    Ok(())
}
