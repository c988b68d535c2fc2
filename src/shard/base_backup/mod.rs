//! A timeline as of an LSN as a PostgreSQL 15 data directory, in a tar archive.
//!
//! Two kinds ([`BackupKind`]): *full*, which stock PostgreSQL starts on as it is; and *base*, for a
//! compute that reads pages from the node: without the relations, but with a list of them.
//!
//! 1. The LSN is settled, and waited for like that of a page read. A lease keeps it readable from
//!    then on, and for some minutes after the end: time for a compute to take one of its own.
//! 2. Everything is read at that LSN, file by file, a bounded number of pages at a time, and given
//!    to the sink in archive order. Other tasks of the core run between any two pages.
//! 3. The server that is started there has never been shut down: `pg_control` and a segment of WAL
//!    say that it was ([`crate::wal::start_point`]). What no WAL says (settings, who may connect)
//!    is made up in [`files`].
//!
//! `pg_control` comes last: a directory that was not unpacked to its end is none that a server
//! would start on. The same LSN gives the same bytes, but for the list of settings of another
//! release of this program.
//!
//! An unlogged relation is empty, as after a crash: it gets its template's content. Commit times,
//! logical slots and statistics are not in it.

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use tar::EntryType;

use self::files::{
    DIRECTORIES, RELATIONS_FILE, SPC_DEFAULT, SPC_GLOBAL, TAR_BLOCK, VERSION, database_directory,
    relation_path, sealed, tablespace_directories, tar_header, tar_padding,
};
use super::reader::{ReadError, RequestLsn};
use super::timeline::Timeline;
use crate::base::key::{FORK_INIT, FORK_MAIN};
use crate::base::page::{PAGE_SIZE, Page};
use crate::base::page_checksum::set_page_checksum;
use crate::base::{BlockNumber, Key, KeyRange, Kind, Lsn, RelTag, SlruKind, Value};
use crate::io::{Instant, Io};
use crate::limits::{
    BACKUP_LEASE_RENEW, BACKUP_LOOK_BACK_BYTES, BACKUP_PAGES_CONCURRENT, BACKUP_PIECE_BYTES,
};
use crate::wal::checkpoint::Checkpoint;
use crate::wal::control_file::{self, ControlFile, SEGMENT_BLOCKS};
use crate::wal::start_point::{StartPoint, WalIdentity};
use crate::wal::stream::{Event, WalStream};

mod files;

/// What is in a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupKind {
    /// Everything but the relations.
    Base,
    /// Everything.
    Full,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupRequest {
    /// What is to be in it.
    pub kind: BackupKind,
    /// As of this LSN; `None`: of the newest record.
    pub lsn: Option<Lsn>,
    /// Start of the record before the LSN, if the asker knows it.
    pub previous: Option<Lsn>,
}

/// Where the bytes of an archive go.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait BackupSink {
    /// Takes the next bytes; waits while the reader is behind.
    ///
    /// # Errors
    /// Nobody wants more.
    async fn write(&mut self, bytes: &[u8]) -> Result<(), SinkClosed>;
}

/// A sink takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SinkClosed;

/// Why a backup ended early. What was written until then is no archive.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BackupError {
    /// Something cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The reader has gone.
    #[error("the reader of the backup has gone")]
    Closed,
}

impl BackupError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            BackupError::Read(error) => error.kind(),
            BackupError::Closed => Kind::Shutdown,
        }
    }
}

impl From<SinkClosed> for BackupError {
    fn from(_: SinkClosed) -> Self {
        BackupError::Closed
    }
}

/// A backup under way.
struct Backup<'a, I: Io, S> {
    timeline: &'a Timeline<I>,
    sink: &'a mut S,
    kind: BackupKind,
    lsn: Lsn,
    start: StartPoint,
    /// `pg_control` as the timeline has it.
    control: Bytes,
    cluster: ControlFile,
    leased_at: Instant,
    /// The tablespace whose directories were written last.
    tablespace: Option<u32>,
    /// The database directory that was written last.
    database: Option<(u32, u32)>,
    /// Forks that the archive only names.
    named: Vec<(RelTag, BlockNumber)>,
}

