//! Every output is what it was: the hashes of what each format, layout, arrangement of experts and kind of source comes to, and of
//! what `--dry-run` says beforehand, compared with `tests/data/net.json`. Files of weights are compared tensor by tensor.
//!
//! Where outputs change on purpose, write the file anew, look at its difference and say in the changelog whose bytes changed:
//!
//!     PREQUANT_BLESS=1 cargo test --test net
//!
//! To see what differs, run it with two programs, and compare the folders that it then leaves:
//!
//!     PREQUANT_NET_KEEP=/tmp/old PREQUANT_NET_BINARY=path/to/another/prequant cargo test --test net
//!     PREQUANT_NET_KEEP=/tmp/new cargo test --test net
//!     diff -r /tmp/old /tmp/new

mod sources;
#[path = "../support/mod.rs"]
mod support;
mod versions;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use safetensors::SafeTensors;
use serde_json::Value;
use sha2::{Digest, Sha256};

use sources::{Recipe, Source};
use support::{Run, contents};

/// What a case's files hash to, by their names.
type Record = BTreeMap<String, String>;

/// Manifest keys that tell of the program and its options rather than of the output.
const OF_THE_PROGRAM: [&str; 3] = ["recipe", "schema_version", "tool"];

/// Keys of `--dry-run --json` that tell of the machine, of the options, of sizes with headers in them, or what the manifest has.
const OF_THE_MACHINE: [&str; 13] = [
    "destination",
    "device",
    "device_reason",
    "disk_free",
    "disk_needed",
    "files",
    "left_out",
    "output_bytes",
    "peak_device_memory",
    "peak_memory",
    "recipe",
    "side_files",
    "threads",
];

#[test]
fn every_output_is_what_it_was() {
    let temporary = tempfile::tempdir().unwrap();
    let kept = env::var_os("PREQUANT_NET_KEEP").map(PathBuf::from);
    if let Some(folder) = &kept {
        fs::create_dir(folder).expect("PREQUANT_NET_KEEP: a folder that isn't there yet");
    }
    let net = Net {
        root: kept.clone().unwrap_or(temporary.path().to_owned()),
        keep: kept.is_some(),
        cases: Mutex::default(),
    };
    net.run(&sources::all(&net.root));
    let found = net.cases.into_inner().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/net.json");
    if env::var_os("PREQUANT_BLESS").is_some() {
        fs::write(&path, serde_json::to_string_pretty(&found).unwrap() + "\n").unwrap();
        return;
    }
    let expected = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let different = differences(&expected, &found);
    assert!(
        different.is_empty(),
        "{} outputs are not what they were; the head of tests/net/main.rs says how to compare them:\n{}",
        different.len(),
        different[..different.len().min(40)].join("\n")
    );
}

fn differences(expected: &BTreeMap<String, Record>, found: &BTreeMap<String, Record>) -> Vec<String> {
    let nothing = Record::new();
    let mut lines = Vec::new();
    for case in expected.keys().chain(found.keys()).collect::<BTreeSet<_>>() {
        let [was, is] = [expected, found].map(|cases| cases.get(case).unwrap_or(&nothing));
        for file in was.keys().chain(is.keys()).collect::<BTreeSet<_>>() {
            let [was, is] = [was, is].map(|record| record.get(file).map_or("not there", String::as_str));
            if was != is {
                lines.push(format!("{case}: {file} was {was}, is {is}"));
            }
        }
    }
    lines
}

struct Net {
    root: PathBuf,
    keep: bool,
    cases: Mutex<BTreeMap<String, Record>>,
}

