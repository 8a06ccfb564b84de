//! Recurring jobs: each tick is made once, whoever makes it and wherever that breaks off; what is missed is treated as asked.

use std::collections::BTreeSet;
use std::time::Duration;

use queue_core::calls::{
    Enqueued, Fields, NotLeader, SchedulePause, SchedulePut, ScheduleRead, ScheduleStep, ScheduleStepped,
};
use queue_core::config::Limits;
use queue_core::ids::{JobId, ScheduleName, SessionId, User};
use queue_core::leader::{self, Leadership};
use queue_core::library::{SCHEDULE_TICK, Version};
use queue_core::model::cron::Cron;
use queue_core::schedule::{self, Definition, Missed, Put, PutError, Ran, Schedules, Ticked};
use queue_core::{Store, reconcile};
use testkit::{Point, Proxy, RedisServer};

use crate::support::*;

const HOUR: Duration = Duration::from_secs(3_600);
const HOUR_MS: u64 = 3_600_000;

fn name(text: &str) -> ScheduleName {
    ScheduleName::new(text).unwrap()
}

fn definition(expression: &str, missed: Missed) -> Definition {
    Definition {
        cron: Cron::parse(expression, "Europe/Berlin").unwrap(),
        missed,
        grace: HOUR,
        user: User::new("ana").unwrap(),
        job: Fields::new().with("host", "h").with("own", b"\xff\0").with("query", "select 1"),
    }
}

fn limits(most: u32) -> Limits {
    Limits { max_queued_per_user: most.try_into().unwrap(), ..Limits::default() }
}

async fn put(rig: &Rig, text: &str, definition: &Definition) -> Put {
    Schedules::new(rig.store.clone()).put(&name(text), definition, &limits(1)).await.unwrap()
}

async fn get(rig: &Rig, text: &str) -> schedule::Schedule {
    Schedules::new(rig.store.clone()).get(&name(text)).await.unwrap().expect("there is such a schedule")
}

async fn tick(leadership: &Leadership, most: u32) -> Ticked {
    schedule::tick(leadership, &limits(most)).await.expect("redis answers").expect("it leads")
}

/// Once an hour, half an hour from now: so that no test is run over by a tick.
async fn hourly(rig: &Rig, missed: Missed) -> Definition {
    let minute = now_ms(rig).await / 60_000 + 30;
    definition(&format!("{} * * * *", minute % 60), missed)
}

/// Twice an hour, a quarter from now.
async fn half_hourly(rig: &Rig, missed: Missed) -> Definition {
    let minute = now_ms(rig).await / 60_000 + 15;
    definition(&format!("{},{} * * * *", minute % 60, (minute + 30) % 60), missed)
}

async fn now_ms(rig: &Rig) -> u64 {
    queue_core::inspect::Inspect::new(rig.store.clone()).now_ms().await.unwrap()
}

/// Makes the schedule stand at its first tick after a time.
async fn stand(rig: &Rig, text: &str, after_ms: u64) -> u64 {
    let tick = get(rig, text).await.definition.unwrap().cron.after(after_ms).unwrap();
    rig.state().move_tick(text, tick);
    tick
}

fn id_of(text: &str, tick_ms: u64) -> String {
    let time = std::time::UNIX_EPOCH + Duration::from_millis(tick_ms);
    format!("{text}:{}", humantime::format_rfc3339_seconds(time))
}

fn ticks_between(cron: &Cron, first: u64, to_ms: u64) -> Vec<u64> {
    std::iter::successors(Some(first), |tick| cron.after(*tick)).take_while(|tick| *tick <= to_ms).collect()
}

fn score(rig: &Rig, text: &str) -> String {
    rig.state().tick_in_order(text).expect("it has a place")
}

