//! Conversions that are stopped: by failing disks, signals and kills. What is left is never taken for a checkpoint, and
//! the same command resumes to the very same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use prequant::internal::ops::quantize::plan;
use prequant::internal::ops::verify::{Options as VerifyOptions, verify};
use prequant::internal::store::{Fault, FaultyStore, LocalStore, Location};
use prequant::{Conversion, Error, ManifestHead, Options, Progress, Recipe, RecipeOptions, Sha256Hash};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use crate::support::{Folder, Tensor, contents, file_names, serialize};

const STAGING: &str = ".prequant-staging";

/// Nine weights, each a shard of its own.
fn checkpoint() -> Folder {
    let folder = Folder::new("llama");
    let weight = |i| Tensor::random(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::BF16, &[64, 128]);
    let halves = (0..9).map(weight).collect::<Vec<_>>();
    folder.write_shards(&[halves[..5].to_vec(), halves[5..].to_vec()]);
    folder.write("tokenizer.json", "{}");
    folder
}

fn recipe(double_quant: bool) -> Recipe {
    let (double_quant, max_shard_size) = (Some(double_quant), Some(6_000));
    RecipeOptions { double_quant, max_shard_size, ..RecipeOptions::default() }.build().unwrap()
}

const FLAGS: [&str; 2] = ["--max-shard-size", "6kB"];

/// What an uninterrupted run gives.
fn expected(double_quant: bool) -> BTreeMap<String, Vec<u8>> {
    let folder = checkpoint();
    conversion(&folder, double_quant).execute(folder.destination(), &Watch::default()).unwrap();
    contents(&folder.destination())
}

fn conversion(folder: &Folder, double_quant: bool) -> Conversion {
    plan(folder.source(), recipe(double_quant), Options { threads: 2, ..Options::default() }).unwrap()
}

/// Counts what is told.
#[derive(Default)]
struct Watch {
    resumed: AtomicUsize,
    sealed: AtomicUsize,
    kept: AtomicUsize,
}

impl Progress for Watch {
    fn found(&self, _: usize, _: usize) {}

    fn resumed(&self, files: usize, _: u64) {
        self.resumed.store(files, Ordering::Relaxed);
    }

    fn advanced(&self, _: &str, _: u64) {}

    fn sealed(&self, _: &str, _: u64) {
        self.sealed.fetch_add(1, Ordering::Relaxed);
    }

    fn kept(&self, files: usize) {
        self.kept.store(files, Ordering::Relaxed);
    }
}

/// A conversion whose disk fails at the `countdown`th call from now on, and where it would go.
fn failing(folder: &Folder, double_quant: bool, options: Options, fault: Fault, countdown: usize) -> Failing {
    let disk = Arc::new(FaultyStore::new(Arc::new(LocalStore), fault));
    let source = Location::new(disk.clone(), folder.source());
    let conversion = plan(source, recipe(double_quant), options).unwrap();
    disk.arm(countdown);
    Failing { conversion, destination: Location::new(disk, folder.destination()) }
}

struct Failing {
    conversion: Conversion,
    destination: Location,
}

impl Failing {
    fn execute(&self, watch: &Watch) -> prequant::Result<ManifestHead> {
        self.conversion.execute_at(&AtomicBool::new(false), &self.destination, watch)
    }
}

#[test]
fn a_disk_that_fails_anywhere_gives_an_error_and_the_next_run_the_same_bytes() {
    for double_quant in [false, true] {
        let expected = expected(double_quant);
        for fault in [Fault::Stat, Fault::Read, Fault::Write, Fault::StorageFull, Fault::Sync, Fault::EndOfFile] {
            for countdown in [1, 2, 5, 9, 17, 60, 150, 250, 400] {
                let folder = checkpoint();
                let (watch, to) = (Watch::default(), folder.destination());
                let options = Options { threads: 2, ..Options::default() };
                let result = failing(&folder, double_quant, options, fault, countdown).execute(&watch);
                if let Err(error) = &result {
                    let right = match fault {
                        Fault::EndOfFile => matches!(error, Error::SourceChanged { .. } | Error::Io { .. }),
                        _ => matches!(error, Error::Io { .. }),
                    };
                    assert!(right, "{fault:?} {countdown}: {error}");
                    assert!(fault != Fault::StorageFull || error.to_string().contains("make room"), "{error}");
                    only_staging(&to);
                    conversion(&folder, double_quant).execute(&to, &watch).unwrap();
                    assert_eq!(watch.resumed.into_inner(), watch.kept.into_inner(), "{fault:?} {countdown}");
                    assert_eq!(watch.sealed.into_inner(), 9, "sealed files aren't made again");
                }
                assert!(contents(&to) == expected, "{fault:?} {countdown}");
            }
        }
    }
}

