//! Mean reward and pass@k on held-out prompts.
