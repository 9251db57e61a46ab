//! `--device cuda`, as users run it, on a driver without a GPU: tests/fake-cuda. The bytes must be the CPU's, whatever
//! happens on the way.

use std::env;
use std::path::PathBuf;

use safetensors::tensor::Dtype;

use super::driver::{NO_DRIVER, convert, on_the_cpu, prequant, report};
use crate::support::{Folder, LINEAR, Tensor, contents, serialize, with_header};

/// Elements of the smallest chunk: tensors of more take several.
const CHUNK: usize = 65_536;

/// So little device memory that chunks are small, and several slots fit: one takes about 0.2 MB, of f32 0.4.
const LITTLE: [&str; 2] = ["--device-memory", "2MiB"];

/// Two shards with every dtype: Linears of one chunk and of several, with odd ends, and experts in one 3-D tensor.
fn checkpoint() -> Folder {
    let folder = Folder::new("qwen3_moe");
    let expert = |i: usize, dtype, shape: &[usize]| {
        Tensor::random(&format!("model.layers.0.mlp.experts.{i}.up_proj.weight"), dtype, shape)
    };
    folder.write_shards(&[
        vec![
            expert(0, Dtype::BF16, &[3, CHUNK]),
            expert(1, Dtype::BF16, &[257, 301]),
            Tensor::random("model.norm.weight", Dtype::BF16, &[64]),
        ],
        vec![
            expert(2, Dtype::F16, &[1, CHUNK + 77]),
            expert(3, Dtype::F32, &[1031, 67]),
            Tensor::random("model.layers.0.mlp.experts.gate_up_proj", Dtype::BF16, &[3, 64, 96]),
            Tensor::random("lm_head.weight", Dtype::BF16, &[40, 64]),
        ],
    ]);
    folder
}

#[test]
fn every_format_block_size_and_dtype_gives_the_cpus_files() {
    let folder = checkpoint();
    for format in ["nf4", "fp4"] {
        for (block_size, double_quant) in [("64", false), ("64", true), ("32", true), ("512", false), ("4096", true)] {
            let mut flags = vec!["--format", format, "--block-size", block_size, "--max-shard-size", "150kB"];
            flags.extend(double_quant.then_some("--double-quant"));
            let (to, used) = (folder.beside(&flags.concat()), folder.beside("report"));
            let settings = [("FAKE_CUDA_REPORT", used.to_str().unwrap())];
            convert(&folder, &to, &[&flags, &LITTLE[..]].concat(), &settings).ok();
            assert!(contents(&to) == on_the_cpu(&folder, &flags), "{flags:?}");

            let used = report(&used);
            for dtype in ["bf16", "f16", "f32"] {
                assert!(used[&format!("quantize_{format}_{dtype}")] > 0, "{flags:?}: {used:?}");
            }
            assert_eq!(used.contains_key("quantize_absmax"), double_quant, "{flags:?}: {used:?}");
        }
    }
}

/// Linears of one chunk and of several, in every dtype; the columns of some are whole groups of every size.
fn checkpoint_for_groups() -> Folder {
    let folder = Folder::new("qwen3_moe");
    let linear = |name: &str, dtype, shape: &[usize]| {
        Tensor::random(&format!("model.layers.0.self_attn.{name}_proj.weight"), dtype, shape)
    };
    // The widest range that there is: zero points' scales overflow.
    let mut wide = linear("o", Dtype::F16, &[8, 128]);
    for (i, x) in wide.data.chunks_exact_mut(2).enumerate().take(200) {
        x.copy_from_slice(&if i % 2 == 0 { [0xff, 0x7b] } else { [0xff, 0xfb] });
    }
    folder.write_shards(&[
        vec![linear("q", Dtype::BF16, &[70, 2048]), linear("k", Dtype::BF16, &[9, 301])],
        vec![linear("v", Dtype::F32, &[517, 128]), wide, Tensor::random("lm_head.weight", Dtype::F16, &[33, 640])],
    ]);
    folder
}

