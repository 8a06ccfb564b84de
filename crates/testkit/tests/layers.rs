//! What must not depend on what, as ARCHITECTURE.md says it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace")
}

/// Every source file below a folder, by its path from the workspace's root.
fn sources(folder: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|ending| ending == "rs") {
                let name = entry.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
                found.insert(name, fs::read_to_string(&entry).expect("a text"));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} holds no source");
    found
}

/// The lines of code, without comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"))
}

/// The files below `folder` of which a line of code contains one of `words`.
fn naming(folder: &str, words: &[&str]) -> Vec<String> {
    let names = |text: &str| code(text).any(|line| words.iter().any(|word| line.contains(word)));
    sources(folder).into_iter().filter(|(_, text)| names(text)).map(|(name, _)| name).collect()
}

/// The packages that a package's manifest names in the section.
fn dependencies(package: &str, section: &str) -> Vec<String> {
    let manifest = fs::read_to_string(root().join("crates").join(package).join("Cargo.toml")).expect("a manifest");
    let lines = manifest.lines().skip_while(|line| *line != format!("[{section}]")).skip(1);
    lines
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn only_its_door_names_the_client_of_the_object_store() {
    let known = ["crates/queue-core/src/objects.rs", file!().replace('\\', "/").as_str()].map(str::to_owned);
    assert_eq!(naming("crates", &["object_store::"]), known);
}

#[test]
fn only_the_door_names_the_redis_client() {
    assert_eq!(
        naming("crates", &["fred::", "fred."]),
        ["crates/queue-core/src/store.rs", file!().replace('\\', "/").as_str()]
    );
    for package in ["worker", "canceller", "cli", "console", "testkit"] {
        assert!(!dependencies(package, "dependencies").contains(&"fred".into()), "{package}");
    }
}

/// Tests that still name keys of Redis, though the keys are not what they test. None may be added.
const NAME_KEYS: &[&str] = &[
    "crates/queue-core/tests/protocol/foreign.rs",
    "crates/queue-core/tests/protocol/forged.rs",
    "crates/queue-core/tests/protocol/generated.rs",
    "crates/queue-core/tests/protocol/hostile.rs",
    // The harness looks from outside, and shares no code with what it judges: this is its one place that names keys.
    "crates/testkit/src/chaos/state.rs",
];

/// Tests that are about the keys themselves say so in their first line, and change with them.
const ABOUT_KEYS: &str = "//! Layout: ";

/// Whether a line of code holds the beginning of a key, looks for keys by what they hold, or asks the product which they are.
fn names_a_key(line: &str) -> bool {
    // Where messages come, and what a call says that all keys begin with.
    let told = ["wake(", "cancel(", "announcements(", "prefix("];
    let asks = line
        .split("store.keys()")
        .skip(1)
        .any(|rest| !told.iter().any(|word| rest.trim_start_matches('.').starts_with(word)));
    let holds =
        ["contains(\"", "ends_with(\"", "starts_with(\""].iter().any(|holds| line.contains(&format!("key.{holds}")));
    if asks || holds {
        return true;
    }
    let ours = |rest: &str| rest.trim_start_matches('{').starts_with(|first: char| first.is_ascii_lowercase());
    let looks = ["\"KEYS\"", "\"SCAN\"", "\"MATCH\"", "\"batch:\"", "\"limits:\""];
    let published = ["jobs:", "queue:", "queues:", "indexes:", "wip:", "locks:", "rejected", "users"];
    line.split("drayman:").skip(1).any(ours)
        || line.split("batch:").skip(1).any(|rest| published.iter().any(|word| rest.starts_with(word)))
        || line.contains("limits:batch")
        || (looks.iter().any(|word| line.contains(word)) && !line.contains("\"KEYS\", \"*\""))
}

#[test]
fn only_the_facade_of_the_state_names_keys_in_tests() {
    let this = file!().replace('\\', "/");
    let is_facade = |name: &str| name.starts_with("crates/testkit/src/state");
    let is_test = |name: &str| {
        ["crates/testkit/", "benches/"].iter().any(|home| name.starts_with(home)) || name.contains("/tests/")
    };
    let naming: Vec<String> = [sources("crates"), sources("benches/src")]
        .into_iter()
        .flatten()
        .filter(|(name, _)| is_test(name) && !is_facade(name) && *name != this)
        .filter(|(_, text)| !text.starts_with(ABOUT_KEYS) && code(text).any(names_a_key))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(naming, NAME_KEYS, "use testkit::state, or take from the list what names none any more");
}

#[test]
fn no_program_is_built_on_another() {
    let programs = ["worker", "canceller", "cli"];
    for package in programs {
        for other in programs {
            assert!(!dependencies(package, "dependencies").contains(&other.into()), "{package} needs {other}");
        }
    }
}

#[test]
fn the_words_do_no_input_or_output() {
    let words =
        ["ids.rs", "job.rs", "keys.rs", "model.rs", "model/cron.rs", "model/sql.rs", "model/task.rs", "model/track.rs"];
    let files = sources("crates/queue-core/src");
    for word in words {
        let text = &files[&format!("crates/queue-core/src/{word}")];
        let own = text.split("#[cfg(test)]").next().unwrap_or(text);
        for door in ["crate::store", "crate::calls", "crate::library", "tokio", "std::fs", "std::net"] {
            assert!(code(own).all(|line| !line.contains(door)), "{word} names {door}");
        }
    }
}

#[test]
fn an_executor_never_sees_redis_or_the_queue() {
    let doors = ["queue_core::store", "queue_core::Store", "queue_core::calls", "queue_core::session"];
    assert_eq!(naming("crates/worker/src/execute", &doors), Vec::<String>::new());
}

#[test]
fn test_servers_are_for_tests_only() {
    for package in ["queue-core", "worker", "canceller", "cli", "console"] {
        assert!(!dependencies(package, "dependencies").contains(&"testkit".into()), "{package}");
    }
}
