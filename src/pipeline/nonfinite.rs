//! Finding what stopped a kernel: where the first NaN or infinity of a tensor is, and how many there are.

use std::fs::File;
use std::path::Path;

use crate::checkpoint::{Disk, TensorInfo, read_exact_at};
use crate::error::{Error, IoContext, Result};
use crate::format::FloatDtype;
use crate::kernel::scalar::decode;

/// Reads all of the tensor again, through `buffer`, and says what is in it; `None` if all of it is finite.
pub fn describe(
    disk: &dyn Disk,
    file: &File,
    path: &Path,
    info: &TensorInfo,
    dtype: FloatDtype,
    buffer: &mut [u8],
) -> Result<Option<Error>> {
    let size = dtype.size();
    let step = buffer.len() / size * size;
    let (mut first, mut count, mut done) = (None, 0, 0);
    while done < info.len {
        let piece = &mut buffer[..step.min((info.len - done) as usize)];
        read_exact_at(disk, file, path, piece, info.offset + done).at(path, "read it")?;
        for (i, element) in piece.chunks_exact(size).enumerate() {
            let value = decode(element, dtype);
            if !value.is_finite() {
                count += 1;
                first = first.or(Some((done / size as u64 + i as u64, value)));
            }
        }
        done += piece.len() as u64;
    }
    let (path, tensor) = (path.to_owned(), info.name.clone());
    Ok(first.map(|(index, value)| Error::NonFinite { path, tensor, index, value, count }))
}
