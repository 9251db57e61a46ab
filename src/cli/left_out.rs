//! What of the source isn't in the output, in words.

use std::collections::BTreeMap;

use prequant::LeftOutRecord;

use super::escape;
use super::words::count;

/// A line for each file that was left out, and for a file's tensors that were for one reason; `most` lines at most.
pub fn lines(left_out: &[LeftOutRecord], most: usize) -> Vec<String> {
    let mut tensors: BTreeMap<(&str, &str), (usize, &str)> = BTreeMap::new();
    let mut lines = Vec::new();
    for LeftOutRecord { name, tensor, why } in left_out {
        match tensor {
            Some(tensor) => tensors.entry((name, why)).or_insert((0, tensor)).0 += 1,
            None => lines.push(format!("left out: {}: {}", escape::line(name), escape::line(why))),
        }
    }
    lines.extend(tensors.into_iter().map(|((file, why), (tensors, first))| {
        let (file, first, why) = (escape::line(file), escape::line(first), escape::line(why));
        format!("left out: {} of {file}, such as \"{first}\": {why}", count(tensors, "tensor"))
    }));
    let more = lines.len().saturating_sub(most);
    if more > 0 {
        lines.truncate(most);
        lines.push(format!("left out: {more} more; prequant.json and --json have all of them"));
    }
    lines
}
