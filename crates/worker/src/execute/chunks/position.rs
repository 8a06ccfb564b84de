//! How far a task has come in what it reads and writes, and whether what it comes back to is still the same.
//!
//! A position alone says nothing: in another file, or in one that was edited, it is the middle of something else. So
//! what is saved names its source and its target, and has the length and a digest of all that lies before it. Who goes
//! on goes through that again, and compares: `agree` and `same` are the only places that decide, for every reader
//! and every writer.

use std::fmt;
use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::execute::task::Problem;

/// Longest part of an identity that is kept as it is; of a longer one there is a digest.
const PART_MAX_BYTES: usize = 200;
/// So much of a digest is kept: none is forged here, they only tell apart.
const DIGEST_BYTES: usize = 16;

/// What can be done where a position does not agree.
const REMEDY: &str = "Put back what it began with; or begin anew: take back what it has written, then launch the flow with --force, \
    or retry a task of its own with --from-start";

/// What a reader reads and how, or what a writer writes to and how: part by part, so that it can be said which one
/// differs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(Map<String, Value>);

impl Identity {
    /// One of a kind: `csv`, `sql`.
    pub fn of(kind: &str) -> Self {
        Self::default().with("kind", kind)
    }

    /// With another part of what makes it what it is: a file, a delimiter, a list of columns.
    #[must_use]
    pub fn with(mut self, part: &str, value: impl Into<Value>) -> Self {
        let mut value = value.into();
        let text = value.to_string();
        if text.len() > PART_MAX_BYTES {
            value = digest_text(Sha256::new_with_prefix(text)).into();
        }
        self.0.insert(part.to_owned(), value);
        self
    }

    /// With a part that may hold what is nobody's business, such as SQL: only a digest is kept.
    #[must_use]
    pub fn with_digest(self, part: &str, content: impl AsRef<[u8]>) -> Self {
        self.with(part, digest_text(Sha256::new_with_prefix(content)))
    }

    /// What a reader of it goes through, in a sentence.
    pub(super) fn subject(&self) -> String {
        self.0.get("file").map_or_else(|| "what its reader reads".to_owned(), Value::to_string)
    }

    /// In which part it is not what it was.
    fn difference(&self, whose: &str, was: &Self) -> Option<String> {
        let mut parts = was.0.keys().chain(self.0.keys());
        let part = parts.find(|part| self.0.get(*part) != was.0.get(*part))?;
        let shown = |of: &Self| match of.0.get(part) {
            None => "none".to_owned(),
            Some(Value::String(text)) if part == "kind" => text.clone(),
            Some(Value::String(text)) if is_digest(text) => "another one".to_owned(),
            Some(value) => value.to_string(),
        };
        let whose = if part == "kind" { whose.to_owned() } else { format!("{whose}'s {part}") };
        Some(match (shown(was), shown(self)) {
            (was, now) if was == now => format!("{whose} is another one than before"),
            (was, now) => format!("{whose} was {was}, and is {now} now"),
        })
    }
}

/// How far a reader or a writer has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// How much lies before it.
    pub length: u64,
    /// A digest of all that lies before it. Empty where that is not compared.
    pub digest: String,
    /// What else there is to know to go on there, or to be seen by people: of a file its lines, of a query its key.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub at: Value,
}

/// What was gone through so far.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    length: u64,
    digest: Sha256,
}

impl Seen {
    /// More bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        self.digest.update(bytes);
    }

    /// One more item, of whatever length.
    pub fn add_item(&mut self, bytes: &[u8]) {
        self.length += 1;
        self.digest.update((bytes.len() as u64).to_le_bytes());
        self.digest.update(bytes);
    }

    /// How many bytes or items.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The position behind it.
    pub fn position(&self, at: Value) -> Position {
        Position { length: self.length, digest: digest_text(self.digest.clone()), at }
    }
}

fn digest_text(digest: Sha256) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = digest.finalize().into_iter().take(DIGEST_BYTES).flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

