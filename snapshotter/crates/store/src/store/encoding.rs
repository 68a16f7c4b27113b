//! In which form an object lies in a pack: as it is, or compressed with zstd where that helps.
//!
//! Most objects are memory pages of 4 KiB, and many of those are incompressible. Trying zstd on
//! each would cost more than everything else, so a sample decides first: among 512 random bytes
//! about 1 000 ordered pairs are equal, in anything that compresses well by single bytes there are
//! several times as many.

use std::borrow::Cow;
use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};

/// Form of an object in a pack and between peers. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// The bytes themselves.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Encoding {
    /// The encoding with number `byte`, if there is one.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

const LEVEL: i32 = 1;

/// Below this size, in bytes, a frame's own header eats what could be gained.
const SMALLEST_WORTH: usize = 128;

/// Blocks of the sample and bytes in each.
const SAMPLE_BLOCKS: usize = 8;
const SAMPLE_BLOCK_BYTES: usize = 64;

thread_local! {
    /// `None` if zstd could not be set up: then everything is stored raw.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> =
        RefCell::new(Compressor::new(LEVEL).ok());
}

/// `bytes` in the form that they are stored in.
pub(super) fn encode(bytes: &[u8]) -> (Encoding, Cow<'_, [u8]>) {
    let raw = (Encoding::Raw, Cow::Borrowed(bytes));
    compressed(bytes).map_or(raw, |frame| (Encoding::Zstd, Cow::Owned(frame)))
}

/// The zstd frame of `bytes`, if it saves the eighth that makes it worth the time of undoing it.
fn compressed(bytes: &[u8]) -> Option<Vec<u8>> {
    if bytes.len() < SMALLEST_WORTH || looks_random(bytes) {
        return None;
    }
    let limit = bytes.len() - bytes.len() / 8;
    COMPRESSOR.with_borrow_mut(|zstd| {
        // A frame that does not fit is not worth it.
        let mut frame = Vec::with_capacity(limit);
        zstd.as_mut()?.compress_to_buffer(bytes, &mut frame).ok()?;
        Some(frame)
    })
}

fn looks_random(bytes: &[u8]) -> bool {
    let mut counts = [0_u32; 256];
    let mut sampled = 0;
    let stride = (bytes.len() / SAMPLE_BLOCKS).max(1);
    for block in bytes.chunks(stride) {
        for byte in block.iter().take(SAMPLE_BLOCK_BYTES) {
            counts[usize::from(*byte)] += 1;
            sampled += 1;
        }
    }
    let equal_pairs: u32 = counts.iter().map(|count| count * count.saturating_sub(1)).sum();
    // Random bytes: sampled * (sampled - 1) / 256 pairs, give or take 5%.
    let expected: u32 = sampled * (sampled - 1) / 256;
    equal_pairs < expected + expected / 3
}

/// Undoes [`encode`], with one context for many objects.
pub(super) struct Decoder {
    zstd: Option<Decompressor<'static>>,
    buffer: Vec<u8>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { zstd: None, buffer: Vec::new() }
    }

    /// The object of `size` bytes; `None` if `stored` does not give exactly that many.
    pub(super) fn decode<'a>(
        &'a mut self,
        encoding: Encoding,
        stored: &'a [u8],
        size: usize,
    ) -> Option<&'a [u8]> {
        match encoding {
            Encoding::Raw => (stored.len() == size).then_some(stored),
            Encoding::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Some(Decompressor::new().ok()?);
                }
                self.buffer.clear();
                // The frame may announce anything; the buffer's capacity is what bounds it.
                self.buffer.reserve_exact(size);
                let len =
                    self.zstd.as_mut()?.decompress_to_buffer(stored, &mut self.buffer).ok()?;
                (len == size).then_some(&self.buffer)
            }
        }
    }
}

/// Decodes bytes that a peer sent in `encoding`; `None` if they do not give exactly `size` bytes.
///
/// `size` must already be within its limit: it is allocated.
pub fn decode(encoding: Encoding, stored: &[u8], size: usize) -> Option<Vec<u8>> {
    Decoder::new().decode(encoding, stored, size).map(<[u8]>::to_vec)
}

#[cfg(test)]
pub(super) fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_are_not_compressed_and_text_and_pointers_are() {
        for seed in 0..200 {
            let page = random_bytes(seed, 4096);
            assert!(looks_random(&page), "seed {seed}");
            assert_eq!(compressed(&page), None);
        }
        let pointers: Vec<u8> =
            (0..512_u64).flat_map(|i| (0x7f00_1234_0000 + i * 48).to_le_bytes()).collect();
        let text = b"The quick brown fox jumps over the lazy dog. ".repeat(90);
        for compressible in [pointers, text, vec![0; 4096], vec![0; 4 << 20]] {
            let frame = compressed(&compressible).unwrap();
            assert!(frame.len() < compressible.len() / 2);
            assert_eq!(decode(Encoding::Zstd, &frame, compressible.len()), Some(compressible));
        }
    }

    #[test]
    fn a_frame_that_gives_more_or_less_than_announced_is_refused() {
        let bytes = vec![7; 4096];
        let frame = compressed(&bytes).unwrap();
        for size in [0, 1, 4095, 4097, 1 << 20] {
            assert_eq!(decode(Encoding::Zstd, &frame, size), None, "{size}");
        }
        assert_eq!(decode(Encoding::Zstd, b"not a frame", 11), None);
        assert_eq!(decode(Encoding::Raw, b"four", 5), None);
    }
}
