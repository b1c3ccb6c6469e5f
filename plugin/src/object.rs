//! What is sealed.

pub mod disk;
