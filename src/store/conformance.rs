//! What every store does alike. A new one gets a line in [`stores`].

use std::io;
use std::sync::Arc;

use super::*;

/// An empty place in each store, and what keeps it there.
fn stores() -> Vec<(Location, Option<tempfile::TempDir>)> {
    let folder = || tempfile::tempdir().unwrap();
    let (local, faulty) = (folder(), folder());
    let unarmed = FaultyStore::new(Arc::new(LocalStore), Fault::Read);
    vec![
        (Location::from(local.path()), Some(local)),
        (Location::new(Arc::new(MemoryStore::default()), "memory"), None),
        (Location::new(Arc::new(unarmed), faulty.path()), Some(faulty)),
    ]
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8).collect()
}

#[test]
fn what_is_written_anywhere_in_a_file_is_read_back() {
    for (place, _kept) in stores() {
        let (file, content) = (place.join("a file"), bytes(5000));
        let created = file.create(5000).unwrap();
        assert_eq!(created.identity().unwrap().len, 5000);
        write_all_at(&*created, &content[3000..], 3000).unwrap();
        write_all_at(&*created, &content[..3000], 0).unwrap();
        created.sync().unwrap();

        let mut part = vec![0; 2500];
        read_exact_at(&*created, &mut part, 1234).unwrap();
        assert_eq!(part, content[1234..3734], "{place}");
        created.will_read(0, 5000);
        let opened = file.open().unwrap();
        opened.will_read(4000, 5000);
        read_exact_at(&*opened, &mut part, 2500).unwrap();
        assert_eq!(part, content[2500..], "{place}");
        assert_eq!(opened.read_at(&mut part, 5000).unwrap(), 0);
        assert_eq!(opened.read_at(&mut part, 1 << 40).unwrap(), 0);
        let past_the_end = read_exact_at(&*opened, &mut part, 2501).unwrap_err();
        assert_eq!(past_the_end.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(file.read(5000).unwrap(), content);
    }
}

#[test]
fn any_part_is_read_to_any_address() {
    let content = bytes(300_000);
    for (place, _kept) in stores() {
        let file = place.join("file");
        write_all_at(&*file.create(300_000).unwrap(), &content, 0).unwrap();
        let opened = file.open().unwrap();
        let mut buffer = vec![0; 310_000];
        for (address, offset, len) in
            (0..100).flat_map(|i| [(i, 0, 4096), (64 - i % 64, i, 290_000), (i, 4096 - i, 131_200)])
        {
            buffer.fill(1);
            read_exact_at(&*opened, &mut buffer[address..address + len], offset as u64).unwrap();
            assert_eq!(
                buffer[address..address + len],
                content[offset..offset + len],
                "{place} {address} {offset} {len}"
            );
            assert!(buffer[..address].iter().chain(&buffer[address + len..]).all(|&byte| byte == 1));
        }
        assert_eq!(opened.read_at(&mut buffer, 299_000).unwrap(), 1000);
    }
}

#[test]
fn a_file_that_is_created_anew_has_nothing_of_the_old_one() {
    for (place, _kept) in stores() {
        let file = place.join("file");
        write_all_at(&*file.create(3).unwrap(), b"old", 0).unwrap();
        file.create(2).unwrap();
        assert_eq!(file.read(5000).unwrap(), [0, 0], "{place}");
    }
}

#[test]
fn identities_tell_whether_a_file_was_written_to() {
    for (place, _kept) in stores() {
        let file = place.join("file");
        let created = file.create(3).unwrap();
        write_all_at(&*created, b"abc", 0).unwrap();
        let identity = file.open().unwrap().identity().unwrap();
        assert_eq!(identity, file.open().unwrap().identity().unwrap());
        // A file system's clock may stand still for some milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
        write_all_at(&*created, b"abd", 0).unwrap();
        assert_ne!(identity, file.open().unwrap().identity().unwrap(), "{place}");
    }
}

#[test]
fn folders_list_what_is_in_them_with_sizes() {
    for (place, _kept) in stores() {
        for (name, len) in [("b \"ü\" %2F", 2), ("a", 1), ("folder/c", 3), ("folder/deeper/d", 4)] {
            place.join(name).create(len).unwrap();
        }
        let listed = |folder: &Location| {
            let listing = folder.list().unwrap().into_iter();
            let mut entries: Vec<_> = listing
                .map(|entry| {
                    assert!(!entry.is_link);
                    assert_eq!(folder.join(&entry.name).stat().unwrap(), entry.stat);
                    (entry.name.into_string().unwrap(), entry.stat.kind, entry.stat.len)
                })
                .collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            entries
        };
        let file = |name: &str, len| (name.to_owned(), Kind::File, len);
        let folder = |name: &str| (name.to_owned(), Kind::Folder, 0);
        assert_eq!(listed(&place), [file("a", 1), file("b \"ü\" %2F", 2), folder("folder")], "{place}");
        assert_eq!(listed(&place.join("folder")), [file("c", 3), folder("deeper")], "{place}");
        assert!(place.join("folder").is_folder().unwrap() && place.join("a").is_file().unwrap());
        assert!(place.join("a").resolve().is_ok() && place.join("a").with_file_name("b \"ü\" %2F").is_file().unwrap());
    }
}

#[test]
fn what_is_not_there_or_not_a_file_is_told_by_the_kind_of_error() {
    for (place, _kept) in stores() {
        place.join("folder/file").create(1).unwrap();
        let nothing = place.join("nothing");
        let kinds = [nothing.open().err(), nothing.stat().err(), nothing.list().err(), nothing.resolve().err()];
        assert!(kinds.iter().flatten().all(|error| error.kind() == io::ErrorKind::NotFound), "{place}: {kinds:?}");
        assert!(kinds.iter().all(Option::is_some) && !nothing.exists().unwrap());
        let below_a_file = place.join("folder/file/below");
        for place in [&nothing, &below_a_file] {
            assert_eq!((place.kind().unwrap(), place.read_if_there(9).unwrap()), (None, None), "{place}");
        }
        assert_eq!(place.join("folder").read_if_there(9).unwrap(), None);
        assert_eq!(place.join("folder/file").read_if_there(9).unwrap(), Some(vec![0]));
        let folder = place.join("folder").open().err().map(|error| error.kind());
        assert_eq!(folder, Some(io::ErrorKind::IsADirectory), "{place}");
        let file = place.join("folder/file").list().err().map(|error| error.kind());
        assert_eq!(file, Some(io::ErrorKind::NotADirectory), "{place}");
    }
}

#[test]
fn a_faulty_store_fails_at_the_call_that_it_was_armed_for() {
    use Fault::{EndOfFile, List, Open, Read, Stat, StorageFull, Sync, Write};
    for fault in [Stat, List, Open, Read, EndOfFile, Write, StorageFull, Sync] {
        let store = Arc::new(FaultyStore::only_at(Arc::new(MemoryStore::default()), fault, |path| path.ends_with("x")));
        let place = Location::new(store.clone(), "memory");
        let (faulty, sound) = (place.join("x").create(1).unwrap(), place.join("y").create(1).unwrap());
        for name in ["x", "y"] {
            place.join(format!("folder/{name}/file")).create(1).unwrap();
        }
        let call = |file: &dyn WriteAt, name: &str| match fault {
            Stat => place.join(name).stat().map(|_| ()),
            List => place.join(format!("folder/{name}")).list().map(|_| ()),
            Open => place.join(name).open().map(|_| ()),
            Read | EndOfFile => read_exact_at(file, &mut [0], 0),
            Write | StorageFull => write_all_at(file, &[1], 0),
            Sync => file.sync(),
        };
        store.arm(2);
        assert!(call(&*faulty, "x").is_ok() && call(&*sound, "y").is_ok(), "{fault:?}");
        let error = call(&*faulty, "x").unwrap_err();
        assert_eq!(error.kind() == io::ErrorKind::StorageFull, fault == StorageFull, "{error}");
        assert!((0..9).all(|_| call(&*faulty, "x").is_ok()), "{fault:?}");
    }
}

#[test]
fn what_a_store_cannot_tell_is_an_error_and_not_taken_for_nothing() {
    let store = |fault| Arc::new(FaultyStore::new(Arc::new(MemoryStore::default()), fault));
    let (stat, read) = (store(Fault::Stat), store(Fault::Read));
    let place = |store: &Arc<FaultyStore>| Location::new(store.clone(), "memory").join("x");
    let (unseen, unread) = (place(&stat), place(&read));
    let asks: [&dyn Fn() -> io::Result<bool>; 3] = [&|| unseen.exists(), &|| unseen.is_file(), &|| unseen.is_folder()];
    for ask in asks {
        stat.arm(1);
        assert!(ask().is_err() && !ask().unwrap());
    }
    unread.create(1).unwrap();
    read.arm(1);
    assert!(unread.read_if_there(9).is_err() && unread.read_if_there(9).unwrap().is_some());
}
