//! One connection, used for one execution and never again.

use std::convert::Infallible;
use std::future::{Ready, poll_fn, ready};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{MaybeDone, maybe_done};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::error::{DbError, Severity, SqlState};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, CancelToken, Client, Config, SimpleQueryMessage, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;

use super::super::databases::TlsMode;
use super::super::rows::{Returned, Value};
use super::super::{MESSAGE_MAX_BYTES, cut};
use super::returned;
use super::wire::{Ear, Listening, Socket, Stream, Wire};
use crate::execute::Failure;

/// How long a connection may take to say goodbye.
const GOODBYE_MAX: Duration = Duration::from_secs(1);
/// How long one cancel request may take.
const CANCEL_MAX: Duration = Duration::from_secs(3);
/// How long until a cancel is asked for again: the first may have come before the statement had begun.
const CANCEL_AGAIN: Duration = Duration::from_millis(200);
/// How long the server may take to heed a cancel before the connection is given up.
const SETTLE_MAX: Duration = Duration::from_secs(10);

/// A database to connect to, with all that it takes.
#[derive(Clone)]
pub(crate) struct Server {
    /// How messages to the user call it.
    pub name: String,
    pub address: Address,
    pub tls: Tls,
    pub dbname: String,
    pub role: String,
    pub password: Vec<u8>,
    pub connect_timeout: Duration,
}

/// Where a server listens.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl Address {
    /// PostgreSQL's reading: an absolute path is the folder of a Unix socket, anything else a host.
    pub fn new(host: &str, port: u16) -> Self {
        if host.starts_with('/') {
            Address::Unix(PathBuf::from(host).join(format!(".s.PGSQL.{port}")))
        } else {
            Address::Tcp { host: host.to_owned(), port }
        }
    }
}

/// How connections are encrypted.
#[derive(Clone)]
pub(crate) enum Tls {
    Off,
    Offered(MakeRustlsConnect),
    Required(MakeRustlsConnect),
}

impl Tls {
    /// Reads the certificates that `mode` asks for.
    pub fn new(mode: TlsMode, ca_file: Option<&std::path::Path>) -> Result<Self, String> {
        // Named here: with two providers in the program, rustls would refuse to choose one.
        let provider = Arc::new(ring::default_provider());
        let builder = || {
            ClientConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .map_err(|error| error.to_string())
        };
        let unverified = || {
            let verifier = Arc::new(AnyCertificate(provider.clone()));
            let config = builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
            Ok::<_, String>(MakeRustlsConnect::new(config))
        };
        Ok(match mode {
            TlsMode::Disable => Tls::Off,
            TlsMode::Prefer => Tls::Offered(unverified()?),
            TlsMode::Require => Tls::Required(unverified()?),
            TlsMode::VerifyFull => {
                let config = builder()?.with_root_certificates(roots(ca_file)?).with_no_client_auth();
                Tls::Required(MakeRustlsConnect::new(config))
            }
        })
    }
}

fn roots(ca_file: Option<&std::path::Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(file) => {
            let certificates = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            for certificate in certificates.map_err(|error| format!("{}: {error}", file.display()))? {
                roots.add(certificate).map_err(|error| format!("{}: {error}", file.display()))?;
            }
        }
        // What of the system's store can't be parsed is none of our business.
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() { Err("no certificate to trust was found".into()) } else { Ok(roots) }
}

/// For `prefer` and `require`, which protect from listening and not from impostors, as PostgreSQL defines them. Signatures
/// are checked still, so that the certificate shown is at least the one used.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Hands tokio-postgres a stream that has been encrypted already, or that isn't to be.
struct Already;

impl<S: TlsStream + Unpin> TlsConnect<S> for Already {
    type Stream = S;
    type Error = Infallible;
    type Future = Ready<Result<S, Infallible>>;

    fn connect(self, stream: S) -> Self::Future {
        ready(Ok(stream))
    }
}

