//! Pieces in any order, from any number of threads, in any memory.

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::dtype::Dtype;
use crate::models::Role;
use crate::pipeline::trace::Stamp;
use crate::plan::{Decision, Outputs, Part, PlacedOutput, Plan, PlannedOutput};
use crate::read::Read;
use crate::recipe::RecipeOptions;
use crate::store::{Location, MemoryStore, ReadAt, WriteAt};
use crate::store::{read_exact_at, write_all_at};

/// A file in memory, which counts what is written to it.
struct Counted {
    file: Box<dyn WriteAt>,
    writes: AtomicUsize,
}

impl Output for Counted {
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        write_all_at(&*self.file, bytes, offset).unwrap();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn file(&self) -> &dyn ReadAt {
        &*self.file
    }

    fn path(&self) -> &Path {
        Path::new("model.safetensors")
    }
}

/// Keeps what it is told.
#[derive(Default)]
struct Heard {
    reached: AtomicU64,
    written: Mutex<Vec<(u64, u64)>>,
}

impl Watcher for Heard {
    fn reached(&self, at: u64) {
        self.reached.fetch_max(at, Ordering::Relaxed);
    }

    fn written(&self, offset: u64, len: u64) {
        self.written.lock().unwrap().push((offset, len));
    }

    fn stopped(&self) -> bool {
        false
    }

    fn begin(&self) -> Stamp {
        Stamp::default()
    }

    fn end(&self, _: Stamp, _: Span, _: usize) {}
}

/// A plan of one file, with outputs of these lengths, by tensor.
fn plan(lens: &[Vec<u64>]) -> Plan {
    let tensors = lens.iter().enumerate().map(|(i, lens)| {
        let outputs = lens.iter().enumerate().map(|(j, &len)| PlannedOutput {
            kind: None,
            suffix: format!(".{j}").into(),
            dtype: Dtype::U8,
            shape: [len].into(),
            len,
        });
        PlannedTensor {
            name: i.to_string().into(),
            dtype: Dtype::U8,
            shape: [].into(),
            read: Read::Literal([].into()),
            role: Role::Unknown,
            decision: Decision::Keep,
            reason: "".into(),
            in_doubt: false,
            outputs: Outputs::new(outputs.collect()),
        }
    });
    let mut tensors: Vec<PlannedTensor> = tensors.collect();
    let mut file = PlannedFile {
        name: "model.safetensors".to_owned(),
        tensors: 0..tensors.len(),
        header_len: 0,
        len: 0,
        metadata: Arc::default(),
    };
    // What the header says depends on the order of the outputs, not on where the first one is.
    let mut place_from = |start: u64, tensors: &mut [PlannedTensor]| {
        file.len = start;
        for outputs in tensors.iter_mut().map(|tensor| &mut tensor.outputs) {
            for i in 0..outputs.len() {
                outputs.place(i, file.len);
                file.len += outputs.get(i).len;
            }
        }
        file.header_len = header(&file, tensors).len() as u64;
        file.header_len
    };
    let header_len = place_from(0, &mut tensors);
    assert_eq!(place_from(header_len, &mut tensors), header_len);
    let recipe = RecipeOptions::default().build().unwrap();
    let (scale_sets, side_files, warnings) = Default::default();
    Plan { recipe, tensors, files: vec![file], scale_sets, config: None, side_files, warnings, from_floats: false }
}

/// A file's first bytes.
fn header(file: &PlannedFile, tensors: &[PlannedTensor]) -> Vec<u8> {
    let mut header = Vec::new();
    let mut take = |text: &[u8]| {
        header.extend_from_slice(text);
        Ok(())
    };
    let file = PlannedFile { header_len: file.header_len.max(8), ..file.clone() };
    file.write_header(tensors, &Part::all(tensors), &mut take).unwrap();
    header
}

/// Cuts every output into pieces of at most `step` bytes: offset and length.
fn pieces(plan: &Plan, step: u64) -> Vec<(u64, u64)> {
    let outputs = plan.tensors.iter().flat_map(|tensor| tensor.outputs.iter());
    let cut = |output: PlacedOutput<'_>| {
        let (offset, len) = (output.offset, output.len);
        (0..len.max(1)).step_by(step as usize).map(move |at| (offset + at, step.min(len - at))).collect::<Vec<_>>()
    };
    outputs.flat_map(cut).collect()
}

/// Whether or not tensors are hashed apart from their file.
fn check(lens: &[Vec<u64>], step: u64, window: usize, threads: usize, order: impl Fn(&mut Vec<(u64, u64)>)) {
    let plan = plan(lens);
    for hashes_apart in [true, false] {
        check_stream(&plan, hashes_apart, step, window, threads, &order);
    }
}

