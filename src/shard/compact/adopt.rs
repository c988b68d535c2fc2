//! What a job has made takes the place of what it was made from.

use std::collections::BTreeSet;
use std::rc::Rc;

use super::job::{CompactError, Made};
#[cfg(test)]
use super::{Planted, count, planted};
use crate::io::{Instant, Io, durable};
use crate::shard::index::INDEX_FILE;
use crate::shard::layer_map::LayerSpan;
use crate::shard::stored::StoredLayer;
use crate::shard::timeline::Timeline;

impl<I: Io> Timeline<I> {
    /// Steps 3 and 4 for what a job has made that began then.
    pub(super) async fn adopt(
        &self,
        made: Made,
        removed: &[Rc<StoredLayer<I>>],
        began: Instant,
    ) -> Result<(), CompactError> {
        #[cfg(test)]
        count(3, made.pages);
        self.context.counters.compaction_pages.add(made.pages);
        self.context.counters.compaction_page_failures.add(made.failures);
        if !made.layers.is_empty() {
            let took = self.context.io.now().saturating_sub(began);
            let layers = self.warmed_up(&made.layers, took).await;
            self.replace_layers(layers, removed).await?;
        }
        match made.error {
            // The plan would be the same at once: nothing but pages that cannot be rebuilt.
            None if made.layers.is_empty() => Err(CompactError::Nothing),
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Puts durable layer files in the place of others, in the index and in memory; the others'
    /// files go when nobody reads them any more.
    ///
    /// Garbage collection may have taken some of the others meanwhile: what they had is in the new
    /// files still, and no read looks there. If it has taken all of them, the new ones are not
    /// needed either.
    ///
    /// # Errors
    /// [`CompactError::Io`], and memory is as before.
    async fn replace_layers(
        &self,
        added: Vec<(LayerSpan, Rc<StoredLayer<I>>)>,
        removed: &[Rc<StoredLayer<I>>],
    ) -> Result<(), CompactError> {
        let _turn = self.index_turn.acquire().await;
        let present = |span: &LayerSpan| self.mutable.borrow().layers.contains(span);
        let twice = added.iter().find(|(span, _)| present(span));
        if twice.is_none() {
            let names = added.iter().map(|(_, layer)| layer.name().clone());
            self.compaction.strays.borrow_mut().extend(names);
        }
        let left: Vec<_> = removed.iter().filter(|layer| present(&layer.span())).cloned().collect();
        let written = match twice {
            Some((_, twice)) => {
                tracing::error!("compaction made {}, which is there already", twice.name());
                Err(CompactError::Changed)
            }
            None if left.is_empty() && !removed.is_empty() => Ok(false),
            None => self.write_index_replacing(&added, &left).await.map(|()| true),
        };
        if !matches!(written, Ok(true)) {
            for (_, layer) in added {
                // Nothing was written by it.
                let _ = layer.close().await;
            }
            return written.map(|_| ());
        }
        let spans: Vec<_> = left.iter().map(|layer| layer.span()).collect();
        #[cfg(test)]
        let spans = if planted(Planted::KeepInputs) { Vec::new() } else { spans };
        self.mutable.borrow_mut().layers.replace(&spans, added);
        for layer in left.iter().filter_map(|layer| layer.leave_memory()) {
            self.drop_elsewhere(layer);
        }
        self.compaction.retired.borrow_mut().extend(left);
        Ok(())
    }

    /// Makes an index durable that has these layers in the place of those. Part of the index turn.
    async fn write_index_replacing(
        &self,
        added: &[(LayerSpan, Rc<StoredLayer<I>>)],
        removed: &[Rc<StoredLayer<I>>],
    ) -> Result<(), CompactError> {
        let entries: Vec<_> = added.iter().map(|(_, layer)| layer.index_entry()).collect();
        let gone: BTreeSet<String> = removed.iter().map(|layer| layer.name().to_string()).collect();
        #[cfg(test)]
        if planted(Planted::RemoveBeforeIndex) {
            for layer in removed {
                let _ = self.context.io.remove(&layer.path()).await;
            }
        }
        let index = self.index_replacing(&entries, &gone, self.lsns().disk_consistent);
        let path = self.context.dir.join(INDEX_FILE);
        let index = index.encode();
        durable::write_file_atomic(&self.context.io, &path, &index).await?;
        self.context.counters.index_bytes.add(index.len() as u64);
        Ok(())
    }
}
