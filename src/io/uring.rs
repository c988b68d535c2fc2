//! glommio implementation of [`super::Io`].
