//! What a conversion leaves in the page cache.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::backend::Cpu;
use crate::recipe::RecipeOptions;
use crate::store::{Identity, Listing, Location, MemoryStore, Stat, Store, WriteAt, write_all_at};

/// What a store was told of its files: offsets and lengths, by file.
#[derive(Debug, Default)]
struct Told {
    will_read: Mutex<BTreeMap<PathBuf, Vec<(u64, u64)>>>,
    will_not_read: Mutex<BTreeMap<PathBuf, Vec<(u64, u64)>>>,
}

/// Files in memory that are taken for files on a disk, of which nothing is cached.
#[derive(Debug, Default)]
struct Disk {
    files: MemoryStore,
    told: Arc<Told>,
}

struct OnDisk<F: ?Sized> {
    path: PathBuf,
    told: Arc<Told>,
    file: Box<F>,
}

impl Store for Disk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        Ok(Box::new(OnDisk { path: path.to_owned(), told: self.told.clone(), file: self.files.open(path)? }))
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<Box<dyn WriteAt>> {
        Ok(Box::new(OnDisk { path: path.to_owned(), told: self.told.clone(), file: self.files.create(path, len)? }))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.files.stat(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Listing>> {
        self.files.list(folder)
    }
}

impl<F: ReadAt + ?Sized> ReadAt for OnDisk<F> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // A disk takes its time; whoever reads ahead gets ahead.
        thread::sleep(Duration::from_millis(2));
        self.file.read_at(buffer, offset)
    }

    fn identity(&self) -> io::Result<Identity> {
        self.file.identity()
    }

    fn will_read(&self, offset: u64, len: u64) {
        self.told.will_read.lock().unwrap().entry(self.path.clone()).or_default().push((offset, len));
    }

    fn is_cached(&self, _: u64) -> bool {
        false
    }

    fn will_not_read(&self, offset: u64, len: u64) {
        self.told.will_not_read.lock().unwrap().entry(self.path.clone()).or_default().push((offset, len));
    }
}

impl<F: WriteAt + ?Sized> WriteAt for OnDisk<F> {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

/// Files in a folder of a store.
struct Folder(Location);

struct Written(Box<dyn WriteAt>);

impl Outputs for Folder {
    fn open(&self, file: &PlannedFile) -> Result<Arc<dyn Output + '_>> {
        Ok(Arc::new(Written(self.0.join(&file.name).create(file.len).unwrap())))
    }

    fn seal(&self, _: &PlannedFile, _: &FileOutcome) -> Result<()> {
        Ok(())
    }

    fn source_hashed(&self, _: &SourceFile, _: Sha256Hash) -> Result<()> {
        Ok(())
    }
}

impl Output for Written {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&*self.0, bytes, offset).unwrap();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.0.sync().unwrap();
        Ok(())
    }

    fn file(&self) -> &dyn ReadAt {
        &*self.0
    }

    fn path(&self) -> &Path {
        Path::new("an output file")
    }
}

/// Converts a small model on a machine with so much memory; what its disk was told, and the plan.
fn convert(memory: Option<u64>) -> (Arc<Told>, Plan) {
    let disk = Disk::default();
    let fixture = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/tiny-qwen3-moe"));
    for entry in fixture.read_dir().unwrap().map(io::Result::unwrap).filter(|entry| entry.path().is_file()) {
        disk.files.put(Path::new("source").join(entry.file_name()), std::fs::read(entry.path()).unwrap());
    }
    let (told, store) = (disk.told.clone(), Arc::new(disk));
    let source = Source::open(Location::new(store.clone(), "source")).unwrap();
    let recipe = RecipeOptions { max_shard_size: Some(30_000), ..RecipeOptions::default() }.build().unwrap();
    let plan = Plan::new(&source, recipe).unwrap();
    let (device, interrupt) = (Cpu::detect(), AtomicBool::new(false));
    let limits = Limits { memory: Some(1 << 30), threads: 1, device_memory: 0, beside: 0, source_tensors: 0 };
    let budget = Budget::new(&plan, limits, &device).unwrap();
    let context = ExecutionContext {
        device: &device,
        budget,
        hash_source: false,
        interrupt: &interrupt,
        progress: &(),
        trace: None,
    };
    let outputs = Folder(Location::new(store, "converted"));
    run_in(memory, &source, &plan, &outputs, vec![None; plan.files.len()], context).unwrap();
    (told, plan)
}

#[test]
fn a_large_model_lets_go_of_what_was_read_for_it_and_of_what_it_wrote() {
    let (told, plan) = convert(Some(1000));
    let (mut read, mut let_go) = (told.will_read.lock().unwrap(), told.will_not_read.lock().unwrap());
    assert!(plan.files.len() > 1);
    for file in &plan.files {
        assert_eq!(let_go.remove(&Path::new("converted").join(&file.name)), Some(vec![(0, file.len)]), "{}", file.name);
    }
    assert!(!read.is_empty(), "nothing was read ahead");
    read.values_mut().chain(let_go.values_mut()).for_each(|ranges| ranges.sort_unstable());
    assert_eq!(*let_go, *read);
}

#[test]
fn a_small_model_stays_in_memory() {
    for memory in [Some(1 << 40), None] {
        let (told, _) = convert(memory);
        assert!(!told.will_read.lock().unwrap().is_empty(), "nothing was read ahead");
        assert!(told.will_not_read.lock().unwrap().is_empty(), "{told:?}");
    }
}
