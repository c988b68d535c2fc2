//! Prometheus text from the counters of the cores.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;

use crate::shard::control::{
    CoreMetrics, Distribution, HistogramCounts, TimelineInfo, TimelineState,
};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CoreLabel {
    core: u64,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TypeLabel {
    core: u64,
    manager: u64,
    /// The resource manager's part of `xl_info`, in hexadecimal.
    info: String,
    by: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TimelineLabel {
    tenant: String,
    timeline: String,
}

type Number = fn(&CoreMetrics) -> u64;
type Depth = fn(&CoreMetrics) -> &Distribution;
type Seconds = fn(&CoreMetrics) -> f64;
type Counts = fn(&CoreMetrics) -> &HistogramCounts;
type TimelineNumber = fn(&TimelineInfo) -> u64;

const COUNTERS: &[(&str, &str, Number)] = &[
    ("connections_accepted", "Connections accepted", |m| m.connections_accepted),
    ("connections_moved", "Connections handed to the owning core", |m| m.connections_moved),
    ("get_page_requests", "GetPage requests answered", |m| m.get_page_requests),
    ("page_requests_delayed", "Page service requests that stood in line", |m| {
        m.page_requests_delayed
    }),
    ("page_requests_over_quota", "Of these, how many met a quota of their tenant", |m| {
        m.page_requests_over_quota
    }),
    ("other_requests", "Other page service requests answered", |m| m.other_requests),
    ("request_errors", "Page service requests answered by an error", |m| m.request_errors),
    ("wal_bytes_received", "WAL bytes taken in", |m| m.wal_bytes_received),
    ("wal_records_ingested", "WAL records ingested", |m| m.wal_records_ingested),
    ("values_ingested", "Values stored by ingest", |m| m.values_ingested),
    ("wal_changes_skipped", "Changes of blocks that do not exist", |m| m.wal_changes_skipped),
    ("journal_syncs", "Syncs of the journal", |m| m.journal_syncs),
    ("journal_bytes_written", "Bytes written to the journal", |m| m.journal_bytes_written),
    ("layer_bytes_written", "Bytes of L0 layers written", |m| m.layer_bytes_written),
    ("checkpoints", "Layers written by checkpoints", |m| m.checkpoints),
    ("compactions", "Actions of compaction carried out", |m| m.compactions),
    ("compaction_failures", "Actions of compaction that failed", |m| m.compaction_failures),
    ("merged_bytes_written", "Bytes of L1 layers written", |m| m.merged_bytes_written),
    ("image_bytes_written", "Bytes of image layers written by compaction", |m| {
        m.image_bytes_written
    }),
    ("compaction_pages", "Pages rebuilt for compaction", |m| m.compaction_pages),
    ("compaction_page_failures", "Pages that compaction could not rebuild", |m| {
        m.compaction_page_failures
    }),
    ("compaction_l0_merges", "Merges of L0 layers", |m| m.compaction_l0_merges),
    ("compaction_l1_merges", "Merges of L1 layers", |m| m.compaction_l1_merges),
    ("compaction_image_jobs", "Jobs that made image layers", |m| m.compaction_image_jobs),
    ("gc_runs", "Garbage collections that came to their end", |m| m.gc_runs),
    ("gc_failures", "Garbage collections that failed", |m| m.gc_failures),
    ("gc_layers_removed", "Layers removed by garbage collection", |m| m.gc_layers_removed),
    ("gc_bytes_removed", "Bytes of layers removed by it", |m| m.gc_bytes_removed),
    ("timelines_closed", "Timelines closed because nobody used them", |m| m.timelines_closed),
    ("index_bytes_written", "Bytes of timeline indexes written", |m| m.index_bytes_written),
    ("block_cache_hits", "Blocks of layer files that were in the cache", |m| m.block_cache_hits),
    ("block_cache_misses", "Blocks of layer files that were read", |m| m.block_cache_misses),
    ("layer_files_opened", "Layer files that were opened to be read", |m| m.layer_files_opened),
    ("page_cache_hits", "Page reads that began with a page that was rebuilt before", |m| {
        m.page_cache_hits
    }),
    ("redo_requests", "Pages rebuilt from WAL records", |m| m.redo_requests),
    ("redo_records", "WAL records applied", |m| m.redo_records),
    ("redo_pages_native", "Pages rebuilt without a wal-redo process", |m| m.redo_pages_native),
    ("redo_records_native", "WAL records applied natively", |m| m.redo_records_native),
    ("redo_misfits", "Records that did not fit their page natively", |m| m.redo_misfits),
    ("redo_inline", "Requests to wal-redo processes without a thread between", |m| m.redo_inline),
    ("redo_children_started", "Wal-redo processes started", |m| m.redo_children_started),
    ("redo_failures", "Wal-redo processes that failed", |m| m.redo_failures),
    ("redo_child_errors", "Requests to wal-redo processes that ended in an error", |m| {
        m.redo_child_errors
    }),
];

const SECONDS: &[(&str, &str, Seconds)] = &[
    ("get_page_seconds", "Time spent on GetPage requests", |m| m.get_page_seconds),
    (
        "page_requests_delayed_seconds",
        "Time for which batches of page service requests stood in line",
        |m| m.page_requests_delayed_seconds,
    ),
    (
        "ingest_slowed_seconds",
        "Time for which WAL was left with its source, to keep to a rate",
        |m| m.ingest_slowed_seconds,
    ),
    ("ingest_stopped_seconds", "Time for which no WAL was taken in for want of memory", |m| {
        m.ingest_stopped_seconds
    }),
    ("redo_seconds", "Time that wal-redo processes were busy", |m| m.redo_seconds),
];

const GAUGES: &[(&str, &str, Number)] = &[
    ("connections_open", "Connections open", |m| m.connections_open),
    ("page_requests_waiting", "Page service requests in line", |m| m.page_requests_waiting),
    ("page_requests_in_flight", "Page service requests being worked on", |m| {
        m.page_requests_in_flight
    }),
    ("memory_used_bytes", "Memory of open and frozen layers", |m| m.memory_used_bytes),
    ("memory_resident_bytes", "Memory of layers that have become files and stay for reads", |m| {
        m.memory_resident_bytes
    }),
    ("block_cache_bytes", "Memory of the block cache", |m| m.block_cache_bytes),
    ("layer_files_open", "Layer files that are open", |m| m.layer_files_open),
    ("layer_files_open_bytes", "Memory of the indexes and filters of open layer files", |m| {
        m.layer_files_open_bytes
    }),
    ("page_cache_bytes", "Memory of the cache of rebuilt pages", |m| m.page_cache_bytes),
    ("redo_children_alive", "Wal-redo processes that run now", |m| m.redo_children_alive),
];

/// With the factor from the unit that is counted to that of the metric.
const HISTOGRAMS: &[(&str, &str, f64, Counts)] = &[
    (
        "redo_launch_seconds",
        "Time from the start of a wal-redo process to its first answer",
        1e-6,
        |m| &m.redo_launch_us,
    ),
    ("redo_page_seconds", "Time to rebuild a page from WAL records", 1e-9, |m| &m.redo_time_ns),
    ("redo_page_records", "WAL records applied to rebuild a page", 1.0, |m| &m.redo_chain_records),
    ("redo_page_bytes", "Bytes of those WAL records", 1.0, |m| &m.redo_chain_bytes),
];

const DEPTHS: &[(&str, &str, Depth)] = &[
    ("read_layers", "Layer files of which the read of a page took blocks", |m| &m.read_layers),
    ("read_records", "Records that the read of a page applied", |m| &m.read_records),
];

const TIMELINE_GAUGES: &[(&str, &str, TimelineNumber)] = &[
    ("timeline_received_lsn", "End of WAL taken in", |t| t.received_lsn.0),
    ("timeline_last_record_lsn", "Readable up to here", |t| t.last_record_lsn.0),
    ("timeline_journal_lsn", "WAL synced up to here", |t| t.journal_lsn.0),
    ("timeline_disk_consistent_lsn", "In layer files up to here", |t| t.disk_consistent_lsn.0),
    ("timeline_gc_cutoff_lsn", "Readable from here on", |t| t.gc_cutoff_lsn.0),
    ("timeline_layers", "Layer files", |t| t.layer_count),
    ("timeline_l0_layers", "Layers over all keys that wait for compaction", |t| t.l0_count),
    ("timeline_frozen_layers", "Layers in memory that wait for a checkpoint", |t| t.frozen_count),
    ("timeline_ingest_limit_bytes", "WAL bytes per second taken in at most; 0: no limit", |t| {
        t.ingest_limit_bytes_per_s.unwrap_or(0)
    }),
    ("timeline_layer_bytes", "Bytes of layer files", |t| t.layer_bytes),
    ("timeline_history_bytes", "Bytes of delta layers and of images that newer ones cover", |t| {
        t.history_bytes
    }),
    ("timeline_logical_bytes", "Bytes of all relations; 0 until they are added up", |t| {
        t.logical_bytes.unwrap_or(0)
    }),
    ("timeline_memory_bytes", "Bytes of values in memory", |t| t.open_layer_bytes),
    ("timeline_source_connected", "1 if the WAL source is connected", |t| {
        u64::from(t.wal_source_connected)
    }),
    ("timeline_broken", "1 if an operator must step in", |t| {
        u64::from(t.state == TimelineState::Broken)
    }),
];

/// Distributions of the cores, as histograms.
#[derive(Debug)]
struct Depths(Vec<(u64, [Distribution; DEPTHS.len()])>);

/// Upper ends of the buckets; all above is in one more.
const DEPTH_BUCKETS: [usize; 12] = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64];

fn buckets(distribution: &Distribution) -> Vec<(f64, u64)> {
    let last = distribution.counts.len().saturating_sub(1);
    let mut from = 0;
    let ends = DEPTH_BUCKETS.into_iter().filter(|end| *end < last);
    let mut buckets: Vec<(f64, u64)> = ends
        .map(|end| {
            let counts = distribution.counts.get(from..=end).unwrap_or_default();
            from = end + 1;
            (end as f64, counts.iter().sum())
        })
        .collect();
    buckets.push((f64::MAX, distribution.counts.get(from..).unwrap_or_default().iter().sum()));
    buckets
}

impl Collector for Depths {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (place, (name, help, _)) in DEPTHS.iter().enumerate() {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for (core, depths) in &self.0 {
                let Some(depth) = depths.get(place) else { continue };
                let label = CoreLabel { core: *core };
                let mut one = metric.encode_family(&label)?;
                let (sum, count) = (depth.sum as f64, depth.count());
                one.encode_histogram::<NoLabelSet>(sum, count, &buckets(depth), None)?;
            }
        }
        Ok(())
    }
}

