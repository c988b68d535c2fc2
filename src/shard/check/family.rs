//! What the timelines of a tenant must obey together, as far as their indexes and the ends of
//! their journals say. Pure.
//!
//! 1. The ancestor of a branch is there, and is of the same cluster.
//! 2. The line of ancestors leads to a timeline that has none.
//! 3. A branch point lies in the history of the ancestor: not before that begins, nor before the
//!    ancestor's own branch point (`shard::branch`), nor after its WAL ends.
//! 4. A branch has nothing from before its branch point: its WAL begins there.
//! 5. What was collected is in layers: the cut-off does not pass `disk_consistent_lsn`, but for a
//!    timeline whose first readable LSN does.
//!
//! A timeline whose index cannot be read may be anything; nothing is said of it, nor of its
//! branches' branch points.

use std::collections::BTreeMap;

use crate::base::{Lsn, TimelineId};
use crate::shard::index::{BranchPoint, TimelineIndex};

/// What is known of a timeline.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Its index.
    pub(super) index: TimelineIndex,
    /// End of the last whole record of its journal; [`Lsn::INVALID`] if nobody has looked.
    pub(super) journal_end: Lsn,
}

impl Member {
    /// LSN up to which there is history.
    fn end(&self) -> Lsn {
        self.index.disk_consistent_lsn.max(self.journal_end)
    }
}

/// The timelines of a tenant; `None` for one whose index cannot be read.
pub(super) type Family = BTreeMap<TimelineId, Option<Member>>;

/// A rule that an index breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rule {
    AncestorMissing,
    Cluster,
    Circle,
    PointBeforeAncestor,
    PointAfterAncestor,
    BeginsBeforePoint,
    Cutoff,
}

/// What contradicts the rules, in words, by the timeline whose index is to blame.
pub(super) type Problems = BTreeMap<(TimelineId, Rule), String>;

/// What contradicts the rules.
pub(super) fn problems(family: &Family) -> Problems {
    let mut found = BTreeMap::new();
    for (id, member) in family {
        let Some(Member { index, .. }) = member else { continue };
        let (disk_consistent, cutoff) = (index.disk_consistent_lsn, index.gc_cutoff_lsn);
        if cutoff > disk_consistent.max(index.start_lsn) {
            let text = format!(
                "gc_cutoff_lsn {cutoff} is after disk_consistent_lsn {disk_consistent}: nothing \
                 can have been collected that is not in layers yet"
            );
            found.insert((*id, Rule::Cutoff), text);
        }
        if let Some(point) = index.ancestor {
            let texts = of_branch(family, *id, index, point);
            found.extend(texts.into_iter().map(|(rule, text)| ((*id, rule), text)));
        }
    }
    found
}

/// What is wrong between a branch and its ancestor.
fn of_branch(
    family: &Family,
    id: TimelineId,
    index: &TimelineIndex,
    BranchPoint { timeline, lsn }: BranchPoint,
) -> Vec<(Rule, String)> {
    let mut texts = Vec::new();
    if index.disk_consistent_lsn < lsn {
        texts.push((Rule::BeginsBeforePoint, format!(
            "disk_consistent_lsn {} is before the branch point {lsn}, where the timeline begins",
            index.disk_consistent_lsn
        )));
    }
    if is_in_circle(family, id) {
        texts.push((Rule::Circle, format!(
            "its ancestor is timeline {timeline}, and the line of ancestors leads back to itself"
        )));
        return texts;
    }
    let ancestor =
        match family.get(&timeline) {
            Some(Some(ancestor)) => ancestor,
            Some(None) => return texts,
            None => {
                texts.push((Rule::AncestorMissing, format!(
                "its ancestor, timeline {timeline}, is not there: what the timeline has from \
                 before {lsn} is lost"
            )));
                return texts;
            }
        };
    if ancestor.index.cluster != index.cluster {
        texts.push((
            Rule::Cluster,
            format!("it is of another cluster than its ancestor, timeline {timeline}"),
        ));
    }
    let older = ancestor.index.ancestor.map_or(Lsn::INVALID, |older| older.lsn);
    let begin = ancestor.index.start_lsn.max(older);
    if lsn < begin {
        texts.push((Rule::PointBeforeAncestor, format!(
            "its branch point {lsn} is before {begin}, where its ancestor, timeline {timeline}, \
             begins"
        )));
    }
    if lsn > ancestor.end() {
        texts.push((
            Rule::PointAfterAncestor,
            format!(
                "its branch point {lsn} is after {}, where its ancestor, timeline {timeline}, ends",
                ancestor.end()
            ),
        ));
    }
    texts
}

