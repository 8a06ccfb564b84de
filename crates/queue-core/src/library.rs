//! The library of functions in Redis. All changes of a job's state happen in them.
//!
//! Its text is put together from the Lua files that stand beside the Rust that calls them: what several share first, then the
//! body of each function. Redis reads it once, and keeps it: a call costs what it does, and not what it could do.
//!
//! The same text renders as a script for each function, with what that one reaches. So work can be ended where the library is
//! gone and can't be loaded, and a server that has no functions is served at all.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use crate::ids::{APP_MAX_BYTES, JOB_ID_MAX_BYTES, OP_MAX_BYTES, USER_MAX_BYTES};
use crate::job::{
    CHECKPOINT_MAX_BYTES, CONCURRENCY_MAX, EARLIER_MAX_BYTES, FIELDS, MISSING_MS, PAYLOAD_MAX, PERIOD_MAX_MS, RATE_MAX,
    REJECTED_MS, UNIQUE_MAX_BYTES, WEIGHTS,
};
use crate::keys::{Holds, Keys, TABLE as TABLE_OF_KEYS};
use crate::model::retry::{HISTORY_MAX_BYTES, SUSPECT_AFTER, UNCLEAN_MAX};

/// Raised with every change of the text that is no change of [`crate::VERSION_MINOR`].
const BUILD: u32 = 5;

/// One function of the library.
#[derive(Debug)]
pub struct Function {
    /// Its name, behind that of the library.
    pub name: &'static str,
    /// Where its text stands.
    file: &'static str,
    body: &'static str,
    /// Modules that it needs beside those that every one has.
    needs: &'static [Module],
    /// A function whose text it calls by its name.
    calls: Option<&'static Function>,
    /// What it does to the state.
    pub effect: Effect,
}

/// What a function does to the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It brings new work. While Redis holds more than its `maxmemory` it is refused before it has written anything.
    Adds,
    /// It frees memory, or needs little, and without it nothing would be freed: it runs also then.
    Moves,
    /// It writes nothing, and Redis sees to that.
    Reads,
}

impl Effect {
    /// The flag by which Redis knows it.
    fn flag(self) -> Option<&'static str> {
        match self {
            Effect::Adds => None,
            Effect::Moves => Some("allow-oom"),
            Effect::Reads => Some("no-writes"),
        }
    }
}

/// What functions share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Module {
    file: &'static str,
    text: &'static str,
}

macro_rules! module {
    ($file:literal) => {
        Module { file: $file, text: include_str!($file) }
    };
}

const BEGIN: Module = module!("library/begin.lua");
const COMMON: Module = module!("library/common.lua");
const SERVE: Module = module!("library/serve.lua");
const FLOW: Module = module!("flow/flow.lua");
const BATCH: Module = module!("batch/batch.lua");
const TRACKER: Module = module!("tracker/tracker.lua");
const LOOK: Module = module!("upkeep/look.lua");

macro_rules! functions {
    ($($constant:ident = $folder:ident / $name:literal $(from $file:literal)? $(needs $($module:ident)and+)? $(calls $called:ident)?, $effect:ident;)+) => {
        $(#[doc = concat!("`", $name, "`")]
        pub static $constant: Function = Function {
            name: $name,
            file: functions!(@path $folder $name $($file)?),
            body: include_str!(functions!(@path $folder $name $($file)?)),
            needs: &[$($($module),+)?],
            calls: functions!(@called $($called)?),
            effect: Effect::$effect,
        };)+

        /// Every function.
        pub static TABLE: &[&Function] = &[$(&$constant),+];
    };
    (@path $folder:ident $name:literal) => { concat!(stringify!($folder), "/", $name, ".lua") };
    (@path $folder:ident $name:literal $file:literal) => { concat!(stringify!($folder), "/", $file, ".lua") };
    (@called) => { None };
    (@called $called:ident) => { Some(&$called) };
}

