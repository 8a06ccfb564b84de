//! Layout: rights are given by keys, and a plain call says what they begin with.
//!
//! The library in Redis: who loads which, what becomes of calls where it is missing, older, later or can't be loaded, and what
//! the caller must be allowed to do.

use std::sync::Arc;

use queue_core::calls::{Enqueued, Finished};
use queue_core::config::{Limits, RedisConfig};
use queue_core::ids::{JobId, User};
use queue_core::library::{
    ADMIT, CANCEL, Effect, FINISH, Function, Library, RETRY, RIGHTS, SESSION_END, SUBMIT, TABLE, Version,
};
use queue_core::producer::{Database, NewJob, Producer};
use queue_core::{Error, Store};
use testkit::{RedisServer, Value};

use crate::support::*;

const OURS: Version = Version::OURS;

fn version(minor: u32, build: u32) -> Version {
    Version { minor, build, ..OURS }
}

/// A program that has another library.
async fn program(server: &RedisServer, version: Version) -> Store {
    Store::connect_with(&config(server.url_db(DB)), Arc::new(Library::of(version))).await.unwrap()
}

async fn submit(store: &Store, id: &str) -> Result<Vec<Enqueued>, Error> {
    store.enqueue(&most(64, 16_384), &[submission("alice", id, "h")]).await
}

fn user(rig: &Rig, name: &str, rights: &[&str]) -> RedisConfig {
    rig.redis(&[&["ACL", "SETUSER", name, "reset", "on", ">secret", "resetchannels", "&*"], rights].concat());
    config(format!("redis://{name}:secret@{}/{DB}", rig.server.addr()))
}

#[tokio::test]
async fn whoever_calls_first_loads_it_and_of_many_one() {
    let rig = Rig::start().await;
    assert_eq!(rig.store.library_version().await.unwrap(), None);
    let mut calls = tokio::task::JoinSet::new();
    for i in 0..20 {
        let store = program(&rig.server, OURS).await;
        calls.spawn(async move { submit(&store, &format!("a{i}")).await.unwrap() });
    }
    assert!(calls.join_all().await.into_iter().all(|queued| queued == [Enqueued::Queued]));
    assert_eq!(rig.store.library_version().await.unwrap(), Some(OURS));
    assert_eq!(rig.queue("alice").len(), 20);
}

#[tokio::test]
async fn an_older_library_runs_nothing_that_it_may_not_know_until_a_keeper_has_replaced_it() {
    let rig = Rig::start().await;
    let (old, new) = (version(3, 7), version(4, 1));
    program(&rig.server, old).await.keep_library().await.unwrap();
    let later = program(&rig.server, new).await;
    let before = rig.dump();
    let refused = submit(&later, "a").await.unwrap_err();
    assert!(matches!(&refused, Error::Library { found, ours } if (*found, *ours) == (old, new)), "{refused}");
    assert!(!refused.is_outcome_unknown() && !refused.is_transient());
    assert!(refused.to_string().contains("drayman library load"), "{refused}");
    assert_eq!(rig.dump(), before);

    // A daemon's connection replaces it, also when a restored server has an older one again.
    let keeper = program(&rig.server, new).await;
    assert_eq!(keeper.keep_library().await.unwrap(), (Some(old), new));
    assert_eq!(submit(&later, "a").await.unwrap(), [Enqueued::Queued]);
    rig.redis(&["FUNCTION", "LOAD", "REPLACE", Library::of(old).text.as_str()]);
    assert_eq!(submit(&keeper, "b").await.unwrap(), [Enqueued::Queued]);
    assert_eq!(keeper.library_version().await.unwrap(), Some(new));
}

