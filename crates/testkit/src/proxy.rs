//! A network that fails on request: a TCP proxy between a client and a server.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc as blocking};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep_until};

use crate::ports::Port;
use crate::resp;
use crate::wait::eventually;

/// A way through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Client to server: requests.
    ToServer,
    /// Server to client: replies.
    ToClient,
}

/// Where a call of a Redis client is stopped, and its connection with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// The server does not get it.
    BeforeCall,
    /// The server has answered it, and the client does not get the reply.
    BeforeReply,
    /// The client has its reply, and the server gets nothing more.
    AfterReply,
    /// The client's connection is cut at once, and the server gets the call when so much time has passed.
    Late(Duration),
    /// It is not stopped: the server gets it a second time at once, as where a client has sent it again and the first one comes late.
    Twice,
}

/// Sees each request of a Redis client, the words of the command, and may stop it.
type Gate = Box<dyn FnMut(&[Vec<u8>]) -> Option<Point> + Send>;

/// Forwards TCP connections to a server; everything passes unless a method says otherwise. It has a thread and a
/// runtime of its own, and what a method asks for is in force when it returns.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    orders: Option<mpsc::UnboundedSender<Order>>,
    thread: Option<JoinHandle<()>>,
    port: Port,
}

struct Shared {
    target: Mutex<SocketAddr>,
    delay_us: AtomicU64,
    drop_replies: AtomicBool,
    dropped_bytes: AtomicU64,
    budgets: Mutex<Budgets>,
    /// Numbers of the open connections.
    open: Mutex<BTreeSet<u64>>,
    cut: broadcast::Sender<()>,
    gate: Mutex<Option<Gate>>,
    stopped: AtomicUsize,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("target", &self.target()).finish_non_exhaustive()
    }
}

impl Shared {
    fn target(&self) -> SocketAddr {
        *self.target.lock().expect("nobody panics while holding it")
    }
}

/// Bytes that may still pass in each direction before everything is cut.
#[derive(Debug, Default)]
struct Budgets {
    to_server: Option<u64>,
    to_client: Option<u64>,
}

#[derive(Debug)]
struct Order {
    refuse: bool,
    done: blocking::Sender<()>,
}

