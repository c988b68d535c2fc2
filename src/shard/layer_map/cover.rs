//! Which layers cover a key: a segment tree over the keys at which layers begin or end.
//!
//! Every node stands for a range of keys, the root for all. A fork cuts its node's range in two
//! at a boundary, a key at which some layer begins or ends; the range of a leaf has no boundary
//! within. A layer stands in the lists of the *topmost* nodes whose ranges it covers whole. So:
//!
//! 1. The layers that cover a key are those in the lists on the one path from the root to the
//!    key's leaf, each in exactly one of them.
//! 2. All layers in a node's list cover the same keys, that range. By the map's invariant they
//!    are disjoint in LSNs, and a sorted map by LSN finds those of an LSN range without looking
//!    at others. Layers that do overlap, for a moment, lie in separate chains of the list.
//! 3. Where a layer stands follows from the boundaries alone. Nothing depends on the order of
//!    the insertions.
//!
//! Forks form a treap: one lies above another when its key's hash is higher. This keeps the
//! depth O(log n) whatever order the boundaries come in, and adding or removing one changes O(1)
//! nodes on average: no rebuild ever, and no long pause. A layer stands in O(log n) lists.

use std::collections::BTreeMap;

use crate::base::{Key, KeyRange, Lsn, LsnRange};

/// Number of a layer within the map.
pub type LayerId = u32;

/// What a search looked at; see [`super::LayerMap::search_counted`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Tree nodes on the path to the key, each counted once for images and once for deltas.
    pub nodes: u64,
    /// Sorted lists that were searched.
    pub lists: u64,
    /// Layers that were looked at, those of the answer among them.
    pub layers: u64,
}

/// A layer in a list, whose key there is the start of the LSN range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    end: Lsn,
    id: LayerId,
}

/// Layers that cover the same keys, in chains that are disjoint in LSNs: one chain, unless a
/// layer and what replaces it are present together.
#[derive(Clone, Default)]
struct Chains(Vec<BTreeMap<Lsn, Entry>>);

impl Chains {
    fn add(&mut self, start: Lsn, entry: Entry) {
        let fits = |chain: &BTreeMap<Lsn, Entry>| {
            chain.range(..entry.end).next_back().is_none_or(|(_, before)| before.end <= start)
        };
        match self.0.iter_mut().find(|chain| fits(chain)) {
            Some(chain) => {
                chain.insert(start, entry);
            }
            None => self.0.push(BTreeMap::from([(start, entry)])),
        }
    }

    fn remove(&mut self, start: Lsn, id: LayerId) {
        let at = self.position(start, id).expect("a layer is in the lists of its keys");
        self.0[at].remove(&start);
        if self.0[at].is_empty() {
            self.0.remove(at);
        }
    }

    fn position(&self, start: Lsn, id: LayerId) -> Option<usize> {
        self.0.iter().position(|chain| chain.get(&start).is_some_and(|entry| entry.id == id))
    }

    fn iter(&self) -> impl Iterator<Item = (Lsn, Entry)> {
        self.0.iter().flatten().map(|(start, entry)| (*start, *entry))
    }

    fn add_all(&mut self, other: &Chains) {
        if self.0.is_empty() {
            self.clone_from(other);
        } else {
            other.iter().for_each(|(start, entry)| self.add(start, entry));
        }
    }

    /// Moves what both `left` and `right` hold here.
    fn take_common(&mut self, left: &mut Chains, right: &mut Chains) {
        let size = |chains: &Chains| chains.0.iter().map(BTreeMap::len).sum::<usize>();
        let (few, many) = if size(left) <= size(right) { (left, right) } else { (right, left) };
        let in_both = |(start, entry): &(Lsn, Entry)| many.position(*start, entry.id).is_some();
        let common: Vec<_> = few.iter().filter(in_both).collect();
        for (start, entry) in common {
            few.remove(start, entry.id);
            many.remove(start, entry.id);
            self.add(start, entry);
        }
    }
}

/// The lists of one node.
#[derive(Clone, Default)]
struct Lists {
    deltas: Chains,
    images: Chains,
}

impl Lists {
    fn of(&mut self, is_image: bool) -> &mut Chains {
        if is_image { &mut self.images } else { &mut self.deltas }
    }

