//! Seeded randomness with one stream per purpose, and the hash of a run.
//!
//! Every stream is derived from the seed of the run and a name. A draw more in one stream
//! therefore shifts no other: a test that asks for one more random number keeps the same crash,
//! the same latencies and the same order of tasks.

/// The seed of a stream called `name` under `seed`.
pub fn derive_seed(seed: u64, name: &str) -> u64 {
    let mut trace = Trace::new();
    trace.fold(seed);
    trace.fold_bytes(name.as_bytes());
    trace.hash()
}

/// One stream of random numbers.
pub struct Stream(fastrand::Rng);

impl Stream {
    /// The stream called `name` under `seed`.
    pub fn new(seed: u64, name: &str) -> Stream {
        Stream(fastrand::Rng::with_seed(derive_seed(seed, name)))
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number below `bound`; 0 where `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.0.u64(..bound) }
    }

    /// A number between `low` and `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0.u64(low..=high.max(low))
    }

    /// True with a chance of `per_million`. Always draws, so that a chance of 0 and one of 1
    /// leave the stream at the same place.
    pub fn chance(&mut self, per_million: u32) -> bool {
        self.0.u32(..1_000_000) < per_million
    }

    /// True half of the time.
    pub fn coin(&mut self) -> bool {
        self.0.bool()
    }
}

/// Hash over everything that happened in a run, in order.
#[derive(Clone, Debug)]
pub struct Trace(u64);

impl Trace {
    /// The hash of nothing.
    pub fn new() -> Trace {
        Trace(0xcbf2_9ce4_8422_2325)
    }

    /// Adds one number.
    pub fn fold(&mut self, value: u64) {
        // One round of SplitMix64's finalizer over the running state.
        let mut mixed = (self.0 ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = mixed ^ (mixed >> 31);
    }

    /// Adds bytes.
    pub fn fold_bytes(&mut self, bytes: &[u8]) {
        self.fold(bytes.len() as u64);
        self.fold(u64::from(crate::base::checksum::crc32c(bytes)));
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.0
    }
}

impl Default for Trace {
    fn default() -> Trace {
        Trace::new()
    }
}