functions! {
    VERSION = library/"version", Reads;
    RIGHTS = library/"rights", Reads;
    SUBMIT = jobs/"submit", Adds;
    ADMIT = jobs/"admit", Adds;
    // The leader's own look. Were it refused, a memory that is full of jobs that nobody has noticed would stay full.
    ADMIT_WHEN_FULL = jobs/"admit_when_full" from "admit", Moves;
    MARK_READY = jobs/"mark_ready", Moves;
    TAKE = jobs/"take" needs BATCH, Moves;
    REFUSE = jobs/"refuse" needs BATCH, Moves;
    UPDATE_CLAIMED = jobs/"update_claimed", Moves;
    FINISH = jobs/"finish" needs BATCH, Moves;
    CANCEL = jobs/"cancel" needs BATCH, Moves;
    RETRY = jobs/"retry", Moves;
    SESSION_OPEN = jobs/"session_open", Moves;
    SESSION_SERVE = jobs/"session_serve", Moves;
    SESSION_BEAT = jobs/"session_beat", Moves;
    SESSION_END = jobs/"session_end" needs BATCH, Moves;
    LEADER_LEASE = upkeep/"leader_lease", Moves;
    PROMOTE_AND_EXPIRE = upkeep/"promote_and_expire", Moves;
    HOST_LOCK = upkeep/"host_lock", Moves;
    OLD_QUEUE = upkeep/"old_queue", Moves;
    PURGE_STALE_JOBS = upkeep/"purge_stale_jobs", Moves;
    PURGE_IDLE_POOLS = upkeep/"purge_idle_pools", Moves;
    PURGE_WIP = upkeep/"purge_wip", Moves;
    RECONCILE = upkeep/"reconcile" needs BATCH and TRACKER and LOOK, Moves;
    // The same, for who only looks.
    COMPARE = upkeep/"compare" from "reconcile" needs BATCH and TRACKER and LOOK, Reads;
    SET_CAPACITIES = limits/"set_capacities", Moves;
    SET_LIMITS = limits/"set_limits", Moves;
    READ_LIMITS = limits/"read_limits", Reads;
    INSPECT = inspect/"inspect", Reads;
    READ_QUEUES = inspect/"read_queues", Reads;
    SCHEDULE_PUT = schedule/"schedule_put", Adds;
    SCHEDULE_PAUSE = schedule/"schedule_pause", Moves;
    SCHEDULE_REMOVE = schedule/"schedule_remove", Moves;
    SCHEDULE_READ = schedule/"schedule_read", Reads;
    SCHEDULE_DUE = schedule/"schedule_due", Moves;
    SCHEDULE_TICK = schedule/"schedule_tick" calls SUBMIT, Adds;
    // The same where no job is made. Were it refused, a full memory would keep schedules from saying what they wait for.
    SCHEDULE_PASS = schedule/"schedule_pass" from "schedule_tick" calls SUBMIT, Moves;
    BATCH_LOAD = batch/"batch_load" needs BATCH, Adds;
    BATCH_UNLOAD = batch/"batch_unload" needs BATCH, Moves;
    BATCH_RELEASE = batch/"batch_release" needs BATCH, Moves;
    BATCH_ABORT = batch/"batch_abort" needs BATCH, Moves;
    BATCH_CUT = batch/"batch_cut" needs BATCH, Moves;
    BATCH_READ = batch/"batch_read", Reads;
    FLOW_LAUNCH = flow/"flow_launch", Adds;
    FLOW_STOP = flow/"flow_stop" needs BATCH, Moves;
    FLOW_ABANDON = flow/"flow_abandon", Moves;
    FLOW_READ = flow/"flow_read", Reads;
    TRACKER_CREATE = tracker/"tracker_create" needs TRACKER, Adds;
    TRACKER_START = tracker/"tracker_start" needs TRACKER, Moves;
    TRACKER_RENEW = tracker/"tracker_renew" needs TRACKER, Moves;
    TRACKER_END = tracker/"tracker_end" needs TRACKER, Moves;
    TRACKER_SET = tracker/"tracker_set" needs TRACKER, Moves;
    TRACKER_READ = tracker/"tracker_read" needs TRACKER, Reads;
}

/// Which of two texts is the newer one. Those of one minor version answer the same calls; of another major version the functions
/// have other names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Programs of another one don't work on the same keys.
    pub major: u32,
    /// Raised by what older programs may ignore.
    pub minor: u32,
    /// Raised by what changes no call.
    pub build: u32,
}

impl Version {
    /// That of this program.
    pub const OURS: Version = Version { major: crate::VERSION_MAJOR, minor: crate::VERSION_MINOR, build: BUILD };
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.build)
    }
}

