//! Hashing files and the tensors in them, on several threads.
//!
//! Threads take files, the largest first, and hash a file and its tensors in one pass where that is soonest done
//! ([`balance`]). Threads for which no file is left take tensors of the files that others are hashing, near the place where
//! those are, so that a byte is read once ([`shared_file`]); or read for them, where hashing a file's tensors with it is free.

mod active_file;
mod balance;
mod lane;
mod shared_file;
mod whole_file;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::kernel::sha256::{FREE, second_stream_cost};
use crate::ops::verify::Options;
use crate::ops::verify::jobs::{Contents, Job, Opened};
use crate::store::Sha256Hash;
use crate::threads;
use active_file::ActiveFile;
use lane::Lane;
use shared_file::{NEAR, SharedFile};

/// How often a thread that waits looks whether it should stop.
const LOOK: Duration = Duration::from_millis(5);

/// How often the store is told what will be read.
const TELL_EVERY: Duration = Duration::from_millis(5);

/// Hashes files and their tensors, and tells `contents` which differ.
///
/// # Errors
/// The first of any thread; interrupts are one.
pub(super) fn hash_all<'a>(jobs: &'a mut [Job<'a>], contents: &'a dyn Contents, options: Options<'a>) -> Result<()> {
    jobs.sort_by_key(|job| std::cmp::Reverse(job.len));
    let chunks: u64 = jobs.iter().map(|job| 1 + job.len / shared_file::CHUNK).sum();
    let threads = options.threads.clamp(1, usize::try_from(chunks).unwrap_or(usize::MAX).max(1));
    let hashing = Hashing {
        lens: jobs.iter().map(|job| job.len).collect(),
        jobs,
        contents,
        options,
        threads,
        second_stream: second_stream_cost(),
        state: Mutex::default(),
        changed: Condvar::new(),
        idle: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
    };
    // Without a thread that tells the store, reading waits for it at times.
    thread::scope(|scope| {
        let _stop = StopAtEnd(&hashing);
        let _ = thread::Builder::new().spawn_scoped(scope, || hashing.tell_store());
        threads::share(threads, || hashing.work());
    });
    hashing.state().error.take().map_or(Ok(()), Err)
}

/// What the threads share.
struct Hashing<'a> {
    /// The largest first.
    jobs: &'a [Job<'a>],
    /// The jobs' sizes.
    lens: Vec<u64>,
    contents: &'a dyn Contents,
    options: Options<'a>,
    threads: usize,
    /// What a tensor's byte adds to hashing its file's.
    second_stream: f64,
    state: Mutex<State<'a>>,
    /// A file's front moved on, or it was finished.
    changed: Condvar,
    /// Threads that wait for that, or read ahead for others.
    idle: AtomicUsize,
    /// There was an error, or all is done.
    stopped: AtomicBool,
}

#[derive(Default)]
struct State<'a> {
    /// Jobs that a thread has begun: the first ones.
    begun: usize,
    /// Files that are being hashed, or opened for it.
    fronts: usize,
    /// Files with tensors that aren't begun, or whose front isn't at the end.
    active: Vec<Arc<ActiveFile<'a>>>,
    error: Option<Error>,
}

