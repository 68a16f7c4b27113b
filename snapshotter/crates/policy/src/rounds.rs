//! When pre-copy has done what it can.
//!
//! A pure rule, the same in both modes, so that comparing them shows what cooperation is worth.
//! Each round sends what changed during the one before, so rounds shrink as long as the link is
//! faster than the container writes (Clark et al., "Live Migration of Virtual Machines", NSDI
//! 2005).

/// Rounds unless the request says otherwise.
pub const ROUNDS_DEFAULT: u32 = 5;

/// Most rounds that a request may ask for.
pub const ROUNDS_MAX: u32 = 30;

/// A round this small is not worth another: sending it takes less than the freeze itself.
const SMALL_BYTES: u64 = 256 << 10;

/// Whether another round is worth it after rounds that found `changed` bytes each, the first one
/// everything.
///
/// `max` is the number of rounds allowed; 0 stands for [`ROUNDS_DEFAULT`].
pub fn another(changed: &[u64], max: u32) -> bool {
    let max = if max == 0 { ROUNDS_DEFAULT } else { max.min(ROUNDS_MAX) };
    if changed.len() >= usize::try_from(max).unwrap_or(usize::MAX) {
        return false;
    }
    match changed {
        [] => true,
        // The first round took longest, so much may have changed since.
        [_] => true,
        [.., before, last] => {
            *last > SMALL_BYTES && last.saturating_mul(4) < before.saturating_mul(3)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_go_on_while_they_shrink_and_are_worth_it() {
        assert!(another(&[], 0));
        assert!(another(&[200 * MIB], 0));
        assert!(another(&[200 * MIB, 30 * MIB], 0));
        assert!(!another(&[200 * MIB, 30 * MIB, 29 * MIB], 0));
        assert!(!another(&[200 * MIB, MIB / 8], 0));
    }

    #[test]
    fn one_round_is_one_round() {
        assert!(another(&[], 1));
        assert!(!another(&[200 * MIB], 1));
    }

    proptest! {
        #[test]
        fn rounds_always_end(changed in proptest::collection::vec(any::<u64>(), 30..40), max: u32) {
            prop_assert!(!another(&changed, max));
        }
    }
}
