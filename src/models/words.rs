//! What the words in a module's name say against its being a Linear like others, where no table knows the module.
//!
//! Clients fill what was quantized and should not have been with random numbers, or refuse it; a small matrix that is kept
//! for its name costs next to nothing. So a word that means a table, a head or a router anywhere in a name is enough.

use crate::models::roles::Role;

/// Words, what they say, and the role that it makes.
const WORDS: &[(&[&str], &str, Role)] = &[
    (
        &[
            "emb",
            "embed",
            "embedder",
            "embedding",
            "embeddings",
            "embeds",
            "embs",
            "codebook",
            "codebooks",
            "lookup",
            "ngram",
            "table",
            "vocab",
            "vocabulary",
            "wpe",
            "wte",
        ],
        "an embedding",
        Role::Embedding,
    ),
    (
        &[
            "classifier",
            "classifiers",
            "critic",
            "head",
            "heads",
            "logit",
            "logits",
            "pred",
            "qa",
            "reward",
            "rewards",
            "score",
            "scorer",
            "scores",
            "summary",
            "unembed",
            "unembedding",
        ],
        "an output head",
        Role::OutputHead,
    ),
    (&["dispatcher", "gating", "router", "routers", "routing", "switch"], "a router", Role::Router),
    (
        &[
            "alibi",
            "pos",
            "posemb",
            "position",
            "positional",
            "positions",
            "rel",
            "relative",
            "relpos",
            "rope",
            "rotary",
        ],
        "a position",
        Role::Embedding,
    ),
    (&["bias", "biases"], "a bias", Role::Bias),
];

/// The module that decides which experts run, with whatever is inside it: `gate_proj` is SwiGLU's.
const GATES: &[&str] = &["gate", "gate_net", "gate_network", "gates", "wg"];

/// Outside of layers, the last module of a model.
const OUTPUTS: &[&str] = &["decoder", "out", "output", "output_layer", "proj_out"];

/// The first part of a module's name that says what it is, if one does: the part, what it says, the role.
pub(super) fn objection(module: &str) -> Option<(&str, &'static str, Role)> {
    let last = module.rsplit('.').next().unwrap_or("");
    if module == "fc" || OUTPUTS.contains(&last) && !module.split('.').any(is_number) {
        return Some((last, "an output head", Role::OutputHead));
    }
    parts_that_count(module).find_map(|part| {
        if GATES.contains(&part.to_ascii_lowercase().as_str()) {
            return Some((part, "a router", Role::Router));
        }
        let words = words(part);
        // Multi-head attention has heads, and is none.
        let of_attention = words.iter().any(|word| matches!(word.as_str(), "attention" | "attn"));
        let says = |row: &&(&[&str], &str, Role)| {
            let found = words.iter().any(|word| row.0.contains(&word.as_str()));
            found && !(of_attention && row.2 == Role::OutputHead)
        };
        WORDS.iter().find(says).map(|(_, what, role)| (part, *what, *role))
    })
}

/// Whether a part of a name says that it is an embedding.
pub(super) fn is_embedding(part: &str) -> bool {
    let (embeddings, _, _) = WORDS[0];
    words(part).iter().any(|word| embeddings.contains(&word.as_str()))
}

/// The parts of a name from the innermost numbered layer on: what the tower around it is called says nothing of the
/// matrices in it. `heads.0.out` is in no layer but in a list of heads, which counts.
fn parts_that_count(module: &str) -> impl Iterator<Item = &str> {
    let parts: Vec<&str> = module.split('.').collect();
    let is_layer = |&at: &usize| {
        let in_a_list = is_number(parts[at]) && at + 1 < parts.len() && at > 0;
        in_a_list && !says_anything(parts[at - 1])
    };
    let from = (0..parts.len()).rev().find(is_layer).map_or(0, |at| at + 1);
    parts.into_iter().skip(from)
}

fn says_anything(part: &str) -> bool {
    let words = words(part);
    GATES.contains(&part) || WORDS.iter().any(|row| words.iter().any(|word| row.0.contains(&word.as_str())))
}

pub(super) fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

/// The words of a part in lower case: `relPosEmb_2` has rel, pos and emb.
fn words(part: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for letter in part.chars() {
        let begins = letter.is_ascii_uppercase() && !before.is_ascii_uppercase();
        if !letter.is_ascii_alphabetic() || begins {
            words.push(String::new());
        }
        if letter.is_ascii_alphabetic() {
            words.last_mut().expect("it begins with one").push(letter.to_ascii_lowercase());
        }
        before = letter;
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_says(module: &str, expected: Option<&str>) {
        assert_eq!(objection(module).map(|(_, says, _)| says), expected, "{module}");
    }

    #[test]
    fn a_word_anywhere_in_a_name_counts() {
        assert_says("model.layers.1.ple.ple_embedding.ngram_embedding.shard_0", Some("an embedding"));
        assert_says("talker.code_predictor.model.codec_embedding.2", Some("an embedding"));
        assert_says("encoder.layers.0.attn.rel_pos_emb", Some("an embedding"));
        assert_says("talker.lm_head.3", Some("an output head"));
        assert_says("score.0", Some("an output head"));
        assert_says("v_head.summary", Some("an output head"));
        assert_says("transformer.output_layer", Some("an output head"));
        assert_says("rewardHead.dense", Some("an output head"));
        assert_says("heads.0.out", Some("an output head"));
        assert_says("model.layers.0.mlp.gate.gate_network.0", Some("a router"));
        assert_says("model.layers.0.moe.Router.w", Some("a router"));
        assert_says("h.3.attn.relative_attention_bias", Some("a position"));
        assert_says("h.3.attn.bias_table_2", Some("an embedding"));
    }

    #[test]
    fn linears_have_none() {
        for module in [
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.self_attn.q_proj",
            "text_embedder.layers.2.mlp.fc1",
            "model.layers.0.multi_head_attention.out_proj",
            "model.layers.0.mlp.experts.7.w1",
            "model.layers.0.attn.W_pack",
            "encoder.layers.0.output",
        ] {
            assert_says(module, None);
        }
    }
}