impl Net {
    /// All cases of all sources, several at a time: most of their time is waiting for the disk.
    fn run(&self, sources: &[Source]) {
        let all: Vec<(&Source, &Recipe)> =
            sources.iter().flat_map(|source| source.recipes.iter().map(move |recipe| (source, recipe))).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((source, recipe)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.conversions(source, recipe);
            }
        };
        thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(work))));
    }

    /// A source converted, and what its outputs are in turn converted to.
    fn conversions(&self, source: &Source, (recipe, flags): &Recipe) {
        let blocks = !["int4", "nvfp4", "mxfp4"].iter().any(|format| recipe.starts_with(format));
        // That others aren't fused is recorded once.
        let refusals = source.name == "bf16";
        for (experts, other) in [("keep", "fuse"), ("fuse", "keep")] {
            if experts == "fuse" && !blocks && !refusals {
                continue;
            }
            let case = format!("{} / {recipe} / {experts}", source.name);
            let flags = [source.flags, flags, &["--experts", experts]].concat();
            let Some(converted) = self.convert(&case, &source.path, &flags) else { continue };
            if blocks || refusals {
                let case = format!("{case} / as {other}");
                let relaid = self.convert(&case, &converted, &["--experts", other]);
                relaid.into_iter().for_each(|folder| self.remove(&folder));
            }
            self.dequantize(&format!("{case} / dequantize"), &converted);
            self.remove(&converted);
        }
    }

    /// Converts, records files and what `--dry-run` says of them, and gives the folder; none if it is refused.
    fn convert(&self, case: &str, from: &Path, flags: &[&str]) -> Option<PathBuf> {
        let to = self.folder(case);
        let flags = [flags, &["--device", "cpu"]].concat();
        let dry = prequant("convert", from, &to, &[&flags[..], &["--dry-run"]].concat());
        assert!(!to.exists(), "{case}: --dry-run wrote something");
        let mut record = Record::new();
        match refused(&dry) {
            Some(refusal) => record.insert("dry-run".to_owned(), refusal),
            None => record.insert("dry-run".to_owned(), hash(self.without(&dry.stdout, &OF_THE_MACHINE).as_bytes())),
        };
        let run = prequant("convert", from, &to, &flags);
        self.record(case, &run, &to, record)
    }

    fn dequantize(&self, case: &str, from: &Path) {
        let to = self.folder(case);
        let run = prequant("dequantize", from, &to, &[]);
        self.record(case, &run, &to, Record::new());
        self.remove(&to);
    }

    fn record(&self, case: &str, run: &Run, to: &Path, mut record: Record) -> Option<PathBuf> {
        let refusal = refused(run);
        if let Some(refusal) = &refusal {
            record.insert("refused".to_owned(), refusal.clone());
        } else {
            record.extend(contents(to).into_iter().map(|(name, bytes)| {
                let text = || String::from_utf8(bytes.clone()).unwrap();
                let hash = match name.as_str() {
                    "prequant.json" => hash(self.without(&without_weights(&text()), &OF_THE_PROGRAM).as_bytes()),
                    "SHA256SUMS" => hash(without_weights_and_manifest(&text()).as_bytes()),
                    weights if weights.ends_with(".safetensors") => hash_tensors(&bytes),
                    _ => hash(&bytes),
                };
                (name, hash)
            }));
        }
        let before = self.cases.lock().unwrap().insert(case.to_owned(), record);
        assert!(before.is_none(), "two cases are named {case:?}");
        refusal.is_none().then(|| to.to_owned())
    }

    /// A JSON object without some of its keys and without the paths of this run.
    fn without(&self, json: &str, keys: &[&str]) -> String {
        let mut object: Value = serde_json::from_str(&json.replace(self.root.to_str().unwrap(), "ROOT")).unwrap();
        keys.iter().for_each(|key| drop(object.as_object_mut().unwrap().shift_remove(*key)));
        object.to_string()
    }

    fn folder(&self, case: &str) -> PathBuf {
        self.root.join(case.replace(" / ", ", "))
    }

    fn remove(&self, folder: &Path) {
        if !self.keep && folder.exists() {
            fs::remove_dir_all(folder).unwrap();
        }
    }
}

fn prequant(command: &str, from: &Path, to: &Path, flags: &[&str]) -> Run {
    let program = env::var_os("PREQUANT_NET_BINARY").unwrap_or(env!("CARGO_BIN_EXE_prequant").into());
    let arguments = [OsStr::new(command), from.as_os_str(), to.as_os_str()];
    Run::of(Command::new(program).args(arguments).args(flags).args(["--threads", "2", "--json"]))
}

/// Exit code and kind of error, whose words may change.
fn refused(run: &Run) -> Option<String> {
    if run.code == 0 {
        return None;
    }
    let report: Value = serde_json::from_str(&run.stdout).unwrap_or_else(|_| panic!("no report: {run:?}"));
    Some(format!("{} {}", run.code, report["error"]["kind"].as_str().unwrap()))
}

/// What doesn't depend on the order of tensors in a file.
fn without_weights_and_manifest(sums: &str) -> String {
    let left_out = |line: &&str| [".safetensors\n", "  prequant.json\n"].iter().any(|end| line.ends_with(end));
    sums.split_inclusive('\n').filter(|line| !left_out(line)).collect()
}

/// A manifest without the hashes and sizes of whole files of weights: each tensor has its own, and offsets in a header take more
/// or fewer digits.
fn without_weights(manifest: &str) -> String {
    let mut manifest: Value = serde_json::from_str(manifest).unwrap();
    for file in manifest["files"].as_array_mut().unwrap() {
        if file["name"].as_str().unwrap().ends_with(".safetensors") {
            ["sha256", "size"].iter().for_each(|key| drop(file.as_object_mut().unwrap().shift_remove(*key)));
        }
    }
    manifest["summary"].as_object_mut().unwrap().shift_remove("output_bytes");
    manifest.to_string()
}

/// The hash of a file's tensors with their names, dtypes and shapes, whatever their order.
fn hash_tensors(file: &[u8]) -> String {
    let read = SafeTensors::deserialize(file).unwrap();
    let mut tensors: Vec<String> = (read.iter())
        .map(|(name, tensor)| format!("{name} {} {:?} {}\n", tensor.dtype(), tensor.shape(), hash(tensor.data())))
        .collect();
    tensors.sort();
    hash(tensors.concat().as_bytes())
}

/// The first half of a SHA-256: enough to tell files apart, and lines stay short.
fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes)[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}
