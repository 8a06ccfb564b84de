//! The tables of history, and records as rows of them. `docs/history.md` shows them to who reads them.

use std::collections::HashMap;
use std::fmt::Write as _;

use queue_core::export::{Kind, Record};
use serde_json::Value;

use crate::execute::sql::template::Dialect;

/// A table.
struct Table {
    name: &'static str,
    columns: &'static [(&'static str, Holds)],
    key: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Text,
    Number,
    Time,
}

use Holds::{Number, Text, Time};

const JOBS: Table = Table {
    name: "drayman_jobs",
    columns: &[
        ("id", Text),
        ("ended_at", Time),
        ("kind", Text),
        ("owner", Text),
        ("status", Text),
        ("fallback_status", Text),
        ("app", Text),
        ("op", Text),
        ("database_name", Text),
        ("host", Text),
        ("priority", Text),
        ("flow", Text),
        ("tags", Text),
        ("worker", Text),
        ("created_at", Time),
        ("started_at", Time),
        ("attempts", Number),
        ("unclean", Number),
        ("error", Text),
    ],
    key: "id, ended_at",
};

const ATTEMPTS: Table = Table {
    name: "drayman_attempts",
    columns: &[
        ("id", Text),
        ("ended_at", Time),
        ("number", Number),
        ("step", Text),
        ("worker", Text),
        ("started_at", Time),
        ("failed_at", Time),
        ("unclean", Number),
        ("error", Text),
    ],
    key: "id, ended_at, number",
};

const BATCHES: Table = Table {
    name: "drayman_batches",
    columns: &[
        ("id", Text),
        ("ended_at", Time),
        ("owner", Text),
        ("status", Text),
        ("app", Text),
        ("op", Text),
        ("database_name", Text),
        ("flow", Text),
        ("tags", Text),
        ("source", Text),
        ("created_at", Time),
        ("started_at", Time),
        ("row_count", Number),
        ("done", Number),
        ("skipped", Number),
        ("failed", Number),
        ("aborted", Number),
        ("error", Text),
    ],
    key: "id, ended_at",
};

const FLOWS: Table = Table {
    name: "drayman_flows",
    columns: &[
        ("id", Text),
        ("ended_at", Time),
        ("flow", Text),
        ("owner", Text),
        ("instance", Text),
        ("status", Text),
        ("params", Text),
        ("goes_on_from", Text),
        ("created_at", Time),
        ("error", Text),
    ],
    key: "id, ended_at",
};

const FLOW_STEPS: Table = Table {
    name: "drayman_flow_steps",
    columns: &[
        ("execution", Text),
        ("number", Number),
        ("name", Text),
        ("status", Text),
        ("done_in", Text),
        ("queued_at", Time),
        ("started_at", Time),
        ("ended_at", Time),
        ("attempts", Number),
        ("error", Text),
        ("read_count", Number),
        ("write_count", Number),
        ("filter_count", Number),
        ("skip_count", Number),
        ("commit_count", Number),
        ("rollback_count", Number),
        ("row_count", Number),
        ("done", Number),
        ("skipped", Number),
        ("failed", Number),
        ("aborted", Number),
    ],
    key: "execution, number",
};

const TRACKED: Table = Table {
    name: "drayman_tracked",
    columns: &[
        ("tracker", Text),
        ("id", Text),
        ("ended_at", Time),
        ("status", Text),
        ("code", Text),
        ("failures", Number),
        ("created_at", Time),
        ("error", Text),
    ],
    key: "tracker, id, ended_at",
};

const TABLES: [Table; 6] = [JOBS, ATTEMPTS, BATCHES, FLOWS, FLOW_STEPS, TRACKED];

