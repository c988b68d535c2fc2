//! Images of pages into an image layer, against what the device takes in one row.
//!
//! Both sides write the same number of bytes through glommio with direct I/O to the same
//! directory, have space for it from the start, and end with a sync. The pages are such that no
//! compression shrinks them, so that the device gets all of their bytes.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use futures_util::poll;
use pgstrata::base::lsn::Lsn;
use pgstrata::base::{Key, RelNode, Value};
use pgstrata::io::uring::UringIo;
use pgstrata::io::{File, Io};
use pgstrata::layers::{ImageWriter, LayerOwner};

use super::shard::{TENANT, TIMELINE, on_executor};
use super::{MB, Result, Rounds, sized};

const PAGE: usize = 8192;
const WRITE: usize = 1 << 20;
/// Writes of the baseline that the device has at once.
const DEPTH: usize = 4;

/// Writes `len` bytes as fast as the device takes them; bytes per second.
async fn device(io: &UringIo, path: &Path, len: usize) -> Result<f64> {
    let begin = Instant::now();
    let file = Rc::new(io.create(path).await?);
    file.allocate(len as u64).await?;
    let mut under_way: VecDeque<LocalBoxFuture<'static, _>> = VecDeque::new();
    for at in (0..len).step_by(WRITE) {
        if under_way.len() >= DEPTH {
            under_way.pop_front().ok_or("no write")?.await?;
        }
        let mut buf = file.alloc_to_fill(WRITE);
        buf.fill((at / WRITE) as u8 | 1);
        let file = file.clone();
        let mut write: LocalBoxFuture<'static, _> =
            Box::pin(async move { file.write_at(at as u64, buf).await });
        match poll!(&mut write) {
            std::task::Poll::Ready(result) => result?,
            std::task::Poll::Pending => under_way.push_back(write),
        }
    }
    for write in under_way {
        write.await?;
    }
    file.sync().await?;
    let rate = len as f64 / begin.elapsed().as_secs_f64();
    Rc::into_inner(file).ok_or("the file is shared")?.close().await?;
    io.remove(path).await?;
    Ok(rate)
}

async fn images(io: &UringIo, dir: &Path, pages: &[Bytes], count: usize) -> Result<f64> {
    let owner = LayerOwner { shard: TENANT, timeline: TIMELINE };
    let begin = Instant::now();
    // As compaction does, which knows the images that new ones take the place of.
    let least = (count * PAGE) as u64;
    let mut writer = ImageWriter::create(io, dir, owner, Lsn(100), least).await?;
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(0);
    for (block, page) in (0..count as u32).zip(pages.iter().cycle()) {
        writer.add(Key::rel_block(rel, block), &Value::Image(page.clone())).await?;
    }
    let done = writer.finish(Key::MIN..Key::MAX).await?;
    let rate = (count * PAGE) as f64 / begin.elapsed().as_secs_f64();
    io.remove(&dir.join(done.name.to_string())).await?;
    Ok(rate)
}

/// Runs both in turns and prints rates and ratio.
pub fn compare(dir: PathBuf) -> Result<()> {
    on_executor(move || async move {
        let io = UringIo::new(None);
        let mut random = 1u64;
        let mut noise = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 32) as u8
        };
        let pages: Vec<Bytes> =
            (0..256).map(|_| (0..PAGE).map(|_| noise()).collect::<Vec<_>>().into()).collect();
        let count = sized(2_000, 40_000);
        let (mut theirs, mut ours, mut ratio) = Default::default();
        for _ in 0..sized(1, 5) {
            let (a, b): (f64, f64) = (
                device(&io, &dir.join("row"), count * PAGE).await?,
                images(&io, &dir, &pages, count).await?,
            );
            let rounds: [(&mut Rounds, f64); 3] =
                [(&mut theirs, a / MB), (&mut ours, b / MB), (&mut ratio, b / a)];
            rounds.into_iter().for_each(|(rounds, value)| rounds.add(value));
        }
        println!("page images of {:.0} MB into an image layer", (count * PAGE) as f64 / MB);
        println!("  device, writes in a row: {} MB/s", theirs.text(0));
        println!("  image layer:             {} MB/s", ours.text(0));
        println!("  ratio image layer / device: {}", ratio.text(2));
        Ok(())
    })
}
