//! `<%= job_id %>`, `<%= error_message %>` and parameters in SQL texts, quoted for the place where they stand.
//!
//! The text is cut into tokens as the database's own scanner would (PostgreSQL: `scan.l` with
//! `standard_conforming_strings` on, which the executor sets; SQLite: `tokenize.c`), byte by byte and keeping positions,
//! which a tokenizer made for parsing does not offer. Whatever a value holds, it can change neither the number nor the kind
//! of the tokens around it; where that can't be had, rendering fails.
//!
//! One limit: a value inside a literal that the database will itself run as SQL (`EXECUTE '…'`, `dblink('…')`) is
//! quoted once, for the literal.

use std::ops::Range;

use serde_json::{Map, Value};

/// Longest text that rendering may make, in bytes.
pub const RENDERED_MAX_BYTES: usize = 1 << 20;

/// Whose quoting rules hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// PostgreSQL
    Postgres,
    /// SQLite
    Sqlite,
}

/// The values that a text may name.
#[derive(Debug, Clone, Copy)]
pub struct Vars<'a> {
    /// For `<%= job_id %>`.
    pub job_id: &'a str,
    /// For `<%= error_message %>`; without one, that placeholder is left as it is.
    pub error_message: Option<&'a str>,
    /// For others, by their names.
    pub params: Option<&'a Map<String, Value>>,
}

/// What stands for a placeholder.
struct Var {
    text: String,
    /// Where it stands alone it needs no quotes: it is a number, or a boolean.
    bare: bool,
}

