//! What a simulated run is exposed to.

use std::fmt;

use super::random::Stream;

/// Highest chance of a fault that passes: one in ten, as TigerBeetle's simulator has it.
const FAULTS_PER_MILLION_MAX: u64 = 100_000;

/// Chances are per million operations of the kind named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimOptions {
    /// Shortest time an operation takes, in microseconds.
    pub latency_us_min: u64,
    /// Longest time an ordinary operation takes, in microseconds.
    pub latency_us_max: u64,
    /// Chance that an operation takes a hundred times as long.
    pub slow_per_million: u32,
    /// Chance that `yield_if_needed` yields.
    pub yield_per_million: u32,
    /// Chance that a read fails.
    pub read_error_per_million: u32,
    /// Chance that a write fails, after any part of it took place.
    pub write_error_per_million: u32,
    /// Chance that a sync of a file or directory fails.
    pub sync_error_per_million: u32,
    /// Chance that a create, open, rename, remove or list fails.
    pub metadata_error_per_million: u32,
    /// Chance that a read comes back with one bit turned.
    pub bit_flip_per_million: u32,
    /// Half of the turned bits stay on the medium; otherwise the next read of the file is right.
    pub bit_flips_stay: bool,
    /// Chance that a read comes back with what stands in a wrong place of this or another file.
    /// The next read of the file is right.
    pub misdirected_read_per_million: u32,
    /// Chance that a write lands at a wrong place of this or another file and reports success.
    pub misdirected_write_per_million: u32,
    /// Size of the disk; writes and creations fail when it is full.
    pub capacity_bytes: Option<u64>,
    /// Plants a bug: file syncs report success and do nothing.
    pub ignore_file_sync: bool,
    /// Plants a bug: directory syncs report success and do nothing.
    pub ignore_dir_sync: bool,
    /// Plants a bug: a sync of a directory succeeds where another one has failed since the change.
    pub ignore_other_dir_syncs: bool,
    /// Plants a bug: syncs of files and directories whose path ends in this report success and do
    /// nothing.
    pub ignore_syncs_of: Option<&'static str>,
    /// A run that takes more steps than this has lost its way.
    pub steps_max: u64,
}

impl Default for SimOptions {
    /// A disk without faults, with latencies that reorder operations, and with frequent yields.
    fn default() -> SimOptions {
        SimOptions {
            latency_us_min: 5,
            latency_us_max: 200,
            slow_per_million: 10_000,
            yield_per_million: 300_000,
            read_error_per_million: 0,
            write_error_per_million: 0,
            sync_error_per_million: 0,
            metadata_error_per_million: 0,
            bit_flip_per_million: 0,
            bit_flips_stay: true,
            misdirected_read_per_million: 0,
            misdirected_write_per_million: 0,
            capacity_bytes: None,
            ignore_file_sync: false,
            ignore_dir_sync: false,
            ignore_other_dir_syncs: false,
            ignore_syncs_of: None,
            steps_max: 10_000_000,
        }
    }
}

impl SimOptions {
    /// True if syncs of this file or directory are to do nothing.
    pub(super) fn ignores_sync_of(&self, path: &std::path::Path) -> bool {
        let text = path.to_string_lossy();
        self.ignore_syncs_of.is_some_and(|end| text.ends_with(end))
    }

    /// A disk without faults whose latencies and yields are drawn from the seed: from lock-step
    /// to wild reordering.
    pub fn varied(seed: u64) -> SimOptions {
        let mut stream = Stream::new(seed, "options.varied");
        let latency_us_min = stream.between(0, 50);
        let spread = [0, 20, 500, 5_000];
        SimOptions {
            latency_us_min,
            latency_us_max: latency_us_min + spread[stream.below(4) as usize],
            slow_per_million: [0, 1_000, 50_000][stream.below(3) as usize],
            yield_per_million: [0, 100_000, 500_000, 1_000_000][stream.below(4) as usize],
            ..SimOptions::default()
        }
    }

    /// [`SimOptions::varied`] plus faults that pass: what is on the medium stays as it was written.
    /// Each kind is off in half of the seeds and strikes up to one in ten operations in the others;
    /// a fourth of the disks are small.
    pub fn passing_faults(seed: u64) -> SimOptions {
        let mut stream = Stream::new(seed, "options.passing");
        let mut rate = || {
            let on = stream.coin();
            let rate = stream.between(100, FAULTS_PER_MILLION_MAX) as u32;
            if on { rate } else { 0 }
        };
        SimOptions {
            read_error_per_million: rate(),
            write_error_per_million: rate(),
            sync_error_per_million: rate(),
            metadata_error_per_million: rate(),
            bit_flip_per_million: rate(),
            bit_flips_stay: false,
            misdirected_read_per_million: rate(),
            capacity_bytes: stream.chance(250_000).then(|| stream.between(17 << 20, 40 << 20)),
            ..SimOptions::varied(seed)
        }
    }

    /// [`SimOptions::varied`] plus faults that change what is on the medium: bits that turn for
    /// good, and writes that land in a wrong place. Rarely, or nothing would be left to look at.
    pub fn damaging_faults(seed: u64) -> SimOptions {
        let mut stream = Stream::new(seed, "options.damaging");
        let (flips, writes) = (stream.below(10_000) as u32, stream.below(10_000) as u32);
        let both = stream.below(3);
        SimOptions {
            bit_flip_per_million: if both == 1 { 0 } else { flips },
            misdirected_write_per_million: if both == 2 { 0 } else { writes },
            ..SimOptions::varied(seed)
        }
    }

    /// [`SimOptions::varied`] plus a random choice of faults. Each kind is off in half of the
    /// seeds: faults that are always on together hide what one alone would show.
    pub fn swarm(seed: u64) -> SimOptions {
        let mut stream = Stream::new(seed, "options.swarm");
        let mut rate = |highest: u64| {
            let on = stream.coin();
            let rate = stream.between(100, highest) as u32;
            if on { rate } else { 0 }
        };
        SimOptions {
            read_error_per_million: rate(20_000),
            write_error_per_million: rate(20_000),
            sync_error_per_million: rate(20_000),
            metadata_error_per_million: rate(20_000),
            bit_flip_per_million: rate(20_000),
            misdirected_write_per_million: rate(5_000),
            capacity_bytes: stream.chance(250_000).then(|| stream.between(1 << 20, 64 << 20)),
            ..SimOptions::varied(seed)
        }
    }
}

impl fmt::Display for SimOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "latency {}..={} us", self.latency_us_min, self.latency_us_max)?;
        let rates = [
            ("slow", self.slow_per_million),
            ("yield", self.yield_per_million),
            ("read error", self.read_error_per_million),
            ("write error", self.write_error_per_million),
            ("sync error", self.sync_error_per_million),
            ("metadata error", self.metadata_error_per_million),
            ("bit flip", self.bit_flip_per_million),
            ("misdirected read", self.misdirected_read_per_million),
            ("misdirected write", self.misdirected_write_per_million),
        ];
        for (name, rate) in rates.into_iter().filter(|(_, rate)| *rate > 0) {
            write!(f, ", {name} {rate} ppm")?;
        }
        if let Some(capacity) = self.capacity_bytes {
            write!(f, ", capacity {capacity} bytes")?;
        }
        if self.ignore_file_sync {
            write!(f, ", PLANTED: file syncs ignored")?;
        }
        if self.ignore_dir_sync {
            write!(f, ", PLANTED: directory syncs ignored")?;
        }
        if let Some(end) = self.ignore_syncs_of {
            write!(f, ", PLANTED: syncs of {end} ignored")?;
        }
        Ok(())
    }
}
