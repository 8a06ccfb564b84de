//! The moves of jobs as they happen. Events are hints; the hash of a job is the truth.

use tokio::sync::mpsc;

use crate::error::Error;
use crate::store::{Message, Store};

/// One move of one job.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Event {
    /// Whose job.
    pub user: String,
    /// Which job.
    pub id: String,
    /// Its new status.
    pub status: String,
}

/// What a listener hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A job has moved.
    Move(Event),
    /// The connection was lost and is there again: moves may have been missed.
    Gap,
}

/// Events of some users, or of all.
#[derive(Debug)]
pub struct Events {
    messages: mpsc::Receiver<Message>,
    prefix: usize,
}

impl Events {
    /// Starts to listen to the jobs of these users; to everybody's if none is named.
    pub async fn listen(store: &Store, users: &[&str]) -> Result<Self, Error> {
        let keys = store.keys();
        let channels: Vec<String> = users.iter().map(|user| keys.events(user)).collect();
        let patterns = if channels.is_empty() { vec![keys.events("*")] } else { Vec::new() };
        let messages = store.subscribe(&channels, &patterns).await?;
        Ok(Self { messages, prefix: keys.events("").len() })
    }

    /// The next event; `None` when the connection was closed for good.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Heard::Move(event) = self.hear().await? {
                return Some(event);
            }
        }
    }

    /// The next event, or that events may have been missed; `None` when the connection was closed for good.
    pub async fn hear(&mut self) -> Option<Heard> {
        loop {
            let message = self.messages.recv().await?;
            if message.is_gap() {
                return Some(Heard::Gap);
            }
            let Some(user) = message.channel.get(self.prefix..) else { continue };
            if let Some((id, status)) = message.text.split_once(' ') {
                let event = Event { user: user.to_owned(), id: id.to_owned(), status: status.to_owned() };
                return Some(Heard::Move(event));
            }
        }
    }
}