/// Why a text can't be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The place leaves no way to write any value safely.
    #[error("a placeholder can't stand {0}")]
    Place(&'static str),
    /// The place leaves no way to write this value safely.
    #[error("this value of a placeholder can't stand {0}")]
    Value(&'static str),
    /// The result would be too long.
    #[error("the rendered text would be longer than {RENDERED_MAX_BYTES} bytes")]
    TooLong,
}

/// Replaces the placeholders of a text.
pub fn render(sql: &str, dialect: Dialect, vars: &Vars<'_>) -> Result<String, TemplateError> {
    let mut out = String::with_capacity(sql.len());
    if find_placeholder(sql, vars).is_none() {
        out.push_str(sql);
    } else {
        render_into(&mut out, sql, dialect, vars)?;
    }
    if out.len() > RENDERED_MAX_BYTES { Err(TemplateError::TooLong) } else { Ok(out) }
}

fn render_into(out: &mut String, sql: &str, dialect: Dialect, vars: &Vars<'_>) -> Result<(), TemplateError> {
    let tokens = Scanner { sql, dialect, vars: Some(vars), at: 0, literal: None }.scan();
    let mut body = Body::None;
    let mut statement_ends = 0;
    for (index, token) in tokens.iter().enumerate() {
        if index == statement_ends {
            let length = tokens[index..].iter().position(|t| t.kind == Kind::Semicolon).map(|end| end + 1);
            statement_ends = length.map_or(tokens.len(), |length| index + length);
            body = Body::of(&tokens[index..statement_ends], sql);
        }
        let text = &sql[token.range.clone()];
        match token.kind {
            Kind::Placeholder => {
                if beside_literal(&tokens, index) {
                    return Err(TemplateError::Place("directly beside a quoted literal"));
                }
                let Some((_, _, value)) = find_placeholder(text, vars) else { continue };
                // A blank keeps the literal from melting into a word: `date<%= … %>`, or worse, `e<%= … %>`.
                if out.ends_with(melts) {
                    out.push(' ');
                }
                match value.bare {
                    true => push_bare(out, dialect, &value.text),
                    false => push_literal(out, dialect, &value.text),
                }
                if sql[token.range.end..].starts_with(melts) {
                    out.push(' ');
                }
            }
            _ if find_placeholder(text, vars).is_none() => out.push_str(text),
            Kind::Comment => fill(out, text, false, vars, |value| Ok(comment_text(value)))?,
            Kind::Literal(_) if body != Body::None => fill(out, text, false, vars, |value| {
                harmless(value).ok_or(TemplateError::Value("inside a quoted literal of a statement that holds code"))
            })?,
            Kind::Literal(Literal::Plain) => fill(out, text, false, vars, |value| Ok(value.replace('\'', "''")))?,
            Kind::Literal(Literal::Escaped) => {
                fill(out, text, true, vars, |value| Ok(value.replace('\\', "\\\\").replace('\'', "''")))?
            }
            Kind::Literal(Literal::Coded) => {
                return Err(TemplateError::Place("inside a literal of bits, bytes or Unicode escapes"));
            }
            Kind::Identifier(']') => fill(out, text, false, vars, |value| {
                if value.contains(']') { Err(TemplateError::Value("inside [brackets]")) } else { Ok(value.to_owned()) }
            })?,
            Kind::Identifier(quote) => {
                fill(out, text, false, vars, |value| Ok(value.replace(quote, &format!("{quote}{quote}"))))?
            }
            Kind::Dollar { tag } => push_dollar(out, text, tag, body, vars)?,
            Kind::Word | Kind::Space | Kind::Semicolon | Kind::Other => out.push_str(text),
        }
        if out.len() > RENDERED_MAX_BYTES {
            return Err(TemplateError::TooLong);
        }
    }
    Ok(())
}

/// Writes a dollar-quoted text; `tag` is the length of its opening tag.
fn push_dollar(out: &mut String, text: &str, tag: usize, body: Body, vars: &Vars<'_>) -> Result<(), TemplateError> {
    let (opening, rest) = text.split_at(tag);
    let (inner, closing) = rest.strip_suffix(opening).map_or((rest, ""), |inner| (inner, opening));
    let mut filled = String::new();
    match body {
        Body::None => fill(&mut filled, inner, false, vars, |value| Ok(value.to_owned()))?,
        Body::Sql => render_into(&mut filled, inner, Dialect::Postgres, vars)?,
        Body::Foreign => fill(&mut filled, inner, false, vars, |value| {
            harmless(value).ok_or(TemplateError::Value("inside code of another language"))
        })?,
    }
    out.push_str(opening);
    let start = out.len();
    out.push_str(&filled);
    out.push_str(closing);
    // The first tag must be the closing one: a value may hold it, or complete it together with what stands beside it.
    match out[start..].find(opening) {
        Some(at) if at == filled.len() => Ok(()),
        None if closing.is_empty() => Ok(()),
        _ => Err(TemplateError::Value("inside a dollar-quoted text: it holds the closing tag")),
    }
}

/// Writes a value as a literal of its own.
fn push_literal(out: &mut String, dialect: Dialect, value: &str) {
    let doubled = value.replace('\'', "''");
    if dialect == Dialect::Postgres && value.contains('\\') {
        // Means the same whatever standard_conforming_strings says.
        if out.ends_with(|c: char| !c.is_whitespace()) {
            out.push(' ');
        }
        out.push_str(&format!("E'{}'", doubled.replace('\\', "\\\\")));
    } else {
        out.push_str(&format!("'{doubled}'"));
    }
}

/// Writes a number or a boolean.
fn push_bare(out: &mut String, dialect: Dialect, text: &str) {
    match (text, dialect) {
        ("true", Dialect::Sqlite) => out.push('1'),
        ("false", Dialect::Sqlite) => out.push('0'),
        // Two minus signs would begin a comment.
        _ if text.starts_with('-') => out.push_str(&format!("({text})")),
        _ => out.push_str(text),
    }
}

/// Characters that would become one token with a literal beside them.
fn melts(c: char) -> bool {
    c.is_alphanumeric() || !c.is_ascii() || matches!(c, '_' | '$' | '\'' | '"' | '`' | '&' | '@' | ':' | '#')
}

/// In a comment only the sense of a value matters.
fn comment_text(value: &str) -> String {
    let kept = |c: char| c.is_alphanumeric() || matches!(c, ' ' | '_' | '.' | ',' | ':' | '=' | '(' | ')' | '"' | '-');
    // Never empty: what stands around it must not meet.
    format!("{} ", value.chars().map(|c| if kept(c) { c } else { ' ' }).collect::<String>())
}

/// The value, if it means only itself in any literal, name, comment or code of any language.
fn harmless(value: &str) -> Option<String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, ' ' | '_' | '.' | ',' | ':' | '@' | '-');
    (value.chars().all(fine) && !value.contains("--")).then(|| value.to_owned())
}

