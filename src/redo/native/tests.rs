//! Tests of native redo.
