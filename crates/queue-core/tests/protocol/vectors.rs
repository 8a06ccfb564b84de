//! Black box: the vectors and what is asserted of them may not change while the core is rebuilt.
//!
//! The producer's contract in other languages: what `docs/protocol/vectors.json` says is played against the real scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use queue_core::calls::{Fields, Finished};
use queue_core::job::{FIELDS, TOLD};
use serde::Deserialize;

use crate::support::*;

const VECTORS: &str = include_str!("../../../../docs/protocol/vectors.json");
const PAGE: &str = include_str!("../../../../docs/protocol/README.md");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    protocol: String,
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    name: String,
    shows: String,
    commands: Vec<Vec<Bytes>>,
    take: Vec<Expected>,
    ends: BTreeMap<String, BTreeMap<String, Bytes>>,
    hashes: BTreeMap<String, BTreeMap<String, Bytes>>,
    #[serde(default)]
    rejected: Vec<Rejected>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    id: String,
    user: String,
    pool: String,
    fields: BTreeMap<String, Bytes>,
}

#[derive(Deserialize)]
struct Rejected {
    id: String,
    reason: String,
}

/// A text, bytes in hex, or a repeated text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Bytes {
    Text(String),
    Hex { hex: String },
    Repeat { repeat: (String, usize) },
}

impl Bytes {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Bytes::Text(text) => text.clone().into_bytes(),
            Bytes::Hex { hex } => {
                (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
            }
            Bytes::Repeat { repeat: (text, times) } => text.repeat(*times).into_bytes(),
        }
    }

    /// Whether a value is this one, or of the kind that a word in brackets names.
    fn covers(&self, value: &[u8]) -> bool {
        let text = || std::str::from_utf8(value).unwrap_or_default();
        match self {
            Bytes::Text(word) if word == "<digits>" => !value.is_empty() && value.iter().all(u8::is_ascii_digit),
            Bytes::Text(word) if word == "<time>" => value.len() == 24 && humantime::parse_rfc3339(text()).is_ok(),
            Bytes::Text(word) if word == "<session>" => text().split(':').count() == 3,
            _ => value == self.bytes(),
        }
    }
}

async fn play(vector: &Vector) {
    let Vector { name, shows, commands, take: expected, ends, hashes, rejected } = vector;
    println!("{name}: {shows}");
    let rig = Rig::start().await;
    for command in commands {
        rig.redis(&command.iter().map(Bytes::bytes).collect::<Vec<_>>());
    }
    // What the leader does: whom the index names, it looks at.
    let users = rig.state().queued_users();
    rig.notice(&users.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let session = rig.session("*", 8).await;
    let claims = take(&session, 8).await;
    let wanted: Vec<&str> = expected.iter().map(|job| job.id.as_str()).collect();
    assert_eq!(ids(&claims), wanted, "{name}");
    for (claim, expected) in claims.into_iter().zip(expected) {
        let job = claim.job().clone();
        assert_eq!((job.user.as_str(), job.pool.as_str()), (expected.user.as_str(), expected.pool.as_str()), "{name}");
        let handed: BTreeSet<&str> =
            FIELDS.iter().map(|(field, ..)| *field).filter(|field| job.bytes(field).is_some()).collect();
        let meant: BTreeSet<&str> = expected.fields.keys().map(String::as_str).chain(["status"]).collect();
        assert_eq!(handed, meant, "{name}: fields that are handed out");
        for (field, value) in &expected.fields {
            assert!(value.covers(job.bytes(field).unwrap()), "{name}: {field}");
        }
        if let Some(end) = ends.get(&expected.id) {
            let fields = end.iter().fold(Fields::new(), |fields, (field, value)| {
                let known = ["status", "failed_reason"].into_iter().chain(TOLD.iter().map(|(field, _)| *field));
                fields.with(known.into_iter().find(|known| known == field).expect("workers write it"), value.bytes())
            });
            assert_eq!(claim.finish(final_verdict(), Duration::ZERO, fields, false).await.unwrap(), Finished::Ended);
        }
    }
    for (id, fields) in hashes {
        let (state, record) = (rig.state(), Piece::Job(id));
        let names: BTreeSet<String> = state.fields(record).into_keys().collect();
        assert_eq!(names, fields.keys().cloned().collect(), "{name}: fields of {id}");
        for (field, value) in fields {
            let found = state.field_of(record, field).expect("it was named");
            assert!(value.covers(&found), "{name}: {field} of {id} is {}", found.escape_ascii());
        }
        let is_over = fields.get("status").is_some_and(|status| {
            ["done", "failed", "cancelled"].contains(&String::from_utf8(status.bytes()).unwrap().as_str())
        });
        assert_eq!(state.expires_in_ms(record).is_some(), is_over, "{name}: the record of what is over has a lifetime");
    }
    let told: Vec<(String, String)> = rejected.iter().map(|one| (one.id.clone(), one.reason.clone())).collect();
    assert_eq!(rig.rejected(), told, "{name}");
    rig.balanced();
}

#[tokio::test]
async fn the_vectors_hold() {
    let vectors: Vectors = serde_json::from_str(VECTORS).unwrap();
    let version = format!("{}.{}", queue_core::VERSION_MAJOR, queue_core::VERSION_MINOR);
    assert_eq!(vectors.protocol, version);
    for vector in &vectors.vectors {
        play(vector).await;
    }
    let names: BTreeSet<&str> = vectors.vectors.iter().map(|vector| vector.name.as_str()).collect();
    assert_eq!(names.len(), vectors.vectors.len(), "each has a name of its own");
}

#[test]
fn the_page_tells_every_field_and_its_limit() {
    let fields = FIELDS.iter().map(|(field, most, _)| (field, most));
    for (field, most) in fields.chain(TOLD.iter().map(|(field, most)| (field, most))) {
        let row = PAGE.lines().find(|line| line.starts_with(&format!("| `{field}` |")));
        let row = row.unwrap_or_else(|| panic!("{field} stands in no table"));
        assert_eq!(row.split('|').nth(3).map(str::trim), Some(most.to_string().as_str()), "{row}");
    }
}
