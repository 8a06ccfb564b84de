//! What the databases share of a statement for rows: its parameters, their values, and what a row hands back.
//!
//! A statement names the values of a row as `$1`, `$2`, … or as `:name`. No value ever becomes a part of its text: the text is
//! made ready once, and values travel beside it. So a row can say nothing but data, whatever it holds.

use std::collections::{HashMap, HashSet};

use queue_core::model::batch::{RowEnd, RowResult};
use queue_core::model::task::Message;
use serde_json::value::RawValue;

use super::classify::refusal_for_rows;
use super::template::{self, Dialect, Kind};
use super::{MESSAGE_MAX_BYTES, cut};
use crate::execute::Failure;

/// How many of the rows that a statement returns are kept.
pub(super) const RETURNED_MAX: usize = 100;
/// Most bytes of them, as JSON. A single one that the database sends may have no more either.
pub(super) const RETURNED_MAX_BYTES: usize = 64 << 10;
/// Most parameters of a statement: as many as PostgreSQL's protocol can count, and SQLite by its default.
const PARAMETERS_MAX: usize = 32_766;

/// A value for a parameter.
#[derive(Clone, PartialEq)]
pub(in crate::execute) enum Value {
    Null,
    Bool(bool),
    /// A number in the digits of the row.
    Number(String),
    /// A string's text, or the JSON text of an array or object.
    Text(String),
}

/// Values are nobody's business: the client library would write them into a log.
impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }
}

impl Value {
    pub fn bytes(&self) -> usize {
        match self {
            Value::Null | Value::Bool(_) => 5,
            Value::Number(text) | Value::Text(text) => text.len(),
        }
    }
}

/// How the parameters of a statement are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::execute) enum Parameters {
    /// So many, by their numbers.
    Numbered(usize),
    /// By names, each at its first place. None at all is this, too.
    Named(Vec<String>),
}

/// Reads the parameters of a statement, if it can be run for rows. Gives it as the database takes it, with numbers in place of names.
pub(super) fn parameters(sql: &str, dialect: Dialect) -> Result<(String, Parameters), String> {
    if let Some(reason) = refusal_for_rows(sql, dialect) {
        return Err(reason.into());
    }
    let sign = match dialect {
        Dialect::Postgres => '$',
        Dialect::Sqlite => '?',
    };
    let tokens = template::scan(sql, dialect);
    let text = |index: usize| tokens.get(index).map_or("", |token| &sql[token.range.clone()]);
    let (mut out, mut names, mut count) = (String::with_capacity(sql.len()), Vec::<String>::new(), 0_usize);
    let mut index = 0;
    while let Some(token) = tokens.get(index) {
        let digits = || {
            let behind = &sql[token.range.end..];
            &behind[..behind.find(|c: char| !c.is_ascii_digit()).unwrap_or(behind.len())]
        };
        // Of `::` neither colon begins a name.
        let in_cast = index > 0 && tokens[index - 1].kind == Kind::Other && text(index - 1) == ":";
        let named = token.kind == Kind::Other
            && text(index) == ":"
            && !in_cast
            && tokens.get(index + 1).is_some_and(|next| next.kind == Kind::Word);
        let number = if named {
            let name = text(index + 1);
            index += 1;
            Some(
                names.iter().position(|known| known == name).unwrap_or_else(|| {
                    names.push(name.to_owned());
                    names.len() - 1
                }) + 1,
            )
        } else if token.kind == Kind::Other && text(index) == "$" && !digits().is_empty() {
            let digits = digits();
            let number = digits.parse().ok().filter(|number| (1..=PARAMETERS_MAX).contains(number));
            let number: usize = number.ok_or_else(|| format!("${digits} is no parameter: they are counted from $1"))?;
            count = count.max(number);
            index += digits.len();
            Some(number)
        } else if dialect == Dialect::Sqlite && token.kind == Kind::Other && matches!(text(index), "?" | "@" | "#") {
            return Err("its parameters must be written as $1 or as :name".into());
        } else {
            None
        };
        match number {
            Some(number) => {
                // `x$1` would be a name.
                if out.ends_with(|c: char| template::is_word_start(c) || c.is_ascii_digit() || c == '$') {
                    out.push(' ');
                }
                out.push(sign);
                out.push_str(&number.to_string());
            }
            None => out.push_str(text(index)),
        }
        index += 1;
    }
    match (count, names.len()) {
        (0, 0..=PARAMETERS_MAX) => Ok((out, Parameters::Named(names))),
        (_, 0) => Ok((out, Parameters::Numbered(count))),
        (0, _) => Err(format!("it has more than {PARAMETERS_MAX} parameters")),
        _ => Err("some of its parameters have numbers and some have names".into()),
    }
}

impl Parameters {
    /// How many values the statement takes.
    pub fn count(&self) -> usize {
        match self {
            Parameters::Numbered(count) => *count,
            Parameters::Named(names) => names.len(),
        }
    }