impl std::str::FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let numbers: Vec<u32> = text.split('.').map(|number| number.parse().map_err(drop)).collect::<Result<_, _>>()?;
        let [major, minor, build] = numbers[..] else { return Err(()) };
        Ok(Self { major, minor, build })
    }
}

/// A text for Redis, and from which files its lines are.
#[derive(Debug, Clone, Default)]
pub struct Text {
    text: String,
    lines: usize,
    /// How many lines stand before a file.
    files: Vec<(usize, &'static str)>,
}

impl Text {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn push(&mut self, text: &str) -> &mut Self {
        let text = text.strip_suffix('\n').unwrap_or(text);
        self.text.push_str(text);
        self.text.push('\n');
        self.lines += text.matches('\n').count() + 1;
        self
    }

    fn push_file(&mut self, file: &'static str, text: &str) -> &mut Self {
        self.files.push((self.lines, file));
        self.push(text);
        self.files.push((self.lines, ""));
        self
    }

    fn module(&mut self, module: Module) -> &mut Self {
        self.push_file(module.file, module.text)
    }

    /// Where a line of the text stands in our files, as `file:line`.
    pub fn source_of(&self, line: usize) -> Option<String> {
        let (before, file) = self.files.iter().rev().find(|(before, _)| *before < line)?;
        (!file.is_empty()).then(|| format!("{file}:{}", line - before))
    }

    /// The text of an error, in which lines are named as Redis counts them, with our files in their place.
    pub fn explain(&self, error: &str) -> String {
        let mut explained = String::new();
        let mut rest = error;
        while let Some(at) = ["user_function:", "user_script:"].iter().filter_map(|mark| rest.find(mark)).min() {
            let (before, mark) = rest.split_at(at);
            let (word, number) = mark.split_once(':').expect("it has one");
            let digits = number.len() - number.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let source = number[..digits].parse().ok().and_then(|line| self.source_of(line));
            explained.push_str(before);
            explained.push_str(&source.unwrap_or_else(|| format!("{word}:{}", &number[..digits])));
            rest = &number[digits..];
        }
        explained + rest
    }
}

/// The library as a program knows it.
#[derive(Debug)]
pub struct Library {
    /// Which one it is.
    pub version: Version,
    /// Its text.
    pub text: Text,
}

static OURS: LazyLock<Arc<Library>> = LazyLock::new(|| Arc::new(Library::of(Version::OURS)));

impl Library {
    /// That of this program.
    pub fn ours() -> &'static Arc<Library> {
        &OURS
    }

    /// The same text under another version: what a program of another build would load.
    pub fn of(version: Version) -> Self {
        let mut text = Text::default();
        text.push(&format!("#!lua name={}\n{}", name(version), constants(version)));
        shared(&mut text, &[BATCH, TRACKER, LOOK]);
        text.module(SERVE);
        let mut written: Vec<&str> = Vec::new();
        for function in TABLE {
            if written.contains(&function.file) {
                continue;
            }
            written.push(function.file);
            text.push("do");
            body(&mut text, function);
            for same in TABLE.iter().filter(|other| other.file == function.file) {
                let flags = same.effect.flag().map(|flag| format!("'{flag}'")).unwrap_or_default();
                text.push(&format!("serve('{}', {{{flags}}}, body)", same.qualified(version)));
            }
            text.push("end");
        }
        Self { version, text }
    }
}

impl Function {
    /// The name by which Redis knows it.
    pub fn qualified(&self, version: Version) -> String {
        format!("{}_{}", name(version), self.name)
    }

    /// The function as a script that takes the same key and the same arguments, but for the version.
    pub fn script(&self) -> Text {
        let mut text = Text::default();
        if let Some(flag) = self.effect.flag() {
            // Must be the first line.
            text.push(&format!("#!lua flags={flag}"));
        }
        text.push(&constants(Version::OURS));
        shared(&mut text, self.needs);
        body(&mut text, self);
        text.push("begin(KEYS[1])\nreturn body(ARGV)");
        text
    }
}

