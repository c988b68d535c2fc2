//! The simulated disk: directories over [`FileData`], without any notion of time.
//!
//! Directory changes form one log. Of a directory, a power loss keeps a prefix of the changes
//! that are not synced; different directories lose independently of each other, except that a
//! rename from one to another is kept in both or in neither. This is weaker than what ext4 and
//! xfs promise (a prefix of one journal), so that code which passes here relies on no file
//! system's kindness, and it is never stranger than what a journaling file system can do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use super::file_data::{ChangeSeq, FileData, Keep};
use super::random::Stream;
use crate::io::{ALIGNMENT, DirEntry, IoCause};

/// Number of a file or directory; stays the same when it is renamed.
pub type Inode = u64;

/// Number of a directory change.
pub type DirSeq = u64;

const ROOT: Inode = 1;

#[derive(Clone, Default)]
struct Directory {
    live: BTreeMap<String, Inode>,
    durable: BTreeMap<String, Inode>,
}

#[derive(Clone)]
enum Node {
    File(FileData),
    Directory(Directory),
}

/// `link`: put `inode` under a name, replacing what was there. `unlink`: take a name away. A
/// rename is both.
#[derive(Clone)]
struct DirChange {
    seq: DirSeq,
    unlink: Option<(Inode, String)>,
    link: Option<(Inode, String, Inode)>,
}

impl DirChange {
    fn directories(&self) -> impl Iterator<Item = Inode> {
        let unlink = self.unlink.as_ref().map(|(dir, _)| *dir);
        unlink.into_iter().chain(self.link.as_ref().map(|(dir, _, _)| *dir))
    }
}

/// What a power loss leaves of what is not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashMode {
    /// Nothing: neither content nor names.
    Lost,
    /// All changes of names, no content.
    NamesOnly,
    /// A run of sectors from either end of each write; names by chance.
    Torn,
    /// Each write whole or not at all, so that a later one may be there without an earlier one;
    /// names by chance.
    Reordered,
}

impl CrashMode {
    /// All of them.
    pub const ALL: [CrashMode; 4] =
        [CrashMode::Lost, CrashMode::NamesOnly, CrashMode::Torn, CrashMode::Reordered];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            CrashMode::Lost => "lost",
            CrashMode::NamesOnly => "names-only",
            CrashMode::Torn => "torn",
            CrashMode::Reordered => "reordered",
        }
    }
}

/// The disk of one simulated machine. A copy shares the content of files until one changes it.
#[derive(Clone)]
pub struct Disk {
    nodes: BTreeMap<Inode, Node>,
    open_counts: BTreeMap<Inode, u32>,
    /// Files whose name a renamed one has taken.
    replaced: BTreeSet<Inode>,
    log: Vec<DirChange>,
    next_inode: Inode,
    next_seq: DirSeq,
    capacity_bytes: Option<u64>,
}

fn other(text: &str) -> IoCause {
    IoCause::Other(text.to_owned())
}

/// The names of a path. `/a/b`, `a/b` and `./a/b` are the same: the working directory is `/`.
fn names(path: &Path) -> Result<Vec<String>, IoCause> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => {
                let name = name.to_str().ok_or_else(|| other("name is not UTF-8"))?;
                names.push(name.to_owned());
            }
            Component::ParentDir | Component::Prefix(_) => {
                return Err(other("paths with `..` are not simulated"));
            }
        }
    }
    Ok(names)
}

impl Disk {
    /// An empty disk.
    pub fn new(capacity_bytes: Option<u64>) -> Disk {
        let nodes = BTreeMap::from([(ROOT, Node::Directory(Directory::default()))]);
        Disk {
            nodes,
            open_counts: BTreeMap::new(),
            replaced: BTreeSet::new(),
            log: Vec::new(),
            next_inode: ROOT + 1,
            next_seq: 0,
            capacity_bytes,
        }
    }

    fn directory(&self, inode: Inode) -> Result<&Directory, IoCause> {
        match self.nodes.get(&inode) {
            Some(Node::Directory(directory)) => Ok(directory),
            Some(Node::File(_)) => Err(other("not a directory")),
            None => Err(IoCause::NotFound),
        }
    }

