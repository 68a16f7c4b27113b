//! The objects that trees and memory images are made of: their types, canonical bytes and children.
//!
//! ```text
//! Tree ── Directory ─┬─ Directory ...             Memory ─┬─ Tree        CRIU's images without pages
//!                    ├─ Chunk ...                         └─ Pages ─┬─ Chunk   one page, 4 KiB
//!                    └─ Pieces ── Chunk ...                         └─ ...     256 pages, 1 MiB
//! Cut ─┬─ Memory                             Layer ─┬─ Pieces ── Chunk ...
//!      ├─ Tree ...                                  └─ Chunk ...
//!      └─ Image ...                          Image ── Pieces ── Chunk      a block volume
//! ```
//!
//! Every box is an object of the store, named by the SHA-256 of its bytes, so a tree is a Merkle
//! tree: two versions share what is equal, and a new version costs the path from what changed up to
//! its root. The bytes are postcard's (<https://postcard.jamesmunns.com/wire-format>) behind one
//! version byte; docs/formats.md has them, and the tests pin them. Decoding takes bytes from peers:
//! it returns errors and checks every rule that the writers keep.

mod children;
mod raw;

use std::borrow::Cow;

use godwit_protos::{Digest, FileSystem};
use serde::{Deserialize, Serialize};

use super::alias::{Aliases, Area};
pub use children::children;
use godwit_disk::inode;
use raw::{digest, digests, optional_digest};

/// Version byte in front of every object but chunks and memory images.
const VERSION: u8 = 1;

/// Version byte of memory images. History: 1 has no aliases; 2 has.
const MEMORY_VERSION: u8 = 2;

/// Bytes of a memory page, on every architecture that Godwit runs on.
pub const PAGE_BYTES: usize = 4096;

/// Pages per [`Pages`] object.
pub const PAGES_PER_BLOCK: usize = 256;

/// Bytes of a block volume that one [`Pieces`] object describes.
pub const IMAGE_BLOCK_BYTES: u64 = 16 << 20;

/// Largest block volume, in bytes: its list of blocks is half as long as an object may be.
pub const IMAGE_BYTES_MAX: u64 = 1 << 40;

/// Largest object, in bytes. The store and the peer protocol refuse more.
pub const OBJECT_BYTES_MAX: usize = 4 << 20;

/// Longest name of a directory entry, in bytes (`NAME_MAX` of Linux).
const NAME_BYTES_MAX: usize = 255;

/// What an object is. The digest alone does not tell; the object that refers to it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A run of bytes: part of a file, or a page.
    Chunk = 0,
    /// A list of [`Piece`]s: part of a large file or of a block volume.
    Pieces = 1,
    /// A [`Directory`].
    Directory = 2,
    /// A [`Tree`].
    Tree = 3,
    /// A [`Pages`] block.
    Pages = 4,
    /// A [`Memory`] image.
    Memory = 5,
    /// A [`Cut`].
    Cut = 6,
    /// A [`Layer`].
    Layer = 7,
    /// An [`Image`].
    Image = 8,
}

impl Kind {
    /// Whether objects of this kind refer to no others.
    pub fn is_leaf(self) -> bool {
        self == Self::Chunk
    }
}

impl TryFrom<u8> for Kind {
    type Error = ObjectError;

    fn try_from(byte: u8) -> Result<Self, ObjectError> {
        use Kind::{Chunk, Cut, Directory, Image, Layer, Memory, Pages, Pieces, Tree};
        let all = [Chunk, Pieces, Directory, Tree, Pages, Memory, Cut, Layer, Image];
        all.into_iter().find(|kind| *kind as u8 == byte).ok_or(ObjectError::Kind(byte))
    }
}

/// Why bytes are not an object of the expected kind.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// No kind has this number.
    #[error("object kind {0} is not known to this version of Godwit; install a newer one")]
    Kind(u8),
    /// Written by a newer Godwit.
    #[error("object version {0} is not known to this version of Godwit; install a newer one")]
    Version(u8),
    /// No object at all.
    #[error("an empty object")]
    Empty,
    /// Not postcard's bytes of that type, or bytes left over.
    #[error("not a {kind:?} object")]
    Encoding {
        /// The kind that was expected.
        kind: Kind,
        /// postcard's reason.
        #[source]
        source: postcard::Error,
    },
    /// Well-formed, but no writer of ours writes it.
    #[error("a {kind:?} object breaks a rule: {rule}")]
    Rule {
        /// The kind of the object.
        kind: Kind,
        /// The rule in words.
        rule: &'static str,
    },
}

