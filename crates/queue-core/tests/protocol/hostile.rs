//! Keys of which others have made something else. Whatever stands in them: nobody else's job waits, what can't run ends in
//! a status or in the rejected list, and the books balance.

use std::time::Duration;

use queue_core::calls::{Finished, Mark, SessionEnd, Verdict};
use queue_core::cancel::{Cancelled, Canceller};
use queue_core::ids::{JobId, SessionId};
use queue_core::session::{Claim, Session};

use crate::support::*;

/// A whole submission by bytes: id, user, and fields beside `user` and `host`.
fn submit(rig: &Rig, user: &[u8], id: &[u8], fields: &[(&[u8], &[u8])]) {
    let job = [b"batch:jobs:", id].concat();
    let queue = [b"batch:queue:", user].concat();
    let mut hset: Vec<&[u8]> = vec![b"HSET", &job, b"user", user, b"host", b"h"];
    for (name, value) in fields {
        hset.extend([*name, *value]);
    }
    rig.redis(&hset);
    rig.redis(&[b"LPUSH", queue.as_slice(), id]);
    rig.redis(&[b"SADD", &b"batch:indexes:queue"[..], user]);
}

/// Has the leader look at everything, twice, as it does for ever.
async fn look(rig: &Rig) {
    let leadership = rig.lead().await;
    for _ in 0..2 {
        scan_index(&leadership).await.unwrap();
        leadership.scan_queues().await.unwrap().unwrap();
        leadership.move_old_queues().await.unwrap().unwrap();
        leadership.clear_wip().await.unwrap().unwrap();
        leadership.upkeep(Duration::from_secs(60)).await.unwrap().unwrap();
        leadership.sweep(Duration::from_secs(86_400)).await.unwrap().unwrap();
    }
}

/// Runs all that can be run, and returns the ids in their order.
async fn run_all(session: &Session) -> Vec<String> {
    let mut ran = Vec::new();
    loop {
        let claims = take(session, 4).await;
        if claims.is_empty() {
            return ran;
        }
        for claim in claims {
            ran.push(id(&claim).to_owned());
            end(claim, "done").await;
        }
    }
}

/// After whatever was set up: the bystander's job runs, these ids of others run, and these are set aside for these reasons.
#[track_caller]
fn expect(rig: &Rig, mut ran: Vec<String>, expected: &[&str], set_aside: &[(&str, &str)]) {
    ran.sort();
    let mut expected = expected.to_vec();
    expected.push("bystander");
    expected.sort();
    assert_eq!(ran, expected, "rejected: {:?}", rig.rejected());
    let rejected = rig.rejected();
    for (id, reason) in set_aside {
        assert!(rejected.iter().any(|entry| entry.0 == *id && entry.1.contains(reason)), "{id:?}: {rejected:?}");
    }
    assert_eq!(rejected.len(), set_aside.len(), "{rejected:?}");
    rig.balanced();
}

async fn rig() -> (Rig, Session) {
    let rig = Rig::start().await;
    let session = rig.session("sql:* db:*", 4).await;
    (rig, session)
}

#[tokio::test]
async fn what_says_that_it_is_a_batch_and_is_none_is_set_aside() {
    let (rig, session) = rig().await;
    let reason = "it is no batch that was handed over as one";
    for (id, cursor, loads) in [("b1", "nonsense", "1"), ("b2", "0 0 0 1", "many"), ("b3", "", "1")] {
        submit(
            &rig,
            b"eve",
            id.as_bytes(),
            &[(b"kind", b"batch"), (b"cursor", cursor.as_bytes()), (b"loads", loads.as_bytes())],
        );
    }
    submit(&rig, b"ann", b"bystander", &[]);
    look(&rig).await;
    assert_eq!(run_all(&session).await, ["bystander"]);
    assert_eq!(rig.rejected(), ["b1", "b2", "b3"].map(|id| (id.to_owned(), reason.to_owned())));
}

