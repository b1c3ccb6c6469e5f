//! Where this host keeps envelopes and providers.
