//! Counts the reads of a timeline that are under way, so that a timeline can go away when none
//! is left, and no read meets a file that was removed beneath it.
//!
//! Synchronous; whoever closes the gate waits by looking at [`Gate::is_idle`].

use std::cell::Cell;
use std::rc::Rc;

/// See the module's text.
#[derive(Default)]
pub struct Gate(Rc<State>);

#[derive(Default)]
struct State {
    inside: Cell<u64>,
    closed: Cell<bool>,
}

/// One read; it ends when this is dropped.
pub struct GateGuard(Rc<State>);

impl Gate {
    /// Begins a read; `None` when the gate is closed.
    pub fn enter(&self) -> Option<GateGuard> {
        if self.0.closed.get() {
            return None;
        }
        self.0.inside.set(self.0.inside.get() + 1);
        Some(GateGuard(self.0.clone()))
    }

    /// Lets nobody in any more. Those who are inside go on.
    pub fn close(&self) {
        self.0.closed.set(true);
    }

    /// Takes a [`Gate::close`] back.
    pub fn reopen(&self) {
        self.0.closed.set(false);
    }

    /// True after [`Gate::close`].
    pub fn is_closed(&self) -> bool {
        self.0.closed.get()
    }

    /// True when no read is under way.
    pub fn is_idle(&self) -> bool {
        self.0.inside.get() == 0
    }
}

impl Drop for GateGuard {
    fn drop(&mut self) {
        self.0.inside.set(self.0.inside.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_out_and_not_in() {
        let gate = Gate::default();
        let first = gate.enter();
        assert!(first.is_some() && !gate.is_idle());
        gate.close();
        assert!(gate.enter().is_none() && !gate.is_idle());
        drop(first);
        assert!(gate.is_idle());
        gate.reopen();
        assert!(gate.enter().is_some());
    }
}