impl<I: Io> Timeline<I> {
    /// Writes the archive; returns the LSN that it is of. See the module's text.
    ///
    /// # Errors
    /// [`BackupError`].
    pub async fn write_backup<S: BackupSink>(
        &self,
        request: BackupRequest,
        sink: &mut S,
    ) -> Result<Lsn, BackupError> {
        let lsn = self.backup_lsn(request.lsn).await?;
        self.hold_for_backup(lsn).await;
        let control = self.backup_read(lsn, self.needed(Key::CONTROL_FILE, lsn)).await?;
        let checkpoint = self.backup_read(lsn, self.needed(Key::CHECKPOINT, lsn)).await?;
        let bad = |what: &str, problem: String| {
            BackupError::from(ReadError::Damaged { what: what.to_owned(), lsn, problem })
        };
        let cluster = ControlFile::parse(&control).map_err(|e| bad("pg_control", e.to_string()))?;
        let checkpoint = Checkpoint::parse(&checkpoint)
            .ok_or_else(|| bad("the checkpoint", "it is cut".to_owned()))?;
        let identity = WalIdentity {
            system_id: self.cluster.system_id,
            timeline: self.cluster.tli,
            segment_bytes: self.cluster.wal_segment_bytes,
        };
        let previous = match request.previous {
            Some(previous) => Some(previous),
            None => self.record_before(lsn).await,
        };
        let start = StartPoint::new(lsn, identity, &checkpoint, previous.unwrap_or(Lsn::INVALID));
        let start = start.ok_or_else(|| {
            let why = "no record can begin there, or the previous record is not before it";
            ReadError::BadLsn(format!("no server can start at {lsn}: {why}"))
        })?;
        let mut backup = Backup {
            timeline: self,
            sink,
            kind: request.kind,
            lsn,
            start,
            control,
            cluster,
            leased_at: self.context.io.now(),
            tablespace: None,
            database: None,
            named: Vec::new(),
        };
        backup.write().await?;
        Ok(lsn)
    }

    /// The LSN of a backup: where a record may end, and has been waited for.
    async fn backup_lsn(&self, wanted: Option<Lsn>) -> Result<Lsn, ReadError> {
        let request = match wanted.filter(|lsn| *lsn != Lsn::MAX) {
            // The state between two possible ends of records is that of the second.
            Some(lsn) if lsn.checked_add(8).is_some() => {
                RequestLsn { request: lsn.align(), not_modified_since: lsn.align() }
            }
            Some(lsn) => return Err(ReadError::BadLsn(format!("{lsn} is no LSN"))),
            None => RequestLsn { request: Lsn::MAX, not_modified_since: Lsn::INVALID },
        };
        let _read = self.enter()?;
        self.effective_lsn(request).await
    }

    /// Keeps the LSN readable. Where that cannot be promised, reads say so themselves.
    async fn hold_for_backup(&self, lsn: Lsn) {
        let mut ancestor = self.ancestor().filter(|ancestor| lsn < ancestor.lsn);
        let mut leased = match &ancestor {
            None => self.lease(lsn, None).await,
            Some(ancestor) => ancestor.timeline.lease(lsn, None).await,
        };
        while let Some(older) = ancestor.as_ref().and_then(|older| older.timeline.ancestor())
            && lsn < older.lsn
        {
            leased = older.timeline.lease(lsn, None).await;
            ancestor = Some(older);
        }
        if let Err(error) = leased {
            tracing::debug!(tenant = %self.tenant, timeline = %self.id, "backup without lease: {error}");
        }
    }

    /// A part of a backup: a read that the timeline's end waits for, and that a collection may
    /// overtake.
    async fn backup_read<T>(
        &self,
        lsn: Lsn,
        read: impl Future<Output = Result<T, ReadError>>,
    ) -> Result<T, ReadError> {
        let _read = self.enter()?;
        let result = read.await;
        let result = self.still_retained(lsn, result);
        self.noted(result)
    }

    /// A small value that every timeline has.
    async fn needed(&self, key: Key, lsn: Lsn) -> Result<Bytes, ReadError> {
        let found = self.metadata(key, lsn).await?;
        found.map(|(_, bytes)| bytes).ok_or_else(|| ReadError::Damaged {
            what: format!("{key:?}"),
            lsn,
            problem: "it is not in any layer".to_owned(),
        })
    }

