//! The order of the calls, and what is left when they end at any of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::{DONE_NAME, READY_FOLDER, SEALED_FOLDER, STAGING_NAME, Staging, disk};
use crate::checkpoint::{CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, SUMS_NAME};
use crate::error::{Error, Result};
use crate::store::Location;

/// A checkpoint's files and their contents.
type Files = BTreeMap<String, String>;

const OLD: [&str; 6] = [MANIFEST_NAME, CONFIG_NAME, SUMS_NAME, "model.safetensors", "code/old.py", "tokenizer.json"];
const NEW: [&str; 7] =
    [MANIFEST_NAME, CONFIG_NAME, INDEX_NAME, SUMS_NAME, "model-1.safetensors", "code/deep/new.py", "tokenizer.json"];

fn files(names: &[&str], version: &str) -> Files {
    names.iter().map(|name| ((*name).to_owned(), format!("{version} {name}"))).collect()
}

fn write_all(folder: &Path, files: &Files) {
    for (name, text) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// What is in a folder, but for what isn't finished.
fn contents(folder: &Path) -> Files {
    fn walk(folder: &Path, prefix: &str, found: &mut Files) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            if entry.path().is_dir() && ![STAGING_NAME, DONE_NAME].contains(&name.as_str()) {
                walk(&entry.path(), &format!("{name}/"), found);
            } else if entry.path().is_file() {
                found.insert(name, fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    let mut found = Files::new();
    walk(folder, "", &mut found);
    found
}

/// Fills `destination` with `new` as a job does; `old` are the files that the manifest there lists.
fn fill(destination: &Path, new: &Files, force: bool, restart: bool, old: &Files) -> Result<()> {
    let source = tempfile::tempdir().unwrap();
    let (source, place) = (Location::from(source.path()), Location::from(destination));
    let staging = Staging::take(&place, &source, force)?;
    if restart || staging.job()?.is_none() {
        staging.begin(b"job")?;
    }
    staging.remove_partial();
    staging.unpublish()?;
    staging.make_folders()?;
    for (name, text) in new {
        if name.ends_with(".safetensors") {
            fs::write(staging.partial(name).path(), text).unwrap();
            staging.write_sealed(name, |record| record.write_all(b"its hash"))?;
            staging.name_finished(name)?;
        } else {
            staging.write(name, |file| file.write_all(text.as_bytes()))?;
        }
    }
    let names: Vec<String> = new.keys().cloned().collect();
    let listed = destination.join(MANIFEST_NAME).exists() && staging.replaces();
    let old: BTreeSet<String> = if listed { old.keys().cloned().collect() } else { BTreeSet::new() };
    staging.publish(&names, old)
}

/// A folder that exists, and the place of the destination below two that don't.
fn place() -> (tempfile::TempDir, PathBuf) {
    // In memory where that can be had: thousands of syncs take minutes on a disk.
    let memory = Path::new("/dev/shm");
    let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let destination = root.path().canonicalize().unwrap().join("models/converted");
    (root, destination)
}

#[test]
fn every_name_is_on_the_disk_before_what_depends_on_it() {
    let (_root, destination) = place();
    let new = files(&NEW, "new");
    disk::calls();
    fill(&destination, &new, false, false, &Files::new()).unwrap();
    let calls = disk::calls();
    let at = |call: &str, path: &Path| {
        let found = calls.iter().position(|(made, on)| *made == call && on == path);
        found.unwrap_or_else(|| panic!("no {call} of {}: {calls:?}", path.display()))
    };
    let last = |call: &str, path: &Path| calls.iter().rposition(|(made, on)| *made == call && on == path).unwrap();
    let staging = destination.join(STAGING_NAME);
    let parent = destination.parent().unwrap();
    assert!(at("mkdir", parent) < at("fsync", parent.parent().unwrap()));
    assert!(at("mkdir", &destination) < at("fsync", parent));
    assert!(at("create", &staging.join("prequant")) < at("rename", &staging.join("job")));
    let publishing = at("rename", &staging.join("publishing"));
    for folder in [SEALED_FOLDER, READY_FOLDER, "ready/code", "ready/code/deep"] {
        assert!(last("fsync", &staging.join(folder)) < publishing, "{folder}");
    }
    let announced = last("fsync", &staging);
    assert!(publishing < announced);
    let (config, manifest) =
        (at("rename", &destination.join(CONFIG_NAME)), at("rename", &destination.join(MANIFEST_NAME)));
    for name in NEW.iter().filter(|name| ![MANIFEST_NAME, CONFIG_NAME, INDEX_NAME, SUMS_NAME].contains(name)) {
        let moved = at("rename", &destination.join(name));
        assert!(announced < moved && moved < config, "{name}");
        let folder = destination.join(name).parent().unwrap().to_owned();
        assert!((moved..config).any(|i| calls[i] == ("fsync", folder.clone())), "{name}");
    }
    assert!((config..manifest).any(|i| calls[i] == ("fsync", destination.clone())));
    let done = at("rename", &destination.join(DONE_NAME));
    assert!((manifest..done).any(|i| calls[i] == ("fsync", destination.clone())));
    assert_eq!(contents(&destination), new);
}

/// What a kill may leave: all of one version where a manifest says so, all but the manifest where a config.json does.
fn check_after_kill(found: &Files, old: &Files, new: &Files, when: &str) {
    let is_whole = |version: &Files, without: &[&str]| {
        let mut needed = version.iter().filter(|(name, _)| !without.contains(&name.as_str()));
        needed.all(|(name, text)| found.get(name) == Some(text))
    };
    if found.contains_key(MANIFEST_NAME) {
        assert!(is_whole(old, &[]) || is_whole(new, &[]), "{when}: {found:?}");
    } else if found.contains_key(CONFIG_NAME) {
        assert!(is_whole(old, &[MANIFEST_NAME]) || is_whole(new, &[MANIFEST_NAME]), "{when}: {found:?}");
    }
}

/// Whether a run is killed by its `after`th call; another was refused, as all was in place, or came to its end.
fn dies(act: impl FnOnce() -> Result<()>, after: usize) -> bool {
    disk::die_after(Some(after));
    let result = catch_unwind(AssertUnwindSafe(act));
    disk::die_after(None);
    assert!(matches!(result, Err(_) | Ok(Ok(()) | Err(Error::Destination { .. }))), "{result:?}");
    result.is_err()
}

#[test]
fn a_kill_after_any_call_leaves_the_old_the_new_or_neither_and_the_next_run_finishes() {
    let (old, new, other) = (files(&OLD, "old"), files(&NEW, "new"), files(&OLD, "other"));
    let mut left = new.clone();
    left.insert("mine.txt".to_owned(), "mine".to_owned());
    for (force, restart) in [(true, false), (false, false), (false, true)] {
        for after in 0.. {
            let (_root, destination) = place();
            write_all(&destination, &old);
            fs::write(destination.join("mine.txt"), "mine").unwrap();
            if !dies(|| fill(&destination, &new, true, false, &old), after) {
                break;
            }
            let when = format!("killed after {after} calls, then force {force}, restart {restart}");
            let found = contents(&destination);
            check_after_kill(&found, &old, &new, &when);
            // What comes next is killed too, and only then left alone.
            let next = if restart { &other } else { &new };
            let allowed = Staging::check(&Location::from(&*destination), &Location::from("/nowhere"), force);
            if matches!(allowed, Err(Error::Destination { .. })) {
                assert!(!force && found.contains_key(MANIFEST_NAME), "{when}");
                continue;
            }
            for second in (0..40).step_by(7) {
                if dies(|| fill(&destination, next, force, restart, &old), second) {
                    let found = contents(&destination);
                    let versions = if found.values().any(|text| text.starts_with("other")) {
                        (&old, &other)
                    } else {
                        (&old, &new)
                    };
                    check_after_kill(&found, versions.0, versions.1, &when);
                }
            }
            if contents(&destination).contains_key(MANIFEST_NAME) && !force {
                continue; // it came to its end
            }
            fill(&destination, next, force, restart, &old).unwrap();
            let mut expected = next.clone();
            expected.insert("mine.txt".to_owned(), "mine".to_owned());
            assert_eq!(contents(&destination), expected, "{when}");
        }
    }
}

#[test]
fn a_staging_folder_that_is_not_ours_is_refused_and_left_alone() {
    use std::os::unix::fs::symlink;
    type Plant = fn(&Path, &Path);
    let plants: [(&str, Plant); 7] = [
        ("a link for the folder", |folder, victim| symlink(victim, folder).unwrap()),
        ("a file for the folder", |folder, _| fs::write(folder, "").unwrap()),
        ("a folder without the marker", |folder, _| write_all(folder, &files(&["ready/photo.jpg"], "my"))),
        ("a marker with another text", |folder, _| write_all(folder, &files(&["prequant", "job"], "my"))),
        ("a link in it", |folder, victim| {
            ours(folder);
            fs::remove_dir_all(folder.join(READY_FOLDER)).unwrap();
            symlink(victim, folder.join(READY_FOLDER)).unwrap();
        }),
        ("a link for the lock", |folder, victim| {
            ours(folder);
            symlink(victim.join("thesis.tex"), folder.join("lock")).unwrap();
        }),
        ("another name of a file", |folder, victim| {
            ours(folder);
            fs::hard_link(victim.join("thesis.tex"), folder.join("ready/model.safetensors")).unwrap();
        }),
    ];
    for (what, plant) in plants {
        let (root, destination) = place();
        let victim = root.path().join("victim");
        let precious = files(&["thesis.tex", "photos/a.jpg"], "precious");
        write_all(&victim, &precious);
        fs::create_dir_all(&destination).unwrap();
        plant(&destination.join(STAGING_NAME), &victim);
        let before = contents(&destination.join(STAGING_NAME));
        for (force, restart) in [(false, false), (true, true)] {
            let result = fill(&destination, &files(&NEW, "new"), force, restart, &Files::new());
            assert!(matches!(result, Err(Error::Destination { .. })), "{what}: {result:?}");
        }
        assert_eq!(contents(&victim), precious, "{what}");
        let mut after = contents(&destination.join(STAGING_NAME));
        after.retain(|name, _| name != "lock" || before.contains_key(name));
        assert_eq!(after, before, "{what}");
    }
}

/// A staging folder as a run leaves it that was killed.
fn ours(folder: &Path) {
    super::ownership::mark_new(folder);
    for name in [READY_FOLDER, SEALED_FOLDER] {
        fs::create_dir(folder.join(name)).unwrap();
    }
}

#[test]
fn a_folder_of_the_destination_that_is_a_link_is_not_followed() {
    let (root, destination) = place();
    let victim = root.path().join("victim");
    fs::create_dir_all(&victim).unwrap();
    fs::create_dir_all(&destination).unwrap();
    std::os::unix::fs::symlink(&victim, destination.join("code")).unwrap();
    let result = fill(&destination, &files(&NEW, "new"), true, false, &Files::new());
    assert!(matches!(result, Err(Error::Destination { .. })), "{result:?}");
    assert_eq!(contents(&victim), Files::new());
}
