//! What the system refuses to tell or to read is an error that names the path. It is never taken for a file that isn't there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use prequant::internal::ops::quantize::plan;
use prequant::internal::ops::verify::{Options as VerifyOptions, against, verify};
use prequant::internal::store::{Fault, FaultyStore, LocalStore, Location};
use prequant::{DeviceChoice, Error, Options, Recipe, RecipeOptions, Report, Result};

use crate::support::{Folder, llama, serialize};

/// Whatever is asked of the disk, in whichever order: the first call that the fault can happen in fails, then the second,
/// and so on until all have. Returns how many there were.
#[track_caller]
fn each_call_fails(fault: Fault, at: fn(&Path) -> bool, act: impl Fn(Arc<FaultyStore>) -> Result<()>) -> usize {
    for call in 1.. {
        let store = Arc::new(FaultyStore::only_at(Arc::new(LocalStore), fault, at));
        store.arm(call);
        match act(store) {
            Ok(()) => return call - 1,
            Err(Error::Io { path, .. }) => assert!(at(&path), "{fault:?} {call}: {path:?}"),
            Err(error) => panic!("{fault:?}, call {call}: {error}"),
        }
    }
    unreachable!()
}

fn anywhere(_: &Path) -> bool {
    true
}

/// The files of a converted checkpoint that are small, and read whole.
fn is_side_file(path: &Path) -> bool {
    path.parent().is_some_and(|folder| folder.ends_with("converted"))
        && ["tokenizer.json", "README.md", "config.json", "hf_quant_config.json"]
            .iter()
            .any(|name| path.ends_with(name))
}

/// A converted Mixture of Experts, whose model card and config.json are changed, in two shards.
fn converted() -> (Folder, std::path::PathBuf) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    let folder = Folder::new("qwen3_moe");
    folder.convert_from(&source, &["--max-shard-size", "100kB"]).ok();
    assert!(folder.destination().join("README.md").exists());
    (folder, source)
}

fn quiet() -> VerifyOptions<'static> {
    VerifyOptions { threads: 2, ..VerifyOptions::default() }
}

/// Nothing differs, or the fault made an error of it.
fn nothing_differs(report: Report) {
    assert_eq!(report.differences, [], "a call that failed was taken for an answer");
}

#[test]
fn opening_a_checkpoint_takes_no_failed_look_for_a_missing_file() {
    let folder = Folder::new("llama");
    folder.write_shards(&[llama()[..1].to_vec(), llama()[1..].to_vec()]);
    folder.write("modules.json", "[]");
    let (converted, _) = converted();
    let alone = Folder::llama();
    let file = alone.source().join("model.safetensors");
    let places = [folder.source(), alone.source(), file, converted.destination()];
    // config.json, and what is beside it. That a GPU may be worth it is told by sizes of files.
    for (place, least) in places.into_iter().zip([6, 3, 2, 6]) {
        let fused = RecipeOptions { experts: Some(prequant::ExpertLayout::Fuse), ..RecipeOptions::default() };
        let recipe = if place == converted.destination() { fused.build().unwrap() } else { Recipe::default() };
        for device in [DeviceChoice::Cpu, DeviceChoice::Auto] {
            let fails = |fault| {
                each_call_fails(fault, anywhere, |store| {
                    let options = Options { device: device.clone().into(), ..Options::default() };
                    plan(Location::new(store, &place), recipe.clone(), options).map(|_| ())
                })
            };
            let looks = fails(Fault::Stat);
            assert!(looks >= least, "{place:?}: only {looks} looks");
            let others = fails(Fault::List) + fails(Fault::Open) + fails(Fault::Read);
            assert!(others >= 2, "{place:?}: only {others} other calls");
        }
    }
}

#[test]
fn verifying_takes_no_failed_call_for_damage() {
    let folder = Folder::llama();
    folder.convert(&["--max-shard-size", "1kB"]).ok();
    for (fault, least) in [(Fault::Stat, 9), (Fault::List, 1), (Fault::Open, 9), (Fault::Read, 30)] {
        let calls = each_call_fails(fault, anywhere, |store| {
            verify(Location::new(store, folder.destination()), quiet()).map(nothing_differs)
        });
        assert!(calls >= least, "{fault:?}: only {calls} calls");
    }
}

#[test]
fn converting_again_takes_no_failed_read_of_a_side_file_for_a_difference() {
    let (folder, source) = converted();
    let compare = |store, at: &Path| against(Location::new(store, at), source.clone(), Options::default(), quiet());
    let reads =
        each_call_fails(Fault::Read, is_side_file, |store| compare(store, &folder.destination()).map(nothing_differs));
    assert!(reads >= 4, "only {reads} reads");

    // What another version wrote is compared in another way.
    let manifest = String::from_utf8(folder.read("prequant.json")).unwrap();
    let version = concat!("\"version\": \"", env!("CARGO_PKG_VERSION"), "\"");
    assert!(manifest.contains(version));
    fs::write(folder.destination().join("prequant.json"), manifest.replace(version, "\"version\": \"0.0.1\"")).unwrap();
    let reads = each_call_fails(Fault::Read, is_side_file, |store| {
        let report = compare(store, &folder.destination())?;
        assert!(report.written_by.is_some());
        assert!(report.differences.iter().all(|difference| difference.file == "prequant.json"), "{report:?}");
        Ok(())
    });
    assert!(reads >= 4, "only {reads} reads");
}

/// Links that lead to themselves: what is behind them, nobody can tell.
#[test]
fn a_destination_that_cannot_be_looked_at_is_an_error() {
    let folder = Folder::llama();
    let conversion = plan(folder.source(), Recipe::default(), Options::default()).unwrap();
    for name in ["prequant.json", ".prequant-staging"] {
        let to = folder.beside(name.trim_start_matches('.'));
        fs::create_dir(&to).unwrap();
        assert!(conversion.finished(&to).unwrap().is_none());
        symlink(name, to.join(name)).unwrap();
        let asked = match name {
            "prequant.json" => conversion.finished(&to).map(|_| ()),
            _ => conversion.check_destination(&to),
        };
        let error = asked.unwrap_err().to_string();
        let why = if name == "prequant.json" { "can't look at it" } else { "it is a link" };
        assert!(error.contains(name) && error.contains(why), "{error}");
    }
    folder.write("model.safetensors.index.json", serialize(&[]));
    let index = folder.source().join("model.safetensors.index.json");
    fs::remove_file(&index).unwrap();
    symlink("model.safetensors.index.json", &index).unwrap();
    let error = plan(folder.source(), Recipe::default(), Options::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("index.json") && error.contains("can't open it"), "{error}");
}
