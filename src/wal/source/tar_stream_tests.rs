//! Tar archives: written by the `tar` crate, cut, changed and fed in pieces.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn sample() -> (Vec<u8>, BTreeMap<String, Vec<u8>>) {
    let mut builder = tar::Builder::new(Vec::new());
    let mut files = BTreeMap::new();
    let long = format!("pg_tblspc/{}/x", "y".repeat(180));
    for (path, len) in [
        ("PG_VERSION", 3),
        ("base/1/1259", 8192),
        ("base/1/empty", 0),
        ("base/5/2", 700),
        (&long, 513),
    ] {
        let data: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        let mut header = Header::new_gnu();
        header.set_size(len as u64);
        header.set_mode(0o600);
        header.set_entry_type(EntryType::Regular);
        builder.append_data(&mut header, path, &data[..]).unwrap();
        files.insert(path.to_owned(), data);
    }
    let mut header = Header::new_ustar();
    header.set_size(0);
    header.set_entry_type(EntryType::Directory);
    builder.append_data(&mut header, "global/", &[][..]).unwrap();
    header.set_entry_type(EntryType::Symlink);
    builder.append_link(&mut header, "pg_tblspc/16400", "/elsewhere").unwrap();
    (builder.into_inner().unwrap(), files)
}

fn read(archive: &[u8], piece: usize) -> Result<BTreeMap<String, Vec<u8>>, SourceError> {
    let mut reader = TarReader::new("base.tar");
    let mut files = BTreeMap::new();
    let mut current: Option<(String, u64, Vec<u8>)> = None;
    for bytes in archive.chunks(piece) {
        reader.push(bytes);
        while let Some(event) = reader.next_event()? {
            match event {
                TarEvent::File { path, len } => current = Some((path, len, Vec::new())),
                TarEvent::Data(data) => current.as_mut().unwrap().2.extend_from_slice(&data),
                TarEvent::FileEnd => {
                    let (path, len, data) = current.take().unwrap();
                    assert_eq!(len, data.len() as u64);
                    files.insert(path, data);
                }
                TarEvent::Directory { path } => assert_eq!(path, "global"),
                TarEvent::Other { path } => assert_eq!(path, "pg_tblspc/16400"),
            }
        }
    }
    reader.finish()?;
    Ok(files)
}

#[test]
fn files_come_out_whole_whatever_the_pieces() {
    let (archive, files) = sample();
    for piece in [1, 7, 511, 512, 513, 4096, usize::MAX] {
        assert_eq!(read(&archive, piece.min(archive.len())).unwrap(), files, "pieces of {piece}");
    }
}

#[test]
fn pax_names_and_sizes_are_taken() {
    let mut builder = tar::Builder::new(Vec::new());
    let long = format!("base/{}", "z".repeat(300));
    builder.append_pax_extensions([("path", long.as_bytes()), ("size", b"5")]).unwrap();
    let mut header = Header::new_ustar();
    header.set_size(5);
    builder.append_data(&mut header, "short", &b"hello"[..]).unwrap();
    let files = read(&builder.into_inner().unwrap(), 100).unwrap();
    assert_eq!(files, BTreeMap::from([(long, b"hello".to_vec())]));
}

#[test]
fn every_cut_is_noticed() {
    let (archive, files) = sample();
    // Up to the first of the two zero blocks; the second adds nothing.
    let end = archive.len() - BLOCK;
    for len in (0..end).step_by(13).chain(end - 3..end) {
        assert!(read(&archive[..len], 4096).is_err(), "an archive of {len} bytes was taken");
    }
    assert_eq!(read(&archive[..end], 4096).unwrap(), files);
}

#[test]
fn a_changed_header_byte_is_noticed() {
    let (archive, _) = sample();
    for at in 0..BLOCK {
        let mut changed = archive.clone();
        changed[at] ^= 0x10;
        // The checksum's own text has spare bytes that mean nothing.
        if !(CHECKSUM_START..CHECKSUM_END).contains(&at) {
            assert!(read(&changed, 4096).is_err(), "byte {at} was changed unnoticed");
        } else {
            let _ = read(&changed, 4096);
        }
    }
}

#[test]
fn names_that_lead_out_are_refused() {
    for bad in ["../x", "a/../../x", "/etc/passwd"] {
        let mut header = Header::new_old();
        header.as_old_mut().name[..bad.len()].copy_from_slice(bad.as_bytes());
        header.set_size(0);
        header.set_entry_type(EntryType::Regular);
        header.set_cksum();
        let mut archive = header.as_bytes().to_vec();
        archive.resize(3 * BLOCK, 0);
        assert!(read(&archive, 512).unwrap_err().to_string().contains("leads out"), "{bad}");
    }
}

#[test]
fn files_can_be_skipped() {
    let (archive, files) = sample();
    let mut reader = TarReader::new("base.tar");
    let mut seen = BTreeMap::new();
    while !reader.finished() {
        let at = reader.offset() as usize + reader.input.len();
        reader.push(&archive[at..(at + 512).min(archive.len())]);
        while let Some(event) = reader.next_event().unwrap() {
            if let TarEvent::File { path, len } = event {
                let at = reader.offset() as usize;
                seen.insert(path, archive[at..at + len as usize].to_vec());
                reader.skip_file();
            }
        }
    }
    assert_eq!(seen, files);
}

proptest! {
    #[test]
    fn any_change_is_survived(at in 0usize..12_000, bits in 1u8..=255, piece in 1usize..3000) {
        let (mut archive, files) = sample();
        let at = at % archive.len();
        archive[at] ^= bits;
        // Tar has no checksum over data: only names and lengths are guarded.
        if let Ok(read) = read_loosely(&archive, piece) {
            for (path, len) in read {
                prop_assert_eq!(files.get(&path).map(Vec::len), Some(len));
            }
        }
    }
}

/// Paths and lengths only; a long name stands in a body and may change.
fn read_loosely(archive: &[u8], piece: usize) -> Result<Vec<(String, usize)>, SourceError> {
    let mut reader = TarReader::new("base.tar");
    let mut files = Vec::new();
    for bytes in archive.chunks(piece) {
        reader.push(bytes);
        while let Some(event) = reader.next_event()? {
            if let TarEvent::File { path, len } = event
                && !path.starts_with("pg_tblspc")
                && path.len() < 100
            {
                files.push((path, len as usize));
            }
        }
    }
    Ok(files)
}
