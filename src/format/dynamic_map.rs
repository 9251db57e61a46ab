//! The 8-bit dynamic map that absmax is quantized with (Dettmers, "8-Bit Approximations for Parallelism in Deep
//! Learning"): bitsandbytes' `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`.

use std::sync::LazyLock;

/// The 256 values, ascending, with what finds the nearest one fast.
pub struct DynamicMap {
    values: [f32; 256],
    midpoints: [f32; 255],
    /// For the top bits of a key that orders f32 as integers, the first code that can be the answer.
    first_code: Vec<u8>,
}

/// Bits of the ordered key that index [`DynamicMap::first_code`]: sign, exponent and four of the mantissa.
const INDEX_BITS: u32 = 13;

/// The map, made once.
pub fn dynamic_map() -> &'static DynamicMap {
    static MAP: LazyLock<DynamicMap> = LazyLock::new(DynamicMap::new);
    &MAP
}

impl DynamicMap {
    fn new() -> Self {
        let values = values();
        let midpoints: [f32; 255] = std::array::from_fn(|i| (values[i] + values[i + 1]) * 0.5);
        let first_code = (0..1u32 << INDEX_BITS)
            .map(|top| midpoints.partition_point(|&m| ordered_key(m) < top << (32 - INDEX_BITS)) as u8)
            .collect();
        DynamicMap { values, midpoints, first_code }
    }

    /// The values by code: `nested_quant_map` in the file.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// What lies halfway between neighbouring values.
    pub fn midpoints(&self) -> &[f32; 255] {
        &self.midpoints
    }

    /// The code of the entry nearest to `x`; halfway between two, the lower one.
    pub fn nearest(&self, x: f32) -> u8 {
        let mut code = self.first_code[(ordered_key(x) >> (32 - INDEX_BITS)) as usize];
        while code < 255 && x > self.midpoints[usize::from(code)] {
            code += 1;
        }
        code
    }
}

/// An integer that orders as the f32 does (NaN aside).
fn ordered_key(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// For each exponent 10^(e - 6), 2^e means between neighbours of an even grid over [0.1, 1]; their negatives; 0 and 1.
fn values() -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for (exponent, scale) in POWERS_OF_TEN.into_iter().enumerate() {
        let steps = 1usize << exponent;
        for i in 0..steps {
            let mean = (grid_point(i, steps) + grid_point(i + 1, steps)) / 2.0;
            values.extend([scale * mean, -scale * mean]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// `10 ** (e - 6)` as torch has it when it multiplies an f32 tensor: rounded to f32.
const POWERS_OF_TEN: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// `torch.linspace(0.1, 1, steps + 1)[i]`, which walks in from both ends.
fn grid_point(i: usize, steps: usize) -> f32 {
    let (start, end) = (0.1f32, 1.0f32);
    let step = (end - start) / steps as f32;
    if i < steps.div_ceil(2) { step.mul_add(i as f32, start) } else { (-step).mul_add((steps - i) as f32, end) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_what_a_plain_search_finds() {
        let map = dynamic_map();
        let plain = |x: f32| map.midpoints.iter().filter(|&&m| x > m).count() as u8;
        let near = |x: f32| [x.next_down(), x, x.next_up()];
        let edges = map.values.iter().chain(&map.midpoints).flat_map(|&x| near(x));
        let grid = (-2000..=2000).map(|i| i as f32 / 1999.0);
        let extremes = [0.0, -0.0, 1e-45, -1e-45, 1e-30, f32::MAX, f32::MIN, f32::INFINITY];
        for x in edges.chain(grid).chain(extremes) {
            assert_eq!(map.nearest(x), plain(x), "{x:e}");
        }
    }

    #[test]
    fn values_ascend_from_the_smallest_to_one() {
        let values = dynamic_map().values();
        assert!(values.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((values[127], values[255]), (0.0, 1.0));
    }
}
