//! Finding what stopped a kernel: where the first NaN or infinity of a tensor is, and how many there are.

use std::path::Path;

use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::kernel::block::scalar::decode;

/// Reads all `len` bytes of the tensor called `name` again, through `buffer`, and says what is in it; `None` if all of it is
/// finite.
pub(crate) fn describe(
    path: &Path,
    name: &str,
    len: u64,
    dtype: FloatDtype,
    buffer: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Option<Error>> {
    let size = dtype.size();
    let step = buffer.len() / size * size;
    let (mut first, mut count, mut done) = (None, 0, 0);
    while done < len {
        let piece = &mut buffer[..step.min((len - done) as usize)];
        read(done, piece)?;
        for (i, element) in piece.chunks_exact(size).enumerate() {
            let value = decode(element, dtype);
            if !value.is_finite() {
                count += 1;
                first = first.or(Some((done / size as u64 + i as u64, value)));
            }
        }
        done += piece.len() as u64;
    }
    let (path, tensor) = (path.to_owned(), name.to_owned());
    Ok(first.map(|(index, value)| Error::NonFinite { path, tensor, index, value, count }))
}
