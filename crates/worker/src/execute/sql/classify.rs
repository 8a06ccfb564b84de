//! What a SQL text is, as far as running it needs to know: read by a tokenizer, so that comments, quotes and dollar quotes
//! mislead nobody. Where this errs, the database's own refusal decides (see `postgres`).

use sqlparser::dialect::{Dialect, PostgreSqlDialect, SQLiteDialect};
use sqlparser::tokenizer::{Token, Tokenizer};

/// How a text for PostgreSQL can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// As part of a transaction that we open and commit.
    Transactional,
    /// Only by itself: it begins or ends transactions, or holds a statement that refuses to be part of one.
    Bare,
    /// Not at all: it copies from or to the client, and there is no client.
    ClientCopy,
}

/// The words of one statement, in upper case, that stand outside of quotes and parentheses.
type Words = Vec<String>;

/// Tells how a text for PostgreSQL can be run.
pub(super) fn shape(sql: &str) -> Shape {
    // A text that can't be read will be refused by PostgreSQL too. Should it not be: bare, since a hidden COMMIT in a
    // transaction of ours would end it behind our back, while a bare statement is merely not recognised after a crash.
    let Some(statements) = statements(sql, &PostgreSqlDialect {}) else { return Shape::Bare };
    if statements.iter().any(|words| copies_with_client(words)) {
        Shape::ClientCopy
    } else if statements.iter().any(|words| controls_transactions(words) || refuses_transaction(words)) {
        Shape::Bare
    } else {
        Shape::Transactional
    }
}

/// Why a text can't be run for each of some rows in one transaction of ours, if it can't. That it is no more than one statement
/// the database itself sees to.
pub(super) fn refusal_for_rows(sql: &str, dialect: super::template::Dialect) -> Option<&'static str> {
    // PostgreSQL would refuse it, SQLite read no further.
    if sql.contains('\0') {
        return Some("it holds a NUL byte");
    }
    let dialect: &dyn Dialect = match dialect {
        super::template::Dialect::Postgres => &PostgreSqlDialect {},
        super::template::Dialect::Sqlite => &SQLiteDialect {},
    };
    let Some(statements) = statements(sql, dialect) else { return Some("a quote or comment in it has no end") };
    let ours = ["SAVEPOINT", "RELEASE", "ROLLBACK", "DEALLOCATE", "DISCARD"];
    let statements: Vec<_> = statements.into_iter().filter(|words| !words.is_empty()).collect();
    if statements.len() > 1 {
        return Some("it is more than one statement");
    }
    statements.first().and_then(|words| {
        if copies_with_client(words) {
            Some("it copies from or to the client, and there is no client")
        } else if controls_transactions(words) || ours.iter().any(|word| is(words, word)) {
            Some("it would end or undo the transaction of all rows")
        } else if refuses_transaction(words) {
            Some("it can't run in a transaction")
        } else {
            None
        }
    })
}

/// The command tag of one SQLite statement, in PostgreSQL's manner, e.g. `UPDATE 3`.
pub(super) fn sqlite_tag(statement: &str, changed: u64, rows: u64) -> Option<String> {
    let statements = statements(statement, &SQLiteDialect {})?;
    let words = statements.into_iter().find(|words| !words.is_empty())?;
    let verb = match words[0].as_str() {
        // Names of the expressions of a WITH stand outside of parentheses too, but none of these words can be one.
        "WITH" => words.iter().find(|w| matches!(w.as_str(), "SELECT" | "INSERT" | "REPLACE" | "UPDATE" | "DELETE"))?,
        verb => verb,
    };
    let kind = ["TABLE", "INDEX", "VIEW", "TRIGGER"].into_iter().find(|kind| words.iter().take(4).any(|w| w == kind));
    Some(match (verb, kind) {
        ("INSERT" | "REPLACE", _) => format!("INSERT 0 {changed}"),
        ("UPDATE" | "DELETE", _) => format!("{verb} {changed}"),
        ("SELECT" | "VALUES", _) => format!("SELECT {rows}"),
        ("CREATE" | "DROP" | "ALTER", Some(kind)) => format!("{verb} {kind}"),
        (verb, _) => verb.to_owned(),
    })
}

/// Splits a text at the semicolons that end statements.
fn statements(sql: &str, dialect: &dyn Dialect) -> Option<Vec<Words>> {
    let tokens = Tokenizer::new(dialect, sql).tokenize().ok()?;
    let mut statements = vec![Words::new()];
    let mut parentheses = 0_usize;
    // Depth within the body of `CREATE FUNCTION … BEGIN ATOMIC … END`, whose statements end with semicolons of their own.
    let mut atomic = 0_usize;
    for token in tokens {
        let words = statements.last_mut()?;
        match token {
            Token::LParen => parentheses += 1,
            Token::RParen => parentheses = parentheses.saturating_sub(1),
            Token::SemiColon if parentheses == 0 && atomic == 0 => statements.push(Words::new()),
            Token::Word(word) if word.quote_style.is_none() => {
                let word = word.value.to_ascii_uppercase();
                match word.as_str() {
                    "CASE" if atomic > 0 => atomic += 1,
                    "END" if atomic > 0 => atomic -= 1,
                    "ATOMIC" if is(words, "CREATE") && words.last().is_some_and(|last| last == "BEGIN") => atomic = 1,
                    _ => {}
                }
                if parentheses == 0 {
                    words.push(word);
                }
            }
            _ => {}
        }
    }
    Some(statements)
}

