//! README.md, which hubs show as the model card: what users must know who didn't convert the checkpoint themselves.

use crate::checkpoint::Source;
use crate::error::{IoContext, Result};
use crate::plan::Plan;

/// The file's name.
pub(crate) const NAME: &str = "README.md";

/// The longest card that something is added to.
pub(crate) const MAX_LEN: u64 = 8 << 20;

/// What is written after the source's own text where experts are 4-bit.
const EXPERTS: &str = r#"
## Loading the 4-bit experts

prequant quantized this checkpoint's experts to 4 bits. With prequant's loader (the package `prequant-loader`, in `python` of
prequant's repository) transformers loads it as any other:

```python
import prequant_loader  # before from_pretrained
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

transformers alone can't load such experts, and stops at their shapes. **Don't** pass `ignore_mismatched_sizes=True` without the
loader: transformers would then fill the experts with random numbers.
"#;

/// The same in earlier words: recognized, no longer written.
const EARLIER_EXPERTS: &str = r#"
## Loading the 4-bit experts

prequant quantized this checkpoint's experts to 4 bits. transformers can't load such experts alone, and config.json has it stop
with an error that names `prequant_loader`. With prequant's loader (the package `prequant-loader`, in `scripts/loader` of prequant's
repository) it loads as any other:

```python
import prequant_loader  # before from_pretrained
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

**Don't** take `experts_implementation` out of config.json: with `ignore_mismatched_sizes=True` transformers would then fill the
experts with random numbers, without an error.
"#;

/// The file's content, where it isn't the source's own: with the addition if experts are 4-bit, without it once they are
/// decoded. Empty if nothing is left of it.
///
/// # Errors
/// When the source's own can't be read.
pub(crate) fn changed(source: &Source, plan: &Plan) -> Result<Option<Vec<u8>>> {
    let adds = plan.needs_loader() && source.config.is_some();
    if !adds && !plan.from_floats {
        return Ok(None);
    }
    let own = source.side_files.iter().find(|file| file.name == NAME);
    let own = own.map(|file| file.location.read(MAX_LEN).at(file.location.path(), "read it")).transpose()?;
    let own = own.map(|own| match without_addition(&own).filter(|_| plan.from_floats && adds) {
        Some(plain) => plain.to_vec(),
        None => own,
    });
    Ok(match (adds, own.filter(|own| !(plan.from_floats && adds && own.is_empty()))) {
        (true, Some(own)) => Some([&own, EXPERTS.as_bytes()].concat()),
        (true, None) => Some(EXPERTS.trim_start().as_bytes().to_vec()),
        (false, own) => own.and_then(|own| without_addition(&own).map(<[u8]>::to_vec)),
    })
}

/// A card without what was added to it; none if nothing was.
fn without_addition(card: &[u8]) -> Option<&[u8]> {
    [EXPERTS, EARLIER_EXPERTS].iter().find_map(|added| match card {
        _ if card == added.trim_start().as_bytes() => Some(&card[..0]),
        _ => card.strip_suffix(added.as_bytes()),
    })
}

/// Whether what was found says what `card` does, be it in the words of an earlier version.
pub(crate) fn says_the_same(found: &[u8], card: &[u8]) -> bool {
    let own = without_addition(found);
    own.is_some() && own == without_addition(card)
}