    fn add_all(&mut self, other: &Lists) {
        self.deltas.add_all(&other.deltas);
        self.images.add_all(&other.images);
    }
}

#[derive(Default)]
struct Node {
    lists: Lists,
    fork: Option<Box<Fork>>,
}

struct Fork {
    /// The first key of `right`.
    at: Key,
    /// How many layers begin or end here.
    uses: u32,
    left: Node,
    right: Node,
}

/// True where the fork at `a` lies above the one at `b`.
fn is_above(a: &Key, b: &Key) -> bool {
    (priority(a), a) > (priority(b), b)
}

/// A hash of the key (the finaliser of SplitMix64, once per word).
fn priority(key: &Key) -> u64 {
    let low = u64::from(key.field1) << 40 | u64::from(key.field5) << 32 | u64::from(key.field6);
    let high = u64::from(key.field2) << 32 | u64::from(key.field3);
    [low, high, u64::from(key.field4)].into_iter().fold(0, |hash: u64, word| {
        let mixed = (hash ^ word).wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    })
}

impl Fork {
    fn side(&self, key: &Key) -> &Node {
        if *key < self.at { &self.left } else { &self.right }
    }

    fn side_mut(&mut self, key: &Key) -> &mut Node {
        if *key < self.at { &mut self.left } else { &mut self.right }
    }

    /// Cuts the tree under a node at `at`, which is no boundary yet.
    fn split(mut self: Box<Self>, at: &Key) -> (Node, Node) {
        if *at < self.at {
            let (left, rest) = std::mem::take(&mut self.left).split(at);
            self.left = rest;
            (left, self.into_node())
        } else {
            let (rest, right) = std::mem::take(&mut self.right).split(at);
            self.right = rest;
            (self.into_node(), right)
        }
    }

    /// A node with this fork. The layers that stand on both sides rise to it.
    fn into_node(mut self: Box<Self>) -> Node {
        let mut lists = Lists::default();
        let (left, right) = (&mut self.left.lists, &mut self.right.lists);
        lists.deltas.take_common(&mut left.deltas, &mut right.deltas);
        lists.images.take_common(&mut left.images, &mut right.images);
        Node { lists, fork: Some(self) }
    }
}

impl Node {
    fn add_boundary(&mut self, at: Key) {
        match &mut self.fork {
            Some(fork) if fork.at == at => fork.uses += 1,
            Some(fork) if is_above(&fork.at, &at) => fork.side_mut(&at).add_boundary(at),
            fork => {
                // What covers this whole node stands here and stays.
                let (left, right) = match fork.take() {
                    Some(lower) => lower.split(&at),
                    None => (Node::default(), Node::default()),
                };
                *fork = Some(Box::new(Fork { at, uses: 1, left, right }));
            }
        }
    }

    fn remove_boundary(&mut self, at: &Key) {
        let mut fork = self.fork.take().expect("where a layer ends is a boundary");
        if fork.at != *at {
            fork.side_mut(at).remove_boundary(at);
        } else if fork.uses > 1 {
            fork.uses -= 1;
        } else {
            let merged = Node::merge(fork.left, fork.right);
            // Nothing rises as far as here: what covers all of this node stands here already.
            self.fork = merged.fork;
            return;
        }
        self.fork = Some(fork);
    }

    /// The node in two, before `at` and from `at` on; what covers it all covers both.
    fn split(self, at: &Key) -> (Node, Node) {
        let (mut left, mut right) = match self.fork {
            Some(fork) => fork.split(at),
            None => (Node::default(), Node::default()),
        };
        left.lists.add_all(&self.lists);
        right.lists.add_all(&self.lists);
        (left, right)
    }

    /// The opposite of a split, where no layer ends between the two any more: what covers the
    /// last keys of `left` covers the first keys of `right`.
    fn merge(left: Node, right: Node) -> Node {
        let left_is_above = match (&left.fork, &right.fork) {
            // Lists have come down here from all nodes along the cut: both hold the same.
            (None, None) => return left,
            (Some(a), Some(b)) => is_above(&a.at, &b.at),
            (a, _) => a.is_some(),
        };
        let (above, below) = if left_is_above { (left, right) } else { (right, left) };
        let mut fork = above.fork.expect("a leaf is never above a fork");
        // The node grows by the other one's keys: its layers step down, and rise where they can.
        fork.left.lists.add_all(&above.lists);
        fork.right.lists.add_all(&above.lists);
        if left_is_above {
            fork.right = Node::merge(fork.right, below);
        } else {
            fork.left = Node::merge(below, fork.left);
        }
        fork.into_node()
    }

