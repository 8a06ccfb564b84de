//! `[[handlers]]`: programs and commands that run tasks, from the file to handlers that can be called.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use queue_core::config::{ByteSize, Fault, positive};
use queue_core::ids::{App, Op};
use serde::{Deserialize, Serialize};

use crate::execute::command::{Command, CommandSettings, OutputForm, Stdin, Template};
use crate::execute::handlers::Registration;
use crate::execute::process::Recipe;
use crate::execute::program::{Program, ProgramSettings};
use crate::execute::task::Handler;

/// `EX_TEMPFAIL` of sysexits.h: the one exit code whose very meaning is "try again".
const TRY_AGAIN: u8 = 75;

/// One table `[[handlers]]`. A key that only one kind has is `None` where it is not written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandlerConfig {
    /// The application.
    pub app: App,
    /// The operation.
    pub op: Op,
    /// How the handler is run.
    pub kind: HandlerKind,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The longest that a task may run, unless it says less; as `[tasks]` says if absent.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// How long a process group may go on after SIGTERM, before it gets SIGKILL.
    #[serde(default = "five_seconds", with = "humantime_serde")]
    pub kill_grace: Duration,
    /// How much address space a process may have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Variables that are passed on from the worker.
    #[serde(default = "usual_variables")]
    pub env: Vec<String>,
    /// Variables with their values.
    #[serde(default)]
    pub set_env: BTreeMap<String, String>,
    /// The folder in which it starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// The longest line of a program, or as much of a command's output as is kept.
    #[serde(default = "a_mebibyte")]
    pub max_output: ByteSize,
    /// Programs: most processes at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<NonZeroUsize>,
    /// Programs: how long a task may go on after its cancel line, before the process group gets SIGTERM.
    #[serde(default, with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub cancel_grace: Option<Duration>,
    /// Programs: most rows of a batch in one line; without it each is handed over as a task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<NonZeroUsize>,
    /// Who is told of the end of a batch: the program itself, or a command of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark_done: Option<MarkDone>,
    /// Commands: what they read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<Stdin>,
    /// Commands: what they write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputForm>,
    /// Commands: exit codes after which another attempt may go better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_codes: Option<Vec<u8>>,
    /// Commands: exit codes about which nobody needs to care.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_codes: Option<Vec<u8>>,
}

/// Who is told of the end of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "it is neither true or false nor a command with its arguments")]
pub enum MarkDone {
    /// The program, or nobody.
    Program(bool),
    /// A command with its arguments.
    Command(Vec<String>),
}

/// How a handler is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandlerKind {
    /// Processes that stay and are given one task after the other.
    Program,
    /// A process for each task.
    Command,
}

fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

fn usual_variables() -> Vec<String> {
    ["HOME", "LANG", "PATH", "TZ"].map(String::from).to_vec()
}

fn a_mebibyte() -> ByteSize {
    ByteSize(1 << 20)
}

/// All handlers of a file.
pub fn build(handlers: &[HandlerConfig], longest: Duration) -> Result<Vec<Registration>, Fault> {
    let mut built: Vec<Registration> = Vec::with_capacity(handlers.len());
    for (position, handler) in handlers.iter().enumerate() {
        let key = format!("handlers.{position}");
        if built.iter().any(|earlier| (&earlier.app, &earlier.op) == (&handler.app, &handler.op)) {
            let reason = format!("is a second handler for {} of {}", handler.op, handler.app);
            return Err(Fault::new(format!("{key}.op"), reason));
        }
        built.push(handler.build(&key, longest)?);
    }
    Ok(built)
}

