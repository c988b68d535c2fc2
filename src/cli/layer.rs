//! `pgstrata layer dump`: what stands in a layer file, for people.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Subcommand;
use futures_lite::future::block_on;

use super::admin_client::CommandError;
use crate::base::key::{FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM, KEY_SIZE};
use crate::base::{Key, KeyKind, KeyRange, RelNode, SlruKind, SmallRecord, Value};
use crate::io::read_only::ReadOnlyIo;
use crate::layers::dump::{Inspector, Piece};
use crate::layers::format::{Codec, Footer};
use crate::wal::names::record_name;
use crate::wal::record::RecordHeader;

/// `pgstrata layer`.
#[derive(Subcommand, Debug)]
pub enum LayerCommand {
    /// Show footer, index, values and statistics of a layer file.
    Dump(DumpArgs),
}

/// `pgstrata layer dump`.
#[derive(clap::Args, Debug)]
pub struct DumpArgs {
    /// The file, under the name that the node gave it.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Show a line for each block of the index.
    #[arg(long)]
    blocks: bool,
    /// Show a line for each value.
    #[arg(long)]
    values: bool,
    /// Only these keys: the first digits of a key as it is printed, or a relation fork as
    /// 1663/5/16384, 1663/5/16384_vm, or a block of it as 1663/5/16384/7.
    #[arg(long, value_name = "KEY")]
    key: Option<KeyFilter>,
}

/// The keys that a user wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFilter(KeyRange);

impl FromStr for KeyFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let range = if text.contains('/') { relation_range(text) } else { prefix_range(text) };
        range.map(KeyFilter).ok_or_else(|| {
            "write up to 36 hexadecimal digits, or tablespace/database/relation[_fork][/block]"
                .to_owned()
        })
    }
}

fn prefix_range(text: &str) -> Option<KeyRange> {
    let fill = |with: &str| {
        let missing = (2 * KEY_SIZE).checked_sub(text.len())?;
        let mut bytes = [0; KEY_SIZE];
        hex::decode_to_slice(format!("{text}{}", with.repeat(missing)), &mut bytes).ok()?;
        Some(Key::from_bytes(&bytes))
    };
    Some(fill("0")?..fill("F")?.next())
}

fn relation_range(text: &str) -> Option<KeyRange> {
    let mut parts = text.split('/');
    let (spc, db) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let (rel, fork) = match parts.next()?.split_once('_') {
        None => (text.split('/').nth(2)?, FORK_MAIN),
        Some((rel, "fsm")) => (rel, FORK_FSM),
        Some((rel, "vm")) => (rel, FORK_VM),
        Some((rel, "init")) => (rel, FORK_INIT),
        Some(_) => return None,
    };
    let fork = RelNode { spc, db, rel: rel.parse().ok()? }.fork(fork);
    match (parts.next(), parts.next()) {
        (None, _) => Some(Key::rel_block(fork, 0)..Key::rel_size(fork).next()),
        (Some(block), None) => {
            let key = Key::rel_block(fork, block.parse().ok()?);
            Some(key..key.next())
        }
        _ => None,
    }
}

/// What a key names, in words.
struct KeyName(Key);

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let KeyName(key) = *self;
        let node = RelNode { spc: key.field2, db: key.field3, rel: key.field4 };
        let slru = || SlruKind::from_number(key.field2).map(SlruKind::directory);
        match (key.kind(), key.field1) {
            (KeyKind::RelBlock(..) | KeyKind::SlruBlock(..), _) => write!(f, "{key:?}"),
            _ if key == Key::CONTROL_FILE => f.write_str("pg_control"),
            _ if key == Key::CHECKPOINT => f.write_str("checkpoint"),
            (_, 0x00) if key == Key::rel_size(node.fork(key.field5)) => {
                write!(f, "{} size", node.fork(key.field5))
            }
            (_, 0x00) if key == Key::relmap(node.spc, node.db) => {
                write!(f, "{}/{} relation map", node.spc, node.db)
            }
            (_, 0x01) => match (slru(), key.field3) {
                (Some(directory), 0) => write!(f, "{directory}/{:04X} exists", key.field4),
                (Some(directory), _) => write!(f, "{directory}/{:04X} size", key.field4),
                (None, _) => write!(f, "{key}"),
            },
            (_, 0x02) => write!(f, "prepared transaction {}", key.field6),
            (_, 0x63) => write!(f, "replication origin {}", key.field6),
            (_, 0x64) => write!(f, "{}/{} exists", node.spc, node.db),
            (_, 0x65) => write!(f, "{} exists", node.fork(key.field5)),
            _ => write!(f, "{key}"),
        }
    }
}

