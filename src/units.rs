//! Sizes as people read and write them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes; printed in decimal units with three digits, parsed with decimal (`5GB`) or binary (`256MiB`) ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const DECIMAL: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 1000 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1e3;
        let mut unit = 0;
        // 999.5 would print as 1000.
        while value >= 999.5 {
            value /= 1e3;
            unit += 1;
        }
        let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
        write!(f, "{value:.decimals$} {}", DECIMAL[unit])
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Bytes, String> {
        let error = || format!("{text:?} is not a size such as 5GB or 256MiB");
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let number: f64 = number.parse().map_err(|_| error())?;
        let factor: f64 = match unit.trim().to_ascii_uppercase().as_str() {
            "" | "B" => 1.0,
            "K" | "KB" => 1e3,
            "M" | "MB" => 1e6,
            "G" | "GB" => 1e9,
            "T" | "TB" => 1e12,
            "KIB" => (1u64 << 10) as f64,
            "MIB" => (1u64 << 20) as f64,
            "GIB" => (1u64 << 30) as f64,
            "TIB" => (1u64 << 40) as f64,
            _ => return Err(error()),
        };
        let bytes = number * factor;
        if bytes < 1.0 || bytes >= u64::MAX as f64 {
            return Err(format!("{text:?}: expected at least one byte and less than 2^64"));
        }
        Ok(Bytes(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_with_three_digits() {
        let printed =
            [0, 999, 1000, 12_345, 999_499, 999_500, 1_234_567, 5_000_000_000, u64::MAX].map(|n| Bytes(n).to_string());
        assert_eq!(
            printed,
            ["0 B", "999 B", "1.00 kB", "12.3 kB", "999 kB", "1.00 MB", "1.23 MB", "5.00 GB", "18.4 EB"]
        );
    }

    #[test]
    fn sizes_are_parsed_with_either_kind_of_unit() {
        let parsed = ["5GB", "256MiB", "1.5 kB", "7", "60KB"].map(|text| text.parse::<Bytes>().unwrap().0);
        assert_eq!(parsed, [5_000_000_000, 256 << 20, 1500, 7, 60_000]);
        for wrong in ["", "GB", "-1", "5 parsecs", "0", "1e30", "99999999TiB", "NaN", "1.2.3"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong}");
        }
    }
}
