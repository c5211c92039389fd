//! boxes/mod