/// Why something asked of a connection did not happen.
#[derive(Debug)]
pub(in super::super) enum Fault {
    /// The database says so.
    Database(Box<DbError>),
    /// The connection is gone, whatever it was doing.
    Lost,
    /// The server did what the connection can't go on after; the text is to blame.
    Broke(&'static str),
    /// An interrupt was asked for and not heeded in time.
    Unsettled,
    /// The client library refused.
    Client(String),
}

impl Fault {
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Fault::Database(error) => Some(error.code()),
            _ => None,
        }
    }

    /// The column that the database names.
    pub fn column(&self) -> Option<&str> {
        match self {
            Fault::Database(error) => error.column(),
            _ => None,
        }
    }

    /// Whether the connection did not survive it.
    pub fn is_fatal(&self) -> bool {
        match self {
            Fault::Database(error) => error.parsed_severity().is_none_or(|severity| severity != Severity::Error),
            Fault::Lost | Fault::Broke(_) | Fault::Unsettled => true,
            Fault::Client(_) => false,
        }
    }

    /// As the job's record will say it.
    pub fn message(&self) -> String {
        match self {
            Fault::Database(error) => cut(error.message(), MESSAGE_MAX_BYTES),
            Fault::Lost => "the connection to the database was lost".into(),
            Fault::Broke(reason) => (*reason).into(),
            Fault::Unsettled => "the database did not heed the request to cancel the statement".into(),
            Fault::Client(message) => cut(message, MESSAGE_MAX_BYTES),
        }
    }
}

impl From<tokio_postgres::Error> for Fault {
    fn from(error: tokio_postgres::Error) -> Self {
        use std::error::Error;
        if let Some(database) = error.as_db_error() {
            return Fault::Database(Box::new(database.clone()));
        }
        match error.source() {
            _ if error.is_closed() => Fault::Lost,
            Some(source) if source.is::<std::io::Error>() => Fault::Lost,
            Some(source) => Fault::Client(format!("{error}: {source}")),
            None => Fault::Client(error.to_string()),
        }
    }
}

/// Why a running statement was interrupted by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Interrupt {
    Stop,
    Deadline,
}

impl Server {
    async fn dial(&self) -> std::io::Result<Stream> {
        let (socket, host): (Box<dyn Socket>, _) = match &self.address {
            Address::Unix(path) => return Ok(Stream::Plain(Box::new(UnixStream::connect(path).await?))),
            Address::Tcp { host, port } => {
                let socket = TcpStream::connect((host.as_str(), *port)).await?;
                socket.set_nodelay(true)?;
                // A statement may be silent for hours: only this tells that the server's machine is gone.
                let keepalive = socket2::TcpKeepalive::new()
                    .with_time(Duration::from_secs(60))
                    .with_interval(Duration::from_secs(10))
                    .with_retries(6);
                socket2::SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
                (Box::new(socket), host)
            }
        };
        let (tls, required) = match &self.tls {
            Tls::Off => return Ok(Stream::Plain(socket)),
            Tls::Offered(tls) => (tls, false),
            Tls::Required(tls) => (tls, true),
        };
        encrypt(socket, tls.clone(), host, required).await
    }

