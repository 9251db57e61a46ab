//! What a user chooses to quantize with.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::thread::JoinHandle;

use super::{Backend, Cpu, KINDS, Kind, Opened, Unusable};
use crate::error::{Error, Result};
use crate::format::Codec;

/// `auto`, `cpu`, or devices of a kind by their numbers: `cuda:0,cuda:1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A usable device if there is one and it is faster for the work, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// The devices of a kind with these numbers.
    Devices {
        /// The kind's name.
        kind: &'static str,
        /// At least one, none of them twice.
        numbers: Vec<usize>,
    },
}

/// What quantizes: a backend, or a choice that is made once the work is known.
#[derive(Clone, Debug)]
pub enum Device {
    /// This one.
    Backend(Arc<dyn Backend>),
    /// What this says.
    Choice(DeviceChoice),
}

impl<B: Backend + 'static> From<Arc<B>> for Device {
    fn from(backend: Arc<B>) -> Device {
        Device::Backend(backend)
    }
}

impl From<Arc<dyn Backend>> for Device {
    fn from(backend: Arc<dyn Backend>) -> Device {
        Device::Backend(backend)
    }
}

impl From<DeviceChoice> for Device {
    fn from(choice: DeviceChoice) -> Device {
        Device::Choice(choice)
    }
}

/// What is to be quantized, as far as the choice of a device depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work<'a> {
    /// Bytes of the source.
    pub source_len: u64,
    /// Weights that are quantized.
    pub weights: u64,
    /// How.
    pub codec: &'a Codec,
    /// The length of a row.
    pub columns: u64,
    /// Threads for it.
    pub threads: usize,
}

/// A smaller source is converted sooner than a device is started.
const LEAST_SOURCE: u64 = 8_000_000_000;

/// Seconds that threads must need for quantizing alone before a device is worth its start. That takes half a second; what else a
/// conversion does, it can't take from the threads.
const LEAST_SECONDS: f64 = 1.0;

impl Work<'_> {
    /// Seconds that quantizing alone takes all threads.
    fn seconds(&self) -> f64 {
        let rate = Cpu::detect().kernel().weights_per_second(self.codec, self.columns);
        self.weights as f64 / (rate * self.threads.max(1) as f64)
    }

    /// Why no device is worth its start; `None` if one is.
    pub(crate) fn too_little(&self) -> Option<String> {
        if self.source_len < LEAST_SOURCE {
            let gigabytes = LEAST_SOURCE / 1_000_000_000;
            return Some(format!("sources below {gigabytes} GB are converted sooner without a GPU"));
        }
        let seconds = self.seconds();
        let little = seconds < LEAST_SECONDS;
        little.then(|| {
            format!("quantizing takes {} about {seconds:.1} s, too little for a GPU to gain", self.of_threads())
        })
    }

    fn of_threads(&self) -> String {
        if self.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", self.threads) }
    }
}

/// A device that was chosen, and why, where there was a choice.
#[derive(Clone, Debug)]
pub struct ChosenDevice {
    /// What quantizes.
    pub backend: Arc<dyn Backend>,
    /// In words, if there is something to say.
    pub why: Option<String>,
}

/// Devices that are being opened, on a thread of their own, while the work is planned.
#[derive(Debug)]
pub(crate) struct Opening {
    device: Device,
    memory: u64,
    opening: Option<JoinHandle<Opened>>,
}

impl Device {
    /// Begins to open what was chosen. With [`DeviceChoice::Auto`], which passes over devices with less than `memory` bytes free, only if
    /// that `is_likely` to be worth it for the work.
    ///
    /// # Errors
    /// When that can't be told.
    pub(crate) fn begin(&self, memory: u64, is_likely: impl FnOnce() -> Result<bool>) -> Result<Opening> {
        // Where the system starts no thread, `finish` opens it.
        let opening = match self {
            Device::Choice(DeviceChoice::Devices { kind, numbers }) => {
                let (kind, numbers) = (*kind, numbers.clone());
                thread::Builder::new().spawn(move || open(kind, &numbers)).ok()
            }
            Device::Choice(DeviceChoice::Auto) if !KINDS.is_empty() && is_likely()? => {
                thread::Builder::new().spawn(move || open_first(memory)).ok()
            }
            Device::Backend(_) | Device::Choice(DeviceChoice::Cpu | DeviceChoice::Auto) => None,
        };
        Ok(Opening { device: self.clone(), memory, opening })
    }
}

impl Opening {
    /// What quantizes this work; `has_kernel` tells whether a backend has a kernel for any of it.
    ///
    /// # Errors
    /// When a device that was asked for can't be used.
    pub(crate) fn finish(mut self, work: &Work<'_>, has_kernel: impl Fn(&dyn Backend) -> bool) -> Result<ChosenDevice> {
        let opened = self.opening.take().map(join);
        let cpu = |why| Ok(ChosenDevice { backend: Arc::new(Cpu::detect()), why });
        let no_kernel = || format!("there is no kernel for {}, so the CPU quantizes", work.codec.format.name);
        match &self.device {
            Device::Backend(backend) => Ok(ChosenDevice { backend: backend.clone(), why: None }),
            Device::Choice(DeviceChoice::Cpu) => cpu(None),
            Device::Choice(choice @ DeviceChoice::Devices { kind, numbers }) => {
                let backend = choice.named(opened.unwrap_or_else(|| open(kind, numbers)))?;
                let why = (work.weights > 0 && !has_kernel(&*backend)).then(no_kernel);
                Ok(ChosenDevice { backend, why })
            }
            Device::Choice(DeviceChoice::Auto) if KINDS.is_empty() => cpu(None),
            Device::Choice(DeviceChoice::Auto) => match work.too_little() {
                Some(why) => cpu(Some(why)),
                None => match opened.unwrap_or_else(|| open_first(self.memory)) {
                    Err(why) => cpu(Some(why.to_string())),
                    Ok(backend) if !has_kernel(&*backend) => cpu(Some(no_kernel())),
                    Ok(backend) => {
                        let (threads, seconds) = (work.of_threads(), work.seconds());
                        let why = format!("quantizing alone would take {threads} about {seconds:.0} s");
                        Ok(ChosenDevice { backend, why: Some(why) })
                    }
                },
            },
        }
    }
}

