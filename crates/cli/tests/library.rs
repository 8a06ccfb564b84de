//! `drayman library` against a real Redis, and what the doctor says of it.

use queue_core::library::{Library, Version};
use testkit::RedisServer;

mod support;

use support::Program;

const PROGRAM: &str = env!("CARGO_BIN_EXE_drayman");
const OURS: Version = Version::OURS;

#[test]
fn the_library_is_shown_and_loaded_unless_there_is_a_later_one() {
    let server = RedisServer::start();
    let drayman = Program::new(PROGRAM, &server);
    let lines = |args: &[&str]| {
        let ran = drayman.run(args);
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.out
    };
    let program = format!("this program   {OURS}\n");
    assert_eq!(lines(&["library"]), format!("in Redis       none\n{program}"));
    assert_eq!(lines(&["library", "load"]), format!("in Redis       {OURS}\nbefore         none\n{program}"));
    assert_eq!(lines(&["library", "load"]), format!("in Redis       {OURS}\n{program}"));

    let later = Version { build: OURS.build + 1, ..OURS };
    server.raw(&["FUNCTION", "LOAD", "REPLACE", Library::of(later).text.as_str()]);
    assert_eq!(lines(&["library", "load"]), format!("in Redis       {later}\n{program}"));
    let shown = drayman.run(&["library", "show", "--json"]).json();
    let expected =
        serde_json::json!({ "found": later.to_string(), "now": later.to_string(), "program": OURS.to_string() });
    assert_eq!(shown, [expected]);
}

#[test]
fn the_doctor_tells_which_library_there_is_and_what_is_wrong_with_it() {
    let server = RedisServer::start();
    let drayman = Program::new(PROGRAM, &server);
    let older = Version { build: OURS.build - 1, ..OURS };
    server.raw(&["FUNCTION", "LOAD", Library::of(older).text.as_str()]);
    let ran = drayman.run(&["doctor"]);
    assert!(ran.out.contains(&format!("library       {older}")), "{ran:?}");
    assert!(ran.out.contains(&format!("the library in Redis is older than this program's {OURS}")), "{ran:?}");
    drayman.run(&["library", "load"]);
    let ran = drayman.run(&["doctor"]);
    assert!(ran.out.contains(&format!("library       {OURS}")) && !ran.out.contains("older than"), "{ran:?}");

    let scripts = Program::new(PROGRAM, &server).env("DRAYMAN_REDIS__FUNCTIONS", "false");
    let ran = scripts.run(&["doctor"]);
    assert!(ran.out.contains("redis.functions is false"), "{ran:?}");
    let ran = scripts.run(&["library", "load"]);
    assert_eq!((ran.code, ran.err.contains("redis.functions is false")), (2, true), "{ran:?}");
}
