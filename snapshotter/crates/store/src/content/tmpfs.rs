//! Files of a tmpfs, read before the freeze in the form in which CRIU's images have them.
//!
//! The tree that [`capture`] makes stands in the place of CRIU's image directory, with the same
//! file names, so that [`super::difference`] finds at the cut what changed since. It is read from
//! running processes: an archive in it may be torn. The cut has CRIU's own.

use std::path::Path;

use criu_wrapper::tmpfs;
use godwit_protos::Digest;
use serde_bytes::ByteBuf;

use super::object::{Attributes, Directory, Entry, Node, Tree};
use super::{ContentError, Sink, chunks, put_object};

/// A tmpfs with less is not worth reading: it costs little while the container is frozen.
const BYTES_MIN: u64 = 256 << 10;

/// What was read.
#[derive(Clone, Copy, Debug)]
pub struct Captured {
    /// The [`Tree`].
    pub tree: Digest,
    /// Sum of the sizes of the archives, in bytes.
    pub bytes: u64,
}

/// Reads every tmpfs of the container with init process `pid` into `sink`; `None` without any.
///
/// A tmpfs that cannot be read is left out: the dump has it.
///
/// Errors: the sink's.
pub fn capture(pid: u32, sink: &mut dyn Sink) -> Result<Option<Captured>, ContentError> {
    let (mut entries, mut bytes) = (Vec::new(), 0);
    // The process may have ended.
    for one in tmpfs::find(pid, BYTES_MIN).unwrap_or_default() {
        let name = one.image_name();
        let Ok(mut packing) = one.pack() else {
            tracing::info!("tar cannot be started: {name} is not captured ahead");
            continue;
        };
        let mut pieces = Vec::new();
        let read = chunks::cut(&mut packing.archive, Path::new(&name), sink, &mut pieces)?;
        let content = chunks::put_pieces(sink, pieces)?;
        let (name, node) = (ByteBuf::from(name.into_bytes()), Node::File(read, content));
        entries.push(Entry { name, attributes: Some(attributes()), node });
        bytes += read;
    }
    if entries.is_empty() {
        return Ok(None);
    }
    entries.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    let root = put_object(sink, &Directory::Entries(entries))?;
    let (attributes, flags, has_projects) = (attributes(), 0, false);
    let tree = put_object(sink, &Tree { attributes, root, bytes, flags, has_projects })?;
    Ok(Some(Captured { tree, bytes }))
}

fn attributes() -> Attributes {
    Attributes {
        mode: 0o600,
        uid: 0,
        gid: 0,
        modified: (0, 0),
        xattrs: Vec::new(),
        flags: 0,
        project: 0,
    }
}