    /// Calls `act` with the lists of the topmost nodes that `keys` cover. `range` is this node's.
    fn place(&mut self, range: KeyRange, keys: &KeyRange, act: &mut dyn FnMut(&mut Lists)) {
        if keys.start <= range.start && range.end <= keys.end {
            return act(&mut self.lists);
        }
        let fork = self.fork.as_mut().expect("the ends of a layer are boundaries");
        if keys.start < fork.at {
            fork.left.place(range.start..fork.at, keys, act);
        }
        if fork.at < keys.end {
            fork.right.place(fork.at..range.end, keys, act);
        }
    }
}

/// The tree. See the module's text.
#[derive(Default)]
pub(super) struct Cover {
    root: Node,
}

/// No layer holds [`Key::MAX`], so this is everything.
const ALL: KeyRange = Key::MIN..Key::MAX;

/// Where a layer stands in the tree.
pub(super) struct Place<'a> {
    pub keys: &'a KeyRange,
    pub lsns: &'a LsnRange,
    pub is_image: bool,
    pub id: LayerId,
}

impl Place<'_> {
    /// The ends of all keys always are boundaries.
    fn boundaries(&self) -> impl Iterator<Item = Key> {
        [self.keys.start, self.keys.end]
            .into_iter()
            .filter(|key| !matches!(*key, Key::MIN | Key::MAX))
    }
}

impl Cover {
    /// Adds a layer with at least one key and one LSN.
    pub(super) fn insert(&mut self, place: &Place<'_>) {
        place.boundaries().for_each(|at| self.root.add_boundary(at));
        let entry = Entry { end: place.lsns.end, id: place.id };
        let mut add = |lists: &mut Lists| lists.of(place.is_image).add(place.lsns.start, entry);
        self.root.place(ALL, place.keys, &mut add);
    }

    /// Removes a layer that is there.
    pub(super) fn remove(&mut self, place: &Place<'_>) {
        let remove =
            |lists: &mut Lists| lists.of(place.is_image).remove(place.lsns.start, place.id);
        self.root.place(ALL, place.keys, &mut { remove });
        place.boundaries().for_each(|at| self.root.remove_boundary(&at));
    }

    fn path(&self, key: Key) -> impl Iterator<Item = &Node> {
        let first = (key < Key::MAX).then_some(&self.root);
        std::iter::successors(first, move |node| Some(node.fork.as_ref()?.side(&key)))
    }

    /// Gives `take` of every list with images of `key` the one with the highest LSN below `below`:
    /// its `end` and its number.
    pub(super) fn images(
        &self,
        key: Key,
        below: Lsn,
        steps: &mut Steps,
        mut take: impl FnMut(Lsn, LayerId),
    ) {
        for node in self.path(key) {
            steps.nodes += 1;
            for chain in &node.lists.images.0 {
                steps.lists += 1;
                if let Some((_, entry)) = chain.range(..below).next_back() {
                    steps.layers += 1;
                    take(entry.end, entry.id);
                }
            }
        }
    }

    /// Appends the deltas of `key` that begin below `below` and end above `floor` to `found`, in no
    /// order.
    pub(super) fn deltas(
        &self,
        key: Key,
        (floor, below): (Lsn, Lsn),
        steps: &mut Steps,
        found: &mut Vec<LayerId>,
    ) {
        for node in self.path(key) {
            steps.nodes += 1;
            for chain in &node.lists.deltas.0 {
                steps.lists += 1;
                // Within a chain the ends fall as the starts do.
                for (_, entry) in chain.range(..below).rev() {
                    steps.layers += 1;
                    if entry.end <= floor {
                        break;
                    }
                    found.push(entry.id);
                }
            }
        }
    }