    fn lookup(&self, path: &Path) -> Result<Inode, IoCause> {
        names(path)?.iter().try_fold(ROOT, |inode, name| {
            self.directory(inode)?.live.get(name).copied().ok_or(IoCause::NotFound)
        })
    }

    /// Directory that holds the last name of `path`, and that name.
    fn parent(&self, path: &Path) -> Result<(Inode, String), IoCause> {
        let mut names = names(path)?;
        let last = names.pop().ok_or_else(|| other("the root cannot be meant here"))?;
        let parent = names.iter().try_fold(ROOT, |inode, name| {
            self.directory(inode)?.live.get(name).copied().ok_or(IoCause::NotFound)
        })?;
        self.directory(parent)?;
        Ok((parent, last))
    }

    fn is_directory(&self, inode: Inode) -> bool {
        matches!(self.nodes.get(&inode), Some(Node::Directory(_)))
    }

    fn change(&mut self, unlink: Option<(Inode, String)>, link: Option<(Inode, String, Inode)>) {
        self.next_seq += 1;
        let change = DirChange { seq: self.next_seq, unlink, link };
        apply(&mut self.nodes, &change, |directory| &mut directory.live);
        self.log.push(change);
    }

    fn add(&mut self, path: &Path, node: Node) -> Result<Inode, IoCause> {
        let (parent, name) = self.parent(path)?;
        let inode = self.next_inode;
        self.next_inode += 1;
        self.nodes.insert(inode, node);
        self.change(None, Some((parent, name, inode)));
        Ok(inode)
    }

    /// Creates and opens a file.
    pub fn create(&mut self, path: &Path) -> Result<Inode, IoCause> {
        let (parent, name) = self.parent(path)?;
        if self.directory(parent)?.live.contains_key(&name) {
            return Err(IoCause::Exists);
        }
        let inode = self.add(path, Node::File(FileData::default()))?;
        *self.open_counts.entry(inode).or_default() += 1;
        Ok(inode)
    }

    /// Creates and opens a file with anything in it: for choice one whose name is gone.
    pub fn create_scratch(
        &mut self,
        path: &Path,
        least: u64,
        noise: &mut Stream,
    ) -> Result<Inode, IoCause> {
        let removed = self.removed_files();
        if let Some(old) = self.reuse(path, removed, noise)? {
            return Ok(old);
        }
        let inode = self.create(path)?;
        // Noise takes space, which somebody may be counting.
        if least > 0 && self.capacity_bytes.is_none() {
            let blocks = noise.below(2 * least / ALIGNMENT as u64 + 2);
            *self.file(inode) = FileData::scratch(blocks, noise);
        }
        Ok(inode)
    }

    /// Perhaps creates and opens a file of `len` zeros, out of one whose name is gone. They are
    /// durable before the name is.
    pub fn reuse_zeroed(
        &mut self,
        path: &Path,
        len: u64,
        noise: &mut Stream,
    ) -> Result<Option<Inode>, IoCause> {
        let mut removed = self.removed_files();
        removed.retain(|inode| self.file(*inode).len() == len);
        let reused = self.reuse(path, removed, noise)?;
        if let Some(inode) = reused {
            let file = self.file(inode);
            file.set_len(0);
            file.allocate(len);
            file.sync(file.latest_change());
        }
        Ok(reused)
    }

    /// Perhaps gives one of these files a new name, and opens it, though a power loss may bring
    /// the old name back.
    fn reuse(
        &mut self,
        path: &Path,
        removed: Vec<Inode>,
        noise: &mut Stream,
    ) -> Result<Option<Inode>, IoCause> {
        let old = removed.get(noise.below(removed.len() as u64) as usize).copied();
        let Some(old) = old.filter(|_| noise.coin()) else { return Ok(None) };
        let (parent, name) = self.parent(path)?;
        if self.directory(parent)?.live.contains_key(&name) {
            return Err(IoCause::Exists);
        }
        self.change(None, Some((parent, name, old)));
        *self.open_counts.entry(old).or_default() += 1;
        Ok(Some(old))
    }