/// The whole page of metrics.
pub(super) fn text(cores: &[CoreMetrics], timelines: &[TimelineInfo], spare_bytes: u64) -> String {
    let mut registry = Registry::with_prefix("pgstrata");
    let spare = Gauge::<u64, AtomicU64>::default();
    spare.set(spare_bytes);
    registry.register("spare_bytes", "Bytes of removed files kept for new ones", spare);
    for &(name, help, read) in COUNTERS {
        let family = Family::<CoreLabel, Counter>::default();
        for metrics in cores {
            family.get_or_create(&label(metrics)).inc_by(read(metrics));
        }
        registry.register(name, help, family);
    }
    for &(name, help, read) in SECONDS {
        let family = Family::<CoreLabel, Counter<f64, AtomicU64>>::default();
        for metrics in cores {
            family.get_or_create(&label(metrics)).inc_by(read(metrics));
        }
        registry.register(name, help, family);
    }
    let types = Family::<TypeLabel, Counter>::default();
    for metrics in cores {
        let core = metrics.core as u64;
        for (key, split) in &metrics.redo_types {
            let (manager, info) = (u64::from(key >> 8), format!("{:02X}", key & 0xFF));
            for (by, count) in [("native", split.native), ("child", split.child)] {
                let label = TypeLabel { core, manager, info: info.clone(), by };
                types.get_or_create(&label).inc_by(count);
            }
        }
    }
    let help = "WAL records applied to pages, by record type and by whom";
    registry.register("redo_type_records", help, types);
    registry.register_collector(Box::new(Histograms(cores.to_vec())));
    for &(name, help, read) in GAUGES {
        let family = Family::<CoreLabel, Gauge<u64, AtomicU64>>::default();
        for metrics in cores {
            family.get_or_create(&label(metrics)).set(read(metrics));
        }
        registry.register(name, help, family);
    }
    let l0 = Family::<CoreLabel, Gauge<u64, AtomicU64>>::default();
    for metrics in cores {
        l0.get_or_create(&label(metrics)).set(metrics.l0_layers_max);
    }
    registry.register("l0_layers_max", "The most L0 layers that a timeline had at once", l0);
    let depths = |metrics: &CoreMetrics| {
        let core = metrics.core as u64;
        (core, std::array::from_fn(|place| (DEPTHS[place].2)(metrics).clone()))
    };
    registry.register_collector(Box::new(Depths(cores.iter().map(depths).collect())));
    for &(name, help, read) in TIMELINE_GAUGES {
        let family = Family::<TimelineLabel, Gauge<u64, AtomicU64>>::default();
        for info in timelines {
            let (tenant, timeline) = (info.tenant.to_string(), info.timeline.to_string());
            family.get_or_create(&TimelineLabel { tenant, timeline }).set(read(info));
        }
        registry.register(name, help, family);
    }
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = encode(&mut out, &registry);
    out
}