#[tokio::test]
async fn a_later_library_stays_and_answers_older_programs() {
    let rig = Rig::start().await;
    for later in [version(OURS.minor, OURS.build + 1), version(OURS.minor + 1, 0)] {
        rig.redis(&["FUNCTION", "LOAD", "REPLACE", Library::of(later).text.as_str()]);
        let old = program(&rig.server, OURS).await;
        assert_eq!(old.keep_library().await.unwrap(), (Some(later), later));
        assert_eq!(submit(&old, &later.to_string()).await.unwrap(), [Enqueued::Queued]);
        assert_eq!(old.library_version().await.unwrap(), Some(later));
    }
    // One of the same minor version and an earlier build answers, and is replaced by the next who starts.
    let earlier = version(OURS.minor, 0);
    rig.redis(&["FUNCTION", "LOAD", "REPLACE", Library::of(earlier).text.as_str()]);
    assert_eq!(submit(&rig.store, "c").await.unwrap(), [Enqueued::Queued]);
    assert_eq!(rig.store.library_version().await.unwrap(), Some(earlier));
    assert_eq!(rig.store.keep_library().await.unwrap(), (Some(earlier), OURS));
}

/// Programs of three builds start and start again beside each other, and work.
#[tokio::test(flavor = "multi_thread")]
async fn builds_beside_each_other_lose_no_call_and_the_latest_stays() {
    const JOBS: usize = 60;
    let rig = Arc::new(Rig::start().await);
    let builds = [version(1, 1), version(1, 2), version(2, 1)];
    let mut programs = tokio::task::JoinSet::new();
    for build in builds {
        let rig = rig.clone();
        programs.spawn(async move {
            let mut ended = 0;
            for round in 0..JOBS {
                // Each round is a start: the older one finds the later library from then on.
                let store = program(&rig.server, build).await;
                store.keep_library().await.unwrap();
                let name = format!("u{}-{}", build.minor, build.build);
                let id = format!("{name}-{round}");
                assert_eq!(
                    store.enqueue(&most(64, 16_384), &[submission(&name, &id, "h")]).await.unwrap(),
                    [Enqueued::Queued]
                );
                let session = open(&store, service("sql:*", 100)).await;
                for claim in take(&session, 3).await {
                    assert_eq!(end(claim, "done").await, Finished::Ended);
                    ended += 1;
                }
                session.close().await.unwrap();
            }
            ended
        });
    }
    let mut ended: usize = programs.join_all().await.into_iter().sum();
    assert_eq!(rig.store.library_version().await.unwrap(), Some(version(2, 1)));
    let session = open(&program(&rig.server, version(2, 1)).await, service("sql:*", 100)).await;
    loop {
        let claims = take(&session, 50).await;
        if claims.is_empty() {
            break;
        }
        for claim in claims {
            assert_eq!(end(claim, "done").await, Finished::Ended);
            ended += 1;
        }
    }
    assert_eq!(ended, builds.len() * JOBS);
    rig.balanced();
}

#[tokio::test]
async fn a_replica_that_takes_over_without_the_library_gets_it() {
    let primary = RedisServer::with_config(&[("repl-diskless-sync-delay", "0")]);
    let of = format!("127.0.0.1 {}", primary.addr().port());
    let replica = RedisServer::with_config(&[("replicaof", &of)]);
    let mut client = primary.client(0);
    testkit::eventually_blocking("the replica", || {
        client.call(&["SET", "x", "y"]);
        (client.call(&["WAIT", "1", "100"]) == Value::Int(1)).then_some(())
    });
    let proxy = testkit::Proxy::start(primary.addr());
    let store = Store::connect(&config(proxy.redis_url(DB))).await.unwrap();
    submit(&store, "a").await.unwrap();
    testkit::eventually("the replica has it", async || replica.state(DB).has(Piece::Job("a")).then_some(())).await;
    // It forgets the library before it is a primary: as one that was loaded from an older snapshot.
    replica.raw(&["REPLICAOF", "NO", "ONE"]);
    replica.raw(&["FUNCTION", "FLUSH"]);
    proxy.lead_to(replica.addr());
    proxy.cut();
    let queued = testkit::eventually("the other answers", async || submit(&store, "b").await.ok()).await;
    assert_eq!(queued, [Enqueued::Queued]);
    assert_eq!(replica.state(DB).waiting("alice"), ["a", "b"]);
}