#[tokio::test]
async fn a_tick_submits_what_is_defined_and_moves_the_schedule_on() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let definition = hourly(&rig, Missed::Skip).await;
    assert_eq!(put(&rig, "s", &definition).await, Put::Created);
    let idle = tick(&leadership, 64).await;
    assert!(idle.made == 0 && idle.next_in.is_some_and(|pause| pause <= HOUR / 2), "{idle:?}");

    let due = stand(&rig, "s", now_ms(&rig).await - HOUR_MS).await;
    let made = tick(&leadership, 64).await;
    assert_eq!((made.made, made.missed.len(), made.more), (1, 0, false), "{made:?}");
    let id = id_of("s", due);
    assert_eq!(rig.queue("ana").join(" "), id);
    let own = rig.state().field_of(Piece::Job(&id), "own");
    assert_eq!(own.as_deref(), Some(&b"\xff\0"[..]), "fields that nobody knows are kept, whatever their bytes");
    assert_eq!((rig.status(&id).as_str(), rig.hash(&id)["user"].as_str()), ("pending", "ana"));
    let found = get(&rig, "s").await;
    assert_eq!(found.definition.as_ref(), Ok(&definition));
    assert_eq!((found.due_ms, found.last_tick_ms), (definition.cron.after(due), Some(due)));
    assert_eq!((found.last_job, found.misses, found.waiting), (Some(id), 0, None));
    assert_eq!(score(&rig, "s"), found.due_ms.unwrap().to_string());

    // A take by a worker ends it as any other.
    let session = rig.session("sql:*", 1).await;
    end(take_one(&session).await, "done").await;
    rig.balanced();
    assert_eq!(reconcile::check(&rig.store, HOUR).await.unwrap(), []);
}

#[tokio::test]
async fn of_many_leaders_at_once_one_makes_each_tick() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    // 250 ticks of three schedules each: several pages and several passes.
    let first = now_ms(&rig).await - 250_000;
    let names: Vec<String> = (0..3).map(|at| format!("s{at}")).collect();
    for text in &names {
        put(&rig, text, &definition("* * * * * *", Missed::CatchUp)).await;
        stand(&rig, text, first).await;
    }
    let mut makers = tokio::task::JoinSet::new();
    for _ in 0..3 {
        // A connection each: none waits for another.
        let store = Store::connect(&config(rig.server.url_db(DB))).await.unwrap();
        let session = SessionId::new("leader:1:a").unwrap();
        let maker = leader::hold(&store, &session, Duration::from_secs(60)).await.unwrap().unwrap();
        assert_eq!(maker.term(), leadership.term(), "all three believe that they lead");
        makers.spawn(async move {
            let mut made = 0;
            loop {
                let ticked = tick(&maker, 10_000).await;
                made += ticked.made;
                if !ticked.more && ticked.made == 0 {
                    return made;
                }
            }
        });
    }
    let made: u64 = makers.join_all().await.into_iter().sum();
    let queued = rig.queue("ana");
    let mut expected = BTreeSet::new();
    for text in &names {
        let found = get(&rig, text).await;
        let cron = &found.definition.unwrap().cron;
        let last = found.last_tick_ms.unwrap();
        expected
            .extend(ticks_between(cron, cron.after(first).unwrap(), last).into_iter().map(|tick| id_of(text, tick)));
        assert_eq!((found.misses, found.due_ms), (0, cron.after(last)));
    }
    assert!(expected.len() >= 750, "{}", expected.len());
    assert_eq!(queued.len(), expected.len(), "each once");
    assert_eq!(queued.into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!(made as usize, expected.len());
    rig.balanced();
}

