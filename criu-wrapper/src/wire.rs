//! Protobuf messages as bytes: reading a field, and replacing one without touching the others.
//!
//! A decoder of generated types drops fields that it does not know. Here all fields but the
//! replaced one keep their bytes, whichever version of CRIU wrote them.

/// What a field holds. Fixed-width numbers are skipped: no field of interest is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// Integers, enums, bools.
    Number(u64),
    /// Strings, bytes, messages.
    Bytes(&'a [u8]),
    /// Anything else.
    Fixed,
}

/// A new value for a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum New {
    Number(u64),
    Bytes(Vec<u8>),
}

/// A field of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u64,
    pub(crate) value: Value<'a>,
    /// The whole field with its key.
    raw: &'a [u8],
}

/// Iterates over the fields of a message. An iteration that meets bytes that are no field ends with
/// `None` as its last item.
fn fields(mut message: &[u8]) -> impl Iterator<Item = Option<Field<'_>>> {
    std::iter::from_fn(move || {
        if message.is_empty() {
            return None;
        }
        let Some((field, rest)) = split_field(message) else {
            message = &[];
            return Some(None);
        };
        message = rest;
        Some(Some(field))
    })
}

fn split_field(message: &[u8]) -> Option<(Field<'_>, &[u8])> {
    let (key, rest) = split_varint(message)?;
    let (value, rest) = match key & 7 {
        0 => {
            let (number, rest) = split_varint(rest)?;
            (Value::Number(number), rest)
        }
        1 => (Value::Fixed, rest.get(8..)?),
        2 => {
            let (len, rest) = split_varint(rest)?;
            let (bytes, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
            (Value::Bytes(bytes), rest)
        }
        5 => (Value::Fixed, rest.get(4..)?),
        _ => return None,
    };
    let raw = &message[..message.len() - rest.len()];
    Some((Field { number: key >> 3, value, raw }, rest))
}

fn split_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push((value & 0x7f) as u8);
}

/// The numeric field `number`; of several the last, as protobuf has it. `None` if it is absent or
/// the message is broken.
pub(crate) fn number(message: &[u8], number: u64) -> Option<u64> {
    let mut found = None;
    for field in fields(message) {
        match field? {
            Field { number: n, value: Value::Number(value), .. } if n == number => {
                found = Some(value);
            }
            _ => {}
        }
    }
    found
}

/// Several numeric fields in one pass, each 0 if it is absent; `None` if the message is broken.
pub(crate) fn numbers<const N: usize>(message: &[u8], wanted: [u64; N]) -> Option<[u64; N]> {
    let mut found = [0; N];
    for field in fields(message) {
        let Field { number, value, .. } = field?;
        if let (Value::Number(value), Some(at)) = (value, wanted.iter().position(|n| *n == number))
        {
            found[at] = value;
        }
    }
    Some(found)
}

/// Every field `number` that holds bytes; none if the message is broken.
pub(crate) fn all_bytes(message: &[u8], number: u64) -> Vec<&[u8]> {
    let mut found = Vec::new();
    for field in fields(message) {
        match field {
            Some(Field { number: n, value: Value::Bytes(bytes), .. }) if n == number => {
                found.push(bytes);
            }
            Some(_) => {}
            None => return Vec::new(),
        }
    }
    found
}

/// The message at the end of a path of field numbers. `None` if one is absent or not unique.
pub(crate) fn message<'a>(message: &'a [u8], path: &[u64]) -> Option<&'a [u8]> {
    path.iter().try_fold(message, |message, number| match all_bytes(message, *number)[..] {
        [one] => Some(one),
        _ => None,
    })
}

/// The message with each field replaced for which `change` returns a value. `None` if it returned
/// none, or if the message is broken.
pub(crate) fn rewritten(
    message: &[u8],
    mut change: impl FnMut(u64, Value<'_>) -> Option<New>,
) -> Option<Vec<u8>> {
    let mut is_changed = false;
    let mut bytes = Vec::with_capacity(message.len() + 16);
    for field in fields(message) {
        let Field { number, value, raw } = field?;
        match change(number, value) {
            None => bytes.extend_from_slice(raw),
            Some(New::Number(value)) => {
                is_changed = true;
                push_varint(&mut bytes, number << 3);
                push_varint(&mut bytes, value);
            }
            Some(New::Bytes(value)) => {
                is_changed = true;
                push_varint(&mut bytes, number << 3 | 2);
                push_varint(&mut bytes, value.len() as u64);
                bytes.extend_from_slice(&value);
            }
        }
    }
    is_changed.then_some(bytes)
}

/// The message with the numeric fields of `values` replaced; `None` unless every one is there.
pub(crate) fn with_numbers(message: &[u8], values: &[(u64, u64)]) -> Option<Vec<u8>> {
    if values.iter().any(|(field, _)| number(message, *field).is_none()) {
        return None;
    }
    rewritten(message, |number, value| {
        let (_, new) = values.iter().find(|(field, _)| *field == number)?;
        matches!(value, Value::Number(_)).then_some(New::Number(*new))
    })
}

/// The message with what stands at the end of `path` replaced by `inner`.
pub(crate) fn with_message(message: &[u8], path: &[u64], inner: Vec<u8>) -> Option<Vec<u8>> {
    let Some((first, rest)) = path.split_first() else { return Some(inner) };
    let [below] = all_bytes(message, *first)[..] else { return None };
    let mut new = Some(New::Bytes(with_message(below, rest, inner)?));
    rewritten(message, |number, _| if number == *first { new.take() } else { None })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1: 150, 2: (1: 3, 9: "x"), 15: fixed32, 200: 1.
    const MESSAGE: &[u8] = b"\x08\x96\x01\x12\x05\x08\x03\x4a\x01x\x7d\x01\x02\x03\x04\xc0\x0c\x01";

    #[test]
    fn a_replaced_field_leaves_unknown_ones_as_they_are() {
        assert_eq!((number(MESSAGE, 1), number(MESSAGE, 200)), (Some(150), Some(1)));
        assert_eq!(number(MESSAGE, 3), None);
        assert_eq!(message(MESSAGE, &[2]), Some(&b"\x08\x03\x4a\x01x"[..]));
        let inner = with_numbers(message(MESSAGE, &[2]).unwrap(), &[(1, 300)]).unwrap();
        let outer = with_message(MESSAGE, &[2], inner).unwrap();
        let right = b"\x08\x96\x01\x12\x06\x08\xac\x02\x4a\x01x\x7d\x01\x02\x03\x04\xc0\x0c\x01";
        assert_eq!(outer, right);
    }

    #[test]
    fn numbers_take_all_64_bits() {
        let message = with_numbers(b"\x08\x01", &[(1, u64::MAX)]).unwrap();
        assert_eq!(message, b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
        assert_eq!(number(&message, 1), Some(u64::MAX));
    }

    #[test]
    fn what_is_broken_or_absent_is_not_replaced() {
        for broken in [&b"\x08"[..], b"\x12\x05\x08", b"\x0b\x01", &[0xff; 11], b"\x7d\x01"] {
            assert_eq!(number(broken, 1), None);
            assert_eq!(rewritten(broken, |_, _| Some(New::Number(1))), None);
            assert_eq!(message(broken, &[2]), None);
        }
        assert_eq!(with_numbers(MESSAGE, &[(1, 1), (3, 1)]), None);
        assert_eq!(with_message(b"\x12\0\x12\0", &[2], Vec::new()), None);
    }
}