/// Nothing but the staging folder is there, and no loader would look into it.
#[track_caller]
fn only_staging(destination: &Path) {
    if destination.exists() {
        let names: Vec<_> = fs::read_dir(destination).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [STAGING]);
        let inside = file_names(&destination.join(STAGING));
        assert!(!inside.iter().any(|name| name.starts_with("partial/")), "{inside:?}");
    }
}

/// A disk that is full for the last file, once another one is finished.
fn full_for_the_last_file(ready: PathBuf) -> Arc<FaultyStore> {
    let is_finished = move || file_names(&ready).iter().any(|name| name.ends_with(".safetensors"));
    let at = move |path: &Path| {
        let is_last = path.ends_with("model-00009-of-00009.safetensors");
        while is_last && !is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        is_last
    };
    let disk = Arc::new(FaultyStore::only_at(Arc::new(LocalStore), Fault::StorageFull, at));
    disk.arm(1);
    disk
}

#[test]
fn files_that_were_finished_when_the_disk_was_full_are_the_very_same_in_the_end() {
    for double_quant in [false, true] {
        let folder = checkpoint();
        let to = folder.destination();
        let ready = to.join(STAGING).join("ready");
        let full = Location::new(full_for_the_last_file(ready.clone()), &*to);
        let stopped = conversion(&folder, double_quant).execute_at(&AtomicBool::new(false), &full, &Watch::default());
        assert!(stopped.unwrap_err().to_string().contains("make room"));
        only_staging(&to);
        // Another file, or one that was written to, has another number or time.
        let mark =
            |path: PathBuf| fs::metadata(path).map(|file| (file.ino(), file.mtime(), file.mtime_nsec())).unwrap();
        let weights = file_names(&ready).into_iter().filter(|name| name.ends_with(".safetensors"));
        let sealed: Vec<_> = weights.map(|name| (mark(ready.join(&name)), name)).collect();
        assert!((1..9).contains(&sealed.len()), "{sealed:?}");
        let watch = Watch::default();
        conversion(&folder, double_quant).execute(&to, &watch).unwrap();
        assert_eq!(watch.resumed.into_inner(), sealed.len());
        assert_eq!(watch.sealed.into_inner(), 9 - sealed.len());
        for (before, name) in sealed {
            assert_eq!(mark(to.join(&name)), before, "{name}");
        }
        assert!(contents(&to) == expected(double_quant));
    }
}

#[test]
fn an_interrupt_stops_the_run_and_keeps_what_is_finished() {
    let folder = checkpoint();
    let error = conversion(&folder, false)
        .execute_until(&AtomicBool::new(true), folder.destination(), &Watch::default())
        .unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    assert!(!folder.destination().exists());
}

/// A run stopped after some files, by a disk that failed. With one thread the source's first file is hashed before.
fn stopped_with(options: Options) -> Folder {
    // Whether the disk fails before the first file has its name is for the threads to decide.
    loop {
        let folder = checkpoint();
        let watch = Watch::default();
        assert!(failing(&folder, false, options.clone(), Fault::Sync, 6).execute(&watch).is_err());
        if watch.kept.into_inner() > 0 {
            return folder;
        }
    }
}

fn stopped() -> Folder {
    stopped_with(Options { threads: 2, ..Options::default() })
}

#[test]
fn a_sealed_file_that_was_changed_is_made_again() {
    let folder = stopped();
    let ready = folder.destination().join(STAGING).join("ready");
    let sealed = file_names(&ready).into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
    let mut content = fs::read(ready.join(&sealed)).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(ready.join(&sealed), content).unwrap();
    let run = folder.convert(&FLAGS).ok();
    assert!(run.stderr.contains("from an earlier run"), "{}", run.stderr);
    assert!(run.stderr.contains(&format!("wrote {sealed}")), "{}", run.stderr);
    assert!(contents(&folder.destination()) == expected(false));
}

