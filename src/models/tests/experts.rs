//! Tests of the families' experts against transformers' conversion mapping, in `../data/experts.json`.

use std::collections::BTreeSet;

use regex::Regex;
use serde_json::{Value, json};

use crate::models::experts::{ExpertParameter, Fusion};
use crate::models::families::FAMILIES;

/// What transformers does with experts, by `model_type`; see scripts/make experts.
const GOLDEN: &str = include_str!("../data/experts.json");

/// In transformers' table, and not in ours: other ways of putting experts together, or names of classes.
const NOT_COVERED: [&str; 7] = [
    "Dots3NoteTextModel",
    "UnlimitedOcrTextModel",
    "dots3_note_vision_encoder",
    "ernie4_5_vl_moe",
    "inkling2_text",
    "inkling_mm_model",
    "nemo_speechlm",
];

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// What transformers' renames make of a name on disk.
fn renamed(model: &Value, name: &str) -> String {
    let python_groups = Regex::new(r"\\([0-9])").unwrap();
    model["renames"].as_array().unwrap().iter().fold(name.to_owned(), |name, pair| {
        let [from, to] = &strings(pair)[..] else { panic!("{pair}") };
        let to = python_groups.replace_all(to, "$${$1}").into_owned();
        Regex::new(from).unwrap().replace_all(&name, to.as_str()).into_owned()
    })
}

/// A pattern of transformers as a plain end of a name, after a dot.
fn plain(pattern: &str) -> String {
    pattern.replace('\\', "").trim_start_matches('.').to_owned()
}

/// Whether transformers makes the parameter `fusion.target` out of the tensors `fusion.sources`, and takes it by its name.
fn check(model_type: &str, model: &Value, fusion: &Fusion) {
    let name = |end: &str| renamed(model, &format!("model.layers.3.{end}").replace('*', "7"));
    let target = name(fusion.target);
    let makes = |converter: &&Value| target.ends_with(&format!(".{}", plain(&strings(&converter["targets"])[0])));
    let Some(converter) = model["converters"].as_array().unwrap().iter().find(makes) else {
        // Renamed at most.
        assert_eq!((fusion.sources.len(), fusion.transposed_unless), (1, None), "{model_type}");
        assert_eq!(name(fusion.sources[0]), target, "{model_type}");
        return;
    };
    let prefix = target.strip_suffix(&plain(&strings(&converter["targets"])[0])).unwrap();
    let sources: Vec<String> = fusion.sources.iter().map(|source| name(source)).collect();
    let theirs = strings(&converter["sources"]);
    let theirs: Vec<String> = theirs.iter().map(|end| format!("{prefix}{}", plain(end).replace('*', "7"))).collect();
    assert_eq!(sources, theirs, "{model_type}: names, in the order of concatenation");

    let mut operations = Vec::new();
    if fusion.sources[0].contains('*') {
        operations.push(json!(["MergeModulelist", {"dim": 0}]));
    }
    if fusion.sources.len() > 1 {
        operations.push(json!(["Concatenate", {"dim": 1}]));
    }
    if fusion.transposed_unless.is_some() {
        operations.push(json!(["Transpose", {"check_dims": true, "dim0": 1, "dim1": 2}]));
    }
    assert_eq!(converter["operations"], json!(operations), "{model_type}");
}

#[test]
fn the_table_is_what_transformers_does() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let models = golden["models"].as_object().unwrap();
    let nothing = json!({"renames": [], "converters": []});
    let mut covered = BTreeSet::new();
    for family in FAMILIES.iter().filter(|family| !family.experts.is_empty()) {
        let fusions: Vec<Fusion> = family.experts.iter().filter_map(ExpertParameter::fusion).collect();
        for model_type in family.model_types {
            // What isn't in transformers' table is loaded as it is.
            let model = models.get(*model_type).unwrap_or(&nothing);
            fusions.iter().for_each(|fusion| check(model_type, model, fusion));
            // What transformers converts is made here too.
            assert!(model["converters"].as_array().unwrap().len() <= fusions.len(), "{model_type}");
            covered.insert(*model_type);
        }
    }
    let theirs: BTreeSet<&str> = models.keys().map(String::as_str).collect();
    let missing: Vec<&str> = theirs.difference(&covered).copied().collect();
    assert_eq!(missing, NOT_COVERED, "experts without a row in families.rs");
}
