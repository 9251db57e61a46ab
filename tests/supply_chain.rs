//! What comes from elsewhere is what was chosen: pinned environments have a lock with hashes, nothing that is read from a file is
//! run, `unsafe` stays where it is reviewed, and advisories are asked for.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The requirements without versions, on purpose.
const UNPINNED: &str = "newest";

#[test]
fn every_pin_is_in_its_lock_with_hashes() {
    let folder = root().join("tests/conformance/requirements");
    let named = |extension: &str| {
        let files = files(&folder, &[extension]).into_iter();
        files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).filter(|name| name != UNPINNED)
    };
    let names: Vec<String> = named("txt").collect();
    assert!(names.len() >= 8, "{names:?}");
    assert_eq!(names, named("lock").collect::<Vec<_>>(), "requirements and locks: `scripts/make locks` makes these");
    for name in names {
        let pins = pins(&fs::read_to_string(folder.join(format!("{name}.txt"))).unwrap());
        let lock = fs::read_to_string(folder.join(format!("{name}.lock"))).unwrap();
        assert_eq!(
            pins.into_keys().collect::<Vec<_>>(),
            lock_of(&lock),
            "{name}: `scripts/make locks {name}` makes its lock"
        );
    }
}

/// Each `name==version` of a list of pins, and its line.
fn pins(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, version) = line.split_once("==").unwrap_or_else(|| panic!("not pinned: {line}"));
            (format!("{}=={version}", canonical(name)), line.to_owned())
        })
        .collect()
}

