//! The published layout, in which producers, cancellers and readers of other programs work. A rebuilt core keeps it.

use super::{Piece, State};
use crate::redis::Value;

/// The hands and eyes of a program that knows nothing but the published layout. Ids, users and values may be any bytes, as theirs may.
#[derive(Clone, Copy, Debug)]
pub struct Foreign<'a>(pub(super) &'a State);

impl Foreign<'_> {
    /// A whole submission: the record with its user, the push and the announcement. Says nothing that `fields` do not.
    #[track_caller]
    pub fn submit(&self, user: &str, id: &str, fields: &[(&str, &str)]) {
        self.write(id, &[&[("user", user)], fields].concat());
        self.push(user, id);
        self.announce(user);
    }

    /// Writes a job's record, or more of it.
    #[track_caller]
    pub fn write<N: AsRef<[u8]>, V: AsRef<[u8]>>(&self, id: impl AsRef<[u8]>, fields: &[(N, V)]) {
        self.0.set_in(&[b"batch:jobs:", id.as_ref()].concat(), fields);
    }

    /// Pushes an id to the end of a user's queue.
    #[track_caller]
    pub fn push(&self, user: impl AsRef<[u8]>, id: impl AsRef<[u8]>) {
        let queue = [b"batch:queue:", user.as_ref()].concat();
        self.0.ask(&[b"LPUSH", &queue[..], id.as_ref()]);
    }

    /// Pushes an id to the front of a user's queue.
    #[track_caller]
    pub fn push_first(&self, user: &str, id: &str) {
        self.0.ask(&["RPUSH", &Piece::Queue(user).name(), id]);
    }

    /// Removes an id from a user's queue.
    #[track_caller]
    pub fn pull(&self, user: &str, id: &str) {
        self.0.ask(&["LREM", &Piece::Queue(user).name(), "0", id]);
    }

    /// Writes and pushes very many jobs of a user, each with the same fields, in few round trips. Announces none.
    #[track_caller]
    pub fn submit_many(&self, user: &str, ids: &[String], fields: &[(&str, &str)]) {
        let mut client = self.0.client();
        let queue = Piece::Queue(user).name();
        for ids in ids.chunks(1_000) {
            for id in ids {
                let job = Piece::Job(id).name();
                let mut hset = vec!["HSET", &job, "user", user];
                fields.iter().for_each(|(name, value)| hset.extend([*name, *value]));
                client.send(&hset).and_then(|()| client.send(&["LPUSH", &queue, id])).expect("a connection");
            }
            for _ in 0..2 * ids.len() {
                let reply = client.receive().expect("a reply");
                assert!(!matches!(reply, Value::Error(_)), "{reply}");
            }
        }
    }

    /// Names a user in the index of queues.
    #[track_caller]
    pub fn index(&self, user: impl AsRef<[u8]>) {
        self.0.ask(&[b"SADD", Piece::QueuedUsers.name().as_bytes(), user.as_ref()]);
    }

    /// Announces a user: by the index and by the message.
    #[track_caller]
    pub fn announce(&self, user: impl AsRef<[u8]>) {
        self.index(user.as_ref());
        self.publish(user);
    }

    /// The message alone.
    #[track_caller]
    pub fn publish(&self, user: impl AsRef<[u8]>) {
        self.0.ask(&[b"PUBLISH", ANNOUNCEMENTS.as_bytes(), user.as_ref()]);
    }

    /// How many hear announcements.
    #[track_caller]
    pub fn hearers(&self) -> usize {
        self.0.subscribers(ANNOUNCEMENTS)
    }

    /// Pushes an id to a host's queue in the layout that is older than queues of users.
    #[track_caller]
    pub fn push_to_host(&self, host: &str, id: &str) {
        self.0.ask(&["LPUSH", &format!("batch:queues:{host}"), id]);
    }

    /// Takes the lock under which a foreign worker schedules a host.
    #[track_caller]
    pub fn lock_host(&self, host: &str, token: &str) {
        self.0.ask(&["SET", &host_lock(host), token]);
    }

    /// Lets go of that lock.
    #[track_caller]
    pub fn unlock_host(&self, host: &str) {
        self.0.ask(&["DEL", &host_lock(host)]);
    }

    /// Who holds that lock.
    #[track_caller]
    pub fn host_lock(&self, host: &str) -> Option<String> {
        let reply = self.0.ask(&["GET", &host_lock(host)]);
        (!reply.is_nil()).then(|| reply.text())
    }

    /// Has readers see a job as one that a user has running.
    #[track_caller]
    pub fn show_working(&self, user: &str, id: &str) {
        self.0.ask(&["RPUSH", &Piece::Working(user).name(), id]);
    }

    /// What readers see of a user's running jobs.
    #[track_caller]
    pub fn working(&self, user: &str) -> Vec<String> {
        self.0.ask(&["LRANGE", &Piece::Working(user).name(), "0", "-1"]).texts()
    }

    /// The users of whom readers see running jobs.
    #[track_caller]
    pub fn working_users(&self) -> Vec<String> {
        self.0.members(Piece::WorkingUsers)
    }
}

const ANNOUNCEMENTS: &str = "batch:users";

fn host_lock(host: &str) -> String {
    format!("batch:locks:{host}")
}
