//! `pgstrata redo replay`: an input of a failed redo, by a wal-redo process and natively.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_lite::future::block_on;

use super::admin_client::CommandError;
use super::pg::bin_dir;
use super::scratch::Scratch;
use super::service::find_library;
use crate::base::page::page_lsn;
use crate::redo::child::{ChildRedo, ChildSettings};
use crate::redo::failed::Failed;
use crate::redo::native::run::NativeRedo;
use crate::redo::{Redo, RedoError, RedoRequest, protocol, record};

/// `pgstrata redo replay`.
#[derive(clap::Args, Debug)]
pub(super) struct ReplayArgs {
    /// What the node kept, in the directory redo_failed of its data directory.
    file: PathBuf,
    /// Write the page that PostgreSQL makes of it to this file.
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    /// The wal-redo library; as a rule it is found beside this program.
    #[arg(long, value_name = "FILE")]
    library: Option<PathBuf>,
}

/// Runs it; an error if PostgreSQL refuses the input again, or native redo makes another page.
pub(super) fn replay(args: ReplayArgs) -> Result<(), CommandError> {
    let named = |problem: &dyn Display| format!("{}: {problem}", args.file.display());
    let file = Bytes::from(std::fs::read(&args.file).map_err(|error| named(&error))?);
    let input = Failed::decode(&file).map_err(|error| named(&error))?;
    let request = protocol::decode_request(&input.frames)?;
    describe(&input, &request);
    let (child, native) = both(&args, &Scratch::new("replay")?, &input, request)?;
    say("PostgreSQL", &child);
    say("native redo, PostgreSQL for the rest", &native);
    let child = child?;
    if let Some(path) = &args.page {
        std::fs::write(path, &child)?;
    }
    match native? == child {
        true => Ok(()),
        false => Err("native redo makes another page of it".into()),
    }
}

type Answer = Result<Bytes, RedoError>;

fn both(
    args: &ReplayArgs,
    root: &std::path::Path,
    input: &Failed,
    request: RedoRequest,
) -> Result<(Answer, Answer), CommandError> {
    let child = ChildRedo::new(ChildSettings {
        tenant: input.tenant.clone(),
        postgres_bin: bin_dir().join("postgres"),
        walredo_so: std::path::absolute(find_library(&args.library.clone().unwrap_or_default())?)?,
        scratch_dir: root.to_owned(),
        cpu: None,
        redo: input.redo,
        timeout: Duration::from_secs(60),
    });
    let native = NativeRedo::new(child, input.redo);
    let answers = block_on(async {
        let child = native.inner().redo(request.clone()).await;
        let both = native.redo(request).await;
        native.inner().shutdown().await;
        (child, both)
    });
    Ok(answers)
}

fn describe(input: &Failed, request: &RedoRequest) {
    println!("tenant {}, {} block {}", input.tenant, request.rel, request.block);
    println!("failed with: {}", input.problem);
    match &request.base {
        Some(page) if page.len() >= 8 => println!("base page at {}", page_lsn(page)),
        _ => println!("no base page"),
    }
    for (lsn, bytes) in &request.records {
        let (info, rmgr) = (bytes.get(16).copied(), bytes.get(17).copied());
        let state = record::check(*lsn, request.rel, request.block, bytes);
        let state = state.map_or_else(|error| error.to_string(), |()| "sound".to_owned());
        let (info, rmgr) = (info.unwrap_or_default(), rmgr.unwrap_or_default());
        println!("record to {lsn}: {} bytes, rmid {rmgr}, info {info:02X}, {state}", bytes.len());
    }
}

fn say(who: &str, answer: &Answer) {
    match answer {
        Ok(page) => println!("{who}: page at {}, CRC {:08x}", page_lsn(page), crc32c::crc32c(page)),
        Err(error) => println!("{who}: {error}"),
    }
}
