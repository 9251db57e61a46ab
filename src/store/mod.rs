//! Where bytes live: positioned reads and writes, and the hashes of what is read and written.

mod disk;
mod hash;

pub use disk::{Disk, RealDisk, read_exact_at, write_all_at};
pub use hash::{HashingReader, HashingWriter, Sha256Hash, hash_range};
