//! Which kernel of groups.cu quantizes what, and how it is launched.

use std::ffi::CString;
use std::sync::Arc;

use crate::backend::cuda::driver::{Context, Fault, Function, Module};
use crate::backend::cuda::{THREADS, dtype_name};
use crate::dtype::FloatDtype;
use crate::kernel::group::GroupCoder;

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

    /// The kernel for rows of `columns` elements in groups of `group`, if there is one: groups are 16 elements for NVFP4 and
    /// 32 for MXFP4; for integers a multiple of 32, or a row.
    pub fn new(scheme: GroupCoder, columns: usize, group: usize) -> Option<GroupKernel> {
        let in_teams = group.is_multiple_of(32);
        let in_rows = group == columns && (!in_teams || group >= LONG_ROW);
        Some(match scheme {
            GroupCoder::Int4 if in_rows => GroupKernel::Int4Rows,
            GroupCoder::Int4Asym if in_rows => GroupKernel::Int4AsymRows,
            GroupCoder::Int4 if in_teams => GroupKernel::Int4,
            GroupCoder::Int4Asym if in_teams => GroupKernel::Int4Asym,
            GroupCoder::Nvfp4 { .. } if group == 16 => GroupKernel::Nvfp4,
            GroupCoder::Nvfp4ModelOpt { .. } if group == 16 => GroupKernel::Nvfp4ModelOpt,
            GroupCoder::Mxfp4 if group == 32 => GroupKernel::Mxfp4,
            _ => return None,
        })
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

/// The number that a scheme has for its tensor, as the kernels take it; any for schemes without one.
pub fn tensor_factor(scheme: GroupCoder) -> f32 {
    match scheme {
        GroupCoder::Nvfp4 { global_scale } => global_scale,
        GroupCoder::Nvfp4ModelOpt { scale_2 } => scale_2,
        GroupCoder::Int4 | GroupCoder::Int4Asym | GroupCoder::Mxfp4 => 1.0,
    }
}

/// The module of groups.cu on a GPU.
pub(super) struct GroupModule {
    functions: Vec<[Function; 3]>,
    _module: Module,
}

impl GroupModule {
    /// Has the driver compile it.
    pub fn load(context: &Arc<Context>) -> Result<GroupModule, Fault> {
        let module = Module::load(context, &CString::new(GROUPS_PTX).unwrap_or_default())?;
        let functions = GroupKernel::ALL.iter().map(|kernel| {
            let function = |dtype| module.function(&kernel.name(dtype));
            Ok([function(FloatDtype::Bfloat16)?, function(FloatDtype::Float16)?, function(FloatDtype::Float32)?])
        });
        Ok(GroupModule { functions: functions.collect::<Result<_, Fault>>()?, _module: module })
    }

    pub fn function(&self, kernel: GroupKernel, dtype: FloatDtype) -> Function {
        super::of_dtype(&self.functions[kernel as usize], dtype)
    }
}