#[tokio::test]
async fn in_a_full_memory_without_a_library_work_ends_and_nothing_comes_in() {
    let rig = Rig::start().await;
    let session = rig.session("sql:*", 4).await;
    for id in ["a", "b", "c"] {
        submit(&rig.store, id).await.unwrap();
    }
    let claims = [take_one(&session).await];
    rig.redis(&["CONFIG", "SET", "maxmemory", "1"]);
    rig.redis(&["FUNCTION", "FLUSH"]);
    let before = rig.dump();
    let refused = submit(&rig.store, "d").await.unwrap_err();
    assert!(refused.is_transient() && refused.to_string().contains("OOM"), "{refused}");
    assert_eq!(rig.dump(), before);
    for claim in claims {
        assert_eq!(end(claim, "done").await, Finished::Ended);
    }
    session.beat().await.unwrap();
    take_one(&session).await;
    assert_eq!(session.close().await.unwrap(), 1, "it is given back");
    assert_eq!(rig.status("b"), "pending");
    assert_eq!(rig.store.library_version().await.unwrap(), None);
    rig.redis(&["CONFIG", "SET", "maxmemory", "0"]);
    submit(&rig.store, "d").await.unwrap();
    assert_eq!(rig.store.library_version().await.unwrap(), Some(OURS));
    rig.balanced();
}

#[tokio::test]
async fn a_server_that_has_no_functions_is_served_by_scripts() {
    let rig = Rig::start().await;
    let forbidden = ["~*", "+@all", "-function", "-fcall", "-fcall_ro"];
    let config = RedisConfig { functions: false, ..user(&rig, "managed", &forbidden) };
    let store = Store::connect(&config).await.unwrap();
    let session = open(&store, service("sql:*", 4)).await;
    for round in 0..2 {
        // The second time the server knows the scripts.
        let id = format!("a{round}");
        assert_eq!(submit(&store, &id).await.unwrap(), [Enqueued::Queued]);
        let claim = take_one(&session).await;
        assert_eq!(end(claim, "done").await, Finished::Ended);
        assert_eq!(rig.status(&id), "done");
    }
    assert_eq!(store.limited("user", &[b"alice".to_vec()]).await.unwrap().len(), 1);
    assert_eq!(rig.store.library_version().await.unwrap(), None);
    let warnings = store.check_server().await.unwrap();
    assert!(warnings.iter().any(|warning| warning.contains("redis.functions is false")), "{warnings:?}");

    // Who is not told so gets a refusal that leads on.
    let told = Store::connect(&RedisConfig { functions: true, ..config }).await.unwrap();
    assert!(submit(&told, "b").await.unwrap_err().to_string().contains("NOPERM"));
}

#[tokio::test]
async fn who_may_not_load_it_is_told_who_may_and_may_call_it_once_it_is_there() {
    let rig = Rig::start().await;
    let config = user(&rig, "producer", &["~*", "+@all", "-function|load"]);
    let store = Store::connect(&config).await.unwrap();
    let refused = submit(&store, "a").await.unwrap_err().to_string();
    assert!(refused.contains("NOPERM") && refused.contains("drayman library load"), "{refused}");
    rig.store.keep_library().await.unwrap();
    assert_eq!(submit(&store, "a").await.unwrap(), [Enqueued::Queued]);
}

#[tokio::test]
async fn a_user_who_lacks_a_right_is_refused_before_anything_is_written() {
    let rig = Rig::start().await;
    rig.store.keep_library().await.unwrap();
    let before = rig.dump();
    for (rights, named) in [
        (&["~*", "+@all", "-zadd"][..], "ZADD on drayman:x"),
        (&["~*", "+@all", "-lpush"][..], "LPUSH on drayman:x"),
        (&["~drayman:*", "~batch:jobs:*", "+@all"][..], "on batch:queue:x"),
        (&["~drayman:*", "~batch:*", "+@all"][..], "on limits:batch:x"),
    ] {
        let store = Store::connect(&user(&rig, "narrow", rights)).await.unwrap();
        let refused = submit(&store, "a").await.unwrap_err();
        assert!(refused.to_string().contains(named), "{named}: {refused}");
        assert!(!refused.is_outcome_unknown(), "{refused}");
        assert_eq!(rig.dump(), before);
        // Once the right is there, the same connection goes on.
        rig.redis(&["ACL", "SETUSER", "narrow", "~*", "+@all"]);
        assert_eq!(submit(&store, "a").await.unwrap(), [Enqueued::Queued]);
        rig.state().lose(Piece::Job("a"));
        rig.state().lose(Piece::Queue("alice"));
        rig.redis(&["FLUSHDB"]);
    }
}

