//! What is written, and what is read back from it: conversions of every source and format, and what `verify`, `dequantize` and
//! a change of layout make of them.

#[path = "../support/mod.rs"]
mod support;

mod bitsandbytes_sources;
mod carried;
mod caution;
mod clients;
mod coded_sources;
mod cold;
mod conversion;
mod dequantize;
mod devices;
mod files;
mod group_configs;
mod groups;
mod guard;
mod integer_sources;
mod modules;
mod mutations;
#[cfg(feature = "test-format")]
mod mxint4;
mod recorded;
mod relayout;
mod sources;
mod split;
mod storage;
#[cfg(target_os = "linux")]
mod threads;
mod unreadable;
mod verify;
mod warnings;