/// Whether the nearest token that is neither blank nor comment, before or behind, is a literal: PostgreSQL joins literals
/// that a line end divides, and reads them all in the manner of the first.
fn beside_literal(tokens: &[Token], index: usize) -> bool {
    let is_literal = |token: &&Token| matches!(token.kind, Kind::Literal(_) | Kind::Placeholder);
    let solid = |token: &&Token| !matches!(token.kind, Kind::Space | Kind::Comment);
    tokens[..index].iter().rev().find(solid).is_some_and(|t| is_literal(&t))
        || tokens[index + 1..].iter().find(solid).is_some_and(|t| is_literal(&t))
}

/// Copies `text` with its placeholders replaced by what `encode` makes of their values. With `escapes`, a backslash takes
/// the character behind it out of consideration.
fn fill(
    out: &mut String,
    text: &str,
    escapes: bool,
    vars: &Vars<'_>,
    encode: impl Fn(&str) -> Result<String, TemplateError>,
) -> Result<(), TemplateError> {
    let mut rest = text;
    while let Some(at) = rest.find(['<', '\\']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let taken = match placeholder_at(rest, vars) {
            Some((length, value)) => {
                out.push_str(&encode(&value.text)?);
                if out.len() > RENDERED_MAX_BYTES {
                    return Err(TemplateError::TooLong);
                }
                length
            }
            None => {
                let count = if escapes && rest.starts_with('\\') { 2 } else { 1 };
                let length = rest.chars().take(count).map(char::len_utf8).sum();
                out.push_str(&rest[..length]);
                length
            }
        };
        rest = &rest[taken..];
    }
    out.push_str(rest);
    Ok(())
}

/// The length of the placeholder that `text` begins with, and its value without NUL, which no database takes.
fn placeholder_at(text: &str, vars: &Vars<'_>) -> Option<(usize, Var)> {
    let inner = text.strip_prefix("<%=")?;
    let end = inner.find("%>")?;
    let (value, bare) = match (inner[..end].trim(), vars.error_message) {
        ("job_id", _) => (vars.job_id.to_owned(), false),
        ("error_message", Some(message)) => (message.to_owned(), false),
        (name, _) => match vars.params?.get(name)? {
            Value::String(text) => (text.clone(), false),
            other => (other.to_string(), matches!(other, Value::Number(_) | Value::Bool(_))),
        },
    };
    let length = text.len() - inner[end..].len() + "%>".len();
    Some((length, Var { text: value.replace('\0', ""), bare }))
}

fn find_placeholder(text: &str, vars: &Vars<'_>) -> Option<(usize, usize, Var)> {
    text.match_indices("<%=").find_map(|(at, _)| placeholder_at(&text[at..], vars).map(|(length, v)| (at, length, v)))
}

/// What the quoted texts of a statement are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// Data.
    None,
    /// Maybe code, in SQL or PL/pgSQL: scanned like the text around it.
    Sql,
    /// Maybe code in a language whose quoting is unknown here.
    Foreign,
}

impl Body {
    fn of(statement: &[Token], sql: &str) -> Self {
        let is = |token: &Token, word: &str| sql[token.range.clone()].eq_ignore_ascii_case(word);
        let words: Vec<&Token> = statement
            .iter()
            .filter(|t| matches!(t.kind, Kind::Word | Kind::Literal(_) | Kind::Identifier(_)))
            .collect();
        let routine = match words.first() {
            Some(first) if is(first, "DO") => true,
            Some(first) if is(first, "CREATE") => words.iter().take(4).any(|t| is(t, "FUNCTION") || is(t, "PROCEDURE")),
            _ => false,
        };
        if !routine {
            return Body::None;
        }
        let known = |name: &Token| {
            let name = sql[name.range.clone()].trim_matches(['\'', '"']);
            name.eq_ignore_ascii_case("sql") || name.eq_ignore_ascii_case("plpgsql")
        };
        let foreign = words.windows(2).any(|pair| is(pair[0], "LANGUAGE") && !known(pair[1]));
        if foreign { Body::Foreign } else { Body::Sql }
    }
}

/// The tokens of a text in which nothing is a placeholder of ours.
pub(super) fn scan(sql: &str, dialect: Dialect) -> Vec<Token> {
    Scanner { sql, dialect, vars: None, at: 0, literal: None }.scan()
}

