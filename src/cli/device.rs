//! `--device`: what quantizes, and the line that says so.

use std::sync::Arc;

use clap::Args;
use prequant::{Backend, Bytes, DeviceChoice, Error};

#[derive(Args)]
#[group(skip)]
pub struct Arguments {
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto, help = about())]
    device: DeviceChoice,

    /// Memory limit on each GPU
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    device_memory: Bytes,
}

fn about() -> String {
    let (choices, automatic) = (DeviceChoice::choices(), DeviceChoice::automatic());
    format!("Device to quantize on: {choices}; the output is the same. auto uses {automatic}")
}

/// What was opened, and how it came to that.
pub struct Opened {
    pub device: Arc<dyn Backend>,
    pub device_memory: u64,
    /// One line for people.
    pub line: String,
}

impl Arguments {
    /// Opens the device.
    pub fn open(&self) -> Result<Opened, Error> {
        open(&self.device, self.device_memory.0)
    }
}

/// Opens `choice`; of each device, `device_memory` bytes may be used.
pub fn open(choice: &DeviceChoice, device_memory: u64) -> Result<Opened, Error> {
    let opened = choice.open(device_memory);
    let (device, why) = opened.map_err(|why| Error::NoDevice { device: choice.to_string(), why })?;
    let driver = device.driver().map(|driver| format!(", {driver}"));
    let why = why.map(|why| format!(": {why}"));
    let line = format!("device: {}{}{}", device.name(), driver.unwrap_or_default(), why.unwrap_or_default());
    Ok(Opened { device, device_memory, line })
}
