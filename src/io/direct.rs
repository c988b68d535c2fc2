//! Opening files for direct I/O.
//!
//! glommio 0.9 asks for the file system of a path after it has opened the file there, and panics if
//! nothing is there any more, which ends the executor. But files go away at any time: journal
//! segments that are not needed, layers that were merged, timelines that are deleted. So a file is
//! opened by its path in glommio's plain way first, which asks for nothing, and then for direct I/O
//! by the name that its descriptor has for as long as it is open.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use glommio::io::{DmaFile, OpenOptions};

/// Length of an open file in bytes. glommio goes by the path, where another file may be by now, or
/// none.
#[allow(clippy::disallowed_methods, reason = "a part of the door to the file system")]
pub(super) fn file_len(file: &DmaFile) -> io::Result<u64> {
    Ok(std::fs::metadata(descriptor_path(file))?.len())
}

/// A name of an open file, whether or not it has others.
fn descriptor_path(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Opens or creates the file as `options` say, which include reading and writing. It may be removed
/// meanwhile: then it is there or it is not, as for any open file.
///
/// # Errors
/// As of `open(2)`.
pub(super) async fn open_direct(options: &OpenOptions, path: &Path) -> io::Result<DmaFile> {
    let held = options.buffered_open(path).await?;
    let name = descriptor_path(&held);
    let opened = OpenOptions::new().read(true).write(true).dma_open(name).await;
    held.close().await?;
    opened.map_err(|error| match io::Error::from(error) {
        // The file is there: nobody may take this for the opposite.
        error if error.kind() == io::ErrorKind::NotFound => {
            io::Error::other("/proc is not there, or not that of this process")
        }
        error => error,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// By `dma_open` alone the executor panics within some thousand files.
    #[test]
    fn files_may_go_away_while_they_are_opened() {
        let binary = std::env::current_exe().unwrap();
        let path = binary.with_file_name(format!("going-away-{}", std::process::id()));
        let stop = Arc::new(AtomicBool::new(false));
        let (coming, ended) = (path.clone(), stop.clone());
        let others = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                std::fs::write(&coming, [7; 4096]).unwrap();
                std::fs::remove_file(&coming).unwrap();
            }
        });
        let run = std::thread::spawn(move || {
            let executor = glommio::LocalExecutorBuilder::default().io_memory(1 << 20).make();
            executor.unwrap().run(async move {
                let (mut opened, mut tries) = (0, 0);
                while opened < 3000 && tries < 1_000_000 {
                    tries += 1;
                    let options = OpenOptions::new().read(true).write(true).to_owned();
                    match open_direct(&options, &path).await {
                        Ok(file) => {
                            opened += 1;
                            file.close().await.unwrap();
                        }
                        Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}"),
                    }
                }
                opened
            })
        });
        let opened = run.join();
        stop.store(true, Ordering::Relaxed);
        others.join().unwrap();
        assert_eq!(opened.unwrap(), 3000);
    }
}
