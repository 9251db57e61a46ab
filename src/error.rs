//! What can go wrong, typed; every message names the thing, what was found and what was expected. The way out is a message's
//! last words where anyone can take it, and a [`Hint`] where it is a choice of the caller's.

mod hint;

use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

pub use hint::{Hint, Setting, Warning};

/// An error of what isn't this module's to know.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source path does not exist.
    #[error("{}: not found; give the folder of a downloaded checkpoint, or one .safetensors file", path.display())]
    SourceMissing {
        /// The path as given.
        path: PathBuf,
    },
    /// The source is there but is no checkpoint.
    #[error("{}: not a checkpoint: {why}", path.display())]
    NotACheckpoint {
        /// The path as given.
        path: PathBuf,
        /// What is missing, and what to do.
        why: String,
    },
    /// A safetensors file, an index or a config is not what it must be.
    #[error("{}: {why}", path.display())]
    Malformed {
        /// The file at fault.
        path: PathBuf,
        /// The field, what was found, what was expected, what to do.
        why: String,
        /// A choice that helps, if there is one.
        hint: Option<Hint>,
    },
    /// A tensor chosen for quantization is not bf16, f16 or f32.
    #[error(
        "{}: tensor \"{tensor}\" is {dtype}: only BF16, F16 and F32 can be quantized; start from a bf16 checkpoint",
        path.display()
    )]
    UnsupportedDtype {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// Codes don't fill whole elements of the dtype that they are to be stored as.
    #[error("{}: tensor \"{tensor}\": its codes are {len} bytes, which aren't whole elements of {storage}", path.display())]
    QuantStorage {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Bytes of its codes.
        len: u64,
        /// The dtype that was asked for.
        storage: &'static str,
    },
    /// The source is quantized already.
    #[error("{}: already quantized with {method} ({evidence}); start from the bf16 checkpoint it was made from, if there is one", path.display())]
    AlreadyQuantized {
        /// The file that says so.
        path: PathBuf,
        /// The method's name.
        method: String,
        /// What in the file gave it away.
        evidence: String,
        /// What else can be done, if anything.
        hint: Option<Hint>,
    },
    /// The source is a converted checkpoint whose experts can't be rewritten in the other layout.
    #[error("{}: {why}", path.display())]
    Relayout {
        /// Its folder.
        path: PathBuf,
        /// What is in the way.
        why: String,
        /// What to do about it, if a choice helps.
        hint: Option<Hint>,
    },
    /// A tensor chosen for quantization holds a NaN or an infinity.
    #[error(
        "{}: tensor \"{tensor}\" holds {count} values that are not finite, the first ({value}) at element {index}: \
         4-bit blocks can't hold them; the checkpoint is damaged or its training diverged; download it again",
        path.display()
    )]
    NonFinite {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The first such element's index in the flattened tensor.
        index: u64,
        /// What it is.
        value: f32,
        /// How many there are in the tensor.
        count: u64,
    },
    /// A pattern of the recipe can't be what was meant.
    #[error("{setting} pattern {pattern:?}: {why}")]
    Pattern {
        /// Which patterns it is one of.
        setting: Setting,
        /// The regular expression.
        pattern: String,
        /// What is wrong with it.
        why: String,
        /// What helps to find out.
        hint: Option<Hint>,
    },
    /// Experts can't be fused.
    #[error("{}: tensor \"{tensor}\": {why}", path.display())]
    Experts {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was found, and what was expected.
        why: String,
        /// What to do about it, if a choice helps.
        hint: Option<Hint>,
    },
    /// An adapter that can't be merged, or not into this base.
    #[error("{}: {why}", path.display())]
    Adapter {
        /// The file at fault.
        path: PathBuf,
        /// The tensor or the setting, what was found, what was expected, what to do.
        why: String,
    },
    /// An option that the format doesn't have, or that another one excludes.
    #[error("{setting}{} {why}", value.map(|value| format!(" {value}")).unwrap_or_default())]
    Options {
        /// The option.
        setting: Setting,
        /// Its value, if that is at fault.
        value: Option<&'static str>,
        /// What is wrong with it.
        why: String,
        /// What to do about it, if a choice helps.
        hint: Option<Hint>,
    },
    /// No tensor is left to quantize.
    #[error("{}: nothing to quantize: {why}", path.display())]
    NothingToQuantize {
        /// The source.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do about it.
        hint: Option<Hint>,
    },
    /// A module that is kept can't be told from one that is quantized.
    #[error(
        "module \"{kept}\" is kept, but clients would then leave \"{quantized}\" unquantized too, whose name ends alike; \
         keep both, or quantize both"
    )]
    AmbiguousSkipEntry {
        /// The module kept in its dtype.
        kept: String,
        /// The module quantized.
        quantized: String,
    },
    /// The destination is there already, or can't be one.
    #[error("{}: {why}", path.display())]
    Destination {
        /// The path as given.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
        /// A choice that helps, if there is one.
        hint: Option<Hint>,
    },
    /// The memory limit is less than the least that the plan needs.
    #[error("memory limit of {limit} bytes: this checkpoint needs at least {needed}")]
    Memory {
        /// The limit in bytes.
        limit: u64,
        /// The least in bytes.
        needed: u64,
        /// What would take less, if anything.
        hint: Option<Hint>,
    },
    /// The limit on each device's memory is less than the least that the plan needs.
    #[error("device memory limit of {limit} bytes: this checkpoint needs at least {needed}")]
    DeviceMemory {
        /// The limit in bytes.
        limit: u64,
        /// The least in bytes.
        needed: u64,
    },
    /// A device that was asked for can't be used.
    #[error("device {device}: {why}")]
    NoDevice {
        /// What was asked for.
        device: String,
        /// What is missing, and what would help.
        why: Cause,
    },
    /// A device failed at its work.
    #[error("{device}: {fault}")]
    Device {
        /// The device.
        device: String,
        /// What failed: a call into its driver, say, and the driver's words.
        fault: Cause,
    },
    /// The staging folder holds the beginning of another conversion.
    #[error("{}: an unfinished conversion of something else: {what}; finish that one first", path.display())]
    JobChanged {
        /// The staging folder.
        path: PathBuf,
        /// What is otherwise.
        what: String,
    },
    /// The destination holds a finished conversion, but not of the source as it is now, or not all of it.
    #[error("{}: {why}", path.display())]
    Outdated {
        /// The file that isn't what it was.
        path: PathBuf,
        /// What was found and what was expected.
        why: String,
    },
    /// The file system has no room for the output.
    #[error(
        "{}: no space: the output takes {needed} and {available} are free; make room, or choose another destination",
        path.display()
    )]
    NoSpace {
        /// The destination.
        path: PathBuf,
        /// The output's size, for people.
        needed: String,
        /// What is free, for people.
        available: String,
    },
    /// The source is not what it was when its header was read.
    #[error("{}: changed while it was read: {why}; run again once nothing writes to it", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        why: String,
    },
    /// The operating system refused.
    #[error("{}: can't {action}: {source}{}", path.display(), hint(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done, as a verb.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The system starts no further thread.
    #[error("can't start a thread: {source}; allow the user or the container more processes")]
    Threads {
        /// The system's error.
        source: io::Error,
    },
    /// The system gives no memory, whatever the limit that was set.
    #[error(
        "out of memory: the system gives no {len} bytes for {purpose}; allow the process more, or set a smaller memory limit"
    )]
    OutOfMemory {
        /// What it was wanted for.
        purpose: &'static str,
        /// Bytes.
        len: u64,
    },
    /// A defect of prequant: what can't be.
    #[error("{what}: this is a defect of prequant; please report it with the command that was run")]
    Internal {
        /// What was found, and where.
        what: String,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A worker stopped because another one failed.
    #[error("stopped")]
    Stopped,
}

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::SourceMissing { .. } => ErrorKind::SourceMissing,
            Error::NotACheckpoint { .. } => ErrorKind::NotACheckpoint,
            Error::Malformed { .. } => ErrorKind::Malformed,
            Error::UnsupportedDtype { .. } => ErrorKind::UnsupportedDtype,
            Error::QuantStorage { .. } => ErrorKind::QuantStorage,
            Error::AlreadyQuantized { .. } => ErrorKind::AlreadyQuantized,
            Error::Relayout { .. } => ErrorKind::Relayout,
            Error::NonFinite { .. } => ErrorKind::NonFinite,
            Error::Pattern { .. } => ErrorKind::Pattern,
            Error::Experts { .. } => ErrorKind::Experts,
            Error::Adapter { .. } => ErrorKind::Adapter,
            Error::Options { .. } => ErrorKind::Options,
            Error::NothingToQuantize { .. } => ErrorKind::NothingToQuantize,
            Error::AmbiguousSkipEntry { .. } => ErrorKind::AmbiguousSkipEntry,
            Error::Destination { .. } => ErrorKind::Destination,
            Error::Memory { .. } => ErrorKind::Memory,
            Error::DeviceMemory { .. } => ErrorKind::DeviceMemory,
            Error::NoDevice { .. } => ErrorKind::NoDevice,
            Error::Device { .. } => ErrorKind::Device,
            Error::Outdated { .. } => ErrorKind::Outdated,
            Error::NoSpace { .. } => ErrorKind::NoSpace,
            Error::SourceChanged { .. } => ErrorKind::SourceChanged,
            Error::Io { .. } => ErrorKind::Io,
            Error::JobChanged { .. } => ErrorKind::JobChanged,
            Error::Threads { .. } => ErrorKind::Io,
            Error::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Error::Internal { .. } => ErrorKind::Internal,
            Error::Interrupted => ErrorKind::Interrupted,
            Error::Stopped => ErrorKind::Stopped,
        }
    }

    /// Choices that would avoid it; any one of them does.
    pub fn hints(&self) -> Vec<Hint> {
        match self {
            Error::UnsupportedDtype { .. } | Error::QuantStorage { .. } => vec![Hint::Exclude],
            Error::NonFinite { .. } => vec![Hint::Exclude, Hint::KeepNonFinite],
            Error::Outdated { .. } => vec![Hint::Replace, Hint::Restart],
            Error::NoDevice { .. } => vec![Hint::UseCpu],
            Error::Device { .. } => vec![Hint::Resume, Hint::UseCpu],
            // What was finished before is of the source as it was.
            Error::JobChanged { .. } | Error::SourceChanged { .. } => vec![Hint::Restart],
            Error::AlreadyQuantized { hint, .. }
            | Error::Malformed { hint, .. }
            | Error::Relayout { hint, .. }
            | Error::Pattern { hint, .. }
            | Error::Experts { hint, .. }
            | Error::Options { hint, .. }
            | Error::NothingToQuantize { hint, .. }
            | Error::Destination { hint, .. }
            | Error::Memory { hint, .. } => hint.iter().copied().collect(),
            Error::SourceMissing { .. }
            | Error::NotACheckpoint { .. }
            | Error::Adapter { .. }
            | Error::AmbiguousSkipEntry { .. }
            | Error::DeviceMemory { .. }
            | Error::NoSpace { .. }
            | Error::Io { .. }
            | Error::Threads { .. }
            | Error::OutOfMemory { .. }
            | Error::Internal { .. }
            | Error::Interrupted
            | Error::Stopped => Vec::new(),
        }
    }

    pub(crate) fn malformed(path: &Path, why: impl Into<String>) -> Error {
        Error::Malformed { path: path.to_owned(), why: why.into(), hint: None }
    }

    pub(crate) fn internal(what: impl Into<String>) -> Error {
        Error::Internal { what: what.into() }
    }

    pub(crate) fn destination(path: &Path, why: impl Into<String>) -> Error {
        Error::Destination { path: path.to_owned(), why: why.into(), hint: None }
    }
}