    /// Connects under a name that others see in `pg_stat_activity`.
    pub(in super::super) async fn connect(&self, application_name: &str) -> Result<Link, Failure> {
        let failure = |reason: &dyn std::fmt::Display, retryable| Failure {
            message: cut(&format!("could not connect to {}: {reason}", self.name), MESSAGE_MAX_BYTES),
            sqlstate: None,
            retryable,
            undone: true,
        };
        let mut config = Config::new();
        config.user(&self.role).dbname(&self.dbname).password(&self.password).application_name(application_name);
        config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        let ear = Ear::default();
        let connecting = async {
            let stream = self.dial().await.map_err(|error| {
                // rustls reports what it finds wrong with a certificate as invalid data: no retry mends that.
                failure(&error, error.kind() != std::io::ErrorKind::InvalidData)
            })?;
            config.connect_raw(Wire::new(stream, ear.clone()), Already).await.map_err(|error| {
                match Fault::from(error) {
                    Fault::Database(error) => Failure {
                        message: cut(error.message(), MESSAGE_MAX_BYTES),
                        sqlstate: Some(error.code().code().to_owned()),
                        retryable: [
                            SqlState::CANNOT_CONNECT_NOW,
                            SqlState::TOO_MANY_CONNECTIONS,
                            SqlState::ADMIN_SHUTDOWN,
                            SqlState::CRASH_SHUTDOWN,
                        ]
                        .contains(error.code()),
                        undone: true,
                    },
                    fault @ Fault::Lost => failure(&fault.message(), true),
                    fault => failure(&fault.message(), false),
                }
            })
        };
        let (client, mut connection) = timeout(self.connect_timeout, connecting)
            .await
            .unwrap_or_else(|_| Err(failure(&"it took too long", true)))?;
        let version = connection.parameter("server_version").and_then(major_version);
        let cancel = client.cancel_token();
        let task = tokio::spawn({
            let ear = ear.clone();
            async move {
                while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                    if let AsyncMessage::Notice(notice) = message {
                        ear.heard().notice(&notice);
                    }
                }
            }
        });
        let guard = Guard { task, cancel, server: self.clone(), busy: false };
        Ok(Link { client, guard, ear, version, interrupt: None })
    }
}

/// PostgreSQL's way to TLS: a request in clear, answered by one byte.
async fn encrypt(
    mut socket: Box<dyn Socket>,
    mut tls: MakeRustlsConnect,
    host: &str,
    required: bool,
) -> std::io::Result<Stream> {
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
    socket.write_all(&SSL_REQUEST).await?;
    socket.flush().await?;
    match socket.read_u8().await? {
        b'S' => {
            let connector =
                MakeTlsConnect::<Box<dyn Socket>>::make_tls_connect(&mut tls, host).map_err(std::io::Error::other)?;
            Ok(Stream::Tls(Box::new(connector.connect(socket).await?)))
        }
        b'N' if !required => Ok(Stream::Plain(socket)),
        b'N' => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the server does not support TLS")),
        _ => Err(std::io::Error::other("the server did not answer the request for TLS")),
    }
}

fn major_version(text: &str) -> Option<u32> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// An open connection.
pub(in super::super) struct Link {
    client: Client,
    guard: Guard,
    ear: Ear,
    /// The server's major version.
    pub version: Option<u32>,
    /// Set once we asked for the running text to be cancelled. A cancel may arrive late and hit what follows, so that all
    /// that fails afterwards is put down to it.
    pub interrupt: Option<Interrupt>,
}

/// Ends the connection whatever happens to its owner.
struct Guard {
    task: JoinHandle<()>,
    cancel: CancelToken,
    server: Server,
    /// A user's text is running.
    busy: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The socket closes with the task. A backend notices that only when it next writes, hence the cancel.
        self.task.abort();
        if self.busy
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (cancel, server) = (self.cancel.clone(), self.server.clone());
            runtime.spawn(async move { ask_cancel(&cancel, &server).await });
        }
    }
}

/// Asks the server to cancel what the connection runs. Whether it did shows only there.
async fn ask_cancel(cancel: &CancelToken, server: &Server) {
    let asking = async {
        if let Ok(stream) = server.dial().await {
            let _ = cancel.cancel_query_raw(stream, Already).await;
        }
    };
    let _ = timeout(CANCEL_MAX, asking).await;
}

impl Link {
    /// Runs SQL of ours that returns nothing.
    pub async fn command(&self, sql: &str) -> Result<(), Fault> {
        Ok(self.client.batch_execute(sql).await?)
    }

