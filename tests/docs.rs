//! The documentation is true: every relative link leads to a file that exists, and to a heading that it has; README stays
//! short; formats are those that there are; imports point down the table of rooms in docs/architecture.md; the library
//! names no flag.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use prequant::FORMATS;
use prequant::internal::format::Sharing;

/// What the feature `test-format` adds isn't for users.
const TEST_FORMAT: &str = "mxint4";

/// README says what, why, and where the rest is.
const README_LINES: usize = 200;

#[test]
fn readme_is_short() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= README_LINES, "README.md has {lines} lines, more than {README_LINES}: move details to docs/");
}

/// The table of formats.md against the list that the command line, the schema and the library read.
#[test]
fn the_page_on_formats_has_each_of_them_in_a_row() {
    let text = fs::read_to_string(root().join("docs/formats.md")).unwrap();
    let (_, table) = text.split_once("| `--format` |").unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    let named = |row: &&str| row.starts_with("| `");
    let formats: Vec<_> = FORMATS.iter().filter(|format| format.name != TEST_FORMAT).collect();
    assert_eq!(rows.iter().filter(|row| named(row)).count(), formats.len(), "{rows:#?}");
    for format in formats {
        let row = rows.iter().find(|row| row.starts_with(&format!("| `{}` |", format.name)));
        let row = row.unwrap_or_else(|| panic!("no row for {format:?}"));
        let is_bitsandbytes = format.sharing == Sharing::Blocks && row.ends_with("| bitsandbytes |");
        assert!(is_bitsandbytes || row.contains(format.library_name), "{row}");
    }
}

#[test]
fn readme_has_every_format_in_a_row() {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, table) = text.split_once("| `--format` |").unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    let names: Vec<&str> = FORMATS.iter().map(|format| format.name).filter(|name| *name != TEST_FORMAT).collect();
    let of = |row: &&str, name: &str| row.starts_with(&format!("| `{name}`"));
    assert!(names.iter().all(|name| rows.iter().any(|row| of(row, name))), "{rows:#?}");
    assert!(rows.iter().all(|row| names.iter().any(|name| of(row, name))), "{rows:#?}");
}

#[test]
fn links_lead_to_files_and_headings_that_exist() {
    let pages = pages();
    assert!(pages.len() > 10, "{pages:?}");
    let mut broken = Vec::new();
    let mut links = 0;
    for page in &pages {
        let text = prose(page);
        for target in targets(&text) {
            links += 1;
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            if !file.exists() || (!heading.is_empty() && !headings(&file).contains(heading)) {
                broken.push(format!("{}: {target}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(links > 20, "only {links} links found");
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn imports_point_down_the_table_of_rooms() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    // What is in a row stands in its first column, as code.
    let rows: Vec<Vec<&str>> = page
        .lines()
        .skip_while(|line| !line.starts_with("| room |"))
        .skip(2)
        .map_while(|line| line.strip_prefix("| "))
        .map(|row| row.split(" | ").next().unwrap().split('`').skip(1).step_by(2).map(room).collect())
        .collect();
    assert!(rows.len() > 10, "{rows:?}");
    let row_of = |room: &str| rows.iter().position(|row| row.contains(&room));
    let (mut imports, mut wrong) = (0, Vec::new());
    for file in source_files(&root().join("src")) {
        let name = file.strip_prefix(root().join("src")).unwrap().display().to_string();
        let own = room(&name).to_owned();
        if own == "lib" {
            continue;
        }
        let Some(row) = row_of(&own) else { panic!("src/{name}: its room isn't in docs/architecture.md's table") };
        for used in imported_rooms(&fs::read_to_string(&file).unwrap()) {
            imports += 1;
            if used != own && row_of(&used).is_none_or(|below| below <= row) {
                wrong.push(format!("src/{name} imports crate::{used}"));
            }
        }
    }
    assert!(imports > 100, "only {imports} imports found");
    assert!(wrong.is_empty(), "imports that point up, or to the side:\n{}", wrong.join("\n"));
}

#[test]
fn the_library_names_no_flag_of_the_command() {
    let is_flag =
        |word: &str| word.strip_prefix("--").is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
    let mut found = Vec::new();
    for file in source_files(&root().join("src")).iter().filter(|file| !file.starts_with(root().join("src/cli"))) {
        for line in fs::read_to_string(file).unwrap().lines().filter(|line| !line.contains("sha256sum --check")) {
            if line.split(|c: char| !c.is_alphanumeric() && c != '-').any(is_flag) {
                found.push(format!("{}: {}", file.display(), line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "flags belong into src/cli:\n{}", found.join("\n"));
}

/// `ops` of `ops/verify/mod.rs`, `error` of `error.rs`.
fn room(path: &str) -> &str {
    path.split('/').next().unwrap().trim_end_matches(".rs")
}

fn source_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { source_files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The rooms that a file's code takes something from; its comments and its tests may name any.
fn imported_rooms(text: &str) -> Vec<String> {
    let code =
        text.split("#[cfg(test)]\nmod tests {").next().unwrap().lines().filter(|line| !line.trim().starts_with("//"));
    let code = code.collect::<Vec<_>>().join("\n");
    let paths = code.split("crate::").skip(1);
    let names = paths.map(|path| path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned());
    names.map(|name| if ["Error", "Result"].contains(&&*name) { "error".to_owned() } else { name }).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The pages at the top, those of docs/, and the Python package's.
fn pages() -> Vec<PathBuf> {
    let folders = ["", "docs", "python", "python/examples"].map(|folder| root().join(folder));
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).into_iter().flatten());
    let mut pages: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    pages.sort();
    pages
}

/// A page without its blocks and spans of code.
fn prose(page: &Path) -> String {
    let text = fs::read_to_string(page).unwrap();
    let blocks = text.split("```").step_by(2);
    blocks.flat_map(|block| block.split('`').step_by(2)).collect()
}

/// Where the relative links of a text lead.
fn targets(text: &str) -> impl Iterator<Item = &str> {
    let ends = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    ends.map(|(target, _)| target).filter(|target| !target.contains("://"))
}

/// The headings of a page, as links name them.
fn headings(page: &Path) -> HashSet<String> {
    let text = fs::read_to_string(page).unwrap();
    let titles = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    titles
        .map(|title| {
            let kept =
                title.to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>();
            kept.replace(' ', "-")
        })
        .collect()
}
