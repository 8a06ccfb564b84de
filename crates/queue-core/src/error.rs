//! Errors, cut by what a caller will do about them.

/// What can go wrong between us and Redis.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong; sending it again won't help.
    #[error("{0}")]
    Request(String),
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] crate::config::Fault),
    /// Redis can't be reached or does not serve now. Whether the command ran is unknown: every call is safe to send again.
    #[error("redis does not answer: {0}")]
    Unavailable(String),
    /// There is no connection to Redis, and nothing was sent.
    #[error("redis can't be reached: {0}")]
    Unreachable(String),
    /// Redis refused the command: wrong credentials, missing rights, out of memory, read-only.
    #[error("redis refused: {0}")]
    Refused(String),
    /// The server's keys are of another major version of the protocol.
    #[error("the keys on this server are of protocol version {found}, this program speaks {ours}")]
    Version {
        /// What the server's key says.
        found: String,
        /// What this program speaks.
        ours: String,
    },
    /// The library in Redis is older than what this program calls. Nothing was done.
    #[error(
        "the library in Redis is {found}, this program needs {ours}: start the workers' new version first, or run `drayman library load`"
    )]
    Library {
        /// That of the server.
        found: crate::library::Version,
        /// That of this program.
        ours: crate::library::Version,
    },
    /// A reply that the protocol does not know: a bug, here or in the library.
    #[error("unexpected reply from {function}: {reply}")]
    Reply {
        /// The function or command that was called.
        function: &'static str,
        /// What came back, cut short.
        reply: String,
    },
}

impl Error {
    /// Whether a key holds another type than the command wants: somebody else has written it.
    pub fn is_wrong_type(&self) -> bool {
        matches!(self, Error::Refused(text) if text.starts_with("WRONGTYPE"))
    }

    /// Whether the command may have run all the same: there was no answer, or one that nobody can read, or a function broke
    /// off, which keeps what it wrote before. What the state of the server forbids is forbidden before it begins, or at its first write.
    pub fn is_outcome_unknown(&self) -> bool {
        match self {
            Error::Unavailable(_) | Error::Reply { .. } => true,
            Error::Refused(text) => text.contains(" script: ") && !self.is_transient(),
            _ => false,
        }
    }

    /// Whether the call was not run, for want of the library or of a right: sending it again is no second run, and may help
    /// once somebody has put that right.
    pub fn was_not_run(&self) -> bool {
        match self {
            Error::Unreachable(_) | Error::Library { .. } => true,
            Error::Refused(text) => {
                self.is_missing_function() || text.starts_with("NOPERM") && !text.contains(" script: ")
            }
            _ => false,
        }
    }

    /// Whether what must be said, like the end of a run, is worth saying again: the call was not run, or the server was away.
    pub fn is_worth_repeating(&self) -> bool {
        self.is_transient() || self.was_not_run()
    }

    /// Whether the server knows no function of this name.
    pub(crate) fn is_missing_function(&self) -> bool {
        matches!(self, Error::Refused(text) if text.contains("Function not found") && !text.contains(" script: "))
    }

    /// Whether waiting and sending the same again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unavailable(_) | Error::Unreachable(_) => true,
            // A server that is loading, failing over or short of memory serves again later.
            Error::Refused(text) => [
                "LOADING",
                "READONLY",
                "BUSY",
                "OOM",
                "MASTERDOWN",
                "TRYAGAIN",
                "CLUSTERDOWN",
                "NOREPLICAS",
                "UNKILLABLE",
                "MISCONF",
            ]
            .iter()
            .any(|word| text.starts_with(word)),
            Error::Request(_)
            | Error::Config(_)
            | Error::Version { .. }
            | Error::Library { .. }
            | Error::Reply { .. } => false,
        }
    }
}