#[test]
fn every_group_format_gives_the_cpus_files() {
    let folder = checkpoint_for_groups();
    let channel = ["--group-size", "channel"];
    for (format, flags, kernels) in [
        ("int4", &[][..], &["int4_bf16", "int4_f16", "int4_f32"][..]),
        ("int4", &["--group-size", "32"], &["int4_bf16", "int4_f16", "int4_f32"]),
        ("int4", &channel, &["int4_rows_bf16", "int4_f16", "int4_f32"]),
        ("int4-asym", &[], &["int4_asym_bf16", "int4_asym_f16", "int4_asym_f32"]),
        ("int4-asym", &channel, &["int4_asym_rows_bf16", "int4_asym_f16", "int4_asym_f32"]),
        ("mxfp4", &[], &["mxfp4_bf16", "mxfp4_f16", "mxfp4_f32"]),
        ("nvfp4", &[], &["nvfp4_bf16", "nvfp4_f16", "nvfp4_f32"]),
        ("nvfp4", &["--layout", "modelopt"], &["nvfp4_modelopt_bf16", "nvfp4_modelopt_f16", "nvfp4_modelopt_f32"]),
    ] {
        let flags = [&["--format", format, "--include", "lm_head|_proj"], flags].concat();
        let (to, used) = (folder.beside(&flags.concat()), folder.beside("report"));
        let settings = [("FAKE_CUDA_REPORT", used.to_str().unwrap())];
        let memory = 1 << 20;
        convert(&folder, &to, &[&flags[..], &["--device-memory", "1MiB"]].concat(), &settings).ok();
        assert!(contents(&to) == on_the_cpu(&folder, &flags), "{flags:?}");

        let used = report(&used);
        for kernel in kernels {
            assert!(used.contains_key(&format!("quantize_{kernel}")), "{flags:?}: {used:?}");
        }
        assert!(used["peak:0"] <= memory && used["leaked:0"] == 0, "{flags:?}: {used:?}");
    }
}

/// Of every weight, once: its bytes there; codes, scales and at most a tenth of a byte of figures back.
#[test]
fn little_more_than_codes_and_scales_comes_back() {
    let folder = Folder::new("llama");
    let shape = [512, 1024];
    // Two of them share NVFP4's scale of scales; one is a set of its own.
    let names = ["up_proj", "gate_proj", "down_proj"].map(|name| format!("model.layers.0.mlp.{name}.weight"));
    folder.write("model.safetensors", serialize(&names.map(|name| Tensor::random(&name, Dtype::BF16, &shape))));
    let weights = (3 * shape[0] * shape[1]) as f64;
    for (flags, scales, absmax) in [
        (&["--format", "nf4"][..], 4.0 / 64.0, 0.0),
        (&["--format", "fp4", "--block-size", "32"], 4.0 / 32.0, 0.0),
        (&["--format", "nf4", "--double-quant"], 4.0 / 64.0, 1.0 / 64.0),
        (&["--format", "int4"], 2.0 / 128.0, 0.0),
        (&["--format", "int4", "--group-size", "channel"], 2.0 / 1024.0, 0.0),
        (&["--format", "int4-asym", "--group-size", "32"], 3.0 / 32.0, 0.0),
        (&["--format", "nvfp4"], 1.0 / 16.0, 0.0),
        (&["--format", "nvfp4", "--layout", "modelopt"], 1.0 / 16.0, 0.0),
        (&["--format", "mxfp4"], 1.0 / 32.0, 0.0),
    ] {
        let (to, used) = (folder.beside(&flags.concat()), folder.beside("report"));
        convert(&folder, &to, flags, &[("FAKE_CUDA_REPORT", used.to_str().unwrap())]).ok();
        let used = report(&used);
        let [there, back] = ["to_device", "to_host"].map(|way| used[way] as f64 / weights);
        // For double quantization absmax go there again, and come back in 8 bits.
        assert!(there >= 2.0 && there <= 2.0 + 4.0 * absmax, "{flags:?}: {there} bytes per weight");
        let rest = back - 0.5 - scales - absmax * (1.0 + 4.0 / 256.0);
        assert!((0.0..=0.1).contains(&rest), "{flags:?}: {rest} bytes of figures per weight");
    }
}

