//! CRIU's image files: two magic numbers, then messages, each behind its length.
//!
//! ```text
//! magic: u32 = 0x54564319   magic: u32 of the kind   (length: u32  message)*
//! ```
//!
//! Integers are little-endian; messages are protobuf (CRIU's images/*.proto). [`messages`] iterates
//! over them and [`rewritten`] replaces some. Messages that need no change are never encoded again:
//! their bytes are copied, so fields that this version does not know stay as they are.

use std::borrow::Cow;

/// First magic number of every image.
const COMMON_MAGIC: [u8; 4] = 0x5456_4319_u32.to_le_bytes();

/// Length of both magic numbers, in bytes.
pub(crate) const HEADER_BYTES: usize = 8;

/// Second magic number of an image, by kind (CRIU's criu/include/magic.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// `pagemap-*.img`
    Pagemap = 0x5608_4025,
    /// `core-*.img`: registers, signals and more of each thread.
    Core = 0x5505_3847,
    /// `mm-*.img`: the mappings of each process.
    Mm = 0x5749_2820,
    /// `files.img`: everything that has a descriptor.
    Files = 0x5630_3138,
    /// `remap-fpath.img`: files that are opened by another name than theirs.
    Remaps = 0x5913_3954,
}

/// A rule that an image breaks, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Offset of the message in the file, in bytes.
    pub(crate) offset: u64,
    /// What does not hold.
    pub(crate) rule: &'static str,
}

/// A message and its place in the file.
pub(crate) struct Framed<'a> {
    /// Offset of the message's length.
    pub(crate) offset: u64,
    pub(crate) message: &'a [u8],
}

/// Iterates over the messages of an image. The iteration ends at the first error.
pub(crate) fn messages(
    bytes: &[u8],
    kind: Kind,
    message_bytes_max: u32,
) -> Result<impl Iterator<Item = Result<Framed<'_>, Broken>>, Broken> {
    let header = [COMMON_MAGIC, (kind as u32).to_le_bytes()].concat();
    let broken = |rule| Broken { offset: 0, rule };
    let mut rest = bytes
        .strip_prefix(&header[..])
        .ok_or_else(|| broken("the magic numbers are another image's"))?;
    let mut offset = HEADER_BYTES as u64;
    Ok(std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        match split_message(rest, message_bytes_max) {
            Ok((message, after)) => {
                let framed = Framed { offset, message };
                offset += 4 + message.len() as u64;
                rest = after;
                Some(Ok(framed))
            }
            Err(rule) => {
                rest = &[];
                Some(Err(Broken { offset, rule }))
            }
        }
    }))
}

fn split_message(bytes: &[u8], message_bytes_max: u32) -> Result<(&[u8], &[u8]), &'static str> {
    let (len, after) = bytes.split_first_chunk().ok_or("a message is cut off")?;
    let len = u32::from_le_bytes(*len);
    if len > message_bytes_max {
        return Err("a message is too long");
    }
    after.split_at_checked(len as usize).ok_or("a message is cut off")
}

/// An image of `kind` without messages.
pub(crate) fn empty(kind: Kind) -> Vec<u8> {
    [COMMON_MAGIC, (kind as u32).to_le_bytes()].concat()
}

/// Appends a message to an image.
pub(crate) fn push(image: &mut Vec<u8>, message: &[u8]) {
    // Messages are made of messages that were read with a limit far below.
    let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
    image.extend_from_slice(&len.to_le_bytes());
    image.extend_from_slice(message);
}

/// The image with every message replaced for which `change` returns another; `None` if it returned
/// none.
pub(crate) fn rewritten(
    bytes: &[u8],
    kind: Kind,
    message_bytes_max: u32,
    mut change: impl FnMut(&[u8]) -> Option<Vec<u8>>,
) -> Result<Option<Vec<u8>>, Broken> {
    let mut all = Vec::new();
    for framed in messages(bytes, kind, message_bytes_max)? {
        let message = framed?.message;
        all.push(change(message).map_or(Cow::Borrowed(message), Cow::Owned));
    }
    if !all.iter().any(|message| matches!(message, Cow::Owned(_))) {
        return Ok(None);
    }
    let mut image = empty(kind);
    for message in all {
        push(&mut image, &message);
    }
    Ok(Some(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_and_replaced_and_the_others_stay() {
        let image = b"\x19\x43\x56\x54\x38\x31\x30\x56\x02\0\0\0ab\x01\0\0\0c";
        let found: Vec<_> = messages(image, Kind::Files, 8)
            .unwrap()
            .map(|framed| framed.map(|framed| (framed.offset, framed.message.to_vec())))
            .collect();
        assert_eq!(found, [Ok((8, b"ab".to_vec())), Ok((14, b"c".to_vec()))]);
        let change = |message: &[u8]| (message == b"c").then(|| b"def".to_vec());
        let changed = rewritten(image, Kind::Files, 8, change).unwrap().unwrap();
        assert_eq!(changed, b"\x19\x43\x56\x54\x38\x31\x30\x56\x02\0\0\0ab\x03\0\0\0def");
        assert_eq!(rewritten(image, Kind::Files, 8, |_| None), Ok(None));
    }

    #[test]
    fn a_foreign_or_torn_image_is_an_error_with_its_place() {
        let image = b"\x19\x43\x56\x54\x38\x31\x30\x56\x02\0\0\0ab\x01\0\0\0";
        let rewrite = |bytes: &[u8], kind| rewritten(bytes, kind, 8, |_| None).unwrap_err();
        assert_eq!(rewrite(image, Kind::Core).rule, "the magic numbers are another image's");
        let cut = Broken { offset: 14, rule: "a message is cut off" };
        assert_eq!(rewrite(image, Kind::Files), cut);
        assert_eq!(messages(image, Kind::Files, 1).unwrap().filter(Result::is_err).count(), 1);
    }
}
