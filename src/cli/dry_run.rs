//! `--dry-run`: every decision and its reason, and what the conversion would take.

use std::fmt::Write;
use std::path::Path;

use prequant::{Bytes, Conversion, Error, Plan, PlannedTensor};
use serde_json::{Value, json};

use super::output::{Audience, Outcome, error_json};
use super::summary::format_name;
use super::words::count;
use super::{device, escape, hints, left_out};

/// The plan, and the obstacle to it if there is one.
pub fn report(conversion: &Conversion, destination: &Path, audience: Audience) -> Outcome {
    let (free, obstacle) = match (conversion.disk_free(destination), conversion.check_destination(destination)) {
        (Ok(free), checked) => (free, checked.err()),
        (Err(error), _) => (None, Some(error)),
    };
    let output = match audience {
        Audience::People => text(conversion, destination, free),
        Audience::Machines => format!("{}\n", json(conversion, destination, free, obstacle.as_ref())),
        Audience::Nobody => String::new(),
    };
    Outcome { output, error: obstacle, code: 0 }
}

fn text(conversion: &Conversion, destination: &Path, free: Option<u64>) -> String {
    let mut text = decisions(conversion.decisions()) + &files(conversion);
    for line in totals(conversion, destination, free) {
        text += &line;
        text.push('\n');
    }
    text
}

/// A line for every tensor.
fn decisions(plan: &Plan) -> String {
    let mut text = String::new();
    let width = |of: fn(&PlannedTensor) -> usize| plan.tensors.iter().map(of).max().unwrap_or(0);
    let name_width = width(|tensor| tensor.name.len()).min(72);
    let format = plan.recipe.format().map_or("keep", |format| format.name);
    let decision_width = format.len().max("keep".len());
    let shape_width = width(|tensor| format!("{:?}", tensor.shape).len());
    for tensor in &plan.tensors {
        let decision = if tensor.is_quantized() { format } else { "keep" };
        let (shape, dtype) = (format!("{:?}", tensor.shape), tensor.dtype.to_string());
        let decoded = if tensor.is_decoded() { " (decoded)" } else { "" };
        let _ = writeln!(
            text,
            "{decision:decision_width$}  {:name_width$}  {dtype:4} {shape:shape_width$}  {}{decoded}",
            escape::line(&tensor.name),
            escape::line(&tensor.reason)
        );
    }
    text + "\n"
}

/// A line for every file beside the weights, and for what is left out.
fn files(conversion: &Conversion) -> String {
    let mut text = String::new();
    for (name, len) in conversion.copied_files() {
        let _ = writeln!(text, "copied: {} ({})", escape::line(name), Bytes(len));
    }
    for line in left_out::lines(&conversion.left_out(), usize::MAX) {
        let _ = writeln!(text, "{line}");
    }
    if text.is_empty() { text } else { text + "\n" }
}

