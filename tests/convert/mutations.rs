//! Changes to converted checkpoints, and the class that verifying must give each; python/tests/test_mutations.py does the same
//! cases. What the operations are, tests/conformance/make/mutations.py says.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use prequant::{DifferenceClass, VerifyOptions, verify};
use serde_json::{Value, json};

use crate::support::{Folder, Run, contents};

const TABLE: &str = include_str!("../data/mutations.json");
const MANIFEST: &str = "prequant.json";
const SUMS: &str = "SHA256SUMS";

fn sha256(content: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file below the folder, whose folder there is.
fn new(folder: &Path, file: &str) -> std::path::PathBuf {
    let path = folder.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    path
}

/// Changes a file's content.
fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut content = fs::read(folder.join(file)).unwrap();
    change(&mut content);
    fs::write(folder.join(file), content).unwrap();
}

/// Changes a value in a JSON file, whose last key or number `change` is given.
fn edit_json(folder: &Path, file: &str, path: &Value, change: impl FnOnce(&mut Value, &Value)) {
    let mut whole: Value = serde_json::from_slice(&fs::read(folder.join(file)).unwrap()).unwrap();
    let (last, path) = path.as_array().unwrap().split_last().unwrap();
    let inner = path.iter().fold(&mut whole, |inner, key| match key.as_str() {
        Some(key) => &mut inner[key],
        None => &mut inner[key.as_u64().unwrap() as usize],
    });
    change(inner, last);
    fs::write(folder.join(file), format!("{whole:#}\n")).unwrap();
}

fn offset(at: i64, len: usize) -> usize {
    if at < 0 { len - at.unsigned_abs() as usize } else { at as usize }
}

pub fn apply(folder: &Path, operation: &[Value]) {
    let text = |i: usize| operation[i].as_str().unwrap();
    let number = |i: usize| operation[i].as_i64().unwrap();
    let path = |i: usize| folder.join(text(i));
    match text(0) {
        "write" => fs::write(new(folder, text(1)), text(2)).unwrap(),
        "append" => edit(folder, text(1), |content| content.extend_from_slice(text(2).as_bytes())),
        "flip" => edit(folder, text(1), |content| {
            let at = offset(number(2), content.len());
            content[at] ^= 1 << number(3);
        }),
        "truncate" => edit(folder, text(1), |content| content.truncate(offset(number(2), content.len()))),
        "remove" => fs::remove_file(path(1)).unwrap(),
        "move" => fs::rename(path(1), path(2)).unwrap(),
        "copy" => drop(fs::copy(path(1), new(folder, text(2))).unwrap()),
        "link" => symlink(text(2), path(1)).unwrap(),
        "folder" => fs::create_dir(path(1)).unwrap(),
        "replace" => edit(folder, text(1), |content| {
            let (from, to) = (text(2).as_bytes(), text(3).as_bytes());
            let at = content.windows(from.len()).position(|bytes| bytes == from);
            let at = at.unwrap_or_else(|| panic!("{} has no {:?}", text(1), text(2)));
            content.splice(at..at + from.len(), to.iter().copied());
        }),
        "set" => edit_json(folder, text(1), &operation[2], |inner, key| match key.as_str() {
            Some(key) => inner[key] = operation[3].clone(),
            None => inner[key.as_u64().unwrap() as usize] = operation[3].clone(),
        }),
        "unset" => edit_json(folder, text(1), &operation[2], |inner, key| match key.as_str() {
            Some(key) => drop(inner.as_object_mut().unwrap().shift_remove(key).unwrap()),
            None => drop(inner.as_array_mut().unwrap().remove(key.as_u64().unwrap() as usize)),
        }),
        "repeat" => edit_json(folder, text(1), &operation[2], |inner, key| {
            let at = key.as_u64().unwrap() as usize;
            let again = inner[at].clone();
            inner.as_array_mut().unwrap().insert(at, again);
        }),
        "lines" => edit(folder, text(1), |content| *content = lines(content, text(2))),
        "sums" => sums(folder),
        "seal" => seal(folder, operation),
        other => panic!("{other}"),
    }
}

fn lines(content: &[u8], how: &str) -> Vec<u8> {
    let lines: Vec<&str> = std::str::from_utf8(content).unwrap().lines().collect();
    let ended = |lines: &mut dyn Iterator<Item = &&str>, end: &str| lines.map(|line| format!("{line}{end}")).collect();
    let text: String = match how {
        "reversed" => ended(&mut lines.iter().rev(), "\n"),
        "doubled" => ended(&mut lines.iter().chain(&lines[..1]), "\n"),
        "crlf" => ended(&mut lines.iter(), "\r\n"),
        "unended" => lines.join("\n"),
        other => panic!("{other}"),
    };
    text.into_bytes()
}