    /// Start of the record that ends at `lsn`, where that can still be found out: of the newest
    /// record from memory, of others from the journal.
    async fn record_before(&self, lsn: Lsn) -> Option<Lsn> {
        {
            let mutable = self.mutable.borrow();
            if mutable.wal.boundary() == lsn && mutable.wal.previous().is_some() {
                return mutable.wal.previous();
            }
        }
        // WAL up to a branch point is the ancestor's.
        let mut ancestor = self.ancestor().filter(|ancestor| lsn <= ancestor.lsn);
        while let Some(older) = ancestor.as_ref().and_then(|older| older.timeline.ancestor())
            && lsn <= older.lsn
        {
            ancestor = Some(older);
        }
        let owner = ancestor.as_ref().map_or(self, |ancestor| &ancestor.timeline);
        for distance in BACKUP_LOOK_BACK_BYTES {
            let from = Lsn(lsn.0.saturating_sub(distance));
            let from = Lsn(from.0 - from.page_offset());
            if let Some(start) = owner.last_record_in(from, lsn).await {
                return Some(start);
            }
        }
        None
    }

    /// Start of the record that ends at `lsn`, if the journal is whole from the page `from` on
    /// and a record begins in between.
    async fn last_record_in(&self, from: Lsn, lsn: Lsn) -> Option<Lsn> {
        let mut wal = WalStream::new(from, super::timeline::wal_layout(&self.cluster)).ok()?;
        let mut at = from;
        let mut last = None;
        while at < lsn {
            let len = lsn.bytes_since(at).min(BACKUP_PIECE_BYTES as u64) as usize;
            let mut bytes = self.journal.read(at, len).await.ok()?;
            at = Lsn(at.0 + bytes.len() as u64);
            if bytes.is_empty() {
                return None;
            }
            loop {
                match wal.next(&mut bytes) {
                    Ok(Event::Record(record)) => last = Some((record.start, record.end)),
                    Ok(Event::NeedInput) => break,
                    Ok(Event::EndOfWal) | Err(_) => return None,
                }
            }
            self.context.io.yield_if_needed().await;
        }
        last.filter(|(_, end)| *end == lsn).map(|(start, _)| start)
    }
}

