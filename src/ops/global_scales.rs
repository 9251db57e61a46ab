//! NVFP4's global scales of weights that clients load as one: readers take one for all of them, so that they must be alike.

use std::collections::HashMap;

use crate::checkpoint::Source;
use crate::converted;
use crate::error::{Hint, Result, Warning};
use crate::models::merged_linears;
use crate::read::{SmallTensors, Tensors};

/// Of a set of weights: the smallest global scale and the largest, each with the weight that has it.
type Range<'a> = [(f32, &'a str); 2];

/// What is wrong with a checkpoint's global scales, whoever wrote it. Reads one number for each weight in NVFP4.
///
/// # Errors
/// Those of reading.
pub(crate) fn warning(source: &Source) -> Result<Option<Warning>> {
    let (tensors, mut small) = (Tensors::new(source), SmallTensors::new(source));
    let mut sets: HashMap<(&str, &[&str]), Range<'_>> = HashMap::new();
    for weight in converted::weights(source) {
        let Some(codec) = weight.codec.filter(|codec| codec.has_tensor_scale()) else { continue };
        let module = weight.name.strip_suffix(".weight").unwrap_or(weight.name);
        let (parent, last) = module.rsplit_once('.').unwrap_or(("", module));
        let Some(names) = merged_linears::set_of(last) else { continue };
        let suffix = codec.suffix(crate::layout::OutputKind::GlobalScale).unwrap_or_default();
        let Some((place, _)) = tensors.get(&format!("{}{suffix}", weight.name)).filter(|(place, _)| place.len == 4)
        else {
            continue;
        };
        let scale = small.read(place)?.try_into().map_or(f32::NAN, f32::from_le_bytes);
        let [least, most] = sets.entry((parent, names)).or_insert([(scale, weight.name); 2]);
        if scale < least.0 {
            *least = (scale, weight.name);
        }
        if scale > most.0 {
            *most = (scale, weight.name);
        }
    }
    let mut different: Vec<Range<'_>> = sets.into_values().filter(|[least, most]| least.0 != most.0).collect();
    different.sort_by_key(|[least, _]| least.1);
    let most = different.iter().map(|[least, most]| most.0 / least.0).fold(1.0, f32::max);
    Ok(different.first().map(|[least, greatest]| {
        let message = format!(
            "weights that clients load as one have different global scales in {} places, first {:?} ({}) and {:?} ({}): readers \
             take one for all, and are up to {most:.2} times off",
            different.len(),
            least.1,
            least.0,
            greatest.1,
            greatest.0
        );
        Warning { message, hint: Some(Hint::RewriteScales) }
    }))
}
