//! What is submitted: a function of the seed, the user, the job's number, and of which handlers there are.

use std::time::Duration;

use serde_json::{Value, json};

use super::random::Random;
use super::stage::MAX_UNCLEAN;

/// How many statements of one pool may run at once, in all of the run's workers and in its database's own check.
pub const CAPACITY: usize = 2;

/// The pools, each by the host that its jobs name.
pub const HOSTS: [&str; 2] = ["127.0.0.1", "localhost"];

/// The application whose operations tasks call.
pub const APP: &str = "chaos";

/// What a task writes before it kills its worker.
pub const POISON: &str = "poison";

/// What a task's handler is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// A program that stays.
    Program,
    /// A command.
    Command,
    /// A function of the worker.
    Rust,
}

impl Handler {
    /// The operation.
    pub fn op(self) -> &'static str {
        match self {
            Handler::Program => "program",
            Handler::Command => "command",
            Handler::Rust => "rust",
        }
    }
}

/// How a job is handed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Hash, list and index in one transaction, then the announcement.
    Transaction,
    /// The hash, then the three others as plain commands in this order.
    Plain([&'static str; 3]),
    /// Everything else before the hash.
    HashLast,
    /// `drayman submit`.
    Native,
}

/// What a statement does beside entering itself into the table of effects, or a task beside its lines in the file of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// It takes a place of its pool in the database for so long.
    Work(Duration),
    /// It raises an error after its effect.
    Fail,
    /// It raises a serialization failure the first time, after its effect. A task wants another attempt after its first, or its
    /// process ends.
    FailOnce,
    /// It sleeps for longer than a session may be silent, without a place.
    Linger(Duration),
    /// A task kills its worker, time and again.
    Poison,
    /// It is no effect but VACUUM, which runs outside of any transaction.
    Vacuum,
}

/// One statement of a job.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its name within the job: `0`, `0.onerror`, `onsuccess`, …
    pub name: String,
    /// What it does.
    pub deed: Deed,
}

/// One entry of a job with what follows it.
#[derive(Clone, Debug)]
pub struct Entry {
    main: Step,
    onsuccess: Option<Step>,
    onerror: Option<Step>,
}

/// The form of a job's query, or what runs its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One text.
    Single,
    /// A list of texts.
    List,
    /// Entries with fallbacks of their own, and the job's.
    Fallback,
    /// A task, whose one step is what it does.
    Task(Handler),
}

/// One job to submit.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its id, from the seed too.
    pub id: String,
    /// Its user.
    pub user: String,
    /// The pause before its submission.
    pub pause: Duration,
    /// How it is handed in.
    pub route: Route,
    /// The form of its query.
    pub form: Form,
    /// Which of the two hosts it names.
    pub host: usize,
    /// Whether its connection to the database leads through the proxy.
    pub proxied: bool,
    /// How long it waits before it may be taken; native jobs only.
    pub delay: Option<Duration>,
    /// How often it may be tried.
    pub max_attempts: Option<u32>,
    /// When after its submission somebody cancels it.
    pub cancel_after: Option<Duration>,
    /// Whether that is done by plain commands.
    pub cancelled_plainly: bool,
    /// A key that no other job may hold, and until when this one does: it is queued, or done. Native jobs only.
    pub unique: Option<(String, &'static str)>,
    entries: Vec<Entry>,
    onsuccess: Option<Step>,
    onerror: Option<Step>,
}