/// The line of ancestors comes back to this timeline.
fn is_in_circle(family: &Family, id: TimelineId) -> bool {
    let mut at = id;
    for _ in 0..family.len() {
        let next = family.get(&at).and_then(Option::as_ref).and_then(|one| one.index.ancestor);
        let Some(next) = next else { return false };
        at = next.timeline;
        if at == id {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{TenantId, TenantShardId};
    use crate::shard::index::{ClusterIdentity, INDEX_VERSION};

    const CLUSTER: ClusterIdentity = ClusterIdentity {
        system_id: 7,
        tli: 1,
        wal_segment_bytes: 1 << 24,
        data_checksums: false,
        hint_bits_logged: false,
    };

    fn id(n: u8) -> TimelineId {
        TimelineId([n; 16])
    }

    /// A timeline with history from 100 to 200, in layers up to 150.
    fn member(n: u8, ancestor: Option<(u8, u64)>) -> (TimelineId, Option<Member>) {
        let ancestor = ancestor.map(|(n, lsn)| BranchPoint { timeline: id(n), lsn: Lsn(lsn) });
        let begin = ancestor.map_or(Lsn(100), |point| point.lsn);
        let index = TimelineIndex {
            version: INDEX_VERSION,
            tenant: TenantShardId::unsharded(TenantId([1; 16])),
            timeline: id(n),
            cluster: CLUSTER,
            source: None,
            ancestor,
            archived: false,
            start_lsn: Lsn(100),
            gc_cutoff_lsn: Lsn(100),
            disk_consistent_lsn: begin.max(Lsn(150)),
            layers: Vec::new(),
        };
        (id(n), Some(Member { index, journal_end: Lsn(200) }))
    }

    fn found(family: impl IntoIterator<Item = (TimelineId, Option<Member>)>) -> Vec<String> {
        problems(&family.into_iter().collect()).into_values().collect()
    }

    #[test]
    fn a_right_family_has_no_problems() {
        let family = [
            member(1, None),
            member(2, Some((1, 100))),
            member(3, Some((1, 200))),
            member(4, Some((3, 200))),
            // Nobody can tell what this one is a branch of.
            member(5, Some((6, 900))),
            (id(6), None),
        ];
        assert_eq!(found(family), [""; 0]);
        assert_eq!(found([]), [""; 0]);
    }

    #[test]
    fn each_broken_rule_is_named() {
        let one = |family: &[(TimelineId, Option<Member>)], part: &str| {
            let found = found(family.iter().cloned());
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(part), "'{part}' is not in {found:?}");
        };
        let changed = |change: fn(&mut TimelineIndex)| {
            let (id, mut branch) = member(2, Some((1, 160)));
            change(&mut branch.as_mut().unwrap().index);
            (id, branch)
        };
        let root = member(1, None);
        one(&[member(2, Some((1, 160)))], "is not there");
        one(&[root.clone(), member(2, Some((1, 99)))], "is before");
        one(&[root.clone(), member(2, Some((1, 201)))], "is after");
        let middle = member(3, Some((1, 170)));
        one(&[root.clone(), middle, member(4, Some((3, 169)))], "is before");
        one(&[root.clone(), changed(|index| index.cluster.system_id = 8)], "another cluster");
        one(&[root.clone(), changed(|index| index.disk_consistent_lsn = Lsn(159))], "begins");
        one(&[root, changed(|index| index.gc_cutoff_lsn = Lsn(161))], "gc_cutoff_lsn");
        one(&[member(2, Some((2, 160)))], "leads back");
        let circle =
            [member(1, Some((2, 160))), member(2, Some((3, 160))), member(3, Some((1, 160)))];
        // One that hangs on a circle is not to blame for it.
        let hanging = member(4, Some((1, 160)));
        let texts = found(circle.into_iter().chain([hanging]));
        assert_eq!(texts.len(), 3, "{texts:?}");
        assert!(texts.iter().all(|text| text.contains("leads back")), "{texts:?}");
    }

    /// The base backup of an import ends after what is in layers.
    #[test]
    fn an_import_that_catches_up_has_no_problems() {
        let (id, mut young) = member(1, None);
        let index = &mut young.as_mut().unwrap().index;
        (index.start_lsn, index.gc_cutoff_lsn) = (Lsn(180), Lsn(180));
        assert_eq!(found([(id, young)]), [""; 0]);
    }
}
