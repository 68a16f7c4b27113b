//! How an object travels: as it is, compressed, or compressed against one that the receiver holds.
//!
//! The last uses the base object as a raw dictionary for zstd, so a match may point into it: what
//! two versions have in common costs a few bytes wherever it stands. Decoding takes bytes from
//! peers: the announced size is checked against a limit before memory is taken, and the result
//! against the digest.

use godwit_protos::Digest;
use zstd::zstd_safe::{CCtx, DCtx, compress_bound, get_error_name};

use super::object::OBJECT_BYTES_MAX;

/// How the bytes of a message become an object; the numbers are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Encoding {
    /// As they are.
    Plain = 0,
    /// zstd.
    Zstd = 1,
    /// zstd with another object as raw dictionary.
    Patch = 2,
}

/// Why received bytes are not the object that was asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A number that no version of the protocol has.
    #[error("encoding {0} is unknown")]
    Encoding(u32),
    /// More than the limit.
    #[error("an object of {0} bytes is announced, limit is {OBJECT_BYTES_MAX}")]
    TooLarge(u64),
    /// zstd refused the bytes.
    #[error("zstd: {0}")]
    Zstd(&'static str),
    /// The bytes do not have the announced size or digest.
    #[error("the bytes do not match digest {0}")]
    Digest(Digest),
}

/// Level of compression: objects are many and small, and the link is fast or the processor idle.
const LEVEL: i32 = 1;

/// Compresses and expands objects one after the other with the same working memory.
#[derive(Default)]
pub struct Codec {
    compress: CCtx<'static>,
    expand: DCtx<'static>,
}

impl std::fmt::Debug for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Codec")
    }
}

impl Codec {
    /// `bytes` against `base`; `None` unless that takes at most seven eighths of `limit` bytes,
    /// which is what the object costs otherwise.
    pub fn patch(&mut self, bytes: &[u8], base: &[u8], limit: usize) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(compress_bound(bytes.len()));
        let size = self.compress.compress_using_dict(&mut out, bytes, base, LEVEL).ok()?;
        (size <= limit - limit / 8).then_some(out)
    }

    /// The object that `data` stands for, checked against `digest`.
    ///
    /// - `size` is what the sender announces, in bytes; `base` the object that a patch names.
    /// - Errors: [`DecodeError`]; ask another peer.
    pub fn decode(
        &mut self,
        digest: &Digest,
        encoding: u32,
        size: u64,
        data: &[u8],
        base: &[u8],
    ) -> Result<Vec<u8>, DecodeError> {
        let announced = usize::try_from(size).ok().filter(|size| *size <= OBJECT_BYTES_MAX);
        let announced = announced.ok_or(DecodeError::TooLarge(size))?;
        let mut out = Vec::new();
        match encoding {
            0 if data.len() == announced => out.extend_from_slice(data),
            0 => return Err(DecodeError::Digest(*digest)),
            1 | 2 => {
                out.reserve_exact(announced);
                let done = if encoding == 1 {
                    self.expand.decompress(&mut out, data)
                } else {
                    self.expand.decompress_using_dict(&mut out, data, base)
                };
                done.map_err(|code| DecodeError::Zstd(get_error_name(code)))?;
            }
            other => return Err(DecodeError::Encoding(other)),
        }
        if out.len() == announced && Digest::of(&out) == *digest {
            Ok(out)
        } else {
            Err(DecodeError::Digest(*digest))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let step = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        };
        (0..bytes).map(step).collect()
    }

    #[test]
    fn a_changed_word_in_a_page_costs_little_more_than_the_word() {
        let base = noise(3, 4096);
        let mut page = base.clone();
        page[2000..2008].copy_from_slice(b"changed!");
        let mut codec = Codec::default();
        let patch = codec.patch(&page, &base, page.len()).unwrap();
        assert!(patch.len() < 64, "{} bytes", patch.len());
        let digest = Digest::of(&page);
        assert_eq!(codec.decode(&digest, 2, 4096, &patch, &base), Ok(page));
        assert!(codec.decode(&digest, 2, 4096, &patch, &noise(4, 4096)).is_err());
    }

    #[test]
    fn noise_against_other_noise_is_not_worth_a_patch() {
        assert_eq!(Codec::default().patch(&noise(5, 4096), &noise(6, 4096), 4096), None);
    }

    #[test]
    fn an_announced_size_beyond_the_limit_is_refused_before_memory_is_taken() {
        let (mut codec, digest) = (Codec::default(), Digest::of(b""));
        let refused = codec.decode(&digest, 1, u64::MAX, &[], &[]);
        assert_eq!(refused, Err(DecodeError::TooLarge(u64::MAX)));
    }

    #[test]
    fn bytes_under_a_wrong_name_are_refused() {
        let (mut codec, digest) = (Codec::default(), Digest::of(b"right"));
        assert_eq!(codec.decode(&digest, 0, 5, b"wrong", &[]), Err(DecodeError::Digest(digest)));
        assert_eq!(codec.decode(&digest, 7, 5, b"right", &[]), Err(DecodeError::Encoding(7)));
    }

    proptest! {
        #[test]
        fn bytes_of_a_peer_never_panic(data: Vec<u8>, encoding in 0u32..4, size in 0u64..10_000) {
            let _ = Codec::default().decode(&Digest::of(b"x"), encoding, size, &data, b"base");
        }
    }
}