    /// All layers of `key` that begin below `below`, in no order.
    pub(super) fn all(&self, key: Key, below: Lsn) -> impl Iterator<Item = LayerId> {
        let chains =
            self.path(key).flat_map(|node| node.lists.deltas.0.iter().chain(&node.lists.images.0));
        chains.flat_map(move |chain| chain.range(..below).map(|(_, entry)| entry.id))
    }
}

/// What the tree holds, for the comparison with what it should hold.
#[derive(Default)]
pub(super) struct Census {
    /// Number of lists that each layer stands in.
    pub lists: BTreeMap<LayerId, usize>,
    /// Boundaries with the number of layers that begin or end there.
    pub boundaries: BTreeMap<Key, u32>,
    /// Nodes on the longest path.
    pub depth: usize,
}

impl Cover {
    /// Number of lists in which a layer of these keys must stand.
    pub(super) fn list_count(&self, keys: &KeyRange) -> usize {
        fn count(node: &Node, range: KeyRange, keys: &KeyRange) -> usize {
            if keys.start <= range.start && range.end <= keys.end {
                return 1;
            }
            let Some(fork) = &node.fork else { return 0 };
            let left = if keys.start < fork.at {
                count(&fork.left, range.start..fork.at, keys)
            } else {
                0
            };
            let right =
                if fork.at < keys.end { count(&fork.right, fork.at..range.end, keys) } else { 0 };
            left + right
        }
        count(&self.root, ALL, keys)
    }

    /// Goes through the tree: forks are in order and in the treap's order, chains are sorted and
    /// disjoint, every layer that stands somewhere covers that node and not the node above.
    pub(super) fn census<'a>(
        &self,
        place_of: &dyn Fn(LayerId) -> Option<Place<'a>>,
    ) -> Result<Census, String> {
        let mut census = Census::default();
        Walk { place_of, census: &mut census }.node(&self.root, ALL, None, 1)?;
        Ok(census)
    }
}

struct Walk<'w, 'a> {
    place_of: &'w dyn Fn(LayerId) -> Option<Place<'a>>,
    census: &'w mut Census,
}

impl Walk<'_, '_> {
    fn node(
        &mut self,
        node: &Node,
        range: KeyRange,
        parent: Option<(Key, &KeyRange)>,
        depth: usize,
    ) -> Result<(), String> {
        self.census.depth = self.census.depth.max(depth);
        self.chains(&node.lists.deltas, false, &range, parent.map(|(_, keys)| keys))?;
        self.chains(&node.lists.images, true, &range, parent.map(|(_, keys)| keys))?;
        let Some(fork) = &node.fork else { return Ok(()) };
        if fork.at <= range.start || range.end <= fork.at {
            return Err(format!("a fork at {:?} in {range:?}", fork.at));
        }
        if parent.is_some_and(|(above, _)| !is_above(&above, &fork.at)) {
            return Err(format!("the fork at {:?} is too low", fork.at));
        }
        self.census.boundaries.insert(fork.at, fork.uses);
        let this = Some((fork.at, &range));
        self.node(&fork.left, range.start..fork.at, this, depth + 1)?;
        self.node(&fork.right, fork.at..range.end, this, depth + 1)
    }

    fn chains(
        &mut self,
        chains: &Chains,
        is_image: bool,
        range: &KeyRange,
        parent: Option<&KeyRange>,
    ) -> Result<(), String> {
        let covers =
            |keys: &KeyRange, range: &KeyRange| keys.start <= range.start && range.end <= keys.end;
        for chain in &chains.0 {
            let mut last_end = Lsn(0);
            if chain.is_empty() {
                return Err(format!("an empty chain at {range:?}"));
            }
            for (start, Entry { end, id }) in chain {
                let Some(place) = (self.place_of)(*id) else {
                    return Err(format!("layer {id} at {range:?} does not exist"));
                };
                if *place.lsns != (*start..*end) || place.is_image != is_image {
                    return Err(format!("layer {id} stands at {range:?} as {start}..{end}"));
                }
                if *start < last_end {
                    return Err(format!("chain of {range:?} overlaps at {start}"));
                }
                last_end = *end;
                if !covers(place.keys, range) || parent.is_some_and(|all| covers(place.keys, all)) {
                    return Err(format!("layer {id} of {:?} stands at {range:?}", place.keys));
                }
                *self.census.lists.entry(*id).or_default() += 1;
            }
        }
        Ok(())
    }
}
