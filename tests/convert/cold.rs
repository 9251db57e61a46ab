//! A source that isn't in memory: a conversion has the disk read ahead of what it computes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use prequant::internal::ops::quantize::plan;
use prequant::internal::store::{Identity, Listing, Location, MemoryStore, ReadAt, Stat, Store, WriteAt};
use prequant::{Options, RecipeOptions};
use safetensors::tensor::Dtype;

use crate::conversion::Unseen;
use crate::support::{Folder, Tensor, contents, serialize};

/// How long the disk takes for what wasn't asked for.
const SEEK: Duration = Duration::from_millis(30);

/// Files in memory that are taken for files on a slow disk, each byte of which is cached once it was asked for.
#[derive(Debug, Default)]
struct ColdStore {
    files: MemoryStore,
    /// Whether headers are read by now.
    is_cold: Arc<AtomicBool>,
    asked: Arc<Asked>,
}

/// What was asked for.
#[derive(Debug, Default)]
struct Asked {
    /// Ranges by file: offset and length.
    ranges: Mutex<BTreeMap<PathBuf, Vec<(u64, u64)>>>,
    /// Bytes that were read after they had been asked for, and others.
    read: [AtomicU64; 2],
}

impl Asked {
    /// Whether all of a range was asked for.
    fn has(&self, path: &Path, mut offset: u64, len: u64) -> bool {
        let (ranges, end) = (self.ranges.lock().unwrap(), offset + len);
        let ranges = ranges.get(path).map_or(&[][..], Vec::as_slice);
        while offset < end {
            match ranges.iter().find(|(start, len)| (*start..start + len).contains(&offset)) {
                Some((start, len)) => offset = start + len,
                None => return false,
            }
        }
        true
    }
}

impl Store for ColdStore {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        let (is_cold, asked) = (self.is_cold.clone(), self.asked.clone());
        Ok(Box::new(ColdFile { file: self.files.open(path)?, path: path.to_owned(), is_cold, asked }))
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn WriteAt>> {
        self.files.create(path, len)
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.files.stat(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Listing>> {
        self.files.list(folder)
    }
}

struct ColdFile {
    file: Box<dyn ReadAt>,
    path: PathBuf,
    is_cold: Arc<AtomicBool>,
    asked: Arc<Asked>,
}

impl ReadAt for ColdFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.is_cold.load(Ordering::SeqCst) && self.path.extension().is_some_and(|end| end == "safetensors") {
            let len = buffer.len() as u64;
            let is_asked_for = self.asked.has(&self.path, offset, len);
            self.asked.read[usize::from(!is_asked_for)].fetch_add(len, Ordering::SeqCst);
            if !is_asked_for {
                thread::sleep(SEEK);
            }
        }
        self.file.read_at(buffer, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        self.file.identity()
    }

    fn will_read(&self, offset: u64, len: u64) {
        self.asked.ranges.lock().unwrap().entry(self.path.clone()).or_default().push((offset, len));
    }

    fn is_cached(&self, _: u64) -> bool {
        false
    }

    fn will_not_read(&self, offset: u64, len: u64) {
        panic!("{len} bytes at {offset} of a small source were let go");
    }
}

/// Converts what a folder has, from a cold store and from the folder.
fn check(folder: &Folder, options: RecipeOptions) {
    let (store, recipe) = (ColdStore::default(), options.build().unwrap());
    for (name, content) in contents(&folder.source()) {
        store.files.put(Path::new("model").join(name), content);
    }
    let (is_cold, asked) = (store.is_cold.clone(), store.asked.clone());
    let source = Location::new(Arc::new(store), "model");
    let conversion = plan(&source, recipe.clone(), Options { threads: 1, ..Options::default() }).unwrap();
    is_cold.store(true, Ordering::SeqCst);
    let (cold, warm) = (folder.beside("cold"), folder.beside("warm"));
    conversion.execute(&cold, &Unseen).unwrap();
    plan(folder.source(), recipe, Options::default()).unwrap().execute(&warm, &Unseen).unwrap();
    assert!(contents(&cold) == contents(&warm));
    let [ahead, others] = asked.read.each_ref().map(|bytes| bytes.load(Ordering::SeqCst));
    assert!(ahead > others, "{ahead} bytes were asked for before they were read, {others} were not");
    for (path, ranges) in asked.ranges.lock().unwrap().iter_mut() {
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{path:?} twice: {ranges:?}");
    }
}

fn weight(name: &str, i: usize, shape: &[usize]) -> Tensor {
    Tensor::random(&format!("model.layers.{i}.mlp.{name}.weight"), Dtype::BF16, shape)
}

#[test]
fn the_disk_is_asked_once_for_what_comes_next() {
    let folder = Folder::new("llama");
    let shard = |from: usize| (from..from + 30).map(|i| weight("up_proj", i, &[64, 64])).collect::<Vec<_>>();
    // One that is read in several chunks, and asked for in several pieces.
    let large = vec![weight("down_proj", 0, &[5000, 1024])];
    folder.write_shards(&[shard(0), [shard(30), large].concat()]);
    check(&folder, RecipeOptions { max_shard_size: Some(60_000), ..RecipeOptions::default() });
}

#[test]
fn weights_that_share_a_scale_are_read_ahead_too() {
    let folder = Folder::new("llama");
    let layer = |i: usize| ["gate_proj", "up_proj", "down_proj"].map(|name| weight(name, i, &[64, 128]));
    folder.write("model.safetensors", serialize(&(0..20).flat_map(layer).collect::<Vec<_>>()));
    let format = Some(&prequant::internal::format::NVFP4);
    check(&folder, RecipeOptions { format, ..RecipeOptions::default() });
}