#[tokio::test]
async fn ids_that_can_stand_in_no_comment_are_set_aside() {
    let (rig, session) = rig().await;
    let huge = "x".repeat(10_000);
    let longest = "y".repeat(128);
    let too_long = "z".repeat(129);
    let bad: [&[u8]; 9] = [
        b"*/ drop table t; --",
        b"with space",
        b"new\nline",
        b"'quoted'",
        b"\"",
        b"\xff\xfe",
        huge.as_bytes(),
        too_long.as_bytes(),
        "ü".as_bytes(),
    ];
    for id in bad {
        submit(&rig, b"mallory", id, &[]);
    }
    rig.redis(&["LPUSH", "batch:queue:mallory", ""]);
    submit(&rig, b"mallory", longest.as_bytes(), &[]);
    submit(&rig, b"mallory", b"not-a-uuid", &[]);
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let ran = run_all(&session).await;
    let why = "its id is not made of letters, digits and _ . : -";
    let shown: Vec<String> =
        bad.iter().map(|id| String::from_utf8_lossy(&id[..id.len().min(256)]).into_owned()).collect();
    let mut set_aside: Vec<(&str, &str)> = shown.iter().map(|id| (id.as_str(), why)).collect();
    set_aside.push(("", why));
    expect(&rig, ran, &[&longest, "not-a-uuid"], &set_aside);
}

#[tokio::test]
async fn hashes_with_odd_or_huge_contents_end_one_way_or_the_other() {
    let (rig, session) = rig().await;
    let huge = vec![b'x'; 10 << 20];
    submit(&rig, b"mallory", b"huge-query", &[(b"query", &huge)]);
    submit(&rig, b"mallory", b"huge-status", &[(b"status", &huge)]);
    submit(&rig, b"mallory", b"huge-unread", &[(b"whatever", &huge)]);
    submit(&rig, b"mallory", b"no-utf8", &[(b"query", b"select '\xff'"), (b"pass", b"\x00\xff"), (b"odd\xff", b"1")]);
    submit(&rig, b"mallory", b"odd-host", &[(b"host", b"a b\tc\n\xff\xc2\x85")]);
    submit(&rig, b"mallory", b"long-odd-host", &[(b"host", &[0xff; 255])]);
    submit(&rig, b"mallory", b"c1-host", &[(b"host", "\u{85}\u{9f}".as_bytes())]);
    submit(&rig, b"mallory", b"odd-database", &[(b"database", &[0x80; 128])]);
    submit(&rig, b"mallory", b"no-host", &[(b"host", b"")]);
    rig.redis(&["HSET", "batch:jobs:bare", "x", "1"]);
    rig.redis(&["LPUSH", "batch:queue:mallory", "bare", "a-string", "a-list"]);
    rig.redis(&["SET", "batch:jobs:a-string", "x"]);
    rig.redis(&["RPUSH", "batch:jobs:a-list", "x"]);
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let ran = run_all(&session).await;
    expect(
        &rig,
        ran,
        &["huge-unread", "no-utf8", "odd-host", "long-odd-host", "c1-host", "odd-database", "no-host", "bare"],
        &[
            ("huge-query", "its field query is 10485760 bytes long, at most 1048576 are allowed"),
            ("huge-status", "its field status is 10485760 bytes long"),
            ("a-string", "its key holds a string, not a hash"),
            ("a-list", "its key holds a list, not a hash"),
        ],
    );
    for id in ["huge-query", "huge-status"] {
        assert_eq!(rig.status(id), "failed");
        assert!(rig.hash(id)["failed_reason"].contains("bytes long"));
        assert!(rig.redis(&["PTTL", &job_key(id)]).int() > 0, "{id} is not kept for ever");
    }
    assert_eq!(rig.redis(&["GET", "batch:jobs:a-string"]).text(), "x", "what is not ours is left alone");
    assert_eq!(rig.hash("bare")["user"], "mallory");
}

#[tokio::test]
async fn an_invalid_text_reaches_the_worker_as_a_named_error() {
    let (rig, session) = rig().await;
    submit(&rig, b"mallory", b"j", &[(b"query", b"select '\xff'"), (b"timeout", b"soon")]);
    look(&rig).await;
    let claim = take_one(&session).await;
    assert_eq!(claim.job().text("query"), Err("field query is not valid UTF-8".to_owned()));
    assert_eq!(claim.job().number("timeout"), 0);
    assert_eq!(claim.job().text("onerror"), Ok(None));
}

