//! How a file tree or a memory image becomes objects of the store, and back.
//!
//! 1. [`capture`] reads a directory into a [`object::Tree`]; [`image`] reads a block volume into an
//!    [`object::Image`]; [`memory`] reads a running process or CRIU's image directory into a
//!    [`object::Memory`].
//! 2. [`difference`] walks two versions side by side and names what the newer one has beyond the
//!    older, each object with the one that stood in its place: what the stop-and-copy sends.
//! 3. [`materialize`] makes a directory equal to a tree, touching only what differs from the tree
//!    it was equal to before; [`image`] and [`staging`] do the same for block volumes and CRIU's
//!    image directories. So what is written after the freeze grows with the change, not with the
//!    size.
//!
//! On failure: capturing leaves objects that nothing refers to, which the sweep takes;
//! materialising leaves a directory that is to be thrown away. Neither changes what it reads. Read
//! next: [`object`] for the types.

mod ahead;
pub mod alias;
pub mod capture;
pub mod chunks;
pub mod difference;
pub mod encoding;
pub mod image;
mod known;
pub mod layer;
pub mod materialize;
pub mod memory;
pub mod object;
pub mod staging;
pub mod tmpfs;

use std::io;
use std::path::{Path, PathBuf};

use godwit_protos::Digest;

use crate::store::StoreError;
use godwit_disk::trees::RemoveError;
use object::{Object, ObjectError};

/// Why content could not be read, stored or laid out.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A file or directory refused an operation.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// An object is not in the store.
    #[error("object {0} is missing")]
    Missing(Digest),
    /// An object is there, but is not what it should be.
    #[error("object {digest} is damaged")]
    Object {
        /// Its name.
        digest: Digest,
        /// What is wrong.
        #[source]
        source: ObjectError,
    },
    /// An object of ours that no reader would accept, so it was not stored.
    #[error("cannot be stored: no reader would accept it")]
    Unreadable(#[source] ObjectError),
    /// Several processes that CRIU would give the same number.
    #[error(
        "the container has a process id namespace inside it, in which processes have the numbers of others ({0}): \
         its memory cannot be stored; end the sandbox that made the namespace"
    )]
    SameNumbers(String),
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// A tree nests deeper than Godwit follows.
    #[error(
        "{} nests deeper than {} directories; move what it holds further up, or remove it",
        beginning(.0),
        capture::DEPTH_MAX
    )]
    TooDeep(PathBuf),
    /// A file or directory has a flag that cannot be laid out elsewhere.
    #[error("{} has the flag {flag}, which cannot move: replace it by a copy without", path.display())]
    Flag {
        /// Which.
        path: PathBuf,
        /// The flag, as chattr(1) names it.
        flag: &'static str,
    },
    /// The top directory of a tree has a flag that keeps it from being renamed.
    #[error(
        "{} itself is {flags}: take that from it with chattr(1); what is in it may have such flags", path.display()
    )]
    FixedRoot {
        /// Which.
        path: PathBuf,
        /// Its flags, as chattr(1) names them.
        flags: String,
    },
    /// CRIU's image directory could not be read or written.
    #[error("CRIU's images are not as expected")]
    Images(#[from] criu_wrapper::pagemap::ImageError),
    /// Reading a running process failed.
    #[error("cannot read the memory of process {pid}")]
    Process {
        /// Its process id.
        pid: u32,
        /// The reason.
        #[source]
        source: criu_wrapper::live::ScanError,
    },
}

/// The beginning of a path that may be thousands of names long, for a message.
fn beginning(path: &Path) -> String {
    const CHARS_MAX: usize = 200;
    let text = path.display().to_string();
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl ContentError {
    /// Whether the disk was full.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::File { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            Self::Store(source) => matches!(source, StoreError::Full { .. }),
            _ => false,
        }
    }
}

impl From<RemoveError> for ContentError {
    fn from(RemoveError { path, source }: RemoveError) -> Self {
        Self::File { action: "remove", path, source }
    }
}

/// Stores an object that every reader will accept: it is decoded again first.
///
/// Errors: [`ContentError::Unreadable`] for one that breaks a rule of its kind; nothing is stored.
/// The rules are about what containers may hold as much as about our encoder, so a container that
/// no rule foresaw ends here and not in the store.
pub fn put_object<O: Object>(
    sink: &mut (impl Sink + ?Sized),
    object: &O,
) -> Result<Digest, ContentError> {
    let bytes = object.encode();
    O::decode(&bytes).map_err(ContentError::Unreadable)?;
    sink.put(&bytes)
}