impl HandlerConfig {
    fn build(&self, key: &str, longest: Duration) -> Result<Registration, Fault> {
        let fault = |name: &str, reason: String| Fault::new(format!("{key}.{name}"), reason);
        if let Some(timeout) = self.timeout {
            positive(&format!("{key}.timeout"), timeout)?;
            if timeout > longest {
                return Err(fault("timeout", "is longer than tasks.timeout".into()));
            }
        }
        let (program, args) = program_of(&self.command).map_err(|reason| fault("command", reason.into()))?;
        let is_variable = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
        if let Some(name) = self.env.iter().find(|name| !is_variable(name)) {
            return Err(fault("env", format!("has {name:?}, which is the name of no variable")));
        }
        if let Some((name, _)) = self.set_env.iter().find(|(name, value)| !is_variable(name) || value.contains('\0')) {
            return Err(fault("set_env", format!("cannot set {name:?}")));
        }
        if self.memory == Some(ByteSize(0)) {
            return Err(fault("memory", "must be more than nothing".into()));
        }
        let max_output = usize::try_from(self.max_output.0).unwrap_or(usize::MAX);
        if max_output == 0 {
            return Err(fault("max_output", "must be more than nothing".into()));
        }
        let recipe = |program: &str| Recipe {
            program: program.to_owned(),
            env: self.env.clone(),
            set_env: self.set_env.clone().into_iter().collect(),
            dir: self.dir.clone(),
            memory: self.memory,
        };
        let of_one_kind = [
            ("size", "program", self.size.is_some()),
            ("cancel_grace", "program", self.cancel_grace.is_some()),
            ("rows", "program", self.rows.is_some()),
            ("stdin", "command", self.stdin.is_some()),
            ("output", "command", self.output.is_some()),
            ("retry_codes", "command", self.retry_codes.is_some()),
            ("ignore_codes", "command", self.ignore_codes.is_some()),
        ];
        let own_kind = if self.kind == HandlerKind::Program { "program" } else { "command" };
        if let Some((name, kind, _)) = of_one_kind.iter().find(|(_, kind, written)| *written && *kind != own_kind) {
            return Err(fault(name, format!("is for handlers with kind = \"{kind}\"")));
        }
        let handler: Arc<dyn Handler> = match self.kind {
            HandlerKind::Program => {
                let mark_done = match &self.mark_done {
                    None => false,
                    Some(MarkDone::Program(told)) => *told,
                    Some(MarkDone::Command(_)) => {
                        return Err(fault("mark_done", "is true or false for handlers with kind = \"program\"".into()));
                    }
                };
                Arc::new(Program::new(ProgramSettings {
                    name: format!("{}.{}", self.app, self.op),
                    recipe: recipe(program),
                    args: args.to_vec(),
                    size: self.size.unwrap_or(NonZeroUsize::MIN),
                    cancel_grace: self.cancel_grace.unwrap_or_else(five_seconds),
                    kill_grace: self.kill_grace,
                    max_output,
                    rows: self.rows,
                    mark_done,
                }))
            }
            HandlerKind::Command => {
                let retry_codes = self.retry_codes.clone().unwrap_or_else(|| vec![TRY_AGAIN]);
                let ignore_codes = self.ignore_codes.clone().unwrap_or_default();
                let settings = CommandSettings {
                    recipe: recipe(program),
                    args: templates_of(program, args).map_err(|reason| fault("command", reason))?,
                    stdin: self.stdin.clone().unwrap_or_default(),
                    output: self.output.unwrap_or_default(),
                    retry_codes,
                    ignore_codes,
                    kill_grace: self.kill_grace,
                    max_output,
                };
                if settings.retry_codes.contains(&0) || settings.ignore_codes.contains(&0) {
                    let name = if settings.retry_codes.contains(&0) { "retry_codes" } else { "ignore_codes" };
                    return Err(fault(name, "has 0, which means that all went well".into()));
                }
                if let Some(code) = settings.ignore_codes.iter().find(|code| settings.retry_codes.contains(code)) {
                    return Err(fault("ignore_codes", format!("has {code}, which is one of retry_codes")));
                }
                let told = match &self.mark_done {
                    None => None,
                    Some(MarkDone::Command(command)) => {
                        let (program, args) =
                            program_of(command).map_err(|reason| fault("mark_done", reason.into()))?;
                        let args = templates_of(program, args).map_err(|reason| fault("mark_done", reason))?;
                        if args.iter().any(Template::names_line) {
                            return Err(fault("mark_done", "names a {line}, and is about a whole batch".into()));
                        }
                        let output = OutputForm::Text;
                        let settings = settings.clone();
                        Some(CommandSettings { recipe: recipe(program), args, stdin: Stdin::Json, output, ..settings })
                    }
                    Some(MarkDone::Program(_)) => {
                        let reason = "is a command and its arguments for handlers with kind = \"command\"";
                        return Err(fault("mark_done", reason.into()));
                    }
                };
                let command = Command::new(settings);
                Arc::new(match told {
                    Some(told) => command.telling(Command::new(told)),
                    None => command,
                })
            }
        };
        Ok(Registration { timeout: self.timeout, ..Registration::new(self.app.clone(), self.op.clone(), handler) })
    }
}

/// The program of a command, and its arguments.
fn program_of(command: &[String]) -> Result<(&String, &[String]), &'static str> {
    let (program, args) = command.split_first().ok_or("names no program")?;
    if program.is_empty() || (program.contains('/') && !program.starts_with('/')) {
        return Err("begins with neither an absolute path nor a name to be found in PATH");
    }
    match command.iter().any(|argument| argument.contains('\0')) {
        true => Err("has a zero byte"),
        false => Ok((program, args)),
    }
}

/// The arguments with their places. The program has none.
fn templates_of(program: &str, args: &[String]) -> Result<Vec<Template>, String> {
    let template = |text: &str| text.parse::<Template>().map_err(|reason| format!("cannot be used: {reason}"));
    if !template(program)?.is_plain() {
        return Err("must name its program itself".into());
    }
    args.iter().map(|text| template(text)).collect()
}
