//! What the fake driver is to be like, from environment variables.
//!
//! - `FAKE_CUDA_DEVICES`: GPUs (1)
//! - `FAKE_CUDA_FREE`: bytes free on each of them (1 GiB)
//! - `FAKE_CUDA_VERSION`: the CUDA version it serves (12040)
//! - `FAKE_CUDA_CAPABILITY`: the GPUs' compute capability, major · 10 + minor (90)
//! - `FAKE_CUDA_FAIL`: `call:k:code`: the kth call of that function fails; with code 2, that one alone; with any other,
//!   its GPU is lost, and every later call fails
//! - `FAKE_CUDA_REPORT`: a file that gets what was used, once all contexts are released

use std::env;
use std::str::FromStr;

pub struct Settings {
    pub devices: usize,
    pub free: usize,
    pub version: i32,
    pub capability: i32,
    pub fail: Option<Failure>,
    pub report: Option<String>,
}

/// A call that is to fail.
pub struct Failure {
    pub call: String,
    pub number: u64,
    pub code: u32,
}

impl Settings {
    pub fn from_environment() -> Settings {
        Settings {
            devices: number("FAKE_CUDA_DEVICES", 1),
            free: number("FAKE_CUDA_FREE", 1 << 30),
            version: number("FAKE_CUDA_VERSION", 12_040),
            capability: number("FAKE_CUDA_CAPABILITY", 90),
            fail: env::var("FAKE_CUDA_FAIL").ok().map(|text| failure(&text).expect("FAKE_CUDA_FAIL: call:k:code")),
            report: env::var("FAKE_CUDA_REPORT").ok(),
        }
    }
}

fn number<T: FromStr>(name: &str, default: T) -> T {
    env::var(name).map_or(default, |text| text.parse().ok().unwrap_or_else(|| panic!("{name}: not a number")))
}

fn failure(text: &str) -> Option<Failure> {
    let mut parts = text.split(':');
    let (call, number, code) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Failure { call: call.to_owned(), number: number.parse().ok()?, code: code.parse().ok()? })
}