/// Mode, owner, modification time, extended attributes and flags.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits with set-user-id, set-group-id and sticky; no file type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since the epoch and nanoseconds.
    pub modified: (i64, u32),
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(serde_bytes::ByteBuf, serde_bytes::ByteBuf)>,
    /// Flags of a file or directory that travel, as `FS_IOC_GETFLAGS` has them; others have none.
    pub flags: u32,
    /// Project ID of a file or directory, for quotas.
    pub project: u32,
}

impl Attributes {
    /// Flags and project.
    pub fn inode_flags(&self) -> inode::Flags {
        inode::Flags { bits: self.flags, project: self.project }
    }
}

/// Part of a file: a chunk, or a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Length in bytes.
    pub bytes: u64,
    /// The chunk that holds them; `None` is a hole.
    #[serde(with = "optional_digest")]
    pub chunk: Option<Digest>,
}

/// Where a file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// In these pieces.
    Pieces(Vec<Piece>),
    /// In the pieces of these [`Kind::Pieces`] objects, in order.
    #[serde(with = "digests")]
    Blocks(Vec<Digest>),
}

/// What a directory entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// A regular file: size in bytes, content.
    File(u64, Content),
    /// Another name of what is at this path (components from the root of the tree), which comes
    /// earlier in the order of the tree and is no directory; and what [`Node::identity`] says of
    /// that.
    HardLink(Vec<serde_bytes::ByteBuf>, #[serde(with = "optional_digest")] Option<Digest>),
    /// A directory.
    Directory(#[serde(with = "digest")] Digest),
    /// A symbolic link with its target.
    Symlink(serde_bytes::ByteBuf),
    /// A character device, major and minor; 0 and 0 is overlayfs' whiteout.
    CharDevice(u32, u32),
    /// A block device, major and minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A Unix socket's name.
    Socket,
}

impl Node {
    /// What a hard link notes of the node that it links: nothing of a regular file, which is
    /// patched in place and so stays the same inode; of all others their digest, since they are
    /// replaced, and their links must be with them.
    pub fn identity(&self) -> Option<Digest> {
        #[expect(clippy::expect_used, reason = "our own invariant")]
        let bytes =
            || postcard::to_extend(self, Vec::new()).expect("every sequence has a known length");
        (!matches!(self, Self::File(..))).then(|| Digest::of(&bytes()))
    }
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The name: any bytes but `/` and NUL.
    pub name: serde_bytes::ByteBuf,
    /// Attributes; those of a hard link are its file's and stay empty here.
    pub attributes: Option<Attributes>,
    /// What it is.
    pub node: Node,
}

/// A directory, or part of a large one: entries sorted by name, or the parts in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Directory {
    /// All entries.
    Entries(Vec<Entry>),
    /// The entries of these [`Directory::Entries`] objects, in order.
    #[serde(with = "digests")]
    Parts(Vec<Digest>),
}

/// A file tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Attributes of the root directory.
    pub attributes: Attributes,
    /// The root directory.
    #[serde(with = "digest")]
    pub root: Digest,
    /// Sum of the sizes of the regular files, in bytes.
    pub bytes: u64,
    /// Union of the flags of all entries and of the root.
    pub flags: u32,
    /// Whether any of them has a project ID.
    pub has_projects: bool,
}

/// A block volume: the image of a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What is to be mounted.
    pub file_system: FileSystem,
    /// Size in bytes.
    pub bytes: u64,
    /// The [`Kind::Pieces`] objects of each [`IMAGE_BLOCK_BYTES`], in order; the last may be
    /// shorter.
    #[serde(with = "digests")]
    pub blocks: Vec<Digest>,
}

/// 256 pages of one address space, aligned to their size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Slots (0 to 255) of the pages that are here, ascending.
    #[serde(with = "serde_bytes")]
    pub slots: Vec<u8>,
    /// Their contents, in the same order.
    #[serde(with = "digests")]
    pub pages: Vec<Digest>,
}

