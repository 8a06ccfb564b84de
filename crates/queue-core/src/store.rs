//! The door to Redis: connections, timeouts, reconnecting, subscriptions. With `scripts`, the only module that knows the client.
//!
//! The client is set so that nothing happens twice or late: one attempt per command (a lost reply must not run a script
//! again behind our back), a timeout on each, and none is kept for a connection that is not there (an abandoned command
//! must not run after a reconnect). Whether to send again is decided above, where it is known to be harmless.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fred::clients::{Client, SubscriberClient};
use fred::error::{Error as FredError, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, LuaInterface, PubsubInterface};
use fred::types::config::{
    Config, ConnectionConfig, PerformanceConfig, ReconnectPolicy, TlsConfig, TlsConnector, UnresponsiveConfig,
};
use fred::types::{Builder, CustomCommand, Value};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::mpsc;

use crate::config::{Fault, RedisConfig};
use crate::error::Error;
use crate::keys::Keys;
use crate::reply::Reply;
use crate::scripts::{self, Script};

/// A connection to Redis, cheap to clone.
#[derive(Clone)]
pub struct Store {
    client: Client,
    inner: Arc<Inner>,
}

struct Inner {
    builder: Builder,
    /// How long a subscription may take to begin.
    patience: Duration,
    keys: Keys,
    /// Each script's text with the prelude before it, and its digest.
    scripts: HashMap<&'static str, fred::types::scripts::Script>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// One message of a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The channel that it came on.
    pub channel: String,
    /// Its text.
    pub text: String,
}

