//! What a user chooses to quantize with.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{Backend, Cpu, KINDS, Kind, Unusable};

/// `auto`, `cpu`, or devices of a kind by their numbers: `cuda:0,cuda:1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A usable device if there is one, else the processor.
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

impl DeviceChoice {
    /// Opens what was chosen. With [`DeviceChoice::Auto`], which passes over devices with less than `memory` bytes free,
    /// also says why it is none.
    ///
    /// # Errors
    /// When a device that was asked for can't be used.
    pub fn open(&self, memory: u64) -> Result<(Arc<dyn Backend>, Option<Unusable>), Unusable> {
        match self {
            DeviceChoice::Cpu => Ok((Arc::new(Cpu::detect()), None)),
            DeviceChoice::Devices { kind, numbers } => {
                let kind = KINDS.iter().find(|known| known.name == *kind);
                let kind = kind.ok_or_else(|| Unusable::from("this build can't use such devices"))?;
                Ok(((kind.open)(numbers)?, None))
            }
            DeviceChoice::Auto => {
                let mut why = None;
                for kind in KINDS {
                    match (kind.first)(memory) {
                        Ok(backend) => return Ok((backend, None)),
                        Err(unusable) => why = why.or(Some(unusable)),
                    }
                }
                Ok((Arc::new(Cpu::detect()), why))
            }
        }
    }
}

impl DeviceChoice {
    /// All that can be chosen: `auto, cpu, cuda, cuda:N or cuda:N,cuda:M`.
    pub fn choices() -> String {
        let named =
            |kind: &Kind| [kind.name.to_owned(), format!("{0}:N", kind.name), format!("{0}:N,{0}:M", kind.name)];
        let mut all: Vec<String> = ["auto", "cpu"].map(str::to_owned).into();
        all.extend(KINDS.iter().flat_map(named));
        let last = all.pop().unwrap_or_default();
        format!("{} or {last}", all.join(", "))
    }

    /// What `auto` uses: `an NVIDIA GPU if there is a usable one, otherwise the CPU`.
    pub fn automatic() -> String {
        match KINDS {
            [] => "the CPU".to_owned(),
            kinds => {
                let names: Vec<&str> = kinds.iter().map(|kind| kind.about).collect();
                format!("{} if there is a usable one, otherwise the CPU", names.join(" or "))
            }
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceChoice, String> {
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
        assert_eq!(DeviceChoice::automatic(), "an NVIDIA GPU if there is a usable one, otherwise the CPU");
    }
}
