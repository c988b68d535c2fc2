//! `backup_label`, the text file of a base backup (`src/backend/access/transam/xlog.c`,
//! `do_pg_backup_start`; read back by `read_backup_label`).

use crate::base::{Kind, Lsn};

/// What the file says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupLabel {
    /// Redo point of the backup: WAL is needed from here on.
    pub start_lsn: Lsn,
    /// Where the backup's checkpoint record stands.
    pub checkpoint_lsn: Lsn,
    /// PostgreSQL timeline at the start.
    pub timeline: u32,
    /// Taken from a standby; the minimum recovery point of `pg_control` then ends the backup, not
    /// a record.
    pub from_standby: bool,
    /// Label given by the user; empty if there is none.
    pub label: String,
}

/// Why a text is no backup label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupLabelError {
    /// A line that must be there is missing.
    #[error("backup_label has no line '{line}': it is cut, or not of PostgreSQL 15")]
    Missing {
        /// How the line starts.
        line: &'static str,
    },
    /// A line cannot be read.
    #[error("backup_label has the line '{line}: {text}', which cannot be read")]
    Bad {
        /// How the line starts.
        line: &'static str,
        /// The rest of it.
        text: String,
    },
}

impl BackupLabelError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

const START: &str = "START WAL LOCATION";
const CHECKPOINT: &str = "CHECKPOINT LOCATION";
const TIMELINE: &str = "START TIMELINE";
const FROM: &str = "BACKUP FROM";
const LABEL: &str = "LABEL";

impl BackupLabel {
    /// Reads the file. Lines that it does not know are passed over.
    pub fn parse(text: &str) -> Result<BackupLabel, BackupLabelError> {
        let find = |line: &'static str| {
            let of_line = |text: &str| -> Option<String> {
                text.strip_prefix(line)?.strip_prefix(": ").map(|rest| rest.trim_end().to_owned())
            };
            text.lines().find_map(of_line).ok_or(BackupLabelError::Missing { line })
        };
        let lsn = |line: &'static str| {
            let text = find(line)?;
            let first = text.split(' ').next().unwrap_or_default();
            match first.parse::<Lsn>() {
                Ok(lsn) if lsn.is_valid() => Ok(lsn),
                _ => Err(BackupLabelError::Bad { line, text }),
            }
        };
        let timeline = find(TIMELINE)?;
        let from = find(FROM)?;
        Ok(BackupLabel {
            start_lsn: lsn(START)?,
            checkpoint_lsn: lsn(CHECKPOINT)?,
            timeline: match timeline.parse() {
                Ok(number) if number > 0 => number,
                _ => return Err(BackupLabelError::Bad { line: TIMELINE, text: timeline }),
            },
            from_standby: match from.as_str() {
                "primary" => false,
                "standby" => true,
                _ => return Err(BackupLabelError::Bad { line: FROM, text: from }),
            },
            label: find(LABEL).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: primary\n\
        START TIME: 2026-01-02 03:04:05 UTC\n\
        LABEL: pg_basebackup base backup\n\
        START TIMELINE: 1\n";

    #[test]
    fn a_label_is_read() {
        let label = BackupLabel {
            start_lsn: Lsn(0x200_0028),
            checkpoint_lsn: Lsn(0x200_0060),
            timeline: 1,
            from_standby: false,
            label: "pg_basebackup base backup".to_owned(),
        };
        assert_eq!(BackupLabel::parse(TEXT), Ok(label.clone()));
        let standby = TEXT.replace("primary", "standby");
        assert_eq!(BackupLabel::parse(&standby), Ok(BackupLabel { from_standby: true, ..label }));
    }

    #[test]
    fn missing_and_bad_lines_are_named() {
        for line in [START, CHECKPOINT, TIMELINE, FROM] {
            let cut = TEXT.replace(line, "SOMETHING");
            assert_eq!(BackupLabel::parse(&cut), Err(BackupLabelError::Missing { line }));
            let bad: String = TEXT
                .lines()
                .map(
                    |l| if l.starts_with(line) { format!("{line}: x\n") } else { format!("{l}\n") },
                )
                .collect();
            assert!(matches!(BackupLabel::parse(&bad), Err(BackupLabelError::Bad { .. })));
        }
        assert!(BackupLabel::parse("").is_err());
    }
}
