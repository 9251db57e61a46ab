//! Numbers in sentences.

use std::fmt;

/// `1 file`, `2 files`.
pub fn count(n: impl TryInto<u64>, what: &str) -> String {
    let n = n.try_into().unwrap_or(u64::MAX);
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// ` (1.23 GB/s)`, or nothing for what took less than a second: most of that was starting up.
pub fn rate(bytes: u64, seconds: f64) -> String {
    if seconds < 1.0 { String::new() } else { format!(" ({:.2} GB/s)", bytes as f64 / seconds / 1e9) }
}

/// A limit of bytes, as it was probably typed: in the largest unit of which it is a whole number.
#[derive(Clone, Copy)]
pub struct Limit(pub u64);

const UNITS: [(u64, &str); 6] =
    [(1 << 30, "GiB"), (1 << 20, "MiB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1 << 10, "KiB"), (1000, "kB")];

impl Limit {
    fn unit(self) -> (u64, &'static str) {
        UNITS.into_iter().find(|(unit, _)| self.0.is_multiple_of(*unit)).unwrap_or((1, "B"))
    }

    /// What `bytes` come to when they are typed as the limit was, in MiB or MB.
    pub fn at_least(self, bytes: u64) -> String {
        let (unit, name) = if self.unit().1.ends_with("iB") { (1 << 20, "MiB") } else { (1_000_000, "MB") };
        format!("{}{name}", bytes.div_ceil(unit))
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = self.unit();
        write!(f, "{}{name}", self.0 / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_printed_as_they_were_typed() {
        let typed = [1 << 20, 3 << 30, 1_000_000, 64_000_000, 1_000_000_000_000, 1000 << 10, 1_500_000, 7]
            .map(|limit| Limit(limit).to_string());
        assert_eq!(typed, ["1MiB", "3GiB", "1MB", "64MB", "1000GB", "1000KiB", "1500kB", "7B"]);
        let needed = [1 << 20, 3 << 30, 1_000_000, 7].map(|limit| Limit(limit).at_least(12_700_000));
        assert_eq!(needed, ["13MiB", "13MiB", "13MB", "13MB"]);
    }
}