/// What a value is, in words.
fn kind_of(value: &Value) -> String {
    match value {
        Value::Image(_) => "image".to_owned(),
        Value::ZeroPage => "zero page".to_owned(),
        Value::WalRecord { will_init, record } => {
            let name = match RecordHeader::parse(record) {
                Ok(header) => record_name(&header),
                Err(error) => format!("UNREADABLE: {error}"),
            };
            format!("wal {name}{}", if *will_init { " (base)" } else { "" })
        }
        Value::Small(small) => match small {
            SmallRecord::VmClear { .. } => "small vm clear",
            SmallRecord::VmTruncate { .. } => "small vm truncate",
            SmallRecord::ClogSet { .. } => "small clog set",
            SmallRecord::MultiXactOffset { .. } => "small multixact offset",
            SmallRecord::MultiXactMembers { .. } => "small multixact members",
        }
        .to_owned(),
    }
}

/// Runs `pgstrata layer`.
pub fn run(command: LayerCommand) -> Result<(), CommandError> {
    match command {
        LayerCommand::Dump(args) => {
            let mut out = std::io::BufWriter::new(std::io::stdout().lock());
            let damaged = block_on(dump(&args, &mut out));
            out.flush()?;
            match damaged? {
                0 => Ok(()),
                number => Err(format!("damage at {number} places of the file, named above").into()),
            }
        }
    }
}

/// Number and length of values.
#[derive(Default)]
struct Total {
    values: u64,
    bytes: u64,
}

/// Writes everything that is asked for; returns the number of damaged places.
async fn dump(args: &DumpArgs, out: &mut dyn Write) -> Result<u64, CommandError> {
    let io = ReadOnlyIo::default();
    let layer = Inspector::open(&io, &args.file).await?;
    out.write_all(frame_text(layer.footer()).as_bytes())?;
    let mut damaged = 0;
    if let Err(error) = layer.check_header().await {
        damaged += 1;
        writeln!(out, "DAMAGED   {error}")?;
    }
    let wanted = args.key.as_ref().map_or(Key::MIN..Key::MAX, |KeyFilter(range)| range.clone());
    let pieces = layer.pieces();
    let mut totals: BTreeMap<String, Total> = BTreeMap::new();
    for (number, piece) in pieces.iter().enumerate() {
        let next = pieces.get(number + 1).map_or(Key::MAX, |next| next.key);
        if piece.key >= wanted.end || next < wanted.start {
            continue;
        }
        if args.blocks {
            writeln!(out, "block     {}", piece_text(number, piece))?;
        }
        let values = match layer.values(piece).await {
            Ok(values) => values,
            Err(error) => {
                damaged += 1;
                writeln!(out, "DAMAGED   {error}")?;
                continue;
            }
        };
        for (key, lsn, value) in values.iter().filter(|(key, _, _)| wanted.contains(key)) {
            let (kind, bytes) = (kind_of(value), value.encoded_len() as u64);
            if args.values {
                writeln!(out, "value     {key}  {}  {lsn}  {kind}, {bytes} bytes", KeyName(*key))?;
            }
            let total = totals.entry(kind).or_default();
            total.values += 1;
            total.bytes += bytes;
        }
    }
    for (kind, Total { values, bytes }) in totals {
        writeln!(out, "total     {kind}: {values} values, {bytes} bytes")?;
    }
    layer.close().await?;
    Ok(damaged)
}

