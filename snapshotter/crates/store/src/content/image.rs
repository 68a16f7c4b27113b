//! A block volume as objects and back: an [`Image`] of [`Pieces`], 16 MiB each, of chunks of
//! [`CHUNK_BYTES`].
//!
//! Chunks are cut at fixed places. A file system changes its blocks where they are, so a cut never
//! has to move with what was inserted, as it has to in a file (docs/adr/0010 has figures). What is
//! all zeroes becomes a hole, whether it is one on disk or not: the image of a new file system is
//! nearly empty.
//!
//! An image is read while it is mounted, except at the cut: then it may be torn, and only what
//! changed is sent again. Each capture reads and hashes all of its data: what a loop device wrote
//! to cannot be had cheaply, and the image's times do not tell, since they change when a
//! write begins and not when it is done.
//!
//! On failure an image that was being written is neither the old nor the new one: throw it away.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use godwit_protos::{Digest, FileSystem};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use rayon::prelude::*;

use super::capture::Captured;
use super::materialize::write_pieces;
use super::object::{IMAGE_BLOCK_BYTES, IMAGE_BYTES_MAX, Image, Kind, ObjectError, Piece, Pieces};
use super::{ContentError, Sink, Source, on};

/// Bytes of a chunk; the last one of an image may be shorter.
const CHUNK_BYTES: u64 = 16 << 10;

/// Reads the image at `path` into `sink`. The size that comes back is that of what is no hole.
///
/// Errors: [`ContentError::File`], also for a size that no image has; or the sink's.
pub fn capture_image(
    path: &Path,
    file_system: FileSystem,
    sink: &mut dyn Sink,
) -> Result<Captured, ContentError> {
    let mut options = File::options();
    let file = options.read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path);
    let file = file.map_err(on("open", path))?;
    let bytes = file.metadata().map_err(on("stat", path))?.len();
    if !(1..=IMAGE_BYTES_MAX).contains(&bytes) {
        return Err(on("use the size of", path)(Errno::EFBIG));
    }
    let (mut blocks, mut start, mut data_bytes) = (Vec::new(), 0, 0);
    while start < bytes {
        let end = bytes.min(start + IMAGE_BLOCK_BYTES);
        let pieces = block(&file, path, (start, end), sink)?;
        let data = pieces.iter().filter(|piece| piece.chunk.is_some());
        data_bytes += data.map(|piece| piece.bytes).sum::<u64>();
        blocks.push(super::put_object(sink, &Pieces(pieces))?);
        start = end;
    }
    let tree = super::put_object(sink, &Image { file_system, bytes, blocks })?;
    Ok(Captured { tree, bytes: data_bytes })
}

/// The pieces of one block, whose chunks are stored.
fn block(
    file: &File,
    path: &Path,
    (start, end): (u64, u64),
    sink: &mut dyn Sink,
) -> Result<Vec<Piece>, ContentError> {
    let read = |at: u64| {
        let mut data = vec![0; usize::try_from(CHUNK_BYTES.min(end - at)).unwrap_or(0)];
        file.read_exact_at(&mut data, at)?;
        let digest = data.iter().any(|byte| *byte != 0).then(|| Digest::of(&data));
        Ok((at, data, digest))
    };
    let offsets = with_data(file, (start, end)).map_err(on("seek data in", path))?;
    let chunks: std::io::Result<Vec<_>> = offsets.into_par_iter().map(read).collect();
    let chunks = chunks.map_err(on("read", path))?;
    let data = chunks.iter().filter_map(|(_, data, digest)| Some(((*digest)?, &data[..])));
    sink.put_all(&data.collect::<Vec<_>>())?;
    let (mut pieces, mut done) = (Vec::new(), start);
    for (at, data, digest) in chunks.into_iter().filter(|(_, _, digest)| digest.is_some()) {
        pieces.extend((at > done).then(|| Piece { bytes: at - done, chunk: None }));
        pieces.push(Piece { bytes: data.len() as u64, chunk: digest });
        done = at + data.len() as u64;
    }
    pieces.extend((end > done).then(|| Piece { bytes: end - done, chunk: None }));
    Ok(pieces)
}