/// A layer's gate and up, which share NVFP4's scale of scales, in two files; and a tensor that shares it with none.
fn checkpoint_with_sets() -> Folder {
    let folder = Folder::new("llama");
    let linear = |layer: usize, name: &str, dtype| {
        Tensor::random(&format!("model.layers.{layer}.mlp.{name}.weight"), dtype, &[130, 512])
    };
    folder.write_shards(&[
        vec![linear(0, "gate_proj", Dtype::BF16), linear(0, "down_proj", Dtype::F32)],
        vec![linear(0, "up_proj", Dtype::BF16), linear(1, "up_proj", Dtype::F16), linear(1, "gate_proj", Dtype::F16)],
    ]);
    folder
}

#[test]
fn tensors_that_share_a_scale_cross_the_link_once_where_a_slot_takes_them() {
    let folder = checkpoint_with_sets();
    let bytes = (130 * 512 * (4 * 2 + 4)) as u64;
    for layout in ["compressed-tensors", "modelopt"] {
        let flags = ["--format", "nvfp4", "--layout", layout, "--include", "_proj"];
        let expected = on_the_cpu(&folder, &flags);
        for (memory, is_measured_there) in [("64MiB", true), ("1MiB", false)] {
            let (to, used) = (folder.beside(&[layout, memory].concat()), folder.beside("report"));
            let settings = [("FAKE_CUDA_REPORT", used.to_str().unwrap())];
            convert(&folder, &to, &[&flags[..], &["--device-memory", memory]].concat(), &settings).ok();
            assert!(contents(&to) == expected, "{layout}, {memory}");
            let used = report(&used);
            assert_eq!(used["to_device"], bytes, "{layout}, {memory}");
            assert_eq!(used.contains_key("largest_bf16"), is_measured_there, "{layout}, {memory}: {used:?}");
            assert_eq!(used["leaked:0"], 0);
        }
    }
}

#[test]
fn a_set_that_a_slot_ran_out_of_memory_in_is_finished_in_another() {
    let folder = checkpoint_with_sets();
    let flags = ["--format", "nvfp4", "--max-shard-size", "80kB", "--threads", "2", "--include", "_proj"];
    let expected = on_the_cpu(&folder, &flags);
    for call in 1..=12 {
        let failure = format!("cuLaunchKernel:{call}:2");
        let to = folder.beside(&failure);
        convert(&folder, &to, &flags, &[("FAKE_CUDA_FAIL", &failure)]).ok();
        assert!(contents(&to) == expected, "{failure}");
    }
}

#[test]
fn a_set_with_what_is_not_finite_is_what_it_is_on_the_cpu() {
    let folder = Folder::new("llama");
    let name = |name: &str| format!("model.layers.0.mlp.{name}.weight");
    let mut odd = Tensor::random(&name("up_proj"), Dtype::BF16, &[64, 512]);
    odd.data[2 * 777..][..2].copy_from_slice(&0x7f80u16.to_le_bytes());
    let other = Tensor::random(&name("gate_proj"), Dtype::BF16, &[64, 512]);
    folder.write("model.safetensors", serialize(&[other, odd]));
    for device in ["cuda", "cpu"] {
        let flags = ["--format", "nvfp4", "--device", device];
        convert(&folder, &folder.beside(device), &flags, &[]).fails(3, &["up_proj", "(inf) at element 777"]);
    }
}

#[test]
fn in_groups_too_what_is_not_finite_is_what_it_is_on_the_cpu() {
    let mut tensor = Tensor::random(LINEAR, Dtype::F16, &[300, 640]);
    for (i, bits) in [(CHUNK + 3, 0x7e00u16), (CHUNK + 900, 0xfc00), (300 * 640 - 1, 0x7c00)] {
        tensor.data[2 * i..][..2].copy_from_slice(&bits.to_le_bytes());
    }
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&[tensor]));
    let words = ["holds 3 values that are not finite", "(NaN) at element 65539"];
    for format in ["int4", "int4-asym", "mxfp4", "nvfp4"] {
        let flags = [&["--format", format], &LITTLE[..]].concat();
        convert(&folder, &folder.beside(format), &flags, &[]).fails(3, &words);
    }
}

