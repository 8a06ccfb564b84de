//! What passes from the server to the client library, overheard.
//!
//! tokio-postgres tells of a finished command only how many rows it touched, and hands every row on, however large. This
//! stream stands between it and the server: it reads the protocol's frames as they pass, keeps the command tag and the
//! transaction status, and leaves out the rows of users' statements, which nobody reads. So memory is bounded whatever a
//! statement returns.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::error::DbError;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsStream};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::super::rows::RETURNED_MAX_BYTES;
use super::super::{MESSAGE_MAX_BYTES, NOTICES_MAX, cut};

/// What of the server's words is meant for whom.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Listening {
    /// SQL of ours runs: all is handed on.
    #[default]
    No,
    /// A user's text runs: its rows are left out, its notices kept.
    Text,
    /// A user's statement runs for rows of a batch: what it returns is handed on, but for rows that are too large to be kept.
    Rows,
}

/// Longest frame that is handed on, in bytes; an error or notice may carry any text a user builds.
const FRAME_MAX_BYTES: usize = 1 << 20;
/// Longest command tag that is kept, in bytes.
const TAG_MAX_BYTES: usize = 64;
/// Said of a frame that is longer.
const TOO_LONG: &str = "the database sent a message that is too long";
/// Said of a COPY from or to the client, whether it is recognised before it is sent or not.
pub(super) const COPY_REFUSED: &str =
    "COPY to or from the client is not supported: a job has no client; use a file of the server or INSERT";
const CHUNK_BYTES: usize = 16 * 1024;

/// Any two-way byte stream.
pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// A connection's bytes below the protocol.
pub(super) enum Stream {
    Plain(Box<dyn Socket>),
    Tls(Box<<MakeRustlsConnect as MakeTlsConnect<Box<dyn Socket>>>::Stream>),
}

impl Stream {
    fn socket(&mut self) -> Pin<&mut dyn Socket> {
        match self {
            Stream::Plain(socket) => Pin::new(socket.as_mut()),
            Stream::Tls(socket) => Pin::new(socket.as_mut()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.socket().poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_shutdown(cx)
    }
}

impl TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        match self {
            Stream::Plain(_) => ChannelBinding::none(),
            Stream::Tls(socket) => socket.channel_binding(),
        }
    }
}

/// What was heard since the last [`Heard::listen`].
#[derive(Debug, Default)]
pub(super) struct Heard {
    listening: Listening,
    /// Tag of the last finished command.
    pub tag: Option<String>,
    /// Notices, oldest first.
    pub notices: Vec<String>,
    /// What the server did that this connection can't go on after.
    pub broke: Option<&'static str>,
    /// In a transaction when the last text had ended, sound or failed.
    pub in_transaction: bool,
}

impl Heard {
    /// Forgets everything and pays attention to what follows.
    pub fn listen(&mut self, to: Listening) {
        *self = Heard { listening: to, ..Heard::default() };
    }

    /// Leaves what was heard as it is and pays attention no longer.
    pub fn stop(&mut self) {
        self.listening = Listening::No;
    }

    /// Keeps a notice, if there is room.
    pub fn notice(&mut self, notice: &DbError) {
        if self.listening == Listening::Text && self.notices.len() < NOTICES_MAX {
            self.notices.push(cut(&format!("{}: {}", notice.severity(), notice.message()), MESSAGE_MAX_BYTES));
        }
    }
}

/// Shared between the connection's task and whoever waits for it.
#[derive(Debug, Clone, Default)]
pub(super) struct Ear(Arc<Mutex<Heard>>);

