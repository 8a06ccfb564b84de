//! Tasks: calls of a handler. What they carry, and what handlers have to say.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Number, Value};

/// How a value is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// JSON text.
    #[default]
    Json,
    /// MessagePack, structs as maps with the names of their fields.
    MsgPack,
}

/// A text that names no encoding.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such encoding: json or msgpack")]
pub struct NoEncoding;

impl Encoding {
    /// The encoding as it is written in Redis.
    pub const fn as_str(self) -> &'static str {
        match self {
            Encoding::Json => "json",
            Encoding::MsgPack => "msgpack",
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Encoding {
    type Err = NoEncoding;
    fn from_str(text: &str) -> Result<Self, NoEncoding> {
        [Encoding::Json, Encoding::MsgPack].into_iter().find(|encoding| encoding.as_str() == text).ok_or(NoEncoding)
    }
}

/// A value for a handler or from one, as it is written. `Debug` shows its length alone.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    /// How it is written.
    pub encoding: Encoding,
    /// What is written.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({}, {} bytes)", self.encoding, self.bytes.len())
    }
}

/// How deeply arrays and maps may stand in each other. A reader calls itself for each of them; of JSON, too, no more are read.
const DEPTH_MAX: usize = 128;

/// A value cannot be written, or what is written is no such value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PayloadError(String);

impl Payload {
    /// Writes a value.
    pub fn write<T: Serialize + ?Sized>(encoding: Encoding, value: &T) -> Result<Self, PayloadError> {
        let bytes = match encoding {
            Encoding::Json => serde_json::to_vec(value).map_err(|error| PayloadError(error.to_string()))?,
            Encoding::MsgPack => rmp_serde::to_vec_named(value).map_err(|error| PayloadError(error.to_string()))?,
        };
        Ok(Self { encoding, bytes })
    }

    /// The value as JSON.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self, PayloadError> {
        Self::write(Encoding::Json, value)
    }

    /// The value as MessagePack.
    pub fn msgpack<T: Serialize + ?Sized>(value: &T) -> Result<Self, PayloadError> {
        Self::write(Encoding::MsgPack, value)
    }

    /// Reads the value. Nothing may follow it.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, PayloadError> {
        match self.encoding {
            Encoding::Json => serde_json::from_slice(&self.bytes).map_err(|error| PayloadError(error.to_string())),
            Encoding::MsgPack => read_msgpack(&self.bytes),
        }
    }

    /// The same value in an encoding: as it is if it is written so already.
    pub fn into_encoding(self, encoding: Encoding) -> Result<Self, PayloadError> {
        match (self.encoding, encoding) {
            (Encoding::Json, Encoding::MsgPack) => Self::msgpack(&self.read::<Value>()?),
            (Encoding::MsgPack, Encoding::Json) => Ok(Self { encoding, bytes: self.to_json_line()?.into_bytes() }),
            _ => Ok(self),
        }
    }

    /// Whether it says that there is no value.
    pub fn is_null(&self) -> bool {
        match self.encoding {
            Encoding::Json => self.bytes == b"null",
            Encoding::MsgPack => self.bytes == [0xc0],
        }
    }

    /// The value as JSON text without line breaks. What is written in JSON keeps its every digit; of MessagePack, what JSON
    /// has no word for is an error: byte strings, keys that are no text, numbers that are not finite.
    pub fn to_json_line(&self) -> Result<String, PayloadError> {
        match self.encoding {
            Encoding::Json => {
                self.read::<IgnoredAny>()?;
                let mut bytes = self.bytes.clone();
                // In a string of JSON a line break is written \n, so those that stand there stand between the words.
                bytes.iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
                String::from_utf8(bytes).map_err(|error| PayloadError(error.to_string()))
            }
            Encoding::MsgPack => {
                let InJson(value) = self.read()?;
                Ok(value.to_string())
            }
        }
    }
}

/// Reads a value of MessagePack. Nothing may follow it.
pub(crate) fn read_msgpack<T: DeserializeOwned>(mut rest: &[u8]) -> Result<T, PayloadError> {
    let mut reader = rmp_serde::Deserializer::new(&mut rest);
    reader.set_max_depth(DEPTH_MAX);
    let value = T::deserialize(&mut reader).map_err(|error| match error {
        rmp_serde::decode::Error::DepthLimitExceeded => {
            PayloadError(format!("it is nested more deeply than {DEPTH_MAX} levels"))
        }
        error => PayloadError(error.to_string()),
    })?;
    match rest.len() {
        0 => Ok(value),
        more => Err(PayloadError(format!("{more} bytes follow the value"))),
    }
}

/// A value that JSON can say. A reader of `serde_json::Value` would take `NaN` for null and say nothing.
struct InJson(Value);