#[tokio::test]
async fn no_status_that_a_hash_claims_is_believed_but_that_it_is_over() {
    let (rig, session) = rig().await;
    for status in ["running", "held", "scheduled", "banana", "skipped", "", "PENDING"] {
        let id = format!("says-{status}");
        submit(&rig, status.as_bytes(), id.as_bytes(), &[(b"status", status.as_bytes())]);
        // An empty user name is no user: its job belongs to one.
        if status.is_empty() {
            submit(&rig, b"empty", b"says-", &[(b"status", b"")]);
        }
    }
    for status in ["done", "failed", "cancelled", "unknown", "ignored"] {
        submit(&rig, b"over", status.as_bytes(), &[(b"status", status.as_bytes())]);
    }
    submit(&rig, b"fallback", b"fallback-waits", &[(b"status", b"failed"), (b"fallback_status", b"pending")]);
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let ran = run_all(&session).await;
    let expected = ["says-running", "says-held", "says-scheduled", "says-banana", "says-skipped", "says-"];
    let mut expected = expected.to_vec();
    expected.extend(["says-PENDING", "fallback-waits"]);
    expect(&rig, ran, &expected, &[("says-", "its queue belongs to no valid user name")]);
    for status in ["done", "failed", "cancelled", "unknown", "ignored"] {
        assert_eq!(rig.status(status), status);
        assert!(!rig.hash(status).contains_key("started_at"));
    }
}

#[tokio::test]
async fn user_names_are_any_text_and_what_is_none_is_set_aside_with_all_its_ids() {
    let (rig, session) = rig().await;
    let longest = "ü".repeat(64);
    let good = ["o'brien", "with space", "a*?[b]", "日本", "\u{1f600}", "a:b", "{x}", "%s%d", &longest];
    for (number, user) in good.iter().enumerate() {
        submit(&rig, user.as_bytes(), format!("good-{number}").as_bytes(), &[]);
    }
    let huge = vec![b'u'; 10_000];
    let bad: [&[u8]; 9] = [
        b"",
        b"tab\tin",
        b"line\n",
        b"\xff",
        b"cut \xe2\x82",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        "\u{85}".as_bytes(),
        &huge,
    ];
    let mut set_aside = Vec::new();
    for (number, user) in bad.iter().enumerate() {
        for job in 0..2 {
            let id = format!("bad-{number}-{job}");
            submit(&rig, user, id.as_bytes(), &[]);
            set_aside.push(id);
        }
    }
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let ran = run_all(&session).await;
    let expected: Vec<String> = (0..good.len()).map(|number| format!("good-{number}")).collect();
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    let why = "its queue belongs to no valid user name";
    let set_aside: Vec<(&str, &str)> = set_aside.iter().map(|id| (id.as_str(), why)).collect();
    expect(&rig, ran, &expected, &set_aside);
}

#[tokio::test]
async fn an_id_that_is_pushed_again_runs_once_whenever_that_is() {
    let (rig, session) = rig().await;
    // The limit of one job for each user would hide that one runs twice.
    rig.redis(&["HSET", "drayman:pool:sql:h", "user_limit", "4"]);
    submit(&rig, b"mallory", b"m1", &[]);
    rig.redis(&["LPUSH", "batch:queue:mallory", "m1", "m1"]);
    rig.redis(&["RPUSH", "batch:queue:mallory", "m1"]);
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let claims = take(&session, 4).await;
    assert_eq!(claims.len(), 2);
    // While it runs, from both ends.
    rig.redis(&["LPUSH", "batch:queue:mallory", "m1"]);
    rig.redis(&["RPUSH", "batch:queue:mallory", "m1"]);
    look(&rig).await;
    assert!(take(&session, 4).await.is_empty());
    rig.balanced();
    for claim in claims {
        end(claim, "done").await;
    }
    // When it is over.
    rig.redis(&["RPUSH", "batch:queue:mallory", "m1"]);
    look(&rig).await;
    assert_eq!(run_all(&session).await, Vec::<String>::new());
    assert_eq!(rig.queue("mallory"), Vec::<String>::new());
    assert_eq!(rig.rejected(), []);
    rig.balanced();
}

#[tokio::test]
async fn an_id_in_another_users_queue_does_its_owner_no_harm() {
    let (rig, session) = rig().await;
    submit(&rig, b"alice", b"bystander", &[]);
    rig.redis(&["LPUSH", "batch:queue:mallory", "bystander"]);
    rig.notice(&["mallory"]).await;
    assert_eq!(rig.status_or_none("bystander"), None, "nobody has failed it");
    look(&rig).await;
    let claim = take_one(&session).await;
    assert_eq!((id(&claim), claim.job().user.as_str()), ("bystander", "alice"));
    rig.redis(&["LPUSH", "batch:queue:mallory", "bystander"]);
    look(&rig).await;
    assert_eq!(claim.pen().mark(&Default::default()).await.unwrap(), Mark::Held);
    assert_eq!(end(claim, "done").await, Finished::Ended);
    assert_eq!(rig.status("bystander"), "done");
    let rejected = rig.rejected();
    assert_eq!(rejected, [("bystander".into(), "it belongs to another user than its queue".into())]);
    rig.balanced();
}

