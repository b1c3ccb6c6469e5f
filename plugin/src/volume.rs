//! Encrypted images: create, open, inspect.