impl<'a> Hashing<'a> {
    /// What a thread does.
    fn work(&self) {
        loop {
            match self.take() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    // Before others are told to stop, which is an error of theirs.
                    self.state().error.get_or_insert(error);
                    self.stopped.store(true, Ordering::Relaxed);
                    self.changed.notify_all();
                    return;
                }
            }
        }
    }

    /// Takes something to do and does it; `false` if nothing will be left.
    fn take(&self) -> Result<bool> {
        self.check_going()?;
        let mut state = self.state();
        if let Some(job) = self.jobs.get(state.begun) {
            state.begun += 1;
            state.fronts += 1;
            drop(state);
            let front = Front(self);
            self.hash_job(job)?;
            drop(front);
            return self.contents.hashed(job).map(|()| true);
        }
        // Where hashing a file's tensors with it is free, reading for it is of more use.
        if let Some(lane) = (self.second_stream >= FREE).then(|| state.next_lane()).flatten() {
            drop(state);
            self.hash_tensors(lane)?;
            return Ok(true);
        }
        if state.fronts == 0 {
            return Ok(false);
        }
        self.idle.fetch_add(1, Ordering::Relaxed);
        let read = self.read_ahead(state);
        self.idle.fetch_sub(1, Ordering::Relaxed);
        read.map(|()| true)
    }

    /// Reads for other threads, or waits if they have all that they need.
    fn read_ahead(&self, state: MutexGuard<'_, State<'a>>) -> Result<()> {
        let active = state.active.clone();
        drop(state);
        let mut has_read = false;
        for file in &active {
            has_read |= file.file.read_ahead()?;
        }
        if !has_read {
            drop(self.changed.wait_timeout(self.state(), LOOK));
        }
        Ok(())
    }

    /// A file's front is at this chunk now. Those who wait for it are told now and then: waking one costs some 20 microseconds.
    fn advanced(&self, front: u64) {
        if front.is_multiple_of(NEAR / 2) && self.idle.load(Ordering::Relaxed) > 0 {
            self.changed.notify_all();
        }
    }

    /// Opens a file and hashes it; what tensors are left then are for everyone.
    fn hash_job(&self, job: &'a Job<'a>) -> Result<()> {
        if let Some(Opened { bytes, tensors }) = self.contents.open(job)? {
            let file = SharedFile::new(bytes, self.contents.path(job), job.len);
            let file = Arc::new(ActiveFile::new(job, file, tensors));
            self.state().active.push(file.clone());
            self.hash_file(&file)?;
            file.file.finish();
            self.state().forget_finished();
        }
        Ok(())
    }

    /// Tensors for a lane beside another, unless a thread waits for some.
    fn second_lane(&self) -> Option<Lane<'a>> {
        if self.idle.load(Ordering::Relaxed) == 0 { self.state().next_lane() } else { None }
    }

    /// # Errors
    /// When threads should stop.
    fn check_going(&self) -> Result<()> {
        match (self.options.interrupt.load(Ordering::Relaxed), self.stopped.load(Ordering::Relaxed)) {
            (true, _) => Err(Error::Interrupted),
            (_, true) => Err(Error::Stopped),
            _ => Ok(()),
        }
    }

    fn compare(&self, job: &Job<'_>, tensor: Option<&str>, found: Sha256Hash, expected: Sha256Hash) {
        if found != expected {
            self.contents.differ(job.name, tensor, format!("its SHA-256 is {found}, expected {expected}"));
        }
    }

    /// Tells the store what will be read, until all is done. It may block for as long as reading takes.
    fn tell_store(&self) {
        while !self.stopped.load(Ordering::Relaxed) {
            let active = self.state().active.clone();
            active.iter().for_each(|file| file.file.tell_store());
            thread::park_timeout(TELL_EVERY);
        }
    }

    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops all threads when it goes, in a panic too.
struct StopAtEnd<'h, 'a>(&'h Hashing<'a>);

impl Drop for StopAtEnd<'_, '_> {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Relaxed);
        self.0.changed.notify_all();
    }
}

/// A job whose file's front isn't at the end.
struct Front<'h, 'a>(&'h Hashing<'a>);

impl Drop for Front<'_, '_> {
    fn drop(&mut self) {
        self.0.state().fronts -= 1;
        self.0.changed.notify_all();
    }
}

impl<'a> State<'a> {
    fn forget_finished(&mut self) {
        self.active.retain(|file| file.rest() > 0 || file.file.rest() > 0);
    }

    /// Tensors that no thread has begun: of the file that has the most of them.
    fn next_lane(&mut self) -> Option<Lane<'a>> {
        self.forget_finished();
        let mut files: Vec<_> = self.active.iter().collect();
        files.sort_by_key(|file| std::cmp::Reverse(file.rest()));
        files.into_iter().find_map(|file| Some(Lane::new(file.clone(), file.begin_run()?)))
    }
}
