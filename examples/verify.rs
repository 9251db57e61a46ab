//! Check a converted checkpoint, and compare it with its source if that is given: `cargo run --example verify DST [SRC]`.

use prequant::{Options, VerifyOptions, verify, verify_against};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: verify DST [SRC]")?;
    let report = match arguments.next() {
        Some(source) => verify_against(folder, source, Options::default(), VerifyOptions::default())?,
        None => verify(folder, VerifyOptions::default())?,
    };
    for difference in &report.differences {
        println!("{}: {}", difference.file, difference.what);
    }
    println!("{} files, {} differences", report.files, report.differences.len());
    Ok(())
}