/// The kinds of failure: one for each case of [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// See [`Error::SourceMissing`].
    SourceMissing,
    /// See [`Error::NotACheckpoint`].
    NotACheckpoint,
    /// See [`Error::Malformed`].
    Malformed,
    /// See [`Error::UnsupportedDtype`].
    UnsupportedDtype,
    /// See [`Error::QuantStorage`].
    QuantStorage,
    /// See [`Error::AlreadyQuantized`].
    AlreadyQuantized,
    /// See [`Error::Relayout`].
    Relayout,
    /// See [`Error::NonFinite`].
    NonFinite,
    /// See [`Error::Pattern`].
    Pattern,
    /// See [`Error::Experts`].
    Experts,
    /// See [`Error::Adapter`].
    Adapter,
    /// See [`Error::Options`].
    Options,
    /// See [`Error::NothingToQuantize`].
    NothingToQuantize,
    /// See [`Error::AmbiguousSkipEntry`].
    AmbiguousSkipEntry,
    /// See [`Error::Destination`].
    Destination,
    /// See [`Error::Memory`].
    Memory,
    /// See [`Error::DeviceMemory`].
    DeviceMemory,
    /// See [`Error::NoDevice`].
    NoDevice,
    /// See [`Error::Device`].
    Device,
    /// See [`Error::Outdated`].
    Outdated,
    /// See [`Error::NoSpace`].
    NoSpace,
    /// See [`Error::SourceChanged`].
    SourceChanged,
    /// See [`Error::Io`].
    Io,
    /// See [`Error::JobChanged`].
    JobChanged,
    /// See [`Error::OutOfMemory`].
    OutOfMemory,
    /// See [`Error::Internal`].
    Internal,
    /// See [`Error::Interrupted`].
    Interrupted,
    /// See [`Error::Stopped`].
    Stopped,
}