/// The arguments of [`RIGHTS`]: the commands that functions run, as the library's own text has them, on one of our keys and on
/// each of the layout that others write. Of users' limits only what stands beside them. What a function can do without is left
/// out.
pub fn rights(keys: &Keys) -> Vec<Vec<u8>> {
    let commands: Vec<(&str, Option<&str>)> = commands(OURS.text.as_str()).collect();
    let ours = format!("{}x", keys.prefix());
    let open = TABLE_OF_KEYS.iter().filter(|key| !key.template.contains("{tag}") && key.holds != Holds::Channel);
    let others = open.map(|key| (Some(key.name), key.template.replace("{}", "x")));
    let mut args = Vec::new();
    for (name, key) in std::iter::once((None, ours)).chain(others) {
        let is_own_affair = key.starts_with("limits:");
        let needed: BTreeSet<&str> = commands
            .iter()
            .filter(|(_, beside)| !is_own_affair || *beside == name)
            .map(|(command, _)| *command)
            .collect();
        args.extend([needed.len().to_string(), key]);
        args.extend(needed.into_iter().map(str::to_owned));
    }
    args.into_iter().map(String::into_bytes).collect()
}

/// The commands in a text, each with the constructor of its key where that stands beside it.
fn commands(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let calls = ["redis.call('", "redis.pcall('", "try('"];
    calls.into_iter().flat_map(move |call| text.split(call).skip(1)).filter_map(|rest| {
        let (command, rest) = rest.split_once('\'')?;
        let key = rest.strip_prefix(", K.").and_then(|key| key.split_once('(')).map(|(key, _)| key);
        (!DISPENSABLE.contains(&command)).then_some((command, key))
    })
}

/// Commands that need no key, and those of which a refusal is borne.
const DISPENSABLE: &[&str] = &["TIME", "PUBLISH", "MEMORY", "OBJECT"];

/// The name of a library, before those of its functions. Functions of all libraries of a server share one space of names.
pub fn name(version: Version) -> String {
    format!("drayman{}", version.major)
}

/// What stands before all that calls it.
fn shared(text: &mut Text, needed: &[Module]) {
    text.module(BEGIN).push(&Keys::lua()).module(COMMON).module(FLOW);
    for module in needed {
        text.module(*module);
    }
}

fn body(text: &mut Text, function: &Function) {
    if let Some(called) = function.calls {
        text.push(&format!("local function {}(ARGV)", called.name)).push_file(called.file, called.body).push("end");
    }
    text.push("local function body(ARGV)").push_file(function.file, function.body).push("end");
}

