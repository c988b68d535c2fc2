//! Keeping what is left of a damaged journal.
//!
//! WAL that was synced, and so acknowledged, cannot be read any more from some LSN on. The journal
//! goes on from there with what the source sends again, over what stands there now. What stands
//! there is kept first: nothing of it may be the only copy.
//!
//! 1. The segment that holds the LSN is copied; what it has before the LSN is still needed.
//! 2. Later segments are renamed, the first of them last: as long as one is left, so is the proof
//!    that there was WAL.
//! 3. If there is no segment that should hold the LSN, an empty file says so.
//! 4. The directory is synced.
//!
//! A crash at any step leaves a journal that is found damaged again, at the same LSN, and what was
//! kept by then stays as it is.

use std::path::Path;

use super::journal::{parse_segment_name, segment_name};
use crate::base::Lsn;
use crate::io::{ALIGNMENT, File, Io, IoCause, IoError, align_up, durable};
use crate::limits::{JOURNAL_SEGMENT_BYTES, JOURNAL_WRITE_BYTES_MAX};

/// Stands between a segment's name and the LSN, in 16 hexadecimal digits.
const ASIDE: &str = ".damaged-at-";

/// The name under which a segment is kept whose journal was damaged at `lsn`.
pub fn aside_name(segment: &str, lsn: Lsn) -> String {
    format!("{segment}{ASIDE}{:016X}", lsn.0)
}

/// Where the journal was damaged from which a file of this name was kept; `None` if it is no such
/// name.
pub fn parse_aside_name(name: &str) -> Option<Lsn> {
    let (segment, lsn) = name.split_once(ASIDE)?;
    parse_segment_name(segment)?;
    let lsn = Lsn(u64::from_str_radix(lsn, 16).ok()?);
    // Only the exact printed form is a name.
    (aside_name(segment, lsn) == name).then_some(lsn)
}

/// Keeps what the journal in `dir` has from `end` on; see the module's text. Nobody may have a
/// segment open.
///
/// # Errors
/// [`IoError`] of the first call that failed. It is to be done again then, before anything is
/// written to the journal.
pub async fn set_aside<I: Io>(io: &I, dir: &Path, tli: u32, end: Lsn) -> Result<(), IoError> {
    let first = end.segment_number(JOURNAL_SEGMENT_BYTES);
    let change = io.dir_change(dir);
    let mut is_there = false;
    // By name, which is by number.
    for entry in io.list(dir).await?.into_iter().rev() {
        let Some((found, number)) = parse_segment_name(&entry.name) else { continue };
        if entry.is_dir || found != tli || number < first {
            continue;
        }
        is_there |= number == first;
        let (segment, aside) = (dir.join(&entry.name), dir.join(aside_name(&entry.name, end)));
        if number == first && end.segment_offset(JOURNAL_SEGMENT_BYTES) != 0 {
            copy(io, &segment, &aside).await?;
        } else {
            io.rename(&segment, &aside).await?;
        }
    }
    if !is_there {
        let missing = dir.join(aside_name(&segment_name(tli, first), end));
        match io.create(&missing).await {
            Ok(file) => file.close().await?,
            Err(error) if error.cause == IoCause::Exists => {
                // An earlier attempt's, whose sync has failed: a sync proves nothing without a
                // change.
                let temp = durable::temp_path(&missing);
                durable::remove_if_there(io, &temp).await?;
                io.create(&temp).await?.close().await?;
                io.remove(&temp).await?;
            }
            Err(error) => return Err(error),
        }
    }
    io.sync_dir(&change).await
}

/// Copies a segment, unless that was done before: by now it may have been written to.
async fn copy<I: Io>(io: &I, segment: &Path, aside: &Path) -> Result<(), IoError> {
    match io.open(aside).await {
        Ok(file) => return file.close().await,
        Err(error) if error.cause == IoCause::NotFound => {}
        Err(error) => return Err(error),
    }
    let temp = durable::temp_path(aside);
    durable::remove_if_there(io, &temp).await?;
    let source = io.open(segment).await?;
    let target = match io.create(&temp).await {
        Ok(target) => target,
        Err(error) => {
            // The first error is the one that counts.
            let _ = source.close().await;
            return Err(error);
        }
    };
    let copied = copy_content(&source, &target).await;
    let closed = [source.close().await, target.close().await];
    copied?;
    closed.into_iter().collect::<Result<(), IoError>>()?;
    io.rename(&temp, aside).await
}