#[test]
fn a_trace_tells_of_hashing_what_an_earlier_run_finished() {
    let folder = stopped();
    let ready = folder.destination().join(STAGING).join("ready");
    let sealed = file_names(&ready).into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
    let len = fs::metadata(ready.join(&sealed)).unwrap().len();
    let path = folder.beside("run.json");
    folder.convert(&[&FLAGS[..], &["--trace", path.to_str().unwrap()]].concat()).ok();
    let trace: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of_file = events.iter().filter(|event| event["args"]["file"] == sealed.as_str()).collect::<Vec<_>>();
    assert_eq!(of_file.len(), 1, "{of_file:?}");
    assert_eq!((&of_file[0]["name"], &of_file[0]["args"]["bytes"]), (&"hash".into(), &len.into()));
    let name = events.iter().find(|event| event["ph"] == "M" && event["tid"] == of_file[0]["tid"]).unwrap();
    assert!(name["args"]["name"].as_str().unwrap().starts_with("resume "), "{name}");
}

/// A record of this name as a run writes it.
fn as_record(name: &str, content: &Value) -> String {
    let text = content.to_string();
    let hash = Sha256Hash::of(text.as_bytes());
    format!("{text}\n{}", Sha256Hash::of(&[name.as_bytes(), &[0], &hash.0].concat()))
}

/// One digit of a hash or of a statistic says otherwise: the file itself still fits.
#[test]
fn a_file_whose_record_was_altered_is_made_again() {
    for alter in [|text: &str| text.replace("snr_db\":", "snr_db\":1"), |text: &str| text.replacen('a', "b", 1)] {
        let folder = stopped();
        let records = folder.destination().join(STAGING).join("sealed");
        for name in file_names(&records) {
            let text = fs::read_to_string(records.join(&name)).unwrap();
            fs::write(records.join(&name), alter(&text)).unwrap();
        }
        folder.convert(&FLAGS).ok();
        assert!(contents(&folder.destination()) == expected(false));
    }
}

/// Torn, as a kill or a full disk leaves it: as good as none.
#[test]
fn a_torn_note_of_a_source_file_is_taken_again() {
    for len in [0, 7, 32] {
        let folder = stopped_with(Options { threads: 1, hash_source: true, ..Options::default() });
        let records = folder.destination().join(STAGING).join("sealed");
        let note = file_names(&records).into_iter().find(|name| name.ends_with(".source-sha256")).unwrap();
        let text = fs::read(records.join(&note)).unwrap();
        fs::write(records.join(&note), &text[..len]).unwrap();
        folder.convert(&[&FLAGS[..], &["--hash-source"]].concat()).ok();
    }
}

/// A record that was cut, or is of fewer tensors than the file has, proves nothing.
#[test]
fn a_file_whose_record_is_too_short_is_made_again() {
    type Cut = fn(&mut serde_json::Value);
    let cuts: [Cut; 3] = [
        |record| drop(record["tensors"].as_array_mut().unwrap().pop().unwrap()),
        |record| drop(record["tensors"][0]["sha256"].as_array_mut().unwrap().pop().unwrap()),
        |record| *record = json!(record.to_string()[..20]),
    ];
    for cut in cuts {
        let folder = stopped();
        let records = folder.destination().join(STAGING).join("sealed");
        let sealed = file_names(&records).into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
        let text = fs::read(records.join(&sealed)).unwrap();
        let mut record = serde_json::from_slice(&text[..text.len() - 65]).unwrap();
        cut(&mut record);
        fs::write(records.join(&sealed), as_record(&sealed, &record)).unwrap();
        let run = folder.convert(&FLAGS).ok();
        assert!(run.stderr.contains(&format!("wrote {sealed}")), "{}", run.stderr);
        assert!(contents(&folder.destination()) == expected(false));
    }
}

/// A store that sets the flag at the `call`th read of any file, be it to quantize or to hash.
fn interrupted_at(call: usize) -> (Arc<FaultyStore>, Arc<AtomicBool>) {
    let (interrupt, reads) = (Arc::new(AtomicBool::new(false)), AtomicUsize::new(0));
    let flag = interrupt.clone();
    let count = move |_: &Path| {
        flag.fetch_or(reads.fetch_add(1, Ordering::Relaxed) + 1 == call, Ordering::Relaxed);
        false
    };
    (Arc::new(FaultyStore::only_at(Arc::new(LocalStore), Fault::Read, count)), interrupt)
}

/// Interrupts `act` at each read in turn: it says so, or is done and the read was its last. Returns how many reads there are.
#[track_caller]
fn interrupted_at_each_read(act: impl Fn(Arc<FaultyStore>, &AtomicBool) -> prequant::Result<()>) -> usize {
    for call in 1.. {
        let (store, interrupt) = interrupted_at(call);
        match act(store, &interrupt) {
            Err(error) => assert!(matches!(error, Error::Interrupted), "read {call}: {error}"),
            Ok(()) if interrupt.load(Ordering::Relaxed) => {}
            Ok(()) => return call - 1,
        }
    }
    unreachable!()
}

