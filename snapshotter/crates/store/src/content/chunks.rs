//! Cutting bytes into chunks, and lists into objects: the same bytes are cut alike on every node.

use std::io::Read;
use std::path::Path;

use fastcdc::v2020::FastCDC;
use godwit_protos::Digest;
use rayon::prelude::*;

use super::object::{Content, Piece, Pieces};
use super::{ContentError, Sink, on};

/// Bounds of a chunk, in bytes: FastCDC (Xia et al., USENIX ATC 2016) between them.
const CHUNK_BYTES: (usize, usize, usize) = (16 << 10, 64 << 10, 256 << 10);

/// Pieces that stand in the object itself; a file with more gets [`Pieces`] objects.
const PIECES_INLINE_MAX: usize = 32;

/// Bytes that are read and cut at a time, while those before them are hashed and those before these
/// are stored.
const BLOCK_BYTES: usize = 1 << 20;

/// Entries or pieces per object, at most; on average a quarter of it.
pub(super) const LIST_MAX: usize = 1024;

/// Cuts `data`, which `path` stands for in errors, and adds its pieces to `pieces`. Returns its
/// length in bytes.
///
/// Errors: [`ContentError::File`] when it cannot be read, or the sink's.
pub fn cut(
    data: impl Read + Send,
    path: &Path,
    sink: &mut dyn Sink,
    pieces: &mut Vec<Piece>,
) -> Result<u64, ContentError> {
    let mut cutter = Cutter { data, rest: Vec::new(), has_ended: false };
    let mut first = Block::default();
    cutter.fill(&mut first).map_err(on("read", path))?;
    if cutter.has_ended && first.ends.len() <= 1 {
        // Most files: nothing to share out, and waking a thread takes longer than the hash.
        let bytes = first.bytes.len() as u64;
        if bytes > 0 {
            pieces.push(Piece { bytes, chunk: Some(sink.put(&first.bytes)?) });
        }
        return Ok(bytes);
    }
    rayon::scope(|_| cut_on(cutter, first, path, sink, pieces))
}

/// Goes on behind `first`. To be called in the pool, so that what is shared out need not first get
/// there.
fn cut_on(
    mut cutter: Cutter<impl Read + Send>,
    first: Block,
    path: &Path,
    sink: &mut dyn Sink,
    pieces: &mut Vec<Piece>,
) -> Result<u64, ContentError> {
    let mut read = first.bytes.len() as u64;
    let mut blocks = [Block::default(), first, Block::default()];
    loop {
        let [next, cut, hashed] = &mut blocks;
        // What only one processor can do goes first; the hashes fill the gaps.
        let (put, (filled, ())) = rayon::join(
            || hashed.put(sink, pieces),
            || rayon::join(|| cutter.fill(next), || cut.hash()),
        );
        put?;
        filled.map_err(on("read", path))?;
        read += next.bytes.len() as u64;
        if next.bytes.is_empty() && cut.bytes.is_empty() {
            return Ok(read);
        }
        blocks.rotate_right(1);
    }
}

/// Whole chunks, one behind the other.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    /// Where each chunk ends.
    ends: Vec<usize>,
    digests: Vec<Digest>,
}

impl Block {
    fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(&0).chain(&self.ends);
        begins.zip(&self.ends).map(|(begin, end)| &self.bytes[*begin..*end])
    }

    fn hash(&mut self) {
        let chunks: Vec<&[u8]> = self.chunks().collect();
        self.digests = chunks.into_par_iter().map(Digest::of).collect();
    }

    fn put(&self, sink: &mut dyn Sink, pieces: &mut Vec<Piece>) -> Result<(), ContentError> {
        let chunks: Vec<(Digest, &[u8])> =
            self.digests.iter().copied().zip(self.chunks()).collect();
        sink.put_all(&chunks)?;
        let piece = |(digest, chunk): &(Digest, &[u8])| Piece {
            bytes: chunk.len() as u64,
            chunk: Some(*digest),
        };
        pieces.extend(chunks.iter().map(piece));
        Ok(())
    }
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
        let Block { bytes, ends, .. } = block;
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

/// Puts a list of pieces where an object can refer to it.
pub fn put_pieces(sink: &mut dyn Sink, pieces: Vec<Piece>) -> Result<Content, ContentError> {
    if pieces.len() <= PIECES_INLINE_MAX {
        return Ok(Content::Pieces(pieces));
    }
    let cut = |piece: &Piece| piece.chunk.is_some_and(|chunk| chunk.as_bytes()[0] == 0);
    let mut blocks = Vec::new();
    for block in cut_where(pieces, cut) {
        blocks.push(super::put_object(sink, &Pieces(block))?);
    }
    Ok(Content::Blocks(blocks))
}

/// Cuts a list after each element for which `cut` holds, and where a part would exceed
/// [`LIST_MAX`].
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
