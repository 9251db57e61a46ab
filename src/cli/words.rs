//! Numbers in sentences.

/// `1 file`, `2 files`.
pub fn count(n: impl TryInto<u64>, what: &str) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// ` (1.23 GB/s)`, or nothing for what took less than a second: most of that was starting up.
pub fn rate(bytes: u64, seconds: f64) -> String {
    if seconds < 1.0 { String::new() } else { format!(" ({:.2} GB/s)", bytes as f64 / seconds / 1e9) }
}
