//! tools/mod