/// Turns an error of `nix` or `std::io` into a [`ContentError::File`] with its path.
pub fn on<E: Into<io::Error>>(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> ContentError + use<E> {
    let path = path.to_owned();
    move |source| ContentError::File { action, path, source: source.into() }
}

/// Where objects are read from: the store, or a map in tests.
pub trait Source {
    /// Bytes of an object. Errors: [`ContentError::Missing`] or the store's.
    fn object(&self, digest: &Digest) -> Result<Vec<u8>, ContentError>;

    /// An object of a known type.
    fn decode<T: object::Object>(&self, digest: &Digest) -> Result<T, ContentError> {
        T::decode(&self.object(digest)?)
            .map_err(|source| ContentError::Object { digest: *digest, source })
    }

    /// Entries of a directory, whether it is in one part or in several.
    fn entries(&self, directory: &Digest) -> Result<Vec<object::Entry>, ContentError> {
        use object::Directory;
        match self.decode(directory)? {
            Directory::Entries(entries) => Ok(entries),
            Directory::Parts(parts) => {
                let mut entries = Vec::new();
                for part in parts {
                    let Directory::Entries(more) = self.decode(&part)? else {
                        let rule = "parts of a directory hold entries";
                        let source = ObjectError::Rule { kind: object::Kind::Directory, rule };
                        return Err(ContentError::Object { digest: part, source });
                    };
                    entries.extend(more);
                }
                Ok(entries)
            }
        }
    }

    /// Pieces of a file.
    fn pieces(&self, content: &object::Content) -> Result<Vec<object::Piece>, ContentError> {
        match content {
            object::Content::Pieces(pieces) => Ok(pieces.clone()),
            object::Content::Blocks(blocks) => {
                let mut pieces = Vec::new();
                for block in blocks {
                    pieces.extend(self.decode::<object::Pieces>(block)?.0);
                }
                Ok(pieces)
            }
        }
    }
}

/// Where objects are put: a writer of the store, or a map in tests.
pub trait Sink: Send {
    /// Stores `bytes` under `digest`, which the caller has computed. Putting again is cheap.
    fn put_hashed(&mut self, digest: Digest, bytes: &[u8]) -> Result<(), ContentError>;

    /// As [`Self::put_hashed`], of many at once.
    fn put_all(&mut self, objects: &[(Digest, &[u8])]) -> Result<(), ContentError> {
        objects.iter().try_for_each(|(digest, bytes)| self.put_hashed(*digest, bytes))
    }

    /// Stores `bytes` and returns their name.
    fn put(&mut self, bytes: &[u8]) -> Result<Digest, ContentError> {
        let digest = Digest::of(bytes);
        self.put_hashed(digest, bytes)?;
        Ok(digest)
    }
}

impl Source for crate::store::Store {
    fn object(&self, digest: &Digest) -> Result<Vec<u8>, ContentError> {
        self.get(digest)?.ok_or(ContentError::Missing(*digest))
    }
}

impl Sink for crate::store::Writer {
    fn put_hashed(&mut self, digest: Digest, bytes: &[u8]) -> Result<(), ContentError> {
        Ok(Self::put_hashed(self, digest, bytes).map(drop)?)
    }

    fn put_all(&mut self, objects: &[(Digest, &[u8])]) -> Result<(), ContentError> {
        Ok(Self::put_all(self, objects)?)
    }
}

/// Objects in a map: the store's place in the tests of this crate and of the daemon.
pub mod fake {
    use super::*;
    use std::collections::HashMap;

    /// Objects by digest.
    #[derive(Clone, Debug, Default)]
    pub struct Objects(pub HashMap<Digest, Vec<u8>>);

    impl Source for Objects {
        fn object(&self, digest: &Digest) -> Result<Vec<u8>, ContentError> {
            self.0.get(digest).cloned().ok_or(ContentError::Missing(*digest))
        }
    }

    impl Sink for Objects {
        fn put_hashed(&mut self, digest: Digest, bytes: &[u8]) -> Result<(), ContentError> {
            assert_eq!(digest, Digest::of(bytes));
            self.0.insert(digest, bytes.to_vec());
            Ok(())
        }
    }
}
