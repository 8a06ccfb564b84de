//! Values on their way: parameters as the text that PostgreSQL reads by itself, returned columns from the binary form that the
//! client library asks for.

use std::error::Error;

use bytes::{BufMut, BytesMut};
use jiff::{SignedDuration, Timestamp, civil};
use tokio_postgres::types::{Format, FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};
use tokio_postgres::{Column, Row, Statement};

use super::super::rows::{JsonObject, Value, hexadecimal, same_name};

impl ToSql for Value {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self {
            Value::Null => return Ok(IsNull::Yes),
            Value::Bool(is) => out.put_slice(if *is { b"true" } else { b"false" }),
            Value::Number(text) | Value::Text(text) => out.put_slice(text.as_bytes()),
        }
        Ok(IsNull::No)
    }

    /// What a value is the server says, by the place of the parameter.
    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}

/// The bytes of a column as they came.
struct Raw<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// Why what a statement returns can't be told as JSON, if it can't.
pub(super) fn refusal(statement: &Statement) -> Option<String> {
    if let Some(column) = statement.columns().iter().find(|column| !is_known(column.type_())) {
        let (name, of) = (column.name(), column.type_().name());
        return Some(format!("it returns the column {name:?} of type {of}: cast it to text, or use to_json"));
    }
    same_name(statement.columns().iter().map(Column::name))
}

fn base(of: &Type) -> &Type {
    match of.kind() {
        Kind::Domain(of) => base(of),
        _ => of,
    }
}

fn is_known(of: &Type) -> bool {
    let of = base(of);
    matches!(of.kind(), Kind::Enum(_))
        || [
            Type::BOOL,
            Type::INT2,
            Type::INT4,
            Type::INT8,
            Type::OID,
            Type::FLOAT4,
            Type::FLOAT8,
            Type::NUMERIC,
            Type::TEXT,
            Type::VARCHAR,
            Type::BPCHAR,
            Type::NAME,
            Type::UNKNOWN,
            Type::JSON,
            Type::JSONB,
            Type::UUID,
            Type::BYTEA,
            Type::DATE,
            Type::TIMESTAMP,
            Type::TIMESTAMPTZ,
            Type::VOID,
        ]
        .contains(of)
}

/// Writes the columns of a row.
pub(super) fn write_row(out: &mut JsonObject, row: &Row) {
    for (index, column) in row.columns().iter().enumerate() {
        match row.try_get::<_, Option<Raw<'_>>>(index) {
            Ok(Some(Raw(bytes))) => match value(base(column.type_()), bytes) {
                Some(Told::Json(json)) => out.json(column.name(), &json),
                Some(Told::Text(text)) => out.text(column.name(), &text),
                // No server writes such bytes.
                None => out.text(column.name(), &hexadecimal(bytes)),
            },
            _ => out.json(column.name(), "null"),
        }
    }
}

enum Told {
    Json(String),
    Text(String),
}

fn value(of: &Type, bytes: &[u8]) -> Option<Told> {
    fn get<'a, T: FromSql<'a>>(of: &Type, bytes: &'a [u8]) -> Option<T> {
        T::from_sql(of, bytes).ok()
    }
    Some(match *of {
        Type::BOOL => Told::Json(get::<bool>(of, bytes)?.to_string()),
        Type::INT2 => Told::Json(get::<i16>(of, bytes)?.to_string()),
        Type::INT4 => Told::Json(get::<i32>(of, bytes)?.to_string()),
        Type::INT8 => Told::Json(get::<i64>(of, bytes)?.to_string()),
        Type::OID => Told::Json(get::<u32>(of, bytes)?.to_string()),
        Type::FLOAT4 => {
            let number = get::<f32>(of, bytes)?;
            // By its own digits: as a float of twice the size it would have more of them.
            float(number.into(), number.to_string())
        }
        Type::FLOAT8 => {
            let number = get::<f64>(of, bytes)?;
            float(number, serde_json::Value::from(number).to_string())
        }
        Type::NUMERIC => numeric(bytes)?,
        Type::JSON => Told::Json(String::from_utf8(bytes.to_vec()).ok()?),
        // A version stands before it.
        Type::JSONB => Told::Json(String::from_utf8(bytes.strip_prefix(&[1])?.to_vec()).ok()?),
        Type::UUID => Told::Text(uuid::Uuid::from_slice(bytes).ok()?.to_string()),
        Type::BYTEA => Told::Text(hexadecimal(bytes)),
        Type::DATE => Told::Text(match i32::from_be_bytes(bytes.try_into().ok()?) {
            i32::MAX => "infinity".into(),
            i32::MIN => "-infinity".into(),
            days => EPOCH
                .date()
                .checked_add(SignedDuration::from_hours(24 * i64::from(days)))
                .map_or_else(far, |date| date.to_string()),
        }),
        Type::TIMESTAMP | Type::TIMESTAMPTZ => Told::Text(match i64::from_be_bytes(bytes.try_into().ok()?) {
            i64::MAX => "infinity".into(),
            i64::MIN => "-infinity".into(),
            us if *of == Type::TIMESTAMP => {
                EPOCH.checked_add(SignedDuration::from_micros(us)).map_or_else(far, |time| time.to_string())
            }
            us => EPOCH_US
                .checked_add(us)
                .and_then(|us| Timestamp::from_microsecond(us).ok())
                .map_or_else(|| far(()), |time| time.to_string()),
        }),
        Type::VOID => Told::Json("null".into()),
        _ => Told::Text(String::from_utf8(bytes.to_vec()).ok()?),
    })
}

/// What is no number in JSON is a text, PostgreSQL's.
fn float(number: f64, digits: String) -> Told {
    match number {
        _ if number.is_finite() => Told::Json(digits),
        _ if number.is_nan() => Told::Text("NaN".into()),
        f64::INFINITY => Told::Text("Infinity".into()),
        _ => Told::Text("-Infinity".into()),
    }
}

/// PostgreSQL counts time from here.
const EPOCH: civil::DateTime = civil::date(2000, 1, 1).at(0, 0, 0, 0);
/// The same in UTC, in microseconds since 1970.
const EPOCH_US: i64 = 946_684_800_000_000;

/// Said of a time before the year -9999 or after 9999.
fn far<E>(_: E) -> String {
    "out of range".into()
}

/// `numeric` is digits of base 10,000, the place of the first of them, a sign, and how many decimal digits are shown behind the
/// point.
fn numeric(bytes: &[u8]) -> Option<Told> {
    let words: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    let [count, weight, sign, scale, digits @ ..] = &words[..] else { return None };
    let (weight, scale) = (i32::from(weight.cast_signed()), usize::from(*scale));
    let sign = match sign {
        0 => "",
        0x4000 => "-",
        0xC000 => return Some(Told::Text("NaN".into())),
        0xD000 => return Some(Told::Text("Infinity".into())),
        0xF000 => return Some(Told::Text("-Infinity".into())),
        _ => return None,
    };
    let digit = |place: i32| {
        let index = usize::try_from(weight - place).ok().filter(|index| *index < usize::from(*count));
        index.and_then(|index| digits.get(index)).copied().unwrap_or(0)
    };
    let whole: String = (0..=weight.max(0)).rev().map(|place| format!("{:04}", digit(place))).collect();
    let whole = whole.trim_start_matches('0');
    let fraction: String = (1..=scale.div_ceil(4)).map(|place| format!("{:04}", digit(-(place as i32)))).collect();
    let point = if scale > 0 { "." } else { "" };
    let whole = if whole.is_empty() { "0" } else { whole };
    Some(Told::Json(format!("{sign}{whole}{point}{}", &fraction[..scale])))
}
