//! The PostgreSQL of one test program, with roles of every way to log in, and TLS.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use testkit::{Postgres, Scratch};
use tokio_postgres::Client;
use worker::execute::Target;

/// Who logs in how.
const ACCESS: &str = "local all all trust\n\
                      hostssl all tlsonly all scram-sha-256\n\
                      hostnossl all tlsonly all reject\n\
                      host all secretive,reserved all scram-sha-256\n\
                      host all oldfashioned all md5\n\
                      host all all all trust\n";

pub struct Cluster {
    pub port: u16,
    server: Postgres,
    // Last: the server reads from it for as long as it runs.
    certificates: Scratch,
}

impl Cluster {
    /// The one of this test program. It ends, and its folders with it, when no test has it any more.
    pub fn get() -> Arc<Cluster> {
        static CLUSTER: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
        // One that could not be started is tried again by the next test, which says why by itself.
        let mut known = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
        known.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Cluster::start());
            *known = Arc::downgrade(&cluster);
            cluster
        })
    }

    /// Where the certificates lie.
    pub fn folder(&self) -> &Path {
        self.certificates.path()
    }

    fn start() -> Cluster {
        let certificates = Scratch::new("tls");
        let folder = certificates.path();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(folder.join("access"), ACCESS).unwrap();
        make_certificates(folder);
        let key = folder.join("server.key");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        if nix::unistd::geteuid().is_root() {
            // PostgreSQL runs as its own user then, and insists on a key that nobody else reads.
            let user = nix::unistd::User::from_name("postgres").unwrap().expect("a user named postgres");
            nix::unistd::chown(&key, Some(user.uid), Some(user.gid)).unwrap();
        }
        let file = |name: &str| format!("'{}'", folder.join(name).display());
        let server = Postgres::with_config(&[
            ("hba_file", &file("access")),
            ("ssl", "on"),
            ("ssl_cert_file", &file("server.crt")),
            ("ssl_key_file", &file("server.key")),
            ("deadlock_timeout", "'200ms'"),
        ]);
        let (_, port) = server.host_port();
        Cluster { port, server, certificates }
    }

    pub fn log(&self) -> String {
        self.server.log()
    }

    /// How often a text of ours that holds `what` was received.
    pub async fn received(&self, what: &str) -> usize {
        self.server.statements_with(what).await.into_iter().filter(|text| text.starts_with("/* ")).count()
    }

    /// How often a text was received that holds all of `words`.
    pub async fn asked(&self, words: &[&str]) -> usize {
        let has_all = |text: &String| words.iter().all(|word| text.contains(word));
        self.server.statements_with("").await.iter().filter(|text| has_all(text)).count()
    }

    pub fn target(&self, dbname: &str) -> Target {
        self.target_as(dbname, "postgres", b"")
    }

    pub fn target_as(&self, dbname: &str, dbuser: &str, pass: &[u8]) -> Target {
        Target::Host {
            host: "127.0.0.1".into(),
            port: self.port,
            dbname: dbname.into(),
            dbuser: dbuser.into(),
            pass: pass.into(),
        }
    }

    pub async fn client(&self, dbname: &str) -> Client {
        self.server.client(dbname).await.expect("a superuser may connect")
    }

    /// Where its Unix socket lies.
    pub async fn socket_folder(&self) -> String {
        self.server.query("postgres", "SHOW unix_socket_directories").await.remove(0).remove(0).expect("a folder")
    }

    /// A new database and a client of it.
    pub async fn database(&self) -> (String, Client) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::SeqCst));
        self.server.query("postgres", &format!("CREATE DATABASE {name} TEMPLATE template0")).await;
        let client = self.client(&name).await;
        (name, client)
    }
}

/// One number out of the database.
pub async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

/// A certificate authority, a server's certificate of it, and another authority.
fn make_certificates(folder: &Path) {
    let openssl = |args: &str| {
        let status = Command::new("openssl")
            .args(args.split_whitespace())
            .current_dir(folder)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "openssl {args}");
    };
    for ca in ["ca", "other"] {
        openssl(&format!("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.crt"));
    }
    std::fs::write(folder.join("ext"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    openssl("req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr");
    openssl("x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.crt");
}