/// A token and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub kind: Kind,
    pub range: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Word,
    Space,
    Comment,
    Semicolon,
    Placeholder,
    Literal(Literal),
    /// A quoted name and the character that ends it.
    Identifier(char),
    /// A dollar-quoted text and the length of its tag.
    Dollar {
        tag: usize,
    },
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Literal {
    /// `'…'`
    Plain,
    /// `E'…'`
    Escaped,
    /// `B'…'`, `X'…'`, `U&'…'`, `U&"…"`: the content is a code, not text.
    Coded,
}

struct Scanner<'a> {
    sql: &'a str,
    dialect: Dialect,
    /// Where placeholders are looked for.
    vars: Option<&'a Vars<'a>>,
    at: usize,
    /// The literal just read and whether a line end followed: another quote then continues it.
    literal: Option<(Literal, bool)>,
}

impl Scanner<'_> {
    fn scan(mut self) -> Vec<Token> {
        let mut tokens = Vec::new();
        while self.at < self.sql.len() {
            let start = self.at;
            let kind = self.next();
            let text = &self.sql[start..self.at];
            self.literal = match (kind, self.literal) {
                (Kind::Literal(literal), _) => Some((literal, false)),
                (Kind::Space, Some((literal, divided))) => Some((literal, divided || text.contains(['\n', '\r']))),
                (Kind::Comment, literal) if text.starts_with("--") => literal,
                _ => None,
            };
            tokens.push(Token { kind, range: start..self.at });
        }
        tokens
    }

    fn rest(&self) -> &str {
        &self.sql[self.at..]
    }

    /// Moves to the end of the text that `length` measures from here, or to the end of all.
    fn skip_to(&mut self, length: Option<usize>) {
        self.at = length.map_or(self.sql.len(), |length| self.at + length);
    }

    fn skip_while(&mut self, fits: impl Fn(char) -> bool) {
        let length = self.rest().find(|c| !fits(c));
        self.skip_to(length);
    }

    fn next(&mut self) -> Kind {
        let postgres = self.dialect == Dialect::Postgres;
        if let Some((length, _)) = self.vars.and_then(|vars| placeholder_at(self.rest(), vars)) {
            self.at += length;
            return Kind::Placeholder;
        }
        if self.rest().starts_with("--") {
            let ends: &[char] = if postgres { &['\n', '\r'] } else { &['\n'] };
            let length = self.rest().find(ends);
            self.skip_to(length);
            return Kind::Comment;
        }
        if self.rest().starts_with("/*") {
            self.block_comment();
            return Kind::Comment;
        }
        let Some(first) = self.rest().chars().next() else { return Kind::Other };
        match first {
            '\'' => {
                let literal = match self.literal {
                    Some((literal, true)) if postgres => literal,
                    _ => Literal::Plain,
                };
                self.at += 1;
                self.quoted('\'', literal);
                Kind::Literal(literal)
            }
            '"' => {
                self.at += 1;
                self.quoted('"', Literal::Plain);
                Kind::Identifier('"')
            }
            '`' if !postgres => {
                self.at += 1;
                self.quoted('`', Literal::Plain);
                Kind::Identifier('`')
            }
            '[' if !postgres => {
                let length = self.rest().find(']').map(|at| at + 1);
                self.skip_to(length);
                Kind::Identifier(']')
            }
            ';' => {
                self.at += 1;
                Kind::Semicolon
            }
            '$' if postgres => self.dollar(),
            c if is_space(c) => {
                self.skip_while(is_space);
                Kind::Space
            }
            c if is_word_start(c) => self.word(),
            c => {
                self.at += c.len_utf8();
                Kind::Other
            }
        }
    }

    /// A word, or the literal that it introduces.
    fn word(&mut self) -> Kind {
        let start = self.at;
        self.skip_while(|c| is_word_start(c) || c.is_ascii_digit() || c == '$');
        let word = self.sql[start..self.at].to_ascii_lowercase();
        let postgres = self.dialect == Dialect::Postgres;
        let (literal, lead, quote) = match (word.as_str(), self.rest().as_bytes()) {
            ("e", [b'\'', ..]) if postgres => (Literal::Escaped, 1, '\''),
            ("b", [b'\'', ..]) if postgres => (Literal::Coded, 1, '\''),
            ("x", [b'\'', ..]) => (Literal::Coded, 1, '\''),
            ("u", [b'&', b'\'', ..]) if postgres => (Literal::Coded, 2, '\''),
            ("u", [b'&', b'"', ..]) if postgres => (Literal::Coded, 2, '"'),
            _ => return Kind::Word,
        };
        self.at += lead;
        self.quoted(quote, literal);
        Kind::Literal(literal)
    }

    /// Skips to behind the quote that ends what was opened. A doubled quote stands for itself; in bits and bytes it ends
    /// one literal and begins another, but no placeholder may stand in those, so that it comes to the same.
    fn quoted(&mut self, quote: char, literal: Literal) {
        let mut chars = self.rest().char_indices().peekable();
        let mut length = None;
        while let Some((at, c)) = chars.next() {
            if c == '\\' && literal == Literal::Escaped {
                chars.next();
            } else if c == quote && chars.next_if(|(_, next)| *next == quote).is_none() {
                length = Some(at + c.len_utf8());
                break;
            }
        }
        self.skip_to(length);
    }

    /// A dollar-quoted text, a parameter (`$1`), or a lone dollar.
    fn dollar(&mut self) -> Kind {
        let behind = &self.rest()[1..];
        let name = behind.find(|c: char| !(is_word_start(c) || c.is_ascii_digit())).unwrap_or(behind.len());
        let opens = behind[name..].starts_with('$') && !behind.starts_with(|c: char| c.is_ascii_digit());
        if !opens {
            self.at += 1;
            return Kind::Other;
        }
        let tag = name + 2;
        let opening = &self.rest()[..tag];
        let length = self.rest()[tag..].find(opening).map(|at| at + 2 * tag);
        self.skip_to(length);
        Kind::Dollar { tag }
    }

    /// PostgreSQL's comments nest.
    fn block_comment(&mut self) {
        let mut depth = 0_usize;
        while self.at < self.sql.len() {
            if self.rest().starts_with("/*") && (depth == 0 || self.dialect == Dialect::Postgres) {
                depth += 1;
                self.at += 2;
            } else if self.rest().starts_with("*/") {
                depth -= 1;
                self.at += 2;
                if depth == 0 {
                    return;
                }
            } else {
                self.at += self.rest().chars().next().map_or(1, char::len_utf8);
            }
        }
    }
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// Whether a word may begin so.
pub(super) fn is_word_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vars(value: &str) -> Vars<'_> {
        Vars { job_id: "X", error_message: Some(value), params: None }
    }

    fn pg(sql: &str, value: &str) -> Result<String, TemplateError> {
        render(sql, Dialect::Postgres, &vars(value))
    }

    fn lite(sql: &str, value: &str) -> Result<String, TemplateError> {
        render(sql, Dialect::Sqlite, &vars(value))
    }

    #[test]
    fn the_recorded_example_renders_exactly() {
        assert_eq!(pg("SELECT '<%= job_id %>', 301", "").unwrap(), "SELECT 'X', 301");
        assert_eq!(pg("SELECT '<%=job_id%>', '<%=\tjob_id  %>'", "").unwrap(), "SELECT 'X', 'X'");
    }

    #[test]
    fn what_is_no_placeholder_stays() {
        let none = Vars { job_id: "X", error_message: None, params: None };
        let sql = "SELECT '<%= error_message %>', '<%= other %>', <%= job_idx %>, '<%= job_id', '<% job_id %>'";
        assert_eq!(render(sql, Dialect::Postgres, &none).unwrap(), sql);
    }

    #[test]
    fn each_place_has_its_quoting() {
        let evil = "a'b\"c\\d*/e--f";
        for (sql, expected) in [
            ("'<%= error_message %>'", r#"'a''b"c\d*/e--f'"#),
            ("e'<%= error_message %>'", r#"e'a''b"c\\d*/e--f'"#),
            ("n'<%= error_message %>'", r#"n'a''b"c\d*/e--f'"#),
            (r"E'\\<%= error_message %>\''", r#"E'\\a''b"c\\d*/e--f\''"#),
            (r"E'\<%= error_message %>'", r"E'\<%= error_message %>'"),
            ("E'x'\n'<%= error_message %>'", "E'x'\n'a''b\"c\\\\d*/e--f'"),
            ("'x' -- y\n'<%= error_message %>'", "'x' -- y\n'a''b\"c\\d*/e--f'"),
            ("\"<%= error_message %>\"", r#""a'b""c\d*/e--f""#),
            ("$$<%= error_message %>$$", r#"$$a'b"c\d*/e--f$$"#),
            ("/* <%= error_message %>*/ 1", "/* a b\"c d  e--f */ 1"),
            ("<%= error_message %>", r#"E'a''b"c\\d*/e--f'"#),
            ("(<%= error_message %>,1)", r#"( E'a''b"c\\d*/e--f',1)"#),
            ("f(<%= job_id %>)", "f('X')"),
            ("e<%= job_id %>x", "e 'X' x"),
            ("U&<%= job_id %>", "U& 'X'"),
            ("-- <%= error_message %>\n1", "-- a b\"c d  e--f \n1"),
        ] {
            assert_eq!(pg(sql, evil).unwrap(), expected, "{sql}");
        }
        for (sql, expected) in [
            ("'<%= error_message %>'", r#"'a''b"c\d*/e--f'"#),
            ("\"<%= error_message %>\"", r#""a'b""c\d*/e--f""#),
            ("`<%= error_message %>`", r#"`a'b"c\d*/e--f`"#),
            ("[<%= error_message %>]", r#"[a'b"c\d*/e--f]"#),
            ("<%= error_message %>", r#"'a''b"c\d*/e--f'"#),
            ("e'<%= error_message %>'", r#"e'a''b"c\d*/e--f'"#),
            ("$$<%= job_id %>$$", "$$ 'X' $$"),
        ] {
            assert_eq!(lite(sql, evil).unwrap(), expected, "{sql}");
        }
        assert_eq!(lite("`<%= error_message %>`", "a`b").unwrap(), "`a``b`");
        assert_eq!(pg("'<%= error_message %>'", "a\0b").unwrap(), "'ab'");
    }

    #[test]
    fn places_without_a_safe_way_are_refused() {
        for sql in [
            "U&'<%= job_id %>'",
            "b'<%= job_id %>'",
            "x'1'\n'<%= job_id %>'",
            "U&\"<%= job_id %>\"",
            "E'a'\n<%= job_id %>",
            "'a'<%= job_id %>",
            "<%= job_id %> -- \n 'b'",
            "<%= job_id %>\n<%= job_id %>",
        ] {
            assert!(matches!(pg(sql, ""), Err(TemplateError::Place(_))), "{sql}");
        }
        assert!(lite("[<%= error_message %>]", "a]b").is_err());
        for (sql, value) in [
            ("$$<%= error_message %>$$", "a$$b"),
            ("$$<%= error_message %>$$", "a$"),
            ("$$ $<%= error_message %>$ $$", ""),
            ("$a$<%= error_message %>$a$", "x$a$y"),
            ("$a$<%= error_message %>$a$", "x$a"),
            ("DO 'begin perform ''<%= error_message %>''; end'", "it's"),
            ("DO LANGUAGE plpython3u $$ x = '<%= error_message %>' $$", "it's"),
            ("create function f() returns int as $$<%= error_message %>$$ language 'plv8'", "\\"),
        ] {
            assert!(pg(sql, value).is_err(), "{sql} {value}");
        }
    }

    #[test]
    fn code_in_dollar_quotes_is_quoted_as_code() {
        assert_eq!(
            pg("DO $$ begin perform log('<%= error_message %>', <%= job_id %>); end $$; select $$<%= error_message %>$$", "it's")
                .unwrap(),
            "DO $$ begin perform log('it''s', 'X'); end $$; select $$it's$$"
        );
        assert_eq!(
            pg(
                "create or replace function f() returns text language sql as $f$ select '<%= error_message %>' $f$",
                "'"
            )
            .unwrap(),
            "create or replace function f() returns text language sql as $f$ select '''' $f$"
        );
        assert_eq!(pg("DO 'begin perform ''<%= job_id %>''; end'", "").unwrap(), "DO 'begin perform ''X''; end'");
    }

    #[test]
    fn parameters_are_written_as_what_they_are() {
        let params = serde_json::json!({ "n": -5, "f": 1.5, "yes": true, "day": "2026-03-01", "who": "it's \\ me" });
        let params = params.as_object().unwrap();
        let vars = Vars { job_id: "X", error_message: None, params: Some(params) };
        let sql = "select 1-<%= n %>, <%=f%>, <%= yes %>, '<%= n %> <%= who %>', date<%= day %>, <%= nobody %>, \"<%= job_id %>\"";
        let pg = render(sql, Dialect::Postgres, &vars).unwrap();
        assert_eq!(pg, "select 1-(-5), 1.5, true, '-5 it''s \\ me', date '2026-03-01', <%= nobody %>, \"X\"");
        let lite = render(sql, Dialect::Sqlite, &vars).unwrap();
        assert_eq!(lite, "select 1-(-5), 1.5, 1, '-5 it''s \\ me', date '2026-03-01', <%= nobody %>, \"X\"");
        assert_eq!(render("<%= who %>", Dialect::Postgres, &vars).unwrap(), "E'it''s \\\\ me'");
        let hostile = serde_json::json!({ "who": "'; drop table t; --" });
        let vars = Vars { params: hostile.as_object(), ..vars };
        assert_eq!(render("select <%= who %>", Dialect::Sqlite, &vars).unwrap(), "select '''; drop table t; --'");
    }

    #[test]
    fn long_results_are_refused() {
        let sql = "'<%= error_message %>'".repeat(100);
        assert_eq!(pg(&sql.replace("''", "','"), &"x".repeat(100_000)), Err(TemplateError::TooLong));
    }

    /// The kinds of a text's tokens, comments and blanks left out.
    fn kinds(sql: &str, dialect: Dialect) -> Vec<Kind> {
        let vars = Vars { job_id: "", error_message: None, params: None };
        Scanner { sql, dialect, vars: Some(&vars), at: 0, literal: None }
            .scan()
            .into_iter()
            .map(|token| token.kind)
            .filter(|kind| !matches!(kind, Kind::Space | Kind::Comment))
            .collect()
    }

    fn values() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            proptest::collection::vec(
                proptest::sample::select(vec![
                    "'",
                    "''",
                    "\"",
                    "\\",
                    "\\'",
                    "$",
                    "$$",
                    "$a$",
                    "--",
                    "\n",
                    "\r",
                    "/*",
                    "*/",
                    ";",
                    "`",
                    "]",
                    "E'",
                    "drop table t",
                    "x",
                    " ",
                    "<%= job_id %>",
                    "é",
                    "\0",
                ]),
                0..8
            )
            .prop_map(|parts| parts.concat()),
        ]
    }

    fn templates() -> impl Strategy<Value = String> {
        proptest::collection::vec(
            proptest::sample::select(vec![
                "'",
                "''",
                "\"",
                "\\",
                "$$",
                "$a$",
                "$",
                "--",
                "\n",
                "\r",
                "/*",
                "*/",
                ";",
                "e",
                "E'",
                "b'",
                "U&'",
                "`",
                "[",
                "]",
                "select",
                " ",
                ",",
                "1",
                "é",
                "<%= error_message %>",
                "<%= error_message %>",
                "<%= error_message %>",
                "do",
                "-",
                "/",
                "*",
                "&",
                "&'",
                "language",
                "plpgsql",
            ]),
            0..16,
        )
        .prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn no_value_changes_the_tokens_around_it(sql in templates(), a in values(), b in values()) {
            for dialect in [Dialect::Postgres, Dialect::Sqlite] {
                let (a, b) = (render(&sql, dialect, &vars(&a)), render(&sql, dialect, &vars(&b)));
                if let (Ok(a), Ok(b)) = (a, b) {
                    // A literal is written plainly or with E, as the value demands: the same kind of thing.
                    let same = |kinds: Vec<Kind>| -> Vec<Kind> {
                        let plain = |k| if k == Kind::Literal(Literal::Escaped) { Kind::Literal(Literal::Plain) } else { k };
                        kinds.into_iter().map(plain).collect()
                    };
                    prop_assert_eq!(same(kinds(&a, dialect)), same(kinds(&b, dialect)), "{:?} {:?}", a, b);
                }
            }
        }
    }
}