/// Killed before the call, before its reply, or behind it, with the record of the job gone in between.
#[tokio::test]
async fn a_leader_that_is_killed_around_a_tick_neither_loses_nor_doubles_it() {
    let rig = Rig::start().await;
    let worker = rig.session("sql:*", 4).await;
    put(&rig, "s", &hourly(&rig, Missed::CatchUp).await).await;
    let session = SessionId::new("leader:1:a").unwrap();
    for point in [Point::BeforeCall, Point::BeforeReply, Point::AfterReply] {
        let due = stand(&rig, "s", now_ms(&rig).await - HOUR_MS).await;
        let proxy = Proxy::start(rig.server.addr());
        proxy.gate_calls(SCHEDULE_TICK.qualified(Version::OURS), move || Some(point));
        let killed = rig.connect_through(&proxy).await;
        let leadership = leader::hold(&killed, &session, Duration::from_secs(60)).await.unwrap().unwrap();
        let call = tokio::spawn(async move { schedule::tick(&leadership, &limits(64)).await });
        testkit::eventually("the call to be stopped", async || (proxy.stopped() > 0).then_some(())).await;
        call.abort();
        proxy.cut();

        // If it was made, its job runs and ends, and its record goes before anybody looks again.
        let mut runs = Vec::new();
        for _ in 0..2 {
            for claim in take(&worker, 4).await {
                runs.push(id(&claim).to_owned());
                end(claim, "done").await;
                rig.state().lose(Piece::Job(runs.last().unwrap()));
            }
            tick(&leader::hold(&rig.store, &session, Duration::from_secs(60)).await.unwrap().unwrap(), 64).await;
        }
        for claim in take(&worker, 4).await {
            runs.push(id(&claim).to_owned());
            end(claim, "done").await;
        }
        assert_eq!(runs, [id_of("s", due)], "{point:?}");
        rig.state().lose(Piece::Job(&runs[0]));
    }
}

/// What a leader sends arrives long after: another has made the tick, and nothing of its job is left.
#[tokio::test]
async fn a_tick_that_arrives_late_is_not_made_again() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let leader = SessionId::new("leader:1:a").unwrap();
    put(&rig, "s", &hourly(&rig, Missed::Skip).await).await;
    let due = stand(&rig, "s", now_ms(&rig).await - HOUR_MS).await;
    let ScheduleRead::Found(fields) = rig.store.schedule_read(&[b"s".to_vec()]).await.unwrap().remove(0) else {
        panic!("it can be read")
    };
    let revision = fields.into_iter().find(|(name, _)| name == b"revision").unwrap().1;
    let mut job = submission("ana", &id_of("s", due), "h");
    let step = ScheduleStep {
        name: name("s"),
        revision,
        due: due.to_string().into(),
        following_ms: Some(due + HOUR_MS),
        missed: 0,
        last_missed_ms: 0,
        because: String::new(),
        waiting: None,
        tick: Some((due, job.clone())),
    };
    let send = async |term, step: &ScheduleStep| {
        rig.store.schedule_step(&leader, term, &most(64, 16_384), step).await.unwrap()
    };
    let term = leadership.term();
    let before = rig.dump();
    assert_eq!(send(term + 1, &step).await, Err(NotLeader));
    job.id = JobId::new("early").unwrap();
    let early = ScheduleStep { tick: Some((due + 2 * HOUR_MS, job)), ..step.clone() };
    assert_eq!(send(term, &early).await, Ok(ScheduleStepped::Changed), "the server's clock says that it is not due");
    let full = rig.store.schedule_step(&leader, term, &most(0, 16_384), &step).await.unwrap();
    assert_eq!(full, Ok(ScheduleStepped::Tick(Enqueued::Full(0))));
    assert_eq!(rig.dump(), before);

    assert_eq!(send(term, &step).await, Ok(ScheduleStepped::Tick(Enqueued::Queued)));
    let session = rig.session("sql:*", 4).await;
    let claim = take_one(&session).await;
    end(claim, "done").await;
    rig.state().lose(Piece::Job(&id_of("s", due)));
    let before = rig.dump();
    let pass = ScheduleStep { tick: None, missed: 1, waiting: Some("x".into()), ..step.clone() };
    for late in [&step, &pass] {
        assert_eq!(send(term, late).await, Ok(ScheduleStepped::Changed));
    }
    assert_eq!(rig.dump(), before);

    // Likewise for one that was read before an operator changed or paused it.
    let current = ScheduleStep { due: (due + HOUR_MS).to_string().into(), tick: None, missed: 1, ..step };
    put(&rig, "s", &hourly(&rig, Missed::CatchUp).await).await;
    assert_eq!(send(term, &current).await, Ok(ScheduleStepped::Changed), "another revision");
    assert_eq!(get(&rig, "s").await.misses, 0);
}