    /// Runs SQL of ours; gives the columns of its last row.
    pub async fn row(&self, sql: &str) -> Result<Vec<Option<String>>, Fault> {
        let messages = self.client.simple_query(sql).await?;
        let row = messages.iter().rev().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()),
            _ => None,
        });
        row.ok_or_else(|| Fault::Client("the database returned no row".into()))
    }

    /// The rows of a query, as texts. As interruptible as [`run`](Self::run).
    pub async fn rows(&mut self, sql: &str, stop: &CancellationToken) -> Result<Vec<Vec<Option<String>>>, Fault> {
        let Link { client, guard, ear, interrupt, .. } = self;
        let reading = async { Ok(client.simple_query(sql).await?) };
        let watched = Watched { guard, ear, interrupt };
        let for_ever = Instant::now() + Duration::from_secs(30 * 86_400);
        let messages = watched.run(Listening::No, reading, stop, for_ever).await?;
        let columns = |message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()),
            _ => None,
        };
        Ok(messages.into_iter().filter_map(columns).collect())
    }

    /// Runs a user's text as one message. Interrupts it when `stop` fires or `deadline` is over, and waits until that is
    /// settled; the text may have got through all the same.
    pub async fn run(&mut self, text: &str, stop: &CancellationToken, deadline: Instant) -> Result<(), Fault> {
        let Link { client, guard, ear, interrupt, .. } = self;
        let running = async {
            let mut messages = std::pin::pin!(client.simple_query_raw(text).await?);
            while let Some(message) = messages.next().await {
                message?;
            }
            Ok(())
        };
        let watched = Watched { guard, ear, interrupt };
        watched.run(Listening::Text, running, stop, deadline).await
    }

    /// Has a user's statement made ready to be run for rows, as interruptible as if it ran.
    pub async fn prepare(
        &mut self,
        text: &str,
        stop: &CancellationToken,
        deadline: Instant,
    ) -> Result<Statement, Fault> {
        let Link { client, guard, ear, interrupt, .. } = self;
        let preparing = async { Ok(client.prepare(text).await?) };
        let watched = Watched { guard, ear, interrupt };
        watched.run(Listening::Rows, preparing, stop, deadline).await
    }

    /// Runs a statement for rows, and SQL of ours between them, all sent at once. Gives what the rows returned up to the first that
    /// failed, and why that one did: what is behind it the server has refused then. As interruptible as [`run`](Self::run).
    pub async fn run_rows(
        &mut self,
        statement: &Statement,
        requests: &[Request<'_>],
        stop: &CancellationToken,
        deadline: Instant,
    ) -> Result<(Vec<Returned>, Option<Fault>), Fault> {
        let Link { client, guard, ear, interrupt, .. } = self;
        let running = async {
            let mut asked = Vec::with_capacity(requests.len());
            for request in requests {
                asked.push(match *request {
                    Request::Ours(sql) => Asked::Ours(Box::pin(maybe_done(client.batch_execute(sql)))),
                    Request::Row(row) => Asked::Row(Box::pin(maybe_done(run_row(client, statement, row)))),
                });
            }
            // A request is sent when its future is first polled, and the server answers in that order.
            poll_fn(|cx| {
                for request in &mut asked {
                    let _ = match request {
                        Asked::Ours(sent) => sent.as_mut().poll(cx),
                        Asked::Row(sent) => sent.as_mut().poll(cx),
                    };
                }
                Poll::Ready(())
            })
            .await;
            let mut returned = Vec::with_capacity(requests.len());
            for request in asked {
                match request {
                    Asked::Ours(sent) => output(sent).await?,
                    Asked::Row(sent) => match output(sent).await {
                        Ok(of_row) => returned.push(of_row),
                        Err(error) => return Ok((returned, Some(error.into()))),
                    },
                }
            }
            Ok((returned, None))
        };
        let watched = Watched { guard, ear, interrupt };
        watched.run(Listening::Rows, running, stop, deadline).await
    }

    /// The tag of the last command of the user's text and its notices.
    pub fn report(&self) -> crate::execute::Report {
        let heard = self.ear.heard();
        crate::execute::Report { tag: heard.tag.clone(), notices: heard.notices.clone() }
    }

    /// Whether the server is in the midst of a transaction.
    pub fn in_transaction(&self) -> bool {
        self.ear.heard().in_transaction
    }

    /// Ends the connection in order.
    pub async fn close(self) {
        let Link { client, mut guard, .. } = self;
        drop(client);
        // The task says goodbye to the server and ends; if it can't, the guard ends it.
        let _ = timeout(GOODBYE_MAX, &mut guard.task).await;
    }
}