#[test]
fn the_kernels_for_groups_are_compiled_before_anything_is_written_and_only_for_groups() {
    let folder = checkpoint_for_groups();
    let fails = [("FAKE_CUDA_FAIL", "cuModuleLoadData:2:218")];
    let words = ["cuModuleLoadData", "218", "cuda:0", "--device cpu"];
    convert(&folder, &folder.destination(), &["--format", "mxfp4"], &fails).fails(4, &words);
    assert!(!folder.destination().exists());
    convert(&folder, &folder.destination(), &[], &fails).ok();
}

#[test]
fn device_memory_is_bounded_and_all_of_it_freed() {
    let folder = checkpoint();
    // The least for one slot of f32, which is said when it is too little; for three; and more than is of use.
    let blocks = CHUNK / 64;
    let slot = 4 * CHUNK + CHUNK / 2 + 16 * blocks + 25 * blocks / 16;
    for bytes in [slot + 4096, 3 * (slot + 4096) - 1, 3 * slot + 4096, 2 << 20, 64 << 20] {
        let bytes = bytes as u64;
        let memory = &bytes.to_string();
        let (to, used) = (folder.beside(memory), folder.beside("report"));
        let settings = [("FAKE_CUDA_REPORT", used.to_str().unwrap())];
        convert(&folder, &to, &["--device-memory", memory, "--threads", "4"], &settings).ok();
        let used = report(&used);
        assert!(used["peak:0"] <= bytes, "{memory}: {used:?}");
        assert_eq!((used["leaked:0"], used["open"]), (0, 0), "{memory}: {used:?}");
    }
}

#[test]
fn at_least_three_streams_overlap_where_there_is_room_for_them() {
    let folder = checkpoint();
    let used = folder.beside("report");
    // One thread that was asked for, and those that wait for the GPU.
    let flags = [&["--threads", "1"], &LITTLE[..]].concat();
    convert(&folder, &folder.destination(), &flags, &[("FAKE_CUDA_REPORT", used.to_str().unwrap())]).ok();
    assert!(report(&used)["streams"] >= 3, "{:?}", report(&used));
}

#[test]
fn several_gpus_share_the_work() {
    let folder = checkpoint();
    let used = folder.beside("report");
    let flags = [&["--device", "cuda:0,cuda:1", "--double-quant", "--threads", "4"], &LITTLE[..]].concat();
    let settings = [("FAKE_CUDA_DEVICES", "2"), ("FAKE_CUDA_REPORT", used.to_str().unwrap())];
    convert(&folder, &folder.destination(), &flags, &settings).ok();
    assert!(contents(&folder.destination()) == on_the_cpu(&folder, &["--double-quant"]));
    let used = report(&used);
    // More than the tables, that is: both had slots.
    assert!(used["peak:0"] > 100_000 && used["peak:1"] > 100_000, "{used:?}");
}

