//! What the fuzzers call, and what `tests/hostile` calls with their corpus: everything that reads what strangers
//! wrote. Nothing here may panic.

use std::path::{Component, Path};

use prequant::internal::backend::Cpu;
use prequant::internal::checkpoint::{Config, Header, Index, Source, SourceFile};
use prequant::internal::format::{INT4, INT4_ASYM, MXFP4, NVFP4};
use prequant::internal::layout::ParsedQuantState;
use prequant::internal::pipeline::Limits;
use prequant::internal::store::Identity;
use prequant::{Budget, ExpertLayout, GroupSize, Layout, Manifest, Plan, RecipeOptions};

/// What a fuzzer calls with whatever it makes up.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Target); 6] = [
    ("header", header),
    ("index", index),
    ("config", config),
    ("manifest", manifest),
    ("quant_state", quant_state),
    ("plan", plan),
];

/// A safetensors file, whole.
pub fn header(data: &[u8]) {
    let _ = Header::read(&mut &data[..], data.len() as u64, Path::new("fuzzed"));
}

/// `model.safetensors.index.json`.
pub fn index(data: &[u8]) {
    if let Ok(index) = Index::parse(data, Path::new("fuzzed")) {
        let is_inside = |file: &&str| Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        assert!(index.files().iter().all(is_inside));
    }
}

/// `config.json`: what is written of it must be read again.
pub fn config(data: &[u8]) {
    let path = Path::new("fuzzed");
    if let Ok(config) = Config::parse(data.to_vec(), path) {
        config.model_types();
        let text = config.with(&[("quantization_config", serde_json::json!({"a": 1}))]).expect("it was read once");
        let again = Config::parse(text.into_bytes(), path).expect("what was written is JSON");
        assert_eq!(again.values()["quantization_config"]["a"], 1);
    }
}

/// `prequant.json`.
pub fn manifest(data: &[u8]) {
    if let Ok(manifest) = Manifest::parse(data) {
        let mut written = Vec::new();
        manifest.write_json(&mut written).expect("writing to memory");
        assert!(Manifest::parse(&written).is_ok());
    }
}

/// A quant_state tensor.
pub fn quant_state(data: &[u8]) {
    let _ = ParsedQuantState::parse(data);
}

/// A config.json, a zero byte, and the JSON of a safetensors header; the file is as long as the header wants it.
pub fn plan(data: &[u8]) {
    let split = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let (config, json) = (&data[..split], data.get(split + 1..).unwrap_or_default());
    let Ok(config) = Config::parse(config.to_vec(), Path::new("config.json")) else { return };
    let wanted = serde_json::from_slice::<serde_json::Value>(json).ok().and_then(|header| {
        let entries = header.as_object()?.values();
        entries.filter_map(|entry| entry["data_offsets"][1].as_u64()).max()
    });
    let file = [&(json.len() as u64).to_le_bytes(), json].concat();
    let Some(len) = wanted.unwrap_or(0).checked_add(file.len() as u64) else { return };
    let Ok(header) = Header::read(&mut &file[..], len, Path::new("fuzzed")) else { return };
    let name = "model.safetensors".to_owned();
    let (location, header_sha256, tensors) = (name.clone().into(), header.sha256, header.tensors);
    let metadata = header.metadata;
    let identity = Identity { len, version: String::new(), sha256: None };
    let files = vec![SourceFile { name, location, identity, header_sha256, metadata, tensors }];
    let source = Source::of_files("fuzzed".into(), files, Some(config));
    let base = RecipeOptions { max_shard_size: Some(1000), dequantize_source: Some(true), ..RecipeOptions::default() };
    let of = |format| RecipeOptions { format: Some(format), ..base.clone() };
    for options in [
        base.clone(),
        RecipeOptions { double_quant: Some(true), ..base.clone() },
        RecipeOptions { experts: Some(ExpertLayout::Fuse), ..base.clone() },
        of(&INT4),
        RecipeOptions { group_size: Some(GroupSize::Channel), ..of(&INT4_ASYM) },
        RecipeOptions { layout: Some(Layout::Modelopt), ..of(&NVFP4) },
        RecipeOptions { layout: Some(Layout::GptOss), ..of(&MXFP4) },
    ] {
        let recipe = options.build().expect("options that go together");
        if let Ok(plan) = Plan::new(&source, recipe) {
            assert_eq!(plan.tensors.len(), plan.files.iter().map(|file| file.tensors.len()).sum::<usize>());
            let limits = Limits { memory: Some(1 << 28), beside: 0, source_tensors: 0, threads: 4, device_memory: 0 };
            let _ = Budget::new(&plan, limits, &Cpu::detect());
        }
    }
}
