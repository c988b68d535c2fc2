//! `pgstrata check`: reads every file of a node's data directory and checks it.
//!
//! Exit status: 0 if nothing is damaged, 1 if something is, 2 if the check could not be made.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use futures_lite::future::block_on;

use crate::io::read_only::ReadOnlyIo;
use crate::shard::check::check;
use crate::shard::check::report::{FileReport, Severity, Summary};

/// Exit status where the check could not be made.
const CANNOT_RUN: u8 = 2;

/// `pgstrata check`.
#[derive(clap::Args, Debug)]
pub struct CheckArgs {
    /// The data directory. A running node is not disturbed: nothing is locked or written.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Show damage only.
    #[arg(long)]
    quiet: bool,
    /// One JSON object per line: one for each file, then one with the sums.
    #[arg(long)]
    json: bool,
}

/// Runs the check.
pub fn run(args: &CheckArgs) -> ExitCode {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match check_into(args, &mut out) {
        Ok(summary) if summary.damaged_files == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("pgstrata: {problem}");
            ExitCode::from(CANNOT_RUN)
        }
    }
}

fn check_into(args: &CheckArgs, out: &mut dyn Write) -> Result<Summary, String> {
    let io = ReadOnlyIo::default();
    let mut written = Ok(());
    let mut show = |report: &FileReport| {
        if written.is_ok() && (report.is_damaged() || !args.quiet) {
            written = match args.json {
                true => json_line(out, report),
                false => out.write_all(lines(report, &args.dir).as_bytes()),
            };
        }
    };
    let checked = block_on(check(&io, &args.dir, &mut show));
    let summary = checked.map_err(|error| {
        format!("{error}: {} is no data directory of a node", args.dir.display())
    })?;
    let finish = |written: std::io::Result<()>, out: &mut dyn Write| {
        written?;
        match args.json {
            true => json_line(out, &serde_json::json!({ "summary": summary }))?,
            false => out.write_all(sums(&summary).as_bytes())?,
        }
        out.flush()
    };
    finish(written, out).map_err(|error| format!("the report cannot be written: {error}"))?;
    Ok(summary)
}

fn json_line(out: &mut dyn Write, value: &impl serde::Serialize) -> std::io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

/// The lines of one file, its path relative to the data directory.
fn lines(report: &FileReport, dir: &Path) -> String {
    let path = report.path.strip_prefix(dir).unwrap_or(&report.path).display();
    let [kind, _] = report.kind.words();
    let state = match report.findings.iter().map(|finding| finding.severity).max() {
        None => "ok",
        Some(Severity::Note) => "note",
        Some(Severity::Damage) => "DAMAGED",
    };
    let mut text = format!("{state:<8}{path}: {kind}, {} bytes", report.bytes);
    if !report.content.is_empty() {
        text.push_str(&format!("; {}", report.content));
    }
    text.push('\n');
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Note => "note",
            Severity::Damage => "damage",
        };
        text.push_str(&format!("        {severity}: {}\n", finding.text));
    }
    text
}

fn count(number: u64, [one, many]: [&str; 2]) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn sums(summary: &Summary) -> String {
    let total = summary.total();
    let mut text = format!(
        "{}, {}, {}, {} bytes\n",
        count(summary.tenants, ["tenant", "tenants"]),
        count(summary.timelines, ["timeline", "timelines"]),
        count(total.files, ["file", "files"]),
        total.bytes
    );
    for (kind, total) in &summary.files {
        text.push_str(&format!("  {}, {} bytes\n", count(total.files, kind.words()), total.bytes));
    }
    text.push_str(&format!(
        "  {} in layers, {} in journals\n",
        count(summary.values, ["value", "values"]),
        count(summary.records, ["record", "records"])
    ));
    let damaged = match summary.damaged_files {
        0 => "no damage".to_owned(),
        number => format!("DAMAGED: {}", count(number, ["file", "files"])),
    };
    text.push_str(&format!("{damaged}; {}\n", count(summary.notes, ["note", "notes"])));
    text
}