impl ErrorKind {
    /// Its name, for machines.
    pub fn name(self) -> &'static str {
        match self {
            ErrorKind::SourceMissing => "source_missing",
            ErrorKind::NotACheckpoint => "not_a_checkpoint",
            ErrorKind::Malformed => "malformed",
            ErrorKind::UnsupportedDtype => "unsupported_dtype",
            ErrorKind::QuantStorage => "quant_storage",
            ErrorKind::AlreadyQuantized => "already_quantized",
            ErrorKind::Relayout => "relayout",
            ErrorKind::NonFinite => "non_finite",
            ErrorKind::Pattern => "pattern",
            ErrorKind::Experts => "experts",
            ErrorKind::Adapter => "adapter",
            ErrorKind::Options => "options",
            ErrorKind::NothingToQuantize => "nothing_to_quantize",
            ErrorKind::AmbiguousSkipEntry => "ambiguous_skip_entry",
            ErrorKind::Destination => "destination",
            ErrorKind::Memory => "memory",
            ErrorKind::DeviceMemory => "device_memory",
            ErrorKind::NoDevice => "no_device",
            ErrorKind::Device => "device",
            ErrorKind::Outdated => "outdated",
            ErrorKind::NoSpace => "no_space",
            ErrorKind::SourceChanged => "source_changed",
            ErrorKind::Io => "io",
            ErrorKind::JobChanged => "job_changed",
            ErrorKind::OutOfMemory => "out_of_memory",
            ErrorKind::Internal => "internal",
            ErrorKind::Interrupted => "interrupted",
            ErrorKind::Stopped => "stopped",
        }
    }
}