    /// The values that a row gives, or how the row ends that gives none.
    pub fn values(&self, input: &[u8]) -> Result<Vec<Value>, RowResult> {
        let unread =
            |error: serde_json::Error| unfit(None, format!("the row is not the JSON that it should be: {error}"));
        match (self, input.trim_ascii_start().first()) {
            (Parameters::Named(names), Some(b'{')) => {
                let values: HashMap<String, &RawValue> = serde_json::from_slice(input).map_err(unread)?;
                let value = |name: &String| match values.get(name) {
                    Some(given) => value(given),
                    None => Err(unfit(Some(name), format!("the row has no value for :{name}"))),
                };
                names.iter().map(value).collect()
            }
            (_, Some(b'[')) if !matches!(self, Parameters::Named(names) if !names.is_empty()) => {
                let values: Vec<&RawValue> = serde_json::from_slice(input).map_err(unread)?;
                if values.len() != self.count() {
                    let (given, wanted) = (values.len(), self.count());
                    return Err(unfit(None, format!("the row has {given} values, the statement takes {wanted}")));
                }
                values.into_iter().map(value).collect()
            }
            (Parameters::Named(_), _) => Err(unfit(None, "the row must be a JSON object".into())),
            (Parameters::Numbered(_), _) => Err(unfit(None, "the row must be a JSON array".into())),
        }
    }
}

fn value(given: &RawValue) -> Result<Value, RowResult> {
    let text = given.get();
    Ok(match text.as_bytes().first() {
        Some(b'"') => Value::Text(serde_json::from_str(text).map_err(|error| unfit(None, error.to_string()))?),
        Some(b'n') => Value::Null,
        Some(b't') => Value::Bool(true),
        Some(b'f') => Value::Bool(false),
        Some(b'{' | b'[') => Value::Text(text.to_owned()),
        _ => Value::Number(text.to_owned()),
    })
}

/// A row that the statement can't be run for.
fn unfit(field: Option<&str>, reason: String) -> RowResult {
    failed("parameters", field, reason)
}

/// A row that failed: with a code, the column or parameter that it failed at, and the reason.
pub(super) fn failed(errcode: &str, field: Option<&str>, reason: String) -> RowResult {
    let vals = vec![cut(&reason, MESSAGE_MAX_BYTES)];
    let message = Message { msgid: 10, errcode: errcode.into(), field: field.map(str::to_owned), vals };
    RowResult { messages: vec![message], ..RowResult::of(RowEnd::Failed) }
}

/// The statement can't be run for any row.
pub(super) fn refused(reason: &str) -> Failure {
    let message = cut(&format!("the statement can't be run for rows: {reason}"), MESSAGE_MAX_BYTES);
    Failure { message, undone: true, ..Failure::default() }
}

/// Why a row of these columns can't be told as a JSON object, if two have the same name: whoever reads it keeps one of the values.
pub(super) fn same_name<'a>(mut columns: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut seen = HashSet::new();
    let name = columns.find(|name| !seen.insert(*name))?;
    Some(format!("it returns two columns that are named {name:?}: name each by AS"))
}

/// What the statement did for one row.
#[derive(Debug, Default)]
pub(super) struct Returned {
    /// How many rows of the database it touched or returned.
    pub affected: u64,
    /// The returned rows that are kept, as JSON objects.
    rows: Vec<String>,
    bytes: usize,
    left_out: bool,
}

impl Returned {
    /// Keeps a row that was returned, as long as there is room for it.
    pub fn add(&mut self, write: impl FnOnce(&mut JsonObject)) {
        if self.rows.len() >= RETURNED_MAX || self.left_out {
            self.left_out = true;
            return;
        }
        let mut object = JsonObject::default();
        write(&mut object);
        let text = object.end();
        if self.bytes + text.len() > RETURNED_MAX_BYTES {
            self.left_out = true;
            return;
        }
        self.bytes += text.len();
        self.rows.push(text);
    }

    /// The row's result: `{"rows_affected":1}`, and with `"rows":[…]` where the statement returns some. `"truncated":true` says
    /// that there were more of them.
    pub fn result(self, returns: bool) -> RowResult {
        let Self { affected, rows, left_out, .. } = self;
        let mut text = format!("{{\"rows_affected\":{affected}");
        if returns {
            text.push_str(&format!(",\"rows\":[{}]", rows.join(",")));
            // Those that were too large to be handed on from the connection are not among them either.
            if left_out || (rows.len() as u64) < affected {
                text.push_str(",\"truncated\":true");
            }
        }
        text.push('}');
        RowResult { result: Some(text.into_bytes()), ..RowResult::of(RowEnd::Done) }
    }
}

/// A JSON object in the making. Its values are written as texts: a number keeps its digits so.
#[derive(Debug, Default)]
pub(super) struct JsonObject(String);

