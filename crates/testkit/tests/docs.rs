//! The documentation names tests that exist.

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
    for (page, least) in [("README.md", 5), ("docs/guarantees.md", 20), ("docs/operations.md", 20)] {
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