/// Sizes, disk space and memory of the whole conversion.
fn totals(conversion: &Conversion, destination: &Path, free: Option<u64>) -> Vec<String> {
    let Conversion { plan, budget, .. } = conversion;
    let decisions = conversion.decisions();
    let quantized = decisions.quantized().count();
    let free = free.map_or("an unknown amount".to_owned(), |free| Bytes(free).to_string());
    let (all, merged) =
        (decisions.tensors.len(), decisions.tensors.iter().filter(|tensor| tensor.is_adapted()).count());
    let merged = if merged == 0 { String::new() } else { format!(", {merged} merged") };
    let mut lines = vec![match plan.recipe.quantizes() {
        true => {
            let format = format_name(&plan.recipe);
            format!("{} in {format}, {} kept{merged}", count(quantized, "tensor"), all - quantized)
        }
        false => format!("{}{merged}", count(all, "tensor")),
    }];
    let bits = match plan.recipe.quantizes() {
        true => format!(
            "; {:.2} bits per quantized weight, {:.2}",
            decisions.bits_per_quantized_weight(),
            decisions.bits_per_weight()
        ),
        false => format!("; {:.2} bits", decisions.bits_per_weight()),
    };
    lines.extend(
        conversion
            .relaid_from()
            .map(|_| "experts are rewritten in the other layout; nothing is quantized again".to_owned()),
    );
    lines.extend(warnings(conversion).iter().map(|warning| format!("warning: {warning}")));
    lines.extend(decisions.in_doubt().iter().map(|(pattern, tensors, bytes)| {
        format!("in doubt: {} of {}, which --include '{pattern}' quantizes", count(*tensors, "tensor"), Bytes(*bytes))
    }));
    let decoded = decisions.tensors.iter().filter(|tensor| tensor.is_decoded()).count();
    if decoded > 0 {
        lines.push(format!("{} quantized in the source, decoded while reading", count(decoded, "tensor")));
    }
    let (weight_files, side_files) = conversion.source_files();
    lines.extend([
        format!("source:  {} of tensors in {}", Bytes(conversion.stored_len()), count(weight_files, "file")),
        format!(
            "output:  {} in {} and {}{bits} per weight overall",
            Bytes(plan.output_len()),
            count(plan.files.len(), "weight file"),
            count(side_files, "side file"),
        ),
        format!("disk:    {} needed, {free} free at {}", Bytes(conversion.disk_needed()), destination.display()),
        format!("memory:  at most {}, {}", Bytes(budget.peak), count(budget.threads, "thread")),
        format!("{:9}{}", "device:", device::line(&conversion.device).trim_start_matches("device: ")),
    ]);
    lines.extend(budget.lanes.map(|lanes| {
        let (gpus, each) = (lanes.devices.count, Bytes(lanes.len));
        let of_gpus = if gpus == 1 { String::new() } else { format!(" on each of {gpus}") };
        format!(
            "ring:    {} slots of {each}; {} of GPU memory at most{of_gpus}",
            lanes.count,
            Bytes(budget.device_peak())
        )
    }));
    lines.push("nothing was written".to_owned());
    lines
}

/// Those before a conversion, and the one at its end.
fn warnings(conversion: &Conversion) -> Vec<String> {
    let last = conversion.decisions().left_in_16_bits();
    conversion.plan.warnings.iter().chain(&last).map(hints::warning).collect()
}

fn json(conversion: &Conversion, destination: &Path, free: Option<u64>, obstacle: Option<&Error>) -> Value {
    let (plan, decisions) = (&conversion.plan, conversion.decisions());
    let tensor = |tensor: &PlannedTensor| {
        json!({
            "name": &*tensor.name,
            "dtype": tensor.dtype,
            "shape": &*tensor.shape,
            "role": tensor.role,
            "decision": if tensor.is_quantized() { "quantize" } else { "keep" },
            "reason": tensor.reason,
            "output_bytes": tensor.output_len(),
        })
    };
    let in_doubt: Vec<Value> = decisions
        .in_doubt()
        .iter()
        .map(|(pattern, tensors, bytes)| json!({"include": pattern, "tensors": tensors, "bytes": bytes}))
        .collect();
    let files: Vec<Value> = plan
        .files
        .iter()
        .map(|file| json!({"name": file.name, "size": file.len, "tensors": file.tensors.len()}))
        .collect();
    json!({
        "destination": destination.display().to_string(),
        "recipe": plan.recipe,
        "relaid_from": conversion.relaid_from(),
        "source_bytes": plan.source_len(),
        "output_bytes": plan.output_len(),
        "disk_needed": conversion.disk_needed(),
        "disk_free": free,
        "peak_memory": conversion.budget.peak,
        "threads": conversion.budget.threads,
        "device": conversion.device.backend.name(),
        "device_reason": conversion.device.why,
        "ring_slots": conversion.budget.lanes.map(|lanes| lanes.count),
        "peak_device_memory": conversion.budget.device_peak(),
        "bits_per_quantized_weight": decisions.bits_per_quantized_weight(),
        "bits_per_weight": decisions.bits_per_weight(),
        "files": files,
        "side_files": conversion.copied_files().map(|(name, size)| json!({"name": name, "size": size})).collect::<Vec<_>>(),
        "left_out": conversion.left_out(),
        "warnings": warnings(conversion),
        "in_doubt": in_doubt,
        "obstacle": obstacle.map(|error| error_json(error)["error"].clone()),
        "tensors": decisions.tensors.iter().map(tensor).collect::<Vec<_>>(),
    })
}