fn is_digest(text: &str) -> bool {
    text.len() == 2 * DIGEST_BYTES && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a source or a target is the one of which a position was saved.
pub(crate) fn same(whose: &str, now: &Identity, was: &Identity) -> Result<(), Problem> {
    now.difference(whose, was).map_or(Ok(()), |difference| Err(disagreement(difference)))
}

/// Whether what lies before a position is what lay there when it was saved. `now` is where one has come who went there
/// again.
pub(super) fn agree(whose: &str, unit: &str, now: &Position, was: &Position) -> Result<(), Problem> {
    let Position { length, .. } = was;
    if now.length < *length {
        let there = now.length;
        return Err(disagreement(format_args!("{whose} has {there} {unit}, and had at least {length} before")));
    }
    if now != was {
        return Err(disagreement(format_args!("the first {length} {unit} of {whose} are not what they were")));
    }
    Ok(())
}

/// Nothing can go on where it was saved.
pub(crate) fn disagreement(why: impl fmt::Display) -> Problem {
    Problem::fail(format!("it can't go on from its checkpoint: {why}. {REMEDY}"))
}

/// Sees all that is read through it.
pub(super) struct Watched<R> {
    input: R,
    seen: Seen,
    last: Option<u8>,
}

impl<R: BufRead> Watched<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, seen: Seen::default(), last: None }
    }

    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Whether the line that was read last goes on here: it had no end when the file ended with it.
    pub(super) fn is_within_a_line(&mut self) -> io::Result<bool> {
        let is_end = |byte: &u8| matches!(byte, b'\n' | b'\r');
        Ok(!self.last.as_ref().is_none_or(is_end) && !self.fill_buf()?.first().is_none_or(is_end))
    }
}

impl<R: BufRead> Read for Watched<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(into)?;
        self.consume(read);
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Watched<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        // What was handed out is there still.
        if amount > 0
            && let Ok(buffer) = self.input.fill_buf()
        {
            self.seen.add(&buffer[..amount]);
            self.last = Some(buffer[amount - 1]);
        }
        self.input.consume(amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_says_which_part_of_it_differs_and_shows_no_sql() {
        let was = Identity::of("csv").with("file", "a.csv").with_digest("query", "SELECT 'secret'");
        let said = |now: Identity| same("its reader", &now, &was).map_err(|problem| problem.reason);
        assert_eq!(said(was.clone()), Ok(()));
        for (now, wanted) in [
            (Identity::of("json-lines").with("file", "b"), "its reader was csv, and is json-lines now"),
            (was.clone().with("file", "b.csv"), r#"its reader's file was "a.csv", and is "b.csv" now"#),
            (was.clone().with_digest("query", "SELECT 2"), "its reader's query is another one than before"),
            (was.clone().with("file", "x".repeat(300)), r#"its reader's file was "a.csv", and is another one now"#),
            (was.clone().with("key", vec!["id"]), r#"its reader's key was none, and is ["id"] now"#),
            (Identity::default(), "its reader was csv, and is none now"),
        ] {
            assert_eq!(said(now), Err(format!("it can't go on from its checkpoint: {wanted}. {REMEDY}")));
        }
    }

    #[test]
    fn a_position_agrees_with_the_same_bytes_and_with_no_others() {
        let position = |text: &str| {
            let mut seen = Seen::default();
            text.bytes().for_each(|byte| seen.add(&[byte]));
            seen.position(Value::Null)
        };
        let was = position("1,1\n");
        let said = |now: &str| agree("the file", "bytes", &position(now), &was).map_err(|problem| problem.reason);
        assert_eq!(said("1,1\n"), Ok(()));
        assert!(said("1,2\n").unwrap_err().contains("the first 4 bytes of the file are not what they were. Put"));
        assert!(said("1,1").unwrap_err().contains("the file has 3 bytes, and had at least 4 before. Put"));
        assert!(said("1,1\n2").is_err());
        let items = |items: &[&str]| {
            let mut seen = Seen::default();
            items.iter().for_each(|item| seen.add_item(item.as_bytes()));
            seen.position(Value::Null)
        };
        assert_ne!(items(&["ab", "c"]), items(&["a", "bc"]));
    }
}
