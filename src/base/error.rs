//! What a caller can do about an error.

/// The four ways out of an error. Every error enum of the program maps each of its variants to
/// one of these; the text of the variant says what happened, the kind says what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The same call may succeed later: time-out, lost connection, overload, full disk.
    Retry,
    /// The caller asked for what does not exist, or in a form that is not allowed. Repeating
    /// the call is useless.
    Invalid,
    /// Stored or received data is damaged. The thing named in the error is unusable until an
    /// operator repairs it; everything else goes on.
    Corrupt,
    /// The node, tenant or connection is going away.
    Shutdown,
}
