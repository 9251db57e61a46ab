//! What a download leaves in a file's place: pointers of git-lfs, pages, refusals, byte order marks.

use crate::support::{Folder, llama, serialize};

fn pointer(size: u64) -> String {
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {size}\n", "ab".repeat(32))
}

#[test]
fn a_git_lfs_pointer_in_the_place_of_weights_is_named() {
    let folder = Folder::new("llama");
    folder.write("model.safetensors", pointer(4_976_698_672));
    folder.convert(&[]).fails(3, &["model.safetensors", "git-lfs pointer to 4.98 GB", "git lfs pull"]);
}

#[test]
fn a_pointer_in_the_place_of_any_other_file_is_named() {
    for name in ["tokenizer.json", "tokenizer.model", "nested/vocab.txt", "spk_dict.pt", "mtp.safetensors", "README.md"]
    {
        let folder = Folder::llama();
        folder.write(name, pointer(11_422_654));
        folder.convert(&[]).fails(3, &[name, "git-lfs pointer to 11.4 MB", "git lfs pull"]);
        assert!(!folder.destination().exists());
    }
    for name in ["config.json", "model.safetensors.index.json"] {
        let folder = Folder::new("llama");
        folder.write("model-00001-of-00001.safetensors", serialize(&llama()));
        folder.write(name, pointer(7));
        folder.convert(&[]).fails(3, &[name, "git-lfs pointer", "git lfs pull"]);
    }
}

#[test]
fn a_page_or_a_refusal_in_a_files_place_is_named() {
    for page in ["<!DOCTYPE html>\n<html><head>", "\n<html lang=\"en\">"] {
        for name in ["model.safetensors", "config.json", "tokenizer.json", "modeling_x.py", "vocab.model"] {
            let folder = Folder::llama();
            folder.write(name, page.repeat(40));
            folder.convert(&[]).fails(3, &[name, "an HTML page", "hf auth login"]);
        }
    }
    for refusal in ["Entry not found", "Access to model x/y is restricted", "{\"error\":\"Repository not found\"}"] {
        for name in ["model.safetensors", "config.json", "tokenizer.json"] {
            let folder = Folder::llama();
            folder.write(name, refusal);
            folder.convert(&[]).fails(3, &[name, "a server's refusal"]);
        }
    }
}

#[test]
fn pages_and_texts_that_are_meant_are_copied() {
    let folder = Folder::llama();
    folder.write("demo.html", "<!DOCTYPE html>");
    folder.write("README.md", "<html>");
    folder.write("notes.txt", format!("How to fix a pointer such as\n{}", pointer(1)));
    folder.convert(&[]).ok();
    assert_eq!(folder.read("demo.html"), b"<!DOCTYPE html>");
}

#[test]
fn other_formats_under_the_name_of_safetensors_are_named() {
    for (content, words) in [
        (&b"GGUF\x03\0\0\0\0\0\0\0"[..], "llama.cpp"),
        (b"PK\x03\x04\0\0\x08\x08\0\0", "torch.save"),
        (b"\x80\x02}q\0(X\x05\0\0\0", "torch.save"),
        (&[0; 4096], "nothing but zeros"),
    ] {
        let folder = Folder::new("llama");
        folder.write("model.safetensors", content);
        folder.convert(&[]).fails(3, &["model.safetensors", words]);
    }
}

#[test]
fn byte_order_marks_are_named() {
    let folder = Folder::llama();
    folder.write("config.json", "\u{feff}{\"model_type\": \"llama\"}");
    folder.convert(&[]).fails(3, &["config.json", "byte order mark", "UTF-8 without"]);
    let wide: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    folder.write("config.json", wide);
    folder.convert(&[]).fails(3, &["config.json", "byte order mark", "UTF-16"]);
    let folder = Folder::new("llama");
    folder.write("model-00001-of-00001.safetensors", serialize(&llama()));
    folder.write("model.safetensors.index.json", "\u{feff}{\"weight_map\": {}}");
    folder.convert(&[]).fails(3, &["index.json", "byte order mark"]);
}

#[test]
fn an_unfinished_download_beside_the_files_is_left_out_by_name() {
    let folder = Folder::llama();
    folder.write("model-00002-of-00002.safetensors.incomplete", "x");
    folder.convert(&[]).ok();
    let left_out = folder.read_json("prequant.json")["left_out"].clone();
    assert_eq!(left_out[0]["name"], "model-00002-of-00002.safetensors.incomplete");
    assert_eq!(left_out[0]["why"], "an unfinished download");
}