#[tokio::test]
async fn a_call_that_is_none_is_refused_with_what_is_missing() {
    let rig = Rig::start().await;
    rig.store.keep_library().await.unwrap();
    let name = SUBMIT.qualified(OURS);
    let before = rig.dump();
    for call in [
        &["FCALL", &name, "0"][..],
        &["FCALL", &name, "0", "0"],
        &["FCALL", &name, "1", "drayman:"],
        &["FCALL", &name, "1", "drayman:", "x"],
        &["FCALL", &name, "2", "drayman:", "k", "0"],
        &["FCALL", &name, "1", "batch:", "0"],
        &["FCALL", &name, "1", "", "0"],
        &["FCALL", &name, "1", "drayman:{a:b}:", "0"],
        &["FCALL", &name, "1", "drayman:", "-1"],
        &["FCALL", &name, "1", "drayman:", "nan"],
        &["FCALL", &name, "1", "drayman:", "0x0"],
    ] {
        let Value::Error(said) = rig.server.raw_db(DB, call) else { panic!("{call:?}") };
        assert!(said.contains("takes one key, what our keys begin with, and the minor version"), "{said}");
    }
    let Value::Error(said) = rig.server.raw_db(DB, &["FCALL", &name, "1", "drayman:", "99"]) else { panic!() };
    assert_eq!(said, format!("OLDER {OURS}"));
    assert_eq!(rig.dump(), before);
}

/// They name no jobs that a session holds, and don't ask how far a look has come.
#[tokio::test]
async fn programs_of_an_earlier_build_are_answered_in_their_words() {
    let rig = Rig::start().await;
    let call = |function: &Function, args: &[&str]| {
        let name = function.qualified(OURS);
        rig.redis(&[&["FCALL", &name, "1", "drayman:", "0"][..], args].concat())
    };
    let session = rig.session("sql:*", 8).await;
    for user in ["alice", "bob"] {
        rig.submit(user, &format!("{user}-1"), "h");
        rig.submit(user, &format!("{user}-2"), "g");
    }
    assert_eq!(call(&ADMIT, &["alice", "bob", "nobody"]).int(), 2);
    let claims = take(&session, 8).await;
    assert_eq!(claims.len(), 4);
    let term = rig.lead().await.term().to_string();
    let reply = call(&SESSION_END, &["reclaim", session.id().as_str(), "0", "leader:1:a", &term]);
    assert_eq!(reply, Value::Array(vec![Value::Bulk(b"ended".to_vec()), Value::Int(4)]));
    assert_eq!(["alice", "bob"].map(|user| rig.queue(user)), [["alice-1", "alice-2"], ["bob-1", "bob-2"]]);
    rig.balanced();
}

/// A loop over arguments would stand still, and Redis with it.
#[tokio::test]
async fn a_count_of_arguments_that_is_none_is_refused() {
    let rig = Rig::start().await;
    rig.store.keep_library().await.unwrap();
    for count in ["-5", "-2", "1e9", "0.5", "nan", "", "99999999999999999999"] {
        for (function, before) in [
            (&SUBMIT, &["64", "64", "16384", "16384", "0", "a", "alice", "0", "0"][..]),
            (&FINISH, &["s", "0", "a", "1", "final", "0", "0"]),
            (&CANCEL, &["0", "a", ""]),
            (&RETRY, &["a", "", ""]),
            (&RIGHTS, &[]),
        ] {
            let args = before.iter().chain([&count]).map(|arg| arg.as_bytes().to_vec()).collect();
            let said = rig.store.call(function, args).await.unwrap_err().to_string();
            assert!(said.contains("is no count"), "{} {count}: {said}", function.name);
        }
    }
}