fn check_stream(
    plan: &Plan,
    hashes_apart: bool,
    step: u64,
    window: usize,
    threads: usize,
    order: impl Fn(&mut Vec<(u64, u64)>),
) {
    let planned = &plan.files[0];
    let mut content: Vec<u8> = (0..planned.len).map(|i| (i * 31 % 251) as u8).collect();
    let header = header(planned, &plan.tensors);
    content[..header.len()].copy_from_slice(&header);
    let location = Location::new(Arc::new(MemoryStore::default()), "model.safetensors");
    let output = Counted { file: location.create(planned.len).unwrap(), writes: AtomicUsize::new(0) };
    let held = AtomicUsize::new(0);
    let memory = StreamMemory { window, of_all: window, held: &held, buffer: 1 << 16 };
    let mut stream = FileStream::new(plan, planned, Arc::new(output), memory);
    stream.hashes_apart = hashes_apart;
    let mut pieces = pieces(plan, step);
    order(&mut pieces);
    let (next, heard, hashes) = (AtomicUsize::new(0), Heard::default(), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(&(offset, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let bytes = &content[offset as usize..][..len as usize];
                    hashes.lock().unwrap().extend(stream.put(bytes, offset, &heard).unwrap());
                }
            });
        }
    });
    let [hashes] = &hashes.into_inner().unwrap()[..] else { panic!("a file is finished once") };
    assert_eq!(hashes.sha256, Sha256Hash::of(&content));
    for (tensor, hashes) in plan.tensors.iter().zip(&hashes.tensors) {
        let of = |output: PlacedOutput<'_>| Sha256Hash::of(&content[output.offset as usize..][..output.len as usize]);
        assert_eq!(**hashes, tensor.outputs.iter().map(of).collect::<Vec<_>>());
    }
    let mut there = vec![0; content.len()];
    read_exact_at(&*location.open().unwrap(), &mut there, 0).unwrap();
    assert!(there == content, "the file holds other bytes");
    assert_eq!(heard.reached.into_inner(), planned.len);
    assert_eq!(held.load(Ordering::Relaxed), 0, "memory that nobody gave back");
    let mut written = heard.written.into_inner().unwrap();
    written.sort_unstable();
    assert!(
        written.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0),
        "told twice, or not at all: {written:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_file_is_written_and_hashed_whatever_the_order_of_its_pieces(
        lens in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0u64), 1..90u64, 1..400_000u64], 1..4), 1..6),
        step in prop_oneof![Just(60_000u64), Just(200_000), Just(u64::MAX)],
        window in prop_oneof![Just(0usize), Just(100_000), Just(1 << 20), Just(1 << 30)],
        threads in 1..5usize,
        seed in any::<u64>(),
    ) {
        check(&lens, step, window, threads, |pieces| {
            // Any order, from the plan's own to its reverse.
            let far = seed % pieces.len() as u64 + 1;
            pieces.sort_by_key(|&(offset, _)| offset.wrapping_mul(seed | 1) % (far * 1000) + offset / far);
        });
    }
}

#[test]
fn a_large_file_from_back_to_front_takes_no_more_than_its_window() {
    check(&[vec![9 << 20, 64, 20 << 20], vec![0, 5]], 1 << 20, 1 << 20, 2, |pieces| pieces.reverse());
}

#[test]
fn a_file_without_bytes_is_finished() {
    check(&[vec![0]], 1, 0, 1, |_| {});
    check(&[vec![0, 0], vec![0]], 1, 0, 3, |_| {});
}

#[test]
fn what_fails_to_be_written_is_an_error_and_ends_nothing() {
    struct Full;
    impl Output for Full {
        fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
            Err(crate::error::Error::Stopped)
        }
        fn sync(&self) -> Result<()> {
            Ok(())
        }
        fn file(&self) -> &dyn ReadAt {
            unreachable!("nothing was written")
        }
        fn path(&self) -> &Path {
            Path::new("model.safetensors")
        }
    }
    let plan = plan(&[vec![1 << 20, 1 << 20]]);
    let held = AtomicUsize::new(0);
    let memory = StreamMemory { window: 1 << 30, of_all: 1 << 30, held: &held, buffer: 1 << 16 };
    let stream = FileStream::new(&plan, &plan.files[0], Arc::new(Full), memory);
    let bytes = vec![0; 1 << 20];
    assert!(stream.put(&bytes, plan.files[0].header_len, &Heard::default()).is_err());
    assert!(
        stream
            .put(&bytes, plan.files[0].header_len + (1 << 20), &Heard::default())
            .is_ok_and(|hashes| hashes.is_none())
    );
}
