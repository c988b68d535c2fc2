//! Writing files so that they are whole or absent.
