//! Submissions of all kinds that nobody should write: each ends in a status or in the rejected list with its reason, and the
//! worker goes on.

mod support;

use std::time::Duration;

use queue_core::inspect::{Inspect, JobView, Rejected};
use support::house::{DATABASE, Gate, House};
use support::*;
use testkit::state::Piece;
use testkit::{Scratch, eventually};
use worker::execute::sql::databases::{DatabaseSettings, SqliteSettings};

/// Waits until an id of a user is set aside, and says why.
async fn rejected(house: &House, id: &str, user: &str) -> String {
    eventually(&format!("{id:?} of {user:?} to be rejected"), async || {
        let all: Vec<Rejected> = Inspect::new(house.store.clone()).rejected(100).await.expect("redis answers");
        all.into_iter().find(|entry| entry.id == id && entry.user == user).map(|entry| entry.reason)
    })
    .await
}

async fn failed(house: &House, id: &str) -> String {
    let view = house.ended(id).await;
    assert_eq!(view.status(), "failed", "{id}");
    view.text("failed_reason").expect("a reason")
}

fn text(view: &JobView, field: &str) -> String {
    view.text(field).unwrap_or_default()
}

/// Nothing of what was submitted is left anywhere but in records.
async fn nothing_is_left(house: &House) {
    eventually("all work to be over", async || {
        let state = house.state();
        let shown = state.has_any(&[Piece::QueuedUsers, Piece::WorkingUsers]);
        (!shown && state.running() == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_that_are_missing_late_or_no_hashes() {
    let house = House::build().await;
    let worker = Running::start(house.config());

    let late = house.job("late", "INSERT INTO effects VALUES ('late')");
    late.queue();
    late.announce();
    eventually("the id to wait for its hash", async || {
        house.state().missing().contains(&("late".into(), "ann".into())).then_some(())
    })
    .await;
    late.hash();
    assert_eq!(house.ended("late").await.status(), "done");
    assert_eq!(house.effects("late").await, 1);

    let never = house.job("never", "SELECT 1");
    never.queue();
    never.announce();
    eventually("the id to wait for its hash", async || {
        house.state().missing().contains(&("never".into(), "ann".into())).then_some(())
    })
    .await;
    // A minute later.
    house.state().end_wait_for("never", "ann");
    assert_eq!(rejected(&house, "never", "ann").await, "it was queued, but no hash of it came within 60 s");

    for id in ["string", "list", "set"] {
        house.state().spoil_as(Piece::Job(id), id);
        let push = house.job(id, "");
        push.queue();
        push.announce();
        assert_eq!(rejected(&house, id, "ann").await, format!("its key holds a {id}, not a hash"));
        house.goes_on(&format!("after-{id}")).await;
    }
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_that_becomes_something_else_while_its_job_runs() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let gate = house.gate().await;
    let query = |id: &str| format!("INSERT INTO effects SELECT '{id}' FROM {}", Gate::PASS);
    house.job("gone", &query("gone")).push();
    house.job("changed", &query("changed")).of("bob").push();
    house.executing("gone", "4711").await;
    house.executing("changed", "4711").await;
    house.state().lose(Piece::Job("gone"));
    house.state().spoil(Piece::Job("changed"));
    gate.open().await;
    let reason = rejected(&house, "changed", "bob").await;
    assert!(reason.starts_with("its key became a string"), "{reason}");
    assert_eq!(house.ended("gone").await.status(), "done");
    nothing_is_left(&house).await;
    house.goes_on("next").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_that_are_none() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let long_list = format!("[{}]", vec!["\"SELECT 1\""; 1001].join(","));
    let deep = "[".repeat(100_000);
    let cases: Vec<(&str, &[u8], &str)> = vec![
        ("blank", b" \n", "is blank"),
        ("utf8", b"SELECT '\xff'", "field query is not valid UTF-8"),
        ("nul", b"SELECT '\0'", "NUL byte"),
        ("json", b"{\"query\": [", "malformed JSON"),
        ("json-utf8", b"[\"SELECT \xc3\x28\"]", "field query is not valid UTF-8"),
        ("deep", deep.as_bytes(), "malformed JSON"),
        ("empty-list", b"[]", "the list is empty"),
        ("empty-object", b"{}", "the object has no query"),
        ("numbers", b"[1, 2]", "entry 0 is neither a text nor an object"),
        ("nested", b"{\"query\": {\"query\": \"SELECT 1\"}}", "neither a text nor a list"),
        ("fallback", b"{\"query\": \"SELECT 1\", \"onerror\": 7}", "onerror of the job is no text"),
        ("status", b"[{\"query\": \"SELECT 1\", \"status\": \"flying\"}]", "has a status that no statement can have"),
        ("long-list", long_list.as_bytes(), "the list has 1001 entries"),
        ("sql", b"SELEKT 1", "syntax error at or near \"SELEKT\""),
        ("copy", b"COPY effects FROM STDIN", "COPY"),
    ];
    for (id, query, reason) in cases {
        house.job(id, "").with("query", query).push();
        let failed = failed(&house, id).await;
        assert!(failed.contains(reason), "{id}: {failed}");
        assert!(house.field(id, "pass").is_none(), "{id}");
        house.goes_on(&format!("after-{id}")).await;
    }
    house.job("absent", "").without("query").push();
    assert!(failed(&house, "absent").await.starts_with("You must indicate a valid SQL"));
    house.job("bytes", "SELECT 1").with("onsuccess", b"SELECT '\xff'").push();
    assert!(failed(&house, "bytes").await.contains("field onsuccess is not valid UTF-8"));
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_ten_mebibytes() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let huge = "x".repeat(10 << 20);
    for field in ["query", "onerror", "status", "host", "dbuser", "pass", "timeout", "traceparent"] {
        let id = format!("huge-{field}");
        house.job(&id, "SELECT 1").with(field, &huge).push();
        let reason = rejected(&house, &id, "ann").await;
        assert!(reason.starts_with(&format!("its field {field} is 10485760 bytes long, at most ")), "{reason}");
        assert_eq!(failed(&house, &id).await, reason);
        house.goes_on(&format!("after-{field}")).await;
    }
    house.job("huge-user", "SELECT 1").with("user", &huge).push();
    assert_eq!(rejected(&house, "huge-user", "ann").await, "its field user is too long");
    // What the protocol does not read does not matter.
    house.job("huge-other", "SELECT 1").with("other", &huge).push();
    assert_eq!(house.ended("huge-other").await.status(), "done");
    assert_eq!(house.field("huge-other", "other").unwrap().len(), 10 << 20);
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_are_unknown_or_nonsense() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let cases = [
        ("unknown", "x-new-field", "kept"),
        ("empty-name", "", "kept"),
        ("timeout", "timeout", "soon"),
        ("timeout-negative", "timeout", "-5"),
        ("attempts", "attempts", "9999999999999999"),
        ("max-attempts", "max_attempts", "-1"),
        ("unclean", "unclean", "nan"),
        ("fence", "fence", "1e999"),
        ("fence-text", "fence", "x"),
        ("trace", "trace", "0 transaction 1; DROP TABLE effects"),
        ("trace-other", "trace", "x\ty"),
        ("results", "results", "[1"),
        ("traceparent", "traceparent", "00-zz-zz-01"),
        ("created", "created_at", "yesterday"),
        ("status", "status", "flying"),
        ("status-running", "status", "running"),
        ("status-empty", "status", ""),
        ("fallback-status", "fallback_status", "done"),
        ("settled", "settled", "1"),
        ("worker", "worker", "somebody:else"),
    ];
    for (id, field, value) in cases {
        house.job(id, &format!("INSERT INTO effects VALUES ('{id}')")).with(field, value).push();
        let view = house.ended(id).await;
        let ended = (view.status(), house.effects(id).await);
        // A trace that can't be asked for: nobody can say whether the statement was applied.
        let expected = if id == "trace" { ("unknown".to_owned(), 0) } else { ("done".to_owned(), 1) };
        assert_eq!(ended, expected, "{id}: {}", text(&view, "failed_reason"));
        if value == "kept" {
            assert_eq!(house.field(id, field).as_deref(), Some("kept"));
        }
    }
    house.goes_on("next").await;
    // Said to have ended: not for the worker to run.
    for status in ["done", "failed", "cancelled", "unknown"] {
        let id = format!("said-{status}");
        house.job(&id, "INSERT INTO effects VALUES ('said')").with("status", status).push();
    }
    house.goes_on("last").await;
    nothing_is_left(&house).await;
    assert_eq!(house.effects("said").await, 0);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_no_uuids() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let long = "x".repeat(129);
    let huge = "x".repeat(100_000);
    for id in ["", " ", "a b", "*/ DROP TABLE effects; --", "it's", "ünï", "a\nb", "a\0b", "{a}", &long, &huge] {
        house.job(id, "INSERT INTO effects VALUES ('odd')").push();
        let shown: String = id.chars().take(256).collect();
        assert_eq!(
            rejected(&house, &shown, "ann").await,
            "its id is not made of letters, digits and _ . : -",
            "{shown:?}"
        );
    }
    let invalid = house.job("x", "SELECT 1");
    house.state().foreign().push("ann", b"\xff\xfe");
    invalid.announce();
    rejected(&house, "\u{fffd}\u{fffd}", "ann").await;
    for id in ["7", "A.b:c_d-1", "..", &Piece::Claims.name(), &"x".repeat(128)] {
        house.job(id, "INSERT INTO effects VALUES ('fine')").push();
        assert_eq!(house.ended(id).await.status(), "done", "{id}");
    }
    assert_eq!((house.effects("odd").await, house.effects("fine").await), (0, 5));
    house.goes_on("next").await;
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_that_no_worker_can_name() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let long = vec![b'x'; 129];
    let bad: [&[u8]; 6] = [b"", b"a\nb", b"a\tb", b"\xff\xfe", "c1 \u{85} control".as_bytes(), &long];
    for (position, user) in bad.into_iter().enumerate() {
        let id = format!("of-nobody-{position}");
        house.job(&id, "INSERT INTO effects VALUES ('odd')").of(user).push();
        let reason = rejected(&house, &id, &String::from_utf8_lossy(user)).await;
        assert_eq!(reason, "its queue belongs to no valid user name", "{user:?}");
        house.goes_on(&format!("after-{position}")).await;
    }
    for (position, user) in ["Ünï çødé", "a'b\"c\\", "*", "a:b", "{tag}", "%s", "../up"].into_iter().enumerate() {
        let id = format!("of-somebody-{position}");
        house.job(&id, "INSERT INTO effects VALUES ('fine')").of(user).push();
        assert_eq!(house.ended(&id).await.status(), "done", "{user}");
    }
    house.job("stolen", "INSERT INTO effects VALUES ('odd')").with("user", "bob").of("ann").push();
    assert_eq!(rejected(&house, "stolen", "ann").await, "it belongs to another user than its queue");
    assert_eq!(house.field("stolen", "status").as_deref(), Some("pending"));
    assert_eq!((house.effects("odd").await, house.effects("fine").await), (0, 7));
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_is_pushed_again() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let gate = house.gate().await;
    let job = house.job("again", &format!("INSERT INTO effects SELECT 'again' FROM {}", Gate::PASS));
    job.hash();
    job.queue();
    job.queue();
    job.announce();
    house.executing("again", "4711").await;
    job.queue();
    job.announce();
    gate.open().await;
    assert_eq!(house.ended("again").await.status(), "done");
    job.queue();
    job.announce();
    house.goes_on("next").await;
    nothing_is_left(&house).await;
    assert_eq!(house.effects("again").await, 1);
    // In the queue of somebody else it can't end the job of its owner, nor run for him.
    let theirs = house.job("theirs", "INSERT INTO effects VALUES ('theirs')").of("bob").with("user", "cem");
    theirs.hash();
    theirs.queue();
    theirs.announce();
    assert_eq!(rejected(&house, "theirs", "bob").await, "it belongs to another user than its queue");
    house.job("theirs", "INSERT INTO effects VALUES ('theirs')").of("cem").push();
    assert_eq!(house.ended("theirs").await.status(), "done");
    assert_eq!(house.effects("theirs").await, 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pretends_to_be_a_batch_a_part_of_one_or_a_flow() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let (batch, part) = ("it is no batch that was handed over as one", "it is no part of a batch that is known");
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 6] = [
        ("loops", &[("kind", "batch"), ("cursor", "0 0 0 1"), ("loads", "1000000000000")], batch),
        ("unreadable", &[("kind", "batch"), ("cursor", "99999999999999999999 0 0 1"), ("loads", "1e3")], batch),
        ("uncounted", &[("kind", "batch"), ("cursor", "0 0 0 1"), ("loads", "1"), ("done", "x"), ("left", "1")], batch),
        ("allocates", &[("kind", "part"), ("part", "rows unreadable 0.0 0 4000000000"), ("unclean", "19")], part),
        ("unknown", &[("kind", "unknown"), ("part", "rows unreadable 0.0 0 4000000000")], part),
        ("flow", &[("kind", "flow"), ("status", "running")], "it is no flow that was launched as one"),
    ];
    for (id, fields, reason) in cases {
        let job = house.job(id, "SELECT 1");
        fields.iter().fold(job, |job, (field, value)| job.with(field, value)).push();
        assert_eq!(failed(&house, id).await, reason, "{id}");
        house.goes_on(&format!("after-{id}")).await;
    }
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_another_type() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    house.state().spoil(Piece::Queue("ann"));
    house.state().foreign().index("ann");
    house.state().foreign().publish("ann");
    assert_eq!(rejected(&house, "-", "ann").await, "its queue holds a string, not a list");
    house.goes_on("after-queue").await;

    // A job that is to go back to a queue that is none any more.
    house.state().lose(Piece::Queue("ann"));
    let gate = house.gate().await;
    house.job("chain", &format!(r#"["SELECT {}", "SELECT 2"]"#, Gate::PASS)).push();
    house.executing("chain", "4711").await;
    house.state().spoil(Piece::Queue("ann"));
    gate.open().await;
    assert_eq!(failed(&house, "chain").await, "its queue holds a string, not a list");

    for (id, piece) in [
        ("after-working", Piece::Working("good")),
        ("after-working-users", Piece::WorkingUsers),
        ("after-limits-of-another-type", Piece::Limits("good")),
    ] {
        house.state().spoil(piece);
        house.goes_on(id).await;
        house.state().lose(piece);
    }
    house.state().lose(Piece::Queue("ann"));
    house.state().set(Piece::Limits("good"), &[("timeout", "soon"), ("weight", "nan")]);
    house.goes_on("after-limits").await;
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_lead_nowhere() {
    let house = House::build().await;
    let mut config = house.config();
    config.sql.connect_timeout = Duration::from_secs(2);
    config.sql.allowed_hosts.push("nowhere.invalid".into());
    let worker = Running::start(config);
    let misconfigured = "Batch Job DB misconfiguration";
    for (position, (field, value, reason)) in [
        ("host", &b"10.0.0.1"[..], "database host '10.0.0.1' is not allowed"),
        ("host", b"127.0.0.1,10.0.0.1", "is not allowed"),
        ("host", b"127.0.0.1 ", "is not allowed"),
        ("host", b"/var/run/postgresql", "is not allowed"),
        ("host", b"a b\tc", "is not allowed"),
        ("host", b"\xff", "field host is not valid UTF-8"),
        ("host", "c1 \u{85}".as_bytes(), "is not allowed"),
        ("host", b"nowhere.invalid", "nowhere.invalid"),
        ("host", b"", misconfigured),
        ("port", b"0", misconfigured),
        ("port", b"65536", "port is not a port number"),
        ("port", b"-1", "port is not a port number"),
        ("port", b"postgres", "port is not a port number"),
        ("port", b"5432,5433", "port is not a port number"),
        ("port", b"", misconfigured),
        ("port", b"1", "127.0.0.1:1"),
        ("dbname", b"", misconfigured),
        ("dbname", b"missing", "database \"missing\" does not exist"),
        ("dbname", b"shop\0user\0other", "dbname has a NUL byte"),
        ("dbname", b"dbname=shop host=10.0.0.1", "does not exist"),
        ("dbuser", b"", misconfigured),
        ("dbuser", b"nobody'; --", "nobody'; --"),
        ("dbuser", b"\xff", "field dbuser is not valid UTF-8"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("nowhere-{position}");
        house.job(&id, "SELECT 1").with(field, value).push();
        let shown = String::from_utf8_lossy(value);
        let failed = failed(&house, &id).await;
        assert!(failed.contains(reason), "{field} {shown:?}: {failed}");
    }
    for name in ["nowhere", "../etc", "a b", "sql:*"] {
        let id = format!("named-{}", name.len());
        house.job(&id, "SELECT 1").on(name).push();
        house.goes_on(&format!("after-{id}")).await;
        // No worker serves it: it waits for one that does.
        assert_eq!(house.inspect.job(&id).await.unwrap().unwrap().status(), "pending", "{name}");
        house.cancel(&id).await;
    }
    house.goes_on("last").await;
    nothing_is_left(&house).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_with_every_odd_byte_log_in() {
    let house = House::build().await;
    let worker = Running::start(house.config());
    let every: String = (1..128).map(char::from).collect();
    let odd = "  ' \" \\ ` $ $$ % %s {user} <%= x %> ; -- /* */ \u{a0}\u{ad}ü€🚚 \u{202e} ﬁ é e\u{301}  ";
    for (position, password) in [&every, odd, "\\", "'", "\"", "\t", " ", "\u{7f}"].into_iter().enumerate() {
        let role = format!("role {position}");
        house.postgres.create_user(&role, password).await;
        for (id, given, end) in [
            (format!("right-{position}"), password.to_owned(), "done"),
            (format!("wrong-{position}"), format!("{password}x"), "failed"),
        ] {
            house.job(&id, "SELECT 1").with("dbuser", &role).with("pass", given).push();
            let view = house.ended(&id).await;
            assert_eq!(view.status(), end, "{password:?}: {}", text(&view, "failed_reason"));
        }
    }
    for (id, password) in [("not-utf8", &b"\xff\xfe'\x80"[..]), ("nul", b"a\0b"), ("empty", b"")] {
        house.job(id, "SELECT 1").with("dbuser", "role 0").with("pass", password).push();
        assert!(!failed(&house, id).await.is_empty(), "{id}");
    }
    house.goes_on("next").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn error_messages_change_no_statement_that_they_are_put_into() {
    let house = House::build().await;
    let folder = Scratch::new("sqlite");
    let path = folder.path().join("{user}.db").display().to_string();
    let mut config = house.config();
    config.databases.insert("files".into(), DatabaseSettings::Sqlite(SqliteSettings { path, create: true }));
    let worker = Running::start(config);
    let messages = [
        "it's",
        "'; DELETE FROM effects; --",
        "*/ DELETE FROM effects; /*",
        "$$ $x$ $1",
        "\\' \\",
        "\"a\"",
        "<%= job_id %> <%= error_message %>",
        "line\nend",
        "%s %1$s {} ü 🚚",
    ];
    house.job("table", "CREATE TABLE effects(what TEXT)").on("files").push();
    assert_eq!(house.ended("table").await.status(), "done");
    for (position, message) in messages.iter().enumerate() {
        let quoted = message.replace('\'', "''");
        let raise = format!("DO $do$ BEGIN RAISE EXCEPTION USING message = '{quoted}'; END $do$");
        let id = format!("raised-{position}");
        let onerror = "INSERT INTO effects /* <%= error_message %> */ \
                       VALUES ('<%= error_message %>'), ($$<%= error_message %>$$), (<%=error_message%>), ('<%= job_id %>')";
        // Not each place can take each message: where one can't, nothing runs.
        for (place, onerror) in [
            ("text", "INSERT INTO effects VALUES ('<%= error_message %>')"),
            ("dollars", "INSERT INTO effects VALUES ($$<%= error_message %>$$)"),
            ("all", onerror),
        ] {
            let id = format!("{id}-{place}");
            house.postgres.query(DATABASE, "TRUNCATE effects").await;
            let query = serde_json::json!({ "query": [{ "query": raise, "onerror": onerror }] });
            house.job(&id, &query.to_string()).push();
            let view = house.ended(&id).await;
            let statement = &view.statements()[0];
            let effects = house.all_effects().await;
            assert_eq!(view.status(), "failed");
            match statement.fallback_status.as_deref() {
                Some("done") if place == "all" => {
                    assert_eq!(effects, [*message, message, message, &id], "{message}");
                }
                Some("done") => assert_eq!(effects, [*message], "{message} in {place}"),
                other => {
                    assert_eq!(other, Some("failed"), "{message} in {place}");
                    assert!(place != "text" && effects.is_empty(), "{message} in {place}: {effects:?}");
                    let reason = statement.failed_reason.clone().unwrap_or_default();
                    assert!(reason.contains("placeholder can't stand"), "{reason}");
                }
            }
        }
        let id = format!("named-{position}");
        let name = message.replace('"', "\"\"");
        let query = serde_json::json!({ "query": [{
            "query": format!("SELECT * FROM \"{name}\""),
            "onerror": "INSERT INTO effects VALUES ('<%= error_message %>')",
        }] });
        house.job(&id, &query.to_string()).on("files").push();
        let view = house.ended(&id).await;
        assert_eq!(view.statements()[0].fallback_status.as_deref(), Some("done"), "{message}");
        let file = rusqlite::Connection::open(folder.path().join("ann.db")).unwrap();
        let last: String =
            file.query_row("SELECT what FROM effects ORDER BY rowid DESC", [], |row| row.get(0)).unwrap();
        assert_eq!(last, format!("no such table: {message}"));
    }
    house.goes_on("next").await;
    worker.stop().await;
}