/// A worker without the right to load it waits until somebody else has: what its task has done is recorded then.
#[tokio::test]
async fn an_end_waits_for_a_library_that_is_gone() {
    let rig = Rig::start().await;
    rig.store.keep_library().await.unwrap();
    let store = Store::connect(&user(&rig, "worker", &["~*", "+@all", "-function|load"])).await.unwrap();
    let session = open(&store, service("sql:*", 4)).await;
    submit(&store, "a").await.unwrap();
    let claim = take_one(&session).await;
    rig.redis(&["FUNCTION", "FLUSH"]);
    let ended = tokio::spawn(end(claim, "done"));
    let failed = || rig.redis(&["INFO", "commandstats"]).text().contains("cmdstat_function|load");
    testkit::eventually("it is refused", async || failed().then_some(())).await;
    assert_eq!(rig.status("a"), "running");
    rig.store.keep_library().await.unwrap();
    assert_eq!(testkit::end_of("it is recorded", ended).await.unwrap(), Finished::Ended);
    assert_eq!(rig.status("a"), "done");
}

#[tokio::test]
async fn a_library_of_somebody_else_in_its_place_is_named() {
    let rig = Rig::start().await;
    let foreign = |library: &str, function: &str| {
        format!("#!lua name={library}\nredis.register_function('{function}', function() return 'x' end)")
    };
    for (library, function) in [("drayman1", "other"), ("other", "drayman1_submit")] {
        rig.redis(&["FUNCTION", "FLUSH"]);
        rig.redis(&["FUNCTION", "LOAD", &foreign(library, function)]);
        let said = rig.store.keep_library().await.unwrap_err().to_string();
        assert!(said.contains("already exists") && said.contains("another library"), "{said}");
    }
}

#[tokio::test]
async fn an_error_names_the_file_and_the_line_in_it() {
    let rig = Rig::start().await;
    // Too few arguments: the fault shows in the function's own text.
    let cases: [(_, &[&str], _); 2] = [
        (&FINISH, &["session", "0", "job"], "library/begin.lua:"),
        (&SUBMIT, &["1", "1", "1", "1", "0", "job", "alice", "x", "0", "0"], "jobs/submit.lua:"),
    ];
    for (function, args, file) in cases {
        let args = args.iter().map(|arg| arg.as_bytes().to_vec()).collect();
        let said = rig.store.call(function, args).await.unwrap_err().to_string();
        let (_, rest) = said.split_once(file).unwrap_or_else(|| panic!("{said}"));
        let line: usize = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
        let text =
            std::fs::read_to_string(format!("{}/src/{}", env!("CARGO_MANIFEST_DIR"), file.trim_end_matches(':')));
        assert!(line > 10 && line <= text.unwrap().lines().count(), "{said}");
        assert!(!said.contains("user_function"), "{said}");
    }
}

/// What only reads is refused by Redis where it would write, and is answered by a server that takes no writes.
#[tokio::test]
async fn what_only_reads_is_known_as_such() {
    let rig = Rig::start().await;
    rig.store.keep_library().await.unwrap();
    for function in TABLE {
        let call = ["FCALL_RO", &function.qualified(OURS), "1", "drayman:", "0"];
        let answer = rig.server.raw_db(DB, &call);
        let refused =
            matches!(&answer, Value::Error(said) if said.contains("Can not execute a script with write flag"));
        assert_eq!(refused, function.effect != Effect::Reads, "{}: {answer:?}", function.name);
    }
}

/// The contract of other languages is the same: a job that was submitted by a plain FCALL runs.
#[tokio::test]
async fn a_plain_call_submits_a_job() {
    let rig = Rig::start().await;
    rig.store.keep_library().await.unwrap();
    let call = [
        "FCALL",
        "drayman1_submit",
        "1",
        "drayman:",
        "0",
        "64",
        "64",
        "16384",
        "16384",
        "0",
        "a",
        "alice",
        "0",
        "0",
        "4",
        "query",
        "select 1",
        "host",
        "h",
    ];
    assert_eq!(rig.redis(&call).texts(), ["queued"]);
    let producer = Producer::new(rig.store.clone(), Limits::default());
    let job = NewJob::sql(User::new("alice").unwrap(), Database::Named("main".into()), "select 1");
    producer.enqueue(NewJob { id: JobId::new("b").unwrap(), ..job }).await.unwrap();
    let session = rig.session("sql:* db:*", 4).await;
    let claim = take_one(&session).await;
    assert_eq!(id(&claim), "a");
}
