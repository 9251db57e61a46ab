//! The Linear modules that stay unquantized, as config.json lists them for clients.

pub(crate) mod bitsandbytes;
pub(crate) mod compressed_tensors;