#[tokio::test]
async fn after_an_outage_the_newest_tick_is_made_or_all_of_them_none_beyond_the_grace() {
    let server = RedisServer::with_clock(&[]);
    let store = Store::connect(&config(server.url_db(DB))).await.unwrap();
    let rig = Rig { server, store };
    // Five minutes behind a tick: so that no tick comes while the test looks.
    let aligned = 300 - (now_ms(&rig).await / 1_000 % 600) as i64;
    rig.server.shift_clock(aligned);
    let every = "*/10 * * * *";
    put(&rig, "skip", &definition(every, Missed::Skip)).await;
    put(&rig, "each", &definition(every, Missed::CatchUp)).await;
    put(&rig, "late", &Definition { grace: Duration::ZERO, ..definition(every, Missed::Skip) }).await;
    let cron = get(&rig, "skip").await.definition.unwrap().cron;
    let first = get(&rig, "skip").await.due_ms.unwrap();

    // The server alone says what time it is.
    rig.server.shift_clock(aligned + 5 * 3_600 + 1_800);
    let leadership = rig.lead().await;
    let now = now_ms(&rig).await;
    let ticks = ticks_between(&cron, first, now);
    let young: Vec<u64> = ticks.iter().copied().filter(|tick| now - tick <= HOUR_MS).collect();
    let newest = *ticks.last().unwrap();
    let ticked = tick(&leadership, 64).await;

    let mut expected: Vec<String> = young.iter().map(|tick| id_of("each", *tick)).collect();
    expected.push(id_of("skip", newest));
    let mut queued = rig.queue("ana");
    queued.sort();
    assert_eq!(queued, expected);
    assert_eq!(ticked.made as usize, expected.len());
    let all = ticks.len() as u64;
    for (text, misses, last_missed) in [
        ("skip", all - 1, ticks[ticks.len() - 2]),
        ("each", all - young.len() as u64, ticks[ticks.len() - young.len() - 1]),
        ("late", all, newest),
    ] {
        let found = get(&rig, text).await;
        assert_eq!((found.misses, found.last_missed_ms), (misses, Some(last_missed)), "{text}");
        assert_eq!(found.missed_because.as_deref(), Some("it was paused, or no leader made it in time"));
        assert_eq!(found.due_ms, cron.after(newest), "{text}");
    }

    // A clock that goes back makes nothing twice and nothing early.
    rig.server.shift_clock(aligned);
    assert_eq!(tick(&leadership, 64).await.made, 0);
    assert_eq!(rig.queue("ana").len(), expected.len());
}

#[tokio::test]
async fn a_refused_tick_waits_visibly_and_is_missed_beyond_its_grace() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let twice = half_hourly(&rig, Missed::CatchUp).await;
    put(&rig, "s", &twice).await;
    put(&rig, "other", &Definition { user: User::new("bob").unwrap(), ..hourly(&rig, Missed::Skip).await }).await;
    let first = stand(&rig, "s", now_ms(&rig).await - HOUR_MS).await;
    stand(&rig, "other", now_ms(&rig).await - HOUR_MS).await;
    rig.store.enqueue(&most(64, 16_384), &[submission("ana", "first", "h")]).await.unwrap();

    let ticked = tick(&leadership, 1).await;
    let full = "its user has 1 jobs queued, as many as are allowed";
    assert_eq!((ticked.made, &ticked.waiting[..]), (1, &[(name("s"), full.to_owned())][..]), "the other is made");
    let before = rig.dump();
    assert_eq!(tick(&leadership, 1).await.waiting, [], "it is said once");
    assert_eq!(rig.dump(), before);
    let found = get(&rig, "s").await;
    assert_eq!((found.waiting.as_deref(), found.due_ms, found.misses), (Some(full), Some(first), 0));

    // Redis has no room for jobs, but can still say so.
    rig.redis(&["CONFIG", "SET", "maxmemory", "1"]);
    let ticked = tick(&leadership, 64).await;
    assert_eq!(ticked.waiting, [(name("s"), "redis has no memory left for new jobs".to_owned())]);
    rig.redis(&["CONFIG", "SET", "maxmemory", "0"]);
    rig.state().set_no_room(5, 4);
    let ticked = tick(&leadership, 64).await;
    assert_eq!(ticked.waiting[0].1, "redis uses 5 bytes of memory, and accepts no new jobs above 4");
    assert_eq!(get(&rig, "s").await.due_ms, Some(first));

    // Its grace is over: it is missed for that reason, and the next one is made once there is room.
    let hasty = Definition { grace: HOUR / 2, ..twice };
    assert_eq!(put(&rig, "s", &hasty).await, Put::Replaced);
    tick(&leadership, 64).await;
    let full = get(&rig, "s").await;
    assert_eq!((full.misses, full.last_missed_ms, full.due_ms), (1, Some(first), Some(first + HOUR_MS / 2)));
    rig.state().lose(Piece::NoRoom);
    assert_eq!(tick(&leadership, 64).await.made, 1);
    let found = get(&rig, "s").await;
    assert_eq!((found.waiting, found.last_tick_ms), (None, Some(first + HOUR_MS / 2)));
    rig.balanced();
}