fn sums(folder: &Path) {
    let text = fs::read(folder.join(MANIFEST)).unwrap();
    let manifest: Value = serde_json::from_slice(&text).unwrap();
    let text_of = |value: &Value| value.as_str().unwrap().to_owned();
    let files = manifest["files"].as_array().unwrap().iter();
    let mut sums: std::collections::BTreeMap<String, String> =
        files.map(|file| (text_of(&file["name"]), text_of(&file["sha256"]))).collect();
    sums.insert(MANIFEST.to_owned(), sha256(&text));
    let lines: String = sums.iter().map(|(name, hash)| format!("{hash}  {name}\n")).collect();
    fs::write(folder.join(SUMS), lines).unwrap();
}

fn seal(folder: &Path, operation: &[Value]) {
    let is_asked = |what: &str| operation.iter().any(|word| word == what);
    let mut manifest: Value = serde_json::from_slice(&fs::read(folder.join(MANIFEST)).unwrap()).unwrap();
    if !manifest.is_object() {
        return;
    }
    let before = manifest.clone();
    let files = manifest["files"].as_array_mut().unwrap();
    if is_asked("more") {
        for name in contents(folder).into_keys().filter(|name| ![MANIFEST, SUMS].contains(&name.as_str())) {
            if files.iter().all(|file| file["name"] != *name) {
                files.push(json!({"name": name}));
            }
        }
        files.sort_by_key(|file| file["name"].as_str().unwrap().to_owned());
    }
    for file in files {
        if let Ok(content) = fs::read(folder.join(file["name"].as_str().unwrap())) {
            file["size"] = content.len().into();
            file["sha256"] = sha256(&content).into();
        }
    }
    let tensors = manifest["tensors"].as_array_mut().unwrap().iter_mut();
    let outputs = tensors.flat_map(|tensor| tensor["outputs"].as_array_mut().unwrap());
    for output in outputs.filter(|_| is_asked("tensors")) {
        let content = fs::read(folder.join(output["file"].as_str().unwrap())).unwrap();
        let data = 8 + u64::from_le_bytes(content[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&content[8..data]).unwrap();
        let offsets = &header[output["name"].as_str().unwrap()]["data_offsets"];
        let offset = |i: usize| data + offsets[i].as_u64().unwrap() as usize;
        output["sha256"] = sha256(&content[offset(0)..offset(1)]).into();
    }
    if manifest != before {
        fs::write(folder.join(MANIFEST), format!("{manifest:#}\n")).unwrap();
    }
    sums(folder);
}

fn class(folder: &Path) -> (&'static str, String) {
    let report = verify(folder, VerifyOptions { threads: 2, ..VerifyOptions::default() }).unwrap();
    let class = match (report.count(DifferenceClass::Damage), report.count(DifferenceClass::Edited)) {
        (0, 0) => "ok",
        (0, _) => "edited",
        _ => "damage",
    };
    (class, format!("{:?}", report.differences))
}

pub fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for (name, content) in contents(from) {
        fs::write(to.join(name), content).unwrap();
    }
}

/// All cases whose class isn't the one that they should have, or that verifying fails on.
#[test]
fn every_mutation_has_its_class() {
    let table: Value = serde_json::from_str(TABLE).unwrap();
    let work = Folder::new("qwen3_moe");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-qwen3-moe");
    for (name, flags) in table["flags"].as_object().unwrap() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prequant"));
        command.arg("convert").arg(&fixture).arg(work.beside(name));
        Run::of(command.args(flags.as_array().unwrap().iter().map(|flag| flag.as_str().unwrap()))).ok();
    }
    let cases = table["cases"].as_array().unwrap();
    assert!(cases.len() >= 300);
    let mut wrong = Vec::new();
    for case in cases {
        let folder = work.beside("mutated");
        copy(&work.beside(case["of"].as_str().unwrap()), &folder);
        for operation in case["do"].as_array().unwrap() {
            apply(&folder, operation.as_array().unwrap());
        }
        let (found, differences) = class(&folder);
        if case["class"] != found {
            wrong.push(format!("{}: {found}: {differences}", case["name"]));
        }
        fs::remove_dir_all(folder).unwrap();
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}