impl Proxy {
    /// Listens on a port of its own.
    pub fn start(target: SocketAddr) -> Self {
        let port = Port::lease();
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            delay_us: AtomicU64::new(0),
            drop_replies: AtomicBool::new(false),
            dropped_bytes: AtomicU64::new(0),
            budgets: Mutex::default(),
            open: Mutex::default(),
            cut: broadcast::Sender::new(1),
            gate: Mutex::default(),
            stopped: AtomicUsize::new(0),
        });
        let (orders, inbox) = mpsc::unbounded_channel();
        let addr = SocketAddr::from(([127, 0, 0, 1], port.number()));
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(serve(addr, shared, inbox));
            }
        });
        let proxy = Self { shared, orders: Some(orders), thread: Some(thread), port };
        proxy.refuse(false);
        proxy
    }

    /// Leads those who connect from now on to another server.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.shared.target.lock().expect("nobody panics while holding it") = target;
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port.number()).into()
    }

    /// A Redis URL that leads through the proxy.
    pub fn redis_url(&self, db: u8) -> String {
        format!("redis://{}/{db}", self.addr())
    }

    /// Open connections.
    pub fn connections(&self) -> usize {
        self.shared.open().len()
    }

    /// Cuts all connections, on both sides.
    pub fn cut(&self) {
        // Not until there are none: clients connect again at once.
        let old = self.shared.open().clone();
        // No receiver: no connection to cut.
        let _ = self.shared.cut.send(());
        while !self.shared.open().is_disjoint(&old) {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether new connections are refused, as by a host where nothing listens. Open ones stay.
    pub fn refuse(&self, refuse: bool) {
        let (done, wait) = blocking::channel();
        let orders = self.orders.as_ref().expect("there until the drop");
        orders.send(Order { refuse, done }).expect("the proxy runs");
        wait.recv().expect("the proxy runs");
    }

    /// How much later than sent replies arrive from now on.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay_us.store(delay.as_micros() as u64, Ordering::SeqCst);
    }

    /// Whether replies are swallowed while requests pass: commands run and nobody hears of it.
    pub fn drop_replies(&self, drop: bool) {
        self.shared.drop_replies.store(drop, Ordering::SeqCst);
    }

    /// How many bytes of replies were swallowed so far: once it grows, a command has run.
    pub fn dropped_bytes(&self) -> u64 {
        self.shared.dropped_bytes.load(Ordering::SeqCst)
    }

    /// Lets `bytes` more bytes pass in one direction, over all connections together, then cuts all connections, once.
    /// With 0 the next byte cuts and does not pass.
    pub fn cut_after_bytes(&self, direction: Direction, bytes: u64) {
        *self.shared.budgets().of(direction) = Some(bytes);
    }

    /// Shows `gate` every command on connections that are made from now on, in the order in which the server would get them.
    /// A connection of which it stops a command passes nothing more, in either direction, until it is cut. Other faults
    /// than cuts and refusals don't reach connections with a gate, and subscriptions pass it unseen.
    pub fn gate(&self, gate: impl FnMut(&[Vec<u8>]) -> Option<Point> + Send + 'static) {
        *self.shared.gate() = Some(Box::new(gate));
    }

    /// A gate that every call of one function comes to, by its name in Redis, and all else passes.
    pub fn gate_calls(&self, function: String, mut stop: impl FnMut() -> Option<Point> + Send + 'static) {
        self.gate(
            move |words| if words.get(1).is_some_and(|word| *word == function.as_bytes()) { stop() } else { None },
        );
    }

    /// Shows commands to nobody any more, on connections that are made from now on.
    pub fn open_gate(&self) {
        *self.shared.gate() = None;
    }

    /// How many connections stand still by the gate's word: what it stopped there has come as far as its point.
    pub fn stopped(&self) -> usize {
        self.shared.stopped.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The end of the orders ends the runtime and with it all connections.
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.open.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn budgets(&self) -> MutexGuard<'_, Budgets> {
        self.budgets.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn gate(&self) -> MutexGuard<'_, Option<Gate>> {
        self.gate.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Stands still until the connection is cut.
    async fn stop(&self) -> io::Result<()> {
        /// Counts what stands, however that ends.
        struct Standing<'a>(&'a AtomicUsize);
        impl Drop for Standing<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.stopped.fetch_add(1, Ordering::SeqCst);
        let _standing = Standing(&self.stopped);
        std::future::pending().await
    }

    /// How many of `length` bytes may pass; fewer than that means: then cut.
    fn allow(&self, direction: Direction, length: usize) -> (usize, bool) {
        let mut budgets = self.budgets();
        let budget = budgets.of(direction);
        match *budget {
            None => (length, false),
            Some(left) if (length as u64) < left => {
                *budget = Some(left - length as u64);
                (length, false)
            }
            Some(left) => {
                *budget = None;
                (left as usize, true)
            }
        }
    }
}

impl Budgets {
    fn of(&mut self, direction: Direction) -> &mut Option<u64> {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

async fn serve(addr: SocketAddr, shared: Arc<Shared>, mut orders: mpsc::UnboundedReceiver<Order>) {
    // A closed listener, not one that nobody accepts from: only then the kernel refuses.
    let mut listener: Option<TcpListener> = None;
    let mut number = 0;
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = orders.recv() => {
                let Some(Order { refuse, done }) = order else { return };
                if refuse {
                    listener = None;
                } else if listener.is_none() {
                    let bound = eventually("the leased port to be free", async || TcpListener::bind(addr).await.ok());
                    listener = Some(bound.await);
                }
                let _ = done.send(());
            }
            Ok((client, _)) = accepted => {
                number += 1;
                // First the ear, then the entry: a cut that sees the entry is heard.
                let (shared, cut) = (Arc::clone(&shared), shared.cut.subscribe());
                shared.open().insert(number);
                tokio::spawn(async move {
                    connection(client, &shared, cut).await;
                    shared.open().remove(&number);
                });
            }
        }
    }
}

