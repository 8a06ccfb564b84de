//! A collector that takes OTLP over HTTP, and as much of protocol buffers as is asked for here.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What it has got, the oldest first.
#[derive(Clone, Default)]
pub struct Collector(Arc<Mutex<Vec<Request>>>);

struct Request {
    path: String,
    body: Vec<u8>,
}

impl Collector {
    /// It and its endpoint.
    pub fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let collector = Self::default();
        let requests = collector.0.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let request = request(BufReader::new(stream.expect("a connection")));
                requests.lock().expect("no panic").push(request);
            }
        });
        (collector, url)
    }

    pub fn traces(&self) -> Vec<Vec<u8>> {
        self.got("/v1/traces")
    }

    pub fn metrics(&self) -> Vec<Vec<u8>> {
        self.got("/v1/metrics")
    }

    fn got(&self, path: &str) -> Vec<Vec<u8>> {
        let requests = self.0.lock().expect("no panic");
        requests.iter().filter(|request| request.path == path).map(|request| request.body.clone()).collect()
    }
}

fn request(mut stream: BufReader<TcpStream>) -> Request {
    let mut first = String::new();
    stream.read_line(&mut first).expect("a request");
    let path = first.split(' ').nth(1).expect("a path").to_owned();
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("a header");
        match line.trim().to_ascii_lowercase().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().expect("a number"),
            None if line.trim().is_empty() => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("a body");
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    stream.get_mut().write_all(answer).expect("it listens");
    Request { path, body }
}

/// The values of one field of a message of protocol buffers, without those that are varints.
pub fn all(mut message: &[u8], wanted: u64) -> Vec<&[u8]> {
    fn varint(message: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = message.split_first().expect("a byte");
            *message = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        let length = match tag & 7 {
            0 => {
                varint(&mut message);
                continue;
            }
            1 => 8,
            2 => varint(&mut message) as usize,
            5 => 4,
            other => panic!("no wire type: {other}"),
        };
        let (value, rest) = message.split_at(length);
        message = rest;
        if tag >> 3 == wanted {
            found.push(value);
        }
    }
    found
}

/// A text; empty if the field is not there.
pub fn text(message: &[u8], field: u64) -> String {
    String::from_utf8(all(message, field).first().copied().unwrap_or_default().to_vec()).expect("UTF-8")
}

/// A number of eight bytes.
pub fn number(message: &[u8], field: u64) -> u64 {
    u64::from_le_bytes(all(message, field)[0].try_into().expect("eight bytes"))
}
