//! What tests of collections need: image layers, and reads at branch points.

use super::super::index::IndexLayer;
use super::*;
use crate::base::key::KeyKind;
use crate::base::{BlockNumber, Key, KeyRange, RelTag, Value};
use crate::layers::{ImageWriter, LayerDesc, LayerOwner};
use crate::shard::pages::zero_page;
use crate::shard::reader::ReadError;

impl<I: Io> Timeline<I> {
    /// Makes an image layer of `keys` at `disk_consistent_lsn`, and publishes it; `None` if there
    /// is one at that LSN that overlaps it.
    pub(crate) async fn make_image_layer(&self, keys: KeyRange) -> Result<Option<Lsn>, String> {
        let _index = self.index_turn.acquire().await;
        let lsn = self.lsns().disk_consistent;
        let present = self.mutable.borrow().layers.iter().any(|(span, _)| {
            span.is_image
                && span.lsns.start == lsn
                && span.keys.start < keys.end
                && keys.start < span.keys.end
        });
        if present {
            return Ok(None);
        }
        let desc = self.write_image_layer(keys, lsn).await?;
        let added = IndexLayer { name: desc.name.to_string(), len: desc.file_bytes };
        let index = self.index_with(&[added], lsn);
        let path = self.context.dir.join(INDEX_FILE);
        let written = durable::write_file_atomic(&self.context.io, &path, &index.encode()).await;
        written.map_err(|error| error.to_string())?;
        let owner = LayerOwner { shard: self.tenant, timeline: self.id };
        let layer = StoredLayer::new(&self.context, desc.name, desc.file_bytes, owner);
        self.mutable.borrow_mut().layers.insert(layer.span(), layer);
        Ok(Some(lsn))
    }

    async fn write_image_layer(&self, keys: KeyRange, lsn: Lsn) -> Result<LayerDesc, String> {
        let owner = LayerOwner { shard: self.tenant, timeline: self.id };
        let (io, dir) = (&self.context.io, &self.context.dir);
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let values = self.scan(&keys, lsn).await.map_err(|e| text(&e))?;
        let mut writer = ImageWriter::create(io, dir, owner, lsn, 0).await.map_err(|e| text(&e))?;
        for (key, (_, value)) in values {
            let content = match (key.kind(), value) {
                // What does not exist is not in the layer.
                (KeyKind::Metadata, Value::Image(bytes)) if bytes.is_empty() => continue,
                (KeyKind::Metadata, value) => value,
                _ => Value::Image(self.page(key, lsn).await.map_err(|e| text(&e))?),
            };
            writer.add(key, &content).await.map_err(|e| text(&e))?;
        }
        writer.finish(keys).await.map_err(|e| text(&e))
    }

    /// A page as a child reads it that branches off at `lsn`: the cut-off does not matter.
    pub(crate) async fn page_at_branch(
        &self,
        rel: RelTag,
        block: BlockNumber,
        lsn: Lsn,
    ) -> Result<bytes::Bytes, ReadError> {
        match self.fork_size(rel, lsn).await? {
            Some(blocks) if block < blocks => self.page(Key::rel_block(rel, block), lsn).await,
            _ => Ok(zero_page()),
        }
    }

    /// Names of the layers in the map.
    pub(crate) fn layer_names(&self) -> BTreeSet<String> {
        self.mutable.borrow().layers.iter().map(|(_, layer)| layer.index_entry().name).collect()
    }
}