/// Pushes so many values to a list, or sets so many fields.
fn fill(rig: &Rig, command: &[&str], values: impl Iterator<Item = String>) {
    let values: Vec<String> = values.collect();
    for values in values.chunks(50_000) {
        let words: Vec<&str> = command.iter().copied().chain(values.iter().map(String::as_str)).collect();
        rig.redis(&words);
    }
}

/// What others may make as long or as many as they like, each by its name, and how many ms no call must take that meets it: many times what
/// one takes, and much less than one that goes through all of it.
const HUGE: [(&str, u64); 5] = [
    ("a list of what nobody works on", 500),
    ("the list of one whose jobs run", 200),
    ("one id again and again", 200),
    ("a record", 60),
    ("suspects", 200),
];

fn make_huge(rig: &Rig, what: &str) {
    match what {
        "a list of what nobody works on" => {
            fill(rig, &["RPUSH", "batch:wip:user:eve"], (0..300_000).map(|i| format!("x{i}")));
            rig.redis(&["SADD", "batch:wip:users", "eve"]);
        }
        "the list of one whose jobs run" => {
            fill(rig, &["RPUSH", "batch:wip:user:bystander"], (0..2_000_000).map(|i| format!("x{i}")));
        }
        "one id again and again" => {
            rig.redis(&["HSET", "batch:jobs:task", "kind", "task", "app", "app", "op", "op"]);
            for eve in 0..25 {
                let user = format!("eve{eve}");
                fill(rig, &["LPUSH", &format!("batch:queue:{user}")], (0..20_000).map(|_| "task".to_owned()));
                rig.redis(&["SADD", "batch:indexes:queue", &user]);
            }
        }
        "a record" => {
            submit(rig, b"eve", b"wide", &[(b"status", b"done")]);
            fill(rig, &["HSET", "batch:jobs:wide"], (0..2_000_000).map(|i| format!("f{i}")));
        }
        "suspects" => {
            for eve in 0..1_100 {
                let user = format!("eve{eve}");
                submit(rig, user.as_bytes(), user.as_bytes(), &[(b"unclean", b"5"), (b"host", b"h0")]);
            }
        }
        _ => unreachable!("{what}"),
    }
}

/// Ends jobs at the same time, so that a call ends many.
async fn end_together(claims: &mut Vec<Claim>) {
    let ends = claims.drain(..).map(|claim| tokio::spawn(end(claim, "done")));
    for end in ends.collect::<Vec<_>>() {
        assert_eq!(end.await.unwrap(), Finished::Ended);
    }
}

#[tokio::test]
async fn what_is_huge_holds_nobody_up() {
    for (what, most_ms) in HUGE {
        let (rig, session) = rig().await;
        make_huge(&rig, what);
        let leadership = rig.lead().await;
        let (mut longest, mut endless) = (Vec::new(), None);
        for round in 0..3 {
            rig.server.watch_calls();
            if what == "a record" {
                // Ended, it is ended once more.
                rig.redis(&["PERSIST", "batch:jobs:wide"]);
                rig.redis(&["LPUSH", "batch:queue:eve", "wide"]);
            }
            scan_index(&leadership).await.unwrap();
            for host in 0..32 {
                rig.submit("bystander", &format!("bystander-{round}-{host}"), &format!("h{host}"));
            }
            rig.notice(&["bystander"]).await;
            let (mut served, mut bystanders) = (0, Vec::new());
            while served + bystanders.len() < 32 {
                let claims = take(&session, 32).await;
                assert!(!claims.is_empty() || !bystanders.is_empty(), "{what}: the bystander has no turn");
                let is_last = claims.is_empty();
                for claim in claims {
                    if id(&claim).starts_with("bystander") {
                        bystanders.push(claim);
                    } else if endless.is_none() {
                        // It goes on for as long as its author likes.
                        endless = Some(claim);
                    } else {
                        assert_eq!(end(claim, "done").await, Finished::Ended);
                    }
                }
                if is_last {
                    served += bystanders.len();
                    end_together(&mut bystanders).await;
                }
            }
            end_together(&mut bystanders).await;
            look(&rig).await;
            longest.push(rig.server.longest_call());
        }
        // One call is long because the machine is busy with others, but not in each round.
        let least = longest.into_iter().min().flatten();
        assert!(least.as_ref().is_none_or(|(took, _)| *took < Duration::from_millis(most_ms)), "{what}: {least:?}");
    }
}

