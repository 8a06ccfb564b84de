//! The seeded faults: each applies to the sources as they are, and says what it breaks and who has to find it. That it is
//! found takes a build for each, and is shown by `scripts/seeded-faults`; here that script works on sources of one line.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::{Scratch, eventually_blocking};

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
    let told = fs::read_to_string(root.join("crates/testkit/faults/README.md")).unwrap();
    let (_, table) = told.split_once("fault  ").expect("a table");
    for entry in fs::read_dir(root.join("crates/testkit/faults")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "patch") {
            continue;
        }
        count += 1;
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy();
        assert!(table.lines().any(|line| line.starts_with(&format!("{name} "))), "the last table tells of {name}");
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

/// Builds unless the sources say `bad`; its one test passes while they say `good`.
const CARGO: &str = r#"#!/bin/sh
case "$*" in
*--no-run*) ! grep -q bad source.lua ;;
*) if grep -q slow source.lua; then echo $$ > "$SLOW"; exec sleep 600; fi
   case "$*" in
   *library::*) passes="! grep -q nonsense source.lua" ;;
   *) passes="grep -q good source.lua" ;;
   esac
   if eval "$passes"; then
       echo 'test result: ok. 1 passed; 0 failed; 0 ignored'
   else
       echo 'test result: FAILED. 0 passed; 1 failed; 0 ignored'
       exit 101
   fi ;;
esac
"#;

/// A repository whose only source is a line, with faults that make another one of it.
struct Repository(Scratch);

impl Repository {
    fn new(faults: &[(&str, &str, &str)]) -> Self {
        let repository = Self(Scratch::new("faults"));
        let folder = repository.0.path();
        for script in ["lib.sh", "seeded-faults"] {
            fs::create_dir_all(folder.join("scripts")).unwrap();
            fs::copy(root().join("scripts").join(script), folder.join("scripts").join(script)).unwrap();
        }
        fs::write(folder.join("source.lua"), "good\n").unwrap();
        fs::write(folder.join(".gitignore"), "target/\n").unwrap();
        fs::create_dir_all(folder.join("crates/testkit/faults")).unwrap();
        for (name, before, after) in faults {
            let patch = format!(
                "Breaks: nothing\nFound by: queue-core any a::test\n\n--- a/source.lua\n+++ b/source.lua\n@@ -1 +1 @@\n-{before}\n+{after}\n"
            );
            fs::write(folder.join(format!("crates/testkit/faults/{name}.patch")), patch).unwrap();
        }
        fs::create_dir_all(folder.join("target/bin")).unwrap();
        let cargo = folder.join("target/bin/cargo");
        fs::write(&cargo, CARGO).unwrap();
        fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
        repository.git(&["init", "--quiet"]);
        repository.git(&["add", "."]);
        repository.git(&["-c", "user.name=a", "-c", "user.email=a", "commit", "--quiet", "--message", "all"]);
        repository
    }

    fn git(&self, args: &[&str]) -> String {
        let output = Command::new("git")
            .args(args)
            .current_dir(self.0.path())
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .output()
            .unwrap();
        assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn slow(&self) -> PathBuf {
        self.0.path().join("target/slow")
    }

    fn script(&self) -> Command {
        let mut script = Command::new(self.0.path().join("scripts/seeded-faults"));
        let path = format!("{}:{}", self.0.path().join("target/bin").display(), std::env::var("PATH").unwrap());
        script.env("PATH", path).env("SLOW", self.slow()).env_remove("CARGO_TARGET_DIR");
        script
    }

    fn run(&self) -> (Output, String) {
        let output = self.script().output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        self.is_untouched();
        (output, text)
    }

    /// Neither what is the developer's nor the copy shows a trace of any fault.
    fn is_untouched(&self) {
        assert_eq!(self.git(&["status", "--porcelain"]), "");
        assert_eq!(fs::read_to_string(self.0.path().join("source.lua")).unwrap(), "good\n");
        assert_eq!(fs::read_to_string(self.0.path().join("target/seeded-faults/tree/source.lua")).unwrap(), "good\n");
    }
}

#[test]
fn a_fault_is_found_by_a_test_that_fails_and_by_nothing_else() {
    let (output, text) = Repository::new(&[("one", "good", "wrong"), ("two", "good", "worse")]).run();
    assert!(output.status.success() && text.contains("all 2 are found"), "{text}");
    for (after, why) in [
        ("bad", "it does not build"),
        ("good all the same", "a::test: good"),
        ("nonsense", "the library does not load: found"),
    ] {
        let (output, text) = Repository::new(&[("one", "good", "wrong"), ("two", "good", after)]).run();
        assert!(!output.status.success() && text.contains("NOT FOUND: ") && text.contains(why), "{after}: {text}");
        assert!(text.contains("1 of 2 are not found"), "{text}");
    }
    let (output, text) = Repository::new(&[("one", "good", "wrong"), ("two", "other", "wrong")]).run();
    assert!(!output.status.success() && text.contains("two does not apply any more"), "{text}");
}

#[test]
fn an_interrupted_run_leaves_neither_a_fault_nor_a_process() {
    let repository = Repository::new(&[("one", "good", "slow")]);
    let mut script = repository.script().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let pid: i32 =
        eventually_blocking("the test to run", || fs::read_to_string(repository.slow()).ok()?.trim().parse().ok());
    kill(Pid::from_raw(script.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(script.wait().unwrap().code(), Some(130));
    repository.is_untouched();
    eventually_blocking("the test to end", || kill(Pid::from_raw(pid), None).is_err().then_some(()));
}
