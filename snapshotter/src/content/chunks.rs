//! Cutting bytes into chunks, and lists into objects: the same bytes are cut alike on every node.

use std::io::Read;
use std::path::Path;

use fastcdc::v2020::StreamCDC;
use godwit_protos::Digest;
use rayon::prelude::*;

use super::object::{Content, Object as _, Piece, Pieces};
use super::{ContentError, Sink, on};

/// Bounds of a chunk, in bytes: FastCDC (Xia et al., USENIX ATC 2016) between them.
const CHUNK_BYTES: (usize, usize, usize) = (16 << 10, 64 << 10, 256 << 10);

/// Pieces that stand in the object itself; a file with more gets [`Pieces`] objects.
const PIECES_INLINE_MAX: usize = 32;

/// Chunks that are hashed at once, on all processors.
const CHUNKS_PER_BATCH: usize = 64;

/// Entries or pieces per object, at most; on average a quarter of it.
pub(super) const LIST_MAX: usize = 1024;

/// Cuts `data`, which `path` stands for in errors, and adds its pieces to `pieces`. Returns its length in bytes.
///
/// Errors: [`ContentError::File`] when it cannot be read, or the sink's.
pub fn cut(
    data: impl Read,
    path: &Path,
    sink: &mut dyn Sink,
    pieces: &mut Vec<Piece>,
) -> Result<u64, ContentError> {
    let (min, mean, max) = CHUNK_BYTES;
    let mut chunks = StreamCDC::new(data, min, mean, max);
    let mut read = 0;
    loop {
        let batch: Vec<Vec<u8>> = chunks
            .by_ref()
            .take(CHUNKS_PER_BATCH)
            .map(|chunk| chunk.map(|chunk| chunk.data))
            .collect::<Result<_, _>>()
            .map_err(|error| on("read", path)(std::io::Error::other(error)))?;
        if batch.is_empty() {
            return Ok(read);
        }
        let digests: Vec<Digest> = batch.par_iter().map(|chunk| Digest::of(chunk)).collect();
        for (chunk, digest) in batch.iter().zip(digests) {
            sink.put_hashed(digest, chunk)?;
            let bytes = chunk.len() as u64;
            pieces.push(Piece { bytes, chunk: Some(digest) });
            read += bytes;
        }
    }
}

/// Puts a list of pieces where an object can refer to it.
pub fn put_pieces(sink: &mut dyn Sink, pieces: Vec<Piece>) -> Result<Content, ContentError> {
    if pieces.len() <= PIECES_INLINE_MAX {
        return Ok(Content::Pieces(pieces));
    }
    let cut = |piece: &Piece| piece.chunk.is_some_and(|chunk| chunk.as_bytes()[0] == 0);
    let mut blocks = Vec::new();
    for block in cut_where(pieces, cut) {
        blocks.push(sink.put(&Pieces(block).encode())?);
    }
    Ok(Content::Blocks(blocks))
}

/// Cuts a list after each element for which `cut` holds, and where a part would exceed [`LIST_MAX`].
pub(super) fn cut_where<T>(list: Vec<T>, cut: impl Fn(&T) -> bool) -> Vec<Vec<T>> {
    let mut parts = vec![Vec::new()];
    for element in list {
        let ends = cut(&element);
        let part: &mut Vec<T> = match parts.last_mut() {
            Some(part) if part.len() < LIST_MAX => part,
            _ => {
                parts.push(Vec::new());
                let last = parts.len() - 1;
                &mut parts[last]
            }
        };
        part.push(element);
        if ends {
            parts.push(Vec::new());
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}
