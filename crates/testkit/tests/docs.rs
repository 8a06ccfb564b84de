//! The documentation names tests that exist, and points at pages and headings that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The names of all functions in the sources below a folder.
fn functions(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            functions(&entry, names);
        } else if entry.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&entry).expect("a text");
            names.extend(text.split("fn ").skip(1).filter_map(|rest| rest.split(['(', '<']).next()).map(str::to_owned));
        }
    }
}

#[test]
fn each_promise_stands_beside_tests_that_exist() {
    let mut names = BTreeSet::new();
    functions(&root().join("crates"), &mut names);
    for (page, least) in [
        ("README.md", 5),
        ("docs/guarantees.md", 20),
        ("docs/operations.md", 20),
        ("docs/handlers.md", 20),
        ("docs/recurring.md", 4),
        ("docs/limits.md", 8),
        ("docs/sql-rows.md", 8),
    ] {
        let text = fs::read_to_string(root().join(page)).expect("the page");
        // Names of tests are sentences; settings and statuses in backticks are shorter, variables in capitals.
        let is_sentence = |text: &&str| {
            text.matches('_').count() >= 3
                && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let text = text.replace("```", "");
        let named: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_sentence).collect();
        assert!(named.len() > least, "{page}: {named:?}");
        for name in named {
            assert!(names.contains(name), "{page}: {name} is no test");
        }
    }
}

/// The anchors of a page's headings, as they are made where pages are shown.
fn anchors(page: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(page).expect("the page");
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let kept = |c: &char| c.is_alphanumeric() || ['-', '_', ' '].contains(c);
    headings.map(|heading| heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")).collect()
}

#[test]
fn the_pages_point_at_what_exists() {
    let of_docs = fs::read_dir(root().join("docs")).expect("a folder").map(|entry| entry.expect("an entry").path());
    let others = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "benches/RESULTS.md", "docs/protocol/README.md"];
    let pages = of_docs.filter(|path| path.is_file()).chain(others.map(|page| root().join(page)));
    let mut links = 0;
    for page in pages {
        let text = fs::read_to_string(&page).expect("the page");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            links += 1;
            if link.starts_with("https://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let to = if file.is_empty() { page.clone() } else { page.with_file_name(file) };
            let is_there = to.exists() && (heading.is_empty() || anchors(&to).contains(heading));
            assert!(is_there, "{} points at {link}", page.display());
        }
    }
    assert!(links > 50, "{links}");
}
