//! Convert a checkpoint to NF4 with double quantization: `cargo run --example convert SRC DST`.

use prequant::{Bytes, Options, Progress, RecipeOptions, plan};

/// Prints each file once it is written.
struct Files;

impl Progress for Files {
    fn found(&self, files: usize, of: usize) {
        println!("verifying {files} of {of} files from an earlier run");
    }

    fn resumed(&self, files: usize, _: u64) {
        println!("{files} verified, skipping");
    }

    fn advanced(&self, _: &str, _: u64) {}

    fn sealed(&self, file: &str, len: u64) {
        println!("wrote {file} ({})", Bytes(len));
    }

    fn kept(&self, files: usize) {
        println!("{files} finished files are kept for the next run");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, destination] = &arguments[..] else { return Err("usage: convert SRC DST".into()) };
    let recipe = RecipeOptions { double_quant: Some(true), ..RecipeOptions::default() }.build()?;
    let conversion = plan(source, recipe, Options { memory: Some(1 << 30), ..Options::default() })?;
    let manifest = conversion.execute(destination, &Files)?;
    println!("{:.2} bits per weight", manifest.summary.bits_per_weight);
    Ok(())
}