/// A driver isn't left at its start while the program ends.
impl Drop for Opening {
    fn drop(&mut self) {
        drop(self.opening.take().map(join));
    }
}

fn join(opening: JoinHandle<Opened>) -> Opened {
    opening.join().unwrap_or_else(|_| Err(Unusable::from("opening it failed")))
}

/// Opens devices of a kind by their numbers.
fn open(kind: &str, numbers: &[usize]) -> Opened {
    let kind = KINDS.iter().find(|known| known.name == kind);
    (kind.ok_or_else(|| Unusable::from("this build can't use such devices"))?.open)(numbers)
}

/// Opens the first device that can be used and has so much memory free; or says why the first can't be.
fn open_first(memory: u64) -> Opened {
    let mut why = None;
    for kind in KINDS {
        match (kind.first)(memory) {
            Ok(backend) => return Ok(backend),
            Err(unusable) => why = why.or(Some(unusable)),
        }
    }
    Err(why.unwrap_or_else(|| Unusable::from("this build can't use devices")))
}

impl DeviceChoice {
    /// Opens what was chosen; with [`DeviceChoice::Auto`] the first device that can be used, whatever the work, else the processor.
    ///
    /// # Errors
    /// When a device that was asked for can't be used.
    pub fn open(&self) -> Result<Arc<dyn Backend>> {
        match self {
            DeviceChoice::Cpu => Ok(Arc::new(Cpu::detect())),
            DeviceChoice::Auto => Ok(open_first(0).unwrap_or_else(|_| Arc::new(Cpu::detect()))),
            DeviceChoice::Devices { kind, numbers } => self.named(open(kind, numbers)),
        }
    }

    /// A device that was asked for, or the error that it can't be used.
    fn named(&self, opened: Opened) -> Result<Arc<dyn Backend>> {
        opened.map_err(|why| Error::NoDevice { device: self.to_string(), why })
    }

    /// All that can be chosen: `auto, cpu, cuda, cuda:N or cuda:N,cuda:M`.
    pub fn choices() -> String {
        let named =
            |kind: &Kind| [kind.name.to_owned(), format!("{0}:N", kind.name), format!("{0}:N,{0}:M", kind.name)];
        let mut all: Vec<String> = ["auto", "cpu"].map(str::to_owned).into();
        all.extend(KINDS.iter().flat_map(named));
        let last = all.pop().unwrap_or_default();
        format!("{} or {last}", all.join(", "))
    }

    /// What `auto` uses: `an NVIDIA GPU where there is a usable one and it is faster, otherwise the CPU`.
    pub fn automatic() -> String {
        match KINDS {
            [] => "the CPU".to_owned(),
            kinds => {
                let names: Vec<&str> = kinds.iter().map(|kind| kind.about).collect();
                format!("{} where there is a usable one and it is faster, otherwise the CPU", names.join(" or "))
            }
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DeviceChoice, String> {
        match text {
            "auto" => return Ok(DeviceChoice::Auto),
            "cpu" => return Ok(DeviceChoice::Cpu),
            _ => {}
        }
        let named = KINDS.iter().find_map(|kind| Some((kind.name, numbers(kind, text)?)));
        let (kind, numbers) = named.ok_or_else(|| format!("expected {}", DeviceChoice::choices()))?;
        match numbers.iter().enumerate().find(|(i, number)| numbers[..*i].contains(number)) {
            Some((_, twice)) => Err(format!("{kind}:{twice} is named twice")),
            None => Ok(DeviceChoice::Devices { kind, numbers }),
        }
    }
}

/// The numbers in `KIND`, which is number 0, `KIND:N` or `KIND:N,KIND:M`; `None` for anything else.
fn numbers(kind: &Kind, text: &str) -> Option<Vec<usize>> {
    let number = |device: &str| match device.strip_prefix(kind.name)? {
        "" => Some(0),
        number => {
            let number = number.strip_prefix(':').filter(|number| number.bytes().all(|b| b.is_ascii_digit()))?;
            number.parse().ok()
        }
    };
    text.split(',').map(number).collect()
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Devices { kind, numbers } => {
                f.write_str(&numbers.iter().map(|n| format!("{kind}:{n}")).collect::<Vec<_>>().join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in ["auto", "cpu"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        for kind in KINDS {
            for text in ["KIND:0", "KIND:3", "KIND:0,KIND:1"].map(|text| text.replace("KIND", kind.name)) {
                assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
            }
            assert_eq!(kind.name.parse(), Ok(DeviceChoice::Devices { kind: kind.name, numbers: vec![0] }));
        }
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for text in ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:0,", "cuda:0,cpu", "cuda,cuda:0"]
        {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text:?}");
        }
        assert!("cuda:99999999999999999999".parse::<DeviceChoice>().is_err());
        assert!("cudax".parse::<DeviceChoice>().is_err());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_wrong_choice_is_told_what_there_is() {
        let error = "gpu".parse::<DeviceChoice>().unwrap_err();
        assert_eq!(error, "expected auto, cpu, cuda, cuda:N or cuda:N,cuda:M");
        assert_eq!(
            DeviceChoice::automatic(),
            "an NVIDIA GPU where there is a usable one and it is faster, otherwise the CPU"
        );
    }
}
