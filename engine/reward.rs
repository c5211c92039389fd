//! Groups to rewards: the bridge to the verifier pool.
