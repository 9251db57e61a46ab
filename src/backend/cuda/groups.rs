//! Which kernel of groups.cu quantizes what, and how it is launched.

use std::ffi::CString;
use std::sync::Arc;

use crate::backend::cuda::driver::{Context, Fault, Function, Module};
use crate::backend::cuda::{THREADS, dtype_name};
use crate::backend::row_len;
use crate::dtype::FloatDtype;
use crate::format::{Codec, Coding, ElementCode, ScaleCode, TensorScale};

/// The kernels for groups, made from groups.cu as [`super::PTX`] is from kernels.cu.
pub const GROUPS_PTX: &str = include_str!("groups.ptx");

/// Whole rows from this length on are a warp's work, not that of a team of four threads.
const LONG_ROW: usize = 512;

/// A kernel of groups.cu, in one of its three dtypes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKernel {
    /// Groups of a multiple of 32 elements.
    Int4,
    /// The same.
    Int4Asym,
    /// Groups of 16.
    Nvfp4,
    /// The same.
    Nvfp4ModelOpt,
    /// Groups of 32.
    Mxfp4,
    /// Groups that are rows of any length.
    Int4Rows,
    /// The same.
    Int4AsymRows,
}

impl GroupKernel {
    /// All, in the order that they are numbered in.
    pub const ALL: [GroupKernel; 7] = [
        GroupKernel::Int4,
        GroupKernel::Int4Asym,
        GroupKernel::Nvfp4,
        GroupKernel::Nvfp4ModelOpt,
        GroupKernel::Mxfp4,
        GroupKernel::Int4Rows,
        GroupKernel::Int4AsymRows,
    ];

    /// The kernel for rows of `columns` elements, if there is one: groups are 16 elements with E4M3 scales and 32 with powers of
    /// two; of integers a multiple of 32, or a row.
    pub fn new(coding: Coding, columns: usize) -> Option<GroupKernel> {
        let Coding { element, scale, group, tensor_scale } = coding;
        let in_teams = group.is_multiple_of(32);
        let in_rows = group == columns && (!in_teams || group >= LONG_ROW);
        match (element, scale) {
            (ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat) if in_rows => Some(GroupKernel::Int4Rows),
            (ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat) if in_rows => {
                Some(GroupKernel::Int4AsymRows)
            }
            (ElementCode::Int { zero_point: false }, ScaleCode::SourceFloat) if in_teams => Some(GroupKernel::Int4),
            (ElementCode::Int { zero_point: true }, ScaleCode::SourceFloat) if in_teams => Some(GroupKernel::Int4Asym),
            (ElementCode::E2m1, ScaleCode::E4m3) if group == 16 => match tensor_scale? {
                TensorScale::Divisor(_) => Some(GroupKernel::Nvfp4),
                TensorScale::Factor(_) => Some(GroupKernel::Nvfp4ModelOpt),
            },
            (ElementCode::E2m1, ScaleCode::E8m0(_)) if group == 32 => Some(GroupKernel::Mxfp4),
            _ => None,
        }
    }

    /// The kernel for a tensor's rows of `columns` elements, if there is one.
    pub(super) fn of(codec: &Codec, columns: u64) -> Option<GroupKernel> {
        GroupKernel::new(codec.coding(columns, None), row_len(codec, columns))
    }

    /// Its name for a dtype.
    pub fn name(self, dtype: FloatDtype) -> String {
        let name = match self {
            GroupKernel::Int4 => "int4",
            GroupKernel::Int4Asym => "int4_asym",
            GroupKernel::Nvfp4 => "nvfp4",
            GroupKernel::Nvfp4ModelOpt => "nvfp4_modelopt",
            GroupKernel::Mxfp4 => "mxfp4",
            GroupKernel::Int4Rows => "int4_rows",
            GroupKernel::Int4AsymRows => "int4_asym_rows",
        };
        format!("quantize_{name}_{}", dtype_name(dtype))
    }

    /// Threads for each group.
    fn team(self) -> u32 {
        match self {
            GroupKernel::Nvfp4 | GroupKernel::Nvfp4ModelOpt => 2,
            GroupKernel::Int4 | GroupKernel::Int4Asym | GroupKernel::Mxfp4 => 4,
            GroupKernel::Int4Rows | GroupKernel::Int4AsymRows => 32,
        }
    }

    /// Thread blocks to launch for so many groups, of [`THREADS`] threads.
    pub fn thread_blocks(self, groups: usize) -> u32 {
        groups.div_ceil((THREADS / self.team()) as usize) as u32
    }
}

/// The scale of a tensor's scales, as the kernels take it; any where there is none.
pub fn tensor_factor(coding: Coding) -> f32 {
    match coding.tensor_scale {
        Some(TensorScale::Divisor(scale) | TensorScale::Factor(scale)) => scale,
        None => 1.0,
    }
}

/// The name of the kernel that finds the largest magnitude.
pub fn largest_name(dtype: FloatDtype) -> String {
    format!("largest_{}", dtype_name(dtype))
}

/// Thread blocks to launch for it, for so many times 8 elements: few enough that what they find is little to bring back.
pub fn largest_thread_blocks(rounds: usize) -> u32 {
    (rounds.div_ceil(8 * THREADS as usize)).clamp(1, 1024) as u32
}

/// The module of groups.cu on a GPU.
pub(super) struct GroupModule {
    functions: Vec<[Function; 3]>,
    largest: [Function; 3],
    _module: Module,
}

impl GroupModule {
    /// Has the driver compile it.
    pub(crate) fn load(context: &Arc<Context>) -> Result<GroupModule, Fault> {
        let module = Module::load(context, &CString::new(GROUPS_PTX).unwrap_or_default())?;
        let of_dtypes = |name: &dyn Fn(FloatDtype) -> String| -> Result<[Function; 3], Fault> {
            let function = |dtype| module.function(&name(dtype));
            Ok([function(FloatDtype::Bfloat16)?, function(FloatDtype::Float16)?, function(FloatDtype::Float32)?])
        };
        let functions = GroupKernel::ALL.iter().map(|kernel| of_dtypes(&|dtype| kernel.name(dtype)));
        let functions = functions.collect::<Result<_, Fault>>()?;
        Ok(GroupModule { functions, largest: of_dtypes(&largest_name)?, _module: module })
    }

    /// The kernel that finds the largest magnitude.
    pub(crate) fn largest(&self, dtype: FloatDtype) -> Function {
        super::of_dtype(&self.largest, dtype)
    }

    pub(crate) fn function(&self, kernel: GroupKernel, dtype: FloatDtype) -> Function {
        super::of_dtype(&self.functions[kernel as usize], dtype)
    }
}
