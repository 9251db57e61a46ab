//! README.md, which hubs show as the model card: what users must know who didn't convert the checkpoint themselves.

use crate::checkpoint::Source;
use crate::plan::Plan;

/// The file's name.
pub const NAME: &str = "README.md";

/// What is written after the source's own text where experts are 4-bit.
const EXPERTS: &str = r#"
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

/// What the file gets on top of the source's own, if anything. One that is laid out anew has it already.
pub fn addition(source: &Source, plan: &Plan) -> Option<&'static str> {
    (plan.needs_loader() && source.config.is_some()).then_some(EXPERTS)
}