#[test]
fn a_fault_names_the_call_and_the_conversion_can_be_gone_on_with() {
    let folder = checkpoint();
    let flags = [&["--double-quant", "--max-shard-size", "150kB"], &LITTLE[..]].concat();
    let expected = on_the_cpu(&folder, &flags);
    let calls = [
        "cuMemAlloc",
        "cuMemHostAlloc",
        "cuStreamCreate",
        "cuEventCreate",
        "cuMemcpyHtoDAsync",
        "cuLaunchKernel",
        "cuMemcpyDtoHAsync",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuCtxSetCurrent",
    ];
    for (i, call) in calls.into_iter().enumerate() {
        for number in [1, 2, 3, 7] {
            let made_at_start = number <= 3 && call == "cuMemAlloc" || number == 1 && call == "cuCtxSetCurrent";
            let code = if i % 2 == 0 { "214" } else { "719" };
            let to = folder.beside(&format!("{call}-{number}"));
            let failure = format!("{call}:{number}:{code}");
            // Once in a while another thread's call meets the lost GPU in the instant before this one's failure is noted.
            let mut tries = (0..9).map(|_| convert(&folder, &to, &flags, &[("FAKE_CUDA_FAIL", &failure)]));
            let failed = tries.find(|run| run.code == 0 || run.stderr.contains(call)).unwrap();
            if failed.code == 0 {
                // So few slots were made that there was no such call.
                assert!(["cuStreamCreate", "cuEventCreate", "cuMemHostAlloc"].contains(&call), "{failure}");
                continue;
            }
            failed.fails(4, &[call, code, "cuda:0", "--device cpu"]);
            assert!(!to.join("config.json").exists() && !to.join("prequant.json").exists(), "{failure}");
            assert!(!(made_at_start && to.exists()), "{failure}: written to before the GPU was ready");
            // On the GPU again, or without it.
            let other = if number % 2 == 0 { "cuda" } else { "cpu" };
            convert(&folder, &to, &[&flags[..], &["--device", other]].concat(), &[]).ok();
            assert!(contents(&to) == expected, "{failure}");
        }
    }
}

#[test]
fn when_device_memory_runs_out_on_the_way_fewer_slots_do() {
    let folder = checkpoint();
    let expected = on_the_cpu(&folder, &["--double-quant"]);
    // Three are for the tables; then three for each slot.
    for failure in
        ["cuMemAlloc:7:2", "cuMemAlloc:9:2", "cuMemHostAlloc:3:2", "cuLaunchKernel:2:2", "cuEventSynchronize:5:2"]
    {
        let to = folder.beside(failure);
        let flags = [&["--double-quant", "--threads", "4"], &LITTLE[..]].concat();
        convert(&folder, &to, &flags, &[("FAKE_CUDA_FAIL", failure)]).ok();
        assert!(contents(&to) == expected, "{failure}");
    }
}

#[test]
fn when_memory_runs_out_for_the_only_slot_it_is_an_error_that_can_be_gone_on_from() {
    let folder = Folder::llama();
    let to = folder.destination();
    let flags = ["--device-memory", "200KiB"];
    for failure in ["cuMemAlloc:4:2", "cuMemHostAlloc:1:2", "cuLaunchKernel:1:2"] {
        let (call, _) = failure.split_once(':').unwrap();
        convert(&folder, &to, &flags, &[("FAKE_CUDA_FAIL", failure)]).fails(4, &[call, "OUT_OF_MEMORY"]);
    }
    convert(&folder, &to, &flags, &[]).ok();
    assert!(contents(&to) == on_the_cpu(&folder, &[]));
}

#[test]
fn values_that_are_not_finite_are_what_they_are_on_the_cpu() {
    let mut tensor = Tensor::random(LINEAR, Dtype::F16, &[3, CHUNK - 5]);
    for (i, bits) in [(CHUNK + 3, 0x7e00u16), (CHUNK + 900, 0xfc00), (3 * (CHUNK - 5) - 1, 0x7c00)] {
        tensor.data[2 * i..][..2].copy_from_slice(&bits.to_le_bytes());
    }
    let folder = Folder::new("llama");
    folder.write("model.safetensors", serialize(&[tensor]));
    let words = ["holds 3 values that are not finite", "(NaN) at element 65539"];
    convert(&folder, &folder.destination(), &LITTLE, &[]).fails(3, &words);
    convert(&folder, &folder.destination(), &["--device", "cpu"], &[]).fails(3, &words);

    convert(&folder, &folder.destination(), &[&["--nonfinite", "keep"], &LITTLE[..]].concat(), &[]).ok();
    assert!(contents(&folder.destination()) == on_the_cpu(&folder, &["--nonfinite", "keep"]));
}

