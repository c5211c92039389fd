//! math/mod
