//! Numbers that look random and are the same in every run (SplitMix64).

/// A number of 64 bits from another.
fn mix(seed: u64) -> u64 {
    let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// A number in 0..1 that depends on all of `parts` and nothing else: whatever policy runs meets the
/// same world.
pub(super) fn unit(parts: &[u64]) -> f64 {
    let mixed = parts.iter().fold(0, |hash, part| mix(hash ^ *part));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

/// A number around 1, off by `noise` at most.
pub(super) fn noisy(noise: f64, parts: &[u64]) -> f64 {
    1.0 + noise * (2.0 * unit(parts) - 1.0)
}

/// A sequence of numbers.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The sequence of a seed, one of many.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        Self(mix(seed) ^ mix(stream.wrapping_mul(0x632b_e59b_d9b4_e019)))
    }

    /// In 0..1.
    pub(super) fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(1);
        unit(&[self.0])
    }

    /// Evenly between two numbers.
    pub(super) fn between(&mut self, (low, high): (f64, f64)) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Between two numbers, evenly by logarithm.
    pub(super) fn by_logarithm(&mut self, (low, high): (f64, f64)) -> f64 {
        self.between((low.ln(), high.ln())).exp()
    }
}
