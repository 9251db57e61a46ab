//! How each format codes groups, for kernels alone.
#![allow(dead_code, reason = "each test has use for some")]

use prequant::FloatDtype;
use prequant::internal::format::{Codebook, Coding, ElementCode, Highest, ScaleCode, TensorScale};

pub const INT4: Coding = Coding::new(ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat, 32);
pub const INT4_ASYM: Coding = Coding::new(ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat, 32);
pub const MXFP4: Coding = Coding::new(ElementCode::E2m1, ScaleCode::E8m0(Highest::Infinite), 32);
pub const MXFP4_GPT_OSS: Coding = Coding::new(ElementCode::E2m1, ScaleCode::E8m0(Highest::Finite), 32);

pub const fn nvfp4(global_scale: f32) -> Coding {
    let coding = Coding::new(ElementCode::E2m1, ScaleCode::E4m3, 16);
    Coding { tensor_scale: Some(TensorScale::Divisor(global_scale)), ..coding }
}

pub const fn nvfp4_modelopt(scale_2: f32) -> Coding {
    Coding { tensor_scale: Some(TensorScale::Factor(scale_2)), ..nvfp4(1.0) }
}

pub const fn blocks(codebook: &'static Codebook, size: usize) -> Coding {
    Coding::new(ElementCode::Codebook(codebook), ScaleCode::Float(FloatDtype::Float32), size)
}

pub const fn fp8(block: usize, scale: ScaleCode) -> Coding {
    Coding::new(ElementCode::E4m3, scale, block)
}

/// The scales that FP8 comes with.
pub const FP8_SCALES: [ScaleCode; 4] = [
    ScaleCode::Float(FloatDtype::Float32),
    ScaleCode::Float(FloatDtype::Bfloat16),
    ScaleCode::E8m0(Highest::Nan),
    ScaleCode::E8m0(Highest::Infinite),
];