impl<I: Io, S: BackupSink> Backup<'_, I, S> {
    async fn write(&mut self) -> Result<(), BackupError> {
        for directory in DIRECTORIES {
            self.directory(directory).await?;
        }
        self.file("PG_VERSION", VERSION).await?;
        for kind in SlruKind::ALL {
            self.slru(kind).await?;
        }
        self.databases().await?;
        if self.kind == BackupKind::Base {
            let list = files::relations(self.lsn, &std::mem::take(&mut self.named));
            self.file(RELATIONS_FILE, &list).await?;
        }
        self.two_phase().await?;
        let origins = self.origins().await?;
        self.settings(origins).await?;
        self.wal().await?;
        // Pages for a compute come without checksums.
        let checksums = self.kind == BackupKind::Full;
        let control = control_file::at_start_point(&self.control, &self.start, checksums);
        self.file("global/pg_control", &control).await?;
        Ok(self.sink.write(&[0; 2 * TAR_BLOCK]).await?)
    }

    /// Lets others run, and keeps the lease alive.
    async fn pause(&mut self) {
        let io = &self.timeline.context.io;
        io.yield_if_needed().await;
        if io.now().saturating_sub(self.leased_at) > BACKUP_LEASE_RENEW {
            self.leased_at = io.now();
            self.timeline.hold_for_backup(self.lsn).await;
        }
    }

    async fn read<T>(
        &self,
        read: impl Future<Output = Result<T, ReadError>>,
    ) -> Result<T, BackupError> {
        Ok(self.timeline.backup_read(self.lsn, read).await?)
    }

    async fn header(&mut self, path: &str, entry: EntryType, len: u64) -> Result<(), BackupError> {
        let mtime = self.start.checkpoint().time.max(0).cast_unsigned();
        let header = tar_header(path, entry, len, mtime).ok_or_else(|| ReadError::Damaged {
            what: path.to_owned(),
            lsn: self.lsn,
            problem: "its name is too long for an archive".to_owned(),
        })?;
        Ok(self.sink.write(&header).await?)
    }

    async fn directory(&mut self, path: &str) -> Result<(), BackupError> {
        self.header(path, EntryType::Directory, 0).await
    }

    async fn file(&mut self, path: &str, content: &[u8]) -> Result<(), BackupError> {
        let len = content.len() as u64;
        self.header(path, EntryType::Regular, len).await?;
        for piece in content.chunks(BACKUP_PIECE_BYTES) {
            self.sink.write(piece).await?;
            self.pause().await;
        }
        if let Some(padding) = [0; TAR_BLOCK].get(..tar_padding(len)).filter(|p| !p.is_empty()) {
            self.sink.write(padding).await?;
        }
        Ok(())
    }

    /// Keys of a range that exist, each with its value.
    async fn present(&self, keys: KeyRange) -> Result<Vec<(Key, Bytes)>, BackupError> {
        let newest = self.read(self.timeline.scan(&keys, self.lsn)).await?;
        let value = |(key, (_, value)): (Key, (Lsn, Value))| match value {
            Value::Image(bytes) if !bytes.is_empty() => Some((key, bytes)),
            _ => None,
        };
        Ok(newest.into_iter().filter_map(value).collect())
    }

    async fn slru(&mut self, kind: SlruKind) -> Result<(), BackupError> {
        for (key, _) in self.present(Key::slru_dir_range(kind)).await? {
            let Some((kind, segment)) = key.as_slru_dir() else { continue };
            let timeline = self.timeline;
            let pages = self.read(timeline.slru_pages(kind, segment, self.lsn)).await?;
            let path = format!("{}/{segment:04X}", kind.directory());
            self.file(&path, &pages).await?;
        }
        Ok(())
    }

    /// All databases with their relations, in key order. The directory of relations is read
    /// database by database, and between them: a tablespace may have relations of a database
    /// without being a home to it.
    async fn databases(&mut self) -> Result<(), BackupError> {
        let known = self.present(Key::database_all()).await?;
        let mut known: Vec<_> =
            known.into_iter().filter_map(|(key, _)| key.as_database()).collect();
        known.push((SPC_GLOBAL, 0));
        known.sort_unstable();
        known.dedup();
        let all = Key::rel_dir_all();
        let mut next = all.start;
        for (spc, db) in known {
            let range = Key::rel_dir_range(spc, db);
            self.relations(next..range.start).await?;
            self.enter_directory(spc, db).await?;
            let directory = database_directory(spc, db);
            if spc != SPC_GLOBAL {
                self.file(&format!("{directory}/PG_VERSION"), VERSION).await?;
            }
            let map = self.read(self.timeline.metadata(Key::relmap(spc, db), self.lsn)).await?;
            if let Some((_, map)) = map {
                self.file(&format!("{directory}/pg_filenode.map"), &map).await?;
            }
            next = range.end;
            self.relations(range).await?;
        }
        self.relations(next..all.end).await
    }

    /// Writes the directory of a database in a tablespace, unless it was the last one written.
    async fn enter_directory(&mut self, spc: u32, db: u32) -> Result<(), BackupError> {
        if self.database.replace((spc, db)) == Some((spc, db)) || spc == SPC_GLOBAL {
            return Ok(());
        }
        if spc != SPC_DEFAULT && self.tablespace.replace(spc) != Some(spc) {
            for directory in tablespace_directories(spc) {
                self.directory(&directory).await?;
            }
        }
        self.directory(&database_directory(spc, db)).await
    }

    /// The relations whose directory entries are in a range of keys.
    async fn relations(&mut self, keys: KeyRange) -> Result<(), BackupError> {
        if keys.is_empty() {
            return Ok(());
        }
        let forks = self.present(keys).await?;
        let forks: Vec<RelTag> =
            forks.into_iter().filter_map(|(key, _)| key.as_rel_dir()).collect();
        for forks in forks.chunk_by(|a, b| a.node == b.node) {
            let Some(node) = forks.first().map(|tag| tag.node) else { continue };
            self.enter_directory(node.spc, node.db).await?;
            let template = node.fork(FORK_INIT);
            if forks.contains(&template) {
                // Unlogged: what a server that crashed would make of it.
                self.fork(template, template).await?;
                self.fork(template, node.fork(FORK_MAIN)).await?;
                continue;
            }
            for tag in forks {
                match self.kind {
                    BackupKind::Full => self.fork(*tag, *tag).await?,
                    BackupKind::Base => {
                        let blocks = self.blocks(*tag).await?;
                        self.named.push((*tag, blocks));
                    }
                }
            }
        }
        Ok(())
    }

    async fn blocks(&mut self, tag: RelTag) -> Result<BlockNumber, BackupError> {
        self.pause().await;
        Ok(self.read(self.timeline.fork_size(tag, self.lsn)).await?.unwrap_or(0))
    }

    /// Writes the fork `source` under the name of `target`.
    async fn fork(&mut self, source: RelTag, target: RelTag) -> Result<(), BackupError> {
        let blocks = self.blocks(source).await?;
        let mut done = 0;
        // A fork without blocks is an empty file.
        for segment in 0..blocks.div_ceil(SEGMENT_BLOCKS).max(1) {
            let end = blocks.min(done + SEGMENT_BLOCKS);
            let len = u64::from(end - done) * PAGE_SIZE as u64;
            self.header(&relation_path(target, segment), EntryType::Regular, len).await?;
            let (timeline, lsn) = (self.timeline, self.lsn);
            let pages = (done..end).map(|block| {
                timeline.backup_read(lsn, timeline.page(Key::rel_block(source, block), lsn))
            });
            let mut pages = stream::iter(pages).buffered(BACKUP_PAGES_CONCURRENT).enumerate();
            while let Some((nth, page)) = pages.next().await {
                let page = page?;
                match page.first_chunk().filter(|_| self.cluster.data_checksum_version != 0) {
                    None => self.sink.write(&page).await?,
                    Some(page) => {
                        let mut page: Page = *page;
                        set_page_checksum(&mut page, done + nth as BlockNumber);
                        self.sink.write(&page).await?;
                    }
                }
                self.pause().await;
            }
            done = end;
        }
        Ok(())
    }

    async fn two_phase(&mut self) -> Result<(), BackupError> {
        for (key, state) in self.present(Key::two_phase_all()).await? {
            // The state is stored without the checksum that its file has.
            let content = sealed(state.to_vec());
            self.file(&format!("pg_twophase/{:08X}", key.field6), &content).await?;
        }
        Ok(())
    }

    /// Progress of replication origins; their number.
    async fn origins(&mut self) -> Result<usize, BackupError> {
        let stored = self.present(Key::replication_origin_all()).await?;
        let known: Vec<(u16, Lsn)> = stored
            .into_iter()
            .filter_map(|(key, lsn)| {
                let lsn = <[u8; 8]>::try_from(&lsn[..]).ok()?;
                Some((u16::try_from(key.field6).ok()?, Lsn(u64::from_le_bytes(lsn))))
            })
            .collect();
        if !known.is_empty() {
            self.file("pg_logical/replorigin_checkpoint", &files::origins(&known)).await?;
        }
        Ok(known.len())
    }

    async fn settings(&mut self, origins: usize) -> Result<(), BackupError> {
        let text = files::configuration(
            &self.cluster.parameters,
            self.lsn,
            self.start.segment_bytes(),
            origins,
            self.tablespace.is_some(),
        );
        self.file("postgresql.conf", text.as_bytes()).await?;
        self.file("postgresql.auto.conf", files::AUTO_CONF.as_bytes()).await?;
        self.file("pg_hba.conf", files::HBA.as_bytes()).await?;
        self.file("pg_ident.conf", files::IDENT.as_bytes()).await
    }

    /// Whole segments of WAL; zeros but for the pages of the start point.
    async fn wal(&mut self) -> Result<(), BackupError> {
        static ZEROS: [u8; BACKUP_PIECE_BYTES] = [0; BACKUP_PIECE_BYTES];
        let pages = self.start.pages();
        for (start, name) in self.start.segments() {
            let end = Lsn(start.0 + self.start.segment_bytes());
            self.header(&format!("pg_wal/{name}"), EntryType::Regular, end.bytes_since(start))
                .await?;
            let mut at = start;
            let in_segment = pages.iter().filter(|(page, _)| (start..end).contains(page));
            let pages = in_segment.map(|(page, content)| (*page, &content[..]));
            for (page, content) in pages.chain([(end, &[][..])]) {
                while at < page {
                    let len = page.bytes_since(at).min(ZEROS.len() as u64);
                    self.sink.write(ZEROS.get(..len as usize).unwrap_or_default()).await?;
                    at = Lsn(at.0 + len);
                    self.pause().await;
                }
                self.sink.write(content).await?;
                at = Lsn(at.0 + content.len() as u64);
            }
        }
        Ok(())
    }
}