/// What makes the tables that are missing.
pub(super) fn tables(dialect: Dialect) -> String {
    let of = |holds| match (dialect, holds) {
        (_, Text) => "text",
        (Dialect::Postgres, Number) => "bigint",
        (Dialect::Sqlite, Number) => "INTEGER",
        (Dialect::Postgres, Time) => "timestamptz",
        (Dialect::Sqlite, Time) => "text",
    };
    let mut sql = String::new();
    for Table { name, columns, key } in TABLES {
        let columns: Vec<String> = columns.iter().map(|(name, holds)| format!("{name} {}", of(*holds))).collect();
        let _ = writeln!(sql, "CREATE TABLE IF NOT EXISTS {name} ({}, PRIMARY KEY ({key}));", columns.join(", "));
    }
    sql
}

/// The rows of records, as SQL.
pub(super) fn insert(records: &[Record], dialect: Dialect) -> String {
    let mut rows: Vec<(&'static str, Vec<String>)> = Vec::new();
    for record in records {
        rows_of(record, &mut |table, value| {
            let row = |(name, holds): &(&str, Holds)| literal(value(name), *holds, dialect);
            let row: Vec<String> = table.columns.iter().map(row).collect();
            rows.push((table.name, row));
        });
    }
    let mut sql = String::new();
    for Table { name, columns, .. } in TABLES {
        let mut of_table = rows.iter().filter(|(table, _)| *table == name).peekable();
        if of_table.peek().is_none() {
            continue;
        }
        let columns: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
        let _ = write!(sql, "INSERT INTO {name} ({}) VALUES ", columns.join(", "));
        for (at, (_, row)) in of_table.enumerate() {
            let _ = write!(sql, "{}({})", if at > 0 { ", " } else { "" }, row.join(", "));
        }
        // A record that is entered a second time, after keys were repaired, is the same.
        sql.push_str(" ON CONFLICT DO NOTHING;\n");
    }
    sql
}

/// Where a row is made of its values by the names of its columns.
type Push<'a> = dyn FnMut(&Table, &dyn Fn(&str) -> Option<String>) + 'a;

fn rows_of(record: &Record, push: &mut Push<'_>) {
    let field = |name: &str| record.fields.get(name).filter(|text| !text.is_empty()).cloned();
    let time = |name: &str| field(name).filter(|text| text.parse::<jiff::Timestamp>().is_ok());
    let entered = jiff::Timestamp::from_millisecond(record.at_ms() as i64).unwrap_or_default().to_string();
    // Where a record does not say when it ended, it was then.
    let ended = match record.kind {
        Some(Kind::Tracked) => time("update_at"),
        _ => time("ended_at"),
    };
    let ended = ended.unwrap_or(entered);
    let common = |column: &str| match column {
        "id" => Some(record.id.clone()),
        "ended_at" => Some(ended.clone()),
        "kind" => record.kind.map(|kind| kind.as_str().to_owned()),
        "owner" => field("user"),
        "database_name" => field("database"),
        "row_count" => field("rows"),
        "error" => field("failed_reason"),
        name => field(name),
    };
    match record.kind {
        Some(Kind::Sql | Kind::Task) => {
            push(&JOBS, &common);
            let history = field("history").unwrap_or_default();
            let tries = history.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            for (number, of_try) in (1..).zip(tries) {
                push(&ATTEMPTS, &|column| match column {
                    "id" => Some(record.id.clone()),
                    "ended_at" => Some(ended.clone()),
                    "number" => Some(i64::to_string(&number)),
                    "failed_at" => plain(&of_try["ended_at"]),
                    "unclean" => Some(i64::from(of_try["unclean"] == true).to_string()),
                    name => plain(&of_try[name]),
                });
            }
        }
        Some(Kind::Batch) => push(&BATCHES, &common),
        Some(Kind::Flow) => {
            push(&FLOWS, &|column| match column {
                "flow" => field("name"),
                // As `drayman flow` has it.
                "status" => field("status").map(|status| if status == "cancelled" { "stopped".into() } else { status }),
                name => common(name),
            });
            let steps = (1..).map_while(|number| Some((number, record.fields.get(&format!("step:{number}"))?)));
            for (number, step) in steps {
                let mut parts = step.splitn(3, ' ');
                let (name, state) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                let facts: HashMap<String, Value> =
                    parts.next().and_then(|facts| serde_json::from_str(facts).ok()).unwrap_or_default();
                let fact = |name: &str| facts.get(name).and_then(plain);
                push(&FLOW_STEPS, &|column| match column {
                    "execution" => Some(record.id.clone()),
                    "number" => Some(i64::to_string(&number)),
                    "name" => Some(name.to_owned()),
                    // One that a stop has kept from running never left that state.
                    "status" => Some(state.to_owned()),
                    "done_in" => fact("from"),
                    "row_count" => fact("rows"),
                    name => fact(name),
                });
            }
        }
        Some(Kind::Tracked) => {
            let (tracker, id) = record.id.split_once(':').unwrap_or(("", &record.id));
            push(&TRACKED, &|column| match column {
                "tracker" => Some(tracker.to_owned()),
                "id" => Some(id.to_owned()),
                "failures" => field("retry"),
                "created_at" => field("create_at"),
                "error" => {
                    let errors = field("errors").filter(|_| field("status").as_deref() != Some("succeeded"))?;
                    serde_json::from_str::<Value>(&errors).ok().and_then(|errors| plain(&errors["error"]))
                }
                name => common(name),
            });
        }
        // Of a program that is newer than this one.
        None => {}
    }
}

/// A JSON value as text; nothing for null.
fn plain(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// A value in SQL. What is not of its column's kind is null: others may have written it.
fn literal(value: Option<String>, holds: Holds, dialect: Dialect) -> String {
    let null = || "NULL".to_owned();
    let Some(text) = value else { return null() };
    match holds {
        Text => format!("'{}'", text.replace('\0', "\u{fffd}").replace('\'', "''")),
        Number => text.parse::<f64>().ok().filter(|n| n.abs() < 1e15).map_or_else(null, |n| format!("{n:.0}")),
        Time => match text.parse::<jiff::Timestamp>() {
            // Before that nothing was a job, and the databases write years before ours each in their own way.
            Ok(at) if at.as_second() >= 0 => {
                let text = at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
                match dialect {
                    Dialect::Postgres => format!("'{text}'::timestamptz"),
                    Dialect::Sqlite => format!("'{text}'"),
                }
            }
            _ => null(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_record_says_it_is_a_row() {
        let fields = [
            ("user", "o'neil\0"),
            ("status", "done"),
            ("attempts", "nan"),
            ("unclean", "2"),
            ("created_at", "-009999-01-02T00:00:00Z"),
            ("started_at", "2026-03-01T04:00:00.5Z"),
            ("history", "{\"error\":\"first\",\"unclean\":true,\"ended_at\":\"2026-03-01T04:00:00.250Z\"}\nno json"),
        ];
        let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let at = "1772337600000-3".to_owned();
        let record = Record { at, number: 1, kind: Some(Kind::Task), id: "a:b".into(), fields };
        let sql = insert(&[record], Dialect::Sqlite);
        let database = rusqlite::Connection::open_in_memory().unwrap();
        database.execute_batch(&tables(Dialect::Sqlite)).unwrap();
        // A second time it is the same.
        database.execute_batch(&format!("{sql}{sql}")).unwrap();
        let row: (String, String, String, Option<i64>, Option<String>, String) = database
            .query_row("SELECT id, owner, ended_at, attempts, created_at, started_at FROM drayman_jobs", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?))
            })
            .unwrap();
        let ended = "2026-03-01T04:00:00.000Z";
        assert_eq!(row.0 + " " + &row.1 + " " + &row.2, format!("a:b o'neil\u{fffd} {ended}"));
        assert_eq!((row.3, row.4, &*row.5), (None, None, "2026-03-01T04:00:00.500Z"));
        let tried: (i64, String, i64) = database
            .query_row("SELECT number, error, unclean FROM drayman_attempts", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .unwrap();
        assert_eq!(tried, (1, "first".into(), 1));
    }
}