#[tokio::test]
async fn foreign_keys_of_a_wrong_type_stop_nobody() {
    const KEYS: [(&str, &str); 10] = [
        ("batch:queue:mallory", "list"),
        ("batch:wip:user:mallory", "list"),
        ("batch:wip:user:alice", "list"),
        ("batch:wip:users", "set"),
        ("batch:indexes:queue", "set"),
        ("limits:batch:mallory", "hash"),
        ("limits:batch:alice", "hash"),
        ("batch:queues:h", "list"),
        ("batch:locks:h", "string"),
        ("batch:rejected", "stream"),
    ];
    const MAKE: [(&str, &[&str], &[&str]); 6] = [
        ("string", &["SET"], &["x"]),
        ("list", &["RPUSH"], &["x"]),
        ("set", &["SADD"], &["x"]),
        ("zset", &["ZADD"], &["1", "x"]),
        ("hash", &["HSET"], &["x", "x"]),
        ("stream", &["XADD"], &["*", "x", "x"]),
    ];
    for (key, own) in KEYS {
        for (kind, command, content) in MAKE.into_iter().filter(|(kind, ..)| *kind != own) {
            a_key_of_a_wrong_type_stops_nobody(key, &[command, &[key], content].concat()).await;
            eprintln!("{key} as {kind}: nobody was stopped");
        }
    }
}

async fn a_key_of_a_wrong_type_stops_nobody(key: &str, make: &[&str]) {
    let (rig, session) = rig().await;
    rig.redis(make);
    for (user, id) in [("mallory", "m1"), ("mallory", "*/"), ("alice", "bystander")] {
        rig.redis(&["HSET", &job_key(id), "user", user, "host", "h"]);
        rig.server.raw_db(DB, &["LPUSH", &queue_key(user), id]);
        rig.server.raw_db(DB, &["SADD", "batch:indexes:queue", user]);
    }
    rig.notice(&["mallory", "alice"]).await;
    look(&rig).await;
    let mut ran = Vec::new();
    // Once back to the front, then to its end; with a native job beside it.
    for claim in take(&session, 4).await {
        put(claim, Verdict::Next).await;
    }
    rig.store.enqueue(&most(64, 16_384), &[submission("alice", "native", "h")]).await.unwrap();
    let canceller = Canceller::new(rig.store.clone(), Duration::from_secs(60));
    assert_eq!(canceller.cancel(&JobId::new("native").unwrap()).await.unwrap(), Cancelled::AtOnce, "{make:?}");
    ran.extend(run_all(&session).await);
    assert!(ran.contains(&"bystander".to_owned()), "{make:?}: {ran:?}");
    assert_eq!(ran.contains(&"m1".to_owned()), key != "batch:queue:mallory", "{make:?}: {ran:?}");
    assert_eq!(rig.redis(&["HLEN", "drayman:claims"]).int(), 0, "{make:?}");
    rig.balanced();
}