#[test]
fn an_interrupt_at_any_read_is_reported_as_one() {
    let folder = Folder::llama();
    let execute = |store: Arc<FaultyStore>, interrupt: &AtomicBool| {
        let to = folder.beside("interrupted");
        let _ = fs::remove_dir_all(&to);
        let options = Options { threads: 1, hash_source: true, ..Options::default() };
        let conversion = plan(Location::new(store.clone(), folder.source()), Recipe::default(), options)?;
        conversion.execute_at(interrupt, &Location::new(store, &to), &Watch::default()).map(|_| ())
    };
    assert!(interrupted_at_each_read(execute) > 20);

    folder.convert(&[]).ok();
    let verified = |store: Arc<FaultyStore>, interrupt: &AtomicBool| {
        let options = VerifyOptions { threads: 1, interrupt, ..VerifyOptions::default() };
        let report = verify(Location::new(store, folder.destination()), options)?;
        assert_eq!(report.differences, []);
        Ok(())
    };
    assert!(interrupted_at_each_read(verified) > 20);
}

/// What a run hashes of what an earlier one finished.
#[test]
fn an_interrupt_while_sealed_files_are_hashed_is_reported_as_one() {
    let folder = stopped();
    let (store, _) = interrupted_at(0);
    let conversion = conversion(&folder, false);
    let to = Location::new(store, folder.destination());
    let error = conversion.execute_at(&AtomicBool::new(true), &to, &Watch::default()).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    let run = folder.convert(&FLAGS).ok();
    assert!(run.stderr.contains("verified, skipping"), "{}", run.stderr);
}

/// So long that no disk is faster than the signal: a file that is one hole.
#[test]
fn a_signal_stops_verify_with_its_exit_code() {
    let folder = checkpoint();
    folder.convert(&FLAGS).ok();
    let (hole, size) = ("tokenizer.json", 64u64 << 30);
    File::options().write(true).open(folder.destination().join(hole)).unwrap().set_len(size).unwrap();
    let mut manifest = folder.read_json("prequant.json");
    let files = manifest["files"].as_array_mut().unwrap();
    files.iter_mut().filter(|file| file["name"] == hole).for_each(|file| file["size"] = size.into());
    fs::write(folder.destination().join("prequant.json"), manifest.to_string()).unwrap();
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        // One that comes before the command listens ends it otherwise.
        let listens = (1..100).find_map(|attempt| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
            command.arg("verify").arg(folder.destination()).stdout(Stdio::null()).stderr(Stdio::piped());
            let child = command.spawn().unwrap();
            std::thread::sleep(Duration::from_millis(20 * attempt));
            assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
            let output = child.wait_with_output().unwrap();
            output.status.code().map(|found| (found, String::from_utf8_lossy(&output.stderr).into_owned()))
        });
        let (found, words) = listens.expect("verify never listened");
        assert_eq!((found, words.trim_end()), (code, "error: interrupted"));
    }
}

#[test]
fn a_changed_source_or_recipe_is_an_error_that_says_what_changed() {
    let touched = |folder: &Folder, name: &str| {
        let file = File::options().write(true).open(folder.source().join(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
    };
    let shard = "model-00002-of-00002.safetensors";
    type Case<'a> = (&'a dyn Fn(&Folder), &'a [&'a str], &'a str);
    let cases: [Case; 5] = [
        (&|_| {}, &["--max-shard-size", "7kB"], "max_shard_size was 6000, and is 7000"),
        (&|_| {}, &["--max-shard-size", "6kB", "--format", "fp4"], "format was \"nf4\", and is \"fp4\""),
        (&|folder| touched(folder, shard), &FLAGS, "the source's model-00002-of-00002.safetensors was written to"),
        (&|folder| folder.write("config.json", "{\"model_type\": \"qwen3\"}"), &FLAGS, "config.json has changed"),
        (
            &|folder| {
                let weight = |i| format!("model.layers.{i}.mlp.up_proj.weight");
                let other: Vec<Tensor> = (5..9).map(|i| Tensor::random(&weight(i), Dtype::BF16, &[128, 64])).collect();
                folder.write(shard, serialize(&other));
            },
            &FLAGS,
            "the header of the source's model-00002-of-00002.safetensors has changed",
        ),
    ];
    for (change, flags, words) in cases {
        let folder = stopped();
        change(&folder);
        let before = contents(&folder.destination());
        folder.convert(flags).fails(3, &[STAGING, words, "--restart"]);
        let mut after = contents(&folder.destination());
        let lock = format!("{STAGING}/lock");
        after.insert(lock.clone(), before[&lock].clone());
        assert!(after == before, "{words}");
        folder.convert(&[flags, &["--restart"]].concat()).ok();
    }
}

#[test]
fn a_source_whose_content_changed_is_found_by_its_hash() {
    let folder = stopped_with(Options { threads: 1, hash_source: true, ..Options::default() });
    let path = folder.source().join("model-00001-of-00002.safetensors");
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let mut content = fs::read(&path).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&path, content).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    let flags = [&FLAGS[..], &["--hash-source"]].concat();
    folder.convert(&flags).fails(3, &["model-00001-of-00002.safetensors: changed", "SHA-256"]);
    folder.convert(&[&flags[..], &["--restart"]].concat()).ok();
}

