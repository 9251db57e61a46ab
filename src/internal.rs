//! The door through which this repository's tests, benchmarks and fuzzers reach inside. Nothing here is stable.

pub mod backend {
    pub use crate::backend::{
        Backend, Cpu, CpuLane, Device, DeviceChoice, Devices, Encoded, Fault, Lane, LaneSize, Run,
    };
    #[cfg(feature = "cuda")]
    pub mod cuda {
        pub use crate::backend::cuda::{
            GROUPS_PTX, GroupKernel, PTX, THREADS, codebook_table, dynamic_map_table, largest_name,
            largest_thread_blocks, sum_thread_blocks, tensor_factor, thread_blocks,
        };
    }
}
pub mod checkpoint {
    pub use crate::checkpoint::{Config, Header, Index, Source, SourceFile};
}
pub mod dtype {
    pub use crate::dtype::FloatDtype;
}
pub mod format {
    pub use crate::format::{
        Codebook, Codec, CodecOptions, Coding, ElementCode, FP4, Highest, INT4, INT4_ASYM, MXFP4, NESTED_BLOCK_SIZE,
        NF4, NVFP4, ScaleCode, Scales, Sharing, TensorScale, dynamic_map, fp4, nf4,
    };
}
pub mod kernel {
    pub use crate::kernel::{BlockErrors, Blocks, ErrorSums, Figures, Kernel, NonFinite, SUMMED, quantize_any};
    pub mod block {
        pub mod nested {
            pub use crate::kernel::block::nested::{quantize, restore};
        }
        pub mod scalar {
            pub use crate::kernel::block::scalar::decode;
        }
    }
    pub mod decode {
        pub use crate::kernel::decode::{Order, Row, restore_absmax};
    }
    pub mod group {
        pub use crate::kernel::group::{Groups, tensor_scale};
        pub mod scalar {
            pub use crate::kernel::group::scalar::{absmax, global_scale, scale_2};
        }
    }
    pub mod sha256 {
        pub use crate::kernel::sha256::{Pairing, Sha256Stream, update_pair, update_two};
    }
}
pub mod layout {
    pub use crate::layout::{ParsedQuantState, QuantState, quant_state_bytes};
}
pub mod ops {
    pub mod dequantize {
        pub use crate::ops::dequantize::plan;
    }
    pub mod merge {
        pub use crate::ops::merge::plan;
    }
    pub mod quantize {
        pub use crate::ops::quantize::plan;
    }
    pub mod verify {
        pub use crate::ops::verify::{Options, against, verify};
    }
}
pub mod pipeline {
    pub use crate::pipeline::{Budget, Limits};
}
pub mod stats {
    pub use crate::stats::{GroupErrors, StatsAccumulator};
}
pub mod store {
    pub use crate::store::{
        Fault, FaultyStore, Identity, Listing, LocalStore, Location, MemoryStore, ReadAt, Stat, Store, WriteAt,
        read_exact_at,
    };
}