impl Store {
    /// Connects. Fails at once if the server can't be reached; afterwards reconnects by itself for as long as it lives.
    pub async fn connect(config: &RedisConfig) -> Result<Self, Error> {
        let builder = builder(config)?;
        let client = builder.build().map_err(translate)?;
        client.init().await.map_err(translate)?;
        let keys = Keys::new();
        let prelude = scripts::prelude(&keys);
        let scripts = scripts::TABLE
            .iter()
            .map(|script| (script.name, fred::types::scripts::Script::from_lua(format!("{prelude}\n{}", script.body))))
            .collect();
        let store = Self {
            client,
            inner: Arc::new(Inner {
                builder,
                patience: config.connect_timeout + config.command_timeout,
                keys,
                scripts,
            }),
        };
        store.check_version().await?;
        Ok(store)
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
        let says = |field: &str| info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
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

    /// The digest by which the server knows a script.
    pub fn digest(&self, script: &'static Script) -> &str {
        self.inner.scripts[script.name].sha1()
    }

    /// Calls a script, loading it first if the server has forgotten it.
    pub async fn call(&self, script: &'static Script, args: Vec<Vec<u8>>) -> Result<Reply, Error> {
        let prepared = &self.inner.scripts[script.name];
        let args: Vec<Value> = args.into_iter().map(|arg| Value::Bytes(arg.into())).collect();
        let no_keys: Vec<String> = Vec::new();
        let mut answer: Result<Value, FredError> =
            self.client.evalsha(prepared.sha1().clone(), no_keys.clone(), args.clone()).await;
        if matches!(&answer, Err(error) if error.details().starts_with("NOSCRIPT")) {
            // Not run: so sending the text is no second run.
            answer = self.client.eval(prepared.lua().expect("made from its text").clone(), no_keys, args).await;
        }
        reply(answer.map_err(translate)?, script.name)
    }

    /// Runs one plain command.
    pub async fn command(&self, name: &'static str, args: &[&[u8]]) -> Result<Reply, Error> {
        let args: Vec<Value> = args.iter().map(|arg| Value::Bytes(arg.to_vec().into())).collect();
        let command = CustomCommand::new_static(name, None::<u16>, false);
        let answer: Value = self.client.custom(command, args).await.map_err(translate)?;
        reply(answer, name)
    }

    /// The members of a set that others may write too; none if they have made something else of it.
    pub(crate) async fn members(&self, key: &str) -> Result<Vec<Reply>, Error> {
        match self.command("SMEMBERS", &[key.as_bytes()]).await {
            Ok(members) => members.array("SMEMBERS"),
            Err(error) if error.is_wrong_type() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Listens to channels on a connection of its own, which subscribes again by itself after a reconnect. What was said
    /// in between is lost: messages are hints. Ends when the receiver is dropped.
    pub async fn subscribe(&self, channels: &[String], patterns: &[String]) -> Result<mpsc::Receiver<Message>, Error> {
        let subscriber: SubscriberClient = self.inner.builder.build_subscriber_client().map_err(translate)?;
        let begin = async {
            subscriber.init().await?;
            let messages = subscriber.message_rx();
            subscriber.manage_subscriptions();
            if !channels.is_empty() {
                subscriber.subscribe(channels.to_vec()).await?;
            }
            if !patterns.is_empty() {
                subscriber.psubscribe(patterns.to_vec()).await?;
            }
            Ok(messages)
        };
        // The client puts no time limit on a subscription that is never confirmed.
        let begun = tokio::time::timeout(self.inner.patience, begin).await;
        let mut messages = match begun {
            Ok(Ok(messages)) => messages,
            failed => {
                let _ = subscriber.quit().await;
                return Err(match failed {
                    Ok(Err(error)) => translate(error),
                    _ => Error::Unavailable("a subscription was not confirmed in time".into()),
                });
            }
        };
        let (sender, receiver) = mpsc::channel(1024);
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    message = messages.recv() => message,
                    () = sender.closed() => break,
                };
                match message {
                    Ok(message) => {
                        let Some(text) =
                            message.value.as_bytes().map(|bytes| String::from_utf8_lossy(bytes).into_owned())
                        else {
                            continue;
                        };
                        let message = Message { channel: message.channel.to_string(), text };
                        // A listener that does not keep up misses hints rather than holding up the connection.
                        if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send(message) {
                            break;
                        }
                    }
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
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

fn builder(config: &RedisConfig) -> Result<Builder, Error> {
    let fred_config = fred_config(config)?;
    let command_timeout = config.command_timeout;
    let connect_timeout = config.connect_timeout;
    let mut builder = Builder::from_config(fred_config);
    builder
        .with_connection_config(|connection: &mut ConnectionConfig| {
            connection.max_command_attempts = 1;
            connection.connection_timeout = connect_timeout;
            connection.internal_command_timeout = command_timeout;
            connection.max_command_buffer_len = 10_000;
            // A server that accepts and never answers is as good as none.
            connection.unresponsive =
                UnresponsiveConfig { max_timeout: Some(command_timeout * 2), interval: Duration::from_millis(500) };
        })
        .with_performance_config(|performance: &mut PerformanceConfig| {
            performance.default_command_timeout = command_timeout;
            performance.broadcast_channel_capacity = 4096;
        })
        .set_policy(ReconnectPolicy::new_exponential(0, 50, 1_000, 2));
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
        _ if details.is_empty() => Error::Unavailable(format!("{:?}", error.kind())),
        _ => Error::Refused(details),
    }
}

fn reply(value: Value, script: &'static str) -> Result<Reply, Error> {
    Ok(match value {
        Value::Null => Reply::Nil,
        Value::Integer(number) => Reply::Int(number),
        Value::Boolean(flag) => Reply::Int(flag.into()),
        Value::Double(number) => Reply::Bytes(number.to_string().into_bytes()),
        Value::String(text) => Reply::Bytes(text.as_bytes().to_vec()),
        Value::Bytes(bytes) => Reply::Bytes(bytes.to_vec()),
        Value::Array(items) => {
            Reply::Array(items.into_iter().map(|item| reply(item, script)).collect::<Result<_, _>>()?)
        }
        other => return Err(Error::Reply { script, reply: format!("a {:?}", other.kind()) }),
    })
}