impl JsonObject {
    /// Writes a value that is JSON already.
    pub fn json(&mut self, name: &str, json: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        self.0.push_str(&serde_json::Value::from(name).to_string());
        self.0.push(':');
        self.0.push_str(json);
    }

    /// Writes a string.
    pub fn text(&mut self, name: &str, text: &str) {
        self.json(name, &serde_json::Value::from(text).to_string());
    }

    /// The whole of it.
    pub fn end(mut self) -> String {
        self.0.push_str(if self.0.is_empty() { "{}" } else { "}" });
        self.0
    }
}

/// Bytes as PostgreSQL writes them, `\x` and two digits each.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold("\\x".to_owned(), |out, byte| out + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(sql: &str) -> (String, Vec<String>) {
        match parameters(sql, Dialect::Postgres).unwrap() {
            (sql, Parameters::Named(names)) => (sql, names),
            (_, numbered) => panic!("{numbered:?}"),
        }
    }

    #[test]
    fn a_name_is_a_parameter_where_the_database_would_read_a_value_and_nowhere_else() {
        for (sql, rewritten, names) in [
            ("INSERT INTO t VALUES (:a, :b, :a)", "INSERT INTO t VALUES ($1, $2, $1)", &["a", "b"][..]),
            ("SELECT :a::date, b::text, ':x', \":y\" -- :z", "SELECT $1::date, b::text, ':x', \":y\" -- :z", &["a"]),
            ("SELECT $$ :a $$, E'\\' :b', /* :c */ :größe", "SELECT $$ :a $$, E'\\' :b', /* :c */ $1", &["größe"]),
            ("SELECT a[1 : n], x:=1, :e", "SELECT a[1 : n], x:=1, $1", &["e"]),
            ("SELECT 1 WHERE'a'=:a AND x:a", "SELECT 1 WHERE'a'=$1 AND x $1", &["a"]),
            ("SELECT 1", "SELECT 1", &[]),
        ] {
            assert_eq!(
                named(sql),
                (rewritten.to_owned(), names.iter().map(|name| name.to_string()).collect()),
                "{sql}"
            );
        }
        let lite = |sql| parameters(sql, Dialect::Sqlite);
        assert_eq!(lite("SELECT [:a], `:b`, :c, $$").unwrap().0, "SELECT [:a], `:b`, ?1, $$");
        assert_eq!(lite("SELECT $2, $1").unwrap(), ("SELECT ?2, ?1".into(), Parameters::Numbered(2)));
        assert_eq!(parameters("SELECT $2, '$3', a$4", Dialect::Postgres).unwrap().1, Parameters::Numbered(2));
        for bad in ["SELECT ?", "SELECT @a", "SELECT $1, :a", "SELECT $0", "SELECT $99999999999999999999"] {
            assert!(lite(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_are_the_row_s_own_to_the_last_digit() {
        let parameters = Parameters::Numbered(6);
        let values = parameters
            .values(r#" [12345678901234567890.10, "é\"'", null, true, {"a": [1.50]}, -1e3]"#.as_bytes())
            .map_err(|result| result.messages)
            .unwrap();
        let number = |digits: &str| Value::Number(digits.into());
        let text = |text: &str| Value::Text(text.into());
        let expected = [
            number("12345678901234567890.10"),
            text("é\"'"),
            Value::Null,
            Value::Bool(true),
            text("{\"a\": [1.50]}"),
            number("-1e3"),
        ];
        assert!(values == expected);
    }

    #[test]
    fn a_row_that_does_not_give_what_the_statement_takes_fails_and_says_why() {
        let named = Parameters::Named(vec!["a".into()]);
        assert!(named.values(br#"{"a": 1, "more": 2}"#).is_ok() && Parameters::Named(vec![]).values(b"[]").is_ok());
        for (parameters, row, reason) in [
            (&named, r#"{"b": 1}"#, "the row has no value for :a"),
            (&named, "[1]", "the row must be a JSON object"),
            (&Parameters::Numbered(2), "[1]", "the row has 1 values, the statement takes 2"),
            (&Parameters::Numbered(2), "{}", "the row must be a JSON array"),
            (&Parameters::Named(vec![]), "[1]", "the row has 1 values, the statement takes 0"),
            (&named, "7", "the row must be a JSON object"),
            (&named, "", "the row must be a JSON object"),
            (&named, r#"{"a": }"#, "the row is not the JSON that it should be: expected value at line 1 column 7"),
        ] {
            let failed = parameters.values(row.as_bytes()).map(drop).unwrap_err();
            assert_eq!((failed.end, &failed.messages[0].vals[..]), (RowEnd::Failed, &[reason.to_owned()][..]), "{row}");
            assert_eq!(failed.messages[0].errcode, "parameters");
        }
    }
}