/// Histograms that were counted elsewhere.
#[derive(Debug)]
struct Histograms(Vec<CoreMetrics>);

impl Collector for Histograms {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for &(name, help, factor, read) in HISTOGRAMS {
            // The prefix of the registry is there already.
            let mut all = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for metrics in &self.0 {
                let counts = read(metrics);
                let bound = |bound: Option<u64>| bound.map_or(f64::MAX, |n| n as f64 * factor);
                let classes: Vec<_> =
                    counts.classes().map(|(n, count)| (bound(n), count)).collect();
                let count = classes.iter().map(|(_, count)| count).sum();
                let (label, sum) = (label(metrics), counts.sum as f64 * factor);
                let mut one = all.encode_family(&label)?;
                one.encode_histogram::<CoreLabel>(sum, count, &classes, None)?;
            }
        }
        Ok(())
    }
}

fn label(metrics: &CoreMetrics) -> CoreLabel {
    CoreLabel { core: metrics.core as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redo::histogram::Histogram;

    #[test]
    fn every_counter_has_a_line_per_core() {
        let histogram = Histogram::default();
        [3, 4, 1000].into_iter().for_each(|number| histogram.count(number));
        let mut core = CoreMetrics { core: 1, wal_bytes_received: 77, ..CoreMetrics::default() };
        histogram.add_to(&mut core.redo_chain_records);
        (core.redo_child_errors, core.redo_launch_us) = (5, core.redo_chain_records.clone());
        let text = text(&[CoreMetrics::default(), core], &[], 4711);
        assert!(text.contains("\npgstrata_spare_bytes 4711\n"), "{text}");
        assert!(text.contains("pgstrata_wal_bytes_received_total{core=\"1\"} 77"), "{text}");
        for (name, _, _) in COUNTERS {
            assert_eq!(text.matches(&format!("pgstrata_{name}_total{{")).count(), 2, "{name}");
        }
        let name = "pgstrata_redo_page_records";
        assert_eq!(text.matches(&format!("{name}_count{{core=")).count(), 2, "{text}");
        assert!(text.contains(&format!("{name}_bucket{{le=\"+Inf\",core=\"1\"}} 3")), "{text}");
        assert!(text.contains(&format!("{name}_bucket{{le=\"4.0\",core=\"1\"}} 2")), "{text}");
        assert!(text.contains(&format!("{name}_sum{{core=\"1\"}} 1007.0")), "{text}");
        assert!(text.contains("pgstrata_redo_child_errors_total{core=\"1\"} 5"), "{text}");
        let name = "pgstrata_redo_launch_seconds";
        assert!(text.contains(&format!("{name}_bucket{{le=\"0.001024\",core=\"1\"}} 3")), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn depths_are_histograms() {
        let mut counts = vec![0; 8];
        (counts[2], counts[5], counts[7]) = (3, 1, 2);
        let read_layers = Distribution { counts, sum: 40, max: 20 };
        let core = CoreMetrics { core: 1, read_layers, ..CoreMetrics::default() };
        let text = text(&[core], &[], 0);
        for line in [
            "pgstrata_read_layers_bucket{core=\"1\",le=\"1.0\"} 0",
            "pgstrata_read_layers_bucket{core=\"1\",le=\"2.0\"} 3",
            "pgstrata_read_layers_bucket{core=\"1\",le=\"6.0\"} 4",
            "pgstrata_read_layers_bucket{core=\"1\",le=\"+Inf\"} 6",
            "pgstrata_read_layers_sum{core=\"1\"} 40",
            "pgstrata_read_records_count{core=\"1\"} 0",
        ] {
            let found = text.contains(line)
                || text.contains(&line.replace("core=\"1\",le", "le").replace('}', ",core=\"1\"}"));
            assert!(found, "{line}: {text}");
        }
    }
}
