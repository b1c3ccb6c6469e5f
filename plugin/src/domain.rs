//! Domain XML to a domain and back.