#[test]
fn a_gpu_that_is_asked_for_and_can_not_be_used_is_an_error_before_anything_is_written() {
    let folder = Folder::llama();
    let to = folder.destination();
    for (settings, device, words) in [
        (&[("FAKE_CUDA_DEVICES", "0")][..], "cuda", "finds no GPU"),
        (&[("FAKE_CUDA_DEVICES", "2")], "cuda:2", "no such GPU; 2 found"),
        (&[("FAKE_CUDA_VERSION", "11070")], "cuda", "serves CUDA 11.7, and 12.0 is needed: install driver 525"),
        (&[("FAKE_CUDA_CAPABILITY", "70")], "cuda", "compute capability 7.0, and 7.5"),
        (&[("FAKE_CUDA_FREE", "1000000")], "cuda:0", "998 kB of memory free, and"),
        (&[("FAKE_CUDA_FAIL", "cuInit:1:999")], "cuda", "cuInit failed: CUDA_ERROR_UNKNOWN (999)"),
        (&[("FAKE_CUDA_FAIL", "cuModuleLoadData:1:218")], "cuda", "cuModuleLoadData failed"),
        (&[("LD_LIBRARY_PATH", NO_DRIVER.path().to_str().unwrap())], "cuda", "no NVIDIA driver is installed"),
    ] {
        convert(&folder, &to, &["--device", device], settings).fails(4, &[device, words, "--device cpu"]);
        assert!(!to.exists(), "{settings:?}");
    }
    convert(&folder, &to, &["--device-memory", "100KiB"], &[]).fails(2, &["--device-memory", "at least"]);
    assert!(!to.exists());
}

/// A Linear of so many bytes in a file that is one hole: what reads headers alone is fast.
fn large(bytes: u64) -> Folder {
    let folder = Folder::new("llama");
    let (rows, len) = (bytes / 8192, bytes / 8192 * 8192);
    let header = format!("{{\"{LINEAR}\":{{\"dtype\":\"BF16\",\"shape\":[{rows},4096],\"data_offsets\":[0,{len}]}}}}");
    folder.write("model.safetensors", with_header(&header, &[]));
    let file = std::fs::OpenOptions::new().write(true).open(folder.source().join("model.safetensors")).unwrap();
    file.set_len(8 + header.len() as u64 + len).unwrap();
    folder
}

/// The line about the device of a dry run with `--device auto`, and its fields in JSON.
fn chosen(folder: &Folder, threads: &str, settings: &[(&str, &str)]) -> (String, [serde_json::Value; 2]) {
    let flags = ["--device", "auto", "--dry-run", "--threads", threads];
    let said = convert(folder, &folder.destination(), &flags, settings).ok().stdout;
    let line = said.lines().find(|line| line.starts_with("device:")).unwrap();
    let json = convert(folder, &folder.destination(), &[&flags[..], &["--json"]].concat(), settings).ok().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    (line.to_owned(), ["device", "device_reason"].map(|field| json[field].clone()))
}

#[test]
fn auto_takes_a_usable_gpu_for_much_work_and_else_says_why_it_is_the_cpu() {
    let folder = large(64_000_000_000);
    let (line, [device, why]) = chosen(&folder, "1", &[]);
    assert!(
        line.contains("cuda:0 (Fake GPU), CUDA 12.4 driver: quantizing alone would take 1 thread about "),
        "{line}"
    );
    assert_eq!(device, "cuda:0 (Fake GPU)");
    assert!(why.as_str().unwrap().starts_with("quantizing alone would take 1 thread about "), "{why}");
    for (settings, words) in [
        (&[("FAKE_CUDA_DEVICES", "0")][..], "the NVIDIA driver finds no GPU"),
        (&[("FAKE_CUDA_VERSION", "11040")], "the NVIDIA driver serves CUDA 11.4"),
        (&[("FAKE_CUDA_FREE", "1000000")], "Fake GPU has 998 kB of memory free"),
        (&[("LD_LIBRARY_PATH", NO_DRIVER.path().to_str().unwrap())], "no NVIDIA driver is installed"),
    ] {
        let (line, [device, why]) = chosen(&folder, "1", settings);
        assert!(line.contains("CPU (") && line.contains(&format!("): {words}")), "{line}");
        assert!(device.as_str().unwrap().starts_with("CPU (") && why.as_str().unwrap().starts_with(words), "{why}");
    }
}

