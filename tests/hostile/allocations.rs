//! Hostile files make no allocation above 256 MiB.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};

use prequant::internal::checkpoint::Source;

use crate::support::{Folder, with_header};

/// The largest allocation so far.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Watched;

// SAFETY: the system's allocator, and a note of the size.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps alloc's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps dealloc's contract, and `alloc` is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Headers and indexes that are as large as they may be, or say that they are larger.
#[test]
fn hostile_files_make_no_allocation_above_256_mib() {
    let entry = |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let many: Vec<String> = (0..1_700_000).map(entry).collect();
    let many = format!("{{{}}}", many.join(","));
    assert!((90_000_000..100_000_000).contains(&many.len()), "{}", many.len());
    let deep = "[".repeat(99_000_000);
    let files = [
        with_header(&many, &[]),
        with_header(&deep, &[]),
        with_header(&format!("{{\"a\":{deep}"), &[]),
        (1u64 << 63).to_le_bytes().to_vec(),
        (1u64 << 40).to_le_bytes().to_vec(),
        with_header(
            r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}"#,
            &[],
        ),
    ];
    let weight_map: Vec<String> = (0..4_000_000).map(|i| format!(r#""{i}":"m.safetensors""#)).collect();
    let index = format!(r#"{{"weight_map":{{{}}}}}"#, weight_map.join(","));

    for file in files {
        let folder = Folder::new("llama");
        folder.write("model.safetensors", &file);
        drop(file);
        LARGEST.store(0, Ordering::Relaxed);
        let opened = Source::open(folder.source());
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest <= 256 << 20, "{largest} bytes at once");
        drop(opened);
    }
    let folder = Folder::new("llama");
    folder.write("model.safetensors.index.json", &index);
    LARGEST.store(0, Ordering::Relaxed);
    assert!(Source::open(folder.source()).is_err());
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest <= 256 << 20, "{largest} bytes at once for the index");

    let folder = Folder::llama();
    folder.write("modules.json", "");
    File::options().write(true).open(folder.source().join("modules.json")).unwrap().set_len(1 << 40).unwrap();
    LARGEST.store(0, Ordering::Relaxed);
    assert!(Source::open(folder.source()).is_ok());
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest <= 256 << 20, "{largest} bytes at once for modules.json");
}
