//! Bytes that nothing compresses and that anyone can make again from their number.

/// The next value of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every state is a good state.
pub fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Fills `out` with the bytes that belong to `(number, sequence)`.
pub fn fill(number: u64, sequence: u64, out: &mut [u8]) {
    let mut state = number.rotate_left(32) ^ sequence.wrapping_mul(0xd6e8_feb8_6659_fd93);
    for chunk in out.chunks_mut(8) {
        let bytes = next_random(&mut state).to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// A record that says what it is: number, sequence, then bytes that follow from both.
pub fn write_record(number: u64, sequence: u64, out: &mut [u8]) {
    let (header, body) = out.split_at_mut(HEADER_BYTES);
    header[..8].copy_from_slice(&number.to_le_bytes());
    header[8..].copy_from_slice(&sequence.to_le_bytes());
    fill(number, sequence, body);
}

/// Bytes of a record's header, and so its least length.
pub const HEADER_BYTES: usize = 16;

/// Number and sequence of a whole record; `None` if a single bit of it is not as written.
pub fn read_record(record: &[u8]) -> Option<(u64, u64)> {
    let (number, rest) = record.split_first_chunk()?;
    let (sequence, body) = rest.split_first_chunk()?;
    let (number, sequence) = (u64::from_le_bytes(*number), u64::from_le_bytes(*sequence));
    let mut expected = vec![0; body.len()];
    fill(number, sequence, &mut expected);
    (expected == body).then_some((number, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_any_changed_byte_is_noticed() {
        let mut record = [0; 61];
        write_record(7, 9, &mut record);
        assert_eq!(read_record(&record), Some((7, 9)));
        for index in 0..record.len() {
            let mut torn = record;
            torn[index] ^= 1;
            assert_eq!(read_record(&torn), None, "byte {index}");
        }
        assert_eq!(read_record(&record[..10]), None);
    }
}
