//! Group commit: what is asked for while a round trip is in flight goes out together in the next.
//!
//! Nothing waits for company: the first request of a quiet time leaves at once, alone.

use std::future::Future;

use tokio::sync::{mpsc, oneshot};

/// Collects requests of many tasks into calls of many.
#[derive(Debug)]
pub struct Group<T, R> {
    sender: mpsc::Sender<(T, oneshot::Sender<R>)>,
}

impl<T, R> Clone for Group<T, R> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone() }
    }
}

/// The task that makes the calls is gone: the process is stopping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped before the request was sent")]
pub struct Stopped;

impl<T: Send + 'static, R: Send + 'static> Group<T, R> {
    /// Starts the task that sends up to `most` requests a call. `call` returns one answer for each, in order.
    pub fn start<C, F>(most: usize, mut call: C) -> Self
    where
        C: FnMut(Vec<T>) -> F + Send + 'static,
        F: Future<Output = Vec<R>> + Send,
    {
        let (sender, mut receiver) = mpsc::channel::<(T, oneshot::Sender<R>)>(most * 4);
        tokio::spawn(async move {
            let mut waiting = Vec::with_capacity(most);
            while receiver.recv_many(&mut waiting, most).await > 0 {
                let (requests, answers): (Vec<T>, Vec<oneshot::Sender<R>>) = waiting.drain(..).unzip();
                for (answer, reply) in answers.into_iter().zip(call(requests).await) {
                    // Whoever asked may have gone; the call was made all the same.
                    let _ = answer.send(reply);
                }
            }
        });
        Self { sender }
    }

    /// Sends one request and waits for its answer.
    pub async fn ask(&self, request: T) -> Result<R, Stopped> {
        let (sender, receiver) = oneshot::channel();
        self.sender.send((request, sender)).await.map_err(|_| Stopped)?;
        receiver.await.map_err(|_| Stopped)
    }
}