async fn connection(client: TcpStream, shared: &Shared, mut cut: broadcast::Receiver<()>) {
    let both = async {
        let server = TcpStream::connect(shared.target()).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        if shared.gate().is_some() {
            return gated(Ends { from_client, to_client, from_server, to_server }, shared).await;
        }
        tokio::try_join!(requests(from_client, to_server, shared), replies(from_server, to_client, shared)).map(|_| ())
    };
    tokio::select! {
        _ = both => {}
        _ = cut.recv() => {}
    }
}

/// The four ends of a connection.
struct Ends {
    from_client: OwnedReadHalf,
    to_client: OwnedWriteHalf,
    from_server: OwnedReadHalf,
    to_server: OwnedWriteHalf,
}

/// A connection command by command.
async fn gated(mut ends: Ends, shared: &Shared) -> io::Result<()> {
    let (mut requests, mut replies) = (Vec::new(), Vec::new());
    // What the server has not answered, with the point at which that is to be stopped.
    let mut open: VecDeque<Option<Point>> = VecDeque::new();
    // Nothing more is asked.
    let mut last = false;
    // Everything stands still once what was asked is answered.
    let mut stop = false;
    // Replies are not one for one any more.
    let mut listens = false;
    loop {
        let (mut sent, mut answered) = ([0; 16 * 1024], [0; 16 * 1024]);
        tokio::select! {
            length = ends.from_client.read(&mut sent), if !last => match length? {
                0 => return Ok(()),
                length => requests.extend_from_slice(&sent[..length]),
            },
            length = ends.from_server.read(&mut answered) => match length? {
                0 => return Ok(()),
                length => replies.extend_from_slice(&answered[..length]),
            },
        }
        while !last && let Some((length, words)) = resp::command(&requests)? {
            let point = shared.gate().as_mut().and_then(|gate| gate(&words));
            if let Some(Point::Late(time)) = point {
                tokio::spawn(deliver_late(ends.from_server, ends.to_server, requests.drain(..length).collect(), time));
                return Ok(());
            }
            if point == Some(Point::BeforeCall) {
                // What was asked before is still answered.
                (last, stop) = (true, true);
                break;
            }
            listens |= words.first().is_some_and(|word| word.to_ascii_uppercase().ends_with(b"SUBSCRIBE"));
            ends.to_server.write_all(&requests[..length]).await?;
            if point == Some(Point::Twice) {
                ends.to_server.write_all(&requests[..length]).await?;
                open.push_back(None);
            } else {
                last = point.is_some();
            }
            requests.drain(..length);
            open.push_back(point);
        }
        if listens {
            ends.to_client.write_all(&replies).await?;
            replies.clear();
        }
        while let Some(length) = resp::reply(&replies)? {
            let point = open.pop_front().flatten();
            if point == Some(Point::BeforeReply) {
                return shared.stop().await;
            }
            // Of two replies to one call the client gets the first.
            if point != Some(Point::Twice) {
                ends.to_client.write_all(&replies[..length]).await?;
            }
            replies.drain(..length);
            if point == Some(Point::AfterReply) {
                return shared.stop().await;
            }
        }
        if stop && open.is_empty() {
            return shared.stop().await;
        }
    }
}

/// Sends a call of a client that is gone, and waits for its reply so that it is not lost with the connection.
async fn deliver_late(mut from_server: OwnedReadHalf, mut to_server: OwnedWriteHalf, call: Vec<u8>, time: Duration) {
    tokio::time::sleep(time).await;
    // A server that is gone by then never gets it.
    if to_server.write_all(&call).await.is_ok() {
        let _ = from_server.read(&mut [0; 1024]).await;
    }
}

/// Ends with an error when the connection is to be closed whole, and without one at the end of one direction.
async fn requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        forward(&mut to, &buffer[..length], Direction::ToServer, shared).await?;
    }
}

