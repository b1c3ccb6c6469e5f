//! Hook operation to effect.
