//! The documentation: every relative link leads to a file that exists, and to a heading that it has; README stays short; formats
//! are those that there are.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

#[cfg(not(feature = "test-format"))]
use prequant::format::{FORMATS, Sharing};

/// README says what, why, and where the rest is.
const README_LINES: usize = 200;

#[test]
fn readme_is_short() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= README_LINES, "README.md has {lines} lines, more than {README_LINES}: move details to docs/");
}

/// The table of formats.md against the list that the command line, the schema and the library read.
#[cfg(not(feature = "test-format"))]
#[test]
fn the_page_on_formats_has_each_of_them_in_a_row() {
    let text = fs::read_to_string(root().join("docs/formats.md")).unwrap();
    let (_, table) = text.split_once("| `--format` |").unwrap();
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    let named = |row: &&str| row.starts_with("| `");
    assert_eq!(rows.iter().filter(|row| named(row)).count(), FORMATS.len(), "{rows:#?}");
    for format in FORMATS {
        let row = rows.iter().find(|row| row.starts_with(&format!("| `{}` |", format.name)));
        let row = row.unwrap_or_else(|| panic!("no row for {format:?}"));
        let is_bitsandbytes = format.sharing == Sharing::Blocks && row.ends_with("| bitsandbytes |");
        assert!(is_bitsandbytes || row.contains(format.library_name), "{row}");
    }
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