async fn replies(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared) -> io::Result<()> {
    // Reading goes on while earlier replies wait for their time, or the delays would add up.
    let (queue, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    let read = async move {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            let at = Instant::now() + Duration::from_micros(shared.delay_us.load(Ordering::SeqCst));
            if queue.send((at, buffer[..length].to_vec())).await.is_err() {
                return Ok(());
            }
        }
    };
    let write = async {
        while let Some((at, bytes)) = due.recv().await {
            sleep_until(at).await;
            if shared.drop_replies.load(Ordering::SeqCst) {
                shared.dropped_bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            } else {
                forward(&mut to, &bytes, Direction::ToClient, shared).await?;
            }
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(|_| ())
}

async fn forward(to: &mut OwnedWriteHalf, bytes: &[u8], direction: Direction, shared: &Shared) -> io::Result<()> {
    let (allowed, cut) = shared.allow(direction, bytes.len());
    to.write_all(&bytes[..allowed]).await?;
    if cut {
        let _ = shared.cut.send(());
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::redis::{RawClient, RedisServer, Value};
    use crate::wait::eventually_blocking;

    fn setup() -> (RedisServer, Proxy, RawClient) {
        let server = RedisServer::start();
        let proxy = Proxy::start(server.addr());
        let client = RawClient::connect(proxy.addr()).unwrap();
        (server, proxy, client)
    }

    #[test]
    fn passes_everything_by_default() {
        let (server, proxy, mut client) = setup();
        let big = vec![7_u8; 3_000_000];
        assert_eq!(client.call(&[b"SET", &b"big"[..], &big]), Value::Simple("OK".into()));
        assert_eq!(client.call(&["GET", "big"]).bytes(), big);
        assert_eq!(server.raw(&["STRLEN", "big"]).int(), 3_000_000);
        assert_eq!(proxy.connections(), 1);
        drop(client);
        eventually_blocking("the connection to close", || (proxy.connections() == 0).then_some(()));
    }

    #[test]
    fn cut_ends_connections_and_new_ones_pass() {
        let (_server, proxy, mut client) = setup();
        client.call(&["PING"]);
        proxy.cut();
        assert!(client.try_call(&["PING"]).is_err());
        assert_eq!(RawClient::connect(proxy.addr()).unwrap().call(&["PING"]), Value::Simple("PONG".into()));
    }

    #[test]
    fn refuse_is_a_refused_connection_and_keeps_open_ones() {
        let (_server, proxy, mut client) = setup();
        client.call(&["PING"]);
        proxy.refuse(true);
        assert_eq!(RawClient::connect(proxy.addr()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(client.call(&["PING"]), Value::Simple("PONG".into()));
        proxy.refuse(false);
        RawClient::connect(proxy.addr()).unwrap().call(&["PING"]);
    }

    #[test]
    fn a_lost_reply_is_of_a_command_that_ran() {
        let (server, proxy, mut client) = setup();
        client.call(&["PING"]);
        proxy.drop_replies(true);
        client.send(&["INCR", "n"]).unwrap();
        eventually_blocking("a swallowed reply", || (proxy.dropped_bytes() > 0).then_some(()));
        assert_eq!(server.raw(&["GET", "n"]).text(), "1");
        proxy.cut();
        proxy.drop_replies(false);
        assert!(client.receive().is_err());
    }

    #[test]
    fn delay_holds_replies_without_adding_up() {
        let (server, proxy, mut client) = setup();
        client.call(&["PING"]);
        proxy.delay(Duration::from_millis(300));
        let start = std::time::Instant::now();
        // One after the other they would take minutes.
        const CALLS: i64 = 1_000;
        for _ in 0..CALLS {
            client.send(&["INCR", "n"]).unwrap();
        }
        eventually_blocking("the commands to run", || {
            (server.raw(&["GET", "n"]) == Value::Bulk(CALLS.to_string().into_bytes())).then_some(())
        });
        for n in 1..=CALLS {
            assert_eq!(client.receive().unwrap(), Value::Int(n));
            assert!(start.elapsed() >= Duration::from_millis(300));
        }
        assert!(start.elapsed() < Duration::from_secs(100));
    }

    #[test]
    fn cut_after_bytes_cuts_in_mid_reply_and_once() {
        let (server, proxy, mut client) = setup();
        client.call(&["PING"]);
        // "+O" of "+OK\r\n" arrives.
        proxy.cut_after_bytes(Direction::ToClient, 2);
        assert!(client.try_call(&["SET", "a", "1"]).is_err());
        assert_eq!(server.raw(&["GET", "a"]).text(), "1");

        let mut client = RawClient::connect(proxy.addr()).unwrap();
        client.call(&["PING"]);
        proxy.cut_after_bytes(Direction::ToServer, 0);
        assert!(client.try_call(&["SET", "a", "2"]).is_err());
        assert_eq!(server.raw(&["GET", "a"]).text(), "1");
        RawClient::connect(proxy.addr()).unwrap().call(&["PING"]);
    }

    #[test]
    fn a_gate_stops_a_command_at_each_point() {
        for (point, ran, answered) in
            [(Point::BeforeCall, false, false), (Point::BeforeReply, true, false), (Point::AfterReply, true, true)]
        {
            let server = RedisServer::start();
            let proxy = Proxy::start(server.addr());
            proxy.gate(move |words| (words[0] == b"INCR" && words[1] == b"here").then_some(point));
            let mut client = RawClient::connect(proxy.addr()).unwrap();
            assert_eq!(client.call(&["SET", "a", "\r\n$3\r\n"]), Value::Simple("OK".into()));
            // Sent at once: what comes before it passes, what comes behind it does not.
            client.send(&["INCR", "before"]).unwrap();
            client.send(&["INCR", "here"]).unwrap();
            client.send(&["INCR", "behind"]).unwrap();
            eventually_blocking("the stop", || (proxy.stopped() == 1).then_some(()));
            let there = |key: &str| server.raw(&["EXISTS", key]).int() == 1;
            assert_eq!((there("before"), there("here"), there("behind")), (true, ran, false), "{point:?}");
            assert_eq!(client.receive().unwrap(), Value::Int(1));
            proxy.cut();
            assert_eq!(client.receive().ok(), answered.then_some(Value::Int(1)), "{point:?}");
            assert_eq!(proxy.stopped(), 0);
            // Others pass.
            RawClient::connect(proxy.addr()).unwrap().call(&["PING"]);
        }
    }

    #[test]
    fn a_late_call_comes_when_its_client_is_gone_and_a_doubled_one_is_answered_once() {
        let (server, proxy, _) = setup();
        proxy.gate(|words| match &words[1][..] {
            b"late" => Some(Point::Late(Duration::from_millis(200))),
            b"twice" => Some(Point::Twice),
            _ => None,
        });
        let mut client = RawClient::connect(proxy.addr()).unwrap();
        assert_eq!(client.call(&["INCR", "twice"]), Value::Int(1));
        assert_eq!(client.call(&["INCR", "once"]), Value::Int(1));
        assert!(client.try_call(&["INCR", "late"]).is_err());
        eventually_blocking("the late call", || (!server.raw(&["GET", "late"]).is_nil()).then_some(()));
        assert_eq!(server.raw(&["MGET", "late", "twice", "once"]).texts(), ["1", "2", "1"]);
        proxy.open_gate();
        assert_eq!(RawClient::connect(proxy.addr()).unwrap().call(&["INCR", "twice"]), Value::Int(3));
    }

    #[test]
    fn subscriptions_pass_a_gate() {
        let server = RedisServer::start();
        let proxy = Proxy::start(server.addr());
        proxy.gate(|_| None);
        let mut client = RawClient::connect(proxy.addr()).unwrap();
        client.call(&["SUBSCRIBE", "news"]);
        server.raw(&["PUBLISH", "news", "one"]);
        server.raw(&["PUBLISH", "news", "two"]);
        assert_eq!(client.receive().unwrap().texts(), ["message", "news", "one"]);
        assert_eq!(client.receive().unwrap().texts(), ["message", "news", "two"]);
    }

    #[test]
    fn a_server_that_is_down_shows_as_a_closed_connection() {
        let (server, proxy, mut client) = setup();
        server.kill();
        assert!(client.try_call(&["PING"]).is_err());
        assert!(RawClient::connect(proxy.addr()).unwrap().try_call(&["PING"]).is_err());
        server.restart();
        RawClient::connect(proxy.addr()).unwrap().call(&["PING"]);
    }
}