#[test]
fn a_source_that_is_written_to_between_plan_and_reading_is_an_error() {
    let folder = checkpoint();
    let conversion = conversion(&folder, false);
    let path = folder.source().join("model-00002-of-00002.safetensors");
    let later = fs::metadata(&path).unwrap().modified().unwrap() + Duration::from_secs(1);
    File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
    let error = conversion.execute(folder.destination(), &Watch::default()).unwrap_err().to_string();
    assert!(
        error.contains("model-00002-of-00002.safetensors: changed while it was read: it was written to"),
        "{error}"
    );
    only_staging(&folder.destination());
}

/// Does something once the first file is finished, while others are being made.
struct AtFirstSeal<'a>(AtomicBool, &'a (dyn Fn() + Sync));

impl Progress for AtFirstSeal<'_> {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn kept(&self, _: usize) {}
    fn sealed(&self, _: &str, _: u64) {
        if !self.0.swap(true, Ordering::Relaxed) {
            self.1();
        }
    }
}

/// A trainer saves its next checkpoint into the same files: same sizes, same headers.
#[test]
fn a_source_that_is_written_to_while_it_is_converted_is_an_error_and_nothing_is_published() {
    let names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"];
    for (name, hash_source) in names.into_iter().flat_map(|name| [(name, false), (name, true)]) {
        let folder = checkpoint();
        let options = Options { threads: 1, hash_source, ..Options::default() };
        let conversion = plan(folder.source(), recipe(false), options).unwrap();
        let path = folder.source().join(name);
        let save = || {
            let mut content = fs::read(&path).unwrap();
            let middle = content.len() - 2;
            content[middle] ^= 1;
            fs::write(&path, content).unwrap();
            let later = std::time::SystemTime::now() + Duration::from_secs(2);
            File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        };
        let error = conversion.execute(folder.destination(), &AtFirstSeal(AtomicBool::new(false), &save)).unwrap_err();
        assert!(matches!(error, Error::SourceChanged { .. }), "{name}: {error}");
        assert!(error.to_string().contains(&format!("source/{name}: changed while it was read")), "{error}");
        only_staging(&folder.destination());
    }
}

#[test]
fn a_source_that_vanishes_or_shrinks_between_plan_and_reading_is_an_error() {
    for vanishes in [true, false] {
        let folder = checkpoint();
        let conversion = conversion(&folder, false);
        let path = folder.source().join("model-00002-of-00002.safetensors");
        if vanishes {
            fs::remove_file(&path).unwrap();
        } else {
            File::options().write(true).open(&path).unwrap().set_len(500).unwrap();
        }
        let error = conversion.execute(folder.destination(), &Watch::default()).unwrap_err();
        let words = if vanishes { "No such file" } else { "it has 500 bytes, and had" };
        assert!(error.to_string().contains("model-00002") && error.to_string().contains(words), "{error}");
        only_staging(&folder.destination());
    }
}

#[test]
fn two_conversions_into_one_folder_are_refused() {
    let folder = checkpoint();
    let staging = folder.destination().join(STAGING);
    fs::create_dir_all(&staging).unwrap();
    let text = "A staging folder of prequant. It holds what isn't finished; to start over, remove all of it.\n";
    fs::write(staging.join("prequant"), text).unwrap();
    let lock = File::create(staging.join("lock")).unwrap();
    lock.write_all_at(b"4711\n", 0).unwrap();
    lock.lock().unwrap();
    folder.convert(&FLAGS).fails(3, &["converted: process 4711 is converting into it"]);
    lock.unlock().unwrap();
    folder.convert(&FLAGS).ok();
}