/// One address space of a memory image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// CRIU's name for its page map, for example `pagemap-1`.
    pub name: String,
    /// Block number (address / 1 MiB) of each [`Pages`] object, ascending.
    pub numbers: Vec<u64>,
    /// The [`Pages`] objects, in the same order.
    #[serde(with = "digests")]
    pub blocks: Vec<Digest>,
}

/// A memory image: what CRIU dumps, or, before a dump, the pages that it would dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The image directory without its pages, as a [`Tree`]; absent while the container runs.
    #[serde(with = "optional_digest")]
    pub images: Option<Digest>,
    /// Address spaces, sorted by name.
    pub maps: Vec<Map>,
    /// Number of pages.
    pub pages: u64,
    /// Areas of each map whose addresses are replaced by aliases in its pages ([`Aliases`]); empty
    /// if there are none in any.
    pub areas: Vec<Vec<Area>>,
}

impl Memory {
    /// Aliases of the map at `index`.
    pub fn aliases(&self, index: usize) -> Aliases {
        self.areas.get(index).and_then(|areas| Aliases::new(areas.clone())).unwrap_or_default()
    }
}

/// One subject in a [`Cut`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is of, in the text form of [`godwit_protos::Subject`].
    pub subject: String,
    /// The kind of its root: [`Kind::Tree`], [`Kind::Image`] or [`Kind::Memory`].
    pub kind: u8,
    /// Its manifest.
    #[serde(with = "digest")]
    pub root: Digest,
}

/// A whole container at one instant, and what is needed to run it again without the node that it
/// ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// `NAMESPACE/CONTAINER`.
    pub container: String,
    /// Node that took it.
    pub node: String,
    /// That node's processor architecture, as Rust names it.
    pub architecture: String,
    /// The fence of its last offer by then.
    pub epoch: u64,
    /// How that node described the container: a `godwit.peer.v1.DescribeResponse` in protobuf's
    /// bytes.
    #[serde(with = "serde_bytes")]
    pub description: Vec<u8>,
    /// Its memory, writable layer and writable volumes, sorted by subject.
    pub parts: Vec<Part>,
}

/// A layer of an image: its uncompressed bytes, a tar stream. Source: OCI image specification,
/// layer.md.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Length in bytes.
    pub bytes: u64,
    /// The bytes.
    pub content: Content,
}

/// An object other than a chunk.
pub trait Object: Serialize + serde::de::DeserializeOwned {
    /// Its kind.
    const KIND: Kind;

    /// Version that is written.
    const VERSION: u8 = VERSION;

    /// The body of a version that is read as the one that is written has it. `None`: no such
    /// version.
    fn body(version: u8, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
        (version == Self::VERSION).then_some(Cow::Borrowed(bytes))
    }

    /// Checks what the type does not. Errors: the rule in words.
    fn check(&self) -> Result<(), &'static str>;

    /// Canonical bytes.
    fn encode(&self) -> Vec<u8> {
        // postcard fails only on types without a known length; none of ours is one.
        #[expect(clippy::expect_used, reason = "our own invariant")]
        postcard::to_extend(self, vec![Self::VERSION]).expect("every sequence has a known length")
    }

    /// Reads an object back.
    ///
    /// Errors: [`ObjectError`] for anything that [`Object::encode`] would not have written; never a
    /// panic.
    fn decode(bytes: &[u8]) -> Result<Self, ObjectError> {
        let (version, body) = bytes.split_first().ok_or(ObjectError::Empty)?;
        let body = Self::body(*version, body).ok_or(ObjectError::Version(*version))?;
        let kind = Self::KIND;
        let (object, rest): (Self, &[u8]) = postcard::take_from_bytes(&body)
            .map_err(|source| ObjectError::Encoding { kind, source })?;
        if !rest.is_empty() {
            return Err(ObjectError::Rule { kind, rule: "no bytes after the object" });
        }
        object.check().map_err(|rule| ObjectError::Rule { kind, rule })?;
        Ok(object)
    }
}

/// The pieces of a [`Kind::Pieces`] object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces(pub Vec<Piece>);

impl Object for Pieces {
    const KIND: Kind = Kind::Pieces;

    fn check(&self) -> Result<(), &'static str> {
        check_pieces(&self.0)
    }
}

