//! The documentation names tests that exist, points at pages and headings that exist, and its first commands work as
//! typed.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testkit::{Scratch, bin};

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

/// The pages that people read first: where each lies, and its text.
fn pages() -> Vec<(String, String)> {
    let folder = fs::read_dir(root().join("docs")).expect("a folder").map(|entry| entry.expect("an entry").path());
    let pages = folder.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    let read = |path: PathBuf| (path.display().to_string(), fs::read_to_string(&path).expect("a page"));
    pages.chain([root().join("README.md")]).map(read).collect()
}

/// The blocks of commands on a page, in their order: whether it is marked to be tried, and its text.
fn commands(page: &str) -> Vec<(bool, String)> {
    let lines: Vec<&str> = page.lines().collect();
    let begins = |at: &usize| lines[*at] == "```sh" || lines[*at] == "```" && lines[*at + 1].starts_with("drayman");
    let block = |at: usize| {
        let marks = lines[..at].iter().rev().take_while(|line| line.starts_with("<!-- "));
        let is_tried = marks.into_iter().any(|mark| *mark == "<!-- try -->");
        (is_tried, lines[at + 1..].iter().take_while(|line| **line != "```").map(|line| format!("{line}\n")).collect())
    };
    (0..lines.len() - 1).filter(begins).map(block).collect()
}

/// First blocks that a test can't run: they take long, or change the machine. What they name is there all the same.
const NOT_TRIED: [&str; 3] = ["scripts/demo ", "scripts/setup && cargo build", "cargo build --profile dist"];

#[test]
fn the_first_commands_of_each_page_work_as_they_are_typed() {
    let scratch = Scratch::new("try");
    // All programs are built already. This one runs that of `cargo run -p PACKAGE --example NAME ARGUMENT...`.
    let programs = bin("drayman").parent().expect("a folder").to_owned();
    let cargo = scratch.path().join("cargo");
    let script = "#!/bin/sh\nname=$5\nshift 5\nexec \"$DRAYMAN_TEST_BIN/examples/$name\" \"$@\"\n";
    fs::write(&cargo, script).expect("a program");
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("a program");
    let path = std::env::var("PATH").expect("a path");
    let mut tried = 0;
    for (page, text) in pages() {
        let blocks = commands(&text);
        let Some((is_tried, first)) = blocks.first() else { continue };
        let can_not = NOT_TRIED.iter().any(|begin| first.starts_with(begin));
        assert!(*is_tried != can_not, "{page}: its first commands are not tried:\n{first}");
        for word in first.split_whitespace().filter(|_| can_not) {
            let names = ["scripts/", "deploy/"].iter().any(|folder| word.starts_with(folder));
            assert!(!names || root().join(word).exists(), "{page}: there is no {word}");
            if let Some(program) = word.strip_prefix("target/dist/") {
                bin(program);
            }
        }
        let typed: String = blocks.iter().filter(|(is_tried, _)| *is_tried).map(|(_, block)| block.as_str()).collect();
        if typed.is_empty() {
            continue;
        }
        assert!(text.contains("`scripts/try`"), "{page} does not say where its commands work");
        tried += 1;
        let mut shell = Command::new(root().join("scripts/try"))
            .env("DRAYMAN_TEST_BIN", &programs)
            .env("PATH", format!("{}:{path}", scratch.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("scripts/try starts");
        let mut keyboard = shell.stdin.take().expect("piped");
        write!(keyboard, "set -euxo pipefail\n{typed}").expect("it reads");
        drop(keyboard);
        let output = shell.wait_with_output().expect("it ends");
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
        assert!(output.status.success(), "{page}:\n{}", said.join("\n"));
    }
    assert!(tried >= 8, "{tried}");
}

#[test]
fn the_samples_are_what_the_pages_show() {
    for (page, mark, sample) in [
        ("README.md", "python handler", "greet.py"),
        ("docs/handlers.md", "python rows", "book.py"),
        ("docs/flows.md", "flow nightly", "nightly.toml"),
    ] {
        let text = fs::read_to_string(root().join(page)).expect("the page");
        let (_, rest) = text.split_once(&format!("<!-- test: {mark} -->\n```")).expect("it is marked");
        let (shown, _) = rest.split_once('\n').expect("a block").1.split_once("```").expect("it ends");
        assert_eq!(shown, fs::read_to_string(root().join("docs/samples").join(sample)).expect("a sample"), "{sample}");
    }
}
