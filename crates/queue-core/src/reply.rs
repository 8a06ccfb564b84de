//! What Redis answered, free of the client's types, and how it is read: strictly. A shape that was not expected is an error.

use crate::error::Error;

/// One reply.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Nil.
    Nil,
    /// An integer.
    Int(i64),
    /// A status or bulk string, which may hold any bytes.
    Bytes(Vec<u8>),
    /// An array.
    Array(Vec<Reply>),
}

impl Reply {
    /// The error that says that `function` must not answer so.
    pub fn unexpected(&self, function: &'static str) -> Error {
        let mut reply = format!("{self:?}");
        let cut = (0..=reply.len().min(200)).rev().find(|at| reply.is_char_boundary(*at)).unwrap_or(0);
        reply.truncate(cut);
        Error::Reply { function, reply }
    }

    /// The items of an array.
    pub fn array(self, function: &'static str) -> Result<Vec<Reply>, Error> {
        match self {
            Reply::Array(items) => Ok(items),
            other => Err(other.unexpected(function)),
        }
    }

    /// An integer, or a text that is one.
    pub fn int(&self, function: &'static str) -> Result<i64, Error> {
        match self {
            Reply::Int(number) => Some(*number),
            Reply::Bytes(_) => self.text().and_then(|text| text.parse().ok()),
            _ => None,
        }
        .ok_or_else(|| self.unexpected(function))
    }

    /// The text, if the reply is one and valid UTF-8.
    pub fn text(&self) -> Option<&str> {
        match self {
            Reply::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// A text, whatever bytes it holds: what is not UTF-8 becomes a replacement character.
    pub fn lossy(&self) -> Option<String> {
        match self {
            Reply::Bytes(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            Reply::Int(number) => Some(number.to_string()),
            _ => None,
        }
    }

    /// Its bytes; none for nil.
    pub fn into_bytes(self) -> Option<Vec<u8>> {
        match self {
            Reply::Bytes(bytes) => Some(bytes),
            Reply::Int(number) => Some(number.to_string().into_bytes()),
            _ => None,
        }
    }

    /// Every text of an array.
    pub fn texts(self, function: &'static str) -> Result<Vec<String>, Error> {
        self.array(function)?.iter().map(|item| item.lossy().ok_or_else(|| item.unexpected(function))).collect()
    }
}

/// The value of a field in the text that Redis answers to `INFO`.
pub(crate) fn info_field<'a>(info: &'a str, field: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).map(str::trim)
}
