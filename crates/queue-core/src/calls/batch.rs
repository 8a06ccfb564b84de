//! The functions of batches: typed calls and replies.

use super::{Args, Fields, Mark, expect_len};
use crate::error::Error;
use crate::ids::{Fence, JobId, SessionId, User};
use crate::library::{BATCH_ABORT, BATCH_CUT, BATCH_LOAD, BATCH_READ, BATCH_RELEASE, BATCH_UNLOAD};
use crate::model::Status;
use crate::model::batch::BlockName;
use crate::reply::Reply;
use crate::store::Store;

/// A block on its way.
#[derive(Debug, Clone)]
pub(crate) struct PackedBlock {
    pub(crate) packed: Vec<u8>,
    pub(crate) rows: usize,
    pub(crate) first_line: u64,
    pub(crate) last_line: u64,
}

/// Blocks of a load, and what is to become of it.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) batch: JobId,
    pub(crate) user: User,
    pub(crate) key: String,
    /// Place of the first block in the load.
    pub(crate) place: u64,
    pub(crate) blocks: Vec<PackedBlock>,
    /// The load is complete with these.
    pub(crate) is_end: bool,
    /// The batch is released at the end.
    pub(crate) is_release: bool,
    pub(crate) max_rows: u64,
    pub(crate) max_bytes: u64,
    pub(crate) keep_ms: u64,
    /// The fields of the batch, where it may be new.
    pub(crate) new: Option<Fields>,
}

/// What became of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// They are there; so many rows has the batch.
    Taken(u64),
    /// The load was complete before; where the batch stands, and its rows.
    Exists(Status, u64),
    Missing,
    Refused(String),
    Over(Status),
    Differs,
    TooMany {
        what: String,
        most: u64,
    },
    NoRoom {
        used: u64,
        mark: u64,
    },
}

/// What became of a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Released {
    /// It is released now, with so many rows.
    Now(u64),
    /// It was released before.
    Before(Status, u64),
    Over(Status),
    Missing,
}

/// What became of an abort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Aborted {
    Now,
    Over(Status),
    Missing,
}

/// One block as it is read.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReadBlock {
    /// Its rows, packed, if they were asked for.
    pub(crate) rows: Vec<u8>,
    /// What became of its chunks: the first row of each, and results, packed.
    pub(crate) results: Vec<(usize, Vec<u8>)>,
}

fn status(reply: Option<&Reply>, function: &'static str) -> Result<Status, Error> {
    let text = reply.and_then(Reply::lossy).unwrap_or_default();
    text.parse().map_err(|_| Error::Reply { function, reply: text })
}

fn number(reply: Option<&Reply>, function: &'static str) -> Result<u64, Error> {
    Ok(reply.unwrap_or(&Reply::Nil).int(function)?.max(0) as u64)
}

impl Store {
    pub(crate) async fn batch_load(&self, load: &Load) -> Result<Loaded, Error> {
        const NAME: &str = "batch_load";
        let mut args = Args::new()
            .text(load.batch.as_str())
            .text(load.user.as_str())
            .text(&load.key)
            .number(load.place)
            .text(if load.is_end { "end" } else { "more" })
            .text(if load.is_release { "release" } else { "hold" })
            .number(load.max_rows)
            .number(load.max_bytes)
            .number(load.keep_ms)
            .text(if load.new.is_some() { "new" } else { "append" })
            .counted_fields(load.new.as_ref().unwrap_or(&Fields::new()));
        for block in &load.blocks {
            args = args
                .text(&block.packed)
                .number(block.rows as u64)
                .number(block.packed.len() as u64)
                .number(block.first_line)
                .number(block.last_line);
        }
        let reply = self.call(&BATCH_LOAD, args.0).await?;
        match reply.text() {
            Some("missing") => return Ok(Loaded::Missing),
            Some("differs") => return Ok(Loaded::Differs),
            _ => {}
        }
        let items = reply.array(NAME)?;
        let (one, two) = (items.get(1), items.get(2));
        match items.first().and_then(Reply::text) {
            Some("loaded") => Ok(Loaded::Taken(number(one, NAME)?)),
            Some("exists") => Ok(Loaded::Exists(status(one, NAME)?, number(two, NAME)?)),
            Some("refused") => Ok(Loaded::Refused(one.and_then(Reply::lossy).unwrap_or_default())),
            Some("over") => Ok(Loaded::Over(status(one, NAME)?)),
            Some("too_many") => {
                let what = one.and_then(Reply::lossy).unwrap_or_default();
                Ok(Loaded::TooMany { what, most: number(two, NAME)? })
            }
            Some("no_room") => Ok(Loaded::NoRoom { used: number(one, NAME)?, mark: number(two, NAME)? }),
            _ => Err(Reply::Array(items).unexpected(NAME)),
        }
    }

