//! The door to Redis: connections, timeouts, reconnecting, subscriptions, and how a function of the library is called. The
//! only module that knows the client.
//!
//! The client is set so that nothing happens twice or late: one attempt per command (a lost reply must not run a call
//! again behind our back), a timeout on each, and none is kept for a connection that is not there (an abandoned command
//! must not run after a reconnect). Whether to send again is decided above, where it is known to be harmless.
//!
//! While there is no connection a call waits for one, for as long as a command may take, and is sent only then: who is
//! told [`Error::Unreachable`] can rely on it that nothing has happened.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fred::clients::{Client, SubscriberClient, WithOptions};
use fred::error::{Error as FredError, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::config::{
    Config, ConnectionConfig, Options, PerformanceConfig, ReconnectPolicy, TlsConfig, TlsConnector, UnresponsiveConfig,
};
use fred::types::{Builder, CustomCommand, Value};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use crate::config::{Fault, RedisConfig};
use crate::error::Error;
use crate::keys::Keys;
use crate::library::{self, Effect, Function, Library, Version};
use crate::reply::{Reply, info_field};

/// The longest pause between two attempts to connect. Short, because work is to go on soon after an outage, and one attempt
/// costs a server nothing.
const RECONNECT_PAUSE_MAX_MS: u32 = 400;
/// How long a server that accepts a connection may take to greet. One that hangs is left for another attempt: after a
/// failover that finds the new primary.
const GREETING_MAX: Duration = Duration::from_millis(1_500);
/// How often a call is sent again because somebody took the library away in between.
const PROVIDES_MAX: usize = 3;
/// How long after the commands' connection came back the subscriptions' own has to have noticed by itself.
const EARS_NOTICE_WITHIN: Duration = Duration::from_secs(1);

/// A connection to Redis, cheap to clone.
#[derive(Clone)]
pub struct Store {
    client: Client,
    /// The client in the mode in which it keeps nothing for a connection that is not there.
    now: WithOptions<Client>,
    inner: Arc<Inner>,
}

struct Inner {
    builder: Builder,
    /// How long a subscription may take to begin.
    patience: Duration,
    /// How long a command may wait for a connection.
    command_timeout: Duration,
    /// A reconnect was asked for and is not over.
    reconnecting: AtomicBool,
    /// When anything was answered last, in ms since `begin`.
    answered_ms: AtomicU64,
    begin: Instant,
    keys: Keys,
    functions: Arc<Functions>,
}

/// How functions of the library are called.
struct Functions {
    library: Arc<Library>,
    /// As scripts, each by itself: the server has no functions.
    as_scripts: bool,
    /// Whoever has this connection keeps the library as new as its own.
    is_keeper: AtomicBool,
    /// The caller was found to have all rights that functions need, and was refused none since.
    has_rights: AtomicBool,
    /// The scripts that were needed so far.
    scripts: Mutex<HashMap<&'static str, Arc<Prepared>>>,
}

/// A function as a script.
struct Prepared {
    text: library::Text,
    script: fred::types::scripts::Script,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// One message of a subscription. One without a channel tells that messages may have been missed: the connection was
/// lost and is there again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The channel that it came on.
    pub channel: String,
    /// Its text.
    pub text: String,
}

impl Message {
    /// Tells that messages may have been missed.
    pub fn gap() -> Self {
        Self { channel: String::new(), text: String::new() }
    }

    /// Whether messages may have been missed before this one, which is none.
    pub fn is_gap(&self) -> bool {
        self.channel.is_empty()
    }
}

impl Store {
    /// Connects. Fails at once if the server can't be reached, and where it does not greet, when its time for connecting and
    /// for a command is over; afterwards reconnects by itself for as long as it lives.
    pub async fn connect(config: &RedisConfig) -> Result<Self, Error> {
        Self::connect_with(config, Library::ours().clone()).await
    }

    /// The same for a program that has another library: of an earlier build, or a later one.
    pub async fn connect_with(config: &RedisConfig, library: Arc<Library>) -> Result<Self, Error> {
        let builder = builder(config)?;
        let patience = config.connect_timeout + config.command_timeout;
        let functions = Functions {
            library,
            as_scripts: !config.functions,
            is_keeper: false.into(),
            has_rights: false.into(),
            scripts: Mutex::default(),
        };
        let store = Self::with(builder, patience, config.command_timeout, Keys::new(), Arc::new(functions)).await?;
        store.check_version().await?;
        Ok(store)
    }

    async fn with(
        builder: Builder,
        patience: Duration,
        command_timeout: Duration,
        keys: Keys,
        functions: Arc<Functions>,
    ) -> Result<Self, Error> {
        let begin = Instant::now();
        let client = loop {
            let client = builder.build().map_err(translate)?;
            match client.init().await {
                Ok(_) => break client,
                Err(error) if may_be_slow(&error, begin, patience) => {}
                Err(error) => return Err(translate(error)),
            }
        };
        let once = Options { max_attempts: Some(1), fail_fast: true, ..Options::default() };
        let inner = Inner {
            builder,
            patience,
            command_timeout,
            reconnecting: false.into(),
            answered_ms: 0.into(),
            begin: Instant::now(),
            keys,
            functions,
        };
        Ok(Self { now: client.with_options(&once), client, inner: Arc::new(inner) })
    }

    /// Refuses keys of another major version. A server that has none yet gets its own from the first session.
    async fn check_version(&self) -> Result<(), Error> {
        let reply = self.command("GET", &[self.keys().version().as_bytes()]).await?;
        let Some(found) = reply.lossy() else { return Ok(()) };
        let major = found.split('.').next().and_then(|major| major.parse().ok());
        if major == Some(crate::VERSION_MAJOR) {
            return Ok(());
        }
        let ours = format!("{}.{}", crate::VERSION_MAJOR, crate::VERSION_MINOR);
        Err(Error::Version { found: found.chars().take(40).collect(), ours })
    }

    /// The keys of this server.
    pub fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    /// Refuses a server that is too old; returns what about it puts jobs at risk.
    pub async fn check_server(&self) -> Result<Vec<String>, Error> {
        let info = self.command("INFO", &[b"server"]).await?.lossy().unwrap_or_default();
        let says = |field| info_field(&info, field);
        // Valkey names its own version beside the one of Redis that it is compatible with.
        let (name, version, least) = match says("valkey_version") {
            Some(version) => ("Valkey", version, (7, 2)),
            None => ("Redis", says("redis_version").unwrap_or("0"), (7, 0)),
        };
        let mut numbers = version.split('.').map(|number| number.trim().parse::<u32>().unwrap_or(0));
        if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < least {
            return Err(Error::Refused(format!("{name} {version} is too old, {}.{} is the least", least.0, least.1)));
        }
        let mut warnings = Vec::new();
        if self.calls_scripts() {
            warnings.push(format!("redis.functions is false: {NO_FUNCTIONS}"));
        }
        for (setting, wanted, risk) in [
            ("maxmemory-policy", "noeviction", "jobs may be evicted when memory runs out"),
            ("appendonly", "yes", "a crash of the server loses what was written since its last snapshot"),
        ] {
            // A user without the right to ask may still work.
            let Ok(Reply::Array(pair)) = self.command("CONFIG", &[b"GET", setting.as_bytes()]).await else { continue };
            if let Some(value) = pair.get(1).and_then(Reply::lossy)
                && value != wanted
            {
                warnings.push(format!("the server has {setting} {value} instead of {wanted}: {risk}"));
            }
        }
        Ok(warnings)
    }

    /// Calls a function of the library, which is loaded first where the server has none.
    pub async fn call(&self, function: &'static Function, args: Vec<Vec<u8>>) -> Result<Reply, Error> {
        self.check_rights(function).await?;
        reply(self.run(function, args, None).await?, function.name)
    }

    /// A connection of its own, for calls that hold theirs up: it waits `longer` for each answer.
    pub async fn aside(&self, longer: Duration) -> Result<Self, Error> {
        let command_timeout = self.inner.command_timeout + longer;
        let mut builder = self.inner.builder.clone();
        builder
            .with_performance_config(|performance| performance.default_command_timeout = command_timeout)
            .with_connection_config(|connection| {
                connection.unresponsive.max_timeout = Some(command_timeout + Duration::from_millis(250));
            });
        let (keys, functions) = (self.inner.keys.clone(), self.inner.functions.clone());
        Self::with(builder, self.inner.patience, command_timeout, keys, functions).await
    }

    /// Calls a function and waits for replicas to confirm what it wrote, both in one pipeline: a WAIT counts for the writes of
    /// its own connection only, and no reconnect can come between them. Returns how many replicas have confirmed.
    pub async fn call_and_wait(
        &self,
        function: &'static Function,
        args: Vec<Vec<u8>>,
        replicas: u32,
        patience: Duration,
    ) -> Result<(Reply, u32), Error> {
        self.check_rights(function).await?;
        let wait: Vec<Value> = vec![replicas.to_string().into(), patience.as_millis().max(1).to_string().into()];
        let answer = self.run(function, args, Some(wait)).await;
        let mut items = reply(answer?, function.name)?.array(function.name)?.into_iter();
        match (items.next(), items.next()) {
            (Some(called), Some(confirmed)) => Ok((called, confirmed.int("WAIT")? as u32)),
            _ => Err(Reply::Nil.unexpected(function.name)),
        }
    }

    /// Sends a call, and again where it was not run for want of the library. With the arguments of a WAIT the answer is a pair.
    async fn run(
        &self,
        function: &'static Function,
        args: Vec<Vec<u8>>,
        wait: Option<Vec<Value>>,
    ) -> Result<Value, Error> {
        let args: Vec<Value> = args.into_iter().map(|arg| Value::Bytes(arg.into())).collect();
        let Functions { library, as_scripts, .. } = &*self.inner.functions;
        if *as_scripts {
            return Box::pin(self.run_as_script(function, args, wait)).await;
        }
        let name = if function.effect == Effect::Reads { "FCALL_RO" } else { "FCALL" };
        let words = || -> Vec<Value> {
            let head = [function.qualified(library.version), "1".into(), self.keys().prefix()];
            let minor = library.version.minor.to_string();
            head.into_iter().chain([minor]).map(Value::from).chain(args.iter().cloned()).collect()
        };
        let lacks = |answer: &Result<Value, Error>| {
            let is_older = |error: &Error| matches!(error, Error::Refused(text) if text.starts_with("OLDER"));
            answer.as_ref().is_err_and(|error| error.is_missing_function() || is_older(error))
        };
        let mut answer = self.custom(name, words(), wait.clone()).await;
        for _ in 0..PROVIDES_MAX {
            if !lacks(&answer) {
                break;
            }
            match Box::pin(self.provide_library()).await {
                Ok(()) => answer = self.custom(name, words(), wait.clone()).await,
                // What ends work ends it also where nothing new finds room, and a replica can be read.
                Err(Error::Refused(text)) if function.effect != Effect::Adds && finds_no_room(&text) => {
                    return Box::pin(self.run_as_script(function, args, wait)).await;
                }
                Err(error) => return Err(error),
            }
        }
        // Somebody takes it away faster than it can be called.
        if lacks(&answer) && function.effect != Effect::Adds {
            return Box::pin(self.run_as_script(function, args, wait)).await;
        }
        match answer {
            Err(error) => Err(Box::pin(self.explain(error)).await),
            answer => answer,
        }
    }

    /// With our files in the place of the lines that Redis counts, where it has our text; and after a right was missing all are
    /// asked for anew.
    async fn explain(&self, error: Error) -> Error {
        let Error::Refused(said) = error else { return error };
        let Functions { library, has_rights, .. } = &*self.inner.functions;
        if ["NOPERM", "can't run this command", "permissions"].iter().any(|words| said.contains(words)) {
            has_rights.store(false, Ordering::SeqCst);
        }
        if !said.contains("user_function:") || self.library_version().await.ok().flatten() != Some(library.version) {
            return Error::Refused(said);
        }
        Error::Refused(library.text.explain(&said))
    }

    /// The same by a script that has the function's text.
    async fn run_as_script(
        &self,
        function: &'static Function,
        args: Vec<Value>,
        wait: Option<Vec<Value>>,
    ) -> Result<Value, Error> {
        let prepared = self.prepared(function);
        let Prepared { text, script } = &*prepared;
        let words = |first: String| -> Vec<Value> {
            [first, "1".into(), self.keys().prefix()].into_iter().map(Value::from).chain(args.iter().cloned()).collect()
        };
        let (by_digest, by_text) = match function.effect {
            Effect::Reads => ("EVALSHA_RO", "EVAL_RO"),
            Effect::Adds | Effect::Moves => ("EVALSHA", "EVAL"),
        };
        let mut answer = self.custom(by_digest, words(script.sha1().to_string()), wait.clone()).await;
        if matches!(&answer, Err(Error::Refused(text)) if text.starts_with("NOSCRIPT")) {
            // Not run: so sending the text is no second run.
            answer = self.custom(by_text, words(text.as_str().to_owned()), wait).await;
        }
        answer.map_err(|error| match error {
            Error::Refused(said) => Error::Refused(text.explain(&said)),
            other => other,
        })
    }

    fn prepared(&self, function: &'static Function) -> Arc<Prepared> {
        let mut scripts = self.inner.functions.scripts.lock().expect("nobody panics while holding it");
        let prepare = || {
            let text = function.script();
            let script = fred::types::scripts::Script::from_lua(text.as_str().to_owned());
            Arc::new(Prepared { text, script })
        };
        scripts.entry(function.name).or_insert_with(prepare).clone()
    }

    /// From now on this connection loads the library also where it is older than this program's: a matter of daemons, and of
    /// operators who ask for it. Does so now where it is; returns which one there was and which there is.
    pub async fn keep_library(&self) -> Result<(Option<Version>, Version), Error> {
        let functions = &self.inner.functions;
        functions.is_keeper.store(true, Ordering::SeqCst);
        let ours = functions.library.version;
        if functions.as_scripts {
            return Ok((None, ours));
        }
        let found = self.library_version().await?;
        match found {
            Some(found) if found >= ours => return Ok((Some(found), found)),
            Some(_) => self.load_library(true).await?,
            None => self.load_library(false).await?,
        }
        Ok((found, self.library_version().await?.unwrap_or(ours)))
    }

    /// The same at a daemon's start, which a server that takes nothing new for now does not prevent: until it does, what ends
    /// work needs no library.
    pub async fn keep_library_from_now_on(&self) -> Result<(), Error> {
        match self.keep_library().await {
            Ok((Some(found), now)) if found > self.inner.functions.library.version => {
                tracing::info!("redis has the library {now}, a later one than ours");
            }
            Ok(_) => {}
            Err(error) if error.is_transient() => tracing::warn!(%error, "the library can't be loaded now"),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Which library of this program's major version the server has; `None` if it has none.
    pub async fn library_version(&self) -> Result<Option<Version>, Error> {
        let name = library::VERSION.qualified(self.inner.functions.library.version);
        let prefix = self.keys().prefix();
        match self.command("FCALL_RO", &[name.as_bytes(), b"1", prefix.as_bytes(), b"0"]).await {
            Ok(answer) => {
                let version = answer.text().and_then(|text| text.parse().ok());
                version.map(Some).ok_or_else(|| answer.unexpected("version"))
            }
            Err(error) if error.is_missing_function() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether functions are called as scripts, for the configuration says that the server has none.
    pub fn calls_scripts(&self) -> bool {
        self.inner.functions.as_scripts
    }

    /// Sees to it that the server has a library that answers this program's calls.
    async fn provide_library(&self) -> Result<(), Error> {
        let Functions { library, is_keeper, .. } = &*self.inner.functions;
        match self.library_version().await? {
            None => self.load_library(false).await,
            Some(found) if found.minor >= library.version.minor => Ok(()),
            Some(_) if is_keeper.load(Ordering::SeqCst) => self.load_library(true).await,
            Some(found) => Err(Error::Library { found, ours: library.version }),
        }
    }

    async fn load_library(&self, replaces: bool) -> Result<(), Error> {
        let Library { version, text } = &*self.inner.functions.library;
        let before: &[&[u8]] = if replaces { &[b"LOAD", b"REPLACE"] } else { &[b"LOAD"] };
        match self.command("FUNCTION", &[before, &[text.as_str().as_bytes()]].concat()).await {
            Ok(_) => {
                tracing::info!("loaded the library {version} into redis");
                Ok(())
            }
            Err(Error::Refused(said)) if said.contains("already exists") => match self.library_version().await? {
                // Another was faster.
                Some(_) => Ok(()),
                None => Err(Error::Refused(format!("{said}: another library has the name, or one of its functions"))),
            },
            Err(Error::Refused(said)) if said.starts_with("NOPERM") => Err(Error::Refused(format!(
                "{said}; the library {version} is not there: who may load it does so by `drayman library load`"
            ))),
            Err(error) => Err(error),
        }
    }

    /// Refuses a user who may not run all that functions need: one that breaks off half-way keeps what it wrote before.
    async fn check_rights(&self, function: &Function) -> Result<(), Error> {
        let has_rights = &self.inner.functions.has_rights;
        if function.effect == Effect::Reads || has_rights.load(Ordering::SeqCst) {
            return Ok(());
        }
        let args = library::rights(self.keys());
        // In a box, as all that a call seldom needs: else each future of a call would have room for it.
        let run: Pin<Box<dyn Future<Output = Result<Value, Error>> + Send + '_>> =
            Box::pin(self.run(&library::RIGHTS, args, None));
        let refused = reply(run.await?, library::RIGHTS.name)?.texts(library::RIGHTS.name)?;
        if refused.is_empty() {
            has_rights.store(true, Ordering::SeqCst);
            return Ok(());
        }
        let some: Vec<String> = refused.chunks(2).take(5).map(|pair| pair.join(" on ")).collect();
        let more = if refused.len() > 10 { " and more" } else { "" };
        Err(Error::Refused(format!("NOPERM this user may not run {}{more}: nothing was done", some.join(", "))))
    }

    /// Sends a command, and with it a WAIT where arguments for one are given: then the answer is those of both.
    async fn custom(&self, name: &'static str, words: Vec<Value>, wait: Option<Vec<Value>>) -> Result<Value, Error> {
        let command = CustomCommand::new_static(name, None::<u16>, false);
        let Some(wait) = wait else {
            return self.send(|| self.now.custom::<Value, _>(command.clone(), words.clone())).await;
        };
        let both = || {
            let (pipeline, command, words, wait) = (self.now.pipeline(), command.clone(), words.clone(), wait.clone());
            async move {
                let _: () = pipeline.custom(command, words).await?;
                let _: () = pipeline.custom(CustomCommand::new_static("WAIT", None::<u16>, false), wait).await?;
                let mut results = pipeline.try_all::<Value>().await.into_iter();
                let called = results.next().unwrap_or_else(|| Err(FredError::new(ErrorKind::IO, "no answer")))?;
                // Where the call's answer has come and that of WAIT has not, nobody has confirmed.
                let confirmed = results.next().and_then(Result::ok).unwrap_or(Value::Integer(0));
                Ok(Value::Array(vec![called, confirmed]))
            }
        };
        self.send(both).await
    }

    /// Runs one plain command.
    pub async fn command(&self, name: &'static str, args: &[&[u8]]) -> Result<Reply, Error> {
        let words = args.iter().map(|arg| Value::Bytes(arg.to_vec().into())).collect();
        reply(self.custom(name, words, None).await?, name)
    }

    /// Sends once there is a connection, and once only.
    async fn send<F>(&self, request: impl Fn() -> F) -> Result<Value, Error>
    where
        F: Future<Output = Result<Value, FredError>>,
    {
        let since = Instant::now();
        loop {
            self.connected(since).await?;
            let sent_ms = self.inner.begin.elapsed().as_millis() as u64;
            match request().await {
                // The client notices a moment later than its connection breaks.
                Err(error) if was_not_sent(&error) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => {
                    // The client's own watch begins anew with each command, so that one who asks all the time never
                    // leaves a server that hangs: here a whole timeout without any answer is enough.
                    let silent =
                        *error.kind() == ErrorKind::Timeout && self.inner.answered_ms.load(Ordering::SeqCst) < sent_ms;
                    let error = translate(error);
                    match &error {
                        Error::Refused(text) => {
                            self.answered();
                            if text.starts_with("READONLY") || text.starts_with("MASTERDOWN") {
                                self.leave("it is no primary (any more)");
                            }
                        }
                        _ if silent => self.leave("it answers nothing"),
                        _ => {}
                    }
                    return Err(error);
                }
                Ok(value) => {
                    self.answered();
                    return Ok(value);
                }
            }
        }
    }

    fn answered(&self) {
        self.inner.answered_ms.store(self.inner.begin.elapsed().as_millis() as u64, Ordering::SeqCst);
    }

    /// Waits for a connection.
    async fn connected(&self, since: Instant) -> Result<(), Error> {
        while !self.client.is_connected() {
            if since.elapsed() >= self.inner.command_timeout {
                return Err(Error::Unreachable("there is no connection".into()));
            }
            // In slices: the client might connect between our question and its ear.
            let _ = tokio::time::timeout(Duration::from_millis(100), self.client.wait_for_connect()).await;
        }
        Ok(())
    }

    /// Connects anew. A server that became a replica, or hangs, keeps its connections; behind Sentinel, or a name that
    /// leads elsewhere now, a new connection finds the primary.
    fn leave(&self, why: &'static str) {
        if !self.inner.reconnecting.swap(true, Ordering::SeqCst) {
            let store = self.clone();
            tokio::spawn(async move {
                tracing::info!("leaving the connection to redis: {why}");
                let _ = tokio::time::timeout(store.inner.patience, store.client.force_reconnection()).await;
                store.inner.reconnecting.store(false, Ordering::SeqCst);
            });
        }
    }

    /// One step of a scan: where to go on, unless it is over, and what was found. Nothing where others have made something else of the key.
    pub(crate) async fn scan(
        &self,
        command: &'static str,
        args: &[&[u8]],
    ) -> Result<(Option<Vec<u8>>, Vec<Vec<u8>>), Error> {
        let reply = match self.command(command, args).await {
            Err(error) if error.is_wrong_type() => return Ok((None, Vec::new())),
            reply => reply?,
        };
        let mut items = reply.array(command)?.into_iter();
        let (Some(cursor), Some(found)) = (items.next().and_then(Reply::into_bytes), items.next()) else {
            return Err(Reply::Nil.unexpected(command));
        };
        let found = found.array(command)?.into_iter().filter_map(Reply::into_bytes).collect();
        Ok((Some(cursor).filter(|cursor| cursor != b"0"), found))
    }

    /// Listens to channels on a connection of its own, which subscribes again by itself after a reconnect. What was said
    /// in between is lost, and a [`Message::is_gap`] tells so: messages are hints. Ends when the receiver is dropped.
    pub async fn subscribe(&self, channels: &[String], patterns: &[String]) -> Result<mpsc::Receiver<Message>, Error> {
        let (begin, patience) = (Instant::now(), self.inner.patience);
        let (subscriber, mut messages, mut reconnects) = loop {
            let subscriber: SubscriberClient = self.inner.builder.build_subscriber_client().map_err(translate)?;
            let attempt = async {
                subscriber.init().await?;
                let messages = subscriber.message_rx();
                let reconnects = subscriber.reconnect_rx();
                begin_listening(&subscriber, channels, patterns).await?;
                Ok((messages, reconnects))
            };
            // The client puts no time limit on a subscription that is never confirmed.
            let begun = tokio::time::timeout(patience.saturating_sub(begin.elapsed()), attempt).await;
            let failed = match begun {
                Ok(Ok((messages, reconnects))) => break (subscriber, messages, reconnects),
                failed => failed,
            };
            let _ = subscriber.quit().await;
            match failed {
                Ok(Err(error)) if may_be_slow(&error, begin, patience) => {}
                Ok(Err(error)) => return Err(translate(error)),
                _ => return Err(Error::Unavailable("a subscription was not confirmed in time".into())),
            }
        };
        let (sender, receiver) = mpsc::channel(1024);
        let (channels, patterns) = (channels.to_vec(), patterns.to_vec());
        let mut commands_reconnected = self.client.reconnect_rx();
        tokio::spawn(async move {
            // An idle subscription never notices by itself that its server hangs or its host is gone: when the commands'
            // connection had to be made anew, this one has to be, too.
            let mut renew_at: Option<Instant> = None;
            loop {
                let message = tokio::select! {
                    message = messages.recv() => match message {
                        Ok(message) => {
                            let Some(text) =
                                message.value.as_bytes().map(|bytes| String::from_utf8_lossy(bytes).into_owned())
                            else {
                                continue;
                            };
                            Message { channel: message.channel.to_string(), text }
                        }
                        Err(RecvError::Lagged(_)) => Message::gap(),
                        Err(RecvError::Closed) => break,
                    },
                    reconnected = reconnects.recv() => {
                        if matches!(reconnected, Err(RecvError::Closed)) {
                            break;
                        }
                        renew_at = None;
                        let again = begin_listening(&subscriber, &channels, &patterns);
                        if !matches!(tokio::time::timeout(patience, again).await, Ok(Ok(()))) {
                            renew_at = Some(Instant::now() + EARS_NOTICE_WITHIN);
                            continue;
                        }
                        Message::gap()
                    }
                    _ = commands_reconnected.recv(), if renew_at.is_none() => {
                        renew_at = Some(Instant::now() + EARS_NOTICE_WITHIN);
                        continue;
                    }
                    () = until(renew_at) => {
                        renew_at = None;
                        let subscriber = subscriber.clone();
                        tokio::spawn(async move { tokio::time::timeout(patience, subscriber.force_reconnection()).await });
                        continue;
                    }
                    () = sender.closed() => break,
                };
                // A listener that does not keep up misses hints rather than holding up the connection.
                if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send(message) {
                    break;
                }
            }
            let _ = subscriber.quit().await;
        });
        Ok(receiver)
    }

    /// Waits for answers under way and closes the connection.
    pub async fn close(&self) {
        let _ = self.client.quit().await;
    }
}

/// Whether a first connection is to be tried again: the server may just be slow to greet. [`GREETING_MAX`] is made for
/// a client that goes on by itself. This one would be given up, and with it a program that starts on a busy machine.
fn may_be_slow(error: &FredError, begin: Instant, patience: Duration) -> bool {
    *error.kind() == ErrorKind::Timeout && begin.elapsed() < patience
}

async fn begin_listening(
    subscriber: &SubscriberClient,
    channels: &[String],
    patterns: &[String],
) -> Result<(), FredError> {
    if !channels.is_empty() {
        subscriber.subscribe(channels.to_vec()).await?;
    }
    if !patterns.is_empty() {
        subscriber.psubscribe(patterns.to_vec()).await?;
    }
    Ok(())
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn builder(config: &RedisConfig) -> Result<Builder, Error> {
    let fred_config = fred_config(config)?;
    let command_timeout = config.command_timeout;
    let connect_timeout = config.connect_timeout;
    let mut builder = Builder::from_config(fred_config);
    builder
        .with_connection_config(|connection: &mut ConnectionConfig| {
            connection.max_command_attempts = 1;
            connection.connection_timeout = connect_timeout;
            connection.internal_command_timeout = command_timeout.min(GREETING_MAX);
            connection.max_command_buffer_len = 10_000;
            // A server that accepts and never answers is as good as none: whoever asked has given up by then.
            connection.unresponsive = UnresponsiveConfig {
                max_timeout: Some(command_timeout + Duration::from_millis(250)),
                interval: Duration::from_millis(250),
            };
        })
        .with_performance_config(|performance: &mut PerformanceConfig| {
            performance.default_command_timeout = command_timeout;
            performance.broadcast_channel_capacity = 4096;
        })
        .set_policy(ReconnectPolicy::new_exponential(0, 50, RECONNECT_PAUSE_MAX_MS, 2));
    Ok(builder)
}

fn fred_config(config: &RedisConfig) -> Result<Config, Error> {
    let address = config.address()?;
    let url = address.url.expose();
    let fault = |error: FredError| Fault::new("redis.url", format!("cannot be used: {}", error.details()));
    let mut fred_config = Config::from_url(url).map_err(fault)?;
    if address.database.is_some() {
        fred_config.database = address.database;
    }
    fred_config.fail_fast = true;
    if let Some(username) = &config.username {
        fred_config.username = Some(username.clone());
    }
    if let Some(password) = config.password()? {
        fred_config.password = Some(password.expose().to_owned());
    }
    if url.starts_with("rediss") {
        fred_config.tls = Some(TlsConfig::from(TlsConnector::from(tls(config)?)));
    }
    Ok(fred_config)
}

/// TLS that trusts the system's authorities and the configured ones. The cryptography is named, not looked up: two
/// providers in one program would make the look-up panic.
fn tls(config: &RedisConfig) -> Result<rustls::ClientConfig, Error> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = &config.tls_ca_file {
        let fault = |reason: String| Fault::new("redis.tls_ca_file", reason);
        let certificates = CertificateDer::pem_file_iter(path)
            .map_err(|error| fault(format!("names {}, which cannot be read: {error}", path.display())))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| fault(format!("holds no certificates: {error}")))?;
            roots.add(certificate).map_err(|error| fault(format!("holds an unusable certificate: {error}")))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Fault::new("redis.url", format!("cannot be used with TLS: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Whether the client refused to send for want of a connection. The words are those of the pinned version.
fn was_not_sent(error: &FredError) -> bool {
    match error.kind() {
        ErrorKind::Canceled => error.details() == "Connection closed unexpectedly.",
        ErrorKind::Unknown => error.details() == "Failed to route command.",
        _ => false,
    }
}

fn translate(error: FredError) -> Error {
    let details = error.details().to_owned();
    match error.kind() {
        ErrorKind::Config | ErrorKind::Url => Error::Config(Fault::new("redis", format!("cannot be used: {details}"))),
        ErrorKind::IO
        | ErrorKind::Timeout
        | ErrorKind::Canceled
        | ErrorKind::Routing
        | ErrorKind::Backpressure
        | ErrorKind::Sentinel
        | ErrorKind::Cluster
        | ErrorKind::Tls => Error::Unavailable(details),
        // An answer that nobody can read, or that the client threw away: the command may have run.
        ErrorKind::Protocol | ErrorKind::Parse => Error::Unavailable(details),
        ErrorKind::Unknown if details == "channel closed" => Error::Unavailable(details),
        _ if details.is_empty() => Error::Unavailable(format!("{:?}", error.kind())),
        _ => Error::Refused(details),
    }
}

/// What calls as scripts mean.
pub(crate) const NO_FUNCTIONS: &str = "producers in other languages can't call the library, and each call costs more";

/// Whether the server takes no library for now: its memory is full, or it is a replica.
fn finds_no_room(refusal: &str) -> bool {
    ["OOM", "READONLY"].iter().any(|word| refusal.starts_with(word))
}

fn reply(value: Value, function: &'static str) -> Result<Reply, Error> {
    Ok(match value {
        Value::Null => Reply::Nil,
        Value::Integer(number) => Reply::Int(number),
        Value::Boolean(flag) => Reply::Int(flag.into()),
        Value::Double(number) => Reply::Bytes(number.to_string().into_bytes()),
        Value::String(text) => Reply::Bytes(text.as_bytes().to_vec()),
        Value::Bytes(bytes) => Reply::Bytes(bytes.to_vec()),
        Value::Array(items) => {
            Reply::Array(items.into_iter().map(|item| reply(item, function)).collect::<Result<_, _>>()?)
        }
        other => return Err(Error::Reply { function, reply: format!("a {:?}", other.kind()) }),
    })
}