/// Each `name==version` of a lock.
///
/// # Panics
/// When one has no hash.
fn lock_of(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let entries = joined.lines().filter(|line| !line.trim().is_empty()).map(|entry| {
        let mut words = entry.split_whitespace();
        let pin = words.next().unwrap();
        let hashes: Vec<&str> = words.collect();
        let is_hash = |word: &&str| {
            word.strip_prefix("--hash=sha256:")
                .is_some_and(|hash| hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
        };
        assert!(!hashes.is_empty() && hashes.iter().all(is_hash), "{pin}: {hashes:?}");
        let (name, version) = pin.split_once("==").unwrap();
        format!("{}=={version}", canonical(name))
    });
    let mut entries: Vec<String> = entries.collect();
    entries.sort();
    entries
}

fn canonical(name: &str) -> String {
    name.to_lowercase().replace(['_', '.'], "-")
}

#[test]
fn environments_are_installed_from_locks_alone() {
    let scripts = ["scripts", ".ci", ".github"].iter().flat_map(|folder| all_files(&root().join(folder)));
    let mut installs = 0;
    for path in scripts {
        let text = fs::read_to_string(&path).unwrap().replace("\\\n", " ");
        let is_install = |line: &&str| {
            let by_pip = ["pip install", "pip wheel", "pip download"].iter().any(|words| line.contains(words));
            by_pip && !line.trim_start().starts_with('#') && !line.contains(&format!("{UNPINNED}.txt"))
        };
        for line in text.lines().filter(is_install) {
            installs += 1;
            // A wheel is built of what was installed before.
            let is_locked = line.contains("--require-hashes") || line.contains("--no-build-isolation");
            assert!(line.contains("--no-deps") && is_locked, "{}: {line}", path.display());
        }
    }
    assert!(installs >= 3, "{installs}");
}

/// Words that have a program run what is in a file, or in a string.
const RUN: &[&str] = &[
    "eval(",
    "exec(",
    "__import__(",
    "pickle",
    "marshal",
    "shell=True",
    "os.system",
    "yaml.load(",
    "yaml.unsafe_load",
    "trust_remote_code=True",
    "allow_pickle=True",
    "weights_only=False",
];

#[test]
fn python_runs_nothing_that_is_read_from_a_file() {
    let mut found = Vec::new();
    let mut count = 0;
    for (path, line) in
        lines_of(&["python", "tests", "scripts", "benches", "examples"], |path| has_extension(path, "py"))
    {
        count += 1;
        // A model's `eval()` is a mode, literals are data, and what is tested to be refused may be named, in quotes.
        let line = line.replace(".eval()", "").replace("ast.literal_eval(", "").replace("\"__import__('os')\"", "");
        let loads = line.contains("torch.load(") && !line.contains("weights_only=True");
        if loads || RUN.iter().any(|word| line.contains(word)) {
            found.push(format!("{}: {}", path.display(), line.trim()));
        }
    }
    assert!(count > 3000, "{count} lines");
    assert!(found.is_empty(), "read as data instead:\n{}", found.join("\n"));
}

#[test]
fn shell_runs_nothing_that_is_read_from_a_file() {
    let is_script = |path: &Path| path.extension().is_none();
    let mut found = Vec::new();
    let mut count = 0;
    for (path, line) in lines_of(&["scripts", ".ci"], is_script) {
        count += 1;
        let line = line.trim_start();
        let fetches = line.split_whitespace().any(|word| word == "curl" || word == "wget");
        let starts = |word: &str| line.starts_with(word) || line.contains(&format!("; {word}"));
        let runs = ["eval ", "source ", ". "].into_iter().any(starts);
        if !line.starts_with('#') && (fetches || runs) {
            found.push(format!("{}: {line}", path.display()));
        }
    }
    assert!(count > 400, "{count} lines");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// As docs/architecture.md says.
#[test]
fn unsafe_code_is_where_the_architecture_says() {
    let allowed = ["src/kernel/", "src/backend/", "src/cli/limits.rs"];
    let mut found = BTreeMap::new();
    for (path, line) in lines_of(&["src"], |path| has_extension(path, "rs")) {
        let code = line.split("//").next().unwrap();
        let is_unsafe = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait"];
        if is_unsafe.into_iter().any(|words| code.contains(words)) {
            *found.entry(path.display().to_string()).or_insert(0) += 1;
        }
    }
    let wrong: Vec<_> = found.keys().filter(|path| !allowed.iter().any(|start| path.starts_with(start))).collect();
    assert!(wrong.is_empty(), "unsafe outside of {allowed:?}: {wrong:?}");
    assert!(allowed.iter().all(|start| found.keys().any(|path| path.starts_with(start))), "{found:?}");
}

/// As docs/architecture.md says.
#[test]
fn files_are_opened_where_the_architecture_says() {
    let mut wrong = Vec::new();
    let is_code = |path: &Path| has_extension(path, "rs") && !path.ends_with("tests.rs");
    let mut in_tests = None;
    for (path, line) in lines_of(&["src"], is_code) {
        if line == "#[cfg(test)]" {
            in_tests = Some(path.clone());
        }
        let allowed =
            ["src/store/", "src/checkpoint/staging"].iter().any(|start| path.display().to_string().starts_with(start));
        let uses = line.contains("std::fs") || (line.contains("use std::{") && line.contains("fs::"));
        if uses && !allowed && in_tests.as_ref() != Some(&path) {
            wrong.push(format!("{}: {}", path.display(), line.trim()));
        }
    }
    assert!(wrong.is_empty(), "std::fs outside of store/ and checkpoint/staging:\n{}", wrong.join("\n"));
}

#[test]
fn every_pull_request_asks_for_advisories() {
    let text = fs::read_to_string(root().join(".github/workflows/ci.yml")).unwrap();
    let command = text.lines().find(|line| line.contains("command: check")).unwrap();
    for what in ["advisories", "bans", "licenses", "sources"] {
        assert!(command.contains(what), "{command}");
    }
}

/// Every line of the files in these folders, with its file's path from the root.
fn lines_of(folders: &[&str], wanted: impl Fn(&Path) -> bool) -> Vec<(PathBuf, String)> {
    let files = folders.iter().flat_map(|folder| all_files(&root().join(folder))).filter(|path| wanted(path));
    let lines = files.flat_map(|path| {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let short = path.strip_prefix(root()).unwrap().to_owned();
        text.lines().map(|line| (short.clone(), line.to_owned())).collect::<Vec<_>>()
    });
    lines.collect()
}

fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = all_files(folder);
    found.retain(|path| extensions.iter().any(|extension| has_extension(path, extension)));
    found
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// The files in a folder and those below it, in their names' order.
fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    let below = |path: PathBuf| if path.is_dir() { all_files(&path) } else { vec![path] };
    entries.into_iter().filter(|path| !path.ends_with("__pycache__")).flat_map(below).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
