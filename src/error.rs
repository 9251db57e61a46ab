//! What can go wrong, typed; every message names the thing, what was found, what was expected and the way out.

use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

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
    },
    /// A tensor chosen for quantization is not bf16, f16 or f32.
    #[error(
        "{}: tensor \"{tensor}\" is {dtype}: only BF16, F16 and F32 can be quantized; \
         start from a bf16 checkpoint, or copy it as it is with --exclude",
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
    /// The source is quantized already.
    #[error("{}: already quantized with {method} ({evidence}); start from the bf16 checkpoint it was made from{hint}", path.display())]
    AlreadyQuantized {
        /// The file that says so.
        path: PathBuf,
        /// The method's name.
        method: String,
        /// What in the file gave it away.
        evidence: String,
        /// What else can be done, if anything.
        hint: &'static str,
    },
    /// The source is a converted checkpoint that can't be laid out anew.
    #[error("{}: {why}", path.display())]
    Relayout {
        /// Its folder.
        path: PathBuf,
        /// What is in the way, and what to do.
        why: String,
    },
    /// A tensor chosen for quantization holds a NaN or an infinity.
    #[error(
        "{}: tensor \"{tensor}\" holds {count} values that are not finite, the first ({value}) at element {index}: \
         4-bit blocks can't hold them; the checkpoint is damaged or its training diverged. \
         Download it again, copy the tensor as it is with --exclude, or write what bitsandbytes would with \
         --nonfinite keep",
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
    /// `--include` or `--exclude` can't be what was meant.
    #[error("{flag} {pattern:?}: {why}")]
    Pattern {
        /// The option.
        flag: &'static str,
        /// Its value.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
    /// Experts can't be fused.
    #[error("{}: tensor \"{tensor}\": {why}", path.display())]
    Experts {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What was found, what was expected, and what to do.
        why: String,
    },
    /// An option that the format doesn't have, or that another one excludes.
    #[error("{option} {why}")]
    Options {
        /// The option by its name in a recipe, with its value if that is at fault.
        option: &'static str,
        /// Why, and what to do.
        why: String,
    },
    /// No tensor is left to quantize.
    #[error("{}: nothing to quantize: {why}", path.display())]
    NothingToQuantize {
        /// The source.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
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
    },
    /// `--memory` is less than the least that the plan needs.
    #[error("--memory {available}: at least {needed} are needed for this checkpoint{hint}")]
    Memory {
        /// The budget, for people.
        available: String,
        /// The least, for people.
        needed: String,
        /// What takes it, and what would take less.
        hint: &'static str,
    },
    /// `--device-memory` is less than the least that the plan needs.
    #[error("--device-memory {available}: at least {needed} are needed for this checkpoint")]
    DeviceMemory {
        /// The bound, for people.
        available: String,
        /// The least, for people.
        needed: String,
    },
    /// A device that was asked for can't be used.
    #[error("--device {device}: {why}; --device cpu gives the same bytes without a GPU")]
    NoDevice {
        /// What was asked for.
        device: String,
        /// What is missing, and what would help.
        why: Cause,
    },
    /// A device failed at its work.
    #[error("{device}: {fault}; run the same command again to go on with the file it was at, or with --device cpu")]
    Device {
        /// The device.
        device: String,
        /// What failed: a call into its driver, say, and the driver's words.
        fault: Cause,
    },
    /// The staging folder holds the beginning of another conversion.
    #[error(
        "{}: an unfinished conversion of something else: {what}; run the command it was begun with, or discard it with \
         --restart",
        path.display()
    )]
    JobChanged {
        /// The staging folder.
        path: PathBuf,
        /// What is otherwise.
        what: String,
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
    /// The process's exit code: 2 wrong usage, 3 bad input, 4 I/O or device failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Pattern { .. } | Error::Options { .. } | Error::AmbiguousSkipEntry { .. } => 2,
            Error::Memory { .. } | Error::DeviceMemory { .. } => 2,
            Error::NoSpace { .. } | Error::Io { .. } | Error::Stopped | Error::Interrupted => 4,
            Error::NoDevice { .. } | Error::Device { .. } | Error::Internal { .. } => 4,
            _ => 3,
        }
    }

    /// A short name of the kind of failure, for machines.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::SourceMissing { .. } => "source_missing",
            Error::NotACheckpoint { .. } => "not_a_checkpoint",
            Error::Malformed { .. } => "malformed",
            Error::UnsupportedDtype { .. } => "unsupported_dtype",
            Error::AlreadyQuantized { .. } => "already_quantized",
            Error::Relayout { .. } => "relay",
            Error::NonFinite { .. } => "non_finite",
            Error::Pattern { .. } => "pattern",
            Error::Experts { .. } => "experts",
            Error::Options { .. } => "options",
            Error::NothingToQuantize { .. } => "nothing_to_quantize",
            Error::AmbiguousSkipEntry { .. } => "skip_entry_clash",
            Error::Destination { .. } => "destination",
            Error::Memory { .. } => "memory",
            Error::DeviceMemory { .. } => "device_memory",
            Error::NoDevice { .. } => "no_device",
            Error::Device { .. } => "device",
            Error::NoSpace { .. } => "no_space",
            Error::SourceChanged { .. } => "source_changed",
            Error::Io { .. } => "io",
            Error::JobChanged { .. } => "job_changed",
            Error::Internal { .. } => "internal",
            Error::Interrupted => "interrupted",
            Error::Stopped => "stopped",
        }
    }

    pub(crate) fn malformed(path: &Path, why: impl Into<String>) -> Error {
        Error::Malformed { path: path.to_owned(), why: why.into() }
    }

    pub(crate) fn internal(what: impl Into<String>) -> Error {
        Error::Internal { what: what.into() }
    }

    pub(crate) fn destination(path: &Path, why: impl Into<String>) -> Error {
        Error::Destination { path: path.to_owned(), why: why.into() }
    }
}

/// Adds the path and the deed to an I/O error.
pub(crate) trait IoContext<T> {
    fn at(self, path: &Path, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn at(self, path: &Path, action: &'static str) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.to_owned(), action, source: source.into() })
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room and run the same command again",
        io::ErrorKind::PermissionDenied => "; check who owns it",
        _ => "",
    }
}
