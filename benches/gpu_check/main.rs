//! What only a real GPU can tell: scripts/gpu-check runs this.
//!
//! Bytes and sums of figures against the CPU's on fresh random data; kernels by events against the device's own copy; and, for
//! every recipe, a conversion from the page cache: its files against the CPU's, its time against the CPU's, and the device memory it
//! takes. Exits with 1 if bytes differ or memory is exceeded, or (but for --report-only) if a speed is below its bar.

mod bytes;
mod checkpoint;
#[path = "../../tests/support/codings.rs"]
mod codings;
mod conversion;
mod groups;
mod speed;

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use prequant::Bytes;
use prequant::internal::backend::DeviceChoice;

#[derive(Parser)]
struct Arguments {
    /// The GPU's number
    #[arg(long, default_value_t = 0)]
    gpu: usize,

    /// Random data for each format
    #[arg(long, default_value = "8GiB")]
    size: Bytes,

    /// Weights that kernels are timed on
    #[arg(long, default_value = "1GiB")]
    kernel_size: Bytes,

    /// The checkpoint that is converted
    #[arg(long, default_value = "8GiB")]
    checkpoint_size: Bytes,

    /// Where the checkpoint is made; it should stay in the page cache
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,

    /// Conversions that are timed, on each of GPU and CPU
    #[arg(long, default_value_t = 5)]
    runs: usize,

    /// Convert the checkpoint in --folder once, by this recipe, and do nothing else
    #[arg(long, hide = true, requires = "device")]
    one: Option<String>,

    /// On what
    #[arg(long, hide = true)]
    device: Option<DeviceChoice>,

    /// Don't fail when a speed is below its bar
    #[arg(long)]
    report_only: bool,

    /// Also write the report to a file
    #[arg(long)]
    out: Option<PathBuf>,

    /// cargo bench passes this
    #[arg(long, hide = true)]
    bench: bool,
}

/// The report in the making, and whether all is as it should be.
struct Report {
    text: String,
    ok: bool,
}

impl Report {
    fn line(&mut self, line: &str) {
        println!("{line}");
        let _ = writeln!(self.text, "{line}");
    }

    /// A line that may not be so.
    fn check(&mut self, holds: bool, line: &str) {
        self.ok &= holds;
        self.line(&format!("{line}{}", if holds { "" } else { "   <-- NOT AS IT SHOULD BE" }));
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.bench {
        println!("scripts/gpu-check runs this");
        return ExitCode::SUCCESS;
    }
    if let (Some(recipe), Some(device)) = (&arguments.one, &arguments.device) {
        let done = conversion::one(&arguments.folder, recipe, device.clone());
        return done.map_or_else(|why| failed(&why.to_string()), |()| ExitCode::SUCCESS);
    }
    let mut report = Report { text: String::new(), ok: true };
    if let Err(why) = check(&arguments, &mut report) {
        return failed(&why.to_string());
    }
    if let Some(path) = &arguments.out
        && let Err(error) = std::fs::write(path, &report.text)
    {
        return failed(&format!("{}: {error}", path.display()));
    }
    ExitCode::from(u8::from(!report.ok))
}

fn failed(why: &str) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::from(4)
}

fn check(arguments: &Arguments, report: &mut Report) -> Result<(), Box<dyn std::error::Error>> {
    let gpu = format!("cuda:{}", arguments.gpu);
    let backend = gpu.parse::<DeviceChoice>()?.open()?;
    let driver = backend.driver().unwrap_or_default();
    report.line(&format!("{}, {driver}, prequant {}", backend.name(), env!("CARGO_PKG_VERSION")));
    // "NVRM version: NVIDIA UNIX ... 535.104.05 ..."
    if let Some(line) =
        std::fs::read_to_string("/proc/driver/nvidia/version").ok().as_deref().and_then(|t| t.lines().next())
    {
        report.line(line);
    }
    bytes::check(&*backend, arguments.size.0, report)?;
    let link = speed::check(arguments.gpu, arguments.kernel_size.0 as usize, arguments.report_only, report)?;
    conversion::check(&backend, arguments, link, report)
}
