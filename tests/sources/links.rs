//! Links: those of weights may lead anywhere, those of what is copied only to where the checkpoint is.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::support::{Folder, Run, contents, llama, serialize};

/// Moves a file of the source to a folder beside it, and leaves a link.
fn move_out(folder: &Folder, name: &str, to: &str) -> PathBuf {
    let (link, target) = (folder.source().join(name), folder.beside(to));
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    fs::rename(&link, &target).unwrap();
    symlink(&target, &link).unwrap();
    target
}

fn whole() -> Folder {
    let folder = Folder::new("llama");
    folder.write_shards(&[llama()[..1].to_vec(), llama()[1..].to_vec()]);
    folder.write("tokenizer.json", "{\"a\": 1}");
    folder.write("nested/template.jinja", "x");
    folder
}

fn converted(folder: &Folder, flags: &[&str]) -> std::collections::BTreeMap<String, Vec<u8>> {
    folder.convert(flags).ok();
    contents(&folder.destination())
}

#[test]
fn weights_may_be_links_to_another_disk() {
    let plain = converted(&whole(), &[]);
    let folder = whole();
    for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        move_out(&folder, name, &format!("nas/{name}"));
    }
    assert!(converted(&folder, &[]) == plain);
}

#[test]
fn all_files_may_be_links_into_one_folder() {
    let plain = converted(&whole(), &[]);
    let folder = whole();
    for name in contents(&folder.source()).into_keys() {
        move_out(&folder, &name, &format!("nas/{name}"));
    }
    assert!(converted(&folder, &[]) == plain);
}

#[test]
fn links_out_of_the_folder_need_the_users_word() {
    for name in ["config.json", "model.safetensors.index.json", "tokenizer.json", "nested/template.jinja"] {
        let folder = whole();
        let plain = converted(&whole(), &[]);
        // Beside the weights' own links, but not as what they are called.
        move_out(&folder, "model-00001-of-00002.safetensors", "nas/model-00001-of-00002.safetensors");
        move_out(&folder, name, "nas/secret");
        folder.convert(&[]).fails(3, &[name, "a link out of the checkpoint's folder", "secret", "--follow-links"]);
        assert!(!folder.destination().exists());
        assert!(converted(&folder, &["--follow-links"]) == plain, "{name}");
        let mut verify = std::process::Command::new(env!("CARGO_BIN_EXE_prequant"));
        verify.arg("verify").arg(folder.destination()).arg("--against").arg(folder.source());
        Run::of(&mut verify).fails(3, &[name, "--follow-links"]);
        Run::of(verify.arg("--follow-links")).ok();
    }
}

#[test]
fn a_hub_cache_elsewhere_may_be_linked_to() {
    let folder = whole();
    let plain = converted(&whole(), &[]);
    move_out(&folder, "tokenizer.json", &format!("hub/models--org--name/blobs/{}", "ab".repeat(20)));
    move_out(&folder, "nested/template.jinja", "hub/models--org--name/snapshots/main/template.jinja");
    assert!(converted(&folder, &[]) == plain);
}

#[test]
fn a_link_to_a_folder_is_named_and_followed_only_if_the_user_says_so() {
    let folder = Folder::llama();
    fs::create_dir(folder.beside("voices")).unwrap();
    fs::write(folder.beside("voices/a.npz"), "a").unwrap();
    symlink(folder.beside("voices"), folder.source().join("voices")).unwrap();
    symlink(".", folder.source().join("itself")).unwrap();
    let run = folder.convert(&[]).ok();
    assert!(run.stdout.contains("left out: voices/: a link to a folder"), "{}", run.stdout);
    assert!(!folder.destination().join("voices").exists());
    let run = folder.convert(&["--force", "--follow-links"]).ok();
    assert_eq!(folder.read("voices/a.npz"), b"a");
    assert!(run.stdout.contains("left out: itself/: a link to a folder that it lies in"), "{}", run.stdout);
}

#[test]
fn links_that_lead_nowhere_are_named_for_what_they_are() {
    let cache = Folder::new("unused");
    let snapshot = cache.source().join("m/snapshots/0123abcd");
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    symlink(format!("../../blobs/{}", "cd".repeat(20)), snapshot.join("model.safetensors")).unwrap();
    cache
        .convert_from(&snapshot, &[])
        .fails(3, &["model.safetensors", "hub's cache", "blob is gone", "download it again"]);

    let folder = whole();
    let target = move_out(&folder, "model-00002-of-00002.safetensors", "nas/two");
    fs::remove_file(target).unwrap();
    folder.convert(&[]).fails(3, &["model-00002-of-00002.safetensors", "a link that leads nowhere"]);

    let folder = Folder::llama();
    symlink("tokenizer.json", folder.source().join("tokenizer.json")).unwrap();
    folder.convert(&[]).fails(3, &["tokenizer.json", "a link that leads nowhere"]);
    folder.write("model.safetensors", serialize(&llama()));
}