    /// Files that were removed, that nobody has open, and that are still remembered. The space of
    /// one that another has replaced is not kept: until the rename is durable, a power loss brings
    /// the old one back, and it is needed then.
    fn removed_files(&self) -> Vec<Inode> {
        let mut named: BTreeSet<&Inode> = BTreeSet::new();
        for node in self.nodes.values() {
            if let Node::Directory(directory) = node {
                named.extend(directory.live.values());
            }
        }
        let is_free = |inode: &Inode| {
            !named.contains(inode)
                && !self.open_counts.contains_key(inode)
                && !self.replaced.contains(inode)
        };
        self.files().into_iter().filter(is_free).collect()
    }

    /// Opens a file.
    pub fn open(&mut self, path: &Path) -> Result<Inode, IoCause> {
        let inode = self.lookup(path)?;
        if self.is_directory(inode) {
            return Err(other("is a directory"));
        }
        *self.open_counts.entry(inode).or_default() += 1;
        Ok(inode)
    }

    /// Gives an open file back.
    pub fn close(&mut self, inode: Inode) {
        if let Some(count) = self.open_counts.get_mut(&inode) {
            *count -= 1;
            if *count == 0 {
                self.open_counts.remove(&inode);
            }
        }
    }

    /// The content of an open file.
    ///
    /// # Panics
    /// Where the file is not open.
    pub fn file(&mut self, inode: Inode) -> &mut FileData {
        match self.nodes.get_mut(&inode) {
            Some(Node::File(file)) => file,
            _ => panic!("inode {inode} is not an open file"),
        }
    }

    /// All files, in order.
    pub fn files(&self) -> Vec<Inode> {
        let is_file =
            |(inode, node): (&Inode, &Node)| matches!(node, Node::File(_)).then_some(*inode);
        self.nodes.iter().filter_map(is_file).collect()
    }

    /// Fails where the disk has no room for a write of this range.
    pub fn check_space(&mut self, inode: Inode, offset: u64, len: u64) -> Result<(), IoCause> {
        let Some(capacity) = self.capacity_bytes else { return Ok(()) };
        let needed = self.file(inode).needed_bytes(offset, len);
        if needed > 0 && self.used_bytes() + needed > capacity {
            return Err(IoCause::NoSpace);
        }
        Ok(())
    }

    /// Bytes that the files take.
    pub fn used_bytes(&mut self) -> u64 {
        self.collect_garbage();
        let used = |node: &Node| if let Node::File(file) = node { file.used_bytes() } else { 0 };
        self.nodes.values().map(used).sum()
    }

    /// Changes the size of the disk.
    pub fn set_capacity(&mut self, capacity_bytes: Option<u64>) {
        self.capacity_bytes = capacity_bytes;
    }

    /// Renames a file or directory; an existing file at the target is replaced.
    pub fn rename(&mut self, source: &Path, target: &Path) -> Result<(), IoCause> {
        let inode = self.lookup(source)?;
        let (source_dir, source_name) = self.parent(source)?;
        let (target_dir, target_name) = self.parent(target)?;
        let target_names = names(target)?;
        if self.is_directory(inode) && target_names.starts_with(&names(source)?) {
            return Err(other("a directory cannot move into itself"));
        }
        if let Some(existing) = self.directory(target_dir)?.live.get(&target_name).copied() {
            if existing == inode {
                return Ok(());
            }
            match (self.is_directory(inode), self.is_directory(existing)) {
                (false, true) => return Err(other("is a directory")),
                (true, false) => return Err(other("not a directory")),
                (true, true) if !self.directory(existing)?.live.is_empty() => {
                    return Err(other("directory not empty"));
                }
                _ => {}
            }
            self.replaced.insert(existing);
        }
        self.change(Some((source_dir, source_name)), Some((target_dir, target_name, inode)));
        Ok(())
    }