#[test]
fn auto_starts_no_gpu_where_it_would_gain_nothing() {
    let small = Folder::llama();
    let words = "sources below 8 GB are converted sooner without a GPU";
    let used = small.beside("report");
    for (folder, threads, words) in
        [(&small, "1", words), (&large(9_000_000_000), "1000", "quantizing takes 1000 threads about 0.")]
    {
        let settings = [("FAKE_CUDA_REPORT", used.to_str().unwrap())];
        let (line, [device, why]) = chosen(folder, threads, &settings);
        assert!(line.contains(&format!("): {words}")), "{line}");
        assert!(device.as_str().unwrap().starts_with("CPU (") && why.as_str().unwrap().starts_with(words), "{why}");
    }
    let run = convert(&small, &small.destination(), &["--device", "auto"], &[("FAKE_CUDA_FAIL", "cuInit:1:999")]).ok();
    assert!(run.stderr.contains(words), "{}", run.stderr);
    assert!(!used.exists(), "the driver was started");
    // What is asked for is taken, however little there is to do.
    let said = convert(&small, &small.beside("asked"), &["--device", "cuda"], &[]).ok().stderr;
    assert!(said.starts_with("device: cuda:0 (Fake GPU), CUDA 12.4 driver; memory: at most 256MiB\n"), "{said}");
}

#[test]
fn a_dry_run_shows_device_ring_and_device_memory_and_uses_none() {
    let folder = checkpoint();
    let used = folder.beside("report");
    let settings = [("FAKE_CUDA_REPORT", used.to_str().unwrap())];
    let said = convert(&folder, &folder.destination(), &["--dry-run", "--threads", "2"], &settings).ok().stdout;
    let line = |start: &str| said.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{said}"));
    assert!(line("device:").contains("cuda:0 (Fake GPU)"));
    assert!(line("ring:").contains("5 slots of ") && line("ring:").contains(" of GPU memory at most"), "{said}");
    assert!(!folder.destination().exists());
    assert!(!report(&used).contains_key("quantize_nf4_bf16"));

    let json = convert(&folder, &folder.destination(), &["--dry-run", "--json", "--threads", "2"], &settings).ok();
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&json["device"], &json["ring_slots"]), (&"cuda:0 (Fake GPU)".into(), &5.into()));
    let peak = json["peak_device_memory"].as_u64().unwrap();
    assert!(peak > 5 << 20 && peak <= 256 << 20, "{peak}");
}

#[test]
fn verify_quantizes_again_on_the_gpu() {
    let folder = checkpoint();
    let (source, to) = (folder.source(), folder.destination());
    convert(&folder, &to, &["--device", "cpu", "--double-quant"], &[]).ok();
    let arguments = ["verify", to.to_str().unwrap(), "--against", source.to_str().unwrap(), "--device", "cuda"];
    let used = folder.beside("report");
    prequant(&arguments, &[("FAKE_CUDA_REPORT", used.to_str().unwrap())]).ok();
    assert!(report(&used)["quantize_absmax"] > 0);
}

#[test]
fn what_is_no_device_is_wrong_usage() {
    let folder = Folder::llama();
    for device in ["gpu", "cuda:0,cuda:0", "cuda:x", "cpu,cuda"] {
        convert(&folder, &folder.destination(), &["--device", device], &[]).fails(2, &["--device"]);
    }
}

#[test]
fn a_source_on_the_list_of_fixtures_converts_on_the_gpu() {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    let folder = Folder::llama();
    let (to, cpu) = (folder.beside("gpu"), folder.beside("cpu"));
    for (to, device) in [(&to, "auto"), (&cpu, "cpu")] {
        prequant(&["convert", fixture.to_str().unwrap(), to.to_str().unwrap(), "--device", device], &[]).ok();
    }
    assert!(contents(&to) == contents(&cpu));
}
