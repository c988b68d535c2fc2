//! Plans: pure functions that say what is to be done with the layers of a timeline. Carrying them
//! out is another module's work.

pub mod gc;