impl Job {
    /// The `number`-th job of a user.
    pub fn plan(seed: u64, user: usize, number: u64, handlers: &[Handler]) -> Self {
        let mut random = Random::of(seed, &[1, user as u64, number]);
        let id = format!("u{user}-{number}");
        let route = match random.weighted(&[3, 3, 1, 3]) {
            0 => Route::Transaction,
            1 => {
                let mut rest = ["LPUSH", "SADD", "PUBLISH"];
                rest.rotate_left(random.between(0, 3) as usize);
                Route::Plain(rest)
            }
            2 => Route::HashLast,
            _ => Route::Native,
        };
        let handler = handlers[random.between(0, handlers.len() as u64) as usize];
        let forms = [Form::Single, Form::List, Form::Fallback, Form::Task(handler)];
        // Each run has one, however short it is.
        let is_poison = (user, number) == (0, 2);
        let form = forms[if is_poison { 3 } else { random.weighted(&[5, 3, 3, 9]) }];
        let count = if matches!(form, Form::Single | Form::Task(_)) { 1 } else { random.between(1, 4) };
        let fallbacks = form == Form::Fallback;
        let entries: Vec<Entry> = (0..count)
            .map(|at| Entry {
                main: step(at.to_string(), &mut random),
                onsuccess: (fallbacks && random.chance(30)).then(|| step(format!("{at}.onsuccess"), &mut random)),
                onerror: (fallbacks && random.chance(40)).then(|| step(format!("{at}.onerror"), &mut random)),
            })
            .collect();
        // Beside a single text they stand in fields of their own.
        let own = if matches!(form, Form::List | Form::Task(_)) { 0 } else { 30 };
        let onsuccess = random.chance(own).then(|| step("onsuccess".into(), &mut random));
        let onerror = random.chance(own).then(|| step("onerror".into(), &mut random));
        let mut job = Self {
            id,
            user: format!("user-{user}"),
            pause: if random.chance(30) { Duration::ZERO } else { random.ms(0, 600) },
            route,
            form,
            host: random.between(0, HOSTS.len() as u64) as usize,
            proxied: random.chance(50),
            delay: (route == Route::Native && random.chance(20)).then(|| random.ms(100, 3_000)),
            max_attempts: random.chance(60).then_some(12),
            cancel_after: random.chance(15).then(|| random.ms(0, 2_500)),
            cancelled_plainly: random.chance(40),
            unique: (route == Route::Native && random.chance(30))
                .then(|| (format!("key-{}", random.between(0, 4)), if random.chance(50) { "queued" } else { "done" })),
            entries,
            onsuccess,
            onerror,
        };
        if job.task().is_some() {
            // Longer than most statements: a task has nothing but its time in which faults can meet it.
            job.entries[0].main.deed = match if is_poison { 4 } else { random.weighted(&[52, 10, 20, 17, 1]) } {
                0 => Deed::Work(random.ms(0, 600)),
                1 => Deed::Fail,
                2 => Deed::FailOnce,
                3 => Deed::Linger(random.ms(2_000, 4_500)),
                _ => Deed::Poison,
            };
            match job.deed() {
                Deed::Linger(_) => job.id.push_str(LONG),
                // Nothing but the loss of its workers ends it.
                Deed::Poison => (job.cancel_after, job.max_attempts) = (None, None),
                _ => {}
            }
        }
        if job.steps().any(|step| step.deed == Deed::FailOnce) {
            job.max_attempts = Some(12);
        }
        job
    }

    /// What runs it, if it is a task.
    pub fn task(&self) -> Option<Handler> {
        match self.form {
            Form::Task(handler) => Some(handler),
            _ => None,
        }
    }

    /// What a task is to do.
    pub fn deed(&self) -> Deed {
        self.entries[0].main.deed
    }

    /// The field `input` of a task.
    pub fn input(&self) -> String {
        let (deed, time) = match self.deed() {
            Deed::Work(time) | Deed::Linger(time) => ("work", time),
            Deed::Fail => ("fail", Duration::ZERO),
            Deed::FailOnce | Deed::Vacuum => ("once", Duration::ZERO),
            Deed::Poison => (POISON, Duration::from_millis(50)),
        };
        // Twice more than it may kill, it leaves its worker alone: so a run ends in which nobody counts.
        json!({ "deed": deed, "ms": time.as_millis() as u64, "most": MAX_UNCLEAN + 2 }).to_string()
    }

    /// All its statements.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        let own = self.onsuccess.iter().chain(&self.onerror);
        self.entries
            .iter()
            .flat_map(|entry| [Some(&entry.main), entry.onsuccess.as_ref(), entry.onerror.as_ref()])
            .flatten()
            .chain(own)
    }

    /// Whether jobs of the same user that were handed in earlier may start later: then it says nothing about turns.
    pub fn out_of_line(&self) -> bool {
        // A task that others pushed waits in their list until it is noticed, while new ones come into its line.
        self.delay.is_some() || self.route == Route::HashLast || (self.task().is_some() && self.route != Route::Native)
    }

    /// Where it waits for its turn.
    pub fn line(&self) -> String {
        format!("{} {}", self.user, self.task().map_or("sql", Handler::op))
    }

    /// The sequences that its statements need in the database.
    pub fn sequences(&self) -> Vec<String> {
        let once = self.steps().filter(|step| step.deed == Deed::FailOnce && self.task().is_none());
        once.map(|step| sequence(&self.id, &step.name)).collect()
    }

    /// The field `query`.
    pub fn query(&self) -> String {
        let sql = |step: &Step| self.sql(step);
        match self.form {
            Form::Single | Form::Task(_) => sql(&self.entries[0].main),
            Form::List => self.entries.iter().map(|entry| sql(&entry.main)).collect::<Value>().to_string(),
            Form::Fallback => {
                let entries = self.entries.iter().map(|entry| {
                    let mut object = json!({ "query": sql(&entry.main) });
                    for (name, step) in [("onsuccess", &entry.onsuccess), ("onerror", &entry.onerror)] {
                        if let Some(step) = step {
                            object[name] = json!(sql(step));
                        }
                    }
                    object
                });
                let mut object = json!({ "query": entries.collect::<Value>() });
                for (name, text) in self.own_fallbacks() {
                    object[name] = json!(text);
                }
                object.to_string()
            }
        }
    }

    /// The hash fields `onsuccess` and `onerror`.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        if self.form == Form::Single { self.own_fallbacks() } else { Vec::new() }
    }

    fn own_fallbacks(&self) -> Vec<(&'static str, String)> {
        [("onsuccess", &self.onsuccess), ("onerror", &self.onerror)]
            .into_iter()
            .filter_map(|(name, step)| Some((name, self.sql(step.as_ref()?))))
            .collect()
    }

    fn sql(&self, step: &Step) -> String {
        let Self { id, host, .. } = self;
        let name = &step.name;
        match step.deed {
            Deed::Work(time) => {
                let seconds = time.as_secs_f64();
                // What the error said is quoted for its place.
                let told = if name.ends_with(".onerror") { "; SELECT '<%= error_message %>'" } else { "" };
                format!("SELECT work('{id}', '{name}', {host}, {seconds}){told}")
            }
            Deed::Fail => format!("SELECT effect('{id}', '{name}'); SELECT refuse()"),
            Deed::FailOnce => {
                format!("SELECT effect('{id}', '{name}'); SELECT fail_once('{}')", sequence(id, name))
            }
            Deed::Linger(time) => format!("SELECT effect('{id}', '{name}'); SELECT pg_sleep({})", time.as_secs_f64()),
            Deed::Vacuum | Deed::Poison => "VACUUM nothing".into(),
        }
    }
}