fn is(words: &[String], first: &str) -> bool {
    words.first().is_some_and(|word| word == first)
}

fn has(words: &[String], word: &str) -> bool {
    words.iter().any(|w| w == word)
}

/// PostgreSQL takes STDIN and STDOUT in either direction.
fn copies_with_client(words: &[String]) -> bool {
    is(words, "COPY")
        && words
            .windows(2)
            .any(|pair| matches!(pair[0].as_str(), "FROM" | "TO") && matches!(pair[1].as_str(), "STDIN" | "STDOUT"))
}

fn controls_transactions(words: &[String]) -> bool {
    let second = words.get(1).map(String::as_str);
    match words.first().map(String::as_str) {
        Some("BEGIN" | "START" | "COMMIT" | "END" | "ABORT") => true,
        // ROLLBACK TO a savepoint stays within the transaction.
        Some("ROLLBACK") => !words.iter().take(3).any(|word| word == "TO"),
        Some("PREPARE") => second == Some("TRANSACTION"),
        _ => false,
    }
}

/// The common ones, to spare the server an error in its log; of the others PostgreSQL's refusal tells.
fn refuses_transaction(words: &[String]) -> bool {
    let second = words.get(1).map(String::as_str);
    match words.first().map(String::as_str) {
        Some("VACUUM") => true,
        Some("CREATE" | "DROP" | "ALTER") => match second {
            Some("DATABASE" | "TABLESPACE" | "SYSTEM") => true,
            Some("INDEX" | "UNIQUE" | "TABLE") => has(words, "CONCURRENTLY"),
            _ => false,
        },
        Some("REINDEX") => has(words, "CONCURRENTLY") || matches!(second, Some("DATABASE" | "SYSTEM" | "SCHEMA")),
        Some("DISCARD") => second == Some("ALL"),
        Some("CLUSTER") => words.len() == 1,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_texts_run_in_a_transaction() {
        for sql in [
            "",
            "-- COMMIT",
            "select 1",
            "update t set a = 'x; commit; y' -- ; rollback",
            "select $$ ; commit; $$; select $a$ $$ ; end; $$ $a$",
            "/* ; commit /* ; vacuum */ ; */ select \"; end;\"",
            "select 1; select 2;",
            "savepoint a; insert into t values (1); rollback to savepoint a; release a",
            "rollback work to a",
            "do $$ begin commit; end $$",
            "call p()",
            "prepare x as select 1; execute x",
            "select case when true then 1 end; select 2",
            "select e'\\'; commit; '",
            "select '\\'; select 'commit'",
            "create rule r as on insert to t do (select 1; commit)",
            "create function f() returns int begin atomic; select case when true then 1 end; select 2; end; select 3",
            "copy t from '/tmp/x'",
            "copy (select stdin from stdin) to '/tmp/x'",
            "create table stdin(a int)",
            "refresh materialized view concurrently v",
            "create index concurrent on t(a)",
            "cluster t using i",
            "select 1 as begin",
            "drop table x",
        ] {
            assert_eq!(shape(sql), Shape::Transactional, "{sql}");
        }
    }

    #[test]
    fn transaction_control_and_refusing_statements_run_bare() {
        for sql in [
            "begin; select 1; commit",
            "BEGIN",
            "/* a */ start /* b */ transaction",
            "select 1; commit",
            "select 1;end",
            "rollback",
            "rollback and chain",
            "abort",
            "prepare transaction 'x'",
            "commit prepared 'x'",
            "rollback prepared 'x'",
            "vacuum",
            "VACUUM (full, analyze) t",
            "create database x",
            "drop database if exists x",
            "alter database x set tablespace y",
            "create unique index concurrently if not exists i on t(a)",
            "drop index concurrently i",
            "reindex index concurrently i",
            "reindex (verbose) database x",
            "alter table t detach partition p concurrently",
            "alter system set work_mem = '1MB'",
            "discard all",
            "cluster",
            "create function f() returns int begin atomic select 2; end; commit",
            "select 'unterminated",
        ] {
            assert_eq!(shape(sql), Shape::Bare, "{sql}");
        }
    }

    #[test]
    fn copies_with_the_client_are_told() {
        for sql in [
            "copy t from stdin",
            "COPY t(a, b) FROM STDIN WITH (format csv)",
            "copy (select 1) to stdout",
            "select 1; copy binary t from stdin",
            "copy t to stdin",
            "begin; copy /* x */ t from -- y\n stdin; commit",
        ] {
            assert_eq!(shape(sql), Shape::ClientCopy, "{sql}");
        }
    }

    #[test]
    fn sqlite_tags_read_like_postgresql() {
        for (sql, tag) in [
            ("insert into t values (1)", Some("INSERT 0 3")),
            ("replace into t values (1)", Some("INSERT 0 3")),
            ("with a as (delete from x) update t set a = 1", Some("UPDATE 3")),
            ("with recursive a(x) as (select 1) select * from a", Some("SELECT 5")),
            ("/* x */ delete from t", Some("DELETE 3")),
            ("create temp table if not exists t(a)", Some("CREATE TABLE")),
            ("create unique index i on t(a)", Some("CREATE INDEX")),
            ("pragma user_version", Some("PRAGMA")),
            ("vacuum", Some("VACUUM")),
            ("-- nothing", None),
        ] {
            assert_eq!(sqlite_tag(sql, 3, 5).as_deref(), tag, "{sql}");
        }
    }
}
