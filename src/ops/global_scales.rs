//! NVFP4's global scales of weights that clients load as one: readers take one for all of them, so that they must be alike.

use std::collections::HashMap;

use crate::checkpoint::Source;
use crate::converted;
use crate::error::{Hint, Result, Warning};
use crate::layout::OutputKind;
use crate::models::merged_linears;
use crate::read::{SmallTensors, Tensors};

/// Of a set of weights: the smallest global scale and the largest, each with the last name of the module that has it.
type Range = [(f32, &'static str); 2];

/// The global scales of a checkpoint's weights, by what clients load as one: the module around the weights, and their last names.
#[derive(Debug, Default)]
pub(crate) struct GlobalScales(HashMap<(Box<str>, &'static [&'static str]), Range>);

impl GlobalScales {
    /// Of all weights in NVFP4, whoever wrote them. Reads one number for each.
    ///
    /// # Errors
    /// Those of reading.
    pub(crate) fn of(source: &Source) -> Result<GlobalScales> {
        let (tensors, mut small) = (Tensors::new(source), SmallTensors::new(source));
        let mut scales = GlobalScales::default();
        for weight in converted::weights(source) {
            let Some(codec) = weight.codec.filter(|codec| codec.has_tensor_scale()) else { continue };
            let suffix = codec.suffix(OutputKind::GlobalScale).unwrap_or_default();
            if !GlobalScales::is_shared(weight.name) {
                continue;
            }
            let found = tensors.get(&format!("{}{suffix}", weight.name));
            if let Some((place, _)) = found.filter(|(place, _)| place.len == 4) {
                scales.add(weight.name, small.read(place)?.try_into().map_or(f32::NAN, f32::from_le_bytes));
            }
        }
        Ok(scales)
    }

    /// Whether clients load a weight of this name with others.
    pub(crate) fn is_shared(weight: &str) -> bool {
        set_of(weight).is_some()
    }

    /// Adds a weight's; of no use unless it [is shared](GlobalScales::is_shared).
    pub(crate) fn add(&mut self, weight: &str, scale: f32) {
        let Some((parent, last, names)) = set_of(weight) else { return };
        let [least, most] = self.0.entry((parent.into(), names)).or_insert([(scale, last); 2]);
        if scale < least.0 {
            *least = (scale, last);
        }
        if scale > most.0 {
            *most = (scale, last);
        }
    }

    /// What is wrong with them, if anything is.
    pub(crate) fn warning(&self) -> Option<Warning> {
        let mut different: Vec<(&str, &Range)> = Vec::new();
        different
            .extend(self.0.iter().filter(|(_, [least, most])| least.0 != most.0).map(|((p, _), range)| (&**p, range)));
        different.sort_by_key(|(parent, [least, _])| (*parent, least.1));
        let most = different.iter().map(|(_, [least, most])| most.0 / least.0).fold(1.0, f32::max);
        let (parent, [least, greatest]) = different.first()?;
        let name =
            |last: &str| if parent.is_empty() { format!("{last}.weight") } else { format!("{parent}.{last}.weight") };
        let message = format!(
            "weights that clients load as one have different global scales in {} places, first {:?} ({}) and {:?} ({}): readers \
             take one for all, and are up to {most:.2} times off",
            different.len(),
            name(least.1),
            least.0,
            name(greatest.1),
            greatest.0
        );
        Some(Warning { message, hint: Some(Hint::RewriteScales) })
    }
}

/// Of a weight that clients load with others: the module around it, its own last name, and the names of all.
fn set_of(weight: &str) -> Option<(&str, &'static str, &'static [&'static str])> {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let (parent, last) = module.rsplit_once('.').unwrap_or(("", module));
    let names = merged_linears::set_of(last)?;
    names.iter().find(|name| **name == last).map(|last| (parent, *last, names))
}