    /// Removes a file.
    pub fn remove(&mut self, path: &Path) -> Result<(), IoCause> {
        let inode = self.lookup(path)?;
        if self.is_directory(inode) {
            return Err(other("is a directory"));
        }
        let (parent, name) = self.parent(path)?;
        self.change(Some((parent, name)), None);
        Ok(())
    }

    /// Creates a directory where there is none.
    pub fn create_dir(&mut self, path: &Path) -> Result<(), IoCause> {
        match self.lookup(path) {
            Ok(inode) if self.is_directory(inode) => Ok(()),
            Ok(_) => Err(IoCause::Exists),
            Err(IoCause::NotFound) => {
                self.add(path, Node::Directory(Directory::default())).map(|_| ())
            }
            Err(cause) => Err(cause),
        }
    }

    /// Removes a directory and what is in it.
    pub fn remove_dir_all(&mut self, path: &Path) -> Result<(), IoCause> {
        let inode = match self.lookup(path) {
            Err(IoCause::NotFound) => return Ok(()),
            found => found?,
        };
        self.directory(inode)?;
        let (parent, name) = self.parent(path)?;
        self.empty_directory(inode);
        self.change(Some((parent, name)), None);
        Ok(())
    }

    fn empty_directory(&mut self, inode: Inode) {
        let Ok(directory) = self.directory(inode) else { return };
        for (name, child) in directory.live.clone() {
            self.empty_directory(child);
            self.change(Some((inode, name)), None);
        }
    }

    /// Entries of a directory, sorted by name.
    pub fn list(&self, path: &Path) -> Result<Vec<DirEntry>, IoCause> {
        let directory = self.directory(self.lookup(path)?)?;
        let entry = |(name, inode): (&String, &Inode)| {
            let len = match self.nodes.get(inode) {
                Some(Node::File(file)) => file.len(),
                _ => 0,
            };
            DirEntry { name: name.clone(), is_dir: self.is_directory(*inode), len }
        };
        Ok(directory.live.iter().map(entry).collect())
    }

    /// What a sync of a directory that starts now will cover.
    pub fn begin_sync_dir(&self, path: &Path) -> Result<(Inode, DirSeq), IoCause> {
        let inode = self.lookup(path)?;
        self.directory(inode)?;
        Ok((inode, self.next_seq))
    }

    /// True if a directory was changed after `seq`, and that is not durable yet.
    pub fn has_changed(&self, inode: Inode, seq: DirSeq) -> bool {
        let mut later = self.log.iter().filter(|change| change.seq > seq);
        later.any(|change| change.directories().any(|dir| dir == inode))
    }

    /// Makes the changes of a directory up to `seq` durable, and what a rename ties to them.
    pub fn sync_dir(&mut self, inode: Inode, seq: DirSeq) {
        let mut directories = BTreeSet::from([inode]);
        let mut covered = BTreeSet::new();
        for change in self.log.iter().rev().filter(|change| change.seq <= seq) {
            if change.directories().any(|dir| directories.contains(&dir)) {
                directories.extend(change.directories());
                covered.insert(change.seq);
            }
        }
        for change in std::mem::take(&mut self.log) {
            if covered.contains(&change.seq) {
                apply(&mut self.nodes, &change, |directory| &mut directory.durable);
            } else {
                self.log.push(change);
            }
        }
        self.collect_garbage();
    }

    /// Power loss: only what is durable stays, and of the rest what chance has kept.
    pub fn crash(&mut self, stream: &mut Stream) {
        // Three moods, so that "all of it" and "none of it" come up as often as a mixture.
        let moods = [0, 500_000, 1_000_000];
        let keep_data = moods[stream.below(3) as usize];
        let keep_entries = [0, 700_000, 1_000_000][stream.below(3) as usize];
        self.lose(stream, Keep::Sectors(keep_data), keep_entries);
    }

