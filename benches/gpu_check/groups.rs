//! Group formats: the GPU's bytes against the CPU's.

use prequant::backend::cuda::{GroupKernel, Slot};
use prequant::dtype::FloatDtype;
use prequant::format::Coding;
use prequant::kernel::group::{Groups, scalar};
use prequant::kernel::{BlockErrors, Kernel};

use super::codings;

/// The schemes' names, for people.
pub const SCHEMES: [&str; 5] = ["int4", "int4-asym", "nvfp4", "nvfp4 (ModelOpt)", "mxfp4"];

/// Columns of rows that are groups.
const ROWS: [usize; 6] = [33, 512, 1000, 4096, 14336, 151_937];

/// A scheme by its name, with what a plan would give it for these weights.
fn scheme(name: &str, source: &[u8], dtype: FloatDtype) -> Coding {
    let absmax = scalar::absmax(source, dtype).unwrap_or(1.0);
    match name {
        "int4" => codings::INT4,
        "int4-asym" => codings::INT4_ASYM,
        "nvfp4" => codings::nvfp4(scalar::global_scale(absmax, dtype)),
        "mxfp4" => codings::MXFP4,
        _ => codings::nvfp4_modelopt(scalar::scale_2(absmax)),
    }
}

/// Compares one piece of at most `elements` weights, laid out by its number; gives its length in bytes.
pub fn compare_piece(
    slot: &mut Slot,
    name: &str,
    number: u64,
    elements: usize,
    dtype: FloatDtype,
    weights: &mut impl FnMut(usize) -> Vec<u8>,
) -> Result<usize, String> {
    let number = number as usize;
    let (columns, group) = match name {
        "int4" | "int4-asym" if number.is_multiple_of(2) => {
            let columns = ROWS[number / 2 % ROWS.len()].min(elements);
            (columns, columns)
        }
        "int4" | "int4-asym" => (1280, [32, 64, 128, 160][number / 2 % 4]),
        "mxfp4" => (1280, 32),
        _ => (1280, 16),
    };
    let rows = (elements / columns).max(1);
    let source = weights(rows * columns);
    slot.source(source.len()).copy_from_slice(&source);
    let compared = compare(slot, &source, dtype, columns, group, scheme(name, &source, dtype));
    compared.map(|()| source.len()).map_err(|what| format!("{rows} rows of {columns}, groups of {group}: {what}"))
}

fn compare(
    slot: &mut Slot,
    source: &[u8],
    dtype: FloatDtype,
    columns: usize,
    group: usize,
    scheme: Coding,
) -> Result<(), String> {
    let coding = Coding { group, ..scheme };
    let elements = source.len() / dtype.size();
    let groups = elements / group;
    let mut packed = vec![0; elements / columns * scheme.packed_row(columns)];
    let mut scales = vec![0; groups * scheme.scale_size(dtype)];
    let mut zero_points = vec![0; if scheme.has_zero_points() { groups } else { 0 }];
    let [mut absmax, mut signal, mut noise, mut worst] = std::array::from_fn(|_| vec![0f32; groups]);
    let figures = BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
    let (packed_out, scales_out, points_out) = (&mut packed, &mut scales, &mut zero_points);
    Kernel::detect()
        .quantize_groups(Groups {
            source,
            dtype,
            columns,
            coding,
            packed: packed_out,
            scales: scales_out,
            zero_points: points_out,
            figures,
        })
        .map_err(|_| "not finite".to_owned())?;
    let kernel = GroupKernel::new(coding, columns).ok_or("no kernel")?;
    let found = slot.quantize_groups(kernel, elements, dtype, columns, coding).map_err(|fault| fault.to_string())?;
    let bytes = [
        ("packed", &packed, found.packed),
        ("scales", &scales, found.scales),
        ("zero_points", &zero_points, found.zero_points),
    ];
    for (name, expected, found) in bytes {
        if let Some(i) = (0..expected.len()).find(|&i| expected[i] != found[i]) {
            return Err(format!("{name} byte {i} is {:#04x}, and {:#04x} on the CPU", found[i], expected[i]));
        }
    }
    let figures = [
        ("absmax", &absmax, &*found.figures.absmax),
        ("signal", &signal, &*found.figures.signal),
        ("noise", &noise, &*found.figures.noise),
        ("worst", &worst, &*found.figures.worst),
    ];
    for (name, expected, found) in figures {
        let differs =
            |i: usize| expected[i].to_bits() != found[i].to_bits() && !(expected[i].is_nan() && found[i].is_nan());
        if let Some(i) = (0..groups).find(|&i| differs(i)) {
            return Err(format!("{name} of group {i} is {:e}, and {:e} on the CPU", found[i], expected[i]));
        }
    }
    Ok(())
}
