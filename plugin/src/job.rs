//! Work that outlives a request.

pub mod sweep;
