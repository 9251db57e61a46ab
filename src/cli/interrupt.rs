//! SIGINT and SIGTERM: the first stops the work where it can be resumed, the second ends the process at once.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

/// How long the work may take to stop; a disk that doesn't answer must not keep the process.
const PATIENCE: Duration = Duration::from_millis(900);

/// How often to look for the second signal.
const LOOK: Duration = Duration::from_millis(5);

static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Set once a signal has come.
pub fn flag() -> &'static AtomicBool {
    &INTERRUPTED
}

/// 128 and the signal's number, as shells have it, if one has come.
pub fn exit_code() -> Option<u8> {
    let signal = SIGNAL.load(Ordering::Relaxed);
    (signal > 0).then_some(128 + signal as u8)
}

/// Starts to listen; `end` ends a process that doesn't stop by itself.
pub fn listen(end: impl FnOnce() + Send + 'static) -> io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        flag::register_usize(signal, SIGNAL.clone(), signal as usize)?;
        flag::register(signal, INTERRUPTED.clone())?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
        signals.forever().next();
        let first = Instant::now();
        while first.elapsed() < PATIENCE && signals.pending().next().is_none() {
            thread::sleep(LOOK);
        }
        end();
    })?;
    Ok(())
}
