//! The engine's error: what happened, where, and what to do about it.

use std::path::PathBuf;

/// Result of everything in the engine.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

/// Every way in which the engine refuses to go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file exists but does not hold what it should; `place` names the line, tensor or key.
    #[error("{path}: {place}: {message}")]
    Malformed {
        /// The file or folder.
        path: PathBuf,
        /// Line, tensor name, or key path inside it.
        place: String,
        /// Expected, found, and a hint.
        message: String,
    },
    /// A recipe, a flag or a combination of them that cannot work.
    #[error("{0}")]
    Config(String),
    /// A model that this engine does not support, or whose parts do not fit together.
    #[error("model: {0}")]
    Model(String),
    /// A verifier that stops the run (`on_error = "fail"`), or cannot be loaded.
    #[error("reward: {0}")]
    Reward(String),
    /// Numbers that went wrong: NaN or infinity in a loss, gradient or logprob.
    #[error("numbers: {0}")]
    Numeric(String),
    /// A number of one sample that went wrong, by its place in the batch; `train` says which sample that is.
    #[error(
        "numbers: the {what} of completion {completion} of group {group} is not finite; nothing was updated"
    )]
    NonFinite {
        /// What is not finite.
        what: &'static str,
        /// Group of the batch, from 0.
        group: usize,
        /// Completion of the group, from 0.
        completion: usize,
        /// Token of the completion, from 0; `None` where only the completion is known.
        token: Option<usize>,
    },
    /// The request does not fit the memory or block budget.
    #[error("memory: {0}")]
    Memory(String),
    /// The user asked to stop; the state was saved.
    #[error("interrupted")]
    Interrupted,
}

impl EngineError {
    /// An [`EngineError::Io`] at `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// An [`EngineError::Malformed`].
    pub fn malformed(path: impl Into<PathBuf>, place: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), place: place.into(), message: message.into() }
    }
}
