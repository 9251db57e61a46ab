//! Executes PTX on the CPU, thread by thread, and stops at whatever a GPU would silently let pass: an access outside
//! its buffer, a byte that nobody wrote, a race, a barrier or a shuffle that not every thread reaches.
//!
//! It knows the instructions that prequant's kernels use, and refuses a module that has any other. Arithmetic is IEEE
//! f32, rounded to nearest, with subnormals. A thread runs until it waits at a shuffle or a barrier; a shuffle happens
//! when all lanes of its mask wait at it, a barrier when all threads of the thread block do.

mod body;
mod decode;
mod fault;
mod instruction;
mod launch;
mod memory;
mod opcode;
mod parse;
mod registers;
mod shared;
mod token;

pub use fault::{Fault, Problem};
pub use instruction::{Entry, Param, SharedVariable};
pub use memory::Memory;
pub use parse::Module;
