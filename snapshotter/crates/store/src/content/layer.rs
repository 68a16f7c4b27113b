//! The uncompressed bytes of an image's layer as a [`Layer`] object, and back.
//!
//! The object keeps every byte of the stream, so that every holder can pass on exactly what its
//! diff ID names. Whether the bytes are those is for the caller to see: the object names chunks,
//! not their sum.

use std::io::Read;
use std::path::Path;

use godwit_protos::Digest;

use super::object::{Content, Kind, Layer, ObjectError, Piece, Pieces};
use super::{ContentError, Sink, Source, chunks};

/// Stores the bytes of a layer, which `path` stands for in errors. Returns its object and its
/// length in bytes.
pub fn put(
    data: impl Read + Send,
    path: &Path,
    sink: &mut dyn Sink,
) -> Result<(Digest, u64), ContentError> {
    let mut pieces = Vec::new();
    let bytes = chunks::cut(data, path, sink, &mut pieces)?;
    let content = chunks::put_pieces(sink, pieces)?;
    Ok((super::put_object(sink, &Layer { bytes, content })?, bytes))
}

/// Gives the bytes of the layer `root` from `offset` on to `give`, piece by piece, until that says
/// `false`.
///
/// Errors: [`ContentError`], also for an object whose pieces are not what it says. What was given
/// by then is the beginning of what it should be.
pub fn read(
    source: &impl Source,
    root: &Digest,
    offset: u64,
    give: &mut dyn FnMut(Vec<u8>) -> bool,
) -> Result<(), ContentError> {
    let layer: Layer = source.decode(root)?;
    let mut reading = Reading { source, root, bytes: layer.bytes, at: 0, offset, give };
    let goes_on = match layer.content {
        Content::Pieces(pieces) => reading.pieces(pieces)?,
        // One by one: a stranger's list of lists may be longer than memory.
        Content::Blocks(blocks) => {
            let mut goes_on = true;
            for block in blocks {
                goes_on = goes_on && reading.pieces(source.decode::<Pieces>(&block)?.0)?;
            }
            goes_on
        }
    };
    if goes_on && reading.at != layer.bytes {
        return Err(reading.broken("pieces add up to the whole size"));
    }
    Ok(())
}

struct Reading<'a, S> {
    source: &'a S,
    root: &'a Digest,
    bytes: u64,
    at: u64,
    offset: u64,
    give: &'a mut dyn FnMut(Vec<u8>) -> bool,
}

impl<S: Source> Reading<'_, S> {
    /// Whether more is wanted.
    fn pieces(&mut self, pieces: Vec<Piece>) -> Result<bool, ContentError> {
        for piece in pieces {
            let begin = self.at;
            self.at = begin.saturating_add(piece.bytes);
            if self.at > self.bytes {
                return Err(self.broken("pieces add up to the whole size"));
            }
            if self.at <= self.offset {
                continue;
            }
            let Some(chunk) = piece.chunk else { return Err(self.broken("a layer has no holes")) };
            let mut data = self.source.object(&chunk)?;
            if data.len() as u64 != piece.bytes {
                return Err(self.broken("a piece is as long as its chunk"));
            }
            let known = usize::try_from(self.offset.saturating_sub(begin)).unwrap_or(usize::MAX);
            data.drain(..known.min(data.len()));
            if !(self.give)(data) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn broken(&self, rule: &'static str) -> ContentError {
        let source = ObjectError::Rule { kind: Kind::Layer, rule };
        ContentError::Object { digest: *self.root, source }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Objects;
    use super::*;
    use crate::content::object::Object as _;

    fn noise(bytes: u32) -> Vec<u8> {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        (0..bytes).map(next).collect()
    }

    fn all(objects: &Objects, root: &Digest, offset: u64) -> Result<Vec<u8>, ContentError> {
        let mut bytes = Vec::new();
        read(objects, root, offset, &mut |data| {
            bytes.extend(data);
            true
        })?;
        Ok(bytes)
    }

    #[test]
    fn every_byte_of_a_layer_comes_back_from_any_offset() {
        for bytes in [noise(0), noise(10), noise(5 << 20)] {
            let mut objects = Objects::default();
            let (root, length) = put(&bytes[..], Path::new("x"), &mut objects).unwrap();
            assert_eq!(length, bytes.len() as u64);
            let again = put(&bytes[..], Path::new("x"), &mut Objects::default()).unwrap();
            assert_eq!(again.0, root, "every node makes the same object");
            for offset in [0, 1, bytes.len() / 3, bytes.len()].map(|at| at.min(bytes.len())) {
                let read = all(&objects, &root, offset as u64).unwrap();
                assert!(read == bytes[offset..], "from {offset} of {length}");
            }
        }
    }

    #[test]
    fn a_reader_that_has_enough_is_given_no_more() {
        let mut objects = Objects::default();
        let (root, _) = put(&noise(5 << 20)[..], Path::new("x"), &mut objects).unwrap();
        let mut given = 0;
        read(&objects, &root, 0, &mut |_| {
            given += 1;
            given < 3
        })
        .unwrap();
        assert_eq!(given, 3);
    }

    #[test]
    fn the_bytes_of_a_layer_object_are_these() {
        let chunk = Digest::of(b"x");
        let content = Content::Pieces(vec![Piece { bytes: 1, chunk: Some(chunk) }]);
        let bytes = Layer { bytes: 1, content }.encode();
        assert_eq!(bytes[..5], [1, 1, 0, 1, 1]);
        assert_eq!((bytes[5], &bytes[6..]), (1, &chunk.as_bytes()[..]));
    }

    /// Method: objects that decode but do not say the truth, as a stranger may write them.
    #[test]
    fn a_layer_that_contradicts_itself_is_an_error_and_never_longer_than_it_says() {
        let mut objects = Objects::default();
        let chunk = Some(objects.put(b"four").unwrap());
        let full = objects.put(&Pieces(vec![Piece { bytes: 4, chunk }]).encode()).unwrap();
        let short = objects.put(&Pieces(vec![Piece { bytes: 3, chunk }]).encode()).unwrap();
        let hole = objects.put(&Pieces(vec![Piece { bytes: 1 << 60, chunk: None }]).encode());
        for (bytes, blocks) in [
            (8, vec![full]),
            (8, vec![full; 3]),
            (3, vec![short]),
            (1 << 60, vec![hole.unwrap()]),
            (4, vec![Digest::of(b"nowhere")]),
        ] {
            let layer = Layer { bytes, content: Content::Blocks(blocks) };
            let root = objects.put(&layer.encode()).unwrap();
            let mut given = 0;
            let outcome = read(&objects, &root, 0, &mut |data| {
                given += data.len() as u64;
                true
            });
            assert!(outcome.is_err() && given <= bytes, "{layer:?} gave {given}");
        }
        let inline = Content::Pieces(vec![Piece { bytes: 4, chunk }]);
        assert!(Layer::decode(&Layer { bytes: 5, content: inline }.encode()).is_err());
    }
}