#[tokio::test]
async fn the_same_definition_changes_nothing_and_another_one_keeps_what_is_due() {
    let rig = Rig::start().await;
    let schedules = Schedules::new(rig.store.clone());
    let hourly = definition("0 * * * *", Missed::Skip);
    assert_eq!(put(&rig, "s", &hourly).await, Put::Created);
    let overdue = stand(&rig, "s", now_ms(&rig).await - 5 * HOUR_MS).await;
    let before = rig.dump();
    assert_eq!(put(&rig, "s", &hourly).await, Put::Same);
    assert_eq!(rig.dump(), before);

    let other_job = Definition { job: Fields::new().with("query", "select 2"), ..hourly.clone() };
    assert_eq!(put(&rig, "s", &other_job).await, Put::Replaced);
    let found = get(&rig, "s").await;
    assert_eq!((found.definition.as_ref(), found.due_ms), (Ok(&other_job), Some(overdue)), "no field of the old job");
    assert_eq!(schedules.pause(&name("s")).await.unwrap(), SchedulePause::Changed);
    let at_half = definition("30 * * * *", Missed::Skip);
    assert_eq!(put(&rig, "s", &at_half).await, Put::Replaced);
    let found = get(&rig, "s").await;
    assert!(found.paused && found.due_ms.unwrap() > now_ms(&rig).await, "other times begin from now on");
    assert_eq!(score(&rig, "s"), "inf");

    // Whatever is wrong with it, defining it again mends it: also where the server's clock was years ahead.
    stand(&rig, "s", 2_500_000_000_000).await;
    assert_eq!(put(&rig, "s", &at_half).await, Put::Replaced);
    assert_eq!(get(&rig, "s").await.due_ms, at_half.cron.after(now_ms(&rig).await));
    // Not where a tick was made since the caller asked for the time.
    let made = get(&rig, "s").await.due_ms.unwrap();
    let fields = ["cron", "zone", "missed", "grace", "user", "job.host", "job.own", "job.query"];
    let fields = fields.into_iter().fold(Fields::new(), |fields, field| {
        fields.with(field, rig.state().field_of(Piece::Schedule("s"), field).unwrap())
    });
    for (first, last_tick) in [(now_ms(&rig).await - 1, "0".to_owned()), (made - 1, (made - 1).to_string())] {
        rig.state().set(Piece::Schedule("s"), &[("last_tick", &last_tick)]);
        let put = rig.store.schedule_put(&name("s"), "other", first, &fields).await.unwrap();
        assert_eq!((put, get(&rig, "s").await.due_ms), (SchedulePut::Same, Some(made)));
    }
    rig.state().set(Piece::Schedule("s"), &[("due", "0x10")]);
    rig.state().lose(Piece::Schedules);
    assert_eq!(schedules.resume(&name("s")).await.unwrap(), SchedulePause::Changed);
    assert_eq!(put(&rig, "s", &at_half).await, Put::Replaced);
    assert_eq!(score(&rig, "s"), get(&rig, "s").await.due_ms.unwrap().to_string());

    let large = Definition { job: Fields::new().with("query", "x".repeat(20_000)), ..hourly.clone() };
    let refused = schedules.put(&name("s"), &large, &limits(1)).await.unwrap_err();
    assert!(matches!(refused, PutError::TooLarge { bytes: 20_000, limit: 16_384 }), "{refused}");
    rig.state().spoil(Piece::Schedule("odd"));
    let refused = schedules.put(&name("odd"), &hourly, &limits(1)).await.unwrap_err();
    assert_eq!(refused.to_string(), "its key holds a string, not a hash");
    assert_eq!(schedules.pause(&name("odd")).await.unwrap(), SchedulePause::Missing);
    assert!(schedules.remove(&name("odd")).await.unwrap());
    assert!(schedules.remove(&name("s")).await.unwrap());
    assert!(!schedules.remove(&name("s")).await.unwrap());
    for piece in [Piece::Schedules, Piece::Schedule("s"), Piece::Schedule("odd")] {
        assert!(!rig.state().has(piece), "{piece:?}");
    }
}

