//! Handing over the rows of a file, piece by piece, or taking them back.

use console::Failure;
use queue_core::batch::{Loaded, Loader};
use rows::Piece;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::failure;
use super::progress::Progress;

/// A signal has ended it.
const INTERRUPTED: u8 = 128;

/// Hands rows over until there are no more. If that can't be done, or a signal ends it, those that were handed over are taken back.
pub async fn load(
    mut loader: Loader,
    mut pieces: mpsc::Receiver<Piece>,
    done: &'static str,
) -> Result<Loaded, Failure> {
    let fault = |fault| Failure::usage(format!("cannot listen for signals: {fault}"));
    let mut interrupted = signal(SignalKind::interrupt()).map_err(fault)?;
    let mut terminated = signal(SignalKind::terminate()).map_err(fault)?;
    let progress = Progress::of_load(done);
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            _ = interrupted.recv() => return Err(taken_back(loader, stopped(SignalKind::interrupt(), done)).await),
            _ = terminated.recv() => return Err(taken_back(loader, stopped(SignalKind::terminate(), done)).await),
        };
        match piece {
            None => break,
            Some(Ok(rows)) => {
                let count = rows.len();
                for row in rows {
                    loader.push(row).await.map_err(failure)?;
                }
                progress.more(count);
            }
            Some(Err(error)) => return Err(taken_back(loader, Failure::usage(error.to_string())).await),
        }
    }
    let loaded = loader.finish().await.map_err(failure)?;
    progress.end();
    Ok(loaded)
}

async fn taken_back(loader: Loader, failure: Failure) -> Failure {
    loader.give_up().await;
    failure
}

fn stopped(kind: SignalKind, done: &str) -> Failure {
    Failure::new(INTERRUPTED + kind.as_raw_value() as u8, format!("interrupted: no row was {done}"))
}