/// Begins a conversion that takes a while, and sends it a signal once a file is finished; how it ended.
fn signalled(folder: &Folder, signal: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
    command.arg("convert").arg(folder.source()).arg(folder.destination());
    command.args(["--max-shard-size", "1MB", "--threads", "1"]).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let ready = folder.destination().join(STAGING).join("ready");
    let is_weights = |entry: fs::DirEntry| entry.file_name().to_string_lossy().ends_with(".safetensors");
    let any_ready = || fs::read_dir(&ready).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(is_weights)));
    while child.try_wait().unwrap().is_none() && !any_ready() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().is_ok());
    child.wait_with_output().unwrap()
}

/// A conversion that was stopped by a signal, and how: not one that was faster than the signal.
fn stopped_by(signal: &str) -> (Folder, Output) {
    let attempts = (0..20).map(|_| {
        let folder = large();
        let output = signalled(&folder, signal);
        (folder, output)
    });
    let mut stopped = attempts.filter(|(_, output)| !output.status.success());
    stopped.next().expect("every conversion was faster than its signal")
}

fn large() -> Folder {
    let folder = Folder::new("llama");
    let data = Tensor::random("seed", Dtype::BF16, &[1024, 1024]).data;
    let weight =
        |i| Tensor::new(&format!("model.layers.{i}.mlp.up_proj.weight"), Dtype::BF16, &[1024, 1024], data.clone());
    folder.write("model.safetensors", serialize(&(0..60).map(weight).collect::<Vec<_>>()));
    folder
}

#[test]
fn signals_stop_a_run_with_their_exit_code_and_the_way_to_go_on() {
    for (name, code) in [("-INT", 130), ("-TERM", 143)] {
        let (folder, output) = stopped_by(name);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{words}");
        assert!(words.contains("run the same command again to resume"), "{words}");
        only_staging(&folder.destination());
        let run = folder.convert(&["--max-shard-size", "1MB"]).ok();
        assert!(run.stderr.contains("resuming: "), "{}", run.stderr);
    }
}

#[test]
fn a_killed_run_is_gone_on_with() {
    let (folder, _) = stopped_by("-KILL");
    let killed = file_names(&folder.destination());
    assert!(killed.iter().all(|name| name.starts_with(STAGING)), "{killed:?}");
    let run = folder.convert(&["--max-shard-size", "1MB"]).ok();
    assert!(run.stderr.contains("verified, skipping"), "{}", run.stderr);
    let again = folder.beside("again");
    prequant::internal::ops::quantize::plan(
        folder.source(),
        Recipe { max_shard_size: 1_000_000, ..Recipe::default() },
        Options::default(),
    )
    .unwrap()
    .execute(&again, &Watch::default())
    .unwrap();
    assert!(contents(&again) == contents(&folder.destination()));
}

/// Killed while files move to their places: the worst instant of all.
#[test]
fn a_run_that_was_stopped_while_publishing_is_gone_on_with() {
    let expected = expected(false);
    let names: Vec<&String> = expected.keys().collect();
    for moved in 0..names.len() {
        let folder = stopped();
        // As a run leaves it that was killed after `moved` moves: everything is made, some of it is in its place.
        let (staging, to) = (folder.destination().join(STAGING), folder.destination());
        let rank = |name: &str| {
            ["SHA256SUMS", "model.safetensors.index.json", "config.json", "prequant.json"]
                .iter()
                .position(|n| *n == name)
        };
        let mut order = names.clone();
        order.sort_by_key(|name| rank(name));
        let ready = staging.join("ready");
        let sealed: Vec<_> = file_names(&ready).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
        fs::write(staging.join("publishing"), as_record("publishing", &json!({"files": names}))).unwrap();
        for (i, name) in order.iter().enumerate() {
            let made = !name.ends_with(".safetensors") || sealed.contains(name);
            if made {
                fs::write(if i < moved { to.join(name) } else { ready.join(name) }, &expected[*name]).unwrap();
                if i < moved {
                    let _ = fs::remove_file(ready.join(name));
                }
            }
        }
        let run = folder.convert(&FLAGS).ok();
        assert!(run.stderr.contains(&format!("{} verified", sealed.len())), "{}", run.stderr);
        assert!(contents(&to) == expected, "after {moved} moves");
    }
}
