//! Connections to a running primary.

use super::control::TimelineSource;
use super::follow::Connector;
use super::index::{ClusterIdentity, WalSourceConfig};
use crate::io::foreign::ForeignFile;
use crate::limits::PASSFILE_BYTES_MAX;
use crate::wal::receiver::{self, NetStream, PrimaryStream};
use crate::wal::source::SourceError;
use crate::wal::source::connection::{Connection, SlotName};
use crate::wal::source::conninfo::ConnInfo;

impl WalSourceConfig {
    /// Looks for what can be told to be wrong before anything is done.
    ///
    /// # Errors
    /// Connection string or slot cannot be right.
    pub fn check(&self) -> Result<(), String> {
        check(&self.conninfo, self.slot.as_deref())
    }
}

impl TimelineSource {
    /// As [`WalSourceConfig::check`].
    ///
    /// # Errors
    /// As there.
    pub fn check(&self) -> Result<(), String> {
        match self {
            TimelineSource::Primary { conninfo, slot } => check(conninfo, slot.as_deref()),
            TimelineSource::Backup { primary, slot, .. }
            | TimelineSource::Pgdata { primary, slot, .. } => match primary {
                Some(conninfo) => check(conninfo, slot.as_deref()),
                None if slot.is_some() => Err("a slot is given, but no primary".to_owned()),
                None => Ok(()),
            },
        }
    }
}

fn check(conninfo: &str, slot: Option<&str>) -> Result<(), String> {
    conninfo.parse::<ConnInfo>().map_err(|error| error.to_string())?;
    let slot = slot.map(str::parse::<SlotName>).transpose();
    slot.map(drop).map_err(|error| error.to_string())
}

/// Logs in for replication. A password comes from the connection string or the file that it names.
pub(super) async fn open(conninfo: &str) -> Result<Connection<NetStream>, SourceError> {
    let invalid = |what: String| SourceError::Invalid { what };
    let mut info: ConnInfo = conninfo.parse().map_err(|error| invalid(format!("{error}")))?;
    if let Some(path) = info.passfile.clone().filter(|_| info.password.is_none()) {
        let file = ForeignFile::open(&path)?;
        let len = file.len()?;
        if len > PASSFILE_BYTES_MAX {
            return Err(invalid(format!("{} is too large for a password file", path.display())));
        }
        let mut bytes = vec![0; len as usize];
        let got = file.read_at(0, &mut bytes)?;
        let text = String::from_utf8_lossy(bytes.get(..got).unwrap_or_default()).into_owned();
        info.password = info.password_from_passfile(&text);
    }
    receiver::connect(&info).await
}

/// Connects timelines to their primaries.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrimaryConnector;

impl Connector for PrimaryConnector {
    type Source = PrimaryStream<NetStream>;

    async fn connect(
        &self,
        source: &WalSourceConfig,
        cluster: &ClusterIdentity,
    ) -> Result<Self::Source, SourceError> {
        let mut connection = open(&source.conninfo).await?;
        let identity = connection.identify_system().await?;
        if identity.system_id != cluster.system_id {
            return Err(SourceError::Invalid {
                what: format!(
                    "the primary belongs to cluster {}, the timeline to cluster {}",
                    identity.system_id, cluster.system_id
                ),
            });
        }
        let slot: Option<SlotName> = match &source.slot {
            Some(name) => {
                let slot: SlotName = name.parse()?;
                connection.ensure_slot(&slot).await?;
                Some(slot)
            }
            None => None,
        };
        Ok(PrimaryStream::new(connection, slot, cluster.tli))
    }
}
