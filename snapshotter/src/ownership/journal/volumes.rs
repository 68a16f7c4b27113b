//! Entries of writable volumes: which are here, and which come or have gone.

use godwit_protos::{FileSystem, VolumeId};
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{Journal, JournalError, parse, put};

/// Key: volume id. Value: [`VolumeEntry`] as JSON.
pub(super) const VOLUMES: TableDefinition<&str, &[u8]> = TableDefinition::new("volumes_v1");

/// What is journalled of a writable volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeEntry {
    /// The node that it moved to, if it did; its data are then gone from here.
    pub moved_to: Option<String>,
    /// What it comes here with, until the container has run here.
    #[serde(default)]
    pub arriving: Option<Arriving>,
    /// What its image holds, if it is a block volume.
    #[serde(default)]
    pub file_system: Option<FileSystem>,
}

/// What brings a volume here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arriving {
    /// The container that it comes with, `NAMESPACE/ID`.
    pub container: String,
    /// The session, whose mark the volume carries.
    pub session: String,
}

impl Journal {
    /// The entry of a volume.
    pub fn volume(&self, id: &VolumeId) -> Result<Option<VolumeEntry>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(VOLUMES).map_err(|error| self.failed(error))?;
        let value = table.get(id.as_str()).map_err(|error| self.failed(error))?;
        value.map(|value| parse(id.as_str(), value.value())).transpose()
    }

    /// Writes the entry of a volume, or removes it.
    pub fn set_volume(
        &self,
        id: &VolumeId,
        entry: Option<&VolumeEntry>,
    ) -> Result<(), JournalError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(VOLUMES).map_err(|error| self.failed(error))?;
            match entry {
                Some(entry) => put(&mut table, id.as_str(), entry),
                None => table.remove(id.as_str()).map(drop),
            }
            .map_err(|error| self.failed(error))
        })
    }

    /// Every volume.
    pub fn volumes(&self) -> Result<Vec<(VolumeId, VolumeEntry)>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(VOLUMES).map_err(|error| self.failed(error))?;
        let mut entries = Vec::new();
        for row in table.iter().map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            if let Ok(id) = key.value().parse() {
                entries.push((id, parse(key.value(), value.value())?));
            }
        }
        Ok(entries)
    }
}