    pub(crate) async fn batch_unload(&self, batch: &JobId, key: &str) -> Result<bool, Error> {
        Ok(self.call(&BATCH_UNLOAD, Args::new().text(batch.as_str()).text(key).0).await?.int("batch_unload")? == 1)
    }

    pub(crate) async fn batch_release(&self, batch: &JobId, keep_ms: u64) -> Result<Released, Error> {
        const NAME: &str = "batch_release";
        let reply = self.call(&BATCH_RELEASE, Args::new().text(batch.as_str()).number(keep_ms).0).await?;
        if reply.text() == Some("missing") {
            return Ok(Released::Missing);
        }
        let items = reply.array(NAME)?;
        match items.first().and_then(Reply::text) {
            Some("released") => Ok(Released::Now(number(items.get(1), NAME)?)),
            Some("before") => Ok(Released::Before(status(items.get(1), NAME)?, number(items.get(2), NAME)?)),
            Some("over") => Ok(Released::Over(status(items.get(1), NAME)?)),
            _ => Err(Reply::Array(items).unexpected(NAME)),
        }
    }

    pub(crate) async fn batch_abort(&self, batch: &JobId, keep_ms: u64) -> Result<Aborted, Error> {
        const NAME: &str = "batch_abort";
        let reply = self.call(&BATCH_ABORT, Args::new().text(batch.as_str()).number(keep_ms).0).await?;
        if reply.text() == Some("missing") {
            return Ok(Aborted::Missing);
        }
        let items = reply.array(NAME)?;
        match items.first().and_then(Reply::text) {
            Some("aborted") => Ok(Aborted::Now),
            Some("over") => Ok(Aborted::Over(status(items.get(1), NAME)?)),
            _ => Err(Reply::Array(items).unexpected(NAME)),
        }
    }

    /// Leaves the rows of a chunk behind the first `keep` to others. Of both sides: what became of them so far, and the counts of it.
    pub(crate) async fn batch_cut(
        &self,
        session: &SessionId,
        id: &JobId,
        fence: Fence,
        keep: usize,
        kept: (Vec<u8>, String),
        rest: (Vec<u8>, String),
    ) -> Result<Mark, Error> {
        let args = Args::new().text(session.as_str()).text(id.as_str()).number(fence.0).number(keep as u64);
        let reply = self.call(&BATCH_CUT, args.text(kept.0).text(kept.1).text(rest.0).text(rest.1).0).await?;
        match reply.text() {
            Some("cut") => Ok(Mark::Held),
            Some("over") => Ok(Mark::CancelAsked),
            Some("stale") => Ok(Mark::Stale),
            _ => Err(reply.unexpected("batch_cut")),
        }
    }

    pub(crate) async fn batch_read(
        &self,
        batch: &JobId,
        rows: bool,
        results: bool,
        blocks: &[BlockName],
    ) -> Result<Vec<ReadBlock>, Error> {
        const NAME: &str = "batch_read";
        let args = Args::new().text(batch.as_str()).number(u8::from(rows)).number(u8::from(results));
        let args = blocks.iter().fold(args, |args, block| args.text(block.to_string()));
        let replies = self.call(&BATCH_READ, args.0).await?.array(NAME)?;
        expect_len(&replies, blocks.len(), NAME)?;
        let read = |reply: Reply| {
            let mut items = reply.array(NAME)?.into_iter();
            let mut block =
                ReadBlock { rows: items.next().and_then(Reply::into_bytes).unwrap_or_default(), ..Default::default() };
            while let (Some(first), Some(results)) = (items.next(), items.next()) {
                block.results.push((number(Some(&first), NAME)? as usize, results.into_bytes().unwrap_or_default()));
            }
            Ok(block)
        };
        replies.into_iter().map(read).collect()
    }
}
