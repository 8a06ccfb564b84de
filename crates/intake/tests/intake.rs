//! The intake as a process: files come into folders, and each is one batch, whatever happens to the daemon.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use queue_core::batch::{BatchFilter, BatchView, Batches, Which};
use queue_core::config::{Limits, RedisConfig, Url};
use queue_core::ids::JobId;
use queue_core::model::Status;
use queue_core::store::Store;
use serde_json::{Value, json};
use testkit::{Daemon, RedisServer, Scratch, Signal, bin, end_of, eventually};
use worker::builder::Worker;
use worker::execute::function::Context;
use worker::execute::task::Problem;
use worker::shutdown::Shutdown;

const DB: u8 = 5;
/// What most folders say.
const BOOK: &str = "user = 'ann'\napp = 'bank'\nop = 'book'\nmin_age = '0s'\n";

struct House {
    redis: RedisServer,
    folder: Scratch,
    batches: Batches,
}

impl House {
    async fn build() -> Self {
        let redis = RedisServer::start();
        let url = Url::new(redis.url_db(DB));
        let config = RedisConfig { url, command_timeout: Duration::from_secs(30), ..RedisConfig::default() };
        let store = Store::connect(&config).await.unwrap();
        let folder = Scratch::new("intake");
        fs::create_dir(folder.path().join("in")).unwrap();
        let batches = Batches::new(store, Limits::default());
        Self { redis, folder, batches }
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join("in").join(name)
    }

    /// Puts a file into the folder at once and whole.
    fn put(&self, name: impl AsRef<Path>, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let hidden = path.with_file_name(".coming");
        fs::write(&hidden, text).unwrap();
        fs::rename(hidden, path).unwrap();
    }

    /// A configuration with what is said of its folders besides where they are: `folders` are the lines of each.
    fn config(&self, folders: &[&str]) -> PathBuf {
        let path = self.folder.path().join("intake.toml");
        let mut text = format!(
            "[redis]\nurl = '{}'\ncommand_timeout = '30s'\n[intake]\npoll_interval = '50ms'\n[objects]\nurl = 'file://{}/objects'\n",
            self.redis.url_db(DB),
            self.folder.path().display()
        );
        for lines in folders {
            text += &format!("[[folders]]\nfolder = '{}'\n{lines}\n", self.folder.path().join("in").display());
        }
        fs::write(&path, text).unwrap();
        path
    }

    fn start(&self, folders: &[&str]) -> Daemon {
        self.start_with(&self.config(folders))
    }

    fn start_with(&self, config: &Path) -> Daemon {
        Daemon::spawn(bin("drayman-intake"), &[OsStr::new("--config"), config.as_os_str()], &[])
    }

    async fn list(&self) -> Vec<BatchView> {
        self.batches.list(&BatchFilter::default(), 1_000).await.unwrap()
    }

    /// Waits until there are so many batches; returns them by their files.
    async fn sources(&self, count: usize) -> BTreeMap<String, BatchView> {
        let list = eventually(&format!("{count} batches"), async || {
            let list = self.list().await;
            // One without rows is still being loaded.
            (list.len() == count && list.iter().all(|view| view.counts.rows > 0)).then_some(list)
        })
        .await;
        list.into_iter().map(|view| (view.source.clone().unwrap(), view)).collect()
    }

    async fn rows(&self, batch: &str) -> Vec<(u64, Value)> {
        let page = self.batches.rows(&JobId::new(batch).unwrap(), Which::All, None, 1_000).await.unwrap();
        page.rows.iter().map(|row| (row.at.line, serde_json::from_slice(&row.input).unwrap())).collect()
    }

    /// Waits until a file is there, and reads it.
    async fn text(&self, name: &str) -> String {
        let path = self.path(name);
        eventually(&format!("file {name}"), async || fs::read_to_string(&path).ok()).await
    }

    /// Waits until nothing is claimed any more.
    async fn settled(&self) {
        eventually("no claims", async || {
            let claims = fs::read_dir(self.path(".drayman"));
            claims.map_or(true, |mut claims| claims.next().is_none()).then_some(())
        })
        .await;
    }

