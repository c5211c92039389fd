//! host/mod
