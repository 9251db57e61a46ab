//! Modules that diffusers keeps in f32 whatever its skip list says: it never makes a 4-bit one of them.

/// A line for each class that has such modules, with their names; from `scripts/make diffusers`.
const KEPT_IN_F32: &str = include_str!("data/diffusers.txt");

/// Whether a skip list's `entry` means `module` to diffusers: it is its name, or the last part of it, or stands before a dot.
pub(crate) fn means(entry: &str, module: &str) -> bool {
    module == entry
        || module.rsplit('.').next() == Some(entry)
        || module.match_indices(entry).any(|(at, _)| module[at + entry.len()..].starts_with('.'))
}

/// Whether a model of this class keeps the module in f32.
pub(crate) fn is_kept_in_f32(class: &str, module: &str) -> bool {
    let mut lines = KEPT_IN_F32.lines().filter_map(|line| line.strip_prefix(class)?.strip_prefix(' '));
    lines.next().is_some_and(|names| names.split(' ').any(|name| means(name, module)))
}

/// Whether a module is the projection that ends diffusers' transformers: it is a Linear like others, which diffusers makes 4-bit by
/// default. A list can't name it alone, as blocks have modules of the same last name.
pub(crate) fn is_projection(module: &str) -> bool {
    module == "proj_out"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wans_time_embedder_stays_and_its_blocks_do_not() {
        let is_kept = |module: &str| is_kept_in_f32("WanTransformer3DModel", module);
        assert!(is_kept("condition_embedder.time_embedder.linear_1"));
        for module in ["condition_embedder.text_embedder.linear_1", "blocks.0.attn1.to_q", "proj_out"] {
            assert!(!is_kept(module), "{module}");
        }
        assert!(!is_kept_in_f32("WanTransformer3D", "condition_embedder.time_embedder.linear_1"));
        assert!(!is_kept_in_f32("FluxTransformer2DModel", "time_embedder.linear_1"));
    }
}