impl Object for Directory {
    const KIND: Kind = Kind::Directory;

    fn check(&self) -> Result<(), &'static str> {
        let Self::Entries(entries) = self else { return Ok(()) };
        if !entries.is_sorted_by(|one, next| one.name < next.name) {
            return Err("names ascend and none comes twice");
        }
        entries.iter().try_for_each(Entry::check)
    }
}

impl Object for Tree {
    const KIND: Kind = Kind::Tree;

    fn check(&self) -> Result<(), &'static str> {
        if self.flags & !inode::KEPT.bits() != 0 || self.attributes.flags & !self.flags != 0 {
            return Err("a tree has its root's flags, and only flags that travel");
        }
        if self.attributes.flags & inode::FIXED.bits() != 0 {
            return Err("a root is neither immutable nor append-only");
        }
        let has_projects = self.has_projects || self.attributes.project == 0;
        if has_projects { Ok(()) } else { Err("a tree has its root's project") }
    }
}

impl Object for Image {
    const KIND: Kind = Kind::Image;

    fn check(&self) -> Result<(), &'static str> {
        if self.bytes == 0 || self.bytes > IMAGE_BYTES_MAX {
            return Err("an image has 1 byte to 1 TiB");
        }
        let blocks = usize::try_from(self.bytes.div_ceil(IMAGE_BLOCK_BYTES));
        if blocks == Ok(self.blocks.len()) { Ok(()) } else { Err("one block for every 16 MiB") }
    }
}

impl Object for Pages {
    const KIND: Kind = Kind::Pages;

    fn check(&self) -> Result<(), &'static str> {
        if self.slots.len() != self.pages.len() || self.slots.is_empty() {
            return Err("as many slots as pages, and at least one");
        }
        if !self.slots.is_sorted_by(|one, next| one < next) {
            return Err("slots ascend");
        }
        Ok(())
    }
}

impl Object for Memory {
    const KIND: Kind = Kind::Memory;
    const VERSION: u8 = MEMORY_VERSION;

    fn body(version: u8, bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
        match version {
            // The list of areas comes last: none.
            1 => Some(Cow::Owned([bytes, &[0]].concat())),
            MEMORY_VERSION => Some(Cow::Borrowed(bytes)),
            _ => None,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        if !self.maps.is_sorted_by(|one, next| one.name < next.name) {
            return Err("maps ascend by name and none comes twice");
        }
        for map in &self.maps {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            if !map.name.starts_with("pagemap-") || !map.name.bytes().all(plain) {
                return Err("a map is named pagemap-ID");
            }
            if map.numbers.len() != map.blocks.len() {
                return Err("as many numbers as blocks");
            }
            if !map.numbers.is_sorted_by(|one, next| one < next) {
                return Err("block numbers ascend");
            }
            if map.numbers.last().is_some_and(|last| *last >= 1 << 44) {
                return Err("addresses have 64 bits");
            }
        }
        if !self.areas.is_empty() && self.areas.len() != self.maps.len() {
            return Err("areas for every map or none");
        }
        if !self.areas.iter().all(|areas| Aliases::new(areas.clone()).is_some()) {
            return Err("areas ascend, and aliases lead back");
        }
        Ok(())
    }
}

impl Object for Cut {
    const KIND: Kind = Kind::Cut;

    fn check(&self) -> Result<(), &'static str> {
        if !self.parts.is_sorted_by(|one, next| one.subject < next.subject) {
            return Err("parts ascend by subject and none comes twice");
        }
        let of = |kind: Kind| self.parts.iter().filter(|part| part.kind == kind as u8).count();
        let all = of(Kind::Memory) + of(Kind::Tree) + of(Kind::Image);
        if of(Kind::Memory) != 1 || all != self.parts.len() {
            return Err("one memory, trees and images");
        }
        Ok(())
    }
}

impl Object for Layer {
    const KIND: Kind = Kind::Layer;

    fn check(&self) -> Result<(), &'static str> {
        check_content(self.bytes, &self.content)
    }
}

