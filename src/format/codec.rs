//! A format with its options, and all sizes that follow.

use super::{
    BlockSize, Codebook, Coding, ElementCode, FormatSpec, GroupSize, Highest, Layout, QuantStorage, ScaleCode, Sharing,
    TensorScale,
};
use crate::dtype::FloatDtype;

/// How weights are quantized: everything that decides a quantized tensor's bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Codec {
    /// The format.
    pub format: &'static FormatSpec,
    /// What shares a scale, and how scales are stored.
    pub scales: Scales,
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales {
    /// Consecutive elements of the flattened tensor: bitsandbytes' blocks.
    Blocks {
        /// What codes stand for.
        codebook: &'static Codebook,
        /// Elements that share one absmax.
        size: BlockSize,
        /// Whether absmax is itself quantized, to 8 bits ("double" or "nested" quantization).
        double_quant: bool,
        /// The dtype of tensors of codes.
        storage: QuantStorage,
    },
    /// A row's columns.
    Groups {
        /// Columns that share a scale.
        size: GroupSize,
        /// The tensors they are put in.
        layout: Layout,
    },
}

/// What can be chosen about a format; each format takes what applies to it.
#[derive(Clone, Copy, Debug, Default)]
pub struct CodecOptions {
    /// Elements of a block.
    pub block_size: BlockSize,
    /// Whether the absmax of blocks are quantized too.
    pub double_quant: bool,
    /// The dtype that the codes of blocks are stored as.
    pub quant_storage: QuantStorage,
    /// Columns of a group, where the format leaves the choice.
    pub group_size: GroupSize,
    /// The layout of groups.
    pub layout: Layout,
}

impl FormatSpec {
    /// The format with these options.
    pub fn codec(&'static self, options: CodecOptions) -> Codec {
        let CodecOptions { block_size, double_quant, quant_storage: storage, group_size, layout } = options;
        let scales = match (self.sharing, self.element) {
            (Sharing::Blocks, ElementCode::Codebook(codebook)) => {
                Scales::Blocks { codebook, size: block_size, double_quant, storage }
            }
            (Sharing::Blocks, element) => {
                unreachable!("{self:?} has blocks of {element:?}: tests refuse such a format")
            }
            (Sharing::GroupsOf(columns), _) => Scales::Groups { size: GroupSize::Columns(columns), layout },
            (Sharing::Groups, _) => Scales::Groups { size: group_size, layout },
        };
        Codec { format: self, scales }
    }
}

impl Codec {
    /// Consecutive elements that share one scale in rows of `columns`.
    pub fn block_len(&self, columns: u64) -> u64 {
        match self.scales {
            Scales::Blocks { size, .. } => size.get() as u64,
            Scales::Groups { size: GroupSize::Columns(size), .. } => size.into(),
            Scales::Groups { size: GroupSize::Channel, .. } => columns,
        }
    }

    /// Bytes of the codes of so many elements, in rows of `columns`: whole rows where these are padded.
    pub fn packed_len(&self, elements: u64, columns: u64) -> u64 {
        if self.has_whole_rows() { elements / columns * self.packed_row(columns) } else { elements.div_ceil(2) }
    }

    /// Bytes of a row's codes, where rows are apart.
    pub fn packed_row(&self, columns: u64) -> u64 {
        self.format.element.packed_row(columns)
    }

    /// Whether a piece of a weight must be whole rows: where a group is a row, or where zero points of several rows share an integer.
    /// Otherwise a piece may be any number of whole blocks or groups, which lie one after the other without padding.
    pub fn has_whole_rows(&self) -> bool {
        matches!(self.scales, Scales::Groups { size: GroupSize::Channel, .. }) || self.has_zero_points()
    }

    /// Whether groups have zero points.
    pub fn has_zero_points(&self) -> bool {
        self.format.element == ElementCode::Int { zero_point: true }
    }

    /// Bytes of a scale as quantizing gives it, of a weight in `dtype`.
    pub fn scale_size(&self, dtype: FloatDtype) -> usize {
        self.format.scale.size(dtype)
    }

    /// Whether each tensor, or each set of those that clients put together, has one scale for all its scales.
    pub fn has_tensor_scale(&self) -> bool {
        self.format.scale == ScaleCode::E4m3
    }

    /// Whether it is of blocks, and so in bitsandbytes' layout.
    pub fn is_blocks(&self) -> bool {
        matches!(self.scales, Scales::Blocks { .. })
    }

    /// The layout of groups.
    pub fn layout(&self) -> Option<Layout> {
        match self.scales {
            Scales::Blocks { .. } => None,
            Scales::Groups { layout, .. } => Some(layout),
        }
    }

    /// The scale of scales with this value, as it is applied; `None` for formats that have none.
    pub fn tensor_scale(&self, value: f32) -> Option<TensorScale> {
        let scale = match self.layout() {
            Some(Layout::Modelopt) => TensorScale::Factor(value),
            None | Some(Layout::CompressedTensors | Layout::GptOss) => TensorScale::Divisor(value),
        };
        self.has_tensor_scale().then_some(scale)
    }

    /// How rows of `columns` are coded; `tensor_scale` is the scale of scales, for formats that have it.
    pub fn coding(&self, columns: u64, tensor_scale: Option<f32>) -> Coding {
        let FormatSpec { element, scale, .. } = *self.format;
        let scale = match (self.layout(), scale) {
            (Some(Layout::GptOss), ScaleCode::E8m0(_)) => ScaleCode::E8m0(Highest::Finite),
            (None | Some(Layout::CompressedTensors | Layout::Modelopt), scale)
            | (
                Some(Layout::GptOss),
                scale @ (ScaleCode::Float(_) | ScaleCode::SourceFloat | ScaleCode::RoundedF32 | ScaleCode::E4m3),
            ) => scale,
        };
        let tensor_scale = self.tensor_scale(tensor_scale.unwrap_or(1.0));
        Coding { element, scale, group: self.block_len(columns) as usize, tensor_scale }
    }

    /// The dtype that codes are stored as, where the format leaves the choice; else bytes.
    pub fn quant_storage(&self) -> QuantStorage {
        match self.scales {
            Scales::Blocks { storage, .. } => storage,
            Scales::Groups { .. } => QuantStorage::Uint8,
        }
    }

    /// Whether absmax is quantized too.
    pub fn double_quant(&self) -> bool {
        matches!(self.scales, Scales::Blocks { double_quant: true, .. })
    }
}