impl<'de> Deserialize<'de> for InJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InJsonVisitor).map(InJson)
    }
}

struct InJsonVisitor;

impl<'de> Visitor<'de> for InJsonVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has, too")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| E::invalid_value(de::Unexpected::Float(value), &self))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(InJson(item)) = items.next_element()? {
            array.push(item);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, InJson(value))) = entries.next_entry::<String, InJson>()? {
            object.insert(key, value);
        }
        Ok(object.into())
    }
}

/// What a handler says about its work to whoever asked for it, for programs to read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Number of the message in the application's catalogue.
    pub msgid: i64,
    /// Its code.
    pub errcode: String,
    /// The field of the input that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Values to put into the message's text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vals: Vec<String>,
}

/// An output file of a task, in the object store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its name in the object store.
    pub object: String,
    /// Its size.
    pub bytes: u64,
}

/// How far a task has come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is done, in units of the handler's own.
    pub done: u64,
    /// Of how much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// What it is doing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Invoice {
        number: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    }

    #[test]
    fn a_value_is_read_as_it_was_written_and_nothing_may_follow() {
        for encoding in [Encoding::Json, Encoding::MsgPack] {
            let invoice = Invoice { number: 7, note: None };
            let mut payload = Payload::write(encoding, &invoice).unwrap();
            assert_eq!(payload.read::<Invoice>(), Ok(invoice));
            payload.bytes.extend(b"7");
            assert!(payload.read::<Invoice>().is_err(), "{encoding}");
            assert_eq!(encoding.as_str().parse(), Ok(encoding));
        }
    }

    #[test]
    fn what_is_nested_too_deeply_is_refused_by_name_before_a_reader_runs_out_of_its_stack() {
        let nested = |open: &[u8], levels: usize, close: &[u8]| {
            [open.repeat(levels), b"1".into(), close.repeat(levels)].concat()
        };
        let read = |encoding, bytes: Vec<u8>| {
            let payload = Payload { encoding, bytes };
            let line = payload.clone().to_json_line().map(drop);
            assert_eq!(payload.read::<IgnoredAny>().map(drop), line);
            payload.read::<Value>().map(drop)
        };
        for (open, close) in [(&b"["[..], &b"]"[..]), (b"{\"a\":", b"}")] {
            assert_eq!(read(Encoding::Json, nested(open, 100, close)), Ok(()));
            assert!(
                read(Encoding::Json, nested(open, 100_000, close)).unwrap_err().to_string().contains("recursion limit")
            );
        }
        for open in [&b"\x91"[..], b"\x81\xa1a"] {
            assert_eq!(read(Encoding::MsgPack, nested(open, 100, b"")), Ok(()));
            let refused = read(Encoding::MsgPack, nested(open, 100_000, b"")).unwrap_err();
            assert_eq!(refused.to_string(), "it is nested more deeply than 128 levels");
        }
    }

    #[test]
    fn a_reader_may_be_older_than_the_writer() {
        let payload = Payload::msgpack(&serde_json::json!({ "number": 7, "new": [1, 2] })).unwrap();
        assert_eq!(payload.read::<Invoice>(), Ok(Invoice { number: 7, note: None }));
    }

    #[test]
    fn a_line_of_json_says_what_was_written_or_that_it_cannot() {
        let line = |encoding, bytes: &[u8]| Payload { encoding, bytes: bytes.into() }.to_json_line();
        let text = "{\"a\":\n 12345678901234567890.10,\r\n\"b\": \"x\\ny\"}";
        let one_line = "{\"a\":  12345678901234567890.10,  \"b\": \"x\\ny\"}";
        assert_eq!(line(Encoding::Json, text.as_bytes()).unwrap(), one_line);
        for bad in [&b"{"[..], b"", b"1 2", b"\"\xff\"", b"NaN", b"\"a\nb\""] {
            assert!(line(Encoding::Json, bad).is_err(), "{bad:?}");
        }
        let value = serde_json::json!({ "z": [1, -2, 2.5, null, true, "\u{e4}\n"], "a": {} });
        assert_eq!(Payload::msgpack(&value).unwrap().to_json_line().unwrap(), value.to_string());
        let there = Payload::json(&value).unwrap().into_encoding(Encoding::MsgPack).unwrap();
        assert_eq!(there, Payload::msgpack(&value).unwrap());
        assert_eq!(there.into_encoding(Encoding::Json), Payload::json(&value));
        // A byte string, a key that is a number, not a number, and an extension.
        for bad in [&[0xc4, 1, 7][..], &[0x81, 1, 2], &[0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0], &[0xd4, 1, 7]] {
            assert!(line(Encoding::MsgPack, bad).is_err(), "{bad:?}");
        }
    }
}
