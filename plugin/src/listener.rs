//! The Varlink services.