fn frame_text(footer: &Footer) -> String {
    let name = &footer.description.name;
    let owner = footer.description.owner;
    let (keys, lsns) = (name.keys(), name.lsns());
    let lsn_text = match name.is_image() {
        true => format!("{}", lsns.start),
        false => format!("{} to {} (exclusive)", lsns.start, lsns.end),
    };
    let lines = [
        ("kind", if name.is_image() { "image layer" } else { "delta layer" }.to_owned()),
        ("owner", format!("timeline {} of tenant {}", owner.timeline, owner.shard)),
        ("keys", format!("{} to {} (exclusive)", keys.start, keys.end)),
        ("LSN", lsn_text),
        ("length", format!("{} bytes", footer.file_bytes)),
        ("data", format!("4096 to {}", footer.data_end)),
        (
            "index",
            format!(
                "{} to {}, {} bytes, {} unpacked",
                footer.data_end,
                footer.filter_start(),
                footer.index.stored_bytes,
                footer.index.raw_bytes
            ),
        ),
        (
            "filter",
            format!(
                "{} to {}, {} bytes",
                footer.filter_start(),
                footer.regions_end(),
                footer.filter_bytes
            ),
        ),
        ("values", format!("{} of {} keys", footer.value_count, footer.key_count)),
    ];
    lines.into_iter().map(|(label, text)| format!("{label:<10}{text}\n")).collect()
}

fn piece_text(number: usize, piece: &Piece) -> String {
    let place = match &piece.packed {
        None => "nothing (zeros)".to_owned(),
        Some(packed) => {
            let codec = match packed.codec {
                Codec::Raw => "raw",
                Codec::Lz4 => "lz4",
                Codec::Zstd => "zstd",
            };
            format!(
                "{} bytes {codec}, {} unpacked, checksum {:08X}",
                packed.stored_bytes, packed.raw_bytes, packed.crc
            )
        }
    };
    format!(
        "{number} at {}: {place}, {} values from {} at {}",
        piece.offset,
        piece.value_count,
        KeyName(piece.key),
        piece.lsn
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::RelTag;

    const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };

    fn range(text: &str) -> Option<KeyRange> {
        text.parse::<KeyFilter>().ok().map(|KeyFilter(range)| range)
    }

    #[test]
    fn keys_are_chosen_by_prefix_and_by_relation() {
        let main: RelTag = REL.fork(FORK_MAIN);
        let whole = range("1663/5/16384").unwrap();
        assert!(whole.contains(&Key::rel_block(main, 0)) && whole.contains(&Key::rel_size(main)));
        assert!(!whole.contains(&Key::rel_block(REL.fork(FORK_VM), 0)));
        let block = range("1663/5/16384_vm/7").unwrap();
        assert_eq!(block.start, Key::rel_block(REL.fork(FORK_VM), 7));
        assert_eq!(block.end, block.start.next());
        let prefix = range("00").unwrap();
        assert!(prefix.contains(&whole.start) && !prefix.contains(&Key::CHECKPOINT));
        assert_eq!(range(""), Some(Key::MIN..Key::MAX));
        let exact = Key::CHECKPOINT;
        assert_eq!(range(&exact.to_string()), Some(exact..exact.next()));
        for bad in ["x", "1663/5", "1663/5/a", "1663/5/6_x", "1663/5/6/7/8", &"0".repeat(37)] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_named() {
        let name = |key: Key| KeyName(key).to_string();
        let vm = REL.fork(FORK_VM);
        assert_eq!(name(Key::rel_block(vm, 3)), "1663/5/16384_vm block 3");
        assert_eq!(name(Key::rel_size(vm)), "1663/5/16384_vm size");
        assert_eq!(name(Key::rel_dir(vm)), "1663/5/16384_vm exists");
        assert_eq!(name(Key::relmap(1664, 0)), "1664/0 relation map");
        assert_eq!(name(Key::database(1663, 5)), "1663/5 exists");
        assert_eq!(name(Key::slru_block(SlruKind::Clog, 1, 2)), "pg_xact/0001 block 2");
        assert_eq!(name(Key::slru_dir(SlruKind::Clog, 1)), "pg_xact/0001 exists");
        assert_eq!(
            name(Key::slru_size(SlruKind::MultiXactOffsets, 1)),
            "pg_multixact/offsets/0001 size"
        );
        assert_eq!(name(Key::two_phase(9)), "prepared transaction 9");
        assert_eq!(name(Key::replication_origin(2)), "replication origin 2");
        assert_eq!(name(Key::CHECKPOINT), "checkpoint");
        assert_eq!(
            name(Key { field1: 0x77, ..Key::MIN }),
            Key { field1: 0x77, ..Key::MIN }.to_string()
        );
    }
}
