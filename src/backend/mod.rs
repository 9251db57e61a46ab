//! What quantizes: this machine's processor, or its GPUs.

pub mod cuda;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use self::cuda::{Gpu, Unusable};
use crate::kernel::Kernel;

/// What quantizes; chosen once, and passed down. The bytes are the same.
#[derive(Clone, Debug)]
pub enum Device {
    /// The processor.
    Cpu(Kernel),
    /// One GPU or several, at least one.
    Cuda(Vec<Arc<Gpu>>),
}

impl Device {
    /// The processor with its fastest kernel.
    pub fn cpu() -> Device {
        Device::Cpu(Kernel::detect())
    }

    /// The GPUs, if there are any.
    pub fn gpus(&self) -> &[Arc<Gpu>] {
        match self {
            Device::Cpu(_) => &[],
            Device::Cuda(gpus) => gpus,
        }
    }
}

/// As `CPU (AVX-512)` or `cuda:0 (NVIDIA H200)`.
impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(kernel) => write!(f, "CPU ({})", kernel.name()),
            Device::Cuda(gpus) => f.write_str(&gpus.iter().map(|gpu| gpu.to_string()).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// What a user asks for: `auto`, `cpu`, `cuda` or `cuda:0,cuda:1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A usable GPU if there is one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The GPUs with these numbers.
    Cuda(Vec<usize>),
}

impl DeviceChoice {
    /// Opens what was chosen. With [`DeviceChoice::Auto`], which passes over GPUs with less than `memory` bytes free, also
    /// says why it is no GPU.
    ///
    /// # Errors
    /// When a GPU that was asked for can't be used.
    pub fn open(&self, memory: u64) -> Result<(Device, Option<Unusable>), Unusable> {
        match self {
            DeviceChoice::Cpu => Ok((Device::cpu(), None)),
            DeviceChoice::Cuda(ordinals) => {
                let gpus = ordinals.iter().map(|&ordinal| Gpu::open(ordinal)).collect::<Result<_, _>>()?;
                Ok((Device::Cuda(gpus), None))
            }
            DeviceChoice::Auto => match first_usable(memory) {
                Ok(gpu) => Ok((Device::Cuda(vec![gpu]), None)),
                Err(why) => Ok((Device::cpu(), Some(why))),
            },
        }
    }
}

/// The first GPU that can be used; or why the first can't.
fn first_usable(needed: u64) -> Result<Arc<Gpu>, Unusable> {
    let open = |ordinal| {
        let gpu = Gpu::open(ordinal)?;
        match gpu.free_memory()? {
            free if free < needed => Err(Unusable::LittleMemory { name: gpu.name().to_owned(), free, needed }),
            _ => Ok(gpu),
        }
    };
    let mut all = (0..cuda::count()?).map(open);
    let first = all.next().unwrap_or(Err(Unusable::NoGpu));
    first.or_else(|why| all.find_map(Result::ok).ok_or(why))
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceChoice, String> {
        let ordinal = |device: &str| match device.strip_prefix("cuda:") {
            _ if device == "cuda" => Ok(0),
            Some(number) if number.bytes().all(|b| b.is_ascii_digit()) => number.parse().map_err(|_| ()),
            _ => Err(()),
        };
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            _ => {
                let ordinals: Result<Vec<usize>, ()> = text.split(',').map(ordinal).collect();
                let ordinals = ordinals.map_err(|()| "expected auto, cpu, cuda, cuda:N or cuda:N,cuda:M".to_owned())?;
                match ordinals.iter().enumerate().find(|(i, ordinal)| ordinals[..*i].contains(ordinal)) {
                    Some((_, twice)) => Err(format!("cuda:{twice} is named twice")),
                    None => Ok(DeviceChoice::Cuda(ordinals)),
                }
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(ordinals) => {
                f.write_str(&ordinals.iter().map(|n| format!("cuda:{n}")).collect::<Vec<_>>().join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3", "cuda:0,cuda:1"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(vec![0])));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for text in ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:0,", "cuda:0,cpu", "cuda,cuda:0"]
        {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text:?}");
        }
        assert!("cuda:99999999999999999999".parse::<DeviceChoice>().is_err());
    }
}