    /// Power loss of a certain kind.
    pub fn crash_as(&mut self, mode: CrashMode, stream: &mut Stream) {
        let some_entries = [0, 700_000, 1_000_000][stream.below(3) as usize];
        match mode {
            CrashMode::Lost => self.lose(stream, Keep::Sectors(0), 0),
            CrashMode::NamesOnly => self.lose(stream, Keep::Sectors(0), 1_000_000),
            CrashMode::Torn => self.lose(stream, Keep::Runs, some_entries),
            CrashMode::Reordered => self.lose(stream, Keep::Writes, some_entries),
        }
    }

    fn lose(&mut self, stream: &mut Stream, keep_data: Keep, keep_entries: u32) {
        let mut cut = BTreeSet::new();
        for change in std::mem::take(&mut self.log) {
            let lost = change.directories().any(|dir| cut.contains(&dir));
            if !stream.chance(keep_entries) || lost {
                cut.extend(change.directories());
            } else {
                apply(&mut self.nodes, &change, |directory| &mut directory.durable);
            }
        }
        for node in self.nodes.values_mut() {
            match node {
                Node::File(file) => file.crash(stream, keep_data),
                Node::Directory(directory) => directory.live = directory.durable.clone(),
            }
        }
        self.open_counts.clear();
        self.collect_garbage();
    }

    /// The process has died, the machine has not.
    pub fn kill(&mut self) {
        self.open_counts.clear();
        for node in self.nodes.values_mut() {
            if let Node::File(file) = node {
                file.kill();
            }
        }
    }

    /// Forgets files that no directory, no open handle and no crash can bring back.
    fn collect_garbage(&mut self) {
        let mut reached = BTreeSet::from([ROOT]);
        reached.extend(self.open_counts.keys());
        reached.extend(
            self.log.iter().filter_map(|change| change.link.as_ref().map(|(_, _, inode)| *inode)),
        );
        reached.extend(self.log.iter().flat_map(DirChange::directories));
        let mut pending: Vec<Inode> = reached.iter().copied().collect();
        while let Some(inode) = pending.pop() {
            if let Some(Node::Directory(directory)) = self.nodes.get(&inode) {
                for child in directory.live.values().chain(directory.durable.values()) {
                    if reached.insert(*child) {
                        pending.push(*child);
                    }
                }
            }
        }
        self.nodes.retain(|inode, _| reached.contains(inode));
    }

    /// False for an operation on a name that will find nothing to do.
    pub fn would_change(&self, operation: &str, path: &Path) -> bool {
        let exists = self.lookup(path).is_ok();
        match operation {
            "open" | "list" => false,
            "create" | "create directory" => !exists,
            _ => exists,
        }
    }

    /// Makes the content of an open file up to `seq` durable.
    pub fn sync_file(&mut self, inode: Inode, seq: ChangeSeq) {
        self.file(inode).sync(seq);
    }
}

fn apply(
    nodes: &mut BTreeMap<Inode, Node>,
    change: &DirChange,
    side: impl Fn(&mut Directory) -> &mut BTreeMap<String, Inode>,
) {
    if let Some((dir, name)) = &change.unlink
        && let Some(Node::Directory(directory)) = nodes.get_mut(dir)
    {
        side(directory).remove(name);
    }
    if let Some((dir, name, inode)) = &change.link
        && let Some(Node::Directory(directory)) = nodes.get_mut(dir)
    {
        side(directory).insert(name.clone(), *inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_of_removed_files_is_used_again_but_not_of_replaced_ones() {
        let mut disk = Disk::new(None);
        let mut noise = Stream::new(1, "test");
        let mut create = |disk: &mut Disk, path: &str| {
            let inode = disk.create_scratch(Path::new(path), 0, &mut noise).unwrap();
            disk.close(inode);
            inode
        };
        let [old, _, gone] = ["index", "index.tmp", "layer"].map(|path| create(&mut disk, path));
        disk.rename(Path::new("index.tmp"), Path::new("index")).unwrap();
        disk.remove(Path::new("layer")).unwrap();
        let made: Vec<Inode> = (0..50).map(|n| create(&mut disk, &format!("new{n}"))).collect();
        assert!(made.contains(&gone) && !made.contains(&old), "{made:?}");
    }
}
