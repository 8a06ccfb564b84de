//! The seeded faults: each applies to the sources as they are, and says what it breaks and who has to find it. That it is
//! found takes a build for each, and is shown by `scripts/seeded-faults`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The sources of a package's tests that are one program: a file, or a folder.
fn sources(package: &str, target: &str) -> String {
    fn read(path: &Path, text: &mut String) {
        if path.is_dir() {
            fs::read_dir(path).unwrap().for_each(|entry| read(&entry.unwrap().path(), text));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    let tests = root().join("crates").join(package).join("tests");
    let mut text = String::new();
    for path in [tests.join(format!("{target}.rs")), tests.join(target)] {
        if path.exists() {
            read(&path, &mut text);
        }
    }
    text
}

#[test]
fn each_seeded_fault_applies_and_names_who_has_to_find_it() {
    let root = root();
    let mut count = 0;
    for entry in fs::read_dir(root.join("crates/testkit/faults")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "patch") {
            continue;
        }
        count += 1;
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy();
        let (head, _) = text.split_once("\n--- ").unwrap_or_else(|| panic!("{name} is no patch"));
        let said = |what: &str| head.lines().filter_map(|line| line.strip_prefix(what)).collect::<Vec<_>>();
        assert_eq!(said("Breaks: ").len(), 1, "{name} says which promise it breaks");
        let finders = said("Found by: ");
        assert!(!finders.is_empty(), "{name} says who has to find it");
        for finder in finders.into_iter().filter(|finder| *finder != "harness") {
            let [package, target, test] = finder.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{name} names no package, target and test: {finder}")
            };
            let function = format!("fn {}(", test.rsplit("::").next().unwrap());
            assert!(
                sources(package, target).contains(&function),
                "{name} is found by a test that is not there: {finder}"
            );
        }
        // Whatever repository these sources may lie in, paths are those from here.
        let applied = Command::new("git")
            .args(["apply", "--check"])
            .arg(&path)
            .current_dir(&root)
            .env("GIT_CEILING_DIRECTORIES", root.parent().unwrap())
            .output()
            .expect("git runs");
        let reason = String::from_utf8_lossy(&applied.stderr);
        assert!(applied.status.success(), "{name} does not apply to the sources any more: {reason}");
    }
    assert!(count > 0, "there are faults");
}
