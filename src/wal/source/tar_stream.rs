//! Reads a tar archive that arrives piece by piece. Pure.
//!
//! PostgreSQL writes ustar headers with sizes in octal, or base 256 from 8 GiB on
//! (`tarCreateHeader`). Archives that other tools repacked may hold long names in GNU (`L`) or
//! pax (`x`) form; both are read. Two blocks of zeros end an archive: one that lacks them was cut.

use bytes::{Buf, Bytes, BytesMut};
use tar::{EntryType, Header, PaxExtensions};

use super::error::SourceError;
use crate::limits::BACKUP_PATH_BYTES_MAX;

const BLOCK: usize = 512;
/// Where the header holds its own checksum, eight bytes.
const CHECKSUM_START: usize = 148;
/// Its end.
const CHECKSUM_END: usize = 156;

/// What an archive holds next. Paths are relative, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarEvent {
    /// A regular file; `len` bytes of data follow, then [`TarEvent::FileEnd`].
    File {
        /// Its path.
        path: String,
        /// Its length in bytes.
        len: u64,
    },
    /// A directory.
    Directory {
        /// Its path.
        path: String,
    },
    /// A link or a special file; it has no data that concerns us.
    Other {
        /// Its path.
        path: String,
    },
    /// Data of the file.
    Data(Bytes),
    /// The file is complete.
    FileEnd,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Body {
    File,
    LongName,
    Pax,
    Skipped,
}

#[derive(Debug)]
enum State {
    Header,
    Body { body: Body, remaining: u64, padding: u64 },
    Padding { remaining: u64 },
    Finished,
}

/// The reader. [`TarReader::push`] bytes, then take events until there are none.
#[derive(Debug)]
pub struct TarReader {
    archive: String,
    input: BytesMut,
    /// Offset in the archive of the first byte of `input`.
    offset: u64,
    state: State,
    /// What a long-name or pax body has brought so far.
    collected: Vec<u8>,
    next_path: Option<Vec<u8>>,
    next_len: Option<u64>,
}

impl TarReader {
    /// A reader at the start of an archive; `archive` names it in errors.
    pub fn new(archive: impl Into<String>) -> Self {
        TarReader {
            archive: archive.into(),
            input: BytesMut::new(),
            offset: 0,
            state: State::Header,
            collected: Vec::new(),
            next_path: None,
            next_len: None,
        }
    }

