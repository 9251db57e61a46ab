//! The Linear modules that stay unquantized, as config.json lists them for clients.

pub mod bitsandbytes;
pub mod compressed_tensors;
