//! What the objects of each kind refer to.

use godwit_protos::Digest;

use super::{
    Content, Cut, Directory, Image, Kind, Layer, Memory, Node, Object as _, ObjectError, Pages,
    Piece, Pieces, Tree,
};

/// What an object refers to, in order.
///
/// Errors: [`ObjectError`] when `bytes` are no object of this kind.
pub fn children(kind: Kind, bytes: &[u8]) -> Result<Vec<(Kind, Digest)>, ObjectError> {
    let chunks = |pieces: &[Piece]| -> Vec<(Kind, Digest)> {
        pieces.iter().filter_map(|piece| piece.chunk).map(|chunk| (Kind::Chunk, chunk)).collect()
    };
    let all = |kind, digests: Vec<Digest>| digests.into_iter().map(|one| (kind, one)).collect();
    let content = |content: Content| match content {
        Content::Pieces(pieces) => chunks(&pieces),
        Content::Blocks(blocks) => all(Kind::Pieces, blocks),
    };
    Ok(match kind {
        Kind::Chunk => Vec::new(),
        Kind::Pieces => chunks(&Pieces::decode(bytes)?.0),
        Kind::Pages => all(Kind::Chunk, Pages::decode(bytes)?.pages),
        Kind::Tree => vec![(Kind::Directory, Tree::decode(bytes)?.root)],
        Kind::Image => all(Kind::Pieces, Image::decode(bytes)?.blocks),
        Kind::Directory => match Directory::decode(bytes)? {
            Directory::Parts(parts) => all(Kind::Directory, parts),
            Directory::Entries(entries) => entries
                .into_iter()
                .flat_map(|entry| match entry.node {
                    Node::File(_, bytes) => content(bytes),
                    Node::Directory(directory) => vec![(Kind::Directory, directory)],
                    Node::HardLink(..)
                    | Node::Symlink(_)
                    | Node::CharDevice(..)
                    | Node::BlockDevice(..)
                    | Node::Fifo
                    | Node::Socket => Vec::new(),
                })
                .collect(),
        },
        Kind::Memory => {
            let memory = Memory::decode(bytes)?;
            let images = memory.images.map(|images| (Kind::Tree, images));
            let blocks = memory.maps.into_iter().flat_map(|map| map.blocks);
            images.into_iter().chain(blocks.map(|block| (Kind::Pages, block))).collect()
        }
        Kind::Layer => content(Layer::decode(bytes)?.content),
        Kind::Cut => {
            let parts = Cut::decode(bytes)?.parts.into_iter();
            parts
                .map(|part| Ok((Kind::try_from(part.kind)?, part.root)))
                .collect::<Result<_, _>>()?
        }
    })
}