fn step(name: String, random: &mut Random) -> Step {
    let deed = match random.weighted(&[75, 10, 8, 4, 3]) {
        0 => Deed::Work(random.ms(0, 250)),
        1 => Deed::Fail,
        2 => Deed::FailOnce,
        3 => Deed::Linger(random.ms(1_500, 4_000)),
        _ => Deed::Vacuum,
    };
    Step { name, deed }
}

/// How the ids of tasks end that take long.
const LONG: &str = "-long";

/// Whether this is a task that takes long, by its id.
pub fn is_long(id: &[u8]) -> bool {
    id.ends_with(LONG.as_bytes())
}

fn sequence(id: &str, step: &str) -> String {
    format!("once_{id}_{step}").replace(['-', '.'], "_")
}

/// What the database of a run holds: the effects, whoever came too many, and the functions that the statements call.
///
/// A place is held by a session lock for as long as the statement works and not longer: what a worker that is gone or
/// stopped leaves open holds none. A statement that finds no place enters who holds them; that counts once all of them,
/// itself too, have committed, for what does not commit may have been a stopped worker's. Commits take their time, so that
/// faults meet them.
pub fn schema() -> String {
    format!(
        "CREATE TABLE effects (job text, step text, name text);
         CREATE TABLE crowds (name text, others text[]);
         CREATE TABLE nothing ();
         CREATE FUNCTION effect(job text, step text) RETURNS void LANGUAGE sql AS $$
           INSERT INTO public.effects VALUES (job, step, current_setting('application_name')) $$;
         CREATE FUNCTION work(job text, step text, pool int, seconds float) RETURNS void LANGUAGE plpgsql AS $$
         DECLARE mine int; BEGIN
           FOR place IN 1..{CAPACITY} LOOP
             IF pg_try_advisory_lock(pool, place) THEN mine := place; EXIT; END IF;
           END LOOP;
           IF mine IS NULL THEN
             INSERT INTO public.crowds SELECT current_setting('application_name'), array_agg(a.application_name)
               FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.classid = pool AND l.granted;
           END IF;
           PERFORM public.effect(job, step);
           PERFORM pg_sleep(seconds);
           IF mine IS NOT NULL THEN PERFORM pg_advisory_unlock(pool, mine); END IF;
         END $$;
         CREATE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           PERFORM pg_sleep(0.3 * random()); RETURN NULL;
         END $$;
         CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION slow_commit();
         CREATE FUNCTION refuse() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE 'it''s \"planned\"'; END $$;
         CREATE TABLE rows (batch text, n int);
         CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON rows DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW WHEN (NEW.n % 40 = 0) EXECUTE FUNCTION slow_commit();
         CREATE FUNCTION row_of(batch text, n int, deed text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
           INSERT INTO public.rows VALUES (batch, n);
           PERFORM pg_sleep(0.002);
           IF deed = 'fail' THEN RAISE 'planned'; END IF;
         END $$;
         CREATE FUNCTION fail_once(name text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
           IF nextval(name::regclass) = 1 THEN RAISE 'once' USING ERRCODE = '40001'; END IF;
         END $$"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_and_a_number_are_one_job_and_every_kind_comes_up() {
        let handlers = [Handler::Program, Handler::Command, Handler::Rust];
        let jobs: Vec<Job> = (0..300).map(|number| Job::plan(3, 1, number, &handlers)).collect();
        let again = Job::plan(3, 1, 17, &handlers);
        assert_eq!(format!("{again:?}"), format!("{:?}", jobs[17]));
        let tasks = handlers.map(Form::Task);
        for form in [&[Form::Single, Form::List, Form::Fallback], &tasks[..]].concat() {
            assert!(jobs.iter().any(|job| job.form == form));
        }
        assert!(jobs.iter().any(|job| job.delay.is_some()) && jobs.iter().any(|job| job.cancel_after.is_some()));
        assert!(jobs.iter().any(|job| !job.sequences().is_empty()));
        assert!(jobs.iter().all(|job| job.query().len() < 4_000));
    }
}