impl Ear {
    /// What was heard so far.
    pub fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The overheard stream.
pub(super) struct Wire {
    stream: Stream,
    frames: Frames,
    chunk: Box<[u8]>,
    /// Bytes to hand on, and how many of them have been.
    ready: Vec<u8>,
    given: usize,
}

impl Wire {
    pub fn new(stream: Stream, ear: Ear) -> Self {
        let frames = Frames { ear, header: Vec::with_capacity(5), left: 0, dropped: false, kept: Vec::new() };
        Self { stream, frames, chunk: vec![0; CHUNK_BYTES].into_boxed_slice(), ready: Vec::new(), given: 0 }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.given == this.ready.len() {
            let mut chunk = ReadBuf::new(&mut this.chunk);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.ready.clear();
            this.given = 0;
            this.frames.read(chunk.filled(), &mut this.ready)?;
        }
        let count = buf.remaining().min(this.ready.len() - this.given);
        buf.put_slice(&this.ready[this.given..this.given + count]);
        this.given += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl TlsStream for Wire {
    fn channel_binding(&self) -> ChannelBinding {
        self.stream.channel_binding()
    }
}

/// Cuts the server's bytes into frames: one byte of kind, four of length that count themselves, content.
struct Frames {
    ear: Ear,
    /// The frame's first bytes, as far as they have come.
    header: Vec<u8>,
    /// How much of the content is still to come.
    left: usize,
    dropped: bool,
    /// The content's beginning, of frames that are heard.
    kept: Vec<u8>,
}

impl Frames {
    fn read(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.header.len() < 5 {
                let (head, rest) = bytes.split_at(bytes.len().min(5 - self.header.len()));
                self.header.extend_from_slice(head);
                bytes = rest;
                if let [_, a, b, c, d] = self.header[..] {
                    self.begin(u32::from_be_bytes([a, b, c, d]) as usize, out)?;
                }
            } else {
                let (content, rest) = bytes.split_at(bytes.len().min(self.left));
                if !self.dropped {
                    out.extend_from_slice(content);
                }
                let room = TAG_MAX_BYTES - self.kept.len();
                self.kept.extend_from_slice(&content[..content.len().min(room)]);
                self.left -= content.len();
                bytes = rest;
            }
            if self.header.len() == 5 && self.left == 0 {
                self.end();
            }
        }
        Ok(())
    }

    fn begin(&mut self, length: usize, out: &mut Vec<u8>) -> io::Result<()> {
        self.left = length.checked_sub(4).ok_or(io::ErrorKind::InvalidData)?;
        let mut heard = self.ear.heard();
        self.dropped = match self.header[0] {
            // Rows.
            b'D' => match heard.listening {
                Listening::No => false,
                Listening::Text => true,
                Listening::Rows => self.left > RETURNED_MAX_BYTES,
            },
            // What is copied to the client.
            b'd' => heard.listening != Listening::No,
            // Notifications that a user's text subscribed to.
            b'A' => true,
            b'N' => self.left > FRAME_MAX_BYTES,
            _ => false,
        };
        // Copy in, out, both.
        if matches!(self.header[0], b'G' | b'H' | b'W') {
            heard.broke = Some(COPY_REFUSED);
        }
        if self.dropped {
            return Ok(());
        }
        if self.left > FRAME_MAX_BYTES {
            heard.broke = Some(TOO_LONG);
            return Err(io::Error::new(io::ErrorKind::InvalidData, TOO_LONG));
        }
        out.extend_from_slice(&self.header);
        Ok(())
    }

    fn end(&mut self) {
        let mut heard = self.ear.heard();
        match self.header[0] {
            b'C' if heard.listening == Listening::Text => {
                let tag = self.kept.split(|byte| *byte == 0).next().unwrap_or_default();
                heard.tag = Some(String::from_utf8_lossy(tag).into_owned());
            }
            b'Z' => heard.in_transaction = matches!(self.kept.first(), Some(b'T' | b'E')),
            _ => {}
        }
        self.header.clear();
        self.kept.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
        [&[kind][..], &(content.len() as u32 + 4).to_be_bytes(), content].concat()
    }

    #[test]
    fn rows_are_left_out_and_tags_kept_however_the_bytes_are_cut() {
        let bytes = [
            frame(b'T', b"description"),
            frame(b'D', &[7; 3000]),
            frame(b'D', b""),
            frame(b'C', b"SELECT 2\0"),
            frame(b'A', b"notification"),
            frame(b'Z', b"T"),
        ]
        .concat();
        let expected = [frame(b'T', b"description"), frame(b'C', b"SELECT 2\0"), frame(b'Z', b"T")].concat();
        for size in [1, 2, 3, 7, 1000, bytes.len()] {
            let ear = Ear::default();
            ear.heard().listen(Listening::Text);
            let mut wire = Wire::new(Stream::Plain(Box::new(tokio::io::empty())), ear.clone());
            let mut out = Vec::new();
            for part in bytes.chunks(size) {
                wire.frames.read(part, &mut out).unwrap();
            }
            assert_eq!(out, expected, "{size}");
            assert_eq!(ear.heard().tag.as_deref(), Some("SELECT 2"));
            assert!(ear.heard().in_transaction);
        }
    }

    #[test]
    fn broken_and_endless_frames_are_errors() {
        let mut wire = Wire::new(Stream::Plain(Box::new(tokio::io::empty())), Ear::default());
        assert!(wire.frames.read(&[b'E', 0, 0, 0, 3], &mut Vec::new()).is_err());
        let mut wire = Wire::new(Stream::Plain(Box::new(tokio::io::empty())), Ear::default());
        assert!(wire.frames.read(&[b'E', 0x7f, 0xff, 0xff, 0xff], &mut Vec::new()).is_err());
    }
}
