//! What a file of a checkpoint is to the programs that load it, told by its path.
//!
//! What isn't known to be for people is taken to be loaded: vocabularies, weights and configs have names of every kind, and a
//! file that a client may pick up must not pass for a remark. `python/src/prequant_loader/file_class.py` is the same table;
//! `tests/data/file_classes.json` is tried on both.

use super::staging::{DONE_NAME, STAGING_NAME};

/// Whether clients load a file, or could take it for one that they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileClass {
    /// Weights in any format and their indexes, adapters, code, tokenizer and template files, configs, and whatever isn't
    /// known.
    Loaded,
    /// Documents, pictures, licenses, and what git, the hub or a desktop leaves behind.
    ForPeople,
}

/// Folders of git, the hub, editors and unfinished conversions, wherever they are: nothing in them belongs to a checkpoint.
const FOLDERS: &[&str] =
    &[STAGING_NAME, DONE_NAME, ".git", ".github", ".cache", ".huggingface", ".ipynb_checkpoints", ".idea", ".vscode"];

/// Files that git, the hub or a desktop leaves beside those of a checkpoint.
const LEFT_BEHIND: &[&str] = &[
    ".gitattributes",
    ".gitignore",
    ".gitmodules",
    ".gitkeep",
    ".lfsconfig",
    ".git", // in a worktree or a submodule it is a file
    ".ds_store",
    "thumbs.db",
    "desktop.ini",
];

/// Formats of documents and pictures.
const FOR_PEOPLE: &[&str] = &[
    "md", "markdown", "mdx", "rst", "adoc", "pdf", "html", "htm", "tex", "bib", "cff", "log", //
    "png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "ico", "tif", "tiff", "avif", "heic", "mp4", "mov", "webm",
];

/// Texts that have their names in common, and no format: `LICENSE`, `LICENSE-MIT`, `Notice.txt`. Other `.txt` files may be
/// vocabularies, merges or prompts.
const TEXTS: &[&str] = &[
    "license",
    "licence",
    "licenses",
    "licences",
    "notice",
    "notices",
    "copying",
    "copyright",
    "patents",
    "eula",
    "terms",
    "use_policy",
    "acceptable_use_policy",
    "disclaimer",
    "third_party_notices",
    "readme",
    "changelog",
    "changes",
    "history",
    "release_notes",
    "notes",
    "todo",
    "authors",
    "contributors",
    "contributing",
    "citation",
    "acknowledgements",
];

impl FileClass {
    /// The class of the file at `path` below a checkpoint's folder, with forward slashes. Upper and lower case are the same.
    pub(crate) fn of(path: &str) -> FileClass {
        let path = path.to_lowercase();
        let (folders, name) = path.rsplit_once('/').unwrap_or(("", &path));
        let is_apart = folders.split('/').any(|folder| FOLDERS.contains(&folder));
        if is_apart || LEFT_BEHIND.contains(&name) || is_document(name) || is_text(name) {
            FileClass::ForPeople
        } else {
            FileClass::Loaded
        }
    }
}

/// A file of a format that people read or look at.
fn is_document(name: &str) -> bool {
    match name.rsplit_once('.') {
        Some((stem, format)) => !stem.is_empty() && FOR_PEOPLE.contains(&format),
        None => false,
    }
}

/// One of [`TEXTS`], with more words after it or without, as plain text.
fn is_text(name: &str) -> bool {
    let stem = name.strip_suffix(".txt").unwrap_or(name);
    let is_plain = !stem.contains('.');
    let begins_with = |text: &str| {
        let rest = stem.strip_prefix(text);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_', ' ']))
    };
    is_plain && TEXTS.iter().any(|text| begins_with(text))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Paths by class; Python's table is tried on the same ones.
    const EXAMPLES: &str = include_str!("../../tests/data/file_classes.json");

    #[test]
    fn examples_have_their_class() {
        let examples: BTreeMap<String, Vec<String>> = serde_json::from_str(EXAMPLES).unwrap();
        assert_eq!(examples.keys().collect::<Vec<_>>(), ["for_people", "loaded"]);
        for (class, paths) in &examples {
            let expected = if class == "loaded" { FileClass::Loaded } else { FileClass::ForPeople };
            for path in paths {
                assert_eq!(FileClass::of(path), expected, "{path}");
            }
        }
    }
}