/// Where chunks begin that are not holes, as the file system tells (`lseek(2)`, `SEEK_DATA`).
fn with_data(file: &File, (start, end): (u64, u64)) -> Result<Vec<u64>, Errno> {
    let seek = |at: u64, whence| {
        let found = lseek(file, i64::try_from(at).unwrap_or(i64::MAX), whence)?;
        Ok(u64::try_from(found).unwrap_or(end).min(end))
    };
    let (mut offsets, mut at) = (Vec::new(), start);
    while at < end {
        let data = match seek(at, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            data => data?,
        };
        if data == end {
            break;
        }
        let hole = seek(data, Whence::SeekHole)?;
        at = data - data % CHUNK_BYTES;
        while at < hole {
            offsets.push(at);
            at += CHUNK_BYTES;
        }
    }
    Ok(offsets)
}

/// Makes the file `target` equal to the image `new`.
///
/// - `base` is the image that it is equal to now; `None`: there is no such file.
/// - Errors: [`ContentError`]; the file is then to be thrown away.
pub fn write_image<S: Source>(
    source: &S,
    new: &Digest,
    base: Option<&Digest>,
    target: &Path,
) -> Result<(), ContentError> {
    let image: Image = source.decode(new)?;
    let base = base.map(|base| source.decode::<Image>(base)).transpose()?;
    let mut options = File::options();
    options.write(true).create_new(base.is_none()).mode(0o600);
    let file =
        options.custom_flags(nix::libc::O_NOFOLLOW).open(target).map_err(on("open", target))?;
    file.set_len(image.bytes).map_err(on("set the length of", target))?;
    let before = base.map(|base| base.blocks).unwrap_or_default();
    for (index, block) in image.blocks.iter().enumerate() {
        let start = index as u64 * IMAGE_BLOCK_BYTES;
        if before.get(index) == Some(block) {
            continue;
        }
        let pieces: Pieces = source.decode(block)?;
        let wanted = IMAGE_BLOCK_BYTES.min(image.bytes - start);
        let sum = pieces.0.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.bytes));
        if sum != Some(wanted) {
            let rule = "pieces add up to the block's size";
            let source = ObjectError::Rule { kind: Kind::Pieces, rule };
            return Err(ContentError::Object { digest: *block, source });
        }
        let old = before.get(index).map(|old| source.decode::<Pieces>(old)).transpose()?;
        let old = old.map(|old| old.0);
        write_pieces(source, (&file, target), start, &pieces.0, old.as_deref())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::difference::difference;
    use crate::content::fake::Objects;
    use crate::content::object::Object as _;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    const IMAGE: u64 = 2 * IMAGE_BLOCK_BYTES + 3 * CHUNK_BYTES + 777;

    fn take(path: &Path, objects: &mut Objects) -> Captured {
        capture_image(path, FileSystem::Ext4, objects).unwrap()
    }

    /// A sparse image with these runs of bytes.
    fn sparse(path: &Path, runs: &[(u64, &[u8])]) -> File {
        let file = File::options().create(true).truncate(true).write(true).open(path).unwrap();
        file.set_len(IMAGE).unwrap();
        for (at, bytes) in runs {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    fn changed(objects: &Objects, new: Digest, base: Option<Digest>) -> Vec<Kind> {
        let mut kinds = Vec::new();
        difference(objects, Kind::Image, new, base, &mut |one| {
            kinds.push(one.kind);
            Ok(())
        })
        .unwrap();
        kinds
    }

    #[test]
    fn an_image_comes_out_the_same_with_its_holes_and_zeroes_become_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let zeroes = vec![0; 4 << 20];
        sparse(&from, &[(1, b"first"), (9 << 20, &zeroes), (IMAGE - 3, b"end")]);
        let mut objects = Objects::default();
        let taken = take(&from, &mut objects);
        assert_eq!(taken.bytes, CHUNK_BYTES + 777);
        write_image(&objects, &taken.tree, None, &to).unwrap();
        assert!(fs::read(&to).unwrap() == fs::read(&from).unwrap());
        let made = fs::metadata(&to).unwrap();
        assert!(made.blocks() * 512 < 1 << 20, "holes stay holes");
        assert_eq!(made.mode() & 0o777, 0o600);
    }

    /// Method: a page in the middle is overwritten, as a file system does.
    #[test]
    fn an_overwritten_page_costs_one_chunk_and_the_lists_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let noise = |i: u32| i.wrapping_mul(2_654_435_761).to_le_bytes()[2];
        let noise: Vec<u8> = (0..8u32 << 20).map(noise).collect();
        let file = sparse(&path, &[(IMAGE_BLOCK_BYTES, &noise)]);
        let mut objects = Objects::default();
        let before = take(&path, &mut objects).tree;
        file.write_all_at(&[7; 4096], IMAGE_BLOCK_BYTES + (3 << 20)).unwrap();
        let after = take(&path, &mut objects).tree;
        assert_eq!(
            changed(&objects, after, Some(before)),
            [Kind::Image, Kind::Pieces, Kind::Chunk]
        );
        assert_eq!(changed(&objects, after, Some(after)), []);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (empty, link) = (dir.path().join("empty"), dir.path().join("link"));
        File::create(&empty).unwrap();
        symlink("/etc/passwd", &link).unwrap();
        let mut objects = Objects::default();
        for path in [&empty, &link, &dir.path().join("absent")] {
            let error = capture_image(path, FileSystem::Ext4, &mut objects).unwrap_err();
            assert!(matches!(error, ContentError::File { .. }), "{error}");
        }
    }

    #[test]
    fn an_image_of_a_hostile_peer_neither_leaves_its_place_nor_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("image");
        let mut objects = Objects::default();
        let chunk = objects.put(b"outside").unwrap();
        let long = Pieces(vec![
            Piece { bytes: IMAGE_BLOCK_BYTES, chunk: None },
            Piece { bytes: u64::MAX, chunk: None },
            Piece { bytes: 7, chunk: Some(chunk) },
        ]);
        let block = objects.put(&long.encode()).unwrap();
        let image = Image { file_system: FileSystem::Ext4, bytes: 4096, blocks: vec![block] };
        let image = objects.put(&image.encode()).unwrap();
        let error = write_image(&objects, &image, None, &target).unwrap_err();
        assert!(matches!(error, ContentError::Object { digest, .. } if digest == block), "{error}");
        assert!(fs::metadata(&target).unwrap().len() <= 4096);

        // What is said to be a piece of 4096 bytes is longer.
        let block =
            Pieces(vec![Piece { bytes: 4096, chunk: Some(objects.put(&[7; 8192]).unwrap()) }]);
        let block = objects.put(&block.encode()).unwrap();
        let image = Image { file_system: FileSystem::Ext4, bytes: 4096, blocks: vec![block] };
        let image = objects.put(&image.encode()).unwrap();
        fs::remove_file(&target).unwrap();
        assert!(write_image(&objects, &image, None, &target).is_err());

        fs::remove_file(&target).unwrap();
        symlink(dir.path().join("elsewhere"), &target).unwrap();
        assert!(write_image(&objects, &image, None, &target).is_err());
        assert!(write_image(&objects, &image, Some(&image), &target).is_err());
        assert!(!dir.path().join("elsewhere").exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        /// Method: any writes and zeroes, any number of rounds; a patched image equals the one that
        /// was captured.
        #[test]
        fn patching_equals_copying(
            rounds in proptest::collection::vec(
                proptest::collection::vec((0..IMAGE - 70_000, 1..70_000usize, 0..3u8), 0..5),
                1..4,
            )
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (from, to) = (dir.path().join("from"), dir.path().join("to"));
            let file = sparse(&from, &[]);
            let (mut objects, mut base) = (Objects::default(), None);
            for writes in rounds {
                for (at, bytes, value) in writes {
                    file.write_all_at(&vec![value; bytes], at).unwrap();
                }
                let image = take(&from, &mut objects).tree;
                write_image(&objects, &image, base.as_ref(), &to).unwrap();
                prop_assert!(fs::read(&to).unwrap() == fs::read(&from).unwrap());
                base = Some(image);
            }
        }
    }
}
