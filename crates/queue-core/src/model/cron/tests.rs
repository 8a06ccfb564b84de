//! Expressions, and every change of the clock in many zones compared with a look at each minute.

use std::collections::BTreeSet;

use jiff::civil::Time;
use jiff::{SignedDuration, ToSpan};
use proptest::prelude::*;

use super::*;

/// Zones whose changes differ: by an hour and by half of one, at midnight, around Ramadan, with winter as the exception, over the
/// date line, and none.
const ZONES: [&str; 14] = [
    "Europe/Berlin",
    "Europe/Dublin",
    "America/New_York",
    "America/Santiago",
    "America/Havana",
    "America/Sao_Paulo",
    "Africa/Cairo",
    "Africa/Casablanca",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Pacific/Apia",
    "UTC",
];

/// Expressions, which times of the day they match, and whether they name them.
type Case = (&'static str, fn(i8, i8) -> bool, bool);
const CASES: [Case; 12] = [
    ("30 2 * * *", |h, m| (h, m) == (2, 30), true),
    ("0 2 * * *", |h, m| (h, m) == (2, 0), true),
    ("0 3 * * *", |h, m| (h, m) == (3, 0), true),
    ("0 0 * * *", |h, m| (h, m) == (0, 0), true),
    ("@daily", |h, m| (h, m) == (0, 0), true),
    ("5,55 0-3,14 * * *", |h, m| [5, 55].contains(&m) && (h <= 3 || h == 14), true),
    ("0 30 1-2 * * *", |h, m| m == 30 && (1..=2).contains(&h), true),
    ("* * * * *", |_, _| true, false),
    ("@hourly", |_, m| m == 0, false),
    ("*/20 * * * *", |_, m| m % 20 == 0, false),
    ("15 */2 * * *", |h, m| m == 15 && h % 2 == 0, false),
    ("*/30 2 * * *", |h, m| m % 30 == 0 && h == 2, false),
];

fn at(text: &str) -> u64 {
    text.parse::<Timestamp>().unwrap().as_millisecond() as u64
}

/// All ticks of `from < tick <= to`.
fn ticks(cron: &Cron, from: Timestamp, to: Timestamp) -> Vec<Timestamp> {
    let mut found = Vec::new();
    let mut last = from.as_millisecond() as u64;
    while let Some(tick) = cron.after(last).filter(|tick| *tick as i64 <= to.as_millisecond()) {
        assert!(tick > last, "{cron:?} goes on from {last} to {tick}");
        found.push(Timestamp::from_millisecond(tick as i64).unwrap());
        last = tick;
    }
    found
}

#[test]
fn around_every_change_of_the_clock_each_tick_comes_as_stated() {
    let mut changes = 0;
    for name in ZONES {
        let zone = TimeZone::get(name).unwrap();
        // Samoa's lost day, the years to come, and those of which the zone's data holds a rule alone.
        let years = |from: i16, to: i16| {
            let begin = |year| jiff::civil::date(year, 1, 1).to_zoned(TimeZone::UTC).unwrap().timestamp();
            // Where there is no change a common day is looked at.
            let all = zone.following(begin(from)).map(|change| change.timestamp());
            all.take_while(move |change| *change < begin(to)).chain([begin(from)])
        };
        for change in years(2011, 2013).chain(years(2025, 2030)).chain(years(2039, 2041)) {
            changes += 1;
            let (from, to) = (change - 30.hours(), change + 30.hours());
            let minutes: Vec<(Timestamp, DateTime)> = (0..=60 * 60)
                .map(|minute| from + SignedDuration::from_mins(minute))
                .map(|time| (time, zone.to_datetime(time)))
                .collect();
            for (expression, matches, daily) in CASES {
                let expected: BTreeSet<Timestamp> = match daily {
                    false => {
                        let named = minutes.iter().filter(|(_, wall)| matches(wall.hour(), wall.minute()));
                        named.map(|(time, _)| *time).collect()
                    }
                    // The first minute at which the wall clock shows the time, or one after it.
                    true => {
                        let mut days = BTreeSet::new();
                        let (mut day, last) = (minutes[0].1.date(), minutes[minutes.len() - 1].1.date());
                        while day <= last {
                            let times = (0..24).flat_map(|h| (0..60).map(move |m| (h, m)));
                            let named = times.filter(|(h, m)| matches(*h, *m));
                            days.extend(named.map(|(h, m)| day.to_datetime(Time::constant(h, m, 0, 0))));
                            day = day.tomorrow().unwrap();
                        }
                        let first =
                            |wall: DateTime| minutes.iter().find(|(_, shown)| *shown >= wall).map(|(time, _)| *time);
                        days.into_iter().filter(|wall| *wall > minutes[0].1).filter_map(first).collect()
                    }
                };
                let cron = Cron::parse(expression, name).unwrap();
                // The first minute may be one that was named before.
                let expected: Vec<Timestamp> = expected.into_iter().filter(|time| *time > from).collect();
                assert_eq!(ticks(&cron, from, to), expected, "{cron:?} around {change}");
            }
        }
    }
    assert!(changes > 150, "{changes}");
}

#[test]
fn whenever_it_is_asked_the_next_tick_is_the_same() {
    for name in ["Europe/Berlin", "Australia/Lord_Howe"] {
        let zone = TimeZone::get(name).unwrap();
        for change in zone.following("2027-01-01T00:00:00Z".parse().unwrap()).take(2).map(|change| change.timestamp()) {
            for expression in ["0,30 0-3 * * *", "*/7 * * * *", "*/20 */5 * * * *"] {
                let cron = Cron::parse(expression, name).unwrap();
                let mut next = cron.after((change - 3.hours()).as_millisecond() as u64);
                for second in -2 * 3_600..2 * 3_600 {
                    let now = (change.as_millisecond() + second * 1_000) as u64;
                    if next <= Some(now) {
                        next = cron.after(now);
                    }
                    assert_eq!(cron.after(now + 999), next, "{cron:?} after {now}");
                }
            }
        }
    }
}

#[test]
fn half_past_two_in_berlin() {
    let next = |expression: &str, from: &str| {
        let cron = Cron::parse(expression, "Europe/Berlin").unwrap();
        cron.local(cron.after(at(from)).unwrap())
    };
    // 2027-03-28 02:00 becomes 03:00; 2027-10-31 03:00 becomes 02:00.
    assert_eq!(next("30 2 * * *", "2027-03-27T12:00:00Z"), "2027-03-28T03:00:00+02:00");
    assert_eq!(next("30 2 * * *", "2027-03-28T01:00:00Z"), "2027-03-29T02:30:00+02:00");
    assert_eq!(next("30 2 * * *", "2027-10-30T12:00:00Z"), "2027-10-31T02:30:00+02:00");
    assert_eq!(next("30 2 * * *", "2027-10-31T00:30:00Z"), "2027-11-01T02:30:00+01:00");
    assert_eq!(next("*/30 2 * * *", "2027-03-27T12:00:00Z"), "2027-03-29T02:00:00+02:00");
    assert_eq!(next("*/30 2 * * *", "2027-10-31T00:30:00Z"), "2027-10-31T02:00:00+01:00");
    // A gap longer than a day's rest: Samoa had no 30 December 2011.
    let apia = Cron::parse("0 12 30 12 *", "Pacific/Apia").unwrap();
    assert_eq!(apia.local(apia.after(at("2011-12-29T12:00:00Z")).unwrap()), "2011-12-31T00:00:00+14:00");
}

#[test]
fn days_are_chosen_as_cron_does() {
    for (expression, from, ticks) in [
        ("0 8 * * MON-FRI", "2027-01-01T08:00:00Z", ["2027-01-04T08:00:00", "2027-01-05T08:00:00"]),
        ("0 0 L * *", "2027-02-01T00:00:00Z", ["2027-02-28T00:00:00", "2027-03-31T00:00:00"]),
        ("0 0 13 * FRI", "2027-08-10T00:00:00Z", ["2027-08-13T00:00:00", "2027-08-20T00:00:00"]),
        ("0 0 13 * +FRI", "2027-08-14T00:00:00Z", ["2028-10-13T00:00:00", "2029-04-13T00:00:00"]),
        ("0 0 * * TUE#2", "2027-01-01T00:00:00Z", ["2027-01-12T00:00:00", "2027-02-09T00:00:00"]),
        ("0 0 * * FRI#L", "2027-01-01T00:00:00Z", ["2027-01-29T00:00:00", "2027-02-26T00:00:00"]),
        ("0 0 15W * *", "2027-05-01T00:00:00Z", ["2027-05-14T00:00:00", "2027-06-15T00:00:00"]),
        ("10-30/10 0 1 1 *", "2027-01-01T00:00:00Z", ["2027-01-01T00:10:00", "2027-01-01T00:20:00"]),
        ("0 0 29 2 *", "2027-01-01T00:00:00Z", ["2028-02-29T00:00:00", "2032-02-29T00:00:00"]),
        ("*/20 59 23 31 12 *", "2027-01-01T00:00:00Z", ["2027-12-31T23:59:00", "2027-12-31T23:59:20"]),
        ("@weekly", "2027-01-01T00:00:00Z", ["2027-01-03T00:00:00", "2027-01-10T00:00:00"]),
    ] {
        let cron = Cron::parse(expression, "UTC").unwrap();
        let first = cron.after(at(from)).unwrap();
        let found = [first, cron.after(first).unwrap()].map(|tick| cron.local(tick));
        assert_eq!(found, ticks.map(|tick| format!("{tick}+00:00")), "{expression}");
    }
}

#[test]
fn what_is_no_schedule_is_refused_with_its_reason() {
    for (expression, zone, words) in [
        ("", "UTC", "it has 0 fields"),
        ("* * * *", "UTC", "it has 4 fields"),
        ("0 0 0 1 1 * 2030", "UTC", "it has 7 fields"),
        ("61 * * * *", "UTC", "no cron expression: "),
        ("* * * * MOO", "UTC", "no cron expression: "),
        ("*/0 * * * *", "UTC", "no cron expression: "),
        ("@reboot", "UTC", "there is no nickname @reboot"),
        ("@daily * * * *", "UTC", "it has 5 fields"),
        ("* * * * *\n", "Mars/Olympus", "no IANA time zone is called \"Mars/Olympus\""),
        ("* * * * *", "", "no IANA time zone"),
        ("* * * * *", "Etc/Unknown", "no IANA time zone"),
        ("* *\u{a0}* * *", "UTC", "it has characters that no expression has"),
        ("0 0 31 2 *", "UTC", "matches no time"),
        ("* * 30 2 *", "UTC", "matches no time"),
        (&"1,".repeat(200), "UTC", "it is 400 bytes long"),
    ] {
        let error = Cron::parse(expression, zone).unwrap_err().to_string();
        assert!(error.contains(words), "{expression:?} in {zone:?}: {error}");
    }
    assert_eq!(Cron::parse(" 0 0 * * * ", "europe/berlin").unwrap().zone(), "Europe/Berlin");
}

#[test]
fn a_time_beyond_all_calendars_has_no_next_tick() {
    let cron = Cron::parse("@hourly", "Europe/Berlin").unwrap();
    for ms in [u64::MAX, i64::MAX as u64, 253_402_300_799_999, 95_617_584_000_000] {
        assert_eq!((cron.after(ms), cron.local(u64::MAX)), (None, String::new()), "{ms}");
    }
}

proptest! {
    #[test]
    fn no_expression_ends_the_program_or_goes_back_in_time(
        expression in "([0-9*/,?LW#+A-Z-]{1,5}[ ]){4,5}[0-9*/,?LW#+A-Z-]{1,5}", zone in "[A-Za-z/_]{0,12}"
    ) {
        let _ = Cron::parse(&expression, &zone);
        if let Ok(cron) = Cron::parse(&expression, "Africa/Cairo") {
            let mut last = 1_800_000_000_000;
            for _ in 0..5 {
                let Some(tick) = cron.after(last) else { break };
                prop_assert!(tick > last);
                last = tick;
            }
        }
    }
}