#[tokio::test]
async fn fields_that_are_ours_to_write_mean_nothing_when_forged() {
    let (rig, session) = rig().await;
    let huge = vec![b'9'; 1 << 20];
    let forged: &[&[u8]] =
        &[b"8999999999999999", b"9e15", b"1e308", b"nan", b"inf", b"-1", b"0x7f", b"text", b"", &huge];
    for (number, fence) in forged.iter().enumerate() {
        let user = format!("u{number}");
        let fields: &[(&[u8], &[u8])] = &[
            (b"fence", fence),
            (b"settled", fence),
            (b"worker", session.id().as_str().as_bytes()),
            (b"unclean", &fence[..fence.len().min(16)]),
        ];
        submit(&rig, user.as_bytes(), user.as_bytes(), fields);
    }
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let mut ran = Vec::new();
    while let [claim, ..] = &mut take(&session, 1).await[..] {
        let (pen, fence) = (claim.pen(), claim.job().fence);
        // A forged `settled` does not make a finish out of nothing, nor the claim another's.
        rig.redis(&["HSET", &job_key(id(claim)), "settled", &fence.to_string(), "fence", "1", "worker", "x"]);
        assert_eq!(pen.mark(&Default::default()).await.unwrap(), Mark::Held);
        let finish = queue_core::calls::Finish {
            id: claim.job().id.clone(),
            fence,
            verdict: final_verdict(),
            ran_us: 0,
            fields: queue_core::calls::Fields::new().with("status", "done"),
        };
        assert_eq!(rig.store.finish(session.id(), false, &[finish]).await.unwrap(), [Finished::Ended]);
        ran.push(id(claim).to_owned());
    }
    let users: Vec<String> = (0..forged.len()).map(|number| format!("u{number}")).collect();
    expect(&rig, ran, &users.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
}

#[derive(Clone, Copy, Debug)]
enum Mess {
    Deleted,
    String,
    QueueString,
}

#[tokio::test]
async fn a_job_whose_keys_are_spoiled_while_it_runs_still_ends_its_claim() {
    for mess in [Mess::Deleted, Mess::String, Mess::QueueString] {
        for ending in ["done", "next", "back", "later", "cancel", "close", "reclaim", "replay"] {
            let (rig, session) = rig().await;
            submit(&rig, b"mallory", b"m1", &[(b"status", b"pending")]);
            look(&rig).await;
            let claim = take_one(&session).await;
            let pen = claim.pen();
            match mess {
                Mess::Deleted => drop(rig.redis(&["DEL", "batch:jobs:m1"])),
                Mess::String => drop(rig.redis(&["SET", "batch:jobs:m1", "x"])),
                Mess::QueueString => drop(rig.redis(&["SET", "batch:queue:mallory", "x"])),
            }
            let what = format!("{mess:?}, {ending}");
            match ending {
                "done" => assert_eq!(end(claim, "done").await, Finished::Ended, "{what}"),
                "next" => assert_eq!(put(claim, Verdict::Next).await, Finished::Ended, "{what}"),
                "back" => assert_eq!(put(claim, Verdict::Back).await, Finished::Ended, "{what}"),
                "later" => assert_eq!(put(claim, Verdict::Later { after_ms: 0 }).await, Finished::Ended, "{what}"),
                "cancel" => {
                    let canceller = Canceller::new(rig.store.clone(), Duration::from_secs(60));
                    let reply = canceller.cancel(&claim.job().id).await.unwrap();
                    assert_eq!(reply, Cancelled::Requested, "{what}");
                    assert_eq!(pen.mark(&Default::default()).await.unwrap(), Mark::CancelAsked, "{what}");
                    assert_eq!(end(claim, "cancelled").await, Finished::Ended, "{what}");
                }
                "close" => assert_eq!(session.close().await.unwrap(), 1, "{what}"),
                "reclaim" => {
                    let (leadership, leader) = (rig.lead().await, SessionId::new("leader:1:a").unwrap());
                    let reply = rig.store.session_reclaim(session.id().as_str(), 0, &leader, leadership.term()).await;
                    assert_eq!(reply.unwrap(), Ok(SessionEnd::Ended(1)), "{what}");
                }
                _ => {
                    // The answer of its take was lost, and with it the only one who could end it: the heartbeat tells.
                    let reply = rig.store.take(session.id(), "sql:* db:*", 1, 1, 4, "jobs", &[]).await.unwrap();
                    assert!(matches!(reply, queue_core::calls::TakeReply::Taken { .. }), "{what}");
                    let fence = claim.job().fence;
                    drop(claim);
                    let queue_core::calls::Beat::Alive { claims, .. } = session.beat().await.unwrap() else {
                        panic!("{what}: lost");
                    };
                    assert_eq!(claims, [("m1".to_owned(), fence)], "{what}");
                    let reply = session.give_back_unknown(JobId::new("m1").unwrap(), fence).await.unwrap();
                    assert_eq!(reply, Finished::Ended, "{what}");
                }
            }
            rig.balanced();
            let worker = rig.session("sql:* db:*", 4).await;
            submit(&rig, b"alice", b"bystander", &[]);
            look(&rig).await;
            let ran = run_all(&worker).await;
            assert!(ran.contains(&"bystander".to_owned()), "{what}: {ran:?}");
            let over = match mess {
                Mess::String => false,
                _ => ["done", "failed", "cancelled"].contains(&rig.status("m1").as_str()),
            };
            let rejected = rig.rejected();
            assert!(over || rejected.iter().any(|entry| entry.0 == "m1"), "{what}: {rejected:?}");
            assert!(rejected.len() <= 3, "{what}: {rejected:?}");
            rig.balanced();
        }
    }
}

#[tokio::test]
async fn a_scheduled_job_whose_hash_is_spoiled_is_set_aside_when_it_is_due() {
    let (rig, session) = rig().await;
    for (id, spoil) in [("gone", &["DEL", "batch:jobs:gone"][..]), ("text", &["SET", "batch:jobs:text", "x"])] {
        let mut job = submission("mallory", id, "h");
        job.delay_ms = 1;
        rig.store.enqueue(&most(64, 16_384), &[job]).await.unwrap();
        rig.redis(spoil);
    }
    for id in ["no-user", "odd-user"] {
        let mut job = submission("mallory", id, "h");
        job.delay_ms = 1;
        rig.store.enqueue(&most(64, 16_384), &[job]).await.unwrap();
    }
    rig.redis(&["HDEL", "batch:jobs:no-user", "user"]);
    rig.redis(&["HSET", "batch:jobs:odd-user", "user", "tab\tin"]);
    submit(&rig, b"alice", b"bystander", &[]);
    testkit::eventually("all to be due", async || {
        look(&rig).await;
        (rig.redis(&["EXISTS", "drayman:due"]).int() == 0).then_some(())
    })
    .await;
    let ran = run_all(&session).await;
    expect(
        &rig,
        ran,
        &[],
        &[
            ("gone", "its key holds nothing"),
            ("text", "its key holds a string"),
            ("no-user", "its hash names no valid user"),
            ("odd-user", "its hash names no valid user"),
        ],
    );
    assert_eq!([rig.status("no-user"), rig.status("odd-user")], ["failed", "failed"]);
}

#[tokio::test]
async fn limits_that_are_none_count_as_not_set() {
    let (rig, session) = rig().await;
    for (number, weight) in ["nan", "inf", "-1", "0", "1e9", "text", ""].iter().enumerate() {
        let user = format!("u{number}");
        rig.redis(&["HSET", &format!("limits:batch:{user}"), "weight", weight, "timeout", "soon"]);
        submit(&rig, user.as_bytes(), user.as_bytes(), &[]);
    }
    rig.redis(&["HSET", "limits:batch:alice", "timeout", "1500"]);
    submit(&rig, b"alice", b"bystander", &[]);
    look(&rig).await;
    let mut timeouts = Vec::new();
    let mut n = 0;
    while let [claim] = &mut take(&session, 1).await[..] {
        timeouts.extend(claim.job().user_timeout_ms);
        n += 1;
        let tags = rig.redis(&["ZRANGE", "drayman:debt:sql:h", "-1", "-1", "WITHSCORES"]).texts();
        let owed: f64 = tags[1].parse().unwrap();
        assert!((1e6..2e6).contains(&owed), "{tags:?}: charged as one job of weight 1");
        put_done(&rig, &session, claim).await;
    }
    assert_eq!((n, timeouts), (8, vec![1500]));
}

async fn put_done(rig: &Rig, session: &Session, claim: &queue_core::session::Claim) {
    let finish = queue_core::calls::Finish {
        id: claim.job().id.clone(),
        fence: claim.job().fence,
        verdict: final_verdict(),
        ran_us: 0,
        fields: queue_core::calls::Fields::new().with("status", "done"),
    };
    assert_eq!(rig.store.finish(session.id(), false, &[finish]).await.unwrap(), [Finished::Ended]);
}

#[tokio::test]
async fn what_was_set_aside_is_kept_to_the_newest_ten_thousand_however_many_come() {
    let rig = Rig::start().await;
    let users: Vec<String> = (0..120).map(|number| format!("u{number}")).collect();
    for user in &users {
        let ids: Vec<String> = (0..100).map(|number| format!("{user} {number}")).collect();
        rig.state().foreign().submit_many(user, &ids, &[("host", "h")]);
    }
    for users in users.chunks(20) {
        rig.notice(&users.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
    assert!(!rig.state().is_any_waiting());
    let rejected = rig.rejected();
    assert!((10_000..10_500).contains(&rejected.len()), "{} of 12,000 are kept", rejected.len());
    assert_eq!(rejected.last().unwrap().0, "u119 99");
}
