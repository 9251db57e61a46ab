//! Every output is what it was: the hashes of what each format, layout, arrangement of experts and kind of source comes to, and of
//! what `--dry-run` says beforehand, held against `tests/data/net.json`.
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

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::Value;
use sha2::{Digest, Sha256};

use sources::{Recipe, Source};
use support::{Run, contents};

/// What a case's files hash to, by their names.
type Record = BTreeMap<String, String>;

/// Manifest keys that tell of the program and its options rather than of the output.
const OF_THE_PROGRAM: [&str; 3] = ["recipe", "schema_version", "tool"];

/// Keys of `--dry-run --json` that tell of the machine, or of the options.
const OF_THE_MACHINE: [&str; 5] = ["destination", "device", "disk_free", "recipe", "threads"];

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

/// Checkpoints of manifest schema 1 (see scripts/make converted) are still read.
#[test]
fn what_0_1_0_wrote_is_verified_inspected_and_dequantized() {
    let temporary = tempfile::tempdir().unwrap();
    let names =
        fs::read_dir(converted_by_0_1_0("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let names: Vec<String> = names.filter(|name| !name.starts_with("source")).collect();
    assert_eq!(names.len(), 10);
    for name in names {
        let converted = converted_by_0_1_0(&name);
        let run = |arguments: &[&OsStr]| Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).args(arguments)).ok();
        run(&["verify".as_ref(), converted.as_ref()]);
        let inspected = run(&["inspect".as_ref(), converted.as_ref()]).stdout;
        let format = if name.starts_with("int4-asym") { &name } else { name.split('-').next().unwrap() };
        assert!(inspected.contains(&format!("{format} ")), "{name}: {inspected}");
        run(&["dequantize".as_ref(), converted.as_ref(), temporary.path().join(&name).as_ref()]);
    }
}

/// There and back gives the same weights, and a manifest of today.
#[test]
fn what_0_1_0_wrote_is_rewritten_with_other_experts() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, other, experts) in [("nf4", "nf4-fused", "fuse"), ("nf4-fused", "nf4", "keep")] {
        let to = temporary.path().join(name);
        prequant("convert", &converted_by_0_1_0(name), &to, &["--experts", experts, "--device", "cpu"]).ok();
        let [found, expected] =
            [&to, &converted_by_0_1_0(other)].map(|folder| contents(folder)["model.safetensors"].clone());
        assert!(found == expected, "{name}: not what 0.1.0 gave with --experts {experts}");
        let manifest: Value = serde_json::from_slice(&fs::read(to.join("prequant.json")).unwrap()).unwrap();
        assert_eq!((&manifest["schema_version"], &manifest["recipe"]["experts"]), (&2.into(), &experts.into()));
        assert_eq!(manifest["recipe"].get("group_size"), None);
        Run::of(Command::new(env!("CARGO_BIN_EXE_prequant")).arg("verify").arg(&to)).ok();
    }
}

/// A rerun into what 0.1.0 finished neither takes it for its own nor replaces it unasked.
#[test]
fn what_0_1_0_wrote_is_not_taken_for_what_this_version_writes() {
    let temporary = tempfile::tempdir().unwrap();
    let to = temporary.path().join("converted");
    copy_folder(&converted_by_0_1_0("nf4"), &to);
    let source = converted_by_0_1_0("source");
    let words = ["prequant 0.1.0 (manifest schema 1) wrote", "--against", "--force"];
    prequant("convert", &source, &to, &["--device", "cpu"]).fails(3, &words);
    prequant("convert", &source, &to, &["--device", "cpu", "--force"]).ok();
    let again = prequant("convert", &source, &to, &["--device", "cpu"]).ok();
    assert!(again.stdout.contains("\"seconds\":0.0"), "{}", again.stdout);
}

/// A checkpoint as 0.1.0 wrote it.
fn converted_by_0_1_0(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/converted-0.1.0").join(name)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    contents(from).into_iter().for_each(|(name, bytes)| fs::write(to.join(name), bytes).unwrap());
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
                    "prequant.json" => hash(self.without(&text(), &OF_THE_PROGRAM).as_bytes()),
                    "SHA256SUMS" => hash(without_line_of_manifest(&text()).as_bytes()),
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

fn without_line_of_manifest(sums: &str) -> String {
    sums.split_inclusive('\n').filter(|line| !line.ends_with("  prequant.json\n")).collect()
}

/// The first half of a SHA-256: enough to tell files apart, and lines stay short.
fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes)[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}