async fn copy_content<F: File>(source: &F, target: &F) -> Result<(), IoError> {
    let mut offset = 0;
    loop {
        let bytes = source.read_at(offset, JOURNAL_WRITE_BYTES_MAX).await?;
        if bytes.is_empty() {
            return target.sync().await;
        }
        let mut buf = target.alloc(align_up(bytes.len() as u64) as usize);
        if let Some(part) = buf.get_mut(..bytes.len()) {
            part.copy_from_slice(&bytes);
        }
        target.write_at(offset, buf).await?;
        offset += bytes.len() as u64;
        if !bytes.len().is_multiple_of(ALIGNMENT) {
            // The end of a file that was cut off.
            return target.sync().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{SimIo, SimOptions, SimWorld};

    async fn write(io: &SimIo, path: &Path, byte: u8) {
        let file = io.create(path).await.unwrap();
        let mut buf = file.alloc(8192);
        buf.fill(byte);
        file.write_at(0, buf).await.unwrap();
        file.close().await.unwrap();
    }

    async fn first_byte(io: &SimIo, path: &Path) -> u8 {
        let file = io.open(path).await.unwrap();
        let byte = file.read_at(0, 4096).await.unwrap()[0];
        file.close().await.unwrap();
        byte
    }

    #[test]
    fn names_round_trip() {
        let name = aside_name(&segment_name(1, 5), Lsn(0x512_3450));
        assert_eq!(name, "000000010000000000000005.damaged-at-0000000005123450");
        assert_eq!(parse_aside_name(&name), Some(Lsn(0x512_3450)));
        for other in ["x.damaged-at-0000000005123450", &name[..30], &segment_name(1, 5)] {
            assert_eq!(parse_aside_name(other), None);
        }
    }

    /// Segments before the damage stay, those behind it go, the one that has it stays and is kept;
    /// what was kept is not replaced.
    #[test]
    fn what_is_behind_the_damage_is_kept_once() {
        let mut world = SimWorld::new(1, SimOptions::default());
        let run = world.run(|io| async move {
            let dir = Path::new("/wal");
            io.create_dir(dir).await.unwrap();
            let path = |number| dir.join(segment_name(1, number));
            for number in 4..8 {
                write(&io, &path(number), number as u8).await;
            }
            let end = Lsn(5 * JOURNAL_SEGMENT_BYTES + 8);
            set_aside(&io, dir, 1, end).await.unwrap();
            let kept = |number| dir.join(aside_name(&segment_name(1, number), end));
            let names = async || {
                let entries = io.list(dir).await.unwrap();
                entries.into_iter().map(|entry| dir.join(entry.name)).collect::<Vec<_>>()
            };
            let expected = [path(4), path(5), kept(5), kept(6), kept(7)];
            assert_eq!(names().await, expected);
            for number in 5..8 {
                assert_eq!(first_byte(&io, &kept(number)).await, number as u8);
            }
            io.remove(&path(5)).await.unwrap();
            write(&io, &path(5), 55).await;
            set_aside(&io, dir, 1, end).await.unwrap();
            assert_eq!(names().await, expected);
            assert_eq!(first_byte(&io, &kept(5)).await, 5);
            // Nothing of a segment that the damage begins with is needed.
            let end = Lsn(5 * JOURNAL_SEGMENT_BYTES);
            set_aside(&io, dir, 1, end).await.unwrap();
            assert!(!names().await.contains(&path(5)) && names().await.len() == 5);
            // A file says what is missing.
            let end = Lsn(9 * JOURNAL_SEGMENT_BYTES + 8);
            set_aside(&io, dir, 1, end).await.unwrap();
            assert!(names().await.contains(&dir.join(aside_name(&segment_name(1, 9), end))));
        });
        assert_eq!(run, Ok(()), "{world}");
    }
}
