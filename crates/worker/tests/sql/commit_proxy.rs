//! A TCP proxy that can lose what the server says.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// What happens when the client sends a message that holds `COMMIT`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum AtCommit {
    /// It reaches the server, whose reply is lost with the connection.
    LoseReply,
    /// It is lost with the connection.
    LoseCommit,
    /// It reaches the server, whose reply never comes.
    Hang,
}

pub struct Proxy {
    pub port: u16,
    /// Notified once the server has replied to COMMIT, or the COMMIT was lost.
    pub reached: Arc<Notify>,
}

impl Proxy {
    pub async fn start(server_port: u16, at_commit: AtCommit) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (reached, armed) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(true)));
        let proxy = Proxy { port, reached: reached.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", server_port)).await.unwrap();
                tokio::spawn(pass(client, server, at_commit, reached.clone(), armed.clone()));
            }
        });
        proxy
    }
}

async fn pass(
    mut client: TcpStream,
    mut server: TcpStream,
    mode: AtCommit,
    reached: Arc<Notify>,
    armed: Arc<AtomicBool>,
) {
    let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(count @ 1..) = read else { return };
                let commits = up[..count].windows(6).any(|part| part == b"COMMIT");
                if commits && armed.swap(false, Ordering::SeqCst) {
                    if mode != AtCommit::LoseCommit {
                        server.write_all(&up[..count]).await.unwrap();
                        let _ = server.read(&mut down).await;
                    }
                    reached.notify_one();
                    if mode == AtCommit::Hang {
                        std::future::pending::<()>().await;
                    }
                    return;
                }
                if server.write_all(&up[..count]).await.is_err() { return }
            }
            read = server.read(&mut down) => {
                let Ok(count @ 1..) = read else { return };
                if client.write_all(&down[..count]).await.is_err() { return }
            }
        }
    }
}