/// Adds the path and the deed to an I/O error. What the system would do and we don't is an error of the input.
pub(crate) trait IoContext<T> {
    fn at(self, path: &Path, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn at(self, path: &Path, action: &'static str) -> Result<T> {
        self.map_err(|source| {
            let source = source.into();
            match source.get_ref() {
                Some(why) if why.is::<NotAFile>() || why.is::<TooLong>() => Error::malformed(path, why.to_string()),
                _ => Error::Io { path: path.to_owned(), action, source },
            }
        })
    }
}

/// Something that isn't opened: reading it might never end.
#[derive(Debug, thiserror::Error)]
#[error("not a regular file but a pipe, a device or a socket: expected a file of bytes")]
pub(crate) struct NotAFile;

/// A file that isn't read: it would take the memory of all its bytes.
#[derive(Debug, thiserror::Error)]
#[error("{len} bytes are too many: expected {most} at most; is it the right file?")]
pub(crate) struct TooLong {
    pub len: u64,
    pub most: u64,
}

macro_rules! into_io {
    ($($why:ty),*) => {$(
        impl From<$why> for io::Error {
            fn from(why: $why) -> io::Error {
                io::Error::new(io::ErrorKind::InvalidData, why)
            }
        }
    )*};
}

into_io!(NotAFile, TooLong);

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room and run the same command again",
        io::ErrorKind::PermissionDenied => "; check who owns it",
        io::ErrorKind::FileTooLarge => {
            "; allow larger files (ulimit -f), or choose smaller output files or another file system"
        }
        _ if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => {
            "; allow the process more open files (ulimit -n) and run the same command again"
        }
        _ => "",
    }
}
