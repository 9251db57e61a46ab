//! The checkpoint that is converted.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Bytes of bf16 in one shard, about.
const SHARD: u64 = 1 << 30;

/// Columns of an expert's matrices.
const COLUMNS: u64 = 1024;

/// Rows of one, if the checkpoint is large enough: 3 MB, as Qwen3-30B-A3B has them.
const ROWS: u64 = 1536;

const MATRICES: [&str; 3] = ["gate", "up", "down"];

/// Shards of about `len` bytes together, each of whole experts of one layer, of small random numbers.
pub fn write(folder: &Path, len: u64) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("config.json"), "{\"model_type\": \"qwen3_moe\"}\n")?;
    let rows = ROWS.min(len / (2 * COLUMNS * MATRICES.len() as u64)).max(1);
    let matrix = 2 * rows * COLUMNS;
    let experts = (len / (matrix * MATRICES.len() as u64)).max(1);
    let in_shard = (SHARD / (matrix * MATRICES.len() as u64)).max(1);
    let shards = experts.div_ceil(in_shard);
    let numbers = numbers(matrix as usize);
    for shard in 0..shards {
        let experts = in_shard.min(experts - shard * in_shard);
        let path = folder.join(format!("model-{:05}-of-{shards:05}.safetensors", shard + 1));
        let header = header(shard, experts, rows, matrix);
        let mut file = fs::File::create(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for _ in 0..experts * MATRICES.len() as u64 {
            file.write_all(&numbers)?;
        }
    }
    Ok(())
}

fn header(layer: u64, experts: u64, rows: u64, matrix: u64) -> String {
    let names = (0..experts).flat_map(|expert| MATRICES.map(move |name| (expert, name)));
    let entries = names.zip(0..).map(|((expert, name), i)| {
        let (start, end) = (i * matrix, (i + 1) * matrix);
        format!(
            "\"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight\":{{\"dtype\":\"BF16\",\
             \"shape\":[{rows},{COLUMNS}],\"data_offsets\":[{start},{end}]}}"
        )
    });
    format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
}

/// Numbers with exponents around that of 0.01.
fn numbers(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend((0x3c00 | (state >> 16 & 0x83ff) as u16).to_le_bytes());
    }
    bytes
}
