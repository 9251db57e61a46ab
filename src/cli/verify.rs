//! `prequant verify`.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use prequant::{
    Bytes, DeviceChoice, DifferenceClass, Error, Options, Report, VerifyOptions, verify, verify_against,
    verify_against_merge,
};
use serde_json::json;

use super::output::{self, Outcome};
use super::streams::tell;
use super::trace::Tracing;
use super::words::{count, rate};
use super::{device, escape, hints, interrupt, left_out};

/// Verify a converted checkpoint.
///
/// Checks the size and SHA-256 of every file, that none is there that the checkpoint didn't have and clients could load, every
/// tensor's header entry and SHA-256, the index, config.json, and that manifest and SHA256SUMS agree. What differs in a file that
/// no client loads, such as README.md, is printed and no error, unless --strict is given. With --against SRC it converts SRC again without writing, and compares every byte: proof that
/// the checkpoint was made from that source with the recorded options.
#[derive(Args)]
pub struct Arguments {
    /// Folder of the converted checkpoint
    #[arg(value_name = "DST")]
    folder: PathBuf,

    /// With --against, folder of the adapter that was merged into SRC
    #[arg(value_name = "ADAPTER", requires = "against")]
    adapter: Option<PathBuf>,

    /// Convert this source again and compare every byte; if an adapter was merged, give it too: --against BASE ADAPTER
    #[arg(long, value_name = "SRC", conflicts_with = "quick")]
    against: Option<PathBuf>,

    /// Check sizes and headers only
    #[arg(long)]
    quick: bool,

    /// Exit with 1 for files too that no client loads, such as an edited README.md
    #[arg(long)]
    strict: bool,

    /// Number of threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,

    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto, requires = "against",
        help = format!("Device to quantize on with --against: {}", DeviceChoice::choices()))]
    device: DeviceChoice,

    /// With --against, take what links beside SRC's weights lead to, wherever that is
    #[arg(long, requires = "against")]
    follow_links: bool,

    /// Write a timeline of what each thread does with --against to FILE, for ui.perfetto.dev
    #[arg(long, value_name = "FILE", requires = "against")]
    trace: Option<PathBuf>,

    /// Print a single JSON object on standard output
    #[arg(long)]
    json: bool,

    /// Print differences and errors only
    #[arg(long, short)]
    quiet: bool,
}

/// Differences that are printed; all of them are counted, and --json has them all.
const SHOWN: usize = 20;

/// Runs the command: exit code 1 if something differs.
pub fn run(arguments: &Arguments) -> ExitCode {
    let start = Instant::now();
    let result = check(arguments).map(|report| {
        let output = match (arguments.json, arguments.quiet && report.differences.is_empty()) {
            (true, _) => format!("{}\n", json(&report, arguments.strict)),
            (false, true) => String::new(),
            (false, false) => text(arguments, &report, start.elapsed().as_secs_f64()),
        };
        Outcome { output, error: None, code: u8::from(!report.is_ok(arguments.strict)) }
    });
    output::finish(result, arguments.json)
}

fn check(arguments: &Arguments) -> Result<Report, Error> {
    let convert = Options::default();
    let threads = arguments.threads.map_or(convert.threads, std::num::NonZeroUsize::get);
    let progress = progress(arguments);
    let options = VerifyOptions {
        quick: arguments.quick,
        threads,
        interrupt: interrupt::flag(),
        hashed: &|bytes| progress.inc(bytes),
        planned: &|conversion| {
            if !arguments.quiet && !arguments.json && conversion.plan.recipe.quantizes() {
                progress.suspend(|| tell(device::line(&conversion.device)));
            }
        },
    };
    let report = match &arguments.against {
        Some(source) => {
            let apart: Vec<&Path> =
                [source, &arguments.folder].into_iter().chain(&arguments.adapter).map(|path| &**path).collect();
            let tracing = Tracing::start(arguments.trace.as_deref(), &apart)?;
            let convert = Options {
                threads,
                device: arguments.device.clone().into(),
                follow_links: arguments.follow_links,
                trace: tracing.trace(),
                ..convert
            };
            match &arguments.adapter {
                Some(adapter) => verify_against_merge(&arguments.folder, source, adapter, convert, options),
                None => verify_against(&arguments.folder, source, convert, options),
            }
        }
        None => verify(&arguments.folder, options),
    };
    progress.finish_and_clear();
    report
}

/// Bytes and rate, on a terminal.
fn progress(arguments: &Arguments) -> ProgressBar {
    if arguments.quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {decimal_bytes}, {decimal_bytes_per_sec}, {elapsed}") {
        bar.set_style(style);
    }
    bar
}

fn text(arguments: &Arguments, report: &Report, seconds: f64) -> String {
    let mut lines: Vec<String> = Vec::new();
    for difference in report.differences.iter().take(SHOWN) {
        let tensor = difference.tensor.as_ref().map(|tensor| format!("tensor \"{tensor}\": ")).unwrap_or_default();
        let edited = if difference.class == DifferenceClass::Edited { " (edited: no client loads it)" } else { "" };
        lines.push(escape::line(&format!("{}: {tensor}{}{edited}", difference.file, difference.what)).into_owned());
    }
    let differences = report.differences.len();
    if differences > SHOWN {
        lines.push(format!("... and {} more", differences - SHOWN));
    }
    lines.extend(report.written_by.as_ref().map(|version| {
        let this = env!("CARGO_PKG_VERSION");
        format!("written by {version}: compared tensor by tensor with what this version ({this}) makes of the source")
    }));
    lines.extend(left_out::lines(&report.left_out, SHOWN));
    lines.extend(report.warnings.iter().map(|warning| format!("warning: {}", hints::shown_warning(warning))));
    let folder = arguments.folder.display();
    let bytes = match (&arguments.against, arguments.quick) {
        (_, true) => "sizes and headers".to_owned(),
        (Some(_), _) => format!("{} compared with the source", Bytes(report.bytes)),
        (None, _) => format!("{} verified", Bytes(report.bytes)),
    };
    let edited = match report.count(DifferenceClass::Edited) {
        0 => String::new(),
        edited => format!("; {} in files that no client loads", count(edited, "difference")),
    };
    lines.push(match report.is_ok(arguments.strict) {
        true => format!(
            "{folder}: OK: {}, {}, {bytes} in {seconds:.2} s{}{edited}",
            count(report.files, "file"),
            count(report.tensors, "tensor"),
            rate(report.bytes, seconds)
        ),
        false => format!("{folder}: {}", count(differences, "difference")),
    });
    lines.join("\n") + "\n"
}

fn json(report: &Report, strict: bool) -> serde_json::Value {
    let mut value = json!(report);
    value["warnings"] = report.warnings.iter().map(hints::warning).collect();
    value["ok"] = report.is_ok(strict).into();
    value
}