#[tokio::test]
async fn a_paused_schedule_makes_no_tick_and_goes_on_as_after_an_outage() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let schedules = Schedules::new(rig.store.clone());
    let (s, gone) = (name("s"), name("gone"));
    put(&rig, "s", &half_hourly(&rig, Missed::Skip).await).await;
    assert_eq!(schedules.pause(&s).await.unwrap(), SchedulePause::Changed);
    assert_eq!(schedules.pause(&s).await.unwrap(), SchedulePause::Same);
    let first = stand(&rig, "s", now_ms(&rig).await - 3 * HOUR_MS).await;
    // Also where the order of the schedules is wrong about it.
    assert_eq!(tick(&leadership, 64).await.made, 0);
    assert_eq!(rig.queue("ana"), Vec::<String>::new());

    let id = schedule::id_beside_ticks(&s);
    assert_eq!(schedules.run_now(&s, id.clone(), &limits(1)).await.unwrap(), Some(Ran::Queued));
    assert_eq!(schedules.run_now(&s, id.clone(), &limits(64)).await.unwrap(), Some(Ran::Queued), "the same one");
    assert_eq!(rig.queue("ana"), [id.as_str()]);
    let full = schedules.run_now(&s, schedule::id_beside_ticks(&s), &limits(1)).await.unwrap();
    assert!(matches!(full, Some(Ran::Refused(_))), "{full:?}");
    assert_eq!(schedules.run_now(&gone, id, &limits(64)).await.unwrap(), None);
    assert_eq!(get(&rig, "s").await.last_job, None, "it is no tick");

    assert_eq!(schedules.resume(&s).await.unwrap(), SchedulePause::Changed);
    assert_eq!(schedules.resume(&s).await.unwrap(), SchedulePause::Same);
    assert_eq!(schedules.resume(&gone).await.unwrap(), SchedulePause::Missing);
    assert_eq!(tick(&leadership, 64).await.made, 1);
    let found = get(&rig, "s").await;
    let ticks = ticks_between(&found.definition.unwrap().cron, first, now_ms(&rig).await);
    assert_eq!((found.last_tick_ms, found.misses), (ticks.last().copied(), ticks.len() as u64 - 1));
}