impl Entry {
    fn check(&self) -> Result<(), &'static str> {
        if !is_entry_name(&self.name) {
            return Err("a name is 1 to 255 bytes without '/' and NUL, and neither '.' nor '..'");
        }
        if self.attributes.is_none() != matches!(self.node, Node::HardLink(..)) {
            return Err("everything but a hard link has attributes");
        }
        if let Some(Attributes { flags, project, .. }) = self.attributes {
            let has_none = (flags, project) == (0, 0);
            if !has_none && !matches!(self.node, Node::File(..) | Node::Directory(_)) {
                return Err("only files and directories have flags and projects");
            }
            if flags & !inode::KEPT.bits() != 0 {
                return Err("only flags that travel");
            }
        }
        match &self.node {
            Node::File(bytes, content) => check_content(*bytes, content),
            Node::HardLink(path, _) => {
                if !path.is_empty() && path.iter().all(|name| is_entry_name(name)) {
                    Ok(())
                } else {
                    Err("a hard link's path consists of names")
                }
            }
            Node::Symlink(target) => {
                let plain = !target.is_empty() && target.len() < 4096 && !target.contains(&0);
                if plain { Ok(()) } else { Err("a link's target is 1 to 4095 bytes without NUL") }
            }
            Node::Directory(_)
            | Node::CharDevice(..)
            | Node::BlockDevice(..)
            | Node::Fifo
            | Node::Socket => Ok(()),
        }
    }
}

fn is_entry_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.contains(&b'/')
        && !name.contains(&0)
        && name != b"."
        && name != b".."
}

/// Blocks are other objects: only their reader sees whether they add up.
fn check_content(bytes: u64, content: &Content) -> Result<(), &'static str> {
    let Content::Pieces(pieces) = content else { return Ok(()) };
    check_pieces(pieces)?;
    let sum = pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.bytes));
    if sum == Some(bytes) { Ok(()) } else { Err("pieces add up to the whole size") }
}

