//! Cutting bytes into chunks, and lists into objects: the same bytes are cut alike on every node.

use std::io::Read;
use std::path::Path;

use fastcdc::v2020::FastCDC;
use godwit_protos::Digest;
use rayon::prelude::*;

use super::object::{Content, Object as _, Piece, Pieces};
use super::{ContentError, Sink, on};

/// Bounds of a chunk, in bytes: FastCDC (Xia et al., USENIX ATC 2016) between them.
const CHUNK_BYTES: (usize, usize, usize) = (16 << 10, 64 << 10, 256 << 10);

/// Pieces that stand in the object itself; a file with more gets [`Pieces`] objects.
const PIECES_INLINE_MAX: usize = 32;

/// Bytes that are read and cut while those before them are hashed and stored.
const BLOCK_BYTES: usize = 4 << 20;

/// Entries or pieces per object, at most; on average a quarter of it.
pub(super) const LIST_MAX: usize = 1024;

/// Cuts `data`, which `path` stands for in errors, and adds its pieces to `pieces`. Returns its length in bytes.
///
/// Errors: [`ContentError::File`] when it cannot be read, or the sink's.
pub fn cut(
    data: impl Read + Send,
    path: &Path,
    sink: &mut dyn Sink,
    pieces: &mut Vec<Piece>,
) -> Result<u64, ContentError> {
    let mut cutter = Cutter { data, rest: Vec::new(), has_ended: false };
    let (mut block, mut next) = (Block::default(), Block::default());
    let mut read = 0;
    cutter.fill(&mut block).map_err(on("read", path))?;
    while !block.bytes.is_empty() {
        read += block.bytes.len() as u64;
        let (filled, put) =
            rayon::join(|| cutter.fill(&mut next), || put_block(&block, sink, pieces));
        put?;
        filled.map_err(on("read", path))?;
        std::mem::swap(&mut block, &mut next);
    }
    Ok(read)
}

/// Whole chunks, one behind the other.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    /// Where each chunk ends.
    ends: Vec<usize>,
}

/// Reads and cuts a block at a time.
struct Cutter<R> {
    data: R,
    /// What was read behind the last cut.
    rest: Vec<u8>,
    has_ended: bool,
}

impl<R: Read> Cutter<R> {
    /// Reads the next block; it is empty behind the last one.
    fn fill(&mut self, block: &mut Block) -> std::io::Result<()> {
        let Block { bytes, ends } = block;
        ends.clear();
        bytes.clear();
        bytes.append(&mut self.rest);
        if !self.has_ended {
            let wanted = BLOCK_BYTES - bytes.len();
            self.has_ended = self.data.by_ref().take(wanted as u64).read_to_end(bytes)? < wanted;
        }
        let (min, mean, max) = CHUNK_BYTES;
        let chunks = FastCDC::new(bytes, min, mean, max);
        let mut end = 0;
        // A cut is where it would be with all that follows once the longest chunk is in view.
        while end < bytes.len() && (self.has_ended || bytes.len() - end >= max) {
            (_, end) = chunks.cut(end, bytes.len() - end);
            ends.push(end);
        }
        self.rest.extend_from_slice(&bytes[end..]);
        bytes.truncate(end);
        Ok(())
    }
}

fn put_block(
    block: &Block,
    sink: &mut dyn Sink,
    pieces: &mut Vec<Piece>,
) -> Result<(), ContentError> {
    let begins = std::iter::once(&0).chain(&block.ends);
    let chunks: Vec<&[u8]> =
        begins.zip(&block.ends).map(|(begin, end)| &block.bytes[*begin..*end]).collect();
    let chunks: Vec<(Digest, &[u8])> =
        chunks.into_par_iter().map(|chunk| (Digest::of(chunk), chunk)).collect();
    sink.put_all(&chunks)?;
    let piece = |(digest, chunk): &(Digest, &[u8])| Piece {
        bytes: chunk.len() as u64,
        chunk: Some(*digest),
    };
    pieces.extend(chunks.iter().map(piece));
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::super::fake::Objects;
    use super::*;
    use fastcdc::v2020::StreamCDC;

    /// A reader that gives less than it is asked for.
    struct Slowly<'a>(&'a [u8]);

    impl Read for Slowly<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let most = into.len().min(70_001);
            self.0.read(&mut into[..most])
        }
    }

    #[test]
    fn blocks_do_not_show_in_the_cuts() {
        let (min, mean, max) = CHUNK_BYTES;
        let mut bytes = Vec::new();
        let mut state = 1_u64;
        while bytes.len() < 3 * BLOCK_BYTES {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            bytes.extend_from_slice(&(state >> 16).to_le_bytes()[..6]);
            // Long runs, which are cut at the largest size only.
            bytes.resize(bytes.len() + if state % 50_000 == 7 { 2 * max } else { 0 }, 0);
        }
        for length in [0, 1, min, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, bytes.len()] {
            let (mut objects, mut pieces) = (Objects::default(), Vec::new());
            let bytes = &bytes[..length];
            let read = cut(Slowly(bytes), Path::new("x"), &mut objects, &mut pieces).unwrap();
            assert_eq!(read, length as u64);
            let cuts: Vec<u64> = pieces.iter().map(|piece| piece.bytes).collect();
            let expected = StreamCDC::new(bytes, min, mean, max);
            let expected: Vec<u64> = expected.map(|cut| cut.unwrap().length as u64).collect();
            assert_eq!(cuts, expected, "of {length} bytes");
        }
    }
}
