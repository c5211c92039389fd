//! Rewards of a group to advantages.