#[tokio::test]
async fn what_others_made_of_the_keys_keeps_no_other_schedule_waiting() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    let good = hourly(&rig, Missed::Skip).await;
    let spoiled: [(&str, &[u8], &[u8]); 9] = [
        ("cron", b"cron", b"61 * * * *"),
        ("zone", b"zone", b"Mars/Olympus"),
        ("utf8", b"user", b"\xff"),
        ("user", b"user", b""),
        ("grace", b"grace", b"-1"),
        ("missed", b"missed", b"never"),
        ("due", b"due", b"soon"),
        ("field", b"job.\xff", b"x"),
        ("misses", b"misses", b"many"),
    ];
    for (text, field, value) in spoiled {
        put(&rig, text, &good).await;
        stand(&rig, text, now_ms(&rig).await - HOUR_MS).await;
        rig.state().set(Piece::Schedule(text), &[(field, value)]);
    }
    rig.state().spoil(Piece::Schedule("string"));
    rig.state().set(Piece::Schedule("huge"), &[("cron", &"x".repeat(5 << 20))]);
    for member in ["string", "huge", "gone", "no name", ""] {
        rig.state().misplace_tick(member, 1);
    }
    put(&rig, "good", &good).await;
    let due = stand(&rig, "good", now_ms(&rig).await - HOUR_MS).await;

    let ticked = tick(&leadership, 64).await;
    assert_eq!(ticked.made, 2, "{ticked:?}");
    let mut queued = rig.queue("ana");
    queued.sort();
    assert_eq!(queued, [id_of("good", due), id_of("misses", due)]);
    let waiting: Vec<String> = ticked.waiting.iter().map(|(name, why)| format!("{name} {why}")).collect();
    assert_eq!(waiting.len(), 9, "{waiting:?}");
    assert!(
        waiting.contains(&"zone its definition can't be read: no IANA time zone is called \"Mars/Olympus\"".into())
    );
    assert_eq!(Ticked { next_in: None, ..tick(&leadership, 64).await }, Ticked::default(), "each is said once");
    assert_eq!(score(&rig, "due"), "inf", "a tick at no time is not looked at again");
    assert_eq!(rig.state().tick_in_order("gone"), None);
    let listed = Schedules::new(rig.store.clone()).list().await.unwrap();
    assert_eq!(listed.len(), spoiled.len() + 3, "{listed:?}");
    // Defined again, each is as any other.
    for (text, ..) in spoiled {
        put(&rig, text, &good).await;
        assert_eq!(get(&rig, text).await.definition.as_ref(), Ok(&good), "{text}");
    }
    // A submission that breaks off is said, and ends as any other once the key is mended.
    let due = stand(&rig, "good", now_ms(&rig).await - HOUR_MS).await;
    rig.state().lose(Piece::Job(&id_of("good", due)));
    rig.state().spoil(Piece::Scheduled);
    let ticked = tick(&leadership, 64).await;
    assert!(ticked.made == 0 && ticked.waiting[0].1.starts_with("redis refused: WRONGTYPE"), "{ticked:?}");
    rig.state().lose(Piece::Scheduled);
    tick(&leadership, 64).await;
    let found = get(&rig, "good").await;
    assert_eq!((found.last_tick_ms, found.misses, found.waiting), (Some(due), 0, None));

    rig.state().spoil(Piece::Schedules);
    assert_eq!(tick(&leadership, 64).await, Ticked::default());
    let refused = Schedules::new(rig.store.clone()).put(&name("s"), &good, &limits(1)).await.unwrap_err();
    assert_eq!(refused.to_string(), "the key of the schedules holds no sorted set");
}

#[tokio::test]
async fn many_that_are_refused_keep_nobody_else_waiting() {
    let rig = Rig::start().await;
    let leadership = rig.lead().await;
    rig.store.enqueue(&most(64, 16_384), &[submission("ana", "first", "h")]).await.unwrap();
    let past = now_ms(&rig).await - HOUR_MS;
    let anas = hourly(&rig, Missed::Skip).await;
    for at in 0..120 {
        let text = format!("refused-{at}");
        put(&rig, &text, &anas).await;
        stand(&rig, &text, past).await;
    }
    let bobs = Definition { user: User::new("bob").unwrap(), ..anas.clone() };
    put(&rig, "z", &bobs).await;
    stand(&rig, "z", past).await;
    rig.state().misplace_tick("z", now_ms(&rig).await);
    // As many are paused, and the order of the schedules is wrong about them.
    for at in 0..120 {
        let text = format!("paused-{at}");
        put(&rig, &text, &anas).await;
        Schedules::new(rig.store.clone()).pause(&name(&text)).await.unwrap();
        stand(&rig, &text, past).await;
    }
    let ticked = tick(&leadership, 1).await;
    assert_eq!((ticked.made, ticked.waiting.len()), (1, 120));
    assert_eq!(tick(&leadership, 1).await.waiting, []);
}