/// What is sent together with others.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Request<'a> {
    /// SQL of ours that returns nothing and does not fail.
    Ours(&'a str),
    /// A statement with the values of a row.
    Row(&'a [Value]),
}

/// A request on its way.
enum Asked<Ours: Future, Row: Future> {
    Ours(Pin<Box<MaybeDone<Ours>>>),
    Row(Pin<Box<MaybeDone<Row>>>),
}

/// What comes of a request that has been sent.
async fn output<F: Future>(mut asked: Pin<Box<MaybeDone<F>>>) -> F::Output {
    asked.as_mut().await;
    asked.as_mut().take_output().expect("it was awaited, and is taken once")
}

async fn run_row(client: &Client, statement: &Statement, row: &[Value]) -> Result<Returned, tokio_postgres::Error> {
    let mut stream = std::pin::pin!(client.query_raw(statement, row).await?);
    let mut returned = Returned::default();
    while let Some(row) = stream.next().await {
        let row = row?;
        returned.add(|out| returned::write_row(out, &row));
    }
    returned.affected = stream.rows_affected().unwrap_or(0);
    Ok(returned)
}

/// The parts of a link that are needed while something of a user runs on it.
struct Watched<'a> {
    guard: &'a mut Guard,
    ear: &'a Ear,
    interrupt: &'a mut Option<Interrupt>,
}

impl Watched<'_> {
    async fn run<T>(
        self,
        listening: Listening,
        running: impl Future<Output = Result<T, Fault>>,
        stop: &CancellationToken,
        deadline: Instant,
    ) -> Result<T, Fault> {
        self.ear.heard().listen(listening);
        self.guard.busy = true;
        let ran = Self::interruptible(self.guard, self.interrupt, running, stop, deadline).await;
        self.ear.heard().stop();
        let settled = !matches!(ran, Err(Fault::Unsettled));
        self.guard.busy = !settled;
        match self.ear.heard().broke {
            Some(reason) if ran.is_err() => Err(Fault::Broke(reason)),
            _ => ran,
        }
    }

    async fn interruptible<T>(
        guard: &Guard,
        interrupt: &mut Option<Interrupt>,
        running: impl Future<Output = Result<T, Fault>>,
        stop: &CancellationToken,
        deadline: Instant,
    ) -> Result<T, Fault> {
        let mut running = std::pin::pin!(running);
        let cause = tokio::select! {
            biased;
            ran = &mut running => return ran,
            () = stop.cancelled() => Interrupt::Stop,
            () = sleep_until(deadline) => Interrupt::Deadline,
        };
        *interrupt = Some(cause);
        let asking = async {
            loop {
                ask_cancel(&guard.cancel, &guard.server).await;
                sleep(CANCEL_AGAIN).await;
            }
        };
        tokio::select! {
            biased;
            ran = running => ran,
            () = asking => Err(Fault::Unsettled),
            () = sleep(SETTLE_MAX) => Err(Fault::Unsettled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_servers_call_themselves() {
        assert_eq!(major_version("15.18 (Debian 15.18-0+deb12u1)"), Some(15));
        assert_eq!(major_version("19devel"), Some(19));
        assert_eq!(major_version("EnterpriseDB"), None);
    }
}