fn check_pieces(pieces: &[Piece]) -> Result<(), &'static str> {
    let fits = |piece: &Piece| {
        piece.bytes > 0 && (piece.chunk.is_none() || piece.bytes <= OBJECT_BYTES_MAX as u64)
    };
    if pieces.iter().all(fits) { Ok(()) } else { Err("a piece has bytes, a chunk at most 4 MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attributes() -> Attributes {
        let (modified, xattrs) = ((3, 4), Vec::new());
        Attributes { mode: 0o644, uid: 1, gid: 2, modified, xattrs, flags: 0, project: 0 }
    }

    fn named(name: &[u8], attributes: Attributes, node: Node) -> Directory {
        let name = serde_bytes::ByteBuf::from(name.to_vec());
        Directory::Entries(vec![Entry { name, attributes: Some(attributes), node }])
    }

    #[test]
    fn the_bytes_of_a_directory_are_these() {
        let bytes = named(b"a", attributes(), Node::Fifo).encode();
        assert_eq!(bytes, [1, 0, 1, 1, b'a', 1, 0xa4, 3, 1, 2, 6, 4, 0, 0, 0, 6]);
        assert!(Directory::decode(&bytes).is_ok());
        // Immutable, of project 300: an empty file.
        let of = Attributes { flags: 0x10, project: 300, ..attributes() };
        let bytes = named(b"a", of, Node::File(0, Content::Pieces(Vec::new()))).encode();
        let expected = [1, 0, 1, 1, b'a', 1, 0xa4, 3, 1, 2, 6, 4, 0, 0x10, 0xac, 2, 0, 0, 0, 0];
        assert_eq!(bytes, expected);
        assert!(Directory::decode(&bytes).is_ok());
    }

    #[test]
    fn the_bytes_of_a_hard_link_are_these() {
        let path = vec![serde_bytes::ByteBuf::from(b"b".to_vec())];
        let link = |identity| Entry {
            name: serde_bytes::ByteBuf::from(b"c".to_vec()),
            attributes: None,
            node: Node::HardLink(path.clone(), identity),
        };
        let file = Node::File(0, Content::Pieces(Vec::new())).identity();
        let bytes = Directory::Entries(vec![link(file)]).encode();
        assert_eq!(bytes, [1, 0, 1, 1, b'c', 0, 1, 1, 1, b'b', 0]);
        let pipe = Node::Fifo.identity();
        let bytes = Directory::Entries(vec![link(pipe)]).encode();
        let digest = Digest::of(&[6]);
        let expected = [&[1, 0, 1, 1, b'c', 0, 1, 1, 1, b'b', 1][..], digest.as_bytes()].concat();
        assert_eq!(bytes, expected);
        assert!(Directory::decode(&bytes).is_ok());
        let target = |name: &[u8]| Node::Symlink(serde_bytes::ByteBuf::from(name.to_vec()));
        assert_ne!(target(b"x").identity(), target(b"y").identity());
    }

    #[test]
    fn the_bytes_of_a_tree_are_these_and_it_has_the_flags_of_its_root() {
        let root = Digest::from_bytes([9; 32]);
        let attributes = Attributes { flags: 0x80, ..attributes() };
        let tree = Tree { attributes, root, bytes: 5, flags: 0x90, has_projects: true };
        let mut expected = vec![1, 0xa4, 3, 1, 2, 6, 4, 0, 0x80, 1, 0];
        expected.extend([9; 32]);
        expected.extend([5, 0x90, 1, 1]);
        assert_eq!(tree.encode(), expected);
        assert_eq!(Tree::decode(&expected).unwrap(), tree);
        let of_root = |flags, project| Attributes { flags, project, ..tree.attributes.clone() };
        for wrong in [
            Tree { flags: 0x10, ..tree.clone() },
            Tree { flags: 0x490, ..tree.clone() },
            Tree { attributes: of_root(0x10, 0), ..tree.clone() },
            Tree { attributes: of_root(0x80, 7), has_projects: false, ..tree.clone() },
        ] {
            assert!(matches!(Tree::decode(&wrong.encode()), Err(ObjectError::Rule { .. })));
        }
    }

    #[test]
    fn flags_that_do_not_travel_are_refused_and_those_of_what_cannot_have_them() {
        let file = || Node::File(0, Content::Pieces(Vec::new()));
        for (flags, project, node) in [
            (0x800, 0, file()),
            (0x0008_0000, 0, file()),
            (0x10, 0, Node::Fifo),
            (0, 7, Node::Symlink(serde_bytes::ByteBuf::from(b"x".to_vec()))),
        ] {
            let bytes = named(b"a", Attributes { flags, project, ..attributes() }, node).encode();
            assert!(matches!(Directory::decode(&bytes), Err(ObjectError::Rule { .. })));
        }
    }

    #[test]
    fn the_bytes_of_a_pages_block_are_these() {
        let pages = Pages { slots: vec![7], pages: vec![Digest::from_bytes([9; 32])] };
        let mut expected = vec![1, 1, 7, 32];
        expected.extend([9; 32]);
        assert_eq!(pages.encode(), expected);
    }

    #[test]
    fn the_bytes_of_a_memory_image_are_these_and_those_of_version_1_are_read() {
        let name = "pagemap-1".to_owned();
        let map = Map { name, numbers: vec![3], blocks: vec![Digest::from_bytes([9; 32])] };
        let area = Area { start: 1, end: 2, alias: 1 << 62 };
        let new = Memory { images: None, maps: vec![map], pages: 7, areas: vec![vec![area]] };
        let mut body = vec![0, 1, 9];
        body.extend(b"pagemap-1");
        body.extend([1, 3, 32]);
        body.extend([9; 32]);
        body.push(7);
        let aliases = [1, 1, 1, 2, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40];
        assert_eq!(new.encode(), [&[2][..], &body, &aliases].concat());
        assert_eq!(Memory::decode(&new.encode()).unwrap(), new);
        let old = Memory::decode(&[&[1][..], &body].concat()).unwrap();
        assert_eq!(old, Memory { areas: Vec::new(), ..new.clone() });
        for areas in [vec![vec![area]; 2], vec![vec![area, area]]] {
            let wrong = Memory { areas, ..new.clone() };
            assert!(matches!(Memory::decode(&wrong.encode()), Err(ObjectError::Rule { .. })));
        }
    }

    #[test]
    fn names_that_would_leave_the_tree_are_refused() {
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            let name = serde_bytes::ByteBuf::from(name.to_vec());
            let entry = Entry { name, attributes: Some(attributes()), node: Node::Fifo };
            let bytes = Directory::Entries(vec![entry]).encode();
            assert!(matches!(Directory::decode(&bytes), Err(ObjectError::Rule { .. })));
        }
    }

    #[test]
    fn a_file_whose_pieces_do_not_add_up_is_refused() {
        let pieces = Content::Pieces(vec![Piece { bytes: 5, chunk: None }]);
        let name = serde_bytes::ByteBuf::from(b"f".to_vec());
        let entry = Entry { name, attributes: Some(attributes()), node: Node::File(6, pieces) };
        assert!(Directory::decode(&Directory::Entries(vec![entry]).encode()).is_err());
    }

    #[test]
    fn the_bytes_of_an_image_are_these_and_it_has_a_block_for_every_16_mib() {
        let blocks = vec![Digest::from_bytes([9; 32]); 2];
        let image = Image { file_system: FileSystem::Xfs, bytes: IMAGE_BLOCK_BYTES + 1, blocks };
        let mut expected = vec![1, 1, 0x81, 0x80, 0x80, 8, 64];
        expected.extend([9; 64]);
        assert_eq!(image.encode(), expected);
        assert_eq!(Image::decode(&expected).unwrap(), image);
        let block = (Kind::Pieces, Digest::from_bytes([9; 32]));
        assert_eq!(children(Kind::Image, &expected).unwrap(), [block, block]);
        for bytes in [0, IMAGE_BLOCK_BYTES, 2 * IMAGE_BLOCK_BYTES + 1, IMAGE_BYTES_MAX + 1] {
            let wrong = Image { bytes, ..image.clone() };
            assert!(matches!(Image::decode(&wrong.encode()), Err(ObjectError::Rule { .. })));
        }
    }

    #[test]
    fn the_list_of_the_largest_image_is_an_object() {
        let count = usize::try_from(IMAGE_BYTES_MAX / IMAGE_BLOCK_BYTES).unwrap();
        let blocks = vec![Digest::from_bytes([9; 32]); count];
        let image = Image { file_system: FileSystem::Ext4, bytes: IMAGE_BYTES_MAX, blocks };
        assert!(image.encode().len() < OBJECT_BYTES_MAX);
    }

    fn cut(parts: &[(&str, Kind)]) -> Cut {
        let part = |(subject, kind): &(&str, Kind)| Part {
            subject: (*subject).to_owned(),
            kind: *kind as u8,
            root: Digest::from_bytes([7; 32]),
        };
        Cut {
            container: "d/c".to_owned(),
            node: "a".to_owned(),
            architecture: "x".to_owned(),
            epoch: 3,
            description: vec![5],
            parts: parts.iter().map(part).collect(),
        }
    }

    #[test]
    fn the_bytes_of_a_cut_are_these() {
        let bytes = cut(&[("memory|d|s|u", Kind::Memory)]).encode();
        let mut expected = b"\x01\x03d/c\x01a\x01x\x03\x01\x05\x01\x0cmemory|d|s|u\x05".to_vec();
        expected.extend([7; 32]);
        assert_eq!(bytes, expected);
        let children = children(Kind::Cut, &bytes).unwrap();
        assert_eq!(children, [(Kind::Memory, Digest::from_bytes([7; 32]))]);
    }

    #[test]
    fn a_cut_has_one_memory_and_otherwise_trees_and_images() {
        let memory = ("memory|d|s|u", Kind::Memory);
        for wrong in [
            &[][..],
            &[("volume|v", Kind::Tree)],
            &[memory, memory],
            &[memory, ("volume|v", Kind::Chunk)],
            &[("volume|v", Kind::Tree), memory],
        ] {
            assert!(Cut::decode(&cut(wrong).encode()).is_err(), "{wrong:?}");
        }
        let parts = [memory, ("volume|v", Kind::Tree), ("volume|w", Kind::Image)];
        assert!(Cut::decode(&cut(&parts).encode()).is_ok());
    }

    #[test]
    fn an_unknown_version_is_named() {
        let error = Tree::decode(&[9, 1, 2]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "object version 9 is not known to this version of Godwit; install a newer one"
        );
    }

    proptest! {
        #[test]
        fn bytes_of_a_peer_never_panic(bytes: Vec<u8>, kind in 0u8..8) {
            let mut bytes = bytes;
            bytes.insert(0, VERSION);
            let _ = children(Kind::try_from(kind).unwrap(), &bytes);
            bytes[0] = MEMORY_VERSION;
            let _ = children(Kind::Memory, &bytes);
        }
    }
}
