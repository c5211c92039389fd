//! Counter-based randomness: a draw is a pure function of its key and its position.
//!
//! There is no global generator and no state to save: a stream is keyed by what it is for
//! (seed, purpose, step, prompt, sample, …) and its n-th number never depends on threads or order.
//! The mixer is SplitMix64 (Steele, Lea, Flood 2014), applied to the key words one after another.

/// A stream of random numbers under one key.
#[derive(Debug, Clone)]
pub struct Stream {
    key: u64,
    counter: u64,
}

/// What a stream is used for; keeps equal indices of different uses apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Token draws, keyed (step, prompt, sample); the counter is the token.
    Sample = 1,
    /// Weight initialisation, keyed (tensor).
    Init = 2,
    /// Order of prompts, keyed (epoch).
    Shuffle = 3,
    /// Generated tasks, keyed (split, row).
    Task = 4,
    /// Dropout masks, keyed (step, module).
    Dropout = 5,
    /// Which half of a layer rests, keyed (stage, layer, family).
    Freeze = 6,
    /// Chances of rows and past groups, keyed (task, position) or (step).
    Curriculum = 7,
    /// Which tokens lose their gradient, keyed (step).
    Covariance = 12,
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Stream {
    /// The stream of `seed` for `purpose` under the index words `key`.
    pub fn new(seed: u64, purpose: Purpose, key: &[u64]) -> Self {
        let mut k = mix(mix(seed) ^ purpose as u64);
        for &word in key {
            k = mix(k ^ mix(word));
        }
        Self { key: k, counter: 0 }
    }

    /// The `n`-th number of the stream, whatever was drawn before.
    pub fn at(&self, n: u64) -> u64 {
        mix(self.key ^ mix(n))
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let x = self.at(self.counter);
        self.counter += 1;
        x
    }

    /// A number in [0, 1) with 53 random bits.
    pub fn next_f64(&mut self) -> f64 {
        unit(self.next_u64())
    }

    /// An integer in `0..n` (n > 0), without bias that matters: 64 bits scaled down.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// A standard normal number (Box–Muller, one of the pair).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.next_f64(), self.next_f64());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Fisher–Yates shuffle in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// 64 random bits to a number in [0, 1).
pub fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_depends_on_its_key_and_position_alone() {
        let mut a = Stream::new(7, Purpose::Sample, &[1, 2, 3]);
        let b = a.clone();
        let drawn: Vec<u64> = (0..5).map(|_| a.next_u64()).collect();
        assert_eq!(drawn, (0..5).map(|n| b.at(n)).collect::<Vec<_>>());
        assert_ne!(b.at(0), Stream::new(7, Purpose::Sample, &[1, 3, 2]).at(0));
        assert_ne!(b.at(0), Stream::new(8, Purpose::Sample, &[1, 2, 3]).at(0));
    }

    #[test]
    fn moments_of_the_uniform_and_the_normal() {
        let mut s = Stream::new(1, Purpose::Init, &[]);
        let n = 100_000;
        let mean = (0..n).map(|_| s.next_f64()).sum::<f64>() / n as f64;
        // standard error of the mean: sqrt(1/12/n) = 0.0009; five of them
        assert!((mean - 0.5).abs() < 0.0046, "{mean}");
        let var = (0..n).map(|_| s.normal().powi(2)).sum::<f64>() / n as f64;
        // Var(z²) = 2, standard error 0.0045; five of them
        assert!((var - 1.0).abs() < 0.023, "{var}");
    }
}