    /// All files below the folder, without those that are hidden by themselves.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, files: &mut Vec<String>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.symlink_metadata().unwrap().is_dir() {
                    true => walk(&path, root, files),
                    false => files.push(path.strip_prefix(root).unwrap().to_string_lossy().into_owned()),
                }
            }
        }
        let mut files = Vec::new();
        walk(&self.path(""), &self.path(""), &mut files);
        files.sort();
        files
    }
}

fn stop(daemon: &Daemon) {
    // Before it listens to signals one ends it as it would any program.
    daemon.wait_for_line("taking files in");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.output());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_becomes_a_batch_with_the_lines_of_the_file_and_goes_to_the_archive() {
    let house = House::build().await;
    let mut config = worker::config::Config::default();
    config.redis.url = Url::new(house.redis.url_db(DB));
    config.objects.url = Url::new(format!("file://{}/objects", house.folder.path().display()));
    config.worker.pools.clear();
    let shutdown = Shutdown::new();
    let handler = |row: Value, context: Context| async move {
        context.file("names", format!("{} {}", context.line().unwrap(), row["name"].as_str().unwrap()));
        Ok::<_, Problem>(json!(row["name"]))
    };
    let worker = Worker::builder().config(config).handler("bank", "book", handler);
    let worker = tokio::spawn(worker.run(shutdown.clone()));

    house.put("day.csv", "id,name\n1,ann\n\n2,\"bob\nor so\"\n3,eve\n");
    let daemon = house.start(&[&format!("{BOOK}context = {{ day = 'monday' }}\ntags = ['nightly']\nkeep = '7d'")]);
    assert_eq!(house.text(".archive/day.csv").await, "id,name\n1,ann\n\n2,\"bob\nor so\"\n3,eve\n");
    let batch = house.sources(1).await.remove("day.csv").unwrap();
    let view =
        end_of("the batch ends", house.batches.wait(&JobId::new(batch.id.clone()).unwrap(), None)).await.unwrap();
    assert_eq!((view.status, view.user.as_str(), view.tags), (Status::Done, "ann", vec!["nightly".to_owned()]));
    let rows = house.rows(&batch.id).await;
    assert_eq!(rows.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 4, 6]);
    assert_eq!(rows[1].1, json!({ "id": "2", "name": "bob\nor so" }));
    assert_eq!(view.files["names"].bytes, "2 ann\n4 bob\nor so\n6 eve\n".len() as u64);
    let context = house.redis.state(DB).field(batch.id.as_str(), "batch_context").unwrap();
    assert_eq!(context, r#"{"day":"monday"}"#);
    house.settled().await;
    stop(&daemon);
    shutdown.drain().cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_comes_again_is_another_batch_and_takes_no_other_file_s_place() {
    let house = House::build().await;
    let daemon = house.start(&[&format!("{BOOK}pattern = '**/*.jsonl'\n")]);
    house.put("a.jsonl", "1\n");
    house.put("north/a.jsonl", "2\n");
    house.put("south/deep/a.jsonl", "3\n");
    house.sources(3).await;
    house.settled().await;
    house.put("a.jsonl", "4\n");
    eventually("the fourth batch", async || (house.list().await.len() == 4).then_some(())).await;
    house.settled().await;
    let mut inputs = Vec::new();
    for batch in house.list().await {
        inputs.extend(house.rows(&batch.id).await.into_iter().map(|(_, row)| (row, batch.source.clone().unwrap())));
    }
    inputs.sort_by_key(|(row, _)| row.as_u64());
    let wanted = [(1, "a.jsonl"), (2, "north/a.jsonl"), (3, "south/deep/a.jsonl"), (4, "a.jsonl")];
    assert_eq!(inputs, wanted.map(|(row, source)| (json!(row), source.to_owned())));
    let files = house.files();
    assert_eq!(files.len(), 4, "{files:?}");
    for (name, text) in [("a.jsonl", "1\n"), ("north/a.jsonl", "2\n"), ("south/deep/a.jsonl", "3\n")] {
        assert_eq!(house.text(&format!(".archive/{name}")).await, text);
    }
    let again = files.iter().find(|name| name.starts_with(".archive/a.jsonl.")).unwrap();
    assert_eq!(house.text(again).await, "4\n");
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_is_moved_aside_once_with_its_reason_and_what_is_no_file_is_left_alone() {
    let house = House::build().await;
    let bad = [
        ("fields.csv", "a,b\n1,2\n3\n", "line 3: it has 1 fields, the header has 2\n"),
        ("empty.csv", "", "line 1: there is no header\n"),
        ("open.csv", "a\n1\n\"2\n", "line 3: a quote is not closed\n"),
        ("behind.csv", "a,b\n1,\"2\n3,\"4\"\n", "line 2: text follows a closing quote\n"),
        ("twice.csv", "a,b,a\n1,2,3\n", "line 1: the header names \"a\" twice\n"),
        ("names.jsonl", "1\n{\"n\":1,\"n\":2}\n", "line 2: it names \"n\" twice\n"),
        ("nul.txt", "a\nb\0\n", "line 2: it has a NUL byte\n"),
        ("words.jsonl", "1\n2\nthree\n", "line 3: it is no JSON: "),
        ("strange.xml", "<a/>", "its name ends with none of .csv"),
    ];
    for (name, text, _) in bad {
        house.put(name, text);
    }
    let long = format!("1\n\"{}\"\n", "x".repeat(1 << 17));
    house.put("long.jsonl", &long);
    house.put(OsStr::from_bytes(b"caf\xe9.jsonl"), "1\n");
    fs::create_dir(house.path("folder.csv")).unwrap();
    let elsewhere = house.folder.path().join("secret.csv");
    fs::write(&elsewhere, "a\n1\n").unwrap();
    symlink(&elsewhere, house.path("link.csv")).unwrap();
    let daemon = house.start(&[BOOK]);
    for (name, text, reason) in bad {
        let told = house.text(&format!(".failed/{name}.reason")).await;
        assert!(told.starts_with(reason), "{name}: {told}");
        assert_eq!(house.text(&format!(".failed/{name}")).await, text);
    }
    assert_eq!(house.text(".failed/long.jsonl.reason").await, "line 2: it has more than 65536 bytes\n");
    house.settled().await;
    let moved = fs::read_dir(house.path(".failed")).unwrap().map(|entry| entry.unwrap().file_name());
    let moved: Vec<_> = moved.filter(|name| name.as_bytes().starts_with(b"caf\xe9")).collect();
    assert_eq!(moved.len(), 2, "the file whose name is no text, and its reason: {moved:?}");
    // Another file comes through, and nothing was done to these again meanwhile.
    house.put("good.jsonl", "1\n");
    house.sources(1).await;
    house.settled().await;
    stop(&daemon);
    let output = daemon.output();
    assert_eq!(output.matches("it is moved aside").count(), bad.len() + 2, "{output}");
    assert!(house.path("folder.csv").is_dir() && house.path("link.csv").is_symlink() && elsewhere.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_can_not_be_used_are_left_out_where_that_is_wanted_and_the_others_keep_their_numbers() {
    let house = House::build().await;
    house.put("day.csv", "a,b\n1,2\n3\n5,6\n");
    house.put("none.csv", "a,b\n1\n");
    house.put("good.csv", "a,b\n1,2\n");
    // Who passed over this row would lose those behind it.
    house.put("torn.csv", "a,b\n1,\"2\n3,4\n5,6\n");
    let daemon = house.start(&[&format!("{BOOK}bad_lines = 'skip'")]);
    assert_eq!(house.text(".failed/torn.csv.reason").await, "line 2: a quote is not closed\n");
    let report = house.text(".archive/day.csv.bad.jsonl").await;
    let wanted = json!({ "line": 3, "reason": "it has 1 fields, the header has 2", "text": "3" });
    assert_eq!(serde_json::from_str::<Value>(&report).unwrap(), wanted);
    let told = house.text(".failed/none.csv.reason").await;
    assert_eq!(told, "none of its lines can be used: line 2: it has 1 fields, the header has 2\n");
    let batch = house.sources(2).await.remove("day.csv").unwrap();
    let wanted = [(2, json!({ "a": "1", "b": "2" })), (4, json!({ "a": "5", "b": "6" }))];
    assert_eq!(house.rows(&batch.id).await, wanted);
    house.settled().await;
    assert!(!house.path(".archive/good.csv.bad.jsonl").exists());
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_belongs_to_the_first_pattern_that_wants_it_also_if_it_is_bad() {
    let house = House::build().await;
    house.put("bank-1.csv", "a\n1\n");
    house.put("bank-2.csv", "a\n1,2\n");
    house.put("other.csv", "a;b\n1;2\n");
    house.put("note.log", "not wanted");
    let second =
        "user = 'bob'\nstatement = 'SELECT :a'\ndatabase = 'main'\ndelimiter = ';'\nmin_age = '0s'\nheld = true\n";
    let daemon = house.start(&[&format!("{BOOK}pattern = 'bank-*.csv'"), &format!("{second}pattern = '*.csv'")]);
    let sources = house.sources(2).await;
    assert_eq!((sources["bank-1.csv"].user.as_str(), sources["other.csv"].user.as_str()), ("ann", "bob"));
    assert_eq!(sources["other.csv"].status, Status::Held);
    assert_eq!(house.text(".failed/bank-2.csv.reason").await, "line 2: it has 2 fields, the header has 1\n");
    house.settled().await;
    assert_eq!(house.text("note.log").await, "not wanted");
    assert_eq!(house.list().await.len(), 2);
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_still_written_is_left_alone() {
    const STILL: Duration = Duration::from_millis(700);
    let house = House::build().await;
    let daemon = house.start(&[&BOOK.replace("0s", "700ms")]);
    // As a slow program writes it, for three times as long as a file must have stood still. On a busy machine this writer may
    // itself stand still for so long: then the next file tells.
    for attempt in 1.. {
        let name = format!("slow-{attempt}.jsonl");
        let mut file = fs::File::create(house.path(&name)).unwrap();
        let (begun, mut longest) = (Instant::now(), Duration::ZERO);
        let mut rows = 0;
        while begun.elapsed() < 3 * STILL {
            let before = Instant::now();
            rows += 1;
            writeln!(file, "{rows}").unwrap();
            tokio::time::sleep(STILL / 10).await;
            longest = longest.max(before.elapsed());
        }
        let batch = house.sources(attempt).await.remove(&name).unwrap();
        if longest < STILL / 2 {
            assert_eq!(batch.counts.rows, rows);
            break;
        }
    }
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_daemons_share_a_folder_and_each_file_is_one_batch() {
    let house = House::build().await;
    let config = house.config(&[BOOK]);
    let daemons = [house.start_with(&config), house.start_with(&config), house.start_with(&config)];
    // Until more than one of them has taken files.
    let mut count = 0;
    let takers = || daemons.iter().filter(|daemon| daemon.output().contains("it is a batch")).count();
    while count < 200 || takers() < 2 {
        assert!(count < 900, "one of them took all");
        for n in count..count + 100 {
            house.put(format!("{n}.jsonl"), &format!("{n}\n{n}\n"));
        }
        count += 100;
        let sources = house.sources(count).await;
        assert_eq!(sources.len(), count, "each file is one batch");
        assert!(sources.values().all(|view| view.counts.rows == 2));
    }
    house.settled().await;
    assert_eq!(house.list().await.len(), count);
    let files = house.files();
    assert!(files.len() == count && files.iter().all(|name| name.starts_with(".archive/")), "{files:?}");
    for daemon in &daemons {
        stop(daemon);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_daemons_leave_each_file_one_batch_or_one_reason() {
    let house = House::build().await;
    let config = house.config(&[&format!("{BOOK}bad_lines = 'skip'")]);
    let rows: String = (0..400).map(|n| format!("{{\"row\":{n},\"text\":\"{}\"}}\n", "x".repeat(200))).collect();
    for n in 0..60 {
        match n % 3 {
            0 => house.put(format!("{n}.jsonl"), &rows),
            1 => house.put(format!("{n}.jsonl"), &format!("nothing\n{rows}")),
            _ => house.put(format!("{n}.jsonl"), "nothing\n"),
        }
    }
    let left =
        || fs::read_dir(house.path("")).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_file()).count();
    let mut kills = 0;
    // Beyond these kills it may go on undisturbed.
    while (left() > 0 || fs::read_dir(house.path(".drayman")).is_ok_and(|mut claims| claims.next().is_some()))
        && kills < 300
    {
        let daemon = house.start_with(&config);
        // Another moment of its life each time, from its start on to beyond its first files.
        daemon.wait_for_line("taking files in");
        tokio::time::sleep(Duration::from_micros(kills * 3_700 % 60_000)).await;
        daemon.kill9();
        kills += 1;
    }
    let daemon = house.start_with(&config);
    eventually("no files", async || (left() == 0).then_some(())).await;
    house.settled().await;
    assert!(kills > 5, "{kills} kills");
    let sources = house.sources(40).await;
    assert_eq!(sources.len(), 40, "each good file is one batch");
    assert!(sources.values().all(|view| view.counts.rows == 400 && view.status == Status::Pending));
    let files = house.files();
    let count =
        |start: &str, end: &str| files.iter().filter(|name| name.starts_with(start) && name.ends_with(end)).count();
    assert_eq!((count(".archive/", ".jsonl"), count(".failed/", ".jsonl"), count(".failed/", ".reason")), (60, 20, 20));
    assert_eq!(count(".archive/", ".bad.jsonl"), 20, "{files:?}");
    assert_eq!(files.len(), 100, "{files:?}");
    // No load is left half done.
    assert_eq!(house.redis.state(DB).batches_with_rows().len(), 40);
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_redis_is_away_files_stay_where_they_are_claimed_and_no_file_is_bad_for_it() {
    let house = House::build().await;
    // Each call is given up soon: the daemon tries several, and a minute later it would be the same.
    let config = house.config(&[BOOK]);
    fs::write(&config, fs::read_to_string(&config).unwrap().replace("'30s'", "'500ms'")).unwrap();
    let daemon = house.start_with(&config);
    daemon.wait_for_line("taking files in");
    house.redis.kill();
    house.put("a.jsonl", "1\n2\n");
    daemon.wait_for_line("it is tried again");
    // It can be stopped meanwhile, and another goes on.
    stop(&daemon);
    house.redis.restart();
    let daemon = house.start_with(&config);
    let batch = house.sources(1).await.remove("a.jsonl").unwrap();
    assert_eq!(batch.counts.rows, 2);
    house.settled().await;
    assert_eq!(house.files(), [".archive/a.jsonl"]);
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_can_not_be_moved_is_handed_over_once_and_moved_when_it_can() {
    let house = House::build().await;
    let elsewhere = house.folder.path().join("archive");
    fs::write(&elsewhere, "in the way").unwrap();
    let folders = format!("{BOOK}archive = '{}'", elsewhere.display());
    let daemon = house.start(&[&folders]);
    house.put("a.jsonl", "1\n");
    daemon.wait_for_line("it can't be moved to where it belongs");
    house.sources(1).await;
    // Nobody remembers the batch: neither for that is the file another one.
    let batch = house.list().await.remove(0);
    house.redis.raw_db(DB, &["FLUSHDB"]);
    fs::remove_file(&elsewhere).unwrap();
    eventually("the file in its archive", async || fs::read_to_string(elsewhere.join("a.jsonl")).ok()).await;
    house.settled().await;
    assert!(house.list().await.is_empty(), "{batch:?}");
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_to_the_object_store_or_are_deleted_where_that_is_wanted() {
    let house = House::build().await;
    let objects = format!("{BOOK}pattern = 'keep/*'\narchive = 'objects:taken-in'\nfailed = 'objects:refused'");
    let daemon = house.start(&[&objects, &format!("{BOOK}pattern = '*'\narchive = 'delete'")]);
    house.put("keep/a.jsonl", "1\n");
    house.put("keep/b.jsonl", "one\n");
    house.put("c.jsonl", "1\n");
    let sources = house.sources(2).await;
    house.settled().await;
    eventually("no files", async || house.files().is_empty().then_some(())).await;
    let store = house.folder.path().join("objects");
    let kept = store.join("taken-in").join(&sources["keep/a.jsonl"].id).join("keep/a.jsonl");
    assert_eq!(fs::read_to_string(kept).unwrap(), "1\n");
    let refused = fs::read_dir(store.join("refused")).unwrap().next().unwrap().unwrap().path().join("keep");
    assert_eq!(fs::read_to_string(refused.join("b.jsonl")).unwrap(), "one\n");
    assert!(fs::read_to_string(refused.join("b.jsonl.reason")).unwrap().starts_with("line 1: it is no JSON"));
    stop(&daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checker_decides_what_becomes_of_a_file_and_nobody_decides_while_it_is_not_there() {
    let house = House::build().await;
    house.put("good.jsonl", "1\n2\n");
    house.put("bad.jsonl", "13\n");
    house.put("other.jsonl", "1\n");
    house.put("panic.jsonl", "1\n");
    house.put("unchecked.csv", "a\n1\n");
    let checked = format!("{BOOK}pattern = '*.jsonl'\nchecker = 'bank.check'\ncontext = {{ a = 1 }}");
    let daemon = house.start(&[&checked, BOOK]);
    // Files without a checker do not wait for those that have one.
    house.sources(1).await;
    let mut config = worker::config::Config::default();
    config.redis.url = Url::new(house.redis.url_db(DB));
    config.worker.pools.clear();
    let shutdown = Shutdown::new();
    let handler = |asked: Value, _: Context| async move {
        assert_eq!(asked["context"], json!({ "a": 1 }));
        // It may read the file itself, or judge by its beginning.
        let text = fs::read_to_string(asked["path"].as_str().unwrap()).unwrap();
        assert_eq!(text.lines().map(|line| json!(line)).collect::<Vec<_>>(), *asked["head"].as_array().unwrap());
        assert_eq!(asked["bytes"], json!(text.len()));
        match asked["file"].as_str().unwrap() {
            "bad.jsonl" => Ok(json!({ "ok": false, "reason": "thirteen" })),
            "other.jsonl" => Ok(json!({ "ok": true, "op": "post", "context": { "b": 2 } })),
            "panic.jsonl" => Err(Problem::fail("out of order")),
            _ => Ok(Value::Null),
        }
    };
    let worker = Worker::builder().config(config).handler("bank", "check", handler);
    let worker = tokio::spawn(worker.run(shutdown.clone()));
    let sources = house.sources(3).await;
    assert_eq!(house.text(".failed/bad.jsonl.reason").await, "its checker refused it: thirteen\n");
    assert_eq!(house.text(".failed/panic.jsonl.reason").await, "its checker failed: out of order\n");
    assert_eq!(sources["good.jsonl"].op.as_deref(), Some("book"));
    let other = &sources["other.jsonl"];
    assert_eq!(other.op.as_deref(), Some("post"));
    let context = house.redis.state(DB).field(other.id.as_str(), "batch_context").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&context).unwrap(), json!({ "b": 2 }));
    house.settled().await;
    stop(&daemon);
    shutdown.drain().cancel();
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_is_never_in_memory() {
    let house = House::build().await;
    let mut file = std::io::BufWriter::new(fs::File::create(house.path(".large")).unwrap());
    for n in 0..300_000 {
        writeln!(file, "{{\"n\":{n},\"text\":\"{}\"}}", "x".repeat(100)).unwrap();
    }
    file.into_inner().unwrap();
    fs::rename(house.path(".large"), house.path("large.jsonl")).unwrap();
    let daemon = house.start(&[BOOK]);
    let batch = house.sources(1).await.remove("large.jsonl").unwrap();
    assert_eq!(batch.counts.rows, 300_000);
    house.settled().await;
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 60_000, "{peak} KiB at most, for a file of 36 MB");
    stop(&daemon);
}

#[test]
fn a_configuration_is_checked_without_a_server_and_refused_by_name() {
    let folder = Scratch::new("intake");
    let run = |text: &str, flag: &str| {
        let path = folder.path().join("intake.toml");
        fs::write(&path, text).unwrap();
        let daemon = Daemon::spawn(bin("drayman-intake"), &["--config", path.to_str().unwrap(), flag], &[]);
        (daemon.wait().code(), daemon.output())
    };
    let good = "[[folders]]\nfolder = '/in'\nuser = 'ann'\napp = 'bank'\nop = 'book'\n";
    assert_eq!(run(good, "--check-config"), (Some(0), "the configuration can be used".into()));
    let (code, printed) = run(good, "--print-config");
    assert_eq!(code, Some(0));
    assert!(printed.contains("archive = \".archive\""), "{printed}");
    assert_eq!(run(&printed, "--check-config").0, Some(0), "what is printed can be read");
    let (code, output) = run("[intake]\npoll = 3", "--check-config");
    assert!(code == Some(2) && output.contains("unknown key intake.poll"), "{output}");
    let (code, output) = run("", "--check-config");
    assert!(code == Some(2) && output.starts_with("drayman-intake: "), "{output}");
}
