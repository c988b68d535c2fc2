//! Taking turns: one task at a time in a section that awaits.

/// A lock for the tasks of one executor. The right to enter is a token in a channel of one place;
/// whoever gives up waiting leaves nothing behind.
pub struct Turn {
    give: async_channel::Sender<()>,
    take: async_channel::Receiver<()>,
}

/// The right to be in the section, until it is dropped.
pub struct TurnGuard<'a>(&'a Turn);

impl Default for Turn {
    fn default() -> Self {
        let (give, take) = async_channel::bounded(1);
        let turn = Turn { give, take };
        turn.release();
        turn
    }
}

impl Turn {
    /// Waits for the turn.
    pub async fn acquire(&self) -> TurnGuard<'_> {
        // Both ends live here, so the channel cannot be closed.
        let _ = self.take.recv().await;
        TurnGuard(self)
    }

    /// True when nobody is in the section.
    pub fn is_free(&self) -> bool {
        !self.take.is_empty()
    }

    fn release(&self) {
        // There is one token and one place for it.
        let _ = self.give.try_send(());
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}
