//! `--device`: what quantizes, and the line that says so.

use clap::Args;
use prequant::{Bytes, ChosenDevice, DeviceChoice};

#[derive(Args)]
#[group(skip)]
pub struct Arguments {
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto, help = about())]
    pub device: DeviceChoice,

    /// Memory limit on each GPU
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub device_memory: Bytes,
}

fn about() -> String {
    let (choices, automatic) = (DeviceChoice::choices(), DeviceChoice::automatic());
    format!("Device to quantize on: {choices}; the output is the same. auto uses {automatic}")
}

/// What was chosen, and why: one line for people.
pub fn line(device: &ChosenDevice) -> String {
    let driver = device.backend.driver().map(|driver| format!(", {driver}"));
    let why = device.why.as_ref().map(|why| format!(": {why}"));
    format!("device: {}{}{}", device.backend.name(), driver.unwrap_or_default(), why.unwrap_or_default())
}
