//! Show how each tensor of a checkpoint would be converted; nothing is written: `cargo run --example plan SRC`.

use prequant::{Bytes, Options, RecipeOptions, plan};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = std::env::args().nth(1).ok_or("usage: plan SRC")?;
    let recipe = RecipeOptions { format: Some("int4".parse()?), ..RecipeOptions::default() }.build()?;
    let conversion = plan(source, recipe, Options::default())?;
    for tensor in &conversion.plan.tensors {
        let decision = if tensor.quantized_from().is_some() { "quantize" } else { "keep" };
        println!("{decision:8} {} {:?}: {}", tensor.name, tensor.shape, tensor.reason);
    }
    println!("{} of weights", Bytes(conversion.plan.output_len()));
    Ok(())
}
