//! What a conversion must give, recomputed plainly: whole tensors at once, sums in f64.

use std::collections::BTreeMap;

use prequant::internal::format::{NESTED_BLOCK_SIZE, Scales, dynamic_map};
use prequant::internal::kernel::block::{nested, scalar};
use prequant::internal::kernel::{BlockErrors, Blocks, Kernel};
use prequant::internal::layout::{QuantState, quant_state_bytes};
use prequant::{FloatDtype, Recipe, Statistics};
use safetensors::tensor::Dtype;

use super::{Stored, Tensor};

/// A quantized weight.
pub struct Recomputed {
    /// What is written, by what follows the weight's name.
    pub outputs: BTreeMap<String, Stored>,
    /// What the conversion loses.
    pub loss: Loss,
}

/// Sums over the elements and blocks of one tensor or of several.
#[derive(Clone, Debug, Default)]
pub struct Loss {
    squares: f64,
    squared_errors: f64,
    worst: f64,
    absmax: Vec<f64>,
    zero_blocks: u64,
    /// With double quantization, absmax as clients restore them.
    restored: Vec<f64>,
}

pub fn float_dtype(dtype: Dtype) -> FloatDtype {
    match dtype {
        Dtype::BF16 => FloatDtype::Bfloat16,
        Dtype::F16 => FloatDtype::Float16,
        Dtype::F32 => FloatDtype::Float32,
        other => panic!("{other:?} isn't quantized"),
    }
}

/// Quantizes a whole tensor with the scalar kernel.
pub fn recompute(tensor: &Tensor, recipe: &Recipe) -> Recomputed {
    let (codec, dtype) = (recipe.codec(), float_dtype(tensor.dtype));
    let Scales::Blocks { codebook, size, double_quant, .. } = codec.scales else { panic!("blocks") };
    let elements = tensor.data.len() / dtype.size();
    let blocks = elements.div_ceil(size.get());
    let mut packed = vec![0; elements.div_ceil(2)];
    let [mut absmax, mut signal, mut noise, mut worst] = std::array::from_fn(|_| vec![0f32; blocks]);
    let figures = BlockErrors { absmax: &mut absmax, signal: &mut signal, noise: &mut noise, worst: &mut worst };
    let source = &tensor.data;
    let blocks = Blocks { source, dtype, block_size: size, codebook, packed: &mut packed, figures };
    Kernel::SCALAR.quantize(blocks).unwrap();
    let mut loss = Loss::of(tensor, recipe, &packed, &absmax);

    let mut outputs = BTreeMap::new();
    outputs.insert(String::new(), (Dtype::U8, vec![packed.len(), 1], packed));
    outputs.insert(".quant_map".to_owned(), floats(&codebook.values()));
    let mut nested_offset = 0.0;
    if double_quant {
        nested_offset = (absmax.iter().copied().map(f64::from).sum::<f64>() / absmax.len() as f64) as f32;
        let (mut codes, mut scales) = (vec![0; absmax.len()], vec![0f32; absmax.len().div_ceil(NESTED_BLOCK_SIZE)]);
        nested::quantize(&absmax, nested_offset, dynamic_map(), &mut codes, &mut scales);
        let restored = codes.iter().enumerate().map(|(i, &code)| {
            let value = dynamic_map().values()[usize::from(code)] * scales[i / NESTED_BLOCK_SIZE] + nested_offset;
            f64::from(value)
        });
        loss.restored = restored.collect();
        outputs.insert(".absmax".to_owned(), bytes(codes));
        outputs.insert(".nested_absmax".to_owned(), floats(&scales));
        outputs.insert(".nested_quant_map".to_owned(), floats(dynamic_map().values()));
    } else {
        outputs.insert(".absmax".to_owned(), floats(&absmax));
    }
    let shape: Vec<u64> = tensor.shape.iter().map(|&d| d as u64).collect();
    let state = quant_state_bytes(&QuantState { codec: &codec, dtype, shape: &shape, nested_offset });
    outputs.insert(format!(".quant_state.bitsandbytes__{}", codec.format.name), bytes(state));
    Recomputed { outputs, loss }
}

fn floats(values: &[f32]) -> Stored {
    (Dtype::F32, vec![values.len()], values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn bytes(bytes: Vec<u8>) -> Stored {
    (Dtype::U8, vec![bytes.len()], bytes)
}

impl Loss {
    fn of(tensor: &Tensor, recipe: &Recipe, packed: &[u8], absmax: &[f32]) -> Loss {
        let Scales::Blocks { codebook, size, .. } = recipe.codec().scales else { panic!("{recipe:?}") };
        let (dtype, block_size, values) = (float_dtype(tensor.dtype), size.get(), codebook.values());
        let source: Vec<f64> =
            tensor.data.chunks(dtype.size()).map(|bytes| f64::from(scalar::decode(bytes, dtype))).collect();
        let mut loss = Loss { absmax: absmax.iter().copied().map(f64::from).collect(), ..Loss::default() };
        for (i, x) in source.iter().enumerate() {
            let code = if i % 2 == 0 { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
            let error = x - f64::from(values[usize::from(code)]) * loss.absmax[i / block_size];
            loss.squares += x * x;
            loss.squared_errors += error * error;
            loss.worst = loss.worst.max(error.abs());
        }
        loss.zero_blocks = source.chunks(block_size).filter(|block| block.iter().all(|&x| x == 0.0)).count() as u64;
        loss
    }

    pub fn add(&mut self, other: &Loss) {
        self.squares += other.squares;
        self.squared_errors += other.squared_errors;
        self.worst = self.worst.max(other.worst);
        self.absmax.extend(&other.absmax);
        self.zero_blocks += other.zero_blocks;
        self.restored.extend(&other.restored);
    }

    /// Insists that `statistics` say this, to six digits.
    #[track_caller]
    pub fn assert_is(&self, statistics: &Statistics, of: &str) {
        let close = |what: &str, ours: f64, plain: f64| {
            let same = ours == plain || (ours / plain - 1.0).abs() < 1e-6;
            assert!(same, "{of}: {what} is {ours:e}, plainly {plain:e}");
        };
        let count = self.absmax.len();
        assert_eq!((statistics.blocks, statistics.zero_blocks), (count as u64, self.zero_blocks), "{of}: blocks");
        let error = self.squared_errors / self.squares;
        close("relative squared error", statistics.relative_squared_error, error);
        close("SNR", statistics.snr_db.unwrap(), -10.0 * error.log10());
        close("largest error", statistics.max_absolute_error, self.worst);
        close("mean of absmax", statistics.absmax.mean, self.absmax.iter().sum::<f64>() / count as f64);
        let (least, most) = self.absmax.iter().fold((f64::MAX, 0f64), |(least, most), &x| (least.min(x), most.max(x)));
        assert_eq!((f64::from(statistics.absmax.min), f64::from(statistics.absmax.max)), (least, most), "{of}: absmax");

        assert_eq!(statistics.double_quantization.is_some(), !self.restored.is_empty(), "{of}");
        if let Some(nested) = &statistics.double_quantization {
            let errors = || self.absmax.iter().zip(&self.restored).map(|(x, y)| x - y);
            let squares: f64 = self.absmax.iter().map(|x| x * x).sum();
            let error = errors().map(|e| e * e).sum::<f64>() / squares;
            close("error of absmax", nested.relative_squared_error, error);
            close(
                "largest error of absmax",
                nested.max_absolute_error,
                errors().fold(0.0, |most, e| most.max(e.abs())),
            );
        }
    }
}