    /// Hands in the next bytes of the archive.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Finished) {
            self.input.extend_from_slice(bytes);
        }
    }

    /// Offset in the archive of what comes next, in bytes; just after [`TarEvent::File`], of the
    /// file's first byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// True when the end mark has been read.
    pub fn finished(&self) -> bool {
        matches!(self.state, State::Finished)
    }

    /// Passes over the data of the current file, which then ends. What was pushed is dropped; the
    /// caller goes on pushing at [`TarReader::offset`].
    pub fn skip_file(&mut self) {
        if let State::Body { body: Body::File, remaining, padding } = self.state {
            let skip = remaining.saturating_add(padding);
            self.input.clear();
            self.offset = self.offset.saturating_add(skip);
            self.state = State::Header;
        }
    }

    /// Checks that the archive was complete.
    pub fn finish(&self) -> Result<(), SourceError> {
        if self.finished() { Ok(()) } else { Err(self.damaged("it ends early")) }
    }

    fn damaged(&self, detail: impl Into<String>) -> SourceError {
        let detail = format!("{} (near byte {})", detail.into(), self.offset);
        SourceError::Archive { archive: self.archive.clone(), detail }
    }

    fn take(&mut self, len: usize) -> Bytes {
        self.offset = self.offset.saturating_add(len as u64);
        self.input.split_to(len.min(self.input.len())).freeze()
    }

    /// The next event; `None` when more bytes are needed or the archive has ended.
    pub fn next_event(&mut self) -> Result<Option<TarEvent>, SourceError> {
        loop {
            match self.state {
                State::Finished => {
                    self.input.clear();
                    return Ok(None);
                }
                State::Header => {
                    if self.input.len() < BLOCK {
                        return Ok(None);
                    }
                    let block = self.take(BLOCK);
                    if let Some(event) = self.header(&block)? {
                        return Ok(Some(event));
                    }
                }
                State::Body { body, remaining: 0, padding } => {
                    self.state = State::Padding { remaining: padding };
                    match body {
                        Body::File => return Ok(Some(TarEvent::FileEnd)),
                        Body::LongName => {
                            let mut name = std::mem::take(&mut self.collected);
                            name.truncate(name.iter().position(|b| *b == 0).unwrap_or(name.len()));
                            self.next_path = Some(name);
                        }
                        Body::Pax => self.pax()?,
                        Body::Skipped => {}
                    }
                }
                State::Body { body, remaining, padding } => {
                    if self.input.is_empty() {
                        return Ok(None);
                    }
                    let len = usize::try_from(remaining).unwrap_or(usize::MAX);
                    let data = self.take(len.min(self.input.len()));
                    let remaining = remaining.saturating_sub(data.len() as u64);
                    self.state = State::Body { body, remaining, padding };
                    match body {
                        Body::File => return Ok(Some(TarEvent::Data(data))),
                        Body::LongName | Body::Pax => self.collected.extend_from_slice(&data),
                        Body::Skipped => {}
                    }
                }
                State::Padding { remaining } => {
                    let len = usize::try_from(remaining).unwrap_or(usize::MAX);
                    let skipped = len.min(self.input.len());
                    self.input.advance(skipped);
                    self.offset = self.offset.saturating_add(skipped as u64);
                    let remaining = remaining.saturating_sub(skipped as u64);
                    self.state = State::Padding { remaining };
                    match remaining {
                        0 => self.state = State::Header,
                        _ => return Ok(None),
                    }
                }
            }
        }
    }

    fn header(&mut self, block: &[u8]) -> Result<Option<TarEvent>, SourceError> {
        if block.iter().all(|byte| *byte == 0) {
            self.state = State::Finished;
            return Ok(None);
        }
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        let is_checksum = |at: usize| (CHECKSUM_START..CHECKSUM_END).contains(&at);
        let sum = block.iter().enumerate().map(|(at, byte)| match is_checksum(at) {
            true => u32::from(b' '),
            false => u32::from(*byte),
        });
        if header.cksum().ok() != Some(sum.sum()) {
            return Err(self.damaged("a header's checksum is wrong"));
        }
        let len = header.entry_size().map_err(|_| self.damaged("a header has a bad size"))?;
        let (body, special) = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => (Body::File, false),
            EntryType::GNULongName => (Body::LongName, true),
            EntryType::XHeader => (Body::Pax, true),
            EntryType::GNULongLink | EntryType::XGlobalHeader => (Body::Skipped, true),
            EntryType::GNUSparse => return Err(self.damaged("it holds GNU sparse files")),
            _ => (Body::Skipped, false),
        };
        if special && body != Body::Skipped && len > 2 * BACKUP_PATH_BYTES_MAX as u64 {
            return Err(self.damaged("a name is too long"));
        }
        let len = if special { len } else { self.next_len.take().unwrap_or(len) };
        let padding = (BLOCK as u64 - len % BLOCK as u64) % BLOCK as u64;
        if len > i64::MAX as u64 {
            return Err(self.damaged("a header has a bad size"));
        }
        self.state = State::Body { body, remaining: len, padding };
        if special {
            self.collected.clear();
            return Ok(None);
        }
        let path = match self.next_path.take() {
            Some(path) => self.clean_path(&path)?,
            None => self.clean_path(&header.path_bytes())?,
        };
        Ok(Some(match (body, header.entry_type()) {
            (Body::File, _) => TarEvent::File { path, len },
            (_, EntryType::Directory) => TarEvent::Directory { path },
            _ => TarEvent::Other { path },
        }))
    }

    fn pax(&mut self) -> Result<(), SourceError> {
        let body = std::mem::take(&mut self.collected);
        for extension in PaxExtensions::new(&body) {
            let extension = extension.map_err(|_| self.damaged("a pax header is malformed"))?;
            match extension.key_bytes() {
                b"path" => self.next_path = Some(extension.value_bytes().to_vec()),
                b"size" => {
                    let size = extension.value().ok().and_then(|text| text.parse().ok());
                    let size = size.ok_or_else(|| self.damaged("a pax size is malformed"))?;
                    self.next_len = Some(size);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A path below the archive's root. Names that are no UTF-8 are none of PostgreSQL's own;
    /// they come out with replacement characters.
    fn clean_path(&self, path: &[u8]) -> Result<String, SourceError> {
        let text = String::from_utf8_lossy(path);
        if text.len() > BACKUP_PATH_BYTES_MAX || text.contains('\0') {
            return Err(self.damaged("a name is too long or holds a zero byte"));
        }
        let parts: Vec<&str> = text.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
        if text.starts_with('/') || parts.contains(&"..") {
            let detail = format!("the name '{}' leads out of it", text.escape_debug());
            return Err(self.damaged(detail));
        }
        Ok(parts.join("/"))
    }
}

#[cfg(test)]
#[path = "tar_stream_tests.rs"]
mod tests;