/// What Rust and Lua have to agree upon.
fn constants(version: Version) -> String {
    let fields: Vec<String> =
        FIELDS.iter().map(|(name, most, of)| format!("'{name}', {most}, '{}'", of.as_str())).collect();
    format!(
        "local MINOR, VERSION = {}, '{version}'\n\
         local MAX_ID, MAX_USER, MAX_APP, MAX_OP = {JOB_ID_MAX_BYTES}, {USER_MAX_BYTES}, {APP_MAX_BYTES}, {OP_MAX_BYTES}\n\
         local MAX_UNIQUE, MAX_CHECKPOINT, MAX_EARLIER = {UNIQUE_MAX_BYTES}, {CHECKPOINT_MAX_BYTES}, {EARLIER_MAX_BYTES}\n\
         local MAX_RATE, MAX_PERIOD_MS, MAX_COUNT = {RATE_MAX}, {PERIOD_MAX_MS}, {CONCURRENCY_MAX}\n\
         local MIN_WEIGHT, MAX_WEIGHT = {}, {}\n\
         local MISSING_MS, MAX_REJECTED_MS, MAX_PAYLOAD = {MISSING_MS}, {REJECTED_MS}, {PAYLOAD_MAX}\n\
         local SUSPECT_AFTER, MAX_UNCLEAN, MAX_HISTORY = {SUSPECT_AFTER}, {UNCLEAN_MAX}, {HISTORY_MAX_BYTES}\n\
         local FIELDS = {{{}}}",
        version.minor,
        WEIGHTS.0,
        WEIGHTS.1,
        fields.join(", "),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use sha2::{Digest, Sha256};

    use super::*;

    /// Which text the version stands for. Whoever changes the text raises the build, or the minor version where calls change.
    const TEXT_OF: (&str, &str) = ("1.0.5", "593f81bb71b3ffa0");

    #[test]
    fn a_version_is_one_text() {
        let digest: String =
            Sha256::digest(OURS.text.as_str()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            (&*OURS.version.to_string(), &*digest),
            TEXT_OF,
            "the text has changed: raise BUILD, and say so here"
        );
    }

    #[test]
    fn versions_have_an_order_and_a_text() {
        let version: Version = "1.20.3".parse().unwrap();
        assert_eq!(version, Version { major: 1, minor: 20, build: 3 });
        assert_eq!(version.to_string(), "1.20.3");
        assert!(version < Version { build: 4, ..version } && version > Version { minor: 3, build: 100, ..version });
        for text in ["", "1", "1.2", "1.2.x", "1.2.3.4", "-1.2.3"] {
            assert_eq!(text.parse::<Version>(), Err(()), "{text}");
        }
        assert_eq!(SUBMIT.qualified(version), "drayman1_submit");
    }

    #[test]
    fn a_line_is_known_by_its_file() {
        let text = &OURS.text;
        for needle in ["local function begin(prefix)", "local function is_over(", "local turn = tonumber(redis.call"] {
            let line = text.as_str().lines().position(|line| line.starts_with(needle)).expect(needle) + 1;
            let source = text.source_of(line).expect(needle);
            let (file, line) = source.split_once(':').unwrap();
            let file = std::fs::read_to_string(format!("{}/src/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
            assert!(file.lines().nth(line.parse::<usize>().unwrap() - 1).unwrap().starts_with(needle), "{source}");
        }
        let explained = text.explain("ERR user_function:999999: no, on @user_function:1.");
        assert_eq!(explained, "ERR user_function:999999: no, on @user_function:1.");
    }

    #[test]
    fn a_script_has_what_it_reaches_and_no_more() {
        assert!(TAKE.script().as_str().contains("function settle_batch("));
        assert!(!UPDATE_CLAIMED.script().as_str().contains("function settle_batch("));
        assert!(TAKE.script().as_str().starts_with("#!lua flags=allow-oom\n"));
        assert!(!SUBMIT.script().as_str().starts_with("#!"));
    }

    /// What is declared in the first column of a module lives as long as the library. So it is a function or a constant, and
    /// what a call keeps stands in `this`; and no name stands for two things.
    #[test]
    fn modules_keep_no_state_and_no_name_twice() {
        let mut declared: BTreeMap<&str, &str> = BTreeMap::new();
        for module in [BEGIN, COMMON, FLOW, BATCH, TRACKER, SERVE] {
            for line in module.text.lines().filter_map(|line| line.strip_prefix("local ")) {
                let names = match line.strip_prefix("function ") {
                    Some(rest) => rest.split('(').next().unwrap_or_default(),
                    None => line.split('=').next().unwrap_or_default(),
                };
                let value = line.split_once('=').map_or("", |(_, value)| value.trim());
                for name in names.split(',').map(str::trim) {
                    assert_eq!(declared.insert(name, module.file), None, "{name} of {}", module.file);
                    let is_constant = name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
                    let is_forward = value.is_empty();
                    let is_function = line.starts_with("function ");
                    // The one table that a module fills in a block of its own.
                    let is_known = ["this", "look", "INHERITED", "PART_AT"].contains(&name);
                    assert!(is_constant || is_forward || is_function || is_known, "{}: {line}", module.file);
                }
            }
            // Forward declarations are given a function once, and nothing else is assigned to what is not a call's own.
            for line in module.text.lines().filter(|line| line.starts_with(' ')) {
                let assigned = line.trim_start().split(" = ").next().unwrap_or_default();
                let is_outer =
                    declared.contains_key(assigned) && !module.text.contains(&format!("  local {assigned} "));
                assert!(!is_outer || assigned == "this", "{}: {line}", module.file);
            }
        }
    }

    #[test]
    fn rights_are_asked_for_where_commands_are_run() {
        let args: Vec<String> = rights(&Keys::new()).into_iter().map(|arg| String::from_utf8(arg).unwrap()).collect();
        let keys: Vec<&String> = args.iter().filter(|arg| arg.contains(':')).collect();
        assert!(keys.contains(&&"drayman:x".to_owned()) && keys.contains(&&"batch:queue:x".to_owned()), "{keys:?}");
        let of_queue = args.iter().skip_while(|arg| *arg != "batch:queue:x").skip(1).take_while(|arg| arg.len() > 2);
        assert!(of_queue.into_iter().any(|command| command == "RPOP"));
        assert!(!args.iter().any(|arg| DISPENSABLE.contains(&arg.as_str())));
    }
}
